"""Config of the tasks that finished models are evaluated on."""

from collections.abc import Iterator
from dataclasses import dataclass

from kdhpc.config.bounds import AtLeastTwo, Count, name_problems, repeated

INSTRUCTIONS, ANSWERS, PAIRS = "kdhpc_instructions", "kdhpc_answers", "kdhpc_pairs"
INDUCTION, CLOZE, CORRUPTED = "kdhpc_induction", "kdhpc_cloze", "kdhpc_corrupted"
OPEN = "kdhpc_open"
OWN_TASKS = (INSTRUCTIONS, ANSWERS, PAIRS, INDUCTION, CLOZE, CORRUPTED, OPEN)
"""Tasks that kdhpc makes itself; docs/downstream.md describes each."""
FROM_TRUTH = (CLOZE, CORRUPTED, OPEN)
"""Those of them that are made of truth's evaluation set, and so of no other tokens."""
LEAST_BYTES = 48
"""Shortest `length` for the others of them where tokens are bytes, so that whole items fit."""


@dataclass(frozen=True, kw_only=True)
class Downstream:
    """Tasks that finished models are evaluated on, and how."""

    tasks: tuple[str, ...] = ()
    """Names of tasks of lm-evaluation-harness, such as `arc_easy`, of tasks in `include`, or of
    kdhpc's own: `kdhpc_instructions`, `kdhpc_answers`, `kdhpc_pairs`, `kdhpc_induction`,
    `kdhpc_cloze`, `kdhpc_corrupted`, `kdhpc_open`. Without tasks nothing is evaluated. They need
    kdhpc[downstream]; data is fetched when a run is submitted."""
    include: str | None = None
    """Folder of task files (YAML) of lm-evaluation-harness, whose tasks can be named too."""
    include_fingerprint: str = ""
    """Digest of the files in `include`. It is filled in when a run is submitted; if it is given,
    other files are refused."""
    included: tuple[str, ...] = ()
    """Those of `tasks` whose files are in `include`. It is filled in when a run is submitted."""
    limit: AtLeastTwo | None = None
    """Largest number of items of a task; if it is not given, 512 of kdhpc's own, and all others."""
    batch_rows: Count = 32
    """Number of requests that a model is given at once. It is part of the recipe, because another
    batch shape rounds differently."""


def downstream_problems(
    downstream: Downstream, *, length: int, is_cut: bool, tokenizer: str
) -> Iterator[str]:
    """Yield what is wrong with the tasks, as far as their names and the config say it.

    Args:
        downstream: the tasks.
        length: number of tokens of a sequence.
        is_cut: whether the truth's vocabulary is cut.
        tokenizer: `truth.tokenizer`.
    """
    key = f"downstream.tasks={list(downstream.tasks)}"
    yield from name_problems("downstream.tasks", downstream.tasks)
    for name in repeated(downstream.tasks):
        yield f"{key}: duplicate {name}"
    made = [name for name in downstream.tasks if name in OWN_TASKS and name not in FROM_TRUTH]
    if made and tokenizer == "bytes" and length < LEAST_BYTES:
        yield f"length={length}: is too short for {made[0]}; expected at least {LEAST_BYTES} bytes"
    for name in downstream.tasks:
        if is_cut and name not in FROM_TRUTH:
            yield (
                f"{key}: {name} has words that a vocabulary that is cut may lack; expected only "
                f"{', '.join(FROM_TRUTH)}, or truth.vocabulary=null"
            )
