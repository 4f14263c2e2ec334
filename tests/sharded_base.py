"""A model whose frozen base FSDP2 shards, and its adapter's features: in two forked processes.

``python sharded_base.py FOLDER``
"""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dtrak_kernels import GradientSketcher, Projection

WORLD = 2


class Adapted(nn.Module):
    def __init__(self, width, rank=2):
        super().__init__()
        self.base = nn.Linear(width, width)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Net(nn.Module):
    def __init__(self, width=16, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList(Adapted(width) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def make():
    torch.manual_seed(0)
    net = Net()
    names = [name for name, _ in net.named_parameters() if ".down." in name or ".up." in name]
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in names)
    return net, names


def features(net, names, x):
    sketcher = GradientSketcher(net, Projection("sjlt", 256), parameters=names)
    return sketcher.sketch(lambda: net(x).square().sum(1), len(x))


def shard(net, mesh, ignored):
    for block in net.blocks:
        fully_shard(block, mesh=mesh, ignored_params=ignored & set(block.parameters()))
    fully_shard(net, mesh=mesh, ignored_params=ignored)


def process(folder, rank):
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    # of this process alone
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(rank))
    plain, names = make()
    net, _ = make()
    shard(net, mesh, {p for name, p in net.named_parameters() if name in names})
    found, whole = features(net, names, x), features(plain, names, x)
    # products of gathered weights may be summed in another order
    assert (found - whole).norm() < 1e-6 * whole.norm()
    base = [p for name, p in net.named_parameters() if name not in names]
    assert sum(p.to_local().numel() for p in base) < 0.6 * sum(p.numel() for p in base)
    net, _ = make()
    shard(net, mesh, set())
    with pytest.raises(ValueError, match=r"whole in every process, got 'blocks.0.down.weight' th"):
        features(net, names, x)
    dist.barrier()
    dist.destroy_process_group()


def main(folder):
    torch.set_num_threads(1)
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            process(folder, rank)
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    print("the features of the whole model")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
