"""What is decided about GPUs, on a machine without one: torch is told how many it should see."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo as dynamo
from commands import need
from models_for_tests import SHAPE, llama_of, small_model
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from kdhpc.cluster import failures
from kdhpc.config.model import Design
from kdhpc.errors import ClusterError, InputError
from kdhpc.models import attention, devices, huggingface
from kdhpc.models.dense import Dense
from kdhpc.sampling.decoding import DenseDecoder
from kdhpc.sampling.draws import DRAWS
from kdhpc.sampling.sampler import Prompt, Sampler, sample
from kdhpc.scoring.counting import Counting
from kdhpc.selection import Selection
from kdhpc.training.engine import load_deepspeed, parts_to_compile
from kdhpc.training.loss import summed_nll

CPU, META = torch.device("cpu"), torch.device("meta")
WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")
"""Operators after which the host waits for a GPU."""
VIEWS = (
    "_unsafe_view", "expand", "permute", "select", "slice", "split", "t", "transpose", "unbind",
    "unsqueeze", "view",
)  # fmt: skip
"""Operators that start no kernel."""


@pytest.fixture(scope="module", autouse=True)
def _deepspeed_has_seen_this_machine() -> None:
    """DeepSpeed looks for GPUs once in a process; let that be before a test pretends some."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator()


def show_gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Environment without a local rank and an accelerator; what a test sets is taken back."""
    for name in ("LOCAL_RANK", "DS_ACCELERATOR", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("num_visible", "local_rank", "ordinal"),
    [(1, None, 0), (1, "0", 0), (1, "3", 0), (4, None, 0), (4, "0", 0), (4, "1", 1), (4, "3", 3)],
)
def test_deepspeed_gets_the_ordinal_of_the_gpu_that_was_picked(
    environment: pytest.MonkeyPatch,
    device: str,
    num_visible: int,
    local_rank: str | None,
    ordinal: int,
) -> None:
    show_gpus(environment, num_visible)
    if local_rank is not None:
        environment.setenv("LOCAL_RANK", local_rank)
    picked = devices.pick_device(device)
    assert picked == torch.device("cuda", ordinal)
    load_deepspeed(picked)
    assert os.environ["LOCAL_RANK"] == str(ordinal)
    assert devices.pick_device(device) == picked, "the next shard of the task moved"


def test_a_local_rank_without_a_gpu_is_refused_in_one_line(environment: pytest.MonkeyPatch) -> None:
    show_gpus(environment, 4)
    environment.setenv("LOCAL_RANK", "4")
    with pytest.raises(InputError, match=r"local rank 4 sees 4 GPUs; .*gpus_per_node") as refused:
        devices.pick_device("auto")
    assert "\n" not in str(refused.value)
    assert devices.pick_device("cpu") == CPU
    show_gpus(environment, 0)
    assert devices.pick_device("auto") == CPU
    with pytest.raises(InputError, match="no GPU is visible"):
        devices.pick_device("cuda")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_slurm_gave_and_torch_does_not_see_is_the_nodes_fault(
    device: str, environment: pytest.MonkeyPatch
) -> None:
    show_gpus(environment, 0)
    environment.setenv("SLURM_JOB_GPUS", "2,3")
    with pytest.raises(ClusterError, match="Slurm gave this task GPU 2,3") as raised:
        devices.pick_device(device)
    assert failures.of_exception(raised.value)[0] == "GPU_BAD"
    assert devices.pick_device("cpu").type == "cpu"


def test_on_a_node_with_gpus_deepspeed_takes_the_cpu_if_the_config_says_so() -> None:
    """A fresh interpreter is needed, because DeepSpeed chooses once, when it is imported."""
    code = """
import torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 4
from kdhpc.models.devices import pick_device
from kdhpc.training.engine import load_deepspeed, parts_to_compile
print("CHOSE", load_deepspeed(pick_device("cpu")).accelerator.get_accelerator()._name)
"""
    environment = {name: v for name, v in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert "CHOSE cpu" in shown.stdout


@pytest.mark.parametrize(
    ("accelerator", "device"), [("cuda", "cpu"), ("klxpu", "cpu"), ("cpu", "cuda")]
)
def test_an_accelerator_that_contradicts_the_device_is_refused(
    environment: pytest.MonkeyPatch, accelerator: str, device: str
) -> None:
    environment.setenv("DS_ACCELERATOR", accelerator)
    with pytest.raises(InputError, match=f"DS_ACCELERATOR={accelerator}: .* runs on {device}"):
        load_deepspeed(torch.device(device))
    environment.setenv("DS_ACCELERATOR", device)
    load_deepspeed(torch.device(device))
    assert os.environ["DS_ACCELERATOR"] == device


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_products_cannot_widen_their_factors_are_widened(dtype: torch.dtype) -> None:
    """torch 2.13 has `mm` with an `out_dtype` for meta tensors, and none for the CPU."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(50, 16).to(dtype), torch.randn(3, 16).to(dtype)
    with Ops() as ops:
        logits = devices.widening_head(weight)(hidden)
    assert ops.count["_to_copy"] == 2  # the weight and the hidden states
    exact = hidden.double() @ weight.double().T
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-6 * exact.abs().max()
    head, there = devices.widening_head(weight.to(META)), hidden.to(META)
    with Ops() as ops:
        assert (head(there).dtype, head(there).shape) == (torch.float32, logits.shape)
    assert (ops.count["mm"], ops.count["_to_copy"]) == (2, 0)


