"""The OpenMP team of torch, on which the CPU kernels run: a second pool of threads would fight with it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

# How many threads torch may use; one in a forked child: the threads of libgomp do not survive a fork, and a
# child that called them would wait for ever.
threads = torch.get_num_threads


def _after_fork() -> None:
    global threads
    threads = lambda: 1  # noqa: E731


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def size(work: int) -> int:
    """How many threads to use for so many values."""
    return 1 if work < _WORTH_A_TEAM else threads()


# Below it, waking the other threads takes longer than their share of the work.
_WORTH_A_TEAM = 32768


@cache
def runner() -> Callable[[int, bytes, int, int], None]:
    """`run(kernel, fields, threads, 0)` calls a kernel on every thread of a team, without the GIL."""
    parallel = _library().GOMP_parallel
    parallel.restype = None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint)
    return parallel


def available() -> bool:
    """Whether torch's threads are libgomp's, so that there is a team to run on."""
    return _library() is not None


def symbols() -> dict[str, int]:
    """Addresses of the functions that kernels call, by name."""
    names = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
    return {name: ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value or 0 for name in names}


@cache
def _library() -> Any:
    for path in _loaded_libgomps():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        if hasattr(library, "GOMP_parallel"):
            return library
    return None


def _loaded_libgomps() -> list[str]:
    """Paths of the libgomps in this process, torch's own first: others may have loaded theirs."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {"/" + line.partition("/")[2] for line in lines if "libgomp" in line}
    beside_torch = str(Path(torch.__file__).parent)
    return sorted(paths, key=lambda path: (not path.startswith(beside_torch), path))
