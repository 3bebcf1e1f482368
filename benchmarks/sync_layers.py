"""How long synchronised layers take, with kernels around the all-reduces and without, beside those alone.

Two processes with a thread each, over gloo; the layers take turns. `python benchmarks/sync_layers.py SOURCES`
times the layers of another version too, by its `src` folder, in rounds between those of this one.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import batchnorm as bn
from batchnorm.kernels import reference
from batchnorm.lab.machine import machine_line

PROCESSES, ROUNDS, STEPS, SECONDS = 2, 3, 25, 120
SHAPES = [(32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7)]
CASES = [(shape, last, residual) for shape in SHAPES for last in (False, True) for residual in (False, True)]
HERE = str(Path(bn.__file__).parents[1])


def show(sources: list[str]) -> None:
    """The table: microseconds of the fastest tenth, and ratios."""
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {source: [] for source in sources}
    for _ in range(ROUNDS):
        for source, found in rounds.items():
            found.append(time_processes(source))
    best = {
        source: {
            case: {kind: min(of[case][kind] for of in found) for kind in found[0][case]} for case in found[0]
        }
        for source, found in rounds.items()
    }
    print(f"{'us, forward + backward with ReLU':40s}{'alone':>9s}{'sync':>9s}{'sync by':>9s}", end="")
    print(f"{'torch /':>9s}{'sync /':>9s}" + "".join(f"{'other':>9s}{'other /':>9s}" for _ in sources[1:]))
    print(f"{'':40s}{'':9s}{'':9s}{'torch':>9s}{'sync':>9s}{'alone':>9s}", end="")
    print("".join(f"{'':9s}{'sync':>9s}" for _ in sources[1:]))
    for case, times in best[HERE].items():
        alone, ours, by_torch = (1e6 * times[kind] for kind in ("alone", "sync", "by torch"))
        print(f"{case:40s}{alone:9,.0f}{ours:9,.0f}{by_torch:9,.0f}", end="")
        print(f"{by_torch / ours:9.2f}{ours / alone:9.2f}", end="")
        for source in sources[1:]:
            other = 1e6 * best[source][case]["sync"]
            print(f"{other:9,.0f}{other / ours:9.2f}", end="")
        print()
    print(machine_line())


def time_processes(source: str) -> dict[str, dict[str, float]]:
    """Of the slowest process, by case and kind of layer; the processes end with this function."""
    children: list[subprocess.Popen[bytes]] = []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": source}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(PROCESSES):
                command = [sys.executable, __file__, str(rank), folder]
                children.append(subprocess.Popen(command, env=environment, start_new_session=True))
            deadline = time.monotonic() + SECONDS
            for child in children:
                if child.wait(max(0.0, deadline - time.monotonic())):
                    raise RuntimeError("one of the processes failed: its error is above")
        finally:
            for child in children:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    return {
        case: {kind: max(of[case][kind] for of in ranks) for kind in times}
        for case, times in ranks[0].items()
    }


def measure(rank: int, folder: Path) -> None:
    """One of the processes: leaves seconds by case and kind of layer."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    found = {}
    for shape, last, with_residual in CASES:
        layout = torch.channels_last if last else torch.contiguous_format
        x, residual, grad = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(3))
        leaves = [x.requires_grad_(), residual.requires_grad_()][: 1 + with_residual]
        layers = {
            "alone": bn.BatchNorm2d(shape[1], activation="relu"),
            "sync": bn.BatchNorm2d(shape[1], activation="relu", sync=True),
            "by torch": bn.BatchNorm2d(shape[1], activation="relu", sync=True),
        }
        times: dict[str, list[float]] = {kind: [] for kind in layers}
        for _ in range(STEPS + 2):
            for kind, layer in layers.items():
                times[kind].append(step(layer, leaves, grad, kind == "by torch"))
        name = f"{'x'.join(map(str, shape))}{' channels_last' if last else ''}{' + residual' * with_residual}"
        found[name] = {kind: statistics.quantiles(of[2:], n=10)[0] for kind, of in times.items()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def step(layer: torch.nn.Module, leaves: list[Tensor], grad: Tensor, by_torch: bool) -> float:
    for leaf in (*leaves, *layer.parameters()):
        leaf.grad = None
    dist.barrier()
    start = time.perf_counter()
    if by_torch and hasattr(bn, "synchronised"):
        with mock.patch("batchnorm.synchronised.choose", return_value=reference):
            layer(*leaves).backward(grad)
    else:
        layer(*leaves).backward(grad)
    return time.perf_counter() - start


if __name__ == "__main__":
    if len(sys.argv) < 3:
        show([HERE, *sys.argv[1:]])
    else:
        measure(int(sys.argv[1]), Path(sys.argv[2]))
