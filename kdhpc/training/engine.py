"""A wrapper of DeepSpeed around one model: steps, checkpoints and weights."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from transformers import PreTrainedModel, get_wsd_schedule

from kdhpc.config.model import Training
from kdhpc.errors import InputError
from kdhpc.models import attention
from kdhpc.models.devices import DTYPES
from kdhpc.models.head import Logits
from kdhpc.models.loading import LanguageModel
from kdhpc.models.sizes import BUCKET
from kdhpc.training.data import Batch
from kdhpc.training.loss import Soft, loss_of_chunk, summed_nll
from kdhpc.training.ranks import from_first, summed
from kdhpc.training.schedule import Schedule

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class State:
    """A checkpoint: everything that a later process needs to resume."""

    step: int
    """Number of steps done."""
    tensors: Mapping[str, Tensor]
    """Float32 weights by name, and moments as `exp_avg/<name>` and `exp_avg_sq/<name>`."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A finished model whose distributions a student learns."""

    model: LanguageModel
    """The model as it is sampled, whole on every rank."""
    tau: float
    """Temperature of its distributions."""
    left_out: tuple[int, ...] = ()
    """As in `Soft`."""

    @torch.no_grad()
    def soft(self, ids: Tensor) -> Soft:
        """Return the distributions over the next token at all positions of rows [B, L] of ids."""
        hidden = self.model.hidden(ids).flatten(0, 1)
        return Soft(hidden=hidden, head=self.model.head, tau=self.tau, left_out=self.left_out)


class _Head(nn.Module):
    """The output layer and the loss in one module, so that ZeRO-3 gathers the weight for both."""

    def __init__(self, model: PreTrainedModel, settings: Training) -> None:
        super().__init__()
        layer = model.get_output_embeddings()
        self.weight, self.bias = layer.weight, getattr(layer, "bias", None)
        self.form = Logits.of(model.config.get_text_config())
        self.head_tokens = settings.head_tokens
        compiled = settings.compile
        self.chunk = torch.compile(loss_of_chunk, dynamic=False) if compiled else loss_of_chunk

    def forward(self, hidden: Tensor, targets: Tensor, gain: float, soft: Soft | None) -> Tensor:
        return summed_nll(
            hidden.flatten(0, 1),
            self.weight,
            targets.flatten(),
            bias=self.bias,
            form=self.form,
            head_tokens=self.head_tokens,
            gain=gain,
            soft=soft,
            chunk=self.chunk,
        )


class WithLoss(nn.Module):
    """The model and its loss in one module, which DeepSpeed requires."""

    def __init__(self, model: PreTrainedModel, settings: Training) -> None:
        super().__init__()
        self.model = model
        self.head = _Head(model, settings)

    def forward(
        self, ids: Tensor, targets: Tensor, gain: float, soft: Soft | None = None
    ) -> Tensor:
        """Sum the cross-entropy over the targets [B, L] that are not negative."""
        hidden = self.model.base_model(ids, use_cache=False).last_hidden_state
        total: Tensor = self.head(hidden, targets, gain, soft)
        return total


def deepspeed_config(settings: Training) -> dict[str, object]:
    """Return DeepSpeed's configuration, which depends on the training's settings alone."""
    config: dict[str, object] = {
        "train_batch_size": settings.batch_sequences,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.gradient_clip,
        "zero_optimization": {
            "stage": settings.zero_stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        },
        "steps_per_print": 10**9,
        # By default DeepSpeed sums gradients over micro-batches and ranks in the model's dtype.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {
            "enabled": settings.dtype == "bfloat16",
            # Add each gradient to its sum when it is there, so that not all of them exist twice.
            "immediate_grad_update": True,
        },
    }
    if settings.dtype == "float16":
        config["fp16"] = {"enabled": True, "loss_scale": settings.loss_scale}
    return config


