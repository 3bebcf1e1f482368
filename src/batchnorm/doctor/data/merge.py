"""What the ranks observed on their batches, as one process would have observed it on all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from batchnorm.doctor.data.differences import Differences
from batchnorm.doctor.data.noise import BatchStatistics
from batchnorm.doctor.data.recorder import Pass

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
    """As `Differences.merge`, of the ranks that have any; None where none has."""
    known = [part for part in parts if part is not None]
    return Differences.merge(known) if known else None


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
