"""Models that a run does not train: what of them can be used, checked before and after taking them.

What their files say is checked on the login node. What only shows when the model runs is checked
once, in stage 1, by comparing the sampler's steps with whole rows.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from kdhpc.config.language import LanguageConfig
from kdhpc.errors import InputError
from kdhpc.types import Json

LEARNT_POSITIONS = ("wpe.weight", "embed_positions.weight", "position_embeddings.weight")
"""Ends of the names of position embeddings, which have a row for each position and no more."""
ROPE_BY_LENGTH = ("dynamic", "longrope")
"""Types of rotary positions whose frequencies depend on the length of the row, beyond the length
that the model was trained on. A step at a time and a whole row then differ."""
STEPS_CHECKED = 64
"""Number of positions at which the sampler's steps are compared with a whole row."""
BOUND_NATS = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""Largest mean difference of a token's log-probability between the two, by dtype."""


def check_folder(path: Path, name: str, *, length: int) -> None:
    """Check what the files of a checkpoint folder say, without loading the model.

    Args:
        path: the folder.
        name: what names the model in the config, for errors.
        length: number of tokens of a sequence.

    Raises:
        InputError: for the first problem.
    """
    try:
        config = json.loads((path / "config.json").read_bytes())
        text_config = config.get("text_config", config)
        tensors = set(_tensor_names(path))
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{name}: its files are not readable ({error})") from error
    for problem in _problems(text_config, tensors, length):
        raise InputError(f"{name}: {problem}")


def _problems(config: Mapping[str, Json], tensors: set[str], length: int) -> Iterator[str]:
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "an unknown method")
        yield f"its weights are quantised ({method}); expected plain weights, or a GGUF file"
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if positions is None or length <= positions:
        return
    if any(tensor.endswith(LEARNT_POSITIONS) for tensor in tensors):
        yield f"has {positions} learnt positions; expected at least length={length}"
    kind = rope.get("rope_type") or rope.get("type")
    trained = rope.get("original_max_position_embeddings") or positions
    if kind in ROPE_BY_LENGTH and length > trained:
        yield (
            f"its rotary positions, of the type {kind}, depend on the length of the row beyond "
            f"{trained} tokens, so that sampling and scoring differ; expected length<={trained}"
        )


def _tensor_names(path: Path) -> Iterator[str]:
    """Yield the names of the tensors in a folder, from the headers of its safetensors files."""
    for file in path.glob("*.safetensors"):
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            yield from json.loads(opened.read(min(size, 2**28)))


def check_taken(path: Path, config: LanguageConfig, *, dtype: str, name: str) -> None:
    """Check that a model that was taken into the run samples and scores the same numbers.

    Args:
        path: its checkpoint folder in the run.
        config: config of the run.
        dtype: dtype in which the model is sampled.
        name: what names the model in the config, for errors.

    Raises:
        InputError: if what its files say does not fit, its logits cannot be computed, or its steps
            differ from whole rows.
    """
    from kdhpc.models import loading
    from kdhpc.models.devices import pick_device
    from kdhpc.sampling.decoding import difference_of_steps

    check_folder(path, name, length=config.length)
    model = loading.load_model(path, dtype=dtype, device=pick_device(config.device))
    try:
        difference = difference_of_steps(model, min(config.length, STEPS_CHECKED))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if not difference <= BOUND_NATS[dtype]:
        raise InputError(
            f"{name}: one step at a time and whole rows differ by {difference:.2g} nats a token "
            f"(dtype {dtype}); expected at most {BOUND_NATS[dtype]}; kdhpc cannot use the model"
        )
