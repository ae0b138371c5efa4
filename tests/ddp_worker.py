"""Run by test_ecosystem.py: two processes share a batch through DDP; the gradients of both and of one are written."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hosts import BY_NAME, Host
from support import gradients, injected
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rows(host: Host, indices: list[int]) -> tuple[Tensor, object]:
    text = host.text
    part = {name: ids[indices] for name, ids in text.items()} if isinstance(text, dict) else text[indices]
    return host.image[indices], part


def loss(host: Host, model: nn.Module, indices: list[int]) -> Tensor:
    return (host.run(model, *rows(host, indices)) ** 3).sum() / len(indices)


def work(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name in names:
        host = BY_NAME[name]
        model = injected(host)
        shared = DistributedDataParallel(model)  # must outlive the backward pass
        loss(host, shared, [[0, 1], [2, 1]][rank]).backward()
        torch.save(gradients(model.pvl_adapters), Path(folder) / f"{name}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    for name in names:
        host = BY_NAME[name]
        model = injected(host)
        loss(host, model, [0, 1, 2, 1]).backward()
        torch.save(gradients(model.pvl_adapters), Path(folder) / f"{name}-alone.pt")
    mp.spawn(work, args=(folder, names), nprocs=2)
