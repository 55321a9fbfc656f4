"""The stages that make models: the truth, teachers and direct students, distilled students.

reads   a corpus or a finished model (truth); token shards (all others)
writes  Hugging Face checkpoint folders: config.json, model.safetensors, tokenizer
"""

import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kdhpc.config.language import LanguageConfig, Truth, tokens_per_s
from kdhpc.config.model import LAYOUT, WATCHING, Model, Shape, Training
from kdhpc.errors import ClusterError, InputError
from kdhpc.experiment import arms
from kdhpc.experiment.inputs import resolve_model
from kdhpc.models.sizes import num_parameters, training_flops
from kdhpc.plan.shards import Arm, Plan, Shard, fields_of, settings_of
from kdhpc.plan.stages import Stage
from kdhpc.storage.work import Work, Written
from kdhpc.training.log import TrainingLog, last_line, read_log
from kdhpc.types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdhpc.training.data import Corpus

WRITES = "Hugging Face checkpoint folders (safetensors, tokenizer)"
BYTE_VOCAB_SIZE = 257


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings that determine a training, together with its data."""

    seed: int
    stream: str
    """Prefix of the random streams of the initial weights and of the order of the data."""
    shape: Shape
    training: Training
    """Training settings. The fields of `WATCHING` are no part of the recipe; settings read back
    from an arm have their defaults."""
    length: int
    prompt: str
    """Text that every row starts with and that does not count; empty for a corpus of text."""
    eos: str
    threads: int

    @staticmethod
    def of(model: Model, config: LanguageConfig, *, stream: str, prompt: str) -> "TrainSettings":
        return TrainSettings(
            seed=config.seed,
            stream=stream,
            shape=model.shape,
            training=model.training,
            length=config.length,
            prompt=prompt,
            eos=config.eos,
            threads=config.threads,
        )

    @property
    def fields(self) -> dict[str, Json]:
        """The settings as fields of an arm, without those of `WATCHING`."""
        arm_fields = fields_of(self)
        for name in WATCHING:
            arm_fields["training"].pop(name, None)
        return arm_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class TruthSettings:
    """Settings that determine p*; a trained p* has those of its training in addition."""

    kind: Literal["given", "trained"]
    fingerprint: str
    """Identity of the model or the corpus; where they are kept determines nothing."""
    text_column: str | None
    """Column of the corpus that holds the text."""
    dtype: str


def states_recipe(arm: Arm) -> str:
    """Return the recipe of an arm's checkpoints, which does not depend on the layout of ranks."""
    training = arm.fields["training"]
    kept = {name: value for name, value in training.items() if name not in LAYOUT}
    return dataclasses.replace(arm, fields={**arm.fields, "training": kept}).recipe


def _trained_truth(config: LanguageConfig) -> Model | None:
    """Return the model of a truth that the run trains; None if the truth is a given model."""
    truth = config.truth
    if truth.model != "train" or truth.shape is None or truth.training is None:
        return None
    return Model(shape=truth.shape, training=truth.training)


def plan_truth(config: LanguageConfig, before: Plan) -> list[Shard]:
    """Plan one shard: p* as a checkpoint folder."""
    truth, model = config.truth, _trained_truth(config)
    fields = fields_of(
        TruthSettings(
            kind="trained" if model else "given",
            fingerprint=truth.fingerprint,
            text_column=truth.text_column if model else None,
            dtype=truth.dtype,
        )
    )
    if model is None:
        arm = Arm(stage=arms.TRUTH, name="truth", fields=fields, inputs={})
        return [Shard(arm=arm, name="00000")]
    arm = Arm(
        stage=arms.TRUTH,
        name="truth",
        fields=fields | TrainSettings.of(model, config, stream="truth", prompt="").fields,
        inputs={},
        nodes=model.training.nodes,
        ranks_per_node=model.training.ranks_per_node,
    )
    num_bytes = 4.0 * num_parameters(model.shape, BYTE_VOCAB_SIZE)
    return [Shard(arm=arm, name="00000", work=1e7, num_bytes=num_bytes)]


