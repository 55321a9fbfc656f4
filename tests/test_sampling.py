"""Draws are exact and depend only on a sequence's own random numbers."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import need
from models_for_tests import SHAPE, llama_of, small_model
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from kdhpc.models.dense import ACTIVATIONS
from kdhpc.models.devices import frozen_head
from kdhpc.models.huggingface import TransformersModel
from kdhpc.models.loading import load_model
from kdhpc.sampling import native
from kdhpc.sampling.decoding import DenseDecoder, TransformersDecoder, bucket_of
from kdhpc.sampling.draws import DRAWS, Gumbel, InverseCdf, philox, select
from kdhpc.sampling.native import NativeDecoder
from kdhpc.sampling.sampler import Prompt, Sampler, sample
from kdhpc.scoring.counting import Counting
from kdhpc.scoring.scorer import score
from kdhpc.selection import Selection

CPU = torch.device("cpu")
ENGINES = ["torch", "native"]


@pytest.fixture(autouse=True)
def need_native(request: pytest.FixtureRequest) -> None:
    """Skip tests of the extension where it is not built."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and "native" in callspec.params.values():
        need(not native.missing(), f"the extension: {native.missing()}")


def sampler(model: Any, **changes: Any) -> Sampler:
    options: dict[str, Any] = {
        "prompts": [Prompt(ids=(2, 3))],
        "length": 10,
        "batch_rows": 32,
        "selection": Selection(),
        "draw": "inverse_cdf",
        "counting": Counting(num_prompt=2, eos=0, count_eos=True),
    }
    model = llama_of(model) if isinstance(model, PreTrainedModel) else model
    return Sampler(model, **(options | changes))


def draw_of(engine: str, logits: torch.Tensor, uniform: float) -> Any:
    """Draw from one row of logits with one uniform number."""
    kind = native.NativeDraw if engine == "native" else InverseCdf
    drawn = kind(Selection(), 1, 1, CPU)
    drawn.uniform.fill_(uniform)
    return drawn(logits, torch.tensor([0]))


def draw(model: Any, rows: range = range(64), **changes: Any) -> Any:
    return sample(sampler(model, **changes), rows=rows, seed=0, stream="test")


DECODERS: dict[str, Any] = {
    "torch": lambda model, *sizes: DenseDecoder(llama_of(model), *sizes),
    "native": lambda model, *sizes: NativeDecoder(llama_of(model), *sizes),
    "transformers": lambda model, *sizes: TransformersDecoder(TransformersModel(model), *sizes),
}


def test_ids_beyond_16_bits_are_drawn_and_scored() -> None:
    model = small_model(70_000, 6, shape=replace(SHAPE, hidden=16, init_std=0.02))
    drawn = draw(model, length=6)
    assert drawn.ids.dtype == np.uint32
    assert drawn.ids.max() > 2**16
    counting = Counting(num_prompt=2, eos=0, count_eos=True)
    scored = score(llama_of(model), drawn, counting=counting, batch_rows=32, head_tokens=64)
    assert np.allclose(scored[1.0].log_prob_sum, drawn.log_prob_sum, atol=1e-3)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_decoded_logits_equal_a_forward_pass(decoder: str, kv_heads: int) -> None:
    length = 40  # three buckets of keys
    shape = replace(SHAPE, hidden=192, heads=6, kv_heads=kv_heads)
    model = small_model(300, length, shape=shape)
    ids = torch.randint(0, 300, (5, length), generator=torch.Generator().manual_seed(0))
    decoding = DECODERS[decoder](model, 5, length)
    with torch.inference_mode():
        for _ in range(2):  # in the second round the cache still holds the keys of the first
            decoding.restart()
            stepped = [
                decoding.step(ids[:, t], torch.tensor([t]), bucket_of(t, CPU, length))
                for t in range(length)
            ]
            whole = model(ids).logits
            # Whole rows in float32 themselves differ from float64 by 3e-4 in this model.
            assert torch.allclose(torch.stack(stepped, dim=1), whole, atol=5e-4)


@pytest.mark.parametrize("decoder", ["torch", "native"])
def test_bfloat16_decoders_agree_with_transformers_to_its_own_rounding(decoder: str) -> None:
    model = small_model(300, 40, shape=replace(SHAPE, hidden=192, heads=6, kv_heads=2))
    exact = model(ids := torch.randint(0, 300, (5, 40))).logits
    model.to(torch.bfloat16)
    decoding = DECODERS[decoder](model, 5, 40)
    with torch.inference_mode():
        stepped = torch.stack(
            [decoding.step(ids[:, t], torch.tensor([t]), bucket_of(t, CPU, 40)) for t in range(40)],
            dim=1,
        )
    rounding = (model(ids).logits - exact).square().mean().sqrt()
    assert (stepped - exact).square().mean().sqrt() < 1.5 * rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "cap"), [(176, 0.0), (40, 0.0), (100, 2.0)])
