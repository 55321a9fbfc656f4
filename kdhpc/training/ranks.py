"""The ranks of one training: how they find each other, check each other, and exchange values.

There is no launcher, host file or ssh. Slurm or the local executor starts one process per rank, and
the ranks meet at an address and port that each of them can work out (see `kdhpc.cluster.task`).
"""

import datetime
import json
import os
import socket
import time
import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from kdhpc.errors import ClusterError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

JOIN_LIMIT_S = 300.0
"""Seconds that the first ranks wait for the last."""
STEP_LIMIT_S = 1800.0
"""Seconds that a rank waits for the others in a collective operation, which includes the time that
rank 0 takes to save a checkpoint."""


def join(
    *,
    rank: int,
    world_size: int,
    address: str,
    port: int,
    device: torch.device,
    limit_s: float = JOIN_LIMIT_S,
) -> None:
    """Start torch.distributed and check every rank, before any model is built.

    If this process has started it before, only the number of ranks is checked. A single rank needs
    no network, because its store is in memory.

    Args:
        rank: index of this process among the ranks.
        world_size: number of ranks.
        address: host name or address of rank 0.
        port: port that rank 0 listens on.
        device: device of this rank.
        limit_s: seconds to wait for the other ranks.

    Raises:
        ClusterError: if ranks do not start in time or share a GPU, which it names, or if the number
            of ranks is not the expected one.
    """
    if distributed.is_initialized():
        if distributed.get_world_size() != world_size:
            raise ClusterError(
                f"this process is already rank {distributed.get_rank()} of "
                f"{distributed.get_world_size()}; expected {world_size} ranks"
            )
        return
    from torch._C._distributed_c10d import HashStore, TCPStore

    limit = datetime.timedelta(seconds=limit_s)
    if world_size == 1:
        store: Any = HashStore()
    else:
        store = TCPStore(
            address, port, world_size, is_master=rank == 0, timeout=limit, wait_for_workers=False
        )
        _meet(store, rank, world_size, device, limit_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=STEP_LIMIT_S),
    )
    if (num_ranks := int(summed(torch.ones(1, device=device)))) != world_size:
        raise ClusterError(
            f"an all-reduce counted {num_ranks} ranks; expected {world_size}; check the network "
            "between the nodes"
        )


def _meet(store: "Store", rank: int, world_size: int, device: torch.device, limit_s: float) -> None:
    """Wait until every rank has announced its node and GPU, and check that no GPU is shared."""
    store.set(f"place/{rank}", json.dumps(_place(device)))
    deadline = time.monotonic() + limit_s
    missing = list(range(world_size))
    while missing := [other for other in missing if not store.check([f"place/{other}"])]:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"rank {rank} on {_place(device)[0]}: ranks {missing} of {world_size} did not "
                f"start in {limit_s:.0f} s; check their nodes"
            )
        time.sleep(0.1)
    if device.type != "cuda":
        return
    seen: dict[str, int] = {}
    for other in range(world_size):
        place = store.get(f"place/{other}").decode()
        if seen.setdefault(place, other) != other:
            node, gpu = json.loads(place)
            raise ClusterError(
                f"ranks {seen[place]} and {other} share {gpu} of node {node}; "
                "expected as many slurm.gpus_per_node as ranks_per_node"
            )


def _place(device: torch.device) -> list[str]:
    """Return the node and the GPU of this process; the GPU is empty on a CPU."""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    return [_node(), gpu]


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def summed(value: Tensor) -> Tensor:
    """Sum a tensor over all ranks in place, and return it."""
    if distributed.get_world_size() > 1:
        distributed.all_reduce(value)
    return value


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on any rank; no rank returns before all have called this."""
    return bool(summed(torch.tensor(float(flag), device=device)) > 0)


def leads_node(device: torch.device) -> bool:
    """Return whether this is the first rank on its node; every rank must call this."""
    node = torch.tensor(zlib.crc32(_node().encode()), device=device)
    nodes = [torch.empty_like(node) for _ in range(distributed.get_world_size())]
    distributed.all_gather(nodes, node)
    return [int(other) for other in nodes].index(int(node)) == distributed.get_rank()


def from_first(value: Tensor) -> Tensor:
    """Copy rank 0's tensor to all ranks in place, and return it."""
    if distributed.get_world_size() > 1:
        distributed.broadcast(value, 0)
    return value
