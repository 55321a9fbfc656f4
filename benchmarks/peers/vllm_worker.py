"""vLLM as a worker of benchmarks/sampling.py; runs in its own environment."""

import argparse
import json
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def main() -> None:
    """Load, then sample one batch a line."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--dtype"):
        parser.add_argument(name, required=True)
    for name in ("--rows", "--new-tokens", "--prompt-id"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import vllm

    engine = vllm.LLM(
        model=options.model,
        skip_tokenizer_init=True,
        dtype=options.dtype,
        max_num_seqs=options.rows,
        max_model_len=max(512, options.new_tokens + 1),
        enable_prefix_caching=False,
    )
    whole = vllm.SamplingParams(
        temperature=1.0, top_k=0, top_p=1.0, max_tokens=options.new_tokens, ignore_eos=True,
        detokenize=False,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": [options.prompt_id]}] * options.rows
    engine.generate(prompts, whole, use_tqdm=False)
    print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
    while sys.stdin.readline():
        found = engine.generate(prompts, whole, use_tqdm=False)
        tokens = sum(len(row.outputs[0].token_ids) for row in found)
        print(json.dumps({"tokens": tokens}), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
