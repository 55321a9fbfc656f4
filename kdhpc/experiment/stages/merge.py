"""Merge all scores of a run into one HDF5 file.

reads   score shards; evaluation token shards, for the samplers' own log-probabilities
writes  results.h5: /scores/<sampler>/<scorer>, /models/<name>, root attributes recipe and complete,
        /provenance (see `kdhpc.storage.results`)
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdhpc.config.language import LanguageConfig
from kdhpc.experiment import arms
from kdhpc.plan.shards import Plan, Shard, merge_of
from kdhpc.plan.stages import Stage
from kdhpc.storage.run_folder import RESULTS
from kdhpc.storage.work import Work, Written
from kdhpc.types import Json

if TYPE_CHECKING:
    from kdhpc.storage.hdf5 import Piece
    from kdhpc.storage.results import Merged, ScorePieces

PACKAGES = ("torch", "transformers", "deepspeed", "numpy", "h5py")
"""Whose versions the results name."""


def plan(config: LanguageConfig, before: Plan) -> list[Shard]:
    """One shard, over everything that was scored or says something about a model."""
    wanted = [
        shard
        for stage in (arms.TRUTH, arms.TRAIN_ON_TRUTH, arms.TRAIN_STUDENTS, arms.SCORE)
        for shard in before.stage(stage)
    ]
    wanted += before.arm(arms.SAMPLE_TRUTH, "eval") + before.stage(arms.SAMPLE_STUDENTS)
    rows = sum(shard.num_rows for shard in before.stage(arms.SCORE))
    return [
        merge_of(
            wanted,
            stage=arms.MERGE,
            fields={"eos": config.eos},
            rows=rows,
            bytes_per_row=12.0 + 4.0 * config.length * config.scoring.per_token,
        )
    ]


def run(shard: Shard, work: Work[LanguageConfig]) -> Written:
    """Merge, walking the plan: every digest is checked, and a missing shard is an error."""
    path = work.new_path(shard, ".h5")
    merged = _write(path, shard, work, frozenset(work.plan.shards))
    for key in shard.reads:
        work.record(key)  # what was not read for its scores
    stats = {"logical_digest": merged.logical_digest}
    return Written(path=path, rows=1, stats=stats, digest=merged.digest)


def run_partial(work: Work[LanguageConfig], present: frozenset[str], path: Path) -> None:
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


def _write(
    path: Path, shard: Shard, work: Work[LanguageConfig], present: frozenset[str]
) -> "Merged":
    from kdhpc.storage.results import write_results

    work.ready()
    return write_results(
        path,
        scores=_scores(work, present),
        models=_models(work, present),
        recipe=shard.recipe,
        complete=present.issuperset(shard.reads),
        provenance=work.provenance([key for key in shard.reads if key in present], PACKAGES),
    )


def _scores(work: Work[LanguageConfig], present: frozenset[str]) -> Iterator["ScorePieces"]:
    """Scores of every pair, then what the samplers themselves thought of what they drew.

    Only arms of which every shard is present; each shard is read when its pieces are asked for.
    """
    from kdhpc.storage.results import ScorePieces

    scored: dict[str, list[Shard]] = {}
    for pair in arms.pairs(work.config):
        shards = work.plan.arm(arms.SCORE, pair.arm)
        if present.issuperset(shard.key for shard in shards):
            scored.setdefault(pair.sampler, shards)
            yield ScorePieces(
                sampler=pair.sampler,
                scorer=pair.scorer,
                num_rows=sum(shard.num_rows for shard in shards),
                pieces=_pieces(work, shards),
            )
    samplers = dict.fromkeys((pair.sampler, pair.samples) for pair in arms.pairs(work.config))
    for sampler, samples in samplers:
        shards = work.plan.arm(*samples)
        if sampler in scored and present.issuperset(shard.key for shard in shards):
            yield ScorePieces(
                sampler=sampler,
                scorer="self",
                num_rows=sum(shard.num_rows for shard in shards),
                pieces=_own_pieces(work, scored[sampler], shards),
            )


def _pieces(work: Work[LanguageConfig], shards: Sequence[Shard]) -> Iterator["Piece"]:
    """Score shards one after the other, each read once."""
    from kdhpc.storage.hdf5 import read_pieces

    for shard in shards:
        yield from work.read(shard.key, read_pieces)


def _own_pieces(
    work: Work[LanguageConfig], scored: Sequence[Shard], sampled: Sequence[Shard]
) -> Iterator["Piece"]:
    """Counted tokens from scores of the same sequences, log-probabilities from the samples."""
    from kdhpc.storage.hdf5 import map_array
    from kdhpc.storage.token_shards import read_samples

    for shard in scored:
        yield "num_tokens", map_array(work.input(shard.key), "num_tokens")
    for shard in sampled:
        yield "log_prob_sum", read_samples([work.input(shard.key)]).log_prob_tau_sum


def _models(work: Work[LanguageConfig], present: frozenset[str]) -> dict[str, dict[str, Json]]:
    """Facts of every model, for the analysis."""
    [truth] = work.plan.arm(*arms.TRUTH_MODEL)
    models: dict[str, dict[str, Json]] = {}
    if truth.key in present:
        parameters = work.record(truth.key).stats["parameters"]
        models["truth"] = {"kind": "truth", "parameters": parameters}
    for trainee in arms.trainees(work.config):
        [shard] = work.plan.arm(trainee.stage, trainee.name)
        if shard.key in present:
            stats = work.record(shard.key).stats
            models[trainee.name] = {
                "kind": trainee.kind,
                "seed": trainee.seed,
                "size": trainee.size,
                "arm": trainee.arm,
                "tau": trainee.tau,
                "parameters": stats["parameters"],
                "steps": stats["steps"],
                "final_loss_nats": stats["final_loss_nats"],
                "recipe": shard.recipe,
            }
    return models


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
