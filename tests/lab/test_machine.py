"""The machine and the versions are told in full."""

import torch

from batchnorm.lab.machine import machine, machine_line, versions


def test_machine_and_versions() -> None:
    assert machine()["cores"] >= 1
    assert machine()["processor"]
    assert set(versions()) == {"python", "torch", "numpy", "batchnorm"}
    assert torch.__version__ in machine_line()
    assert "\n" not in machine_line()
