#!/usr/bin/env python
"""Compare the speed and memory of scoring with the way of the paper's released code.

    taskset -c 0 python benchmarks/scoring.py

The released way is transformers in float32, 16 rows of 512 tokens at once, with a log-softmax over
logits [B, L, V]. `body` is transformers' own forward pass without the head. Systems take turns.
"""

import argparse
import sys
from typing import Any

import limits
import tables
import turns
from sampling import real_model

from kdhpc.models.sizes import forward_flops, sizes_of_shape
from kdhpc.sampling import native

LENGTH, ROWS = 512, 16
SYSTEMS = (
    "released way",
    "body float32",
    "kdhpc float32",
    "body bfloat16",
    "kdhpc bfloat16",
    "kdhpc native bfloat16",
)


def main() -> None:
    """Start every system, let them take turns, and print a table."""
    parser = tables.options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS, metavar="NAME"
    )
    parser.add_argument("--batch-rows", type=int, default=4, help="rows at once in kdhpc")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
    real_model()
    workers = {}
    for name in options.systems:
        if "native" in name and (reason := native.missing()):
            print(f"{name} is left out: {reason}", file=sys.stderr)
            continue
        print(f"starting {name}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--batch-rows", str(options.batch_rows)]
        workers[name] = turns.Worker([*command, "--worker", name])
    from kdhpc.models.devices import set_threads

    set_threads(tables.conditions()["cores"])
    rates = {dtype: limits.matrix_rate(dtype) for dtype in ("float32", "bfloat16")}
    answers = turns.take_turns(workers, options.rounds)
    released = turns.median(answers[SYSTEMS[0]]) if SYSTEMS[0] in answers else None
    tokens = ROWS * LENGTH
    rows: list[dict[str, Any]] = []
    for name, all_turns in answers.items():
        each = turns.median(all_turns)
        dtype = "bfloat16" if name.endswith("bfloat16") else "float32"
        flops = forward_flops(sizes_of_shape(limits.LARGE), limits.VOCAB_SIZE, LENGTH) * tokens
        body = turns.median(answers[key]) if (key := f"body {dtype}") in answers else None
        rows.append(
            {
                "system": name,
                "tokens/s": tokens / each,
                "times the released way": released / each if released else None,
                "times the body alone": body / each if body else None,
                "of the matrix rate": None if "body" in name else flops / each / rates[dtype],
                "peak GB": max(answer["peak_bytes"] for answer in all_turns) / 1e9,
            }
        )
    tables.save(
        f"scoring-{tables.conditions()['cores']}-cores",
        f"Scoring, 135M, {ROWS} rows x {LENGTH} tokens",
        rows,
        facts={f"TFLOP/s {dtype}": rate / 1e12 for dtype, rate in rates.items()}
        | {"rounds": options.rounds, "rows at once in kdhpc": options.batch_rows},
    )
    for worker in workers.values():
        worker.stop()


def work(options: argparse.Namespace) -> None:
    """Be the worker of one system: load, then score all rows once per turn."""
    answer = turns.begin()
    import torch

    from kdhpc.models import devices, loading
    from kdhpc.models.huggingface import TransformersModel
    from kdhpc.scoring import likelihood

    devices.set_threads(tables.conditions()["cores"])
    device = devices.pick_device("auto")
    name, _, dtype = options.worker.rpartition(" ")
    ours = name.startswith("kdhpc")
    if ours:
        devices.set_allocator(keep_freed=True)
    dtype = dtype if dtype in devices.DTYPES else "float32"
    model: Any
    if ours:
        model = loading.load_model(real_model(), dtype=dtype, device=device)
        head = native.head_of(model) if name.endswith("native") else None
    else:
        model = TransformersModel.load(real_model(), dtype=dtype, device=device).model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(limits.VOCAB_SIZE, (ROWS, LENGTH), generator=generator).to(device)

    @torch.inference_mode()
    def score() -> turns.Answer:
        if name == "released":
            logits = model(ids, use_cache=False).logits
            log_p = torch.log_softmax(logits, dim=-1)
            total = log_p[:, :-1].gather(2, ids[:, 1:, None]).sum()
        elif name == "body":
            total = model.base_model(ids, use_cache=False).last_hidden_state.sum()
        else:
            parts = torch.split(ids, options.batch_rows)
            log_probs = [
                likelihood.token_log_probs(model, part, head_tokens=4096, head=head)
                for part in parts
            ]
            total = torch.cat(log_probs, dim=1)[0, :, 1:].sum()
        return {"sum": float(total), "peak_bytes": tables.peak_bytes(device)}

    score()
    turns.serve(answer, score)


if __name__ == "__main__":
    main()