def run_truth(shard: Shard, work: Work[LanguageConfig]) -> Written | None:
    """Train p* on a corpus, or convert or copy a finished model into the run."""
    from kdhpc.models import devices, huggingface
    from kdhpc.models.tokenizer import Tokenizer
    from kdhpc.storage.token_shards import MAX_VOCAB_SIZE

    truth, model = work.config.truth, _trained_truth(work.config)
    if model is not None:
        _join(model, work)
        tokenizer = huggingface.byte_tokenizer()
        with tempfile.TemporaryDirectory() as tokenizer_dir:
            tokenizer.save_pretrained(tokenizer_dir)
            corpus = _text_corpus(truth, work.config.length, tokenizer)
            return _train(shard, work, model.training, corpus, Path(tokenizer_dir))
    devices.set_threads(work.config.threads)
    path = work.new_path(shard)
    source, dtype = resolve_model(truth.model), shard.arm.fields["dtype"]
    if source.endswith(".gguf"):
        huggingface.convert_gguf(Path(source), path, dtype=dtype)
    else:
        huggingface.copy_model(source, truth.revision, path, dtype=dtype)
    vocab_size = Tokenizer(path).size
    if vocab_size > MAX_VOCAB_SIZE:
        raise InputError(
            f"truth.model={truth.model}: has {vocab_size} token ids; token shards hold ids below "
            f"{MAX_VOCAB_SIZE}"
        )
    return Written(path=path, rows=1, stats={"parameters": _count(path)})


def plan(stage: str, config: LanguageConfig, before: Plan) -> list[Shard]:
    """Plan one shard for every model of this stage."""
    shards = []
    [truth] = before.arm(*arms.TRUTH_MODEL)
    for trainee in arms.trainees(config):
        if trainee.stage != stage:
            continue
        data = before.arm(*trainee.data)
        training = trainee.model.training
        sequences = config.sampling.train_sequences
        steps = (training.stop_after_epochs or training.epochs) * (
            sequences // training.batch_sequences
        )
        validation = before.arm(*arms.TRUTH_EVAL) if training.validate_every_steps else []
        stream = f"{trainee.kind}/s{trainee.seed}/{trainee.size}"
        settings = TrainSettings.of(trainee.model, config, stream=stream, prompt=config.prompt)
        arm = Arm(
            stage=stage,
            name=trainee.name,
            fields=settings.fields | {"train_sequences": sequences},
            inputs={"data": data[0].arm.recipe, "tokenizer": truth.recipe},
            nodes=training.nodes,
            ranks_per_node=training.ranks_per_node,
        )
        shards.append(
            Shard(
                arm=arm,
                name="00000",
                reads=(truth.key, *(shard.key for shard in (*data, *validation))),
                work=steps * training.batch_sequences * config.length / training.world_size,
                num_bytes=4.0 * num_parameters(trainee.model.shape, 49152),
            )
        )
    return shards


def run(shard: Shard, work: Work[LanguageConfig]) -> Written | None:
    """Train one model on token shards."""
    from kdhpc.models.tokenizer import Tokenizer
    from kdhpc.scoring.counting import Counting
    from kdhpc.storage.token_shards import map_token_rows
    from kdhpc.training.data import Corpus

    trainee = next(t for t in arms.trainees(work.config) if t.name == shard.arm.name)
    _join(trainee.model, work)
    [truth] = work.plan.arm(*arms.TRUTH_MODEL)
    tokenizer_path = work.input(truth.key)
    tokenizer = Tokenizer(tokenizer_path)
    fields = shard.arm.fields
    counting = Counting(
        num_prompt=len(tokenizer.prompt_ids(fields["prompt"])),
        eos=tokenizer.eos,
        count_eos=fields["eos"] == "learn",
    )

    def corpus(stage: str, arm: str) -> Corpus:
        rows = map_token_rows([work.input(s.key) for s in work.plan.arm(stage, arm)])
        return Corpus(ids=rows, length=rows.length, counting=counting)

    watching = trainee.model.training
    validation = corpus(*arms.TRUTH_EVAL) if watching.validate_every_steps else None
    data = corpus(*trainee.data)
    return _train(shard, work, watching, data, tokenizer_path, validation=validation)


