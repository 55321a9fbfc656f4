"""A copy of a corpus on every node, so that no rank reads random rows from a shared file system."""

import contextlib
import dataclasses
import fcntl
import os
import secrets
import socket
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from kdhpc.models.devices import memory_of
from kdhpc.storage.token_shards import TokenRows
from kdhpc.training.ranks import any_rank, from_first, leads_node

OF_DISK, OF_MEMORY = 0.5, 0.25
"""Largest part of the free space of a disk, or of the memory of a task, that a copy may take."""


def copy_to_node(rows: TokenRows, source: Path, device: torch.device) -> TokenRows:
    """Copy ids to one file on each node, which its ranks share; every rank must call this.

    The file is in KDHPC_SCRATCH, or else where Python keeps temporary files (TMPDIR). Shards are
    read once, in sequence. The file has no name any more when this returns, so that it is gone when
    the last rank ends, however that ends. What a rank leaves that is killed while it copies, the
    next one that copies there deletes.

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
    path = place / f"kdhpc-{socket.gethostname()}-{int(token):x}.ids"
    copy = _copy(rows, source, path) if leads_node(device) else None
    any_rank(False, device)  # the copies are whole
    if path.exists():
        shape = len(rows), rows.parts[0].shape[1]
        ids = np.memmap(path, rows.parts[0].dtype, mode="r", shape=shape)
        rows = dataclasses.replace(rows, parts=(ids,))
    any_rank(False, device)  # all ranks have mapped theirs
    if copy is not None:
        path.unlink()
        copy.close()
    return rows


def _copy(rows: TokenRows, source: Path, path: Path) -> BinaryIO | None:
    """Copy ids to a new file, unless that is of no use or they do not fit.

    Returns:
        The file, open and locked; None if there is none.
    """
    num_bytes = sum(part.nbytes for part in rows.parts)
    try:
        if path.parent.stat().st_dev == source.stat().st_dev:
            return None
        _delete_left(path.parent)
        room, what = _room(path.parent)
        if num_bytes <= room:
            file = path.open("xb")
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                for part in rows.parts:
                    part.tofile(file)
                file.flush()
            except OSError:
                path.unlink()
                file.close()
                raise
            return file
        problem = f"{num_bytes / 1e9:.3g} GB; at most {room / 1e9:.3g} GB {what} may be used"
    except OSError as error:
        problem = f"{error.strerror or error}"
    sys.stdout.write(
        f"note: the corpus is not copied to {path.parent} ({problem}); rows are read from where "
        "they are; set KDHPC_SCRATCH to a larger folder on the node\n"
    )
    return None


def _delete_left(folder: Path) -> None:
    """Delete copies of this node that no living rank holds: theirs was killed while it copied."""
    for path in folder.glob(f"kdhpc-{socket.gethostname()}-*.ids"):
        with contextlib.suppress(OSError), path.open("rb") as file:  # locked, or another user's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _room(folder: Path) -> tuple[float, str]:
    """Return how many bytes a copy in a folder may take, and of what."""
    disk = os.statvfs(folder)
    free = float(disk.f_bavail * disk.f_frsize)
    if not _is_memory(folder):
        return OF_DISK * free, "of the disk"
    memory = float(memory_of(torch.device("cpu")))
    if mebibytes := os.environ.get("SLURM_MEM_PER_NODE"):
        memory = min(memory, float(mebibytes) * 2**20)
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