@pytest.mark.filterwarnings("ignore:Flash attention")  # torch says why it cannot use a kernel
def test_attention_without_a_fused_kernel_is_refused_instead_of_slow() -> None:
    """On CPUs torch's fused kernel takes no values of another size; its plain one does."""
    query, value = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 6)
    assert torch.nn.functional.scaled_dot_product_attention(query, query, value).shape[-1] == 6
    with pytest.raises(InputError, match=r"size 8 in torch\.float32 on cpu: .*no fused") as refused:
        attention.fused(query, query, value)
    assert "\n" not in str(refused.value)
    with pytest.raises(RuntimeError, match="same dtype"):
        attention.fused(query, query.double(), query)


class Ops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that are called, by their names."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def assert_no_wait(self) -> None:
        assert self.count
        assert not [name for name in WAITING if self.count[name]]


SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32,
}  # fmt: skip
DESIGNS: dict[str, Design] = {
    "a shape": SHAPE,
    "Qwen 3": SMALL | {"model_type": "qwen3"},
    "Gemma 3": SMALL | {"model_type": "gemma3_text", "sliding_window": 72},
}


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("device", [CPU, META])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_never_makes_the_host_wait(
    design: str, device: torch.device, dtype: torch.dtype
) -> None:
    """On meta tensors the code is that of GPUs, but reading a value raises."""
    model = huggingface.new_model(DESIGNS[design], vocab_size=257, length=72, eos=0, seed=1)
    attention.use_causal(model, 72)
    assert model.config._attn_implementation == attention.NAME
    model = model.to(device, dtype).train()
    ids = torch.zeros((2, 72), dtype=torch.int64, device=device)
    with Ops() as ops:
        hidden: Tensor = model.base_model(ids, use_cache=False).last_hidden_state
        head = model.get_output_embeddings().weight
        summed_nll(hidden.flatten(0, 1), head, ids.flatten(), head_tokens=32).backward()  # type: ignore[no-untyped-call]
    ops.assert_no_wait()
    assert all(parameter.grad is not None for parameter in model.parameters())


def training_model(num_layers: int) -> Any:
    """Return a model in bfloat16 on meta tensors, on which the code is that of GPUs."""
    shape = dataclasses.replace(SHAPE, layers=num_layers)
    model = huggingface.new_model(shape, vocab_size=257, length=72, eos=0, seed=1)
    attention.use_causal(model, 72)
    return model.to(META, torch.bfloat16).train()


def pass_through(model: Any) -> None:
    """Do a forward and a backward pass without the head."""
    ids = torch.zeros((2, 72), dtype=torch.int64, device=META)
    model.base_model(ids, use_cache=False).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in model.base_model.parameters())


def test_a_layer_of_a_training_step_has_few_kernels() -> None:
    """The parts of attention count one by one here: two kernels on a GPU."""
    counts = []
    for num_layers in (2, 3):
        model = training_model(num_layers)
        with Ops() as ops:
            pass_through(model)
        counts.append(ops.count)
    of_a_layer = {k: v for k, v in (counts[1] - counts[0]).items() if k not in {*VIEWS, "detach"}}
    assert of_a_layer["mm"] == 3 * 7
    assert sum(of_a_layer.values()) <= 145, of_a_layer


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile itself reads it
@pytest.mark.parametrize("recomputes", [False, True])
def test_a_whole_layer_is_one_graph_where_it_is_compiled_on_gpus(recomputes: bool) -> None:
    """With `fullgraph` it is an error if something in it cannot be compiled; no code is made."""
    torch.compiler.reset()
    model = training_model(2)
    if recomputes:
        model.activation_checkpointing_enable({"use_reentrant": False})
    for layer in model.base_model.layers:
        [whole] = parts_to_compile(layer, META)
        whole.compile(backend="aot_eager", fullgraph=True)
    pass_through(model)
    torch.compiler.reset()