@pytest.mark.parametrize("position", [0, 15, 63, 64, 150])
def test_attention_of_the_extension_is_that_of_a_float64_reference(
    position: int, window: int, cap: float, dtype: torch.dtype
) -> None:
    """Heads of 96 take four vectors and two more; six of them share keys, four and two at once."""
    need(not native.missing(), f"the extension: {native.missing()}")
    rows, kv_heads, groups, size, length = 3, 2, 6, 96, 176
    numbers = torch.Generator().manual_seed(position)
    keys = torch.randn(rows, kv_heads, size, length, generator=numbers).to(dtype)
    values = torch.randn(rows, kv_heads, length, size, generator=numbers).to(dtype)
    mixed = torch.randn(rows, (groups + 2) * kv_heads, size, generator=numbers).to(dtype)
    still = torch.ones(length, size, dtype=dtype), torch.zeros(length, size, dtype=dtype)
    out = torch.ops.kdhpc.attend(
        mixed.flatten(1), keys, values, *still, torch.tensor([position]), groups, 0.1, window, cap
    )
    parts = torch.split(mixed.double(), [groups * kv_heads, kv_heads, kv_heads], 1)
    assert torch.equal(keys[..., position].double(), parts[1])
    assert torch.equal(values[:, :, position].double(), parts[2])
    query = parts[0].view(rows, kv_heads, groups, size)
    seen = slice(max(0, position + 1 - window), position + 1)
    scores = 0.1 * query @ keys.double()[..., seen]
    scores = cap * (scores / cap).tanh() if cap else scores
    exact = scores.softmax(-1) @ values.double()[:, :, seen]
    error = (out.double() - exact.flatten(1)).abs().max()
    assert error < (0.02 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_activations_of_the_extension_are_those_of_torch_everywhere(
    activation: str, dtype: torch.dtype
) -> None:
    need(not native.missing(), f"the extension: {native.missing()}")
    gate = torch.linspace(-1000, 1000, 4096).to(dtype).view(4, 1024)
    gate[0] = torch.linspace(-6, 6, 1024)
    product = torch.ops.kdhpc.activate(
        torch.cat([gate, torch.ones_like(gate)], dim=1), activation != "silu"
    )
    assert torch.allclose(
        product,
        ACTIVATIONS[activation](gate),
        rtol=0.01 if dtype == torch.bfloat16 else 1e-5,
        atol=0.01 if dtype == torch.bfloat16 else 1e-6,
    )


@pytest.mark.parametrize("vocab_size", [64, 300])
def test_the_head_of_the_extension_has_float32_results(vocab_size: int) -> None:
    """This holds whether or not oneDNN's small kernels can multiply bfloat16 here."""
    need(not native.missing(), f"the extension: {native.missing()}")
    model = llama_of(small_model(vocab_size, 16).to(torch.bfloat16))
    hidden = torch.randn(8, model.hidden_size).bfloat16()
    exact = hidden.double() @ model.head_weight.double().T
    logits = NativeDecoder(model, 8, 16).head(hidden)
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-5 * exact.abs().max()


def test_a_batch_leaves_nothing_to_the_next() -> None:
    model = small_model(300, 10)
    reused = sampler(model)
    first = sample(reused, rows=range(32), seed=0, stream="test")
    decoder: Any = reused.decoder
    decoder.keys.fill_(torch.nan)
    decoder.values.fill_(torch.nan)
    again = sample(reused, rows=range(32), seed=0, stream="test")
    assert np.array_equal(first.ids, again.ids)
    assert np.array_equal(first.log_prob_sum, again.log_prob_sum)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_row_of_nan_changes_no_other_row(decoder: str) -> None:
    length = 40
    model = small_model(300, length)
    model.get_input_embeddings().weight.data[7] = torch.nan
    ids = torch.randint(8, 300, (5, length))
    ids[3, 5] = 7
    decoding = DECODERS[decoder](model, 5, length)
    with torch.inference_mode():
        decoding.restart()
        for t in range(length):
            logits = decoding.step(ids[:, t], torch.tensor([t]), bucket_of(t, CPU, length))
            assert torch.isfinite(logits[[0, 1, 2, 4], :7]).all()
    assert logits[3].isnan().all()


def test_a_llama_with_another_activation_goes_through_transformers(tmp_path: Path) -> None:
    model = small_model(300, 10)
    model.config.hidden_act = "gelu"
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="float32", device=CPU)
    assert sampler(loaded).decoder.name == "transformers"


