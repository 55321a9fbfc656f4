"""vLLM as a peer of kdhpc's sampler; runs in an environment that has vLLM, and needs no kdhpc.

    PYTHON -I kdhpc/vllm_speed.py MODEL DTYPE ROWS LENGTH

It samples rows that start with one token, at temperature 1 from the whole vocabulary, and prints
tokens, seconds and vLLM's version as JSON. `kdhpc.gpu_check --vllm PYTHON` runs it.
"""

import json
import os
import sys
import time
from collections.abc import Callable

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def main(model: str, dtype: str, rows: str, length: str) -> None:
    """Time one batch, after another that warms up."""
    draw, version = load(model, dtype=dtype, rows=int(rows), length=int(length))
    draw()
    began = time.perf_counter()
    tokens = draw()
    seconds = time.perf_counter() - began
    sys.stdout.write(json.dumps({"tokens": tokens, "seconds": seconds, "version": version}) + "\n")


def load(
    model: str, *, dtype: str, rows: int, length: int, first_id: int = 1
) -> tuple[Callable[[], int], str]:
    """Load a model into vLLM.

    Args:
        model: folder of a checkpoint as transformers writes it.
        dtype: `float32` or `bfloat16`.
        rows: rows of a batch.
        length: tokens of a row, with the one that it starts with.
        first_id: the token that each row starts with.

    Returns:
        A function that samples the next batch and returns the number of tokens drawn, and vLLM's
        version.
    """
    os.environ |= ENVIRONMENT
    import vllm

    engine = vllm.LLM(
        model=model, skip_tokenizer_init=True, dtype=dtype, max_num_seqs=rows,
        max_model_len=length, enable_prefix_caching=False,
    )  # fmt: skip
    parameters = vllm.SamplingParams(
        temperature=1.0, top_k=0, top_p=1.0, max_tokens=length - 1, ignore_eos=True,
        detokenize=False,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": [first_id]}] * rows

    def draw() -> int:
        results = engine.generate(prompts, parameters, use_tqdm=False)
        return sum(len(row.outputs[0].token_ids) for row in results)

    return draw, vllm.__version__


if __name__ == "__main__":
    main(*sys.argv[1:])