def _join(model: Model, work: Work[LanguageConfig]) -> None:
    """Join the other ranks, before anything is read or built."""
    import os

    from kdhpc.models import devices, loading
    from kdhpc.training import ranks

    devices.set_threads(work.config.threads)
    loading.forget()
    # Activation checkpointing shows that memory is short, so freed memory must not be kept.
    devices.set_allocator(keep_freed=not model.training.activation_checkpointing)
    if work.world_size != model.training.world_size:
        raise ClusterError(
            f"{work.world_size} processes were started; expected {model.training.world_size} "
            f"(nodes={model.training.nodes}, ranks_per_node={model.training.ranks_per_node})"
        )
    ranks.join(
        rank=work.rank,
        world_size=work.world_size,
        address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        port=int(os.environ.get("MASTER_PORT", "0")),
        device=devices.pick_device(work.config.device),
    )


def _train(
    shard: Shard,
    work: Work[LanguageConfig],
    watching: Training,
    corpus: "Corpus",
    tokenizer_path: Path,
    *,
    validation: "Corpus | None" = None,
) -> Written | None:
    """Train a model, with checkpoints in the shard's own folder.

    Args:
        shard: shard whose fields determine the training.
        work: config and paths.
        watching: settings of which the fields of `WATCHING` are used, which are no part of the
            shard's recipe.
        corpus: sequences to train on.
        tokenizer_path: folder of the tokenizer that is saved with the model.
        validation: sequences for the validation loss.

    Returns:
        The checkpoint folder; None if told to stop, and on every rank above 0.
    """
    from kdhpc import seeding
    from kdhpc.models import devices, huggingface
    from kdhpc.models.tokenizer import Tokenizer
    from kdhpc.training import checkpoints
    from kdhpc.training.engine import State
    from kdhpc.training.loop import (
        Watch,
        train,
    )
    from kdhpc.training.schedule import Schedule

    names = {field.name for field in dataclasses.fields(TrainSettings)}
    settings = settings_of(
        {name: value for name, value in shard.arm.fields.items() if name in names}, TrainSettings
    )
    recipe = dataclasses.replace(
        settings.training, **{name: getattr(watching, name) for name in WATCHING}
    )
    stream, device = settings.stream, devices.pick_device(work.config.device)
    tokenizer = Tokenizer(tokenizer_path)

    def new_model() -> "PreTrainedModel":
        return huggingface.new_model(
            settings.shape,
            vocab_size=tokenizer.size,
            length=settings.length,
            eos=tokenizer.eos,
            seed=seeding.integer_seed(settings.seed, f"{stream}/init"),
        )

    folder = work.run.scratch_path(shard.key)
    # The folder is named after the recipe, so that a training with other settings after a cancel
    # does not find the checkpoints of the old settings.
    resumable = states_recipe(shard.arm)
    states = folder / resumable[:12]
    newest = checkpoints.newest(states, resumable) if work.rank == 0 else None
    kept = Schedule.of(recipe, len(corpus)).kept
    started = time.time()
    work.ready()

    def save(state: State) -> None:
        checkpoints.save(
            states,
            step=state.step,
            tensors=state.tensors,
            recipe=resumable,
            num_kept=recipe.keep_checkpoints,
            for_good=state.step in kept,
        )

    with TrainingLog(folder, events=work.config.tensorboard) as log:

        def on_step(facts: Mapping[str, Json]) -> None:
            work.progress(facts["step"] / facts["steps"])
            log.write(facts)

        trained = train(
            new_model(),
            corpus,
            recipe,
            seed=settings.seed,
            stream=f"{stream}/order",
            device=device,
            state=State(step=newest[0], tensors=newest[1]) if newest else None,
            watch=Watch(
                save=save,
                should_stop=work.should_stop,
                on_step=on_step,
                validation=validation,
                flops_per_token=training_flops(settings.shape, tokenizer.size, settings.length),
            ),
        )
    if not trained.finished or work.rank > 0:
        return None
    result = new_model().to(devices.DTYPES[recipe.dtype])
    result.load_state_dict(dict(trained.weights), strict=False)
    path = work.new_path(shard)
    huggingface.save_model(result, tokenizer_path, path)
    # A process that resumed from the checkpoint of the last step has done no step itself.
    final_loss = trained.losses[-1] if trained.losses else read_log(folder)[-1]["loss"]
    return Written(
        path=path,
        rows=1,
        stats={
            "parameters": sum(p.numel() for p in result.parameters()),
            "steps": trained.step,
            "resumed_from_step": newest[0] if newest else 0,
            "final_loss_nats": final_loss,
            "train_s": round(time.time() - started, 3),
            "device": device.type,
        },
    )


