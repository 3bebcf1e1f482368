"""One of a set of processes: `python -m tests.distributed.run RANK PROCESSES FOLDER MODULE`.

Starting a process costs seconds, so one set of processes goes through all the cases of a module for its size.
"""

import gc
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import batchnorm as bn
from tests.distributed import (
    cases,
    communication_cases,
    failure_cases,
    join_cases,
    kernel_cases,
    matching_cases,
    merge_cases,
    model_cases,
    recalibrate_cases,
    torch_cases,
    training_cases,
    uneven_cases,
)
from tests.distributed.cases import CASES, C, case

# Imported for the cases they register.
__all__ = [
    "CASES",
    "communication_cases",
    "failure_cases",
    "join_cases",
    "kernel_cases",
    "matching_cases",
    "merge_cases",
    "model_cases",
    "recalibrate_cases",
    "torch_cases",
    "training_cases",
    "uneven_cases",
]


@case(2)
def a_process_that_ends() -> None:
    """The last case: the group is broken after it."""
    dist.barrier()
    if dist.get_rank() == 1:
        raise Ends
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match=r"BatchNorm1d: the all-reduce .*ranks \[0, 1\] .*on rank 0"):
        bn.BatchNorm1d(C, sync=True)(torch.randn(4, C))
    assert time.perf_counter() - start < 10  # not after the group's timeout


class Ends(Exception):
    """Raised by a process to end, as a case asks for."""


def main(rank: int, processes: int, folder: Path, module: str) -> None:
    """Run the cases of a module for so many processes; write their failures, or largest errors, to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=120),  # kernels may be compiled, on a machine that is busy
    )
    singles = [dist.new_group([alone]) for alone in range(processes)]
    cases.ALONE = singles[rank]
    cases.PAIR = dist.new_group([0, 1]) if processes > 2 else None
    results = {}
    for name, (function, on) in importlib.import_module(module).CASES.items():
        if processes not in on:
            continue
        cases.worst = 0.0
        start = time.perf_counter()
        try:
            function()
            results[name] = {"worst": cases.worst, "seconds": time.perf_counter() - start}
        except Ends:
            results[name] = {}
        except BaseException:
            results[name] = {"failure": traceback.format_exc()}
        (folder / f"{rank}.json").write_text(json.dumps(results))
        if "seconds" not in results[name]:
            os._exit(1)  # the others notice at once, wherever they are waiting
    gc.collect()  # of what holds the group, before it goes: see `group_of_one` in tests/conftest.py
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
