"""Models as sampling and scoring use them: kdhpc's own Llama, or whatever transformers reads."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kdhpc.errors import DamagedError
from kdhpc.models import llama
from kdhpc.models.devices import DTYPES, Linear, pick_device
from kdhpc.models.tokenizer import Tokenizer


class LanguageModel(Protocol):
    """A causal language model that only infers."""

    kind: str
    """`llama`, or the model type of transformers."""
    device: torch.device
    dtype: torch.dtype

    @property
    def head(self) -> Linear:
        """Float32 logits [N, V] of hidden states [N, H]."""
        ...

    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states [B, L, H] under causal attention over ids [B, L]."""
        ...


def load_model(path: Path, *, dtype: str, device: torch.device) -> LanguageModel:
    """A checkpoint folder (safetensors) as a model that only infers.

    Raises:
        DamagedError: if it is not one.
    """
    import safetensors

    try:
        config = json.loads((path / "config.json").read_bytes())
        if llama.fits(config):
            with _weights(path) as weights:
                return llama.Llama(config, weights, dtype=DTYPES[dtype], device=device)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise DamagedError(f"{path}: not a model checkpoint ({error})") from error
    from kdhpc.models.huggingface import TransformersModel

    return TransformersModel.load(path, dtype=dtype, device=device)


@contextlib.contextmanager
def _weights(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """Gives tensors of a checkpoint folder by name, each read when it is asked for."""
    from safetensors import safe_open

    index = path / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(path / name, framework="pt")) for name in sorted(names)
        ]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        asked = {"lm_head.weight"}  # a tied one may be there

        def read(name: str) -> Tensor:
            asked.add(name)
            tensor: Tensor = where[name].get_tensor(name)
            return tensor

        yield read
        if unknown := sorted(where.keys() - asked):
            raise ValueError(f"a Llama has no {unknown[0]}")


@dataclass
class Loaded:
    """A model, its tokenizer, and what a stage keeps of its work with them."""

    model: LanguageModel
    tokenizer: Tokenizer
    sampler: Any = None
    """Options and sampler that `kdhpc.sampling.sampler` made last; they go with the model."""


_last: tuple[tuple[Path, str, str], Loaded] | None = None


def load(path: Path, dtype: str, device: str) -> Loaded:
    """A checkpoint folder; the last stays in memory, so that a task loads it once."""
    global _last
    wanted = (path, dtype, device)
    if _last is None or _last[0] != wanted:
        forget()  # two large models may not fit
        model = load_model(path, dtype=dtype, device=pick_device(device))
        _last = wanted, Loaded(model, Tokenizer(path))
    return _last[1]


def forget() -> None:
    """Drop what `load` keeps, and all that hangs on it."""
    global _last
    _last = None
