#!/usr/bin/env python
"""Compare a model on its whole vocabulary with the same model on a part of it.

    taskset -c 0 python benchmarks/vocabulary.py [--ids 8192]

SmolLM2-135M samples and scores in bfloat16 and is trained in float32, each with one batch per turn.
Which ids are kept changes no speed, so the first ones are.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from typing import Any

import limits
import tables
import turns
from sampling import real_model

WHOLE, CUT = "whole vocabulary", "a part of it"
ROWS, LENGTH = 64, 64
TRAIN_ROWS = 8
WORK = ("sampling", "scoring", "training")


def main() -> None:
    """Start both models, let them take turns, and print a table."""
    parser = tables.options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ids", type=int, default=8192)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
    real_model()
    workers = {}
    for name in (WHOLE, CUT):
        command = [sys.executable, __file__, "--ids", str(options.ids), "--worker", name]
        workers[name] = turns.Worker(command)
    answers = turns.take_turns(workers, options.rounds)
    rates = {
        name: {what: turns.median(each, what) for what in WORK} for name, each in answers.items()
    }
    rows: list[dict[str, Any]] = [
        {
            "work": what,
            f"tokens/s, {limits.VOCAB_SIZE} ids": rates[WHOLE][what],
            f"tokens/s, {options.ids} ids": rates[CUT][what],
            "times": rates[CUT][what] / rates[WHOLE][what],
        }
        for what in WORK
    ]
    tables.save(
        "vocabulary",
        f"SmolLM2-135M, {ROWS} rows x {LENGTH} tokens, training {TRAIN_ROWS} rows",
        rows,
        facts={"rounds": options.rounds},
    )
    for worker in workers.values():
        worker.stop()


def work(options: argparse.Namespace) -> None:
    """Be the worker of one model: in each turn, sample and score a batch and train a step."""
    answer = turns.begin()
    import tempfile
    from pathlib import Path

    import numpy as np

    from kdhpc.config.model import Training
    from kdhpc.models import devices, huggingface, loading
    from kdhpc.sampling.sampler import Prompt, Sampler
    from kdhpc.scoring import scorer
    from kdhpc.scoring.counting import Counting
    from kdhpc.selection import Selection
    from kdhpc.training import ranks
    from kdhpc.training.data import Corpus
    from kdhpc.training.loop import Watch, train

    devices.set_threads(tables.conditions()["cores"])
    devices.set_allocator(keep_freed=True)
    device = devices.pick_device("auto")
    with tempfile.TemporaryDirectory() as folder:
        path = real_model()
        if options.worker == CUT:
            path = Path(folder)
            huggingface.cut_vocabulary(real_model(), range(options.ids), path)
        model = loading.load_model(path, dtype="bfloat16", device=device)
        to_train = huggingface.model_to_train(path)
    counting = Counting(num_prompt=1, eos=-1, count_eos=True)
    sampler = Sampler(
        model, prompts=[Prompt(ids=(1,))], length=LENGTH, batch_rows=ROWS, selection=Selection(),
        draw="inverse_cdf", counting=counting,
    )  # fmt: skip

    def turn(facts: Mapping[str, Any]) -> None:
        began = time.perf_counter()
        samples = sampler.batch(0, "benchmark", range(ROWS))
        drawn = time.perf_counter()
        scorer.score(model, samples, counting=counting, batch_rows=ROWS, head_tokens=4096)
        scored = time.perf_counter()
        tokens = ROWS * (LENGTH - 1)
        answer(
            {
                "sampling": tokens / (drawn - began),
                "scoring": tokens / (scored - drawn),
                "training": facts["tokens_per_s"],
            }
        )

    ids = np.random.default_rng(0).integers(0, model.vocab_size, (512, LENGTH)).astype(np.uint16)
    ranks.join(rank=0, world_size=1, address="", port=0, device=device)
    train(
        to_train,
        Corpus(ids=ids, length=np.full(len(ids), LENGTH, np.int32), counting=counting),
        Training(batch_sequences=TRAIN_ROWS, micro_batch_sequences=TRAIN_ROWS),
        seed=0,
        stream="benchmark",
        device=device,
        watch=Watch(on_step=turn),
    )
    sys.exit("trained to the end of the data")


if __name__ == "__main__":
    main()
