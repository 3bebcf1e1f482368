"""Memory for large outputs in huge pages, so that the first write to it does not take a fault every 4 KiB."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

from torch import Tensor

_HUGE = 2 * 1024 * 1024
# glibc maps blocks above 32 MiB anew each time, and gives back the memory of smaller ones when enough of it
# is free at the end of the heap; from here on huge pages then take less than half the time, else cost little
# (benchmarks/huge_pages.py).
LARGE = 8 * 1024 * 1024


def in_huge_pages(y: Tensor) -> Tensor:
    """A tensor that is still to be written, advised to be in huge pages where the system has them."""
    if (madvise := _madvise()) is not None:
        size = y.numel() * y.element_size()
        start = -(-y.data_ptr() // _HUGE) * _HUGE
        end = (y.data_ptr() + size) // _HUGE * _HUGE
        madvise(start, end - start, mmap.MADV_HUGEPAGE)  # advice: where it is refused nothing changes
    return y


@cache
def _madvise() -> Any:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
