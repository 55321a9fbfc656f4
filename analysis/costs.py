"""What a run cost, and what its arithmetic would cost on GPUs, for the page of a result."""

import json
from dataclasses import replace

from study import Study

from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig, num_ids
from kdhpc.experiment import arms
from kdhpc.experiment.estimates import sizes_of
from kdhpc.models.sizes import forward_flops, training_flops
from kdhpc.pipeline import LANGUAGE

WATTS = 8.0
"""Assumed power of one busy core with its part of the machine, at the wall."""
H100_FLOPS_PER_S = 989e12
"""Bfloat16 products and sums of one H100, from its data sheet."""
SHARE = 0.1
"""Assumed part of that which models of this size reach: their steps are too small to fill it."""
DOLLARS = 2.5
"""Assumed price of one H100 for an hour."""
GPUS = 4
"""GPUs that the paper's experiment is priced on."""


def by_stage(study: Study) -> list[tuple[str, str, str]]:
    """Return each stage with its core-hours and its arithmetic in 10^12 operations."""
    seconds = _seconds(study)
    operations = flops(study)
    return [
        (
            stage,
            f"{seconds.get(stage, 0.0) / 3600:.2f}",
            f"{operations.get(stage, 0.0) / 1e12:,.0f}",
        )
        for stage in arms.STAGES
        if stage in seconds
    ]


def takes_shards(study: Study) -> bool:
    """Return whether the run took shards of another one, whose hours are not among its own."""
    return any(json.loads(study.results.provenance["seconds_reused"]).values())


def _seconds(study: Study) -> dict[str, float]:
    own: dict[str, float] = json.loads(study.results.provenance["seconds_by_stage"])
    return own


def in_words(study: Study) -> str:
    """Say what the run took, what that is in energy, and what the same would cost on GPUs."""
    hours = sum(_seconds(study).values()) / 3600
    operations = sum(flops(study).values())
    gpu_hours = operations / (SHARE * H100_FLOPS_PER_S) / 3600
    paper = paper_hours()
    dollars = gpu_hours * DOLLARS
    more = " with that of the shards it took" if takes_shards(study) else ""
    price = f"${dollars:.2f}" if dollars >= 0.01 else "less than a cent"
    return (
        f"{hours:.1f} core-hours, about {_short(hours * WATTS / 1000, 1)} kWh if a busy core takes "
        f"{WATTS:g} W at the wall. Its arithmetic{more}, {operations:.1e} operations, takes one "
        f"H100 {_short(3600 * gpu_hours, 2)} seconds if models so small reach {SHARE:.0%} of its "
        f"peak: {price} at ${DOLLARS:g} an hour. The paper's sizes (preset `paper`, "
        f"five seeds) are planned with {paper:,.0f} GPU-hours, which is {paper / GPUS / 24:.0f} "
        f"days of {GPUS} H100s and ${paper * DOLLARS:,.0f}. Only the core-hours are measured."
    )


def _short(number: float, digits: int) -> str:
    """Return a number with some digits or, from 10 on, without a fraction."""
    return f"{number:,.0f}" if number >= 9.5 else f"{number:.{digits}g}"


def flops(study: Study) -> dict[str, float]:
    """Return the operations of each stage for all seeds; those that trained p* are not counted.

    What is the same for all seeds, D and truth's samples, was made by each run that was pooled.
    """
    config = presets.build(LanguageConfig, presets.from_yaml(study.results.provenance["config"]))
    config = replace(config, seeds=len({student.seed for student in study.students}))
    ids, length = num_ids(config.truth), config.length
    truth = 2.0 * float(str(study.results.models[arms.TRUTH]["parameters"]))
    total = dict.fromkeys(arms.STAGES, 0.0)
    mixture = arms.TRUTH_MODEL if config.truth.components else None

    passes = {arms.TRUTH: truth}
    if (judge := study.results.models.get(arms.SECOND_JUDGE)) is not None:
        passes[arms.SECOND_JUDGE] = 2.0 * float(str(judge["parameters"]))
    for trainee in arms.trainees(config):
        model = trainee.model
        sizes = sizes_of(config, trainee.key, model.design)
        passes[trainee.name] = forward_flops(sizes, ids, length) if sizes else 0.0
        if sizes and trainee.training:
            rows = model.train_sequences or config.sampling.train_sequences
            epochs = trainee.training.stop_after_epochs or trainee.training.epochs
            total[trainee.stage] += training_flops(sizes, ids, length) * rows * epochs * length
    for samples in arms.sample_sets(config):
        sampling = config.sampling
        rows = sampling.eval_sequences if samples.evaluation else sampling.train_sequences
        # What is drawn from one component of a mixture is scored under all of them.
        extra = truth / len(config.truth.components) if samples.model == mixture else 0.0
        total[samples.stage] += (passes[samples.model[1]] + extra) * rows * length
    for pair in arms.pairs(config):
        tokens = config.sampling.eval_sequences * length
        scores = study.results.scores.get((pair.sampler, pair.scorer))
        if scores is not None and scores.num_characters is not None:
            tokens = int(scores.num_tokens.sum())  # those of a judge with a tokenizer of its own
        total[arms.SCORE] += passes[pair.model[1]] * tokens
    total[arms.SAMPLE_TRUTH] *= max(1, int(study.results.provenance["runs_with_own_truth"]))
    return total


def paper_hours() -> float:
    """Return the GPU-hours that preset `paper` is planned with."""
    config = LANGUAGE.checked(presets.build(LanguageConfig, presets.compose(["paper"])))
    plan = LANGUAGE.plan(config)
    return sum(
        shard.work * shard.arm.nodes * shard.arm.ranks_per_node / 3600
        for shard in plan.shards.values()
    )
