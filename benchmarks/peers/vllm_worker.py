"""A worker of benchmarks/sampling.py that runs vLLM in an environment of its own."""

import os

import turns

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def main() -> None:
    """Load the model, then sample one batch per turn."""
    options = turns.peer_options(__doc__)
    answer = turns.begin()
    import vllm

    engine = vllm.LLM(
        model=options.model,
        skip_tokenizer_init=True,
        dtype=options.dtype,
        max_num_seqs=options.rows,
        max_model_len=options.new_tokens + 1,
        enable_prefix_caching=False,
    )
    parameters = vllm.SamplingParams(
        temperature=1.0, top_k=0, top_p=1.0, max_tokens=options.new_tokens, ignore_eos=True,
        detokenize=False,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": [options.prompt_id]}] * options.rows

    def work() -> turns.Answer:
        results = engine.generate(prompts, parameters, use_tqdm=False)
        return {"tokens": sum(len(row.outputs[0].token_ids) for row in results)}

    work()
    turns.serve(answer, work, version=vllm.__version__)


if __name__ == "__main__":
    main()
