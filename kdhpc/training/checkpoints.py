"""Checkpoints of a training, published like every other output: first the data, then its record.

3-train-on-truth/teacher-s0/00000.checkpoints/3f9a0c.../
  000001000.json                     the record: step, data, digest, recipe, for_good
  000001000.5b1c77d2.safetensors     float32 weights and moments, verified before the record exists
"""

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from kdhpc.errors import DamagedError
from kdhpc.storage.files import digest_of, read_once, remove, sync_tree, write_once
from kdhpc.types import Json

if TYPE_CHECKING:
    from torch import Tensor


class Writer:
    """Writes one checkpoint at a time in a thread of its own, while the training goes on."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._write: Future[float] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Start to write, after the checkpoint before is written; its error is raised here."""
        self.wait()

        def timed() -> float:
            began = time.perf_counter()
            write()
            return time.perf_counter() - began

        self._write = self._thread.submit(timed)

    def ended(self) -> float | None:
        """Return the seconds of a write that has ended since the last call, or raise its error."""
        return self.wait() if self._write and self._write.done() else None

    def wait(self) -> float | None:
        """Wait for the checkpoint that is being written, and raise the error of its writer.

        Returns:
            Seconds that it took; None if there is none.
        """
        write, self._write = self._write, None
        return None if write is None else write.result()

    def close(self) -> None:
        """Wait for the checkpoint that is being written, whatever becomes of it."""
        self._thread.shutdown()


def save(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, "Tensor"],
    recipe: str,
    num_kept: int,
    for_good: bool = False,
) -> None:
    """Publish a checkpoint, then delete those that are neither kept for good nor among the newest.

    Args:
        folder: folder of the checkpoints, which is created in an existing one.
        step: number of steps done.
        tensors: weights and moments, by name.
        recipe: recipe that a training must have to resume from this checkpoint.
        num_kept: number of newest checkpoints that are kept.
        for_good: whether this checkpoint is never deleted.

    Raises:
        DamagedError: if the data reads back differently; then nothing is published.
    """
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    data = folder / f"{step:09d}.{secrets.token_hex(4)}.safetensors"
    save_file(dict(tensors), data)
    sync_tree(data)
    _compare(data, tensors)
    record = {
        "step": step,
        "data": data.name,
        "digest": digest_of(data),
        "recipe": recipe,
        "for_good": for_good,
    }
    if not write_once(folder / f"{step:09d}.json", record):
        data.unlink()  # another attempt has published this step already
    _prune(folder, num_kept)


def newest(folder: Path, recipe: str) -> tuple[int, dict[str, "Tensor"]] | None:
    """Return the steps and tensors of the newest intact checkpoint of this recipe, or None.

    The record of a damaged checkpoint is renamed, so that its step can be published again, and the
    checkpoint before it is used.
    """
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.json"), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, DamagedError):
            record = _read(path)
            data = folder / record["data"]
            if record["recipe"] != recipe:
                continue
            if digest_of(data) == record["digest"]:
                return int(record["step"]), load_file(data)
        try:
            path.rename(path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}"))
        except FileNotFoundError:  # another live attempt has published newer ones by now
            return newest(folder, recipe)
    return None


def _compare(data: Path, tensors: Mapping[str, "Tensor"]) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(data, framework="pt") as written:
            same = all(written.get_tensor(name).equal(value) for name, value in tensors.items())
    except SafetensorError as error:
        raise DamagedError(f"{data}: cannot be read back ({error})") from error
    if not same:
        raise DamagedError(f"{data}: reads back differently from what was written")


def _prune(folder: Path, num_kept: int) -> None:
    """Delete older records with their data, and data whose writer died before it wrote the record.

    While a requeued training runs, the old one may still be alive on an unreachable node. Data
    without a record therefore counts as a dead writer's only if it is older than the checkpoint
    before the last.
    """
    records, times = {}, []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, DamagedError):
            records[path] = _read(path)
            times.append(path.stat().st_mtime)
    dead_before = sorted(times)[-2] if times[1:] else 0.0
    passing = [path for path, record in records.items() if not record["for_good"]]
    for path in passing[:-num_kept]:
        path.unlink(missing_ok=True)
        remove(folder / records[path]["data"])
    named = {record["data"] for record in records.values()}
    unnamed = folder.glob(".tmp*")  # safetensors writes to such files before it renames them
    for data in (*folder.glob("*.safetensors"), *unnamed):
        with contextlib.suppress(OSError):
            if data.name not in named and data.stat().st_mtime < dead_before:
                remove(data)


def _read(path: Path) -> dict[str, Json]:
    record = read_once(path)
    if "/" in record["data"]:
        raise DamagedError(f"{path}: names a file outside its folder")
    return record
