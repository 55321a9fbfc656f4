"""Measured limits of this machine, and the least work that a job needs."""

import json
from pathlib import Path

from kdhpc.config.model import Shape
from kdhpc.models.sizes import NUM_BYTES, key_value_bytes, num_parameters, sizes_of_shape

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


def shape_of(model: Path) -> tuple[Shape, int]:
    """Return the shape and the vocabulary size of a Llama in a checkpoint folder."""
    config = json.loads((model / "config.json").read_bytes())
    shape = Shape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        ffn=config["intermediate_size"],
    )
    return shape, config["vocab_size"]


def decoding(
    shape: Shape, vocab_size: int, *, rows: int, new_tokens: int, dtype: str
) -> tuple[float, float]:
    """Return the bytes that a decoding step at the mean position reads, and its operations.

    Weights, and the keys and values before the position, are read once. Attention multiplies and
    adds twice for each key: queries with keys, and probabilities with values.
    """
    sizes = sizes_of_shape(shape)
    weights = num_parameters(sizes, vocab_size)
    keys = rows * (new_tokens + 1) / 2
    num_bytes = NUM_BYTES[dtype] * weights + key_value_bytes(sizes, dtype) * keys
    attention = 4 * sizes.layers * sizes.hidden * keys
    return num_bytes, 2.0 * weights * rows + attention