def test_a_validation_multiplies_by_the_head_once() -> None:
    """The weight still requires a gradient while the loss is only measured."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(64, 8), torch.randint(0, 50, (64,))
    weight = torch.randn(50, 8, requires_grad=True)
    with Ops() as training:
        learnt = summed_nll(hidden, weight, targets, head_tokens=32)
    with torch.no_grad(), Ops() as validation:
        measured = summed_nll(hidden, weight, targets, head_tokens=32)
    assert (training.count["mm"], validation.count["mm"]) == (6, 2)
    assert torch.equal(learnt, measured)


SIZES: dict[str, Any] = {
    "vocab_size": 257, "hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip


def model_of(family: str, num_layers: int, device: torch.device, dtype: torch.dtype) -> Dense:
    """Make a random model of a family that kdhpc decodes by itself."""
    with torch.device(device):
        config = AutoConfig.for_model(family, num_hidden_layers=num_layers, **SIZES)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = model.state_dict()
    return Dense(model.config.to_dict(), weights.__getitem__, dtype=dtype, device=device)


def decoding_step(family: str, num_layers: int, attends: str) -> tuple[Ops, int]:
    """Do a step on meta tensors; return its operators, and how often compiled pieces are called."""
    model = model_of(family, num_layers, META, torch.bfloat16)
    decoder = DenseDecoder(model, rows=4, length=128)
    decoder.attend_by(attends)
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        piece = getattr(decoder, name)

        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return piece(*arguments)

        return call

    for name in ("add_norm", "place", "activate"):
        setattr(decoder, name, counted(name))
    ids = torch.zeros(4, dtype=torch.int64, device=META)
    ops = Ops()
    with ops:
        logits = decoder.step(ids, torch.zeros(1, dtype=torch.int64, device=META), 64)
    assert (logits.shape, logits.dtype) == ((4, 257), torch.float32)
    return ops, calls.total()


@pytest.mark.parametrize(("family", "attends", "most"), [
    ("llama", "fused", 40), ("llama", "used", 30), ("qwen3", "used", 38), ("olmo2", "used", 49),
    ("gemma3_text", "used", 54), ("gemma2", "fused", 53),
])  # fmt: skip
def test_a_decoding_step_never_makes_the_host_wait_and_has_few_kernels(
    family: str, attends: str, most: int
) -> None:
    """Small models spend their time in launches. A piece that is compiled has one or two."""
    (two, pieces_of_two), (three, pieces_of_three) = (
        decoding_step(family, number, attends) for number in (2, 3)
    )
    three.assert_no_wait()
    of_a_layer = {k: v for k, v in (three.count - two.count).items() if k not in VIEWS}
    assert 20 < sum(of_a_layer.values()) <= most, of_a_layer
    products = of_a_layer.get("mm", 0) + of_a_layer.get("addmm", 0)
    assert (products, pieces_of_three - pieces_of_two) == (4, 4)
    if attends == "used":
        assert of_a_layer["_varlen_attn"] == 1


def read_used(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, max_q: int,
    max_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
    seqused_k: Tensor, num_splits: int,
) -> Tensor:  # fmt: skip
    """Do on a CPU, in float32, what torch documents of its kernel: one query for each sequence."""
    assert (max_q, enable_gqa, num_splits) == (1, True, 1)
    assert starts.tolist() == list(range(len(query) + 1))
    seen = []
    for row, (at, used) in enumerate(zip(key_starts.tolist(), seqused_k.tolist(), strict=False)):
        first = at + (max(0, used - 1 - window_size[0]) if window_size[0] >= 0 else 0)
        groups = query.shape[1] // key.shape[1]
        k, v = (x[first : at + used].repeat_interleave(groups, 1).float() for x in (key, value))
        scores = torch.einsum("hd,khd->hk", query[row].float(), k) * scale
        seen.append(torch.einsum("hk,khd->hd", scores.softmax(1), v))
    return torch.stack(seen).to(query.dtype)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "olmo2", "gemma2", "gemma3_text"])
def test_every_way_to_attend_gives_the_same_logits(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", read_used)
    monkeypatch.setitem(SIZES, "sliding_window", 5)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = model_of(family, 2, CPU, torch.float32)
    ids = torch.randint(0, 257, (3, 20))
    found = {}
    for attends in ("products", "fused", "used"):
        decoder = DenseDecoder(model, rows=3, length=20)
        decoder.attend_by(attends)
        with torch.inference_mode():
            steps = [
                decoder.step(ids[:, t], torch.tensor([t]), decoder.num_keys(t)) for t in range(20)
            ]
        found[attends] = torch.stack(steps)
    assert decoder.num_keys(0) == decoder.num_keys(19) == 20, "one graph serves all positions"
    if model.score_cap is not None:  # decoders do not take a kernel without caps for such a model
        del found["used"]
    for logits in found.values():
        assert (logits - found["products"]).abs().max() < 1e-4 * logits.abs().max()


def test_compiled_pieces_are_the_eager_ones_and_a_kernel_that_is_missing_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On a CPU there is no FlashAttention over the used length, and torch compiles to C++."""
    need(shutil.which("c++") is not None, "torch's compiler needs a C++ compiler")
    model = model_of("qwen3", 2, CPU, torch.bfloat16)
    eager, compiled = (DenseDecoder(model, rows=3, length=12) for _ in range(2))
    ids = torch.randint(0, 257, (3, 12))
    dynamo.utils.counters.clear()
    with torch.inference_mode():
        eager.attend_by("fused")
        compiled.settle()
        logits = [
            torch.stack([x.step(ids[:, t], torch.tensor([t]), 12) for t in range(12)])
            for x in (eager, compiled)
        ]
    assert compiled.attends == "fused"
    assert "attention over the used length does not work here" in caplog.text
    assert "compiling" not in caplog.text
    assert compiled.is_compiled
    # One graph for the first norm, one for the others, two for what is between products.
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 4
    # A compiled piece rounds to 16 bits at its end only.
    assert (logits[0] - logits[1]).abs().mean() < 0.03 * logits[0].abs().mean()


