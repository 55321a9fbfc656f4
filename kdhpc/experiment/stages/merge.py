"""The stage that merges all scores of a run into one HDF5 file.

reads   score shards; evaluation token shards, for the samplers' own log-probabilities; shards of
        scores in tasks
writes  results.h5: /scores/<sampler>/<scorer>, /downstream/<model>/<task>, /models/<name>, root
        attributes recipe and complete, /provenance (see `kdhpc.storage.results`)
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdhpc.config.language import LanguageConfig
from kdhpc.experiment import arms
from kdhpc.experiment.downstream import evaluated
from kdhpc.plan.shards import Plan, Shard, merge_of
from kdhpc.plan.stages import Stage
from kdhpc.storage.run_folder import RESULTS
from kdhpc.storage.work import Work, Written
from kdhpc.types import Json

if TYPE_CHECKING:
    from kdhpc.storage.hdf5 import Arrays, Piece
    from kdhpc.storage.results import Merged, ScorePieces

PACKAGES = ("torch", "transformers", "deepspeed", "numpy", "h5py")
"""Packages whose versions are written into the results, and that of rouge-score if it was used."""


def plan(config: LanguageConfig, before: Plan) -> list[Shard]:
    """Plan one shard that reads all models, evaluation sets and scores; work is in scored rows."""
    merged = [
        shard
        for stage in (
            arms.TRUTH, arms.TRAIN_ON_TRUTH, arms.TRAIN_STUDENTS, arms.SCORE, arms.DOWNSTREAM,
        )
        for shard in before.stage(stage)
    ]  # fmt: skip
    merged += before.arm(arms.SAMPLE_TRUTH, "eval") + before.stage(arms.SAMPLE_STUDENTS)
    num_rows = sum(shard.num_rows for shard in before.stage(arms.SCORE))
    return [
        merge_of(
            merged,
            stage=arms.MERGE,
            fields={},
            num_rows=num_rows,
            bytes_per_row=20.0 + 4.0 * config.length * config.scoring.per_token,
        )
    ]


def run(shard: Shard, work: Work[LanguageConfig]) -> Written:
    """Merge all shards of the plan; every digest is checked, and a missing shard is an error."""
    path = work.new_path(shard, ".h5")
    merged = _write(path, shard, work, frozenset(work.plan.shards))
    for key in shard.reads:
        work.record(key)  # checks the records of shards that were not read for their scores
    stats = {"logical_digest": merged.logical_digest}
    return Written(path=path, num_rows=1, stats=stats, digest=merged.digest)


def run_partial(work: Work[LanguageConfig], present: frozenset[str], path: Path) -> None:
    """Merge the arms of which all shards exist; the file says `complete = False` if any is missing.

    Args:
        work: config, plan and paths; nothing is published.
        present: keys of the shards that have a record.
        path: path of the file, which is replaced as a whole.
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
    read = [key for key in shard.reads if key in present]
    has_likeness = any("rouge_l" in work.stats(key).get("arrays", ()) for key in read)
    packages = (*PACKAGES, "rouge-score") if has_likeness else PACKAGES
    return write_results(
        path,
        scores=_scores(work, present),
        downstream=_downstream(work, present),
        models=_models(work, present),
        recipe=shard.recipe,
        complete=present.issuperset(shard.reads),
        provenance=work.provenance(read, packages),
    )


def _scores(work: Work[LanguageConfig], present: frozenset[str]) -> Iterator["ScorePieces"]:
    """Yield the scores of every pair, then the samplers' own log-probabilities of their samples.

    Arms with missing shards are left out. A shard is read when its pieces are consumed.
    """
    from kdhpc.storage.results import ScorePieces

    scored: dict[str, list[Shard]] = {}
    for pair in arms.pairs(work.config):
        shards = work.plan.arm(arms.SCORE, pair.arm)
        if not present.issuperset(shard.key for shard in shards):
            continue
        if pair.is_plain:
            scored.setdefault(pair.sampler, shards)
        for temperature in pair.temperatures:
            yield ScorePieces(
                sampler=pair.sampler,
                scorer=arms.at_temperature(pair.scorer_name, temperature),
                num_rows=sum(shard.num_rows for shard in shards),
                pieces=_pieces(work, shards, temperature),
            )
    samplers = dict.fromkeys(
        (pair.sampler, pair.samples) for pair in arms.pairs(work.config) if pair.is_plain
    )
    for sampler, samples in samplers:
        shards = work.plan.arm(*samples)
        if sampler in scored and present.issuperset(shard.key for shard in shards):
            yield ScorePieces(
                sampler=sampler,
                scorer="self",
                num_rows=sum(shard.num_rows for shard in shards),
                pieces=_own_pieces(work, scored[sampler], shards),
            )


