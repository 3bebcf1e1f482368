"""Every innermost loop of the CPU kernels becomes vector instructions, which wait for memory once."""

import re

import numpy as np
import pytest

from batchnorm.kernels.cpu import machine_code, runs
from batchnorm.kernels.cpu.plan import COSTLY
from tests.activations import ACTIVATIONS
from tests.kernels.cpu_checks import CPU

pytestmark = CPU

NAMES = [None, *(name for name in ACTIVATIONS if name != "softplus")]
# With what makes each the largest, as large ones are where LLVM gives up.
LOOPS = {
    "apply": (True,),
    "reduce": (runs.FROM_RESIDUAL, True),
    "gradient": (runs.FROM_X, True),
}


def module_of(loop, shape, real, name, avx512):
    build = getattr(runs, f"{loop}_{shape}")
    return machine_code.optimised(*build(real, name, *LOOPS[loop]), True, avx512)


@pytest.mark.parametrize("real", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES, ids=str)
def test_loops_are_vectors(name, real):
    for loop in LOOPS:
        for shape in ("runs", "rows"):
            assert "vector.body:" in str(module_of(loop, shape, real, name, name in COSTLY)), (loop, shape)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in COSTLY], ids=str)
@pytest.mark.parametrize("loop", ["reduce", "gradient"])
def test_no_load_waits_for_another(name, loop):
    def waiting_loads(avx512):
        module = module_of(loop, "runs", np.float32, name, avx512)
        code = machine_code.target_machine(avx512).emit_assembly(module)
        return re.findall(r"\n.*\(%r.*\{%k\d\}.*", code)

    assert not waiting_loads(avx512=False)
    if name == "relu" and "+avx512f" in machine_code._features():
        assert waiting_loads(avx512=True)  # so that it shows when the compiler no longer does it
