"""CTranslate2 as a worker of benchmarks/sampling.py; runs in its own environment."""

import argparse
import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Convert, load, then sample one batch a line."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--dtype"):
        parser.add_argument(name, required=True)
    for name in ("--rows", "--new-tokens", "--prompt-id"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    converted = Path(options.model).parent / "ctranslate2"
    if not converted.exists():
        TransformersConverter(options.model).convert(str(converted))
    device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
    there = ctranslate2.get_supported_compute_types(device)
    dtype = options.dtype if options.dtype in there else "float32"
    engine = ctranslate2.Generator(
        str(converted),
        device=device,
        compute_type=dtype,
        inter_threads=1,
        intra_threads=int(os.environ["OMP_NUM_THREADS"]),
    )
    vocabulary = json.loads((converted / "vocabulary.json").read_text())
    prompt = [[vocabulary[options.prompt_id]]] * options.rows

    def work() -> int:
        found = engine.generate_batch(
            prompt, max_length=options.new_tokens, min_length=options.new_tokens, sampling_topk=0,
            sampling_temperature=1.0, include_prompt_in_result=False, max_batch_size=options.rows,
        )  # fmt: skip
        return sum(len(row.sequences_ids[0]) for row in found)

    work()
    print(json.dumps({"version": f"{ctranslate2.__version__} {dtype}"}), file=answers, flush=True)
    while sys.stdin.readline():
        print(json.dumps({"tokens": work()}), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