def test_bfloat16_logits_are_the_exact_products_of_what_they_are_made_from() -> None:
    hidden, weight = torch.randn(8, 64).bfloat16(), torch.randn(500, 64).bfloat16()
    exact = hidden.double() @ weight.double().T
    assert (frozen_head(weight)(hidden) - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tau", [1.0, 0.8, 0.5])
@pytest.mark.parametrize("method", ["inverse_cdf", "gumbel"])
def test_sequences_follow_the_exact_distribution(tau: float, method: str, engine: str) -> None:
    """Every sequence of three tokens over a vocabulary of five is enumerated."""
    model = small_model(5, 4)
    num, eos = 20000, 0
    samples = draw(
        model,
        range(num),
        prompts=[Prompt(ids=(2,))],
        length=4,
        batch_rows=1000,
        selection=Selection(tau=tau),
        draw=method,
        engine=engine,
    )
    expected: dict[tuple[int, ...], float] = {}
    for tokens in itertools.product(range(5), repeat=3):
        ended = tokens.index(eos) + 1 if eos in tokens else 3
        kept = tokens[:ended] + (0,) * (3 - ended)
        if kept != tokens:
            continue
        ids = torch.tensor([[2, *tokens]])
        log_p = (model(ids).logits.double() / tau).log_softmax(-1)[0]
        expected[tokens] = float(np.exp(sum(log_p[i, tokens[i]].item() for i in range(ended))))
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-6)
    counts = dict.fromkeys(expected, 0)
    for row in samples.ids[:, 1:]:
        counts[tuple(int(token) for token in row)] += 1
    common = [key for key, p in expected.items() if p * num >= 5]
    observed = [counts[key] for key in common]
    wanted = [expected[key] * num for key in common]
    observed.append(num - sum(observed))
    wanted.append(num - sum(wanted))
    if wanted[-1] < 5:
        observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    assert stats.chisquare(observed, np.array(wanted) * (num / sum(wanted))).pvalue > 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_a_token_of_rank_beyond_50_appears(engine: str) -> None:
    model = small_model(300, 4)
    samples = draw(
        model, range(4096), prompts=[Prompt(ids=(2,))], length=2, batch_rows=1024, engine=engine
    )
    order = model(torch.tensor([[2]])).logits[0, -1].argsort(descending=True)
    rare = set(order[50:].tolist())
    assert sum(int(token) in rare for token in samples.ids[:, 1]) > 100


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("index", [2, 255, 256, 599])
def test_a_token_of_probability_2_to_the_minus_30_is_drawn_as_often_as_it_should(
    index: int, engine: str
) -> None:
    """The uniforms that draw it are an interval as long as its probability, wherever it is."""
    logits = torch.full((1, 600), -torch.inf)
    logits[0, 0] = logits[0, 400] = 0.0
    logits[0, index] = -30 * np.log(2.0)

    def first_uniform(token: int) -> float:
        """Return the least uniform that draws this token or a later one, by bisection."""
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            drawn, log_prob, _ = draw_of(engine, logits, middle)
            if drawn == index:
                assert log_prob.item() == pytest.approx(np.log(share), rel=1e-6)
            low, high = (low, middle) if drawn >= token else (middle, high)
        return high

    share = 2.0**-30 / (2 + 2.0**-30)
    stretch = first_uniform(index + 1) - first_uniform(index)
    assert stretch == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_uniform_draws_an_impossible_token(engine: str) -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[:, 300] = logits[:, 700] = 0.0
    for uniform, wanted in ((0.0, 300), (0.5, 700), (1 - 2.0**-53, 700), (0.5 - 2.0**-53, 300)):
        assert draw_of(engine, logits, uniform)[0].item() == wanted


@pytest.mark.parametrize("tau", [1.0, 0.7])
@pytest.mark.parametrize("method", ["inverse_cdf", "gumbel", "native"])
def test_draws_give_the_log_probabilities_of_what_they_drew(method: str, tau: float) -> None:
    logits = torch.randn(64, 1001) * 3
    drawn = (DRAWS | {"native": native.NativeDraw})[method](Selection(tau=tau), 64, 4, CPU)
    drawn.load(0, [("u", row) for row in range(64)])
    tokens, log_prob_tau, log_prob = drawn(logits, torch.tensor([2]))
    for reported, divisor in ((log_prob_tau, tau), (log_prob, 1.0)):
        exact = (logits.double() / divisor).log_softmax(1).gather(1, tokens[:, None]).squeeze(1)
        assert torch.allclose(reported, exact, atol=2e-6)


def test_engines_draw_the_same_tokens() -> None:
    """Tokens are the same except where, rarely, rounding moves a uniform over an edge."""
    need(not native.missing(), f"the extension: {native.missing()}")
    model = small_model(300, 40)
    endless = Counting(num_prompt=2, eos=-1, count_eos=True)
    parts = [
        draw(model, range(256), length=40, engine=engine, counting=endless) for engine in ENGINES
    ]
    same = (parts[0].ids == parts[1].ids).all(axis=1)
    assert same.mean() > 0.99
    sums = [part.log_prob_sum[same] for part in parts]
    assert np.abs(sums[0] - sums[1]).max() < 1e-4 * 40


