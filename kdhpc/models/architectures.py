"""Architectures of models with new weights: the config that transformers builds them from.

What a user gives is checked here before a run is submitted. transformers itself accepts any field,
and says nothing about one that it does not know.
"""

import dataclasses
import functools
import json
from difflib import get_close_matches
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from kdhpc.config.bounds import out_of_bounds
from kdhpc.config.model import Architecture, Design, Shape, Sizes
from kdhpc.errors import InputError

transformers_logging.set_verbosity_error()

OWN = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
"""Fields that follow from the truth's tokenizer."""
DROPOUTS = ("dropout", "pdrop", "dropout_prob", "dropout_rate", "layerdrop", "jitter_noise")
"""Ends of the names of fields that are probabilities of dropout."""
POSITIONS = "max_position_embeddings"
NUM_IDS = 64
"""Size of the vocabulary of a model that is made only to be measured."""


def config_of(design: Design, *, vocab_size: int, length: int, eos: int) -> PreTrainedConfig:
    """Return the config of a model with new weights.

    Args:
        design: its architecture.
        vocab_size: number of ids.
        length: number of tokens of a sequence.
        eos: id of the end-of-sequence token, which begins a sequence too.

    Raises:
        InputError: if transformers has no such model type or field, or refuses a value. The message
            starts with the field.
    """
    ids = {"vocab_size": vocab_size, "bos_token_id": eos, "eos_token_id": eos, "pad_token_id": None}
    if isinstance(design, Shape):
        return LlamaConfig(
            **ids,
            hidden_size=design.hidden,
            intermediate_size=design.ffn,
            num_hidden_layers=design.layers,
            num_attention_heads=design.heads,
            num_key_value_heads=design.kv_heads,
            max_position_embeddings=length,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": design.rope_theta},
            initializer_range=design.init_std,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            dtype=torch.float32,
        )
    config_class = _config_class(design)
    fields = _fields(design, config_class, length)
    try:
        config: PreTrainedConfig = config_class(**fields, **ids, dtype=torch.float32)
    except Exception as error:  # each class raises what it wants
        raise InputError(f"{_named(fields, error)}: {_one_line(error)}") from error
    without_dropout(config)
    return config


def _config_class(architecture: Architecture) -> Any:
    """Return the class of configs of the model type of an architecture.

    Raises:
        InputError: if transformers has no decoder of text of this type.
    """
    model_type = architecture["model_type"]
    known = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]
    if model_type not in known:
        close = get_close_matches(model_type, known, n=3) or ["llama", "qwen3", "gemma3_text"]
        raise InputError(
            f"model_type={model_type}: transformers has no causal language model of this type; "
            f"expected one such as {', '.join(close)}"
        )
    config_class = CONFIG_MAPPING[model_type]
    if config_class.sub_configs or config_class.is_encoder_decoder:
        close = [name for name in known if name.startswith(f"{model_type}_text")]
        raise InputError(
            f"model_type={model_type}: has more parts than a decoder of text; expected "
            f"{close[0] if close else 'the type of a decoder alone'}"
        )
    return config_class


