"""The stage that evaluates finished models on tasks, and the initial weights of each size.

reads   models; truth's evaluation set, for tasks that are made of it; p*, for the open-ended task
writes  scores of items: the metrics of the task [N] float64, cluster [N] int32
"""

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kdhpc.config import downstream as tasks
from kdhpc.config.language import LanguageConfig
from kdhpc.config.model import Architecture, Shape
from kdhpc.experiment import arms
from kdhpc.experiment.downstream import OWN_ITEMS, OWN_VERSION, Evaluated, evaluated
from kdhpc.experiment.estimates import GIVEN_FLOPS, model_flops, seconds
from kdhpc.plan.shards import ADDED, Arm, Plan, Shard, fields_of, settings_of
from kdhpc.plan.stages import Stage
from kdhpc.storage.work import Work, Written

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kdhpc.models.tokenizer import Tokenizer

NUM_ITEMS = 2000
"""Assumed number of items of a task without a limit, for estimates of time."""
ENDINGS = 2
"""Assumed number of endings of an item, each of which is scored."""


@dataclass(frozen=True, kw_only=True)
class DownstreamSettings:
    """Settings that determine the scores of a model in a task, together with the model."""

    task: str
    include: str
    """Digest of the folder that has the task's file; empty for other tasks."""
    limit: int | None
    batch_rows: int
    dtype: str
    threads: int
    begin: str
    num_texts: int | None
    """Number of truth's texts that items are made of; None for other tasks."""
    own: "OwnSettings | None"
    """What else determines the items of kdhpc's own tasks."""
    open: "OpenSettings | None"
    """What else determines the continuations of the open-ended task."""
    initial: "InitialSettings | None"
    """What determines initial weights; None for a finished model."""


@dataclass(frozen=True, kw_only=True)
class OwnSettings:
    """Settings that determine the items of kdhpc's own tasks."""

    version: int
    seed: int
    length: int


@dataclass(frozen=True, kw_only=True)
class OpenSettings:
    """Settings that determine the continuations of the open-ended task."""

    prompt: str
    eos: str
    draw: str
    engine: str
    head_tokens: int


@dataclass(frozen=True, kw_only=True)
class InitialSettings:
    """Settings that determine initial weights."""

    shape: Shape | None
    seed: int
    stream: str
    length: int
    architecture: Architecture | None = field(default=None, metadata=ADDED)
    """Architecture in its long form; `shape` is then None."""


def plan(config: LanguageConfig, before: Plan) -> list[Shard]:
    """Plan one shard for every model and task."""
    shards = []
    flops = model_flops(config)
    [truth] = before.arm(*arms.TRUTH_MODEL)
    eval_shards = before.arm(*arms.TRUTH_EVAL)
    for task in config.downstream.tasks:
        settings = _settings(config, task)
        for model in evaluated(config):
            inputs, reads = {"tokenizer": truth.recipe}, [truth.key]
            if model.model is not None:
                [own] = before.arm(*model.model)
                inputs["model"] = own.recipe
                reads = [own.key, *reads]
            num_texts = None
            if task in tasks.FROM_TRUTH:
                num_texts = sum(shard.num_rows for shard in eval_shards)
                inputs["texts"] = eval_shards[0].arm.recipe
                reads += [shard.key for shard in eval_shards]
            num_items = config.downstream.limit or (OWN_ITEMS if settings.own else NUM_ITEMS)
            arm = Arm(
                stage=arms.DOWNSTREAM,
                name=model.arm(task),
                fields=fields_of(
                    replace(settings, initial=_initial(config, model), num_texts=num_texts)
                ),
                inputs=inputs,
            )
            shards.append(
                Shard(
                    arm=arm,
                    name="00000",
                    reads=tuple(dict.fromkeys(reads)),
                    work=seconds(
                        config,
                        arms.DOWNSTREAM,
                        ENDINGS * num_items * config.length,
                        flops.get(model.name, GIVEN_FLOPS),
                    ),
                    num_bytes=20.0 * num_items + 4096,
                )
            )
    return shards


