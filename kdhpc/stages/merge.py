"""Merge all scores of a run into one HDF5 file.

reads   score shards; evaluation token shards, for the samplers' own log-probabilities
writes  results.h5: /scores/<sampler>/<scorer>, /models/<name>, root attributes recipe and complete,
        /provenance (see `kdhpc.store.Results`)
"""

import json
from collections.abc import Iterator
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
    from kdhpc import store

    path = work.new_path(shard, ".h5")
    digest = store.write_results(
        path,
        _scores(work),
        _models(work),
        recipe=shard.recipe,
        complete=True,
        provenance=_provenance(shard, work),
    )
    return Written(path=path, rows=1, stats={"logical_digest": digest})


def _scores(work: Work) -> Iterator[tuple[str, str, "Scores"]]:
    """One pair of sampler and scorer at a time."""
    from kdhpc import store

    for sampler, shards in work.plan.arms(arms.SCORE).items():
        name, _, scorer = sampler.partition("-under-")
        parts = [store.read_scores(work.input(s.key)) for s in shards]
        yield name, scorer, store.join_scores(parts)
    own = {"truth": work.plan.arm(arms.SAMPLE_TRUTH, "eval")}
    for name, shards in (own | work.plan.arms(arms.SAMPLE_STUDENTS)).items():
        samples = store.read_samples([work.input(s.key) for s in shards])
        tokens = _counted(name, work)
        yield name, "self", store.Scores(log_prob_sum=samples.log_prob_tau_sum, num_tokens=tokens)


def _counted(name: str, work: Work) -> Any:
    """Counted tokens of a sample set, as its score shards have them."""
    import numpy as np

    from kdhpc import store

    for arm, shards in work.plan.arms(arms.SCORE).items():
        if arm.startswith(f"{name}-under-"):
            found = [store.read_scores(work.input(s.key)).num_tokens for s in shards]
            return np.concatenate(found)
    raise ValueError(f"nobody scored {name}")


def _models(work: Work) -> dict[str, dict[str, Any]]:
    """Facts of every model, for the analysis."""
    [truth] = work.plan.arm(arms.TRUTH, "truth")
    record = work.record(truth.key)
    found = {"truth": {"kind": "truth", "parameters": record.stats["parameters"]}}
    for trainee in arms.trainees(work.config):
        [shard] = work.plan.arm(trainee.stage, trainee.name)
        stats = work.record(shard.key).stats
        found[trainee.name] = {
            **trainee.facts,
            "parameters": stats["parameters"],
            "steps": stats["steps"],
            "final_loss_nats": stats["final_loss_nats"],
            "recipe": shard.recipe,
        }
    return found


def _provenance(shard: Shard, work: Work) -> dict[str, str]:
    """Where the numbers come from; outside the logical digest."""
    import platform
    import time
    from importlib.metadata import version

    from kdhpc import compose

    records = [work.record(key) for key in shard.reads]
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