def _pieces(
    work: Work[LanguageConfig], shards: Sequence[Shard], temperature: float
) -> Iterator["Piece"]:
    """Yield the pieces of score shards at a temperature in order, reading each shard once.

    End tokens are left out if a shard of an earlier version lacks them.
    """
    from kdhpc.storage.hdf5 import read_pieces
    from kdhpc.storage.score_shards import group_of

    has_ends = all("end_log_prob" in work.stats(shard.key).get("arrays", ()) for shard in shards)
    group = group_of(temperature)
    for shard in shards:
        for full_name, piece in work.read(shard.key, read_pieces):
            above, slash, name = full_name.rpartition("/")
            if above + slash == group and (has_ends or name != "end_log_prob"):
                yield name, piece


def _own_pieces(
    work: Work[LanguageConfig], scored: Sequence[Shard], sampled: Sequence[Shard]
) -> Iterator["Piece"]:
    """Yield a sampler's own scores: token counts from score shards, the rest from its samples.

    Arrays that a shard of an earlier version lacks are left out.

    Args:
        work: config, plan and paths.
        scored: score shards of the same sequences under any scorer.
        sampled: token shards of these sequences.
    """
    from kdhpc.storage.hdf5 import map_array
    from kdhpc.storage.token_shards import read_samples

    for shard in scored:
        yield "num_tokens", map_array(work.input(shard.key), "num_tokens")
    has = set.intersection(*({*work.stats(shard.key).get("arrays", ())} for shard in sampled))
    for shard in sampled:
        samples = read_samples([work.input(shard.key)])
        yield "log_prob_sum", samples.log_prob_tau_sum
        if "right" in has and samples.right is not None:
            yield "right", samples.right
        if "rouge_l" in has and samples.rouge_l is not None:
            yield "rouge_l", samples.rouge_l
        for name in ("component", "component_log_prob", "component_first_log_prob"):
            if name in has:
                yield name, getattr(samples, name)
        if "end_log_prob_tau" in has and samples.end_log_prob_tau is not None:
            yield "end_log_prob", samples.end_log_prob_tau
        if "token_log_prob_tau" in has and samples.token_log_prob_tau is not None:
            yield "token_log_prob", samples.token_log_prob_tau


def _downstream(
    work: Work[LanguageConfig], present: frozenset[str]
) -> Iterator[tuple[tuple[str, str], "Arrays"]]:
    """Yield the scores of every model in every task, by model and task; missing ones are left out.

    A shard is read when its arrays are consumed.
    """
    from kdhpc.storage.hdf5 import read_arrays

    for task in work.config.downstream.tasks:
        for model in evaluated(work.config):
            [shard] = work.plan.arm(arms.DOWNSTREAM, model.arm(task))
            if shard.key in present:
                yield (model.name, task), read_arrays(work.input(shard.key))


def _models(work: Work[LanguageConfig], present: frozenset[str]) -> dict[str, dict[str, Json]]:
    """Return the facts about every model that the analysis needs, by the model's name."""
    [truth] = work.plan.arm(*arms.TRUTH_MODEL)
    models: dict[str, dict[str, Json]] = {}
    # A text, because attributes of HDF5 hold no dictionaries.
    weights = work.config.truth.weights
    mixed: dict[str, Json] = {"weights": json.dumps(weights)} if weights else {}
    if truth.key in present:
        parameters = work.record(truth.key).stats["parameters"]
        models["truth"] = {"kind": "truth", "parameters": parameters, **mixed}
    if work.config.truth.second_judge is not None:
        [judge] = work.plan.arm(*arms.SECOND_JUDGE_MODEL)
        if judge.key in present:
            parameters = work.record(judge.key).stats["parameters"]
            models[arms.SECOND_JUDGE] = {"kind": arms.SECOND_JUDGE, "parameters": parameters}
    for trainee in arms.trainees(work.config):
        [shard] = work.plan.arm(trainee.stage, trainee.name)
        if shard.key in present:
            stats = work.record(shard.key).stats
            # A teacher that was taken as it is has done no steps.
            facts = {n: stats[n] for n in ("parameters", "steps", "final_loss_nats") if n in stats}
            models[trainee.name] = {
                "kind": trainee.kind,
                "seed": trainee.seed,
                "size": trainee.size,
                "arm": trainee.arm,
                "tau": trainee.tau,
                **mixed,
                **facts,
                "recipe": shard.recipe,
            }
    if work.config.downstream.tasks:
        for model in evaluated(work.config):
            if model.design is not None:
                models[model.name] = {"kind": "initial", "size": model.size}
    return models


MERGE = Stage(
    name=arms.MERGE,
    reads="score shards, evaluation sets, scores in tasks",
    writes="results.h5: /scores/<sampler>/<scorer>, /downstream/<model>/<task>, /models, "
    "/provenance",
    plan=plan,
    run=run,
    uses_device=False,
    alias=RESULTS,
)