def progress(scratch: Path) -> str:
    """Describe the last step in the log of a training, for status.py; empty if there is none."""
    try:
        facts = json.loads(last_line(scratch))
        return (
            f"step {facts['step']} of {facts['steps']} loss {facts['loss']:.4f}"
            f" lr {facts['learning_rate']:.2e} norm {facts['gradient_norm']:.2f}"
            f" {facts['tokens_per_s']:.0f} tokens/s MFU {facts['mfu']:.0%}"
        )
    except (OSError, ValueError, KeyError):
        return ""


def _text_corpus(truth: Truth, length: int, tokenizer: "PreTrainedTokenizerBase") -> "Corpus":
    """Cut documents into rows of `length` tokens; the last row of a document ends with EOS.

    Raises:
        InputError: if the corpus is not the one that the run was submitted with.
    """
    import numpy as np

    from kdhpc.scoring.counting import Counting
    from kdhpc.storage.corpora import corpus_fingerprint, read_corpus
    from kdhpc.training.data import Corpus

    if truth.fingerprint not in {"", corpus_fingerprint(truth.corpus, truth.text_column)}:
        raise InputError(
            f"truth.corpus={truth.corpus}: has changed since the run was submitted; expected the "
            f"text with fingerprint {truth.fingerprint[:12]}"
        )
    rows = []
    for text in read_corpus(truth.corpus, truth.text_column):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        rows += [ids[start : start + length] for start in range(0, len(ids), length)]
    padded = np.zeros((len(rows), length), np.uint16)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return Corpus(
        ids=padded,
        length=np.array([len(ids) for ids in rows], np.int32),
        counting=Counting(num_prompt=0, eos=tokenizer.eos_token_id, count_eos=True),
    )


def _count(path: Path) -> int:
    """Return the number of parameters in a checkpoint folder."""
    from safetensors import safe_open

    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


TRUTH = Stage(
    name=arms.TRUTH,
    reads="a corpus, a GGUF file, a Hugging Face folder or hub id",
    writes="p*; a Hugging Face checkpoint folder (safetensors, tokenizer)",
    unit="tokens",
    plan=plan_truth,
    run=run_truth,
    modules=("kdhpc.training.loop", "deepspeed"),
    rate=functools.partial(tokens_per_s, stage=arms.TRUTH),
    progress=progress,
)
TRAIN_ON_TRUTH = Stage(
    name=arms.TRAIN_ON_TRUTH,
    reads="D",
    writes=f"teachers and direct students; {WRITES}",
    unit="tokens",
    plan=functools.partial(plan, arms.TRAIN_ON_TRUTH),
    run=run,
    modules=("kdhpc.training.loop", "deepspeed"),
    rate=functools.partial(tokens_per_s, stage=arms.TRAIN_ON_TRUTH),
    progress=progress,
)
TRAIN_STUDENTS = Stage(
    name=arms.TRAIN_STUDENTS,
    reads="D'_tau",
    writes=f"distilled students; {WRITES}",
    unit="tokens",
    plan=functools.partial(plan, arms.TRAIN_STUDENTS),
    run=run,
    modules=("kdhpc.training.loop", "deepspeed"),
    rate=functools.partial(tokens_per_s, stage=arms.TRAIN_STUDENTS),
    progress=progress,
)
