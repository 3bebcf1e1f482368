"""One of two processes that the doctor compares: `python processes_case.py RANK FOLDER`."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from batchnorm.doctor.check import CHECKS
from batchnorm.doctor.data import observe, processes
from batchnorm.doctor.subject import Subject


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(1)
    )


def data(rank: int, offset: float = 0.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(16, 1, 8, 8, generator=generator) + offset for _ in range(4)]


def findings(network: nn.Module, batches: list[torch.Tensor]) -> list[dict[str, object]]:
    norms = {name: m for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    subject = Subject(network, norms, batches=batches)
    subject.observed = observe(subject, lambda steps: None)
    assert subject.observed.failure is None
    found = [finding for check in CHECKS.values() if check.needs_data for finding in check.find(subject)]
    return [finding.as_dict() for finding in found if finding.code.startswith("BN3")]


def trained(rank: int, offset: float = 0.0) -> nn.Module:
    """Running statistics of each process's own batches."""
    network = model().train()
    with torch.no_grad():
        for x in data(rank + 10, offset) * 12:
            network(x)
    return network


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    found = {"equal": findings(model(), data(rank)), "own statistics": findings(trained(rank), data(rank))}
    found["far statistics"] = findings(trained(rank, 3.0 * rank), data(rank))
    found["other data"] = findings(model(), data(rank, 1.0 * rank))
    other = model()
    with torch.no_grad():
        other[3].weight[0, 0, 0, 0] += 1e-3 * rank
    found["other weights"] = findings(other, data(rank))
    found["other model"] = findings(nn.Sequential(model(), nn.Linear(64, 1, bias=rank == 0)), data(rank))
    processes._SECONDS = 2
    if rank == 0:  # the other goes on to its next collective
        found["alone"] = findings(model(), data(rank))
    dist.all_reduce(total := torch.ones(1))
    assert total == 2
    found["after"] = findings(other, data(rank))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
