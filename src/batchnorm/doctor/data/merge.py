"""What the ranks observed on their batches, as one process would have observed it on all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from batchnorm.doctor.data.differences import Differences
from batchnorm.doctor.data.mates import Mates
from batchnorm.doctor.data.noise import BatchStatistics
from batchnorm.doctor.data.recorder import Pass
from batchnorm.doctor.data.steps import Steps, grows

Value = TypeVar("Value")


def merge_passes(parts: Sequence[Pass]) -> Pass:
    """The calls of all ranks in the order of their batches."""
    merged = Pass(scores=[score for part in parts for score in part.scores])
    for name in dict.fromkeys(name for part in parts for name in part.statistics):
        calls = [
            (number, call)
            for part in parts
            for number, call in zip(part.batch_of.get(name, []), part.statistics.get(name, []), strict=True)
        ]
        calls.sort(key=lambda numbered: numbered[0])
        merged.batch_of[name] = [number for number, _ in calls]
        merged.statistics[name] = [call for _, call in calls]
    return merged


def without_images(one: Pass, calls: int, batches: float = math.inf, at_least: int = 1) -> Pass:
    """What others need of a pass: each image's means in the first calls of a batch alone.

    These are most of what there is to send. They stay in a batch's first `calls`, of the batches below
    `batches`, where a batch has `at_least` so many calls.
    """
    statistics = {}
    for name, of_layer in one.statistics.items():
        place: dict[int, int] = {}
        batch_of = one.batch_of[name]
        kept: list[BatchStatistics] = []
        for number, call in zip(batch_of, of_layer, strict=True):
            place[number] = place.get(number, 0) + 1
            stays = place[number] <= calls and number < batches and batch_of.count(number) >= at_least
            kept.append(call if stays else replace(call, pooled=call.pooled[:0]))
        statistics[name] = kept
    return Pass(statistics, {}, one.batch_of, [], one.scores)


def merge_differences(parts: Sequence[Differences | None]) -> Differences | None:
    known = [part for part in parts if part is not None]
    return Differences.merge(known) if known else None


def merge_mates(parts: Iterable[Mates | None]) -> Mates | None:
    """Root mean squares over the samples of all ranks, each of which compared its own first batch."""
    known = [part for part in parts if part is not None]
    if len(known) < 2:
        return known[0] if known else None
    samples = sum(part.samples for part in known)

    def together(values: Iterable[float]) -> float:
        squares = [part.samples * value**2 for part, value in zip(known, values, strict=True)]
        return math.sqrt(math.fsum(squares) / samples)

    errors = [part.samples * part.error for part in known]
    return Mates(
        together(part.effect for part in known),
        math.hypot(*errors) / samples,
        together(part.again for part in known),
        next((part.layer for part in known if part.layer is not None), None),
        samples,
    )


def merge_steps(parts: Sequence[Steps]) -> Steps:
    """Of each module the steps of the rank in which it grew; of moves, those of all ranks."""
    merged = Steps(steps=max(part.steps for part in parts))
    merged.moved_in_backward = largest([part.moved_in_backward for part in parts])
    for part in parts:
        for name, moves in part.moves.items():
            merged.moves.setdefault(name, []).extend(moves)
    merged.nodes = _grown([part.nodes for part in parts])
    merged.bytes = _grown([part.bytes for part in parts])
    return merged


def _grown(parts: Sequence[Mapping[str, list[int]]]) -> dict[str, list[int]]:
    merged: dict[str, list[int]] = {}
    for part in parts:
        for name, values in part.items():
            if name not in merged or (grows(values) and not grows(merged[name])):
                merged[name] = values
    return merged


def largest(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """By name, the largest number; of tensors, of each element."""
    merged: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            elif isinstance(value, Tensor):
                merged[name] = torch.maximum(value, merged[name])
            else:
                merged[name] = max(value, merged[name])
    return merged


def earliest(values: Iterable[Value | None]) -> Value | None:
    """What was seen in the batch with the lowest number."""
    known: list[Any] = [value for value in values if value is not None]
    return min(known, key=lambda value: value.batch, default=None)
