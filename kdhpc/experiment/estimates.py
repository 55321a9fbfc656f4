"""Estimates that --dry-run prints for the language experiment: speeds, and batches that fit."""

from collections.abc import Iterator

from kdhpc.config.language import TOKENS_PER_S, LanguageConfig, num_ids
from kdhpc.models.sizes import SamplingMemory

OF_MEMORY = 0.9
"""Fraction of the memory that a batch may take; the process and fragmentation take the rest."""


def estimates(config: LanguageConfig) -> Iterator[str]:
    """Yield a line about the speeds that times come from, and one for each sampled model."""
    yield (
        "speeds are guesses until shards are done: throughput.STAGE, or "
        f"{TOKENS_PER_S:g} tokens/s per rank"
    )
    yield from batches_that_fit(config)


def batches_that_fit(config: LanguageConfig) -> Iterator[str]:
    """Yield for each sampled model what `sampling.batch_rows` takes and how many rows would fit."""
    on_gpu = bool(config.slurm.gpus_per_node) and config.device != "cpu"
    memory_gb, key = (
        (config.slurm.gpu_mem_gb, "slurm.gpu_mem_gb")
        if on_gpu
        else (config.slurm.mem_gb, "slurm.mem_gb")
    )
    if memory_gb is None:
        yield f"{key} is not given: cannot check that sampling.batch_rows fits"
        return
    rows = config.sampling.batch_rows
    sampled = {"teacher": config.teacher, **config.students}
    shapes = {
        name: (model.shape, model.sampled_dtype)
        for name, model in sampled.items()
        if model.shape and not model.model
    }
    if config.truth.shape:
        shapes = {"truth": (config.truth.shape, config.truth.dtype)} | shapes
    for name, (shape, dtype) in shapes.items():
        memory = SamplingMemory(
            shape=shape,
            vocab_size=num_ids(config.truth),
            length=config.length,
            dtype=dtype,
            on_gpu=on_gpu,
        )
        # All components of a mixture are in memory, each with buffers of its own.
        models = max(1, len(config.truth.components)) if name == "truth" else 1
        needed_gb = models * memory.of(rows) / 1e9
        most = memory.most_rows(OF_MEMORY * 1e9 * memory_gb / models)
        yield (
            f"sampling {name}: {rows} rows take about {needed_gb:.3g} GB; with {key}={memory_gb:g} "
            f"at most {most} fit{'' if most >= rows else ': LOWER sampling.batch_rows'}"
        )
