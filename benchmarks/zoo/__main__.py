"""Try every verb on the models of a library, each in a process of its own, and print a table by family.

    python -m benchmarks.zoo --library timm|torchvision|transformers|smp|monai|ultralytics [--names ...]

From the repository root, with the extra [zoo]. Models have random weights; what is compared and how, see
examine.py. `--json FILE` keeps a line per model, and goes on where a run before has stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.zoo.examine import Result, examine
from benchmarks.zoo.libraries import LIBRARIES, Entry
from benchmarks.zoo.libraries.timm_models import has_batch_norm_and_is_small
from benchmarks.zoo.table import printed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--names", nargs="+", metavar="NAME", help="these models only")
    parser.add_argument("--processes", type=int, default=2, help="how many models at a time")
    parser.add_argument("--seconds", type=float, default=900, help="time limit of each model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a line per model, to go on from")
    options = parser.parse_args()
    entries = LIBRARIES[options.library]()
    unknown = sorted(set(options.names or ()) - entries.keys())
    if unknown:
        parser.error(f"no such models in {options.library}: {', '.join(unknown)}")
    wanted = {name: entry for name, entry in entries.items() if name in (options.names or entries)}
    results = _read(options.json)
    left = [entry for name, entry in wanted.items() if name not in results]
    kept = None if options.json is None else options.json.open("a")
    for result in tqdm(_results(left, options.processes, options.seconds), total=len(left), unit="model"):
        results[result.name] = result
        if kept is not None:
            kept.write(json.dumps(asdict(result)) + "\n")
            kept.flush()
    print(printed(options.library, [results[name] for name in wanted if name in results]))
    sys.exit(any(result.failures for result in results.values()))


class _Running(NamedTuple):
    entry: Entry
    process: BaseProcess
    answer: Connection
    until: float


def _results(entries: list[Entry], processes: int, seconds: float) -> Iterator[Result]:
    """What is found of each model that has batch norm and is not too large, as it comes."""
    tqdm.monitor_interval = 0  # its thread would be lost in a fork
    waiting, running = list(reversed(entries)), list[_Running]()
    while waiting or running:
        while waiting and len(running) < processes:
            running.append(_start(waiting.pop(), seconds))
        ready = wait([one.answer for one in running], timeout=1)
        for one in list(running):
            if one.answer in ready:
                yield _answer(one)
            elif time.monotonic() > one.until:
                one.process.terminate()
                yield Result(
                    one.entry.name, one.entry.family, failures={"time limit": f"more than {seconds:g} s"}
                )
            else:
                continue
            one.process.join()
            running.remove(one)


def _start(entry: Entry, seconds: float) -> _Running:
    # A fork has the library imported already.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    answer, child = context.Pipe(duplex=False)
    process = context.Process(target=_examine, args=(entry, child), daemon=True)
    process.start()
    child.close()
    return _Running(entry, process, answer, time.monotonic() + seconds)


def _examine(entry: Entry, answer: Connection) -> None:
    torch.set_num_threads(1)
    if has_batch_norm_and_is_small(entry.build):
        answer.send(asdict(examine(entry)))
    else:
        answer.send(asdict(Result(entry.name, entry.family)))


def _answer(one: _Running) -> Result:
    try:
        return Result(**one.answer.recv())
    except EOFError:
        one.process.join()
        return Result(
            one.entry.name, one.entry.family, failures={"process": f"ended with {one.process.exitcode}"}
        )


def _read(path: Path | None) -> dict[str, Result]:
    if path is None or not path.exists():
        return {}
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["name"]: Result(**line) for line in lines}


if __name__ == "__main__":
    main()
