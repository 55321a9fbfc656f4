#!/usr/bin/env python
"""Measure how the time of sampling and scoring a small model grows with the work.

    taskset -c 0 python benchmarks/growth.py

Sequences, length and batch are grown one at a time. `of linear` is the time relative to 1x, divided
by the factor; a value of at most 1 means linear or better.
"""

import statistics
import time
from typing import Any

import tables
import torch

from kdhpc.config.model import Shape
from kdhpc.models import devices, huggingface
from kdhpc.models.dense import Dense
from kdhpc.sampling.sampler import Prompt, Sampler, sample
from kdhpc.scoring import likelihood
from kdhpc.scoring.counting import Counting
from kdhpc.selection import Selection

SHAPE = Shape(layers=6, hidden=384, heads=6, kv_heads=2, ffn=1024)
VOCAB_SIZE = 8192
BASE = {"sequences": 32, "length": 32, "batch": 32}
FACTORS = (1, 4, 16)


def main() -> None:
    """Grow sequences, length and batch (with the sequences) 16 times."""
    parser = tables.options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    devices.set_threads(tables.conditions()["cores"])
    devices.set_allocator(keep_freed=True)
    rows: list[dict[str, Any]] = []
    for name, work in {"sample": sampling_of, "score": score}.items():
        for grown in ("sequences", "length", "batch"):
            row: dict[str, Any] = {"work": name, "grows": grown}
            for factor in FACTORS:
                size = dict(BASE)
                size[grown] *= factor
                size["sequences"] = max(size["sequences"], size["batch"])
                run = work(**size)
                run()
                seconds = []
                for _ in range(options.rounds):
                    began = time.perf_counter()
                    run()
                    seconds.append(time.perf_counter() - began)
                row[f"{factor}x, s"] = statistics.median(seconds)
            for factor in FACTORS[1:]:
                row[f"{factor}x, of linear"] = row[f"{factor}x, s"] / row["1x, s"] / factor
            rows.append(row)
    tables.save("growth", "Cost as work grows, small model, float32", rows, facts=BASE)


def sampling_of(sequences: int, length: int, batch: int) -> Any:
    """Return a function that samples."""
    sampler = Sampler(
        model(length), prompts=[Prompt(ids=(1,))], length=length, batch_rows=batch,
        selection=Selection(), draw="inverse_cdf",
        counting=Counting(num_prompt=1, eos=-1, count_eos=True),
    )  # fmt: skip
    return lambda: sample(sampler, rows=range(sequences), seed=0, stream="growth")


def score(sequences: int, length: int, batch: int) -> Any:
    """Return a function that scores."""
    scorer = model(length)
    ids = torch.randint(VOCAB_SIZE, (sequences, length))

    def run() -> None:
        for part in torch.split(ids, batch):
            likelihood.token_log_probs(scorer, part, head_tokens=4096)

    return run


def model(length: int) -> Dense:
    """Make a model with fresh weights."""
    fresh = huggingface.new_model(SHAPE, vocab_size=VOCAB_SIZE, length=length, eos=0, seed=0)
    weights = fresh.state_dict()
    return Dense(
        fresh.config.to_dict(), weights.__getitem__, dtype=fresh.dtype, device=fresh.device
    )


if __name__ == "__main__":
    main()
