"""When the Triton kernels are chosen, and that all of them compile: neither needs a GPU."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from batchnorm.kernels import cuda
from batchnorm.kernels.cuda import plan as planning
from batchnorm.kernels.cuda import thresholds
from batchnorm.recipes import Recording
from tests.kernels.cuda_checks import INTERPRETED

pytestmark = INTERPRETED


def test_what_is_supported(monkeypatch):
    kinds = {kind: 100 if kind.fused else None for kind in thresholds.KINDS}
    monkeypatch.setattr(thresholds, "LEAST_VALUES", kinds)
    monkeypatch.setattr(cuda, "_work", lambda: True)
    x = torch.randn(4, 5, 10)
    assert cuda.supports(x, 1, (), None, "relu")
    assert cuda.supports(x, 1, (torch.ones(5),), x, None)
    assert cuda.supports(x.half(), 1, (torch.ones(5),), x.half(), "relu")
    assert cuda.supports(x.half(), 1, (torch.ones(5).half(),), None, "relu")
    assert not cuda.supports(x, 1)  # torch's is as good
    assert not cuda.supports(x[:1], 1, (), None, "relu")  # small
    assert not cuda.supports(x, 1, (torch.ones(5).double(),), None, "relu")
    assert not cuda.supports(x, 1, (torch.ones(4),), None, "relu")
    assert not cuda.supports(x, 1, (), x.half(), "relu")
    assert not cuda.supports(x[:, :, ::2].repeat(2, 1, 1)[::2], 1, (), None, "relu")
    assert not cuda.supports(torch.empty(0, 5, 10), 1, (), None, "relu")
    with Recording():
        assert cuda.supports(x[:1], 1)
    monkeypatch.setattr(cuda, "_work", lambda: False)
    assert not cuda.supports(x, 1, (), None, "relu")


def test_every_kind_of_call_has_its_own_threshold(monkeypatch):
    monkeypatch.setattr(cuda, "_work", lambda: True)
    x = torch.randn(2, 4, 5, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    for chosen in thresholds.KINDS:
        only = dict.fromkeys(thresholds.KINDS) | {chosen: 200}
        monkeypatch.setattr(thresholds, "LEAST_VALUES", only)
        for kind in thresholds.KINDS:
            tensor = (last if kind.rows else x).to(torch.bfloat16 if kind.half else torch.float32)
            activation = "relu" if kind.fused else None
            for values, enough in ((tensor, kind == chosen), (tensor[:1], False)):
                found = cuda.supports(values, 1, (), None, activation, kind.training)
                assert found == enough, (kind, chosen)


def test_the_table_of_thresholds_is_printed_as_it_is_written():
    source = Path(thresholds.__file__).read_text()
    assert thresholds.as_python(thresholds.LEAST_VALUES) in source
    with thresholds.everywhere(5):
        assert thresholds.worthwhile(thresholds.KINDS[-1], 5)
        assert not thresholds.worthwhile(thresholds.KINDS[-1], 4)
    assert thresholds.as_python(thresholds.LEAST_VALUES) in source


def test_what_int32_cannot_count_is_left_to_torch():
    def has_plan(shape, last=False):
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.empty(shape, dtype=torch.float16, device="meta", memory_format=layout)
        return planning.plan(x.shape, x.stride(), x.dtype, 1, 132) is not None

    for last in (False, True):
        assert has_plan((2**14, 2, 2**8, 2**8), last)
        assert not has_plan((2**14, 2, 2**8, 2**8 + 1), last)
    assert not has_plan((2**31, 1))
    assert not has_plan((4, 2**28))


def test_the_first_call_in_a_capture_leaves_the_question_open(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(cuda, "_tried", cache(lambda: True))
    assert not cuda._work()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert cuda._work()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cuda._work()


def test_a_machine_where_they_do_not_work_says_so_once(monkeypatch):
    def fail():
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(cuda, "_launch", fail)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cuda._tried.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="GPU kernels cannot be compiled, torch's own do"):
            assert not cuda._work()
        assert not cuda._work()
    finally:
        cuda._tried.cache_clear()


def test_kernels_compile_for_gpus():
    """To machine code, for which Triton needs no GPU; in a process where nothing is interpreted."""
    assert printed_by("compile_cuda.py") == [66]


def test_calls_compile_as_on_a_gpu_and_not_for_every_batch_size():
    """Through Triton's just-in-time compiler up to the machine code, with a stand-in for the driver."""
    first, more = printed_by("specialise_cuda.py")
    assert first >= 14
    assert more - first <= 2  # of twelve sizes; tiles are powers of 2


def printed_by(script):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name(script))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    return [int(word) for word in run.stdout.split() if word.isdecimal()]
