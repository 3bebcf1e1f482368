"""How the processes of a run come together and part."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from batchnorm.lab.processes import joined


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Holder:
    """Holds itself, as DistributedDataParallel does, so that only the garbage collector ends it."""

    def __init__(self) -> None:
        self.itself = self


def test_the_process_group_goes_after_what_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    events: list[Any] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: events.append("begins"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: events.append("ends"))
    gc.disable()
    try:
        with joined():
            weakref.finalize(Holder(), events.append, "holder ends")
    finally:
        gc.enable()
    assert events == ["begins", "holder ends", "ends"]
