"""Merge all scores of a run into one HDF5 file.

reads   score shards; evaluation token shards, for the samplers' own log-probabilities
writes  results.h5: /scores/<sampler>/<scorer>, /models/<name>, root attributes recipe and complete,
        /provenance (see `kdhpc.store.Results`)
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdhpc import arms
from kdhpc.artifacts import Work, Written
from kdhpc.config import LanguageConfig
from kdhpc.shards import Arm, Plan, Shard, Stage

if TYPE_CHECKING:
    from kdhpc.store import Scores

RESULTS = "results.h5"


def plan(config: LanguageConfig, before: Plan) -> list[Shard]:
    """One shard, named after its recipe: a run that grows is merged again beside the old merge."""
    wanted = [
        shard
        for stage in (arms.TRUTH, arms.TRAIN_ON_TRUTH, arms.TRAIN_STUDENTS, arms.SCORE)
        for shard in before.stage(stage)
    ]
    wanted += before.arm(arms.SAMPLE_TRUTH, "eval") + before.stage(arms.SAMPLE_STUDENTS)
    arm = Arm(
        stage=arms.MERGE,
        name="results",
        fields={"eos": config.eos},
        inputs={shard.key: shard.recipe for shard in wanted},
    )
    rows = sum(shard.num_rows for shard in before.stage(arms.SCORE))
    return [
        Shard(
            arm=arm,
            name=arm.recipe[:12],
            reads=tuple(shard.key for shard in wanted),
            work=rows,
            num_bytes=12.0 * rows,
        )
    ]


def run(shard: Shard, work: Work) -> Written:
    """Merge, walking the plan: every digest is checked, and a missing shard is an error."""
    path = work.new_path(shard, ".h5")
    digest = _write(path, shard, work, frozenset(work.plan.shards))
    return Written(path=path, rows=1, stats={"logical_digest": digest})


def run_partial(work: Work, present: frozenset[str], path: Path) -> None:
    """Merge the whole arms among the shards that are there; the file says `complete = False`.

    Args:
        work: of any process; nothing is published.
        present: keys of the shards with a record.
        path: of the file, replaced whole.
    """
    [shard] = work.plan.stage(arms.MERGE)
    temporary = work.new_path(shard, ".partial.h5")
    try:
        _write(temporary, shard, work, present)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, shard: Shard, work: Work, present: frozenset[str]) -> str:
    from kdhpc import store

    return store.write_results(
        path,
        _scores(work, present),
        _models(work, present),
        recipe=shard.recipe,
        complete=present.issuperset(shard.reads),
        provenance=_provenance([key for key in shard.reads if key in present], work),
    )


def _scores(work: Work, present: frozenset[str]) -> Iterator[tuple[str, str, "Scores"]]:
    """One pair of sampler and scorer at a time, then the samplers' own opinions."""
    from kdhpc import store

    num_tokens: dict[str, Any] = {}
    for arm, shards in work.plan.arms(arms.SCORE).items():
        if present.issuperset(shard.key for shard in shards):
            sampler, _, scorer = arm.partition("-under-")
            scores = store.join_scores([store.read_scores(work.input(s.key)) for s in shards])
            num_tokens[sampler] = scores.num_tokens
            yield sampler, scorer, scores
    own = {"truth": work.plan.arm(arms.SAMPLE_TRUTH, "eval")}
    for sampler, shards in (own | work.plan.arms(arms.SAMPLE_STUDENTS)).items():
        if sampler in num_tokens and present.issuperset(shard.key for shard in shards):
            sums = store.read_samples([work.input(s.key) for s in shards]).log_prob_tau_sum
            scores = store.Scores(log_prob_sum=sums, num_tokens=num_tokens[sampler])
            yield sampler, "self", scores


def _models(work: Work, present: frozenset[str]) -> dict[str, dict[str, Any]]:
    """Facts of every model, for the analysis."""
    [truth] = work.plan.arm(arms.TRUTH, "truth")
    found = {}
    if truth.key in present:
        parameters = work.record(truth.key).stats["parameters"]
        found["truth"] = {"kind": "truth", "parameters": parameters}
    for trainee in arms.trainees(work.config):
        [shard] = work.plan.arm(trainee.stage, trainee.name)
        if shard.key in present:
            stats = work.record(shard.key).stats
            found[trainee.name] = {
                **trainee.facts,
                "parameters": stats["parameters"],
                "steps": stats["steps"],
                "final_loss_nats": stats["final_loss_nats"],
                "recipe": shard.recipe,
            }
    return found


def _provenance(keys: Sequence[str], work: Work) -> dict[str, str]:
    """Where the numbers come from; outside the logical digest."""
    import platform
    import time
    from importlib.metadata import version

    from kdhpc import compose

    records = [work.record(key) for key in keys]
    packages = ("torch", "transformers", "deepspeed", "numpy", "h5py")
    return {
        "config": compose.to_yaml(work.config),
        "merged_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": json.dumps({name: version(name) for name in packages}),
        "python": platform.python_version(),
        "hosts": json.dumps(sorted({r.attempt["host"] for r in records})),
        "code": json.dumps(sorted({r.code for r in records})),
        "seconds": json.dumps(round(sum(r.seconds for r in records), 1)),
    }


MERGE = Stage(
    name=arms.MERGE,
    reads="score shards and evaluation sets",
    writes="results.h5: /scores/<sampler>/<scorer>, /models, /provenance",
    unit="rows",
    plan=plan,
    run=run,
    rate=lambda config: 1e6,
    uses_device=False,
    alias=RESULTS,
)
