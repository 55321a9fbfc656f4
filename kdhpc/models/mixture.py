"""A truth that is an exact mixture of models: p*(x) = sum_k w_k p_k(x) over whole sequences.

Its folder has a checkpoint folder for each component, the tokenizer that they share, and a file of
their weights.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdhpc.errors import DamagedError
from kdhpc.models.devices import pick_device
from kdhpc.models.loading import Loaded, count_parameters, kept, load_model
from kdhpc.models.tokenizer import Tokenizer

WEIGHTS = "mixture.json"
"""File of the weights of the components, by name."""


@dataclass(frozen=True, kw_only=True)
class LanguageMixture:
    """Models that share a tokenizer, and their weights."""

    weights: NDArray[np.float64]
    """[K] weights, whose sum is 1."""
    components: tuple[Loaded, ...]
    """The K models, all in memory."""

    @property
    def tokenizer(self) -> Tokenizer:
        return self.components[0].tokenizer

    @property
    def device(self) -> torch.device:
        return self.components[0].model.device

    def sharpened(self, beta: float) -> NDArray[np.float64]:
        """Return the weights [K] to the power beta, divided by their sum."""
        powers: NDArray[np.float64] = (self.weights / self.weights.max()) ** beta
        sharpened: NDArray[np.float64] = powers / powers.sum()
        return sharpened


def is_mixture(path: Path) -> bool:
    """Return whether a folder holds a mixture, and not one model."""
    return (path / WEIGHTS).is_file()


def write(path: Path, components: Mapping[str, Path], weights: Mapping[str, float]) -> int:
    """Write a folder of a mixture.

    Args:
        path: the folder, which is made.
        components: checkpoint folder of each component, by name.
        weights: weights of the same components.

    Returns:
        Number of parameters of all components together.
    """
    from kdhpc.models.huggingface import set_tokenizer

    path.mkdir(parents=True)
    set_tokenizer(path, next(iter(components.values())))
    for name, folder in components.items():
        shutil.copytree(folder, path / name)
    in_order = {name: weights[name] for name in components}
    (path / WEIGHTS).write_text(json.dumps(in_order, indent=2))
    return sum(count_parameters(folder) for folder in components.values())


def load(path: Path, dtype: str, device: str) -> LanguageMixture:
    """Load a mixture, unless it is what `kdhpc.models.loading` loaded last.

    Raises:
        DamagedError: if the folder is not one of a mixture.
    """

    def make() -> LanguageMixture:
        try:
            weights: dict[str, float] = json.loads((path / WEIGHTS).read_bytes())
            numbers = np.array([float(weight) for weight in weights.values()])
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DamagedError(f"{path}: not a mixture of models ({error})") from error
        place = pick_device(device)
        models = (
            Loaded(load_model(path / name, dtype=dtype, device=place), Tokenizer(path / name))
            for name in weights
        )
        return LanguageMixture(weights=numbers, components=tuple(models))

    return kept((path, dtype, device), make)