def _fields(architecture: Architecture, config_class: Any, length: int) -> dict[str, Any]:
    """Return the fields of an architecture under the names that the class of its config has.

    Positions are added if the class has them and they are not given.

    Raises:
        InputError: if the class has no such field, or it is not the user's.
    """
    given = {name: value for name, value in architecture.items() if name != "model_type"}
    names = config_class.attribute_map
    of_all = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    known = {field.name for field in dataclasses.fields(config_class)} - of_all
    fields: dict[str, Any] = {}
    for name, value in given.items():
        own = name if name in known else names.get(name, name)
        if own in OWN:
            raise InputError(
                f"{name}={value}: follows from the truth's tokenizer; expected no such field"
            )
        if own not in known and value is None:
            continue  # takes away what an earlier preset gave another type
        if own not in known:
            close = get_close_matches(name, [*known, *names], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(
                f"{name}={value}: transformers' {config_class.__name__} has no such field{hint}"
            )
        if own in fields:
            raise InputError(f"{name}={value}: is given twice, as {own} too; expected one of them")
        if name.endswith(DROPOUTS) and value:
            raise InputError(f"{name}={value}: expected 0; models are trained without dropout")
        fields[own] = value
    positions = names.get(POSITIONS, POSITIONS)
    if positions in known:
        number = fields.setdefault(positions, length)
        if isinstance(number, int) and number < length:
            raise InputError(f"{positions}={number}: expected at least length={length}")
    return fields


def _named(fields: dict[str, Any], error: Exception) -> str:
    """Return the field that the message of transformers is about, with its value; else the type."""
    named = next((name for name in fields if f"'{name}'" in str(error)), None)
    return "model_type" if named is None else f"{named}={fields[named]}"


def _one_line(error: BaseException) -> str:
    error = error.__cause__ or error  # transformers wraps what a check of a field says
    text = " ".join(str(error).split()) or type(error).__name__
    return f"no {text} is known" if isinstance(error, KeyError) else text


def without_dropout(config: PreTrainedConfig) -> None:
    """Set every dropout of a config to 0; it would draw numbers that depend on the ranks."""
    for name, value in vars(config).items():
        if name.endswith(DROPOUTS) and isinstance(value, int | float):
            setattr(config, name, 0.0)


def sizes_of(architecture: Architecture, *, length: int) -> Sizes:
    """Return the sizes of an architecture, after checking that transformers can build and run it.

    Nothing is allocated or computed.

    Raises:
        InputError: if it cannot be used. The message starts with the field.
    """
    return _sizes_of(json.dumps(architecture), length)


@functools.cache
def _sizes_of(architecture_json: str, length: int) -> Sizes:
    architecture = json.loads(architecture_json)
    name = f"model_type={architecture['model_type']}"
    config = config_of(architecture, vocab_size=NUM_IDS, length=length, eos=0)
    try:
        with torch.device("meta"):
            # Grouped products of experts cannot be tried in float32 without values.
            model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
            ids = torch.zeros((1, length), dtype=torch.int64)
            with torch.no_grad():
                _ = model.base_model(ids, use_cache=False).last_hidden_state
    except Exception as error:  # each model raises what it wants
        if "meta" not in str(error):  # where tokens go, as to experts, is not known without values
            raise InputError(
                f"{name}: cannot be built of these fields: {_one_line(error)}"
            ) from error
    if model.base_model is model:
        raise InputError(f"{name}: has no hidden states apart from its logits; expected another")
    if model._is_stateful:
        raise InputError(
            f"{name}: keeps a state instead of keys and values, with which it is not sampled here; "
            "expected a model with attention alone"
        )
    try:
        sizes = sizes_of_model(model)
    except Exception as error:  # each config raises what it wants
        raise InputError(f"{name}: its sizes are not known: {_one_line(error)}") from error
    for problem in out_of_bounds(sizes, Sizes):
        raise InputError(f"{name}: cannot be built of these fields: its {problem}")
    if sizes.attention % sizes.key_values:
        raise InputError(
            f"{name}: its key heads have a width of {sizes.key_values} together; expected a "
            f"divisor of that of the query heads, {sizes.attention}"
        )
    return sizes


def sizes_of_model(model: PreTrainedModel) -> Sizes:
    """Return the sizes of a model of transformers; its weights are not read."""
    config = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weights = {id(layer.weight): layer.weight for layer in (embedding, head)}
    per_id = sum(weight.shape[1] for weight in weights.values())
    per_id += getattr(head, "bias", None) is not None
    vocab_size = head.weight.shape[0]
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or hidden // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    ffn = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return Sizes(
        layers=config.num_hidden_layers,
        hidden=hidden,
        attention=heads * head_size,
        key_values=key_heads * head_size,
        ffn=ffn or 4 * hidden,
        parameters=sum(p.numel() for p in model.parameters()) - vocab_size * per_id,
        parameters_per_id=per_id,
    )
