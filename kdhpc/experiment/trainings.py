"""One training as a shard: what determines it, its ranks, its checkpoints, its log."""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kdhpc.config.language import LanguageConfig
from kdhpc.config.model import LAYOUT, WATCHING, Architecture, Model, Shape, Training
from kdhpc.errors import ClusterError
from kdhpc.models.sizes import training_flops
from kdhpc.plan.shards import ADDED, Arm, Shard, fields_of, settings_of
from kdhpc.storage.work import Work, Written
from kdhpc.training.log import TrainingLog, last_line, read_log
from kdhpc.types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdhpc.training.data import Corpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings that determine a training, together with its data."""

    seed: int
    stream: str
    """Prefix of the random streams of the initial weights and of the order of the data."""
    shape: Shape | None
    """Architecture of new weights in its short form, if it has that."""
    training: Training
    """Training settings. The fields of `WATCHING` are no part of the recipe; settings read back
    from an arm have their defaults."""
    length: int
    prompt: str
    """Text that every row starts with and that does not count; empty for a corpus of text."""
    eos: str
    threads: int
    start: str = dataclasses.field(default="", metadata=ADDED)
    """Fingerprint of the model whose weights the training starts from; empty for new weights."""
    begin: str = dataclasses.field(default="tokenizer", metadata=ADDED)
    soft_tau: float | None = dataclasses.field(default=None, metadata=ADDED)
    """Temperature of the teacher's distributions that are learnt; None if tokens are."""
    gradients: str = dataclasses.field(default="", metadata=ADDED)
    """Dtype in which gradients are summed over micro-batches and ranks; empty if it is that of the
    model, as it was for every dtype in earlier versions."""
    architecture: Architecture | None = dataclasses.field(default=None, metadata=ADDED)
    """Architecture of new weights in its long form. Neither form is given if the weights are those
    of `start` or of an input."""

    @staticmethod
    def of(
        model: Model,
        training: Training,
        config: LanguageConfig,
        *,
        stream: str,
        prompt: str,
        eos: str,
        begin: str = "tokenizer",
    ) -> "TrainSettings":
        return TrainSettings(
            seed=config.seed,
            stream=stream,
            shape=None if model.model else model.shape,
            architecture=None if model.model else model.architecture,
            training=training,
            start=model.fingerprint if model.model else "",
            length=config.length,
            prompt=prompt,
            eos=eos,
            begin=begin,
            threads=config.threads,
            gradients="" if training.dtype == "float32" else "float32",
        )

    @property
    def fields(self) -> dict[str, Json]:
        """The settings as fields of an arm, without those of `WATCHING`."""
        arm_fields = fields_of(self)
        for name in WATCHING:
            arm_fields["training"].pop(name, None)
        return arm_fields


def states_recipe(arm: Arm) -> str:
    """Return the recipe of an arm's checkpoints, which does not depend on the layout of ranks."""
    training = arm.fields["training"]
    kept = {name: value for name, value in training.items() if name not in LAYOUT}
    return dataclasses.replace(arm, fields={**arm.fields, "training": kept}).recipe


def join_ranks(training: Training, work: Work[LanguageConfig]) -> None:
    """Join the other ranks, before anything is read or built."""
    import os

    from kdhpc.models import devices, loading
    from kdhpc.training import ranks

    devices.set_threads(work.config.threads)
    loading.forget()
    # Activation checkpointing shows that memory is short, so freed memory must not be kept.
    devices.set_allocator(keep_freed=not training.activation_checkpointing)
    if work.world_size != training.world_size:
        raise ClusterError(
            f"{work.world_size} processes were started; expected {training.world_size} "
            f"(nodes={training.nodes}, ranks_per_node={training.ranks_per_node})"
        )
    ranks.join(
        rank=work.rank,
        world_size=work.world_size,
        address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        port=int(os.environ.get("MASTER_PORT", "0")),
        device=devices.pick_device(work.config.device),
    )


