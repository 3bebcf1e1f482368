"""How the CPU kernels go about a tensor: its layout, its parts, and the compiled functions it needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.cpu import fields as f
from batchnorm.kernels.cpu import team
from batchnorm.kernels.cpu.pages import LARGE
from batchnorm.kernels.layout import layout_of

DTYPES = (torch.float32, torch.float64)
# Activations that take longer than memory: their gradient is kept between the two passes over it.
COSTLY = frozenset({"elu", "gelu", "silu", "mish", "sigmoid", "tanh"})

# Runs of a channel up to so many positions are taken in groups of channels.
_SHORT_RUN = 48
_GROUP_COLUMNS = 2048
# What a tile of channels has of each sample: memory is read and written in stretches of this size. Longer
# ones are faster where the third-level cache holds all of the tensors between the passes, whatever the tile.
_TILE_BYTES = 96 * 1024
_TILE_BYTES_OF_CACHED = 256 * 1024
_CACHED_BYTES = 16 * 1024 * 1024
# Threads that share out the channels and have no more than this of a sample each wait for each other's
# memory, which the processor prefetches for both: they share out the samples instead.
_NEAR_BYTES = 32 * 1024
# So many samples of no more values are rows, too, with a column for each position of each channel: of any
# runs, or of short ones.
_MANY_SAMPLES = 64
_SMALL_SAMPLE = 256
_SMALL_SAMPLE_OF_SHORT_RUNS = 1024
# Rows of fewer columns are taken several at a time.
_WIDE_ROW = 128
# Sums over rows of so many columns take four rows at once, as what they share for a column takes up most of a
# first-level cache; over narrower ones two, as there more are in each other's way.
_COLUMNS_FOR_FOUR_ROWS = 1024


class _Loaded(dict[Any, tuple[int, ...]]):
    """Addresses of compiled functions, which are loaded when they are first asked for."""

    def __init__(self, load: Callable[[Any], tuple[int, ...]]) -> None:
        super().__init__()
        self._load = load

    def __missing__(self, key: Any) -> tuple[int, ...]:
        found = self[key] = self._load(key)
        return found


class Plan:
    """What a call needs to know besides its tensors.

    Attributes:
        kind: "slabs" (samples, channels, positions), "groups" (the same with short runs) or "rows".
        channels, count: how many there are, and values of each.
        geometry: samples, channels and positions; then channels per tile (for rows, samples per wide row),
            parts of the samples, parts of the positions.
        threads: size of the team.
        work: float64 numbers of scratch memory, forward and backward alike.
        typed: how many of them come before the numbers in the tensor's dtype.
        is_large: whether an output had better be in huge pages.
        forward: addresses of the forward kernel and of the function it applies, by
            (activation, has_residual, leaves_bits); without the latter, by None, it stops at the statistics.
        backward: addresses of the backward kernel and its functions, for sums, sums run by run and gradients,
            by (activation, slope_from, stored, by_batch, reduces, wants_x).
        words: of bits that tell the slope, see `runs.FROM_BITS`; 0 where the layout has none.
        table, parameter, bits: without memory; to make a tensor like another takes half as long as by its
            shape.
    """

    def __init__(
        self,
        kind: str,
        dtype: torch.dtype,
        shape: tuple[int, int, int],
        cut: tuple[int, int, int],
        threads: int,
        work: int,
        typed: int,
    ) -> None:
        self.kind = kind
        self.dtype = dtype
        self.channels = shape[1]
        self.count = shape[0] * shape[2]
        self.geometry = (*shape, *cut)
        self.threads = threads
        self.work = work
        self.typed = typed
        self.table = torch.empty((), dtype=torch.float64, device="cpu").expand(int(f.TABLE_ROWS), shape[1])
        self.parameter = torch.empty((), dtype=dtype, device="cpu").expand(shape[1])
        has_bits = kind == "slabs" and cut[2] == 1
        self.words = shape[0] * shape[1] * -(-shape[2] // f.WORD) if has_bits else 0
        self.bits = torch.empty((), dtype=torch.int32, device="cpu").expand(self.words)
        self.is_large = self.count * self.channels * dtype.itemsize >= LARGE
        self.forward = _Loaded(self._load_forward)
        self.backward = _Loaded(self._load_backward)

    def _load_forward(self, key: tuple[str | None, bool, bool] | None) -> tuple[int, ...]:
        if key is None:
            return self._kernel("forward"), 0
        activation, has_residual, leaves_bits = key
        options = (has_residual, leaves_bits) if self.kind == "slabs" else (has_residual,)
        applied = self._function("apply", activation, *options)
        return self._kernel("forward"), applied

    def _load_backward(self, key: tuple[str | None, str, bool, bool, bool, bool]) -> tuple[int, ...]:
        activation, slope_from, stored, by_batch, reduces, wants_x = key
        sums = one_run = gradient = 0
        # What is stored is read again, and may have been written over what it was computed from.
        of_z = (None, "x") if stored else (activation, slope_from)
        if reduces:
            sums = self._function("reduce", activation, slope_from, stored, *self._rows_at_once(activation))
            one_run = function("reduce", "runs", self.dtype, *of_z, False)
        if wants_x:
            gradient = self._function("gradient", *of_z, by_batch)
        return self._kernel("backward"), sums, one_run, gradient

    def _kernel(self, name: str) -> int:
        return _kernel(name, self.kind, self.dtype, self.interleaves(avx512=True))

    def _function(self, name: str, activation: str | None, *options: Any) -> int:
        shape = "runs" if self.kind == "slabs" else "rows"
        interleaved = self.interleaves(avx512=activation in COSTLY)
        return function(name, shape, self.dtype, activation, *options, interleaved=interleaved)

    def _rows_at_once(self, activation: str | None) -> tuple[int, ...]:
        """In sums over rows; what takes longer than memory takes as long with four, and longer to compile."""
        if self.kind == "slabs":
            return ()
        _, channels, positions, tile, *_ = self.geometry
        columns = tile * positions * (channels if self.kind == "rows" else 1)
        return (4 if columns >= _COLUMNS_FOR_FOUR_ROWS and activation not in COSTLY else 2,)

    def interleaves(self, avx512: bool) -> bool:
        """Whether loops take four vectors at a time.

        What is left over of a run then, one number after the other, is most of it for 7 x 7 positions.
        """
        if self.kind != "slabs":
            return True
        four_vectors = (256 if avx512 else 128) // self.dtype.itemsize
        positions = self.geometry[2]
        return positions % four_vectors <= positions // 16


@lru_cache(maxsize=4096)
def plan(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, channel_dim: int, threads: int
) -> Plan | None:
    """The plan for a tensor, or None when it is empty, or its memory neither contiguous nor channels last."""
    if 0 in shape:
        return None
    layout = layout_of(shape, strides, channel_dim)
    if layout is None:
        return None
    is_rows, samples, channels, positions = layout
    if is_rows or _are_small(samples, channels, positions):
        return _rows(samples, channels, positions, dtype, threads)
    sample_parts, position_parts = _parts(samples, channels, positions, threads, dtype)
    parts = sample_parts * position_parts
    if positions <= _SHORT_RUN and parts == 1:
        tile = max(1, min(_GROUP_COLUMNS // positions, -(-channels // threads)))
        columns = tile * positions
        return Plan(
            "groups", dtype, (samples, channels, positions), (tile, 1, 1), threads,
            2 * channels + 6 * columns * threads, 2 * channels,
        )  # fmt: skip
    run_bytes = positions * dtype.itemsize
    is_cached = samples * channels * run_bytes <= _CACHED_BYTES
    tile = max(1, (_TILE_BYTES_OF_CACHED if is_cached else _TILE_BYTES) // run_bytes)
    return Plan(
        "slabs", dtype, (samples, channels, positions), (tile, sample_parts, position_parts), threads,
        5 * channels * parts, 5 * channels * parts,
    )  # fmt: skip


def plan_of(x: Tensor, channel_dim: int) -> Plan | None:
    """The plan for a tensor, by the threads that torch may use."""
    return plan(x.shape, x.stride(), x.dtype, channel_dim, team.size(x.numel()))


def _rows(samples: int, channels: int, positions: int, dtype: torch.dtype, threads: int) -> Plan:
    together = max(1, min(_WIDE_ROW // (channels * positions), samples))
    columns = together * channels * positions
    found = threads * (2 * columns + int(f.LINE))
    return Plan(
        "rows",
        dtype,
        (samples, channels, positions),
        (together, 1, 1),
        threads,
        found + columns * (6 + 3 * threads),
        found,
    )


def _are_small(samples: int, channels: int, positions: int) -> bool:
    most = _SMALL_SAMPLE_OF_SHORT_RUNS if positions <= _SHORT_RUN else _SMALL_SAMPLE
    return samples >= _MANY_SAMPLES and channels * positions <= most


def _parts(samples: int, channels: int, positions: int, threads: int, dtype: torch.dtype) -> tuple[int, int]:
    """Into how many parts to cut samples and positions, where channels do not share out well."""
    shares_samples = samples % threads == 0 or samples >= 4 * threads
    if channels % threads == 0 or channels >= 8 * threads:
        near = channels * positions * dtype.itemsize <= threads * _NEAR_BYTES and positions > _SHORT_RUN
        return (threads if near and shares_samples else 1), 1
    return (threads, 1) if shares_samples else (1, min(threads, positions))


@cache
def _kernel(name: str, kind: str, dtype: torch.dtype, interleaved: bool) -> int:
    def build() -> Any:
        import numpy as np
        from numba import types

        from batchnorm.kernels.cpu import groups, rows, slabs

        module = {"slabs": slabs, "groups": groups, "rows": rows}[kind]
        real = np.float32 if dtype == torch.float32 else np.float64
        return types.void(types.voidptr), getattr(module, name)(real)

    return _load([name, kind, _name(dtype)], build, team.symbols(), interleaved)


@cache
def function(
    name: str, shape: str, dtype: torch.dtype, activation: str | None, *options: Any, interleaved: bool = True
) -> int:
    """Address of one of the functions of `runs.py`, for "runs" or "rows"."""

    def build() -> Any:
        import numpy as np

        from batchnorm.kernels.cpu import runs

        real = np.float32 if dtype == torch.float32 else np.float64
        return getattr(runs, f"{name}_{shape}")(real, activation, *options)

    named = [name, shape, _name(dtype), str(activation), *map(str, options)]
    return _load(named, build, {}, interleaved, avx512=activation in COSTLY)


def _load(
    name: list[str],
    build: Callable[[], Any],
    symbols: dict[str, int],
    interleaved: bool,
    avx512: bool = True,
) -> int:
    from batchnorm.kernels.cpu import machine_code  # imports llvmlite

    name = name if interleaved else [*name, "not interleaved"]
    return machine_code.load("-".join(name), build, symbols, interleaved, avx512)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