def _settings(config: LanguageConfig, task: str) -> DownstreamSettings:
    """Return the settings of a task, which are the same for every finished model."""
    is_own, is_included = task in tasks.OWN_TASKS, task in config.downstream.included
    own = OwnSettings(version=OWN_VERSION, seed=config.seed, length=config.length)
    continued = OpenSettings(
        prompt=config.prompt,
        eos=config.eos,
        draw=config.sampling.draw,
        engine=config.sampling.engine,
        head_tokens=config.scoring.head_tokens,
    )
    return DownstreamSettings(
        task=task,
        include=config.downstream.include_fingerprint if is_included else "",
        limit=config.downstream.limit,
        batch_rows=config.downstream.batch_rows,
        dtype=config.scoring.dtype,
        threads=config.threads,
        begin=config.begin,
        num_texts=None,
        own=own if is_own else None,
        open=continued if task == tasks.OPEN else None,
        initial=None,
    )


def _initial(config: LanguageConfig, model: Evaluated) -> InitialSettings | None:
    if model.design is None:
        return None
    return InitialSettings(
        shape=model.design if isinstance(model.design, Shape) else None,
        architecture=None if isinstance(model.design, Shape) else model.design,
        seed=config.seed,
        stream=model.stream,
        length=config.length,
    )


def run(shard: Shard, work: Work[LanguageConfig]) -> Written:
    """Evaluate one model on one task."""
    from kdhpc.models import devices
    from kdhpc.storage.hdf5 import write_arrays

    settings = settings_of(shard.arm.fields, DownstreamSettings)
    devices.set_threads(settings.threads)
    devices.set_allocator(keep_freed=True)
    with tempfile.TemporaryDirectory() as folder:
        model_path = work.local_input(shard.reads[0])
        if settings.initial is not None:
            model_path = _new_model(settings.initial, model_path, Path(folder))
        evaluate = _continue if settings.open else _evaluate
        arrays = evaluate(shard, work, settings, model_path)
    path = work.new_path(shard, ".h5")
    write_arrays(path, arrays)
    num_items = len(next(iter(arrays.values())))
    return Written(
        path=path,
        num_rows=1,
        stats={
            "device": devices.pick_device(work.config.device).type,
            "items": num_items,
            "arrays": sorted(arrays),
        },
    )


def _new_model(initial: InitialSettings, tokenizer_path: Path, folder: Path) -> Path:
    """Make the weights that a training starts from, as a checkpoint folder."""
    from kdhpc import seeding
    from kdhpc.models import huggingface
    from kdhpc.models.tokenizer import Tokenizer

    tokenizer, design = Tokenizer(tokenizer_path), initial.shape or initial.architecture
    if not design:
        raise ValueError("initial weights of no architecture")
    model = huggingface.new_model(
        design,
        vocab_size=tokenizer.size,
        length=initial.length,
        eos=tokenizer.eos,
        seed=seeding.integer_seed(initial.seed, initial.stream),
    )
    path = folder / "initial"
    huggingface.save_model(model, tokenizer_path, path)
    return path


def _evaluate(
    shard: Shard, work: Work[LanguageConfig], settings: DownstreamSettings, model_path: Path
) -> "dict[str, NDArray[np.generic]]":
    """Evaluate a model with lm-evaluation-harness."""
    from kdhpc.experiment import harness
    from kdhpc.models import devices, loading

    loading.forget()  # the harness loads models itself
    with tempfile.TemporaryDirectory() as folder:
        include = None
        if settings.include and work.config.downstream.include:
            include = Path(work.config.downstream.include)
        if settings.own is not None:
            include = Path(folder)
            write_items(include, settings, _texts(shard, work, model_path), model_path)
        work.ready()
        return harness.evaluate(
            model_path,
            settings.task,
            include=include,
            limit=None if settings.own else settings.limit,
            dtype=settings.dtype,
            device=str(devices.pick_device(work.config.device)),
            batch_rows=settings.batch_rows,
            add_begin={"always": True, "never": False}.get(settings.begin),
        )


def write_items(
    folder: Path, settings: DownstreamSettings, texts: list[str], tokenizer_path: Path
) -> None:
    """Write one of kdhpc's own tasks into a folder, as a task file of the harness.

    Args:
        folder: the folder, for `--include_path` of the harness.
        settings: settings of the task.
        texts: truth's evaluation set, for tasks that are made of it.
        tokenizer_path: folder of the tokenizer that all models share.

    Raises:
        InputError: if the texts make no item.
    """
    from kdhpc.experiment import harness, own_tasks
    from kdhpc.models.tokenizer import Tokenizer

    if settings.own is None:
        raise ValueError(f"{settings.task}: is a task of the harness")
    tokenizer = Tokenizer(tokenizer_path)
    items = own_tasks.make_items(
        settings.task,
        seed=settings.own.seed,
        num_items=settings.limit or OWN_ITEMS,
        length=settings.own.length,
        encode=tokenizer.text_ids,
        texts=texts,
    )
    max_tokens = max(len(tokenizer.text_ids(item.endings[item.right])) for item in items) + 1
    harness.write_own_task(folder, settings.task, items, max_tokens)


