"""A worker of benchmarks/sampling.py that runs vLLM in an environment of its own."""

import runpy
from pathlib import Path

import turns

VLLM_SPEED = Path(__file__).parents[2] / "kdhpc" / "vllm_speed.py"


def main() -> None:
    """Load the model, then sample one batch per turn."""
    options = turns.peer_options(__doc__)
    answer = turns.begin()
    load = runpy.run_path(str(VLLM_SPEED))["load"]
    draw, version = load(
        options.model, dtype=options.dtype, rows=options.rows, length=options.new_tokens + 1,
        first_id=options.prompt_id,
    )  # fmt: skip
    draw()
    turns.serve(answer, lambda: {"tokens": draw()}, version=version)


if __name__ == "__main__":
    main()
