"""A copy of a corpus on every node, so that no rank reads random rows from a shared file system."""

import dataclasses
import os
import secrets
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from kdhpc.storage.token_shards import TokenRows
from kdhpc.training.ranks import any_rank, from_first, leads_node

OF_DISK, OF_MEMORY = 0.5, 0.25
"""Largest part of the free space of a disk, or of the memory of a task, that a copy may take."""


def copy_to_node(rows: TokenRows, source: Path, device: torch.device) -> TokenRows:
    """Copy ids to one file on each node, which its ranks share; every rank must call this.

    The file is in KDHPC_SCRATCH, or else where Python keeps temporary files (TMPDIR). Shards are
    read once, in sequence. The file has no name any more when this returns, so that it is gone when
    the last rank ends, however that ends.

    Args:
        rows: ids, mapped from shards.
        source: one of these shards.
        device: device of this rank.

    Returns:
        The rows of the copy; those given if scratch is on the disk of the shards, or too small,
        about which a line is printed.
    """
    place = Path(os.environ.get("KDHPC_SCRATCH") or tempfile.gettempdir())
    token = from_first(torch.tensor(secrets.randbits(62), device=device))
    path = place / f"kdhpc-{int(token):x}.ids"
    is_leader = leads_node(device)
    if is_leader:
        _copy(rows, source, path)
    any_rank(False, device)  # the copies are whole
    if path.exists():
        shape = len(rows), rows.parts[0].shape[1]
        ids = np.memmap(path, rows.parts[0].dtype, mode="r", shape=shape)
        rows = dataclasses.replace(rows, parts=(ids,))
    any_rank(False, device)  # all ranks have mapped theirs
    if is_leader:
        path.unlink(missing_ok=True)
    return rows


def _copy(rows: TokenRows, source: Path, path: Path) -> None:
    """Copy ids to a new file, unless that is of no use or they do not fit."""
    num_bytes = sum(part.nbytes for part in rows.parts)
    try:
        if path.parent.stat().st_dev == source.stat().st_dev:
            return
        room, what = _room(path.parent)
        if num_bytes > room:
            problem = f"{num_bytes / 1e9:.3g} GB; at most {room / 1e9:.3g} GB {what} may be used"
        else:
            with path.open("xb") as file:
                for part in rows.parts:
                    part.tofile(file)
            return
    except OSError as error:
        problem = f"{error.strerror}"
        path.unlink(missing_ok=True)
    sys.stdout.write(
        f"note: the corpus is not copied to {path.parent} ({problem}); rows are read from where "
        "they are; set KDHPC_SCRATCH to a larger folder on the node\n"
    )


def _room(folder: Path) -> tuple[float, str]:
    """Return how many bytes a copy in a folder may take, and of what."""
    disk = os.statvfs(folder)
    free = float(disk.f_bavail * disk.f_frsize)
    if not _is_memory(folder):
        return OF_DISK * free, "of the disk"
    if mebibytes := os.environ.get("SLURM_MEM_PER_NODE"):
        memory = float(mebibytes) * 2**20
    else:
        memory = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(OF_DISK * free, OF_MEMORY * memory), "of memory"


def _is_memory(folder: Path) -> bool:
    """Return whether the files of a folder are in memory, which then counts as the task's."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        return False
    kinds = {line.split()[2]: line.partition(" - ")[2].split()[0] for line in mounts}
    return kinds.get(number) in {"tmpfs", "ramfs"}
