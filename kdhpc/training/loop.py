"""Train a causal language model with DeepSpeed ZeRO, independently of the number of ranks.

The global batch and the order of the data are functions of seed and epoch, never of the ranks. The
loss of a step is the mean cross-entropy over all counted tokens of the global batch, so every token
has the same weight whatever the lengths of the sequences. Checkpoints hold whole float32 weights
and moments, so that a training can resume with another number of ranks or another ZeRO stage.
"""

import functools
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel

from kdhpc.config.model import Training
from kdhpc.errors import InputError
from kdhpc.models.devices import DTYPES, matmul_flops_per_s, note_slow_dtype
from kdhpc.training.checkpoints import Writer
from kdhpc.training.data import Batches, Corpus, validation_batches
from kdhpc.training.engine import Engine, State, Teacher
from kdhpc.training.ranks import any_rank, from_first
from kdhpc.training.schedule import Schedule
from kdhpc.types import Json


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The result of a training that finished or was told to stop."""

    finished: bool
    """Whether the training reached its last step."""
    step: int
    """Number of steps done, including those before a resume."""
    losses: list[float]
    """Losses of the steps that this process did, in nats per counted token."""
    weights: Mapping[str, Tensor]
    """State dict on the CPU in the training dtype; empty unless finished and on rank 0."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Callbacks and inputs of a training that do not change its weights.

    Callbacks are called on rank 0 only, except `should_stop`, which is called on every rank.
    """

    save: Callable[[State], None] = lambda state: None
    """Receives a checkpoint at the interval of the settings and when the training is told to stop.
    It is called in a thread, one checkpoint at a time, while the training goes on. What it raises
    is raised by the training after a later step, or at its end."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked after every step; the training stops if it returns True on any rank."""
    on_step: Callable[[Mapping[str, Json]], None] = lambda facts: None
    """Receives the facts of a step: step, steps, epoch, loss, learning_rate, gradient_norm,
    tokens_per_s, mfu, step_s and data_s (waiting for data), also checkpoint_s (how long a
    checkpoint stopped the training) and, after a later step, checkpoint_write_s (how long it took
    to write), and validation_loss and validation_s if the loss was validated."""
    validation: Corpus | None = None
    """Sequences for the validation loss."""
    flops_per_token: float = 0.0
    """Arithmetic operations per position, for MFU."""


class DivergedError(FloatingPointError):
    """Raised if a loss or gradient is NaN or infinite or a norm explodes; a retry cannot help."""


def train(
    model: PreTrainedModel,
    corpus: Corpus,
    settings: Training,
    *,
    seed: int,
    stream: str,
    device: torch.device,
    teacher: Teacher | None = None,
    state: State | None = None,
    watch: Watch = Watch(),
) -> Trained:
    """Train to the last step of the schedule, or until told to stop.

    `ranks.join` must have been called. Every rank calls this function with the same arguments,
    except the state, which only rank 0 needs.

    Args:
        model: fresh weights on the CPU; the training changes them in place.
        corpus: sequences to train on.
        settings: optimizer, batch, schedule and dtype.
        seed: seed of the run.
        stream: name of the random stream that orders the data.
        device: device of this rank.
        teacher: a model whose distributions are learnt in place of the tokens of the corpus.
        state: checkpoint to resume from.
        watch: callbacks and inputs that do not change the weights.

    Raises:
        InputError: if the dtype is float16 and there is no GPU.
        DivergedError: if the training diverges; names the step and the last good checkpoint.
    """
    if settings.dtype == "float16" and device.type != "cuda":
        raise InputError("dtype=float16: needs a GPU; expected bfloat16 or float32 on a CPU")
    note_slow_dtype(settings.dtype, device.type)
    schedule = Schedule.of(settings, len(corpus))
    peak = matmul_flops_per_s(device, DTYPES[settings.dtype]) * settings.world_size
    pin = device.type == "cuda"
    length = corpus.ids[np.zeros(1, np.int64)].shape[1]
    with (
        closing(Engine(model, settings, schedule, device, length, teacher)) as engine,
        closing(Batches(corpus, settings, schedule, seed, stream, pin)) as batches,
        closing(Writer()) as writer,
    ):
        is_first = distributed.get_rank() == 0
        resumed_step = torch.tensor(0 if state is None else state.step, device=device)
        step = saved = int(from_first(resumed_step))
        if step:
            engine.step(batches.get(0))  # creates the optimizer's state, which is then overwritten
            engine.restore(step, state)
        losses: list[float] = []
        stop = False
        while step < schedule.last and not stop:
            began = time.perf_counter()
            batch, rate = batches.get(step), engine.schedule.get_last_lr()[0]
            loss, norm = engine.step(batch), engine.gradient_norm()
            step += 1
            losses.append(loss)
            if not (np.isfinite(loss) and norm <= settings.max_gradient_norm):
                writer.wait()  # the checkpoint that the message names
                raise DivergedError(
                    f"step {step}: loss {loss:.6g}, gradient norm {norm:.6g} "
                    f"(max_gradient_norm={settings.max_gradient_norm:g}); "
                    f"the last good checkpoint is that of step {saved}"
                )
            step_s = time.perf_counter() - began
            num_positions = settings.batch_sequences * batch.parts[0][0].shape[1]
            flops_per_s = watch.flops_per_token * num_positions / step_s
            peak = max(peak, flops_per_s)  # it was measured while the machine was busy
            facts = {
                "step": step,
                "steps": schedule.last,
                "epoch": step / schedule.steps_per_epoch,
                "loss": loss,
                "learning_rate": rate,
                "gradient_norm": norm,
                "tokens_per_s": batch.num_counted / step_s,
                "mfu": flops_per_s / peak,
                "step_s": step_s,
                "data_s": batches.waited_s,
            }
            if (write_s := writer.ended()) is not None:
                facts["checkpoint_write_s"] = write_s
            every = settings.validate_every_steps
            if (
                watch.validation is not None
                and every
                and (step % every == 0 or step == schedule.last)
            ):
                began = time.perf_counter()
                facts["validation_loss"] = engine.validate(
                    validation_batches(watch.validation, settings, pin=pin)
                )
                facts["validation_s"] = time.perf_counter() - began
            stop = step < schedule.last and any_rank(watch.should_stop(), device)
            if stop or schedule.saves_at(step, settings.checkpoint_every_steps):
                began = time.perf_counter()
                writer.wait()  # before the gather, so that memory holds one checkpoint
                gathered = engine.state(step)
                if is_first:
                    writer.start(functools.partial(watch.save, gathered))
                del gathered  # the writer frees it
                saved = step
                facts["checkpoint_s"] = time.perf_counter() - began
            if is_first:
                watch.on_step(facts)
        weights = {} if stop else engine.weights()
        writer.wait()
    return Trained(finished=not stop, step=step, losses=losses, weights=weights)
