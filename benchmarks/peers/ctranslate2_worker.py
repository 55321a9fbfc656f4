"""A worker of benchmarks/sampling.py that runs CTranslate2 in an environment of its own."""

import json
import os
from pathlib import Path

import turns


def main() -> None:
    """Convert and load the model, then sample one batch per turn."""
    options = turns.peer_options(__doc__)
    answer = turns.begin()
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    converted = Path(options.model).parent / "ctranslate2"
    if not converted.exists():
        TransformersConverter(options.model).convert(str(converted))
    device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
    supported = ctranslate2.get_supported_compute_types(device)
    dtype = options.dtype if options.dtype in supported else "float32"
    engine = ctranslate2.Generator(
        str(converted),
        device=device,
        compute_type=dtype,
        inter_threads=1,
        intra_threads=int(os.environ["OMP_NUM_THREADS"]),
    )
    vocabulary = json.loads((converted / "vocabulary.json").read_text())
    prompt = [[vocabulary[options.prompt_id]]] * options.rows

    def work() -> turns.Answer:
        results = engine.generate_batch(
            prompt, max_length=options.new_tokens, min_length=options.new_tokens, sampling_topk=0,
            sampling_temperature=1.0, include_prompt_in_result=False, max_batch_size=options.rows,
        )  # fmt: skip
        return {"tokens": sum(len(row.sequences_ids[0]) for row in results)}

    work()
    turns.serve(answer, work, version=f"{ctranslate2.__version__} {dtype}")


if __name__ == "__main__":
    main()
