"""The ranks of one training: find each other, check that all are well, agree.

No launcher, host file or ssh: Slurm or the local executor starts one process a rank, and they meet
at an address and port that every one of them can work out (see `kdhpc.cluster.task`).
"""

import datetime
import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from kdhpc.errors import ClusterError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

JOIN_LIMIT_S = 300.0
"""How long the first ranks wait for the last."""
STEP_LIMIT_S = 1800.0
"""How long a rank waits for the others in a collective operation, rank 0's checkpoints included."""


def join(
    *,
    rank: int,
    world_size: int,
    address: str,
    port: int,
    device: torch.device,
    limit_s: float = JOIN_LIMIT_S,
) -> None:
    """Start torch.distributed once a process, before any model is built, and check every rank.

    A single rank needs no network: its store is in memory.

    Raises:
        ClusterError: naming the ranks that did not come in time, or that share a GPU.
    """
    if distributed.is_initialized():
        if distributed.get_world_size() != world_size:
            raise ClusterError(
                f"this process is rank {distributed.get_rank()} of {distributed.get_world_size()} "
                f"already; expected {world_size} ranks"
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
    if (found := int(summed(torch.ones(1, device=device)))) != world_size:
        raise ClusterError(f"an all-reduce over {world_size} ranks counted {found}")


def _meet(store: "Store", rank: int, world_size: int, device: torch.device, limit_s: float) -> None:
    """Wait until every rank has said where it runs."""
    store.set(f"place/{rank}", json.dumps(_place(device)))
    deadline = time.monotonic() + limit_s
    missing = list(range(world_size))
    while missing := [other for other in missing if not store.check([f"place/{other}"])]:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"rank {rank} on {_place(device)[0]}: ranks {missing} of {world_size} did not "
                f"start in {limit_s:.0f} s; look at their nodes"
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
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    return [node, gpu]


def summed(value: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if distributed.get_world_size() > 1:
        distributed.all_reduce(value)
    return value


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank; also a point that no rank passes before the others."""
    return bool(summed(torch.tensor(float(flag), device=device)) > 0)


def from_first(value: Tensor) -> Tensor:
    """What rank 0 has, in place on all ranks."""
    if distributed.get_world_size() > 1:
        distributed.broadcast(value, 0)
    return value