def test_without_the_extension_plain_torch_does_the_work_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = small_model(300, 10, shape=replace(SHAPE, hidden=32))
    fallback = sampler(model, engine="native")
    assert fallback.decoder.name == "dense"
    assert "sampling.engine=native: " in caplog.text
    assert "plain torch does the work" in caplog.text
    assert not native.usable(llama_of(model), "scoring.engine")
    assert "scoring.engine=native: " in caplog.text


def test_philox_gives_the_published_words() -> None:
    """The known answers are those that the authors ship with Random123."""
    known = [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]  # fmt: skip
    for counter, key, answer in known:
        words = [torch.tensor(int(word, 16)) for word in f"{counter} {key}".split()]
        assert [f"{int(word):08x}" for word in philox(words[:4], words[4:])] == answer.split()


def test_gumbel_noise_depends_on_sequence_position_and_token_only() -> None:
    drawn = Gumbel(Selection(), 3, 8, CPU)
    drawn.load(5, [("noise", row) for row in range(10, 13)])
    whole = drawn.noise(torch.tensor([4]), range(1001))
    parts = [drawn.noise(torch.tensor([4]), part) for part in (range(500), range(500, 1001))]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    assert not torch.equal(whole, drawn.noise(torch.tensor([5]), range(1001)))
    drawn.load(5, [("noise", row) for row in range(12, 15)])
    assert torch.equal(whole[2], drawn.noise(torch.tensor([4]), range(1001))[0])
    many = torch.cat([drawn.noise(torch.tensor([p]), range(20000)) for p in range(5)])
    assert stats.kstest(many.flatten().numpy(), "gumbel_r").pvalue > 1e-4


@pytest.mark.parametrize("method", ["inverse_cdf", "gumbel"])
@pytest.mark.parametrize(
    "selection", [Selection(), Selection(tau=0.8), Selection(top_k=5, top_p=0.9)]
)
def test_a_step_never_waits_for_the_device(method: str, selection: Selection) -> None:
    """No value is read, nothing is copied from the host, and no shape depends on data."""

    seen: list[tuple[str, list[tuple[int, ...]]]] = []

    class Look(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            outs = out if isinstance(out, tuple | list) else [out]
            shapes = [tuple(x.shape) for x in outs if isinstance(x, torch.Tensor)]
            seen.append((func._schema.name, shapes))
            return out

    decoding = sampler(small_model(300, 10), draw=method, selection=selection)
    decoding.draw.load(0, [("test", row) for row in range(32)])
    traces = []
    for start in (range(32), range(32, 64)):
        decoding.draw.load(0, [("test", row) for row in start])
        seen.clear()
        with torch.inference_mode(), Look():  # type: ignore[no-untyped-call]
            decoding.step(10)
        traces.append(list(seen))
    assert traces[0] == traces[1]
    names = {name for name, _ in traces[0]}
    assert "aten::index_copy_" in names
    assert not names & {
        "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::item",
        "aten::unique", "aten::is_nonzero", "aten::lift_fresh", "aten::scalar_tensor",
    }  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["inverse_cdf", "gumbel"])
def test_ids_do_not_depend_on_shards_or_order(method: str, engine: str) -> None:
    model = small_model(300, 10)
    whole = draw(model, range(100), draw=method, engine=engine)
    parts = [
        draw(model, r, draw=method, engine=engine)
        for r in (range(64, 100), range(32), range(32, 64))
    ]
    again = np.concatenate([parts[1].ids, parts[2].ids, parts[0].ids])
    assert np.array_equal(whole.ids, again)
    assert np.array_equal(whole.log_prob_sum[:32], parts[1].log_prob_sum)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_end_at_eos_and_stay_empty_after_it(engine: str) -> None:
    samples = draw(small_model(5, 10), range(256), engine=engine)
    ended = samples.ids[np.arange(256), samples.length - 1] == 0
    assert ended.any()
    for row, length in zip(samples.ids, samples.length, strict=True):
        assert (row[length:] == 0).all()
        assert (row[2 : length - 1] != 0).all()
    assert (samples.length[~ended] == 10).all()


def test_truncations_keep_only_the_likely_tokens() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    kept = select(logits, Selection(top_k=2)) > -torch.inf
    assert kept.tolist() == [[True, True, False, False]]
    kept = select(logits, Selection(top_p=0.81)) > -torch.inf
    assert kept.tolist() == [[True, True, True, False]]


def test_a_saved_model_samples_the_same_ids(tmp_path: Path) -> None:
    model = small_model(300, 10)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="float32", device=CPU)
    assert np.array_equal(draw(model).ids, draw(loaded).ids)
