#!/usr/bin/env python
"""Compute what one GPU could reach in preset `paper`; nothing here is measured.

python benchmarks/roofline.py [--tb-per-s 3.35] [--tflops 989] [--gb 80]   # an H100's data sheet
"""

from typing import Any

import limits
import tables

from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.experiment.estimates import OF_MEMORY
from kdhpc.models.sizes import SamplingMemory, sizes_of_shape
from kdhpc.pipeline import LANGUAGE

SHARE = 0.5
"""Fraction of the limit by sums that plain torch reaches at least on a CPU
(docs/performance.md)."""


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
        for batch in sorted({config.sampling.batch_rows, fits}):
            num_bytes, flops = limits.decoding(
                shape, limits.VOCAB_SIZE, rows=batch, new_tokens=config.length - 1, dtype="bfloat16"
            )
            read_s, compute_s = num_bytes / options.tb_per_s / 1e12, flops / options.tflops / 1e12
            limit = batch / (read_s + compute_s)
            rows.append(
                {
                    "model": name,
                    "batch rows": batch,
                    "read, ms a step": read_s * 1e3,
                    "compute, ms a step": compute_s * 1e3,
                    "limit, tokens/s": limit,
                    f"expected at {SHARE}, tokens/s": SHARE * limit,
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