@pytest.mark.long
@pytest.mark.parametrize("draw", ["inverse_cdf", "gumbel"])
def test_a_compiled_draw_is_the_eager_one(draw: str, caplog: pytest.LogCaptureFixture) -> None:
    need(shutil.which("c++") is not None, "torch's compiler needs a C++ compiler")
    torch.manual_seed(0)
    logits, position = 3.0 * torch.randn(6, 700), torch.tensor([2])
    found = []
    for settles in (False, True):
        drawing = DRAWS[draw](Selection(), 6, 4, CPU)
        drawing.load(3, [("a", index) for index in range(6)])
        if settles:
            drawing.settle(logits)
        found.append(drawing(logits, position))
    assert "compiling" not in caplog.text
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], rtol=0.0, atol=1e-6)


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A CUDA graph on the CPU: it keeps the operators and tensors of a step and calls them again.

    As on a GPU, nothing has been computed when the capture ends, and a replay reads and writes the
    tensors of the capture, whatever the variables of the program refer to by then.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []
        self.num_replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((value, value.clone()))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @contextlib.contextmanager
    def captured(self, pool: Any) -> Iterator[None]:
        with self:
            yield
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, recorded in self.calls:
            result = func(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize("draw", ["inverse_cdf", "gumbel"])
def test_replayed_steps_draw_what_eager_steps_draw(
    monkeypatch: pytest.MonkeyPatch, draw: str
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: graph.captured(pool))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    drawn = []
    for capture in (False, True):
        sampler = Sampler(
            llama_of(small_model(257, 40)),
            prompts=[Prompt(ids=(2, 3))],
            length=40,
            batch_rows=4,
            selection=Selection(),
            draw=draw,
            counting=Counting(num_prompt=2, eos=0, count_eos=True),
        )
        decoder = sampler.decoder
        assert isinstance(decoder, DenseDecoder)
        decoder.attend_by("fused")
        sampler.capture = capture
        drawn.append(sample(sampler, rows=range(12), seed=0, stream="test"))
        graphs: Any = sampler.graphs
        assert {size: graph.num_replays > 10 for size, graph in graphs.items()} == (
            dict.fromkeys((16, 32, 40), True) if capture else {}
        )
    for eager, replayed in zip(*(vars(samples).values() for samples in drawn), strict=True):
        assert np.array_equal(eager, replayed)


@pytest.mark.parametrize("flags", ["fpu sse avx2", "fpu avx512_bf16", "asimd bf16"])
def test_a_cpu_without_bfloat16_is_noted_once(
    flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what Linux says of the CPU is replaced."""
    monkeypatch.setattr(Path, "read_text", lambda path: f"flags : {flags}\n")
    devices.note_slow_dtype.cache_clear()
    for dtype, device in (("float32", "cpu"), ("bfloat16", "cuda"), ("bfloat16", "cpu")) * 2:
        devices.note_slow_dtype(dtype, device)
    devices.note_slow_dtype.cache_clear()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == ("bf16" not in flags)
    assert all(line.startswith("note: this CPU has no instructions for bfloat16") for line in lines)
