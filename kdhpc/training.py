"""Train a causal language model with DeepSpeed ZeRO, the same for any number of ranks.

The global batch and the order of the data are functions of (seed, epoch), never of the ranks. The
loss of a step is the mean cross-entropy over all counted tokens of the global batch, so variable
lengths weigh as they should. Checkpoints hold whole float32 weights and moments: another number of
ranks or another ZeRO stage can go on from them.
"""

import datetime
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn import functional
from transformers import PreTrainedModel, get_wsd_schedule

from kdhpc import seeding
from kdhpc.config import Training
from kdhpc.errors import ClusterError
from kdhpc.models import DTYPES

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What is trained on."""

    ids: NDArray[np.uint16]
    """[N, L] token ids, memory-mapped or not."""
    stop: NDArray[np.int32]
    """[N] one past the last token that counts."""
    num_prompt: int
    """Tokens at the start of each row that do not count."""

    @property
    def counted(self) -> NDArray[np.int64]:
        """[N] number of tokens that count."""
        first = max(1, self.num_prompt)  # nothing predicts the first token
        return np.maximum(self.stop.astype(np.int64) - first, 0)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps of a training."""

    steps_per_epoch: int
    total: int
    """Steps of the whole learning-rate schedule."""
    last: int
    """Steps after which training stops and the model is taken."""

    @staticmethod
    def of(recipe: Training, num_sequences: int) -> "Schedule":
        """The last, incomplete batch of an epoch is left out."""
        per_epoch = num_sequences // recipe.batch_sequences
        total = int(recipe.epochs * per_epoch)
        stop = recipe.stop_after_epochs
        last = total if stop is None else int(stop * per_epoch)
        return Schedule(steps_per_epoch=per_epoch, total=total, last=max(1, last))


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


class _WithLoss(nn.Module):
    """The model with its loss inside, so that ZeRO-3 gathers the head's weights too."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Sum of the cross-entropy over targets [B, L] that are not -100."""
        logits = self.model(ids, use_cache=False).logits.float()
        return functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )


def join(*, rank: int, world_size: int, address: str, port: int, device: torch.device) -> None:
    """Start torch.distributed once a process and check that every rank is there.

    A single rank needs no network: its store is in memory.

    Raises:
        ClusterError: naming the ranks that did not come within five minutes.
    """
    if distributed.is_initialized():
        return
    from torch._C._distributed_c10d import HashStore, TCPStore

    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size == 1:
        store: Any = HashStore()
    else:
        store = TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0,
            timeout=datetime.timedelta(seconds=300),
            wait_for_workers=False,
        )
        _wait_for_all(store, rank, world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    ones = torch.ones(1, device=device)
    distributed.all_reduce(ones)
    if int(ones) != world_size:
        raise ClusterError(f"all-reduce over {world_size} ranks gave {int(ones)}")


def _wait_for_all(store: Any, rank: int, world_size: int, limit_s: float = 300.0) -> None:
    store.set(f"here/{rank}", os.environ.get("SLURMD_NODENAME", "") or "local")
    deadline = time.monotonic() + limit_s
    missing = list(range(world_size))
    while missing := [other for other in missing if not store.check([f"here/{other}"])]:
        if time.monotonic() > deadline:
            raise ClusterError(f"ranks {missing} of {world_size} did not start in {limit_s:.0f} s")
        time.sleep(0.1)


def deepspeed_settings(recipe: Training, world_size: int) -> dict[str, Any]:
    """The DeepSpeed dictionary, made from the recipe alone."""
    micro = recipe.micro_batch_sequences
    settings: dict[str, Any] = {
        "train_batch_size": recipe.batch_sequences,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": recipe.batch_sequences // (micro * world_size),
        "gradient_clipping": recipe.gradient_clip,
        "zero_optimization": {"stage": recipe.zero_stage},
        "steps_per_print": 10**9,
        "bf16": {"enabled": recipe.dtype == "bfloat16"},
    }
    if recipe.dtype == "float16":
        settings["fp16"] = {"enabled": True, "loss_scale": recipe.loss_scale}
    return settings


def _deepspeed() -> Any:
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
        self.deepspeed = _deepspeed()
        self.world_size = distributed.get_world_size()
        rank = distributed.get_rank()
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(self.world_size))
        os.environ.setdefault("LOCAL_RANK", "0")
        self.deepspeed.init_distributed(dist_backend=distributed.get_backend())
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
        )
        self.engine, self.optimizer, _, self.schedule = self.deepspeed.initialize(
            model=_WithLoss(model.to(device)),
            optimizer=optimizer,
            lr_scheduler=lambda inner: get_wsd_schedule(
                inner,
                num_warmup_steps=round(recipe.warmup_fraction * schedule.total),
                num_decay_steps=round(recipe.decay_fraction * schedule.total),
                num_training_steps=schedule.total,
                decay_type="linear",
            ),
            config=deepspeed_settings(recipe, self.world_size),
            dist_init_required=False,
        )
        self.parameters = {
            name.removeprefix("model."): parameter
            for name, parameter in self.engine.module.named_parameters()
        }

    def step(
        self, micro_batches: Iterator[tuple[Tensor, Tensor]], num_counted: int, gas: int
    ) -> float:
        """One optimizer step; returns the loss of this rank's rows, in nats per counted token."""
        total = torch.zeros((), device=self.engine.device)
        for ids, targets in micro_batches:
            summed = self.engine(ids, targets)
            # DeepSpeed divides by accumulation steps and by ranks; the mean is over tokens.
            self.engine.backward(summed * (gas * self.world_size / num_counted))
            self.engine.step()
            total += summed.detach()
        if self.world_size > 1:
            distributed.all_reduce(total)
        return float(total) / num_counted

    def state(self, step: int) -> State:
        """Whole weights and moments on the CPU; every rank must ask, rank 0 gets them."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            found = {name: safe_get_full_fp32_param(parameter)}
            for moment in MOMENTS:
                found[f"{moment}/{name}"] = safe_get_full_optimizer_state(parameter, moment)
            if distributed.get_rank() == 0:
                tensors |= {key: value.detach().cpu().clone() for key, value in found.items()}
        return State(step=step, tensors=tensors)

    def restore(self, state: State) -> None:
        """Put a checkpoint back; the optimizer must have made a step, so that its state exists."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self.parameters.items():
            weight = state.tensors[name].to(self.engine.device)
            safe_set_full_fp32_param(parameter, weight)
            with self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(weight)
            for moment in MOMENTS:
                value = state.tensors[f"{moment}/{name}"].to(self.engine.device)
                safe_set_full_optimizer_state(parameter, value, moment)
        for inner in self.optimizer.optimizer.state.values():
            inner["step"].fill_(state.step)
        self.engine.global_steps = state.step
        self.schedule.last_epoch = state.step - 1
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