def load_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device, without log lines.

    DeepSpeed takes the ordinal of its GPU from LOCAL_RANK, and the kind of its device from
    DS_ACCELERATOR or, if that is not set, from what the node has. LOCAL_RANK is made to say what
    `devices.pick_device` picked, and DS_ACCELERATOR if that is the CPU. A DS_ACCELERATOR that was
    set is kept, because vendors whose devices appear as `cuda` in torch have names of their own
    there.

    Raises:
        InputError: if DS_ACCELERATOR was set to a kind of device that was not picked.
    """
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator is not None and (accelerator == "cpu") != (device.type == "cpu"):
        raise InputError(
            f"DS_ACCELERATOR={accelerator}: the training runs on {device.type}; unset the variable "
            "or change the config's device"
        )
    import deepspeed
    from deepspeed.runtime import bf16_optimizer

    deepspeed.logger.setLevel(logging.ERROR)
    bf16_optimizer.see_memory_usage = lambda *args, **options: None  # it prints by itself
    # DeepSpeed 0.19 builds `ShareMemCommBuilder`, which compiles C++, only if this table allows it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def parts_to_compile(layer: Any, device: torch.device) -> Sequence[nn.Module]:
    """Return the parts of a layer that are compiled; each needs one graph for all layers.

    A GPU's time goes into small kernels, so that whole layers are worth it there. On CPUs that took
    minutes and gained less than to leave out attention (docs/log.md).
    """
    if device.type == "cpu":
        return layer.mlp, layer.input_layernorm, layer.post_attention_layernorm
    return (layer,)


class Engine:
    """Trains one model with DeepSpeed; every rank calls the same methods in the same order."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Training,
        schedule: Schedule,
        device: torch.device,
        length: int,
        teacher: Teacher | None = None,
    ) -> None:
        """Hand the model to DeepSpeed.

        Args:
            model: float32 weights on the CPU, which become the engine's.
            settings: optimizer, batch, ranks and dtype.
            schedule: steps of the learning-rate schedule.
            device: device of this rank.
            length: number of tokens of a row.
            teacher: a model whose distributions are learnt in place of tokens.

        Raises:
            InputError: if the environment sends DeepSpeed to another kind of device.
        """
        self.deepspeed = load_deepspeed(device)
        self.settings, self.device = settings, device
        self.teacher = teacher
        self.linear = functional.linear  # to be restored: ZeRO-3 replaces it in the whole process
        rank = distributed.get_rank()
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(distributed.get_world_size()))
        self.deepspeed.init_distributed(dist_backend=distributed.get_backend())
        model = model.to(device).train()
        # Keep the buffers, because DeepSpeed casts them too. Rotary frequencies in bfloat16 would
        # be off by 0.7 radians at the end of a row of 512 tokens, and would differ from those of
        # the saved model.
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.to(DTYPES[settings.dtype])
        attention.use_causal(model, length)
        if settings.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if settings.compile:
            torch.compiler.reset()  # the sizes of an earlier training count against a limit
            for layer in model.base_model.layers:
                for part in parts_to_compile(layer, device):
                    part.compile()
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.engine, self.optimizer, _, self.schedule = self.deepspeed.initialize(
            model=WithLoss(model, settings),
            optimizer=optimizer,
            lr_scheduler=lambda inner: get_wsd_schedule(
                inner,
                num_warmup_steps=round(settings.warmup_fraction * schedule.total),
                num_decay_steps=round(settings.decay_fraction * schedule.total),
                num_training_steps=schedule.total,
                decay_type="linear",
            ),
            config=deepspeed_config(settings),
            dist_init_required=False,
        )
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer)
        self.parameters = {
            name.removeprefix("model."): parameter
            for name, parameter in self.engine.module.named_parameters()
        }

    def step(self, batch: "Batch") -> float:
        """Do one optimizer step and return the loss in nats per counted token."""
        # DeepSpeed averages over accumulation steps and ranks. Multiplying by both undoes that, and
        # dividing by the counted tokens makes the loss a mean over tokens.
        share = self.settings.accumulation * self.settings.world_size / batch.num_counted
        gain = share * (self.settings.loss_scale if self.settings.dtype == "float16" else 1.0)
        total = torch.zeros((), device=self.device)
        for ids, targets in batch.parts:
            here = self._here(ids)
            soft = self.teacher and self.teacher.soft(here)
            nll = self.engine(here, self._here(targets), gain, soft)
            self.engine.backward(nll * share)
            self.engine.step()
            total += nll.detach()
        return float(summed(total)) / batch.num_counted

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    @torch.no_grad()
    def validate(self, batches: Iterator["Batch"]) -> float:
        """Return the loss of tokens over `batches` in nats per counted token."""
        total, num_counted = torch.zeros((), device=self.device), 0
        self.engine.eval()
        for batch in batches:
            num_counted += batch.num_counted
            for ids, targets in batch.parts:
                total += self.engine(self._here(ids), self._here(targets), 1.0)
        self.engine.train()
        return float(summed(total)) / max(1, num_counted)

    def gradient_norm(self) -> float:
        """Return the global norm of the last step's gradients before clipping."""
        if self.engine.skipped_steps:  # float16 overflowed because its loss scale is too large
            return float("inf")
        return float(self.engine.get_global_grad_norm() or 0.0)

    def state(self, step: int) -> State:
        """Gather whole weights and moments on rank 0's CPU; every rank must call this.

        On other ranks the tensors of the state are empty.
        """
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            gathered = {name: self._weight(parameter)}
            gathered |= {f"{moment}/{name}": self._moment(parameter, moment) for moment in MOMENTS}
            if distributed.get_rank() == 0:
                tensors |= {
                    key: value.detach().to("cpu", copy=True) for key, value in gathered.items()
                }
        return State(step=step, tensors=tensors)

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        weight: Tensor | None = safe_get_full_fp32_param(parameter)
        return parameter if weight is None else weight  # stage 0 keeps no second copy

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.settings.zero_stage == 0:
            state: Tensor = self._states()[parameter][moment]
            return state
        whole: Tensor = safe_get_full_optimizer_state(parameter, moment)
        return whole

    def _states(self) -> Mapping[nn.Parameter, dict[str, Tensor]]:
        """Return AdamW's state by parameter."""
        # With ZeRO, DeepSpeed wraps the optimizer.
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        states: Mapping[nn.Parameter, dict[str, Tensor]] = inner.state
        return states

    def restore(self, step: int, state: State | None) -> None:
        """Load rank 0's checkpoint on all ranks.

        The optimizer must have done a step before, so that its state exists.

        Args:
            step: number of steps done, the same on all ranks.
            state: the checkpoint; needed on rank 0 only.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        def whole(name: str, parameter: nn.Parameter) -> Tensor:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # with ZeRO-3 a rank has a part
            value = torch.empty(shape, device=self.device)
            return from_first(value if state is None else value.copy_(state.tensors[name]))

        for name, parameter in self.parameters.items():
            weight = whole(name, parameter)
            if self.settings.zero_stage > 0:
                safe_set_full_fp32_param(parameter, weight)
            with self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(weight)
            for moment in MOMENTS:
                value = whole(f"{moment}/{name}", parameter)
                if self.settings.zero_stage > 0:
                    safe_set_full_optimizer_state(parameter, value, moment)
                else:
                    self._moment(parameter, moment).copy_(value)
        for inner in self._states().values():
            inner["step"].fill_(step)
        self.engine.global_steps = step
        self.schedule.last_epoch = step - 1
        self.schedule.step()

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict on the CPU in the training dtype; it is empty except on rank 0."""
        state_dict = {}
        for name, parameter in self.parameters.items():
            with self.deepspeed.zero.GatheredParameters([parameter]):
                if distributed.get_rank() == 0:
                    state_dict[name] = parameter.detach().cpu().clone()
        return state_dict

    def close(self) -> None:
        """Release hooks and buffers, so that the next training in this process starts clean."""
        self.engine.destroy()
        functional.linear = self.linear
