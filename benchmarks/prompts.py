#!/usr/bin/env python
"""Compare sampling with prompts of many lengths with sampling with prompts of one length.

    taskset -c 0 python benchmarks/prompts.py

The model, the number of rows and the mean length of the prompts are the same, so both draw the same
number of tokens; the two take turns. `of one length` is the ratio of their speeds in a round.
"""

import statistics
import time
from typing import Any

import tables
from growth import model

from kdhpc.models import devices
from kdhpc.sampling import native
from kdhpc.sampling.sampler import Prompt, Sampler, sample
from kdhpc.scoring.counting import Counting
from kdhpc.selection import Selection

LENGTH, ROWS, MEAN = 96, 64, 16
ONE = [Prompt(ids=(1,) * MEAN, stream=str(i)) for i in range(ROWS)]
MIXED = [Prompt(ids=(1,) * (1 + i % (2 * MEAN - 1)), stream=str(i)) for i in range(2 * MEAN - 1)]


def main() -> None:
    """Sample both kinds of prompts in turns, with each engine."""
    parser = tables.options(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    devices.set_threads(tables.conditions()["cores"])
    devices.set_allocator(keep_freed=True)
    rows: list[dict[str, Any]] = []
    for engine in ("torch", "native") if not native.missing() else ("torch",):
        speeds: dict[str, list[float]] = {"one length": [], "many lengths": []}
        samplers = {
            "one length": sampler_of(ONE, engine),
            "many lengths": sampler_of(MIXED, engine),
        }
        for number in range(options.rounds + 1):
            for name, sampler in samplers.items():
                began = time.perf_counter()
                drawn = sample(sampler, rows=range(2 * ROWS), seed=number, stream="prompts")
                seconds = time.perf_counter() - began
                if number:
                    tokens = int((drawn.length - drawn.arrays()["num_prompt"]).sum())
                    speeds[name].append(tokens / seconds)
        one, many = speeds.values()
        rows.append(
            {
                "engine": engine,
                "one length, tokens/s": statistics.median(one),
                "many lengths, tokens/s": statistics.median(many),
                "of one length": statistics.median(m / o for m, o in zip(many, one, strict=True)),
            }
        )
    facts = {"rows": ROWS, "length": LENGTH, "prompt": f"{MEAN}, or 1 to {2 * MEAN - 1}"}
    tables.save("prompts", "Prompts of many lengths, small model, float32", rows, facts=facts)


def sampler_of(prompts: list[Prompt], engine: str) -> Sampler:
    return Sampler(
        model(LENGTH), prompts=prompts, length=LENGTH, batch_rows=ROWS, selection=Selection(),
        draw="inverse_cdf", counting=Counting(num_prompt=0, eos=-1, count_eos=True), engine=engine,
    )  # fmt: skip


if __name__ == "__main__":
    main()
