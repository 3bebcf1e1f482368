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
    "apply_runs": [(True, False)],
    "apply_rows": [(True,)],
    "reduce_runs": [(runs.FROM_RESIDUAL, True)],
    "reduce_rows": [(runs.FROM_RESIDUAL, True, 2), (runs.FROM_RESIDUAL, True, 4)],
    "gradient_runs": [(runs.FROM_X, True)],
    "gradient_rows": [(runs.FROM_X, True)],
}
WITH_BITS = {
    "apply_runs": (True, True),
    "reduce_runs": (runs.FROM_BITS, True),
    "gradient_runs": (runs.FROM_BITS, True),
}


def module_of(loop, options, real, name, avx512):
    return machine_code.optimised(*getattr(runs, loop)(real, name, *options), True, avx512)


@pytest.mark.parametrize("real", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES, ids=str)
def test_loops_are_vectors(name, real):
    for loop, options in [(loop, options) for loop, each in LOOPS.items() for options in each]:
        code = str(module_of(loop, options, real, name, name in COSTLY))
        # Over some rows at once and over those left over.
        vectors = 2 if loop.endswith("rows") else 1
        assert len(re.findall(r"^vector\.body\d*:", code, re.MULTILINE)) >= vectors, (loop, options)


@pytest.mark.parametrize("real", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu"])
def test_loops_over_whole_words_are_vectors_too(name, real):
    for loop, options in WITH_BITS.items():
        blocks = re.split(r"\n(?=\S+:)", str(module_of(loop, options, real, name, False)))
        # Over whole words and over the rest.
        assert sum("store <" in block for block in blocks) >= 2, loop


@pytest.mark.parametrize("name", [name for name in NAMES if name not in COSTLY], ids=str)
@pytest.mark.parametrize("loop", ["reduce_runs", "gradient_runs"])
def test_no_load_waits_for_another(name, loop):
    def waiting_loads(avx512):
        module = module_of(loop, LOOPS[loop][0], np.float32, name, avx512)
        code = machine_code.target_machine(avx512).emit_assembly(module)
        return re.findall(r"\n.*\(%r.*\{%k\d\}.*", code)

    assert not waiting_loads(avx512=False)
    if name == "relu" and "+avx512f" in machine_code._features():
        assert waiting_loads(avx512=True)  # so that it shows when the compiler no longer does it
