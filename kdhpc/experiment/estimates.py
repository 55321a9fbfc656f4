"""Estimates from the config alone: how long shards take, and which batches fit into memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from kdhpc.config.language import SECOND_JUDGE_KEY, LanguageConfig, num_ids
from kdhpc.config.model import Architecture, Design, Shape, Sizes, Training
from kdhpc.errors import InputError
from kdhpc.experiment import arms
from kdhpc.models.sizes import SamplingMemory, forward_flops, sizes_of_shape, training_flops

OF_MEMORY = 0.9
"""Fraction of the memory that a batch may take; the process and fragmentation take the rest."""
GIVEN_FLOPS = 3e8
"""Assumed operations of a forward pass for each token of a model that is given and not known before
it is read: those of one with 135 million parameters."""
WORK = {arms.SCORE: "scoring", arms.DOWNSTREAM: "scoring"}
WORK |= dict.fromkeys((arms.SAMPLE_TRUTH, arms.SAMPLE_TEACHER, arms.SAMPLE_STUDENTS), "sampling")
WORK |= dict.fromkeys((arms.TRUTH, arms.TRAIN_ON_TRUTH, arms.TRAIN_STUDENTS), "training")
"""The work of a stage, as `kdhpc.gpu_check` names it."""
ALIKE = 10.0
"""A speed is taken from the measured model with the nearest operations for each token, as if the
operations per second were the same, if they differ by less than this factor."""
SHARD_S = 0.5
"""Seconds of every shard in which a model is loaded and nothing is computed."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast one rank is, fitted to runs of models from 0.05 to 135 million parameters."""

    flops_per_s: float
    token_s: float
    """Seconds for each token that do not depend on the model: draws, data, and small steps."""


CORE = Speed(flops_per_s=6e10, token_s=8e-6)
"""One core of a server's CPU."""
GPU = Speed(flops_per_s=1e14, token_s=1e-6)
"""One recent GPU; not fitted, as kdhpc has not been measured on one."""


def sizes_of(config: LanguageConfig, key: str, design: Design | None) -> Sizes | None:
    """Return the sizes of a model with new weights; None if its architecture is not configured.

    Those of an `architecture` come from the config, where its submission has put them. Before that
    they come from transformers, which takes seconds to load.

    Args:
        config: config of the run.
        key: key of the model in the config.
        design: architecture of the model.

    Raises:
        InputError: if transformers does not have the architecture; names the field.
    """
    if not design:
        return None
    if isinstance(design, Shape):
        return sizes_of_shape(design)
    return config.sizes.get(key) or measured_sizes(config, key, design)


def measured_sizes(config: LanguageConfig, key: str, architecture: Architecture) -> Sizes:
    """Check an architecture, and take its sizes from the model that transformers makes of it.

    Raises:
        InputError: if it cannot be used; names the field.
    """
    from kdhpc.models import architectures

    try:
        return architectures.sizes_of(architecture, length=config.length)
    except InputError as error:
        raise InputError(f"{key}.architecture.{error}") from error


def uses_gpus(config: LanguageConfig) -> bool:
    """Return whether tasks run on GPUs, as far as the config says."""
    return bool(config.slurm.gpus_per_node) and config.device != "cpu"


def seconds(config: LanguageConfig, stage: str, tokens: float, flops: float) -> float:
    """Estimate how long one rank takes for some tokens, in seconds.

    Args:
        config: config of the run; `speeds` of models of about this size decide, or else
            `throughput`, if it names the stage.
        stage: name of the stage.
        tokens: number of tokens that the rank works on.
        flops: operations for each of them.
    """
    of_size = {
        abs(math.log(speed.flops_per_token / flops)): speed.tokens_per_s * speed.flops_per_token
        for speed in config.speeds.values()
        if speed.work == WORK.get(stage)
    }
    if of_size and min(of_size) < math.log(ALIKE):
        return SHARD_S + tokens * flops / of_size[min(of_size)]
    if stage in config.throughput:
        return tokens / config.throughput[stage]
    speed, at_once = (GPU, 1) if uses_gpus(config) else (CORE, config.threads)
    return SHARD_S + tokens * (speed.token_s + flops / speed.flops_per_s) / at_once


