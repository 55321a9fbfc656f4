"""Train a causal language model with DeepSpeed ZeRO, the same for any number of ranks.

The global batch and the order of the data are functions of (seed, epoch), never of the ranks. The
loss of a step is the mean cross-entropy over all counted tokens of the global batch, so variable
lengths weigh as they should. Checkpoints hold whole float32 weights and moments: another number of
ranks or another ZeRO stage can go on from them.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn import functional
from transformers import PreTrainedModel, get_wsd_schedule

from kdhpc import attention, seeding
from kdhpc.config import Training
from kdhpc.counting import Counting
from kdhpc.devices import DTYPES, matmul_flops_per_s
from kdhpc.errors import InputError
from kdhpc.loss import summed_nll
from kdhpc.ranks import any_rank, from_first, summed
from kdhpc.sizes import BUCKET
from kdhpc.types import Json

MOMENTS = ("exp_avg", "exp_avg_sq")


class Rows(Protocol):
    """Token ids [N, L] that can be read by row: an array, or shards mapped into memory."""

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.uint16]: ...


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What is trained on."""

    ids: Rows
    """[N, L] token ids, mapped into memory or not."""
    length: NDArray[np.int32]
    """[N] tokens in each row; what lies beyond means nothing."""
    counting: Counting
    """Which tokens count."""

    def __len__(self) -> int:
        return len(self.length)

    def read(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Rows by number; nothing counts in those of a negative number.

        Returns:
            Ids [n, L] and what is predicted at each position [n, L], -100 where it does not count.
        """
        ids = torch.from_numpy(self.ids[np.maximum(rows, 0)].astype(np.int64))
        length = torch.from_numpy(np.where(rows < 0, 0, self.length[np.maximum(rows, 0)]))
        counts = self.counting.of(ids, length)
        targets = torch.full_like(ids, -100)
        targets[:, :-1] = ids[:, 1:].where(counts[:, 1:], -100)
        return ids, targets


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps of a training."""

    steps_per_epoch: int
    total: int
    """Steps of the whole learning-rate schedule."""
    last: int
    """Steps after which training stops and the model is taken."""
    kept: frozenset[int] = frozenset()
    """Steps whose checkpoints are kept for good."""

    @staticmethod
    def of(recipe: Training, num_sequences: int) -> "Schedule":
        """The last, incomplete batch of an epoch is left out."""
        per_epoch = num_sequences // recipe.batch_sequences
        total = int(recipe.epochs * per_epoch)
        stop = recipe.stop_after_epochs
        last = total if stop is None else int(stop * per_epoch)
        kept = frozenset(int(epoch * per_epoch) for epoch in recipe.keep_epochs)
        return Schedule(steps_per_epoch=per_epoch, total=total, last=max(1, last), kept=kept)

    def saves_at(self, step: int, every: int) -> bool:
        """Whether a checkpoint is made after `step` steps."""
        return step in self.kept or (every > 0 and step % every == 0 and step < self.last)


@dataclass(frozen=True, kw_only=True)
class State:
    """A checkpoint: all that a later process needs to go on."""

    step: int
    """Steps done."""
    tensors: Mapping[str, Tensor]
    """Float32 weights by name, and moments as `exp_avg/<name>` and `exp_avg_sq/<name>`."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The end of a training, or where it was told to stop."""

    finished: bool
    step: int
    losses: list[float]
    """Of the steps that this process did, nats per counted token."""
    weights: Mapping[str, Tensor]
    """State dict on the CPU in the training dtype; filled on rank 0 when finished."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What a training tells and asks while it runs; called on rank 0, `should_stop` on all."""

    save: Callable[[State], None] = lambda state: None
    """Gets a checkpoint at the recipe's interval and when told to stop."""
    should_stop: Callable[[], bool] = lambda: False
    """Looked at after every step."""
    on_step: Callable[[Mapping[str, Json]], None] = lambda facts: None
    """Gets the facts of a step: step, steps, epoch, loss, learning_rate, gradient_norm,
    tokens_per_s, mfu, step_s, data_s (waiting for data), and where they were made checkpoint_s,
    validation_loss and validation_s."""
    validation: Corpus | None = None
    """Sequences for the validation loss."""
    flops_per_token: float = 0.0
    """Arithmetic of one position, for MFU."""


class DivergedError(FloatingPointError):
    """A loss or gradient that is no number, or a norm that exploded: trying again cannot help."""


class _Head(nn.Module):
    """The output layer and the loss in one module, so that ZeRO-3 gathers the weights for both."""

    def __init__(self, weight: nn.Parameter, head_tokens: int) -> None:
        super().__init__()
        self.weight = weight
        self.head_tokens = head_tokens

    def forward(self, hidden: Tensor, targets: Tensor, gain: float) -> Tensor:
        return summed_nll(
            hidden.flatten(0, 1),
            self.weight,
            targets.flatten(),
            head_tokens=self.head_tokens,
            gain=gain,
        )


class _WithLoss(nn.Module):
    """The model with its loss inside, which is how DeepSpeed wants it."""

    def __init__(self, model: PreTrainedModel, head_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.head = _Head(model.get_output_embeddings().weight, head_tokens)

    def forward(self, ids: Tensor, targets: Tensor, gain: float) -> Tensor:
        """Sum of the cross-entropy over targets [B, L] that are not negative."""
        hidden = self.model.base_model(ids, use_cache=False).last_hidden_state
        total: Tensor = self.head(hidden, targets, gain)
        return total


def deepspeed_settings(recipe: Training) -> dict[str, object]:
    """The DeepSpeed dictionary, made from the recipe alone."""
    settings: dict[str, object] = {
        "train_batch_size": recipe.batch_sequences,
        "train_micro_batch_size_per_gpu": recipe.micro_batch,
        "gradient_accumulation_steps": recipe.accumulation,
        "gradient_clipping": recipe.gradient_clip,
        "zero_optimization": {
            "stage": recipe.zero_stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        },
        "steps_per_print": 10**9,
        "bf16": {"enabled": recipe.dtype == "bfloat16"},
    }
    if recipe.dtype == "float16":
        settings["fp16"] = {"enabled": True, "loss_scale": recipe.loss_scale}
    return settings


def load_deepspeed() -> Any:
    """DeepSpeed, quiet, and without its shared-memory op, which compiles C++ at first use."""
    import deepspeed

    deepspeed.logger.setLevel(logging.ERROR)
    # 0.19 asks this table before it builds `ShareMemCommBuilder`.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class _Engine:
    """DeepSpeed around one model: steps, checkpoints, weights."""

    def __init__(
        self, model: PreTrainedModel, recipe: Training, schedule: Schedule, device: torch.device
    ) -> None:
        self.deepspeed = load_deepspeed()
        self.recipe, self.device = recipe, device
        self.linear = functional.linear  # ZeRO-3 replaces it for the whole process
        rank = distributed.get_rank()
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(distributed.get_world_size()))
        os.environ.setdefault("LOCAL_RANK", "0")
        self.deepspeed.init_distributed(dist_backend=distributed.get_backend())
        model = model.to(device).train()
        # DeepSpeed casts buffers too. Rotary frequencies in bfloat16 would be off by 0.7 radian at
        # the end of a row of 512 tokens, and no longer be those of the saved model.
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.to(DTYPES[recipe.dtype])
        attention.use_blocks(model)
        if recipe.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for layer in model.base_model.layers if recipe.compile else ():
            # Only what is no matrix product: one graph of each kind serves all layers.
            for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
                part.compile()
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.engine, self.optimizer, _, self.schedule = self.deepspeed.initialize(
            model=_WithLoss(model, recipe.head_tokens),
            optimizer=optimizer,
            lr_scheduler=lambda inner: get_wsd_schedule(
                inner,
                num_warmup_steps=round(recipe.warmup_fraction * schedule.total),
                num_decay_steps=round(recipe.decay_fraction * schedule.total),
                num_training_steps=schedule.total,
                decay_type="linear",
            ),
            config=deepspeed_settings(recipe),
            dist_init_required=False,
        )
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer)
        self.parameters = {
            name.removeprefix("model."): parameter
            for name, parameter in self.engine.module.named_parameters()
        }

    def step(self, batch: "_Batch") -> float:
        """One optimizer step; returns its loss in nats per counted token."""
        # DeepSpeed divides by accumulation steps and by ranks; the mean is over tokens.
        share = self.recipe.accumulation * self.recipe.world_size / batch.num_counted
        gain = share * (self.recipe.loss_scale if self.recipe.dtype == "float16" else 1.0)
        total = torch.zeros((), device=self.device)
        for ids, targets in batch.parts:
            nll = self.engine(self._here(ids), self._here(targets), gain)
            self.engine.backward(nll * share)
            self.engine.step()
            total += nll.detach()
        return float(summed(total)) / batch.num_counted

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    @torch.no_grad()
    def validate(self, batches: Iterator["_Batch"]) -> float:
        """Loss in nats per counted token."""
        total, num_counted = torch.zeros((), device=self.device), 0
        self.engine.eval()
        for batch in batches:
            num_counted += batch.num_counted
            for ids, targets in batch.parts:
                total += self.engine(self._here(ids), self._here(targets), 1.0)
        self.engine.train()
        return float(summed(total)) / max(1, num_counted)

    def gradient_norm(self) -> float:
        """Global norm of the last step's gradients, before clipping."""
        if self.engine.skipped_steps:  # float16 overflowed: its static loss scale is too large
            return float("inf")
        return float(self.engine.get_global_grad_norm() or 0.0)

    def state(self, step: int) -> State:
        """Whole weights and moments on the CPU; every rank must ask, rank 0 gets them."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            found = {name: self._weight(parameter)}
            found |= {f"{moment}/{name}": self._moment(parameter, moment) for moment in MOMENTS}
            if distributed.get_rank() == 0:
                tensors |= {key: value.detach().cpu().clone() for key, value in found.items()}
        return State(step=step, tensors=tensors)

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        found: Tensor | None = safe_get_full_fp32_param(parameter)
        return parameter if found is None else found  # stage 0 keeps no second copy

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.recipe.zero_stage == 0:
            state: Tensor = self._states()[parameter][moment]
            return state
        found: Tensor = safe_get_full_optimizer_state(parameter, moment)
        return found

    def _states(self) -> Mapping[nn.Parameter, dict[str, Tensor]]:
        """AdamW's state; under ZeRO, DeepSpeed wraps the optimizer."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        states: Mapping[nn.Parameter, dict[str, Tensor]] = inner.state
        return states

    def restore(self, step: int, state: State | None) -> None:
        """Put rank 0's checkpoint back on all ranks.

        The optimizer must have made a step before, so that its state exists.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        def whole(name: str, parameter: nn.Parameter) -> Tensor:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 holds a part
            value = torch.empty(shape, device=self.device)
            return from_first(value if state is None else value.copy_(state.tensors[name]))

        for name, parameter in self.parameters.items():
            weight = whole(name, parameter)
            if self.recipe.zero_stage > 0:
                safe_set_full_fp32_param(parameter, weight)
            with self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(weight)
            for moment in MOMENTS:
                value = whole(f"{moment}/{name}", parameter)
                if self.recipe.zero_stage > 0:
                    safe_set_full_optimizer_state(parameter, value, moment)
                else:
                    self._moment(parameter, moment).copy_(value)
        for inner in self._states().values():
            inner["step"].fill_(step)
        self.engine.global_steps = step
        self.schedule.last_epoch = step - 1
        self.schedule.step()

    def weights(self) -> dict[str, Tensor]:
        """State dict of the model on the CPU in the training dtype; filled on rank 0."""
        found = {}
        for name, parameter in self.parameters.items():
            with self.deepspeed.zero.GatheredParameters([parameter]):
                if distributed.get_rank() == 0:
                    found[name] = parameter.detach().cpu().clone()
        return found

    def close(self) -> None:
        """Let go of hooks and buffers, so that the next training in this process starts clean."""
        self.engine.destroy()
        functional.linear = self.linear


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """One global batch, of which this rank holds its share."""

    parts: Sequence[tuple[Tensor, Tensor]]
    """Micro-batches of this rank: ids [B, L] and targets [B, L], in pinned memory for GPUs."""
    num_counted: int
    """Tokens that count in the whole global batch."""


def _batch(corpus: Corpus, rows: NDArray[np.int64], recipe: Training, *, pin: bool) -> _Batch:
    """Read a global batch and take this rank's part of it.

    Every rank reads all rows, a few hundred kilobytes, because all need the number of counted
    tokens.
    """
    ids, targets = corpus.read(rows)
    mine = np.arange(len(rows)).reshape(recipe.accumulation, recipe.world_size, -1)
    parts = []
    for index in mine[:, distributed.get_rank()]:
        part = ids[index], targets[index]
        parts.append((part[0].pin_memory(), part[1].pin_memory()) if pin else part)
    return _Batch(parts=parts, num_counted=max(1, int((targets >= 0).sum())))


@dataclass
class _Batches:
    """The global batches in order, each read while the one before it is trained on."""

    corpus: Corpus
    recipe: Training
    schedule: Schedule
    seed: int
    stream: str
    pin: bool
    waited_s: float = 0.0
    """Seconds that the last batch was waited for."""
    _order: tuple[int, NDArray[np.int64]] | None = None
    _next: tuple[int, Future[_Batch]] | None = None
    _reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def get(self, step: int) -> _Batch:
        """The batch of a step; starts to read the one after it."""
        began = time.perf_counter()
        if self._next is None or self._next[0] != step:
            self._next = step, self._reader.submit(self._read, step)
        batch = self._next[1].result()
        self._next = step + 1, self._reader.submit(self._read, step + 1)
        self.waited_s = time.perf_counter() - began
        return batch

    def _read(self, step: int) -> _Batch:
        epoch, index = divmod(step, self.schedule.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            order = seeding.permutation(self.seed, self.stream, epoch, len(self.corpus))
            self._order = epoch, order
        size = self.recipe.batch_sequences
        rows = self._order[1][index * size : (index + 1) * size]
        return _batch(self.corpus, rows, self.recipe, pin=self.pin)

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)


def _validation(corpus: Corpus, recipe: Training, *, pin: bool) -> Iterator[_Batch]:
    """Global batches over the first sequences; rows that fill the last one do not count."""
    num_rows = min(recipe.validation_sequences, len(corpus))
    for start in range(0, num_rows, recipe.batch_sequences):
        rows = np.arange(start, start + recipe.batch_sequences)
        yield _batch(corpus, np.where(rows < num_rows, rows, -1), recipe, pin=pin)


def train(
    model: PreTrainedModel,
    corpus: Corpus,
    recipe: Training,
    *,
    seed: int,
    stream: str,
    device: torch.device,
    state: State | None = None,
    watch: Watch = Watch(),
) -> Trained:
    """Train to the recipe's last step, or until told to stop.

    `ranks.join` must have been called. Every rank calls this with the same arguments, but for the
    state, which only rank 0 needs.

    Args:
        model: fresh weights on the CPU; its parameters are taken over.
        corpus: what is trained on.
        recipe: optimizer, batch, schedule, precision.
        seed: of the run.
        stream: name of the stream that orders the data.
        device: of this rank.
        state: a checkpoint to go on from.
        watch: what is told and asked on the way.

    Raises:
        InputError: for float16 without a GPU.
        DivergedError: naming the step and the last good checkpoint.
    """
    if recipe.dtype == "float16" and device.type != "cuda":
        raise InputError("dtype=float16: needs a GPU; expected bfloat16 or float32 on a CPU")
    schedule = Schedule.of(recipe, len(corpus))
    peak = matmul_flops_per_s(device, DTYPES[recipe.dtype]) * recipe.world_size
    engine = _Engine(model, recipe, schedule, device)
    batches = _Batches(corpus, recipe, schedule, seed, stream, pin := device.type == "cuda")
    is_first = distributed.get_rank() == 0
    found = torch.tensor(0 if state is None else state.step, device=device)
    step = saved = int(from_first(found))
    if step:
        engine.step(batches.get(0))
        engine.restore(step, state)
    losses: list[float] = []
    stop = False
    while step < schedule.last and not stop:
        began = time.perf_counter()
        batch, rate = batches.get(step), engine.schedule.get_last_lr()[0]
        loss, norm = engine.step(batch), engine.gradient_norm()
        step += 1
        losses.append(loss)
        if not (np.isfinite(loss) and norm <= recipe.max_gradient_norm):
            raise DivergedError(
                f"step {step}: loss {loss:.6g}, gradient norm {norm:.6g} (max_gradient_norm="
                f"{recipe.max_gradient_norm:g}); the last good checkpoint is that of step {saved}"
            )
        step_s = time.perf_counter() - began
        num_positions = recipe.batch_sequences * batch.parts[0][0].shape[1]
        facts = {
            "step": step,
            "steps": schedule.last,
            "epoch": step / schedule.steps_per_epoch,
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_s": batch.num_counted / step_s,
            "mfu": watch.flops_per_token * num_positions / step_s / peak,
            "step_s": step_s,
            "data_s": batches.waited_s,
        }
        every = recipe.validate_every_steps
        if watch.validation is not None and every and (step % every == 0 or step == schedule.last):
            began = time.perf_counter()
            facts["validation_loss"] = engine.validate(
                _validation(watch.validation, recipe, pin=pin)
            )
            facts["validation_s"] = time.perf_counter() - began
        stop = step < schedule.last and any_rank(watch.should_stop(), device)
        if stop or schedule.saves_at(step, recipe.checkpoint_every_steps):
            began = time.perf_counter()
            made = engine.state(step)
            if is_first:
                watch.save(made)
            saved = step
            facts["checkpoint_s"] = time.perf_counter() - began
        if is_first:
            watch.on_step(facts)
    weights = {} if stop else engine.weights()
    batches.close()
    engine.close()
    return Trained(finished=not stop, step=step, losses=losses, weights=weights)
