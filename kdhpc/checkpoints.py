"""Checkpoints of a training: written beside, verified, then published, like every other output."""

import contextlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kdhpc.artifacts import remove, sha256_of, write_once
from kdhpc.errors import DamagedError

if TYPE_CHECKING:
    from torch import Tensor

KEEP = 2
"""Checkpoints kept; the older one serves if the newer is damaged."""


def save(folder: Path, *, step: int, tensors: Mapping[str, "Tensor"], recipe: str) -> None:
    """Publish a checkpoint and delete those beyond the newest two."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{step:09d}.{secrets.token_hex(4)}.safetensors"
    save_file(dict(tensors), data)
    record = {"step": step, "data": data.name, "sha256": sha256_of(data), "recipe": recipe}
    if not write_once(folder / f"{step:09d}.json", record):
        data.unlink()  # another attempt was here first
    for old in sorted(folder.glob("*.json"))[:-KEEP]:
        with contextlib.suppress(OSError, ValueError):
            remove(folder / _read(old)["data"])
        old.unlink(missing_ok=True)


def newest(folder: Path, recipe: str) -> tuple[int, dict[str, "Tensor"]] | None:
    """The last whole checkpoint of this recipe: steps done and tensors; None if there is none."""
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.json"), reverse=True):
        try:
            record = _read(path)
            data = folder / record["data"]
            if record["recipe"] == recipe and sha256_of(data) == record["sha256"]:
                return int(record["step"]), load_file(data)
        except (OSError, ValueError, KeyError, DamagedError):
            continue  # half a checkpoint: the one before it serves
    return None


def _read(path: Path) -> dict[str, str]:
    import json

    found: dict[str, str] = json.loads(path.read_text())
    if "/" in found["data"]:
        raise DamagedError(f"{path}: names a file outside its folder")
    return found