def training_seconds(
    config: LanguageConfig, stage: str, sizes: Sizes | None, training: Training, num_steps: float
) -> float:
    """Estimate how long each rank of a training takes, in seconds.

    Args:
        config: config of the run.
        stage: name of the stage.
        sizes: sizes of the model; None if it is given.
        training: how it is trained.
        num_steps: number of optimizer steps.
    """
    tokens = num_steps * training.batch_sequences * config.length / training.world_size
    flops = 3 * GIVEN_FLOPS
    if sizes:
        flops = training_flops(sizes, num_ids(config.truth), config.length)
    return seconds(config, stage, tokens, flops)


def model_flops(config: LanguageConfig) -> dict[str, float]:
    """Return the operations of a forward pass for each token, by the name of every model."""
    ids, length = num_ids(config.truth), config.length

    def of(key: str, design: Design | None) -> float:
        sizes = sizes_of(config, key, design)
        return forward_flops(sizes, ids, length) if sizes else GIVEN_FLOPS

    # Each component of a mixture scores every sequence.
    flops = {arms.TRUTH: of("truth", config.truth.design) * max(1, len(config.truth.components))}
    judge = config.truth.trained_second_judge
    flops[arms.SECOND_JUDGE] = of(SECOND_JUDGE_KEY, judge.design if judge else None)
    flops |= {t.name: of(t.key, t.model.design) for t in arms.trainees(config)}
    return flops


def estimates(config: LanguageConfig) -> Iterator[str]:
    """Yield a line about where times come from, and one for each sampled model."""
    if config.speeds:
        yield (
            f"times come from {config.throughput_from}, for models of about the sizes in it; "
            "otherwise from throughput.STAGE or sizes of models"
        )
    else:
        yield (
            "times come from sizes of models and earlier runs; or give throughput.STAGE or "
            "throughput_from"
        )
    yield from batches_that_fit(config)


def batches_that_fit(config: LanguageConfig) -> Iterator[str]:
    """Yield for each sampled model what its rows take and how many would fit."""
    on_gpu = uses_gpus(config)
    memory_gb, key = (
        (config.slurm.gpu_mem_gb, "slurm.gpu_mem_gb")
        if on_gpu
        else (config.slurm.mem_gb, "slurm.mem_gb")
    )
    if memory_gb is None:
        yield f"{key} is not given: cannot check that the rows of sampling fit"
        return
    students = {f"students.{size}": student for size, student in config.students.items()}
    sampled = [("truth", config.truth.design, config.truth.dtype)]
    sampled += [
        (key, model.design, model.sampled_dtype)
        for key, model in {"teacher": config.teacher, **students}.items()
        if not model.model
    ]
    for path, design, dtype in sampled:
        name, sizes = path.removeprefix("students."), sizes_of(config, path, design)
        if sizes is None:
            continue
        memory = SamplingMemory(
            sizes=sizes,
            vocab_size=num_ids(config.truth),
            length=config.length,
            dtype=dtype,
            on_gpu=on_gpu,
        )
        # All components of a mixture are in memory, each with buffers of its own.
        models = max(1, len(config.truth.components)) if name == "truth" else 1
        rows = config.sampling.rows_of(is_truth=name == "truth")
        own_rows = name != "truth" and config.sampling.trained_batch_rows
        setting = "trained_batch_rows" if own_rows else "batch_rows"
        needed_gb = models * memory.of(rows) / 1e9
        most = memory.most_rows(OF_MEMORY * 1e9 * memory_gb / models)
        yield (
            f"sampling {name}: {rows} rows take about {needed_gb:.3g} GB; with {key}={memory_gb:g} "
            f"at most {most} fit{'' if most >= rows else ': LOWER sampling.' + setting}"
        )