def _continue(
    shard: Shard, work: Work[LanguageConfig], settings: DownstreamSettings, model_path: Path
) -> "dict[str, NDArray[np.generic]]":
    """Let a model continue prompts of the truth, at temperature 1."""
    from kdhpc.experiment.open_ended import CONTINUATIONS, continue_prompts
    from kdhpc.models import loading
    from kdhpc.scoring.counting import Counting

    own, continued = settings.own, settings.open
    if own is None or continued is None:
        raise ValueError(f"{shard.key}: is not the open-ended task")
    loaded = loading.load(model_path, settings.dtype, work.config.device)
    [truth] = work.plan.arm(*arms.TRUTH_MODEL)
    truth_model = loading.load_model(
        work.local_input(truth.key), dtype=settings.dtype, device=loaded.model.device
    )
    prompt_ids = loaded.tokenizer.prompt_ids(continued.prompt, settings.begin)
    num_prompt = max(len(prompt_ids) + 1, own.length // 4)
    num_prompts = max(2, (settings.limit or OWN_ITEMS) // CONTINUATIONS)
    prompts = _prompts(shard, work, num_prompt, num_prompts)
    work.ready()
    arrays = continue_prompts(
        loaded,
        truth_model,
        prompts,
        counting=Counting.with_tokenizer(
            loaded.tokenizer, num_prompt=num_prompt, count_eos=continued.eos == "learn"
        ),
        length=own.length,
        draw=continued.draw,
        engine=continued.engine,
        head_tokens=continued.head_tokens,
        seed=own.seed,
        stream=f"downstream/open/{shard.arm.name}",
        on_rows=work.progress,
    )
    loading.forget()  # initial weights are in a folder that is deleted
    return arrays


def _rows(shard: Shard, work: Work[LanguageConfig]) -> list[list[int]]:
    """Return the ids of truth's evaluation set, if the shard reads it."""
    from kdhpc.storage.token_shards import read_samples

    keys = [key for key in shard.reads if work.plan.shards[key].stage == arms.SAMPLE_TRUTH]
    if not keys:
        return []
    samples = read_samples([work.input(key) for key in keys])
    return [ids[:length].tolist() for ids, length in zip(samples.ids, samples.length, strict=True)]


def _prompts(
    shard: Shard, work: Work[LanguageConfig], num_prompt: int, num_prompts: int
) -> list[list[int]]:
    """Return the first tokens of different sequences of truth's evaluation set."""
    from kdhpc.errors import InputError

    long = [row[:num_prompt] for row in _rows(shard, work) if len(row) > num_prompt]
    prompts = [list(prompt) for prompt in dict.fromkeys(map(tuple, long))][:num_prompts]
    if len(prompts) < 2:
        raise InputError(
            f"downstream.tasks: truth's evaluation set has {len(prompts)} different sequences of "
            f"more than {num_prompt} tokens for {tasks.OPEN}; expected at least 2"
        )
    return prompts


def _texts(shard: Shard, work: Work[LanguageConfig], tokenizer_path: Path) -> list[str]:
    """Return the texts of truth's evaluation set that are read back as the same tokens."""
    from kdhpc.models.tokenizer import Tokenizer

    tokenizer = Tokenizer(tokenizer_path)
    return [text for row in _rows(shard, work) if (text := text_of(row, tokenizer)) is not None]


def text_of(row: list[int], tokenizer: "Tokenizer") -> str | None:
    """Return the text of a row without begin and end; None if it is read as other tokens."""
    from kdhpc.errors import InputError

    start = int(row[:1] == [tokenizer.begin])
    stop = len(row) - int(row[-1] in {tokenizer.eos, *tokenizer.other_ends})
    ids = row[start:stop]
    text = tokenizer.decode(ids)
    try:
        return text if list(tokenizer.text_ids(text)) == ids else None
    except InputError:  # a vocabulary that was cut may lack other tokens of the same text
        return None


DOWNSTREAM = Stage(
    name=arms.DOWNSTREAM,
    reads="models; truth's evaluation set; p*",
    writes="scores of the items of downstream.tasks: each metric [N] float64, cluster [N] int32",
    plan=plan,
    run=run,
    beside=True,
)