def train_shard(
    shard: Shard,
    work: Work[LanguageConfig],
    configured: Training,
    corpus: "Corpus",
    tokenizer_path: Path,
    *,
    start_path: Path | None = None,
    teacher_path: Path | None = None,
    validation: "Corpus | None" = None,
) -> Written | None:
    """Train a model, with checkpoints in the shard's own folder.

    Args:
        shard: shard whose fields determine the training.
        work: config and paths.
        configured: the whole `Training` of the config. Only its fields of `WATCHING` are used,
            which are no part of the shard's recipe; the others come from the shard.
        corpus: sequences to train on.
        tokenizer_path: folder of the tokenizer that is saved with the model.
        start_path: checkpoint folder whose weights the training starts from; None for new weights.
        teacher_path: checkpoint folder of the teacher whose distributions are learnt, if they are.
        validation: sequences for the validation loss.

    Returns:
        The checkpoint folder; None if told to stop, and on every rank above 0.
    """
    from kdhpc import seeding
    from kdhpc.models import architectures, devices, huggingface, loading
    from kdhpc.models.tokenizer import Tokenizer
    from kdhpc.training import checkpoints
    from kdhpc.training.engine import State, Teacher
    from kdhpc.training.loop import (
        Watch,
        train,
    )
    from kdhpc.training.schedule import Schedule

    names = {field.name for field in dataclasses.fields(TrainSettings)}
    settings = settings_of(
        {name: value for name, value in shard.arm.fields.items() if name in names}, TrainSettings
    )
    training_settings = dataclasses.replace(
        settings.training, **{name: getattr(configured, name) for name in WATCHING}
    )
    stream, device = settings.stream, devices.pick_device(work.config.device)
    tokenizer = Tokenizer(tokenizer_path)

    def new_model() -> "PreTrainedModel":
        if start_path is not None:
            return huggingface.model_to_train(start_path)
        design = settings.shape or settings.architecture
        if not design:
            raise ValueError(f"{shard.key}: has neither an architecture nor a model to start from")
        return huggingface.new_model(
            design,
            vocab_size=tokenizer.size,
            length=settings.length,
            eos=tokenizer.eos,
            seed=seeding.integer_seed(settings.seed, f"{stream}/init"),
        )

    def teacher() -> Teacher | None:
        if settings.soft_tau is None:
            return None
        if teacher_path is None:
            raise ValueError(f"{shard.key}: learns the distributions of no teacher")
        ends = (tokenizer.eos, *tokenizer.other_ends)
        dtype = work.config.teacher.sampled_dtype
        return Teacher(
            model=loading.load_model(teacher_path, dtype=dtype, device=device),
            tau=settings.soft_tau,
            left_out=() if settings.eos == "learn" else ends,
        )

    folder = work.run.scratch_path(shard.key)
    work.run.make_folder(folder)
    # The folder is named after the recipe, so that a training with other settings after a cancel
    # does not find the checkpoints of the old settings.
    resumable = states_recipe(shard.arm)
    states = folder / resumable[:12]
    newest = checkpoints.newest(states, resumable) if work.rank == 0 else None
    kept = Schedule.of(training_settings, len(corpus)).kept
    started = time.time()
    work.ready()

    def save(state: State) -> None:
        checkpoints.save(
            states,
            step=state.step,
            tensors=state.tensors,
            recipe=resumable,
            num_kept=training_settings.keep_checkpoints,
            for_good=state.step in kept,
        )

    with TrainingLog(folder, events=work.config.tensorboard) as log:

        def on_step(facts: Mapping[str, Json]) -> None:
            work.progress(facts["step"] / facts["steps"])
            log.write(facts)

        model = new_model()
        try:
            sizes = architectures.sizes_of_model(model)
            flops = training_flops(sizes, tokenizer.size, settings.length)
        except Exception:  # a given model's config may lack a field, and only MFU needs it
            flops = 6.0 * model.num_parameters()
        if teacher_path is not None:
            flops += 2.0 * loading.count_parameters(teacher_path)
        trained = train(
            model,
            corpus,
            training_settings,
            seed=settings.seed,
            stream=f"{stream}/order",
            device=device,
            teacher=teacher(),
            state=State(step=newest[0], tensors=newest[1]) if newest else None,
            watch=Watch(
                save=save,
                should_stop=work.should_stop,
                on_step=on_step,
                validation=validation,
                flops_per_token=flops,
            ),
        )
    if not trained.finished or work.rank > 0:
        return None
    result = new_model().to(devices.DTYPES[training_settings.dtype])
    result.load_state_dict(dict(trained.weights), strict=False)
    path = work.new_path(shard)
    huggingface.save_model(result, tokenizer_path, path)
    # A process that resumed from the checkpoint of the last step has done no step itself.
    final_loss = trained.losses[-1] if trained.losses else read_log(folder)[-1]["loss"]
    return Written(
        path=path,
        num_rows=1,
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
