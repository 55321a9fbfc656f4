"""Load models for sampling and scoring: kdhpc's own code, or any model that transformers reads."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from kdhpc.errors import DamagedError, InputError
from kdhpc.models import dense
from kdhpc.models.devices import DTYPES, Linear, memory_of, note_slow_dtype, pick_device
from kdhpc.models.sizes import NUM_BYTES
from kdhpc.models.tokenizer import Tokenizer

T = TypeVar("T")


class LanguageModel(Protocol):
    """A causal language model for inference only."""

    kind: str
    """The model type, as transformers names it."""
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    """Number of ids, V."""

    @property
    def head(self) -> Linear:
        """Function from hidden states [N, H] to float32 logits [N, V]."""
        ...

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the last hidden states [B, L, H] under causal attention over ids [B, L]."""
        ...


def load_model(path: Path, *, dtype: str, device: torch.device) -> LanguageModel:
    """Load a checkpoint folder (safetensors) as a model for inference.

    Raises:
        DamagedError: if the folder is not a checkpoint.
        InputError: if its weights alone are more than the memory of the device.
    """
    import safetensors

    note_slow_dtype(dtype, device.type)
    try:
        config = json.loads((path / "config.json").read_bytes())
        _check_fits(path, dtype, device)
        if dense.fits(config):
            with _weights(path) as weights:
                return dense.Dense(config, weights, dtype=DTYPES[dtype], device=device)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise DamagedError(f"{path}: not a model checkpoint ({error})") from error
    from kdhpc.models.huggingface import TransformersModel

    return TransformersModel.load(path, dtype=dtype, device=device)


def _check_fits(path: Path, dtype: str, device: torch.device) -> None:
    """Refuse a model that cannot be in memory; kdhpc holds a whole model on one device.

    Raises:
        InputError: if it is so.
    """
    needed, memory = NUM_BYTES[dtype] * count_parameters(path), memory_of(device)
    if needed > memory:
        raise InputError(
            f"{path}: its weights are {needed / 1e9:.1f} GB in {dtype}, more than the "
            f"{memory / 1e9:.1f} GB of this {'GPU' if device.type == 'cuda' else 'task'}; expected "
            "a dtype of fewer bits or more memory, since a model is never spread over devices for "
            'sampling and scoring (docs/models.md, "Large models")'
        )


@contextlib.contextmanager
def _weights(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """Provide a function that reads a tensor of a checkpoint folder by name.

    Raises:
        ValueError: on exit, if the folder has tensors that were not read.
    """
    from safetensors import safe_open

    index = path / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(path / name, framework="pt")) for name in sorted(names)
        ]
        file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        used = {"lm_head.weight"}  # a checkpoint with tied weights may contain it as well

        def read(name: str) -> Tensor:
            used.add(name)
            tensor: Tensor = file_of[name].get_tensor(name)
            return tensor

        yield read
        if unknown := sorted(file_of.keys() - used):
            raise ValueError(f"its config.json has no place for {unknown[0]}")


def count_parameters(path: Path) -> int:
    """Return the number of parameters in a checkpoint folder."""
    from safetensors import safe_open

    total = 0
    for file in path.glob("*.safetensors"):
        # torch's way to map a file needs as much memory as it has bytes.
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


@dataclass
class Loaded:
    """A model, its tokenizer, and the sampler that was last made for it."""

    model: LanguageModel
    tokenizer: Tokenizer
    sampler: Any = None
    """Options and sampler that `kdhpc.sampling.sampler` made last; dropped with the model."""


Key = tuple[Path, str, str]
_last: tuple[Key, Any] | None = None


def load(path: Path, dtype: str, device: str) -> Loaded:
    """Load a checkpoint folder, unless it is the last one that was loaded.

    The last model stays in memory, so that a task with several shards loads it once.
    """

    def make() -> Loaded:
        model = load_model(path, dtype=dtype, device=pick_device(device))
        return Loaded(model, Tokenizer(path))

    return kept((path, dtype, device), make)


def kept(key: Key, make: Callable[[], T]) -> T:
    """Return what was made last, if it has this path, dtype and device; otherwise make it."""
    global _last
    if _last is None or _last[0] != key:
        forget()  # two large models may not fit into memory
        _last = key, make()
    found: T = _last[1]
    return found


def forget() -> None:
    """Drop the model that `load` keeps, with its tokenizer and sampler."""
    global _last
    _last = None
