#!/usr/bin/env python
"""Compute what one GPU could reach in preset `paper`; nothing here is measured.

python benchmarks/roofline.py [--tb-per-s 3.35] [--tflops 989] [--gb 80]   # an H100's data sheet

The limit reads weights, keys and values once. The other bound goes through the kernels of a step,
counted on meta tensors: each takes as long as its bytes, its products or its start in a CUDA graph,
whichever is longest.
"""

from collections.abc import Callable
from typing import Any

import limits
import tables
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.config.model import Shape
from kdhpc.experiment.estimates import OF_MEMORY
from kdhpc.models.dense import Dense
from kdhpc.models.sizes import SamplingMemory, sizes_of_shape
from kdhpc.pipeline import LANGUAGE
from kdhpc.sampling.decoding import DenseDecoder
from kdhpc.sampling.draws import InverseCdf
from kdhpc.selection import Selection

META = torch.device("meta")
KERNEL_S = 1.3e-6
"""Seconds between the starts of two kernels of a CUDA graph, from public measurements."""
OF_KERNELS = 0.7
"""Guess of the part of the bound by kernels that is reached: kernels seldom reach all of the
bandwidth."""
IN_A_PIECE = 2
"""Number of kernels that a compiled piece is counted as; it has one or two."""
VIEWS = {
    "_unsafe_view", "_reshape_alias", "alias", "detach", "expand", "permute", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip
"""Operators that start no kernel."""
PRODUCTS = {"mm", "addmm", "bmm"}


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts kernels, and how long they take by bytes, products and starts."""

    def __init__(self, bytes_per_s: float, flops_per_s: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes_per_s, self.flops_per_s = bytes_per_s, flops_per_s
        self.number, self.seconds = 0, 0.0
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not self.inside and name not in VIEWS:
            used = tree_leaves((args, kwargs, result))
            if name in {"embedding", "index_select"}:  # of a table, some rows are read
                used = 2 * tree_leaves(result)
            flops = 0.0
            if name in PRODUCTS:
                flops = 2.0 * args[-1].shape[-1] * args[-2].numel()
            self.add(used, number=1, flops=flops)
        return result

    def add(self, used: list[Any], *, number: int, flops: float = 0.0) -> None:
        """Add kernels that read and write some tensors once."""
        num_bytes = sum(x.nbytes for x in used if isinstance(x, Tensor))
        self.number += number
        self.seconds += max(
            number * KERNEL_S, num_bytes / self.bytes_per_s, flops / self.flops_per_s
        )

    def piece(self, function: Callable[..., Any], *, without: int = 0) -> Callable[..., Any]:
        """Return a function that counts as a compiled piece.

        Args:
            function: the function.
            without: number of its last arguments that are not read.
        """

        def call(*arguments: Any) -> Any:
            self.inside = True
            result = function(*arguments)
            self.inside = False
            read = arguments[: len(arguments) - without]
            self.add(tree_leaves((read, result)), number=IN_A_PIECE)
            return result

        return call


def step_by_kernels(shape: Shape, rows: int, length: int, kernels: Kernels) -> None:
    """Do a step at the mean position on meta tensors, as it is compiled on GPUs.

    Some twenty small kernels are left out, in which the sampler counts and stores what was drawn.
    """
    keys = length // 2
    with META:
        config = AutoConfig.for_model(
            "llama", vocab_size=limits.VOCAB_SIZE, hidden_size=shape.hidden,
            intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            max_position_embeddings=length, tie_word_embeddings=True,
        )  # fmt: skip
        weights = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    model = Dense(config.to_dict(), weights.__getitem__, dtype=torch.bfloat16, device=META)
    decoder = DenseDecoder(model, rows=rows, length=keys)
    decoder.attend_by("used")
    decoder.add_norm = kernels.piece(decoder.add_norm)
    decoder.place = kernels.piece(decoder.place, without=2)  # the cache
    decoder.activate = kernels.piece(decoder.activate)
    draw = InverseCdf(Selection(), rows, keys, META)
    draw.invert = kernels.piece(draw.invert)
    ids, position = (torch.zeros(n, dtype=torch.int64, device=META) for n in (rows, 1))
    with torch.no_grad(), kernels:
        draw(decoder.step(ids, position, keys), position)


def main() -> None:
    """Print the table for truth, teacher and student."""
    parser = tables.options(__doc__)
    parser.add_argument("--tb-per-s", type=float, default=3.35)
    parser.add_argument("--tflops", type=float, default=989.0)
    parser.add_argument("--gb", type=float, default=80.0)
    options = parser.parse_args()
    config = LANGUAGE.checked(presets.build(LanguageConfig, presets.compose(["paper"])))
    shapes = {"truth": config.truth.shape, "teacher": config.teacher.shape}
    shapes |= {name: student.shape for name, student in config.students.items()}
    rows: list[dict[str, Any]] = []
    for name, shape in shapes.items():
        if shape is None:
            continue
        memory = SamplingMemory(
            sizes=sizes_of_shape(shape),
            vocab_size=limits.VOCAB_SIZE,
            length=config.length,
            dtype="bfloat16",
            on_gpu=True,
        )
        fits = memory.most_rows(OF_MEMORY * 1e9 * options.gb)
        own = config.sampling.rows_of(is_truth=name == "truth")
        for batch in sorted({config.sampling.batch_rows, own, fits}):
            num_bytes, flops = limits.decoding(
                sizes_of_shape(shape),
                limits.VOCAB_SIZE,
                rows=batch,
                new_tokens=config.length - 1,
                dtype="bfloat16",
            )
            read_s, compute_s = num_bytes / options.tb_per_s / 1e12, flops / options.tflops / 1e12
            limit = batch / (read_s + compute_s)
            kernels = Kernels(options.tb_per_s * 1e12, options.tflops * 1e12)
            step_by_kernels(shape, batch, config.length, kernels)
            by_kernels = batch / max(kernels.seconds, read_s + compute_s)
            rows.append(
                {
                    "model": name,
                    "batch rows": batch,
                    "read, ms a step": read_s * 1e3,
                    "compute, ms a step": compute_s * 1e3,
                    "limit, tokens/s": limit,
                    "kernels a step": kernels.number,
                    "bound by kernels, tokens/s": by_kernels,
                    f"expected at {OF_KERNELS}, tokens/s": OF_KERNELS * by_kernels,
                    "of the limit": OF_KERNELS * by_kernels / limit,
                }
            )
    tables.save(
        "roofline",
        f"Sampling on one GPU with {options.gb:g} GB, {options.tb_per_s:g} TB/s and "
        f"{options.tflops:g} TFLOP/s: arithmetic, not run",
        rows,
    )


if __name__ == "__main__":
    main()