def train(
    model: PreTrainedModel,
    corpus: Corpus,
    recipe: Training,
    *,
    seed: int,
    stream: str,
    device: torch.device,
    state: State | None = None,
    save: Callable[[State], None] = lambda state: None,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[Mapping[str, Any]], None] = lambda facts: None,
) -> Trained:
    """Train to the recipe's last step, or until told to stop.

    `join` must have been called. Every rank calls this with the same arguments.

    Args:
        model: fresh weights on the CPU; its parameters are taken over.
        corpus: what is trained on.
        recipe: optimizer, batch, schedule, precision.
        seed: of the run.
        stream: name of the stream that orders the data.
        device: of this rank.
        state: a checkpoint to go on from.
        save: called on rank 0 with a checkpoint, at the recipe's interval and when told to stop.
        should_stop: looked at after every step.
        on_step: called on rank 0 with step, loss, learning rate, gradient norm and tokens a second.
    """
    schedule = Schedule.of(recipe, len(corpus.ids))
    engine = _Engine(model.to(DTYPES[recipe.dtype]), recipe, schedule, device)
    gas = recipe.batch_sequences // (recipe.micro_batch_sequences * engine.world_size)
    counted = corpus.counted
    losses: list[float] = []
    finished, step = True, 0

    def one_step(step: int, order: NDArray[np.int64]) -> tuple[float, int]:
        start = step % schedule.steps_per_epoch * recipe.batch_sequences
        chosen = order[start : start + recipe.batch_sequences]
        num_counted = int(counted[chosen].sum())
        rows = chosen.reshape(gas, engine.world_size, -1)[:, distributed.get_rank()]
        micro_batches = (_micro_batch(corpus, np.sort(part), device) for part in rows)
        return engine.step(micro_batches, max(1, num_counted), gas), num_counted

    if state is not None:
        one_step(0, seeding.permutation(seed, stream, 0, len(corpus.ids)))
        engine.restore(state)
        step = state.step
    order, order_epoch = None, -1
    while step < schedule.last:
        began = time.perf_counter()
        if order is None or order_epoch != step // schedule.steps_per_epoch:
            order_epoch = step // schedule.steps_per_epoch
            order = seeding.permutation(seed, stream, order_epoch, len(corpus.ids))
        rate = engine.schedule.get_last_lr()[0]
        loss, num_counted = one_step(step, order)
        step += 1
        losses.append(loss)
        norm = float(engine.engine.get_global_grad_norm() or 0.0)
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {norm}")
        if distributed.get_rank() == 0:
            seconds = time.perf_counter() - began
            on_step(
                {
                    "step": step,
                    "steps": schedule.last,
                    "loss": loss,
                    "learning_rate": rate,
                    "gradient_norm": norm,
                    "tokens_per_s": num_counted / seconds,
                }
            )
        stop = step < schedule.last and _any_rank(should_stop(), device)
        every = recipe.checkpoint_every_steps
        if stop or (every and step % every == 0 and step < schedule.last):
            made = engine.state(step)
            if distributed.get_rank() == 0:
                save(made)
        if stop:
            finished = False
            break
    weights = engine.weights() if finished else {}
    engine.close()
    return Trained(finished=finished, step=step, losses=losses, weights=weights)


def _any_rank(flag: bool, device: torch.device) -> bool:
    if distributed.get_world_size() == 1:
        return flag
    shared = torch.tensor(float(flag), device=device)
    distributed.all_reduce(shared)
    return bool(shared > 0)


def _micro_batch(
    corpus: Corpus, rows: NDArray[np.int64], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids [B, L] and the next token of each position [B, L], -100 where it does not count."""
    ids = torch.from_numpy(corpus.ids[rows].astype(np.int64)).to(device, non_blocking=True)
    position = torch.arange(1, ids.shape[1], device=device)
    stop = torch.from_numpy(corpus.stop[rows]).to(device)[:, None]
    counts = (position >= max(1, corpus.num_prompt)) & (position < stop)
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = torch.where(counts, ids[:, 1:], -100)
    return ids, targets


def describe(facts: Mapping[str, Any]) -> str:
    """One line of JSON for the training log."""
    return json.dumps({"time": round(time.time(), 3), **facts})
