"""Measured limits of this machine, and the least work that a job needs."""

import json
from pathlib import Path

from kdhpc.config.model import Shape, Sizes
from kdhpc.models.loading import count_parameters
from kdhpc.models.sizes import NUM_BYTES, key_value_bytes

LARGE = Shape(
    layers=30, hidden=576, heads=9, kv_heads=3, ffn=1536, rope_theta=100000.0, init_std=0.04167
)
"""Shape of the 135M model."""
VOCAB_SIZE = 49152


def bandwidth() -> float:
    """Measure the bytes per second that are read and written when a buffer is copied.

    The buffer is larger than every cache. On CPUs this and `matrix_rate` use torch's threads.
    """
    from kdhpc import gpu_check
    from kdhpc.models import devices

    return gpu_check.bandwidth(devices.pick_device("auto"))


def matrix_rate(dtype: str) -> float:
    """Measure the floating-point operations per second of a large matrix product."""
    from kdhpc.models import devices

    return devices.matmul_flops_per_s(devices.pick_device("auto"), devices.DTYPES[dtype])


def sizes_of(model: Path) -> tuple[Sizes, int]:
    """Return the sizes and the vocabulary size of a checkpoint folder of a dense transformer."""
    config = json.loads((model / "config.json").read_bytes())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_size, vocab_size = config.get("head_dim") or hidden // heads, config["vocab_size"]
    tied = config.get("tie_word_embeddings", False)
    return Sizes(
        layers=config["num_hidden_layers"],
        hidden=hidden,
        attention=heads * head_size,
        key_values=(config.get("num_key_value_heads") or heads) * head_size,
        ffn=config["intermediate_size"],
        parameters=count_parameters(model) - (1 if tied else 2) * vocab_size * hidden,
        parameters_per_id=(1 if tied else 2) * hidden,
    ), vocab_size


def decoding(
    sizes: Sizes, vocab_size: int, *, rows: int, new_tokens: int, dtype: str
) -> tuple[float, float]:
    """Return the bytes that a decoding step at the mean position reads, and its operations.

    Weights, and the keys and values before the position, are read once. Attention multiplies and
    adds twice for each key: queries with keys, and probabilities with values.
    """
    weights = sizes.parameters + vocab_size * sizes.hidden  # of the embedding few rows are read
    keys = rows * (new_tokens + 1) / 2
    num_bytes = NUM_BYTES[dtype] * weights + key_value_bytes(sizes, dtype) * keys
    attention = 4 * sizes.layers * sizes.attention * keys
    return num_bytes, 2.0 * weights * rows + attention
