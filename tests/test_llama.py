"""kdhpc's own Llama agrees with transformers' on the same checkpoint folder."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import SHAPE, llama_of, small_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kdhpc.errors import DamagedError, InputError
from kdhpc.models import devices, huggingface
from kdhpc.models.dense import CPU_BODY_TOKENS, Dense, fits
from kdhpc.models.loading import count_parameters, load_model
from kdhpc.models.tokenizer import Tokenizer

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def logits_of(model: Dense, ids: torch.Tensor) -> torch.Tensor:
    return model.head(model.hidden(ids).flatten(0, 1)).view(*ids.shape, -1)


@pytest.mark.parametrize("changes", [
    {},
    {"num_key_value_heads": 6},
    {"num_key_value_heads": 1, "head_dim": 48},
    {"tie_word_embeddings": True, "num_key_value_heads": None},
    {"rope_parameters": LLAMA3},
])  # fmt: skip
def test_a_folder_gives_the_logits_that_transformers_gives(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 192, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }  # fmt: skip
    made = LlamaForCausalLM(LlamaConfig(**(sizes | changes)))
    made.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_model(tmp_path, dtype="float32", device=CPU)
    assert isinstance(loaded, Dense)
    ids = torch.randint(
        0, 300, (3, CPU_BODY_TOKENS // 2 - 11)
    )  # more rows than go through the layers together
    with torch.inference_mode():
        exact = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        assert (logits_of(loaded, ids) - exact).abs().max() < 1e-4 * exact.abs().max()


def test_bfloat16_logits_are_as_near_to_exact_ones_as_those_of_transformers() -> None:
    model = small_model(300, 40, shape=replace(SHAPE, hidden=192, heads=6, kv_heads=2))
    ids = torch.randint(0, 300, (5, 40))
    with torch.inference_mode():
        exact = model(ids).logits
        model.to(torch.bfloat16)
        rounding = (model(ids).logits - exact).square().mean().sqrt()
        assert (logits_of(llama_of(model), ids) - exact).square().mean().sqrt() < 1.2 * rounding


def test_a_checkpoint_that_is_cut_off_or_of_another_shape_is_damaged(tmp_path: Path) -> None:
    small_model(300, 16).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"intermediate_size": 48', '"intermediate_size": 49'))
    with pytest.raises(
        DamagedError, match=r"gate_proj\.weight is \[48, 64\]; the config says \[49, 64\]"
    ):
        load_model(tmp_path, dtype="float32", device=CPU)
    config.write_text(whole.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(DamagedError, match=r"model\.layers\.2"):
        load_model(tmp_path, dtype="float32", device=CPU)
    config.write_text(whole.replace('"rope_theta"', '"rope"'))
    with pytest.raises(DamagedError, match="rope_theta"):
        load_model(tmp_path, dtype="float32", device=CPU)
    config.write_text(whole.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    with pytest.raises(DamagedError, match=r"config\.json has no place for model\.layers\.1"):
        load_model(tmp_path, dtype="float32", device=CPU)
    config.write_text(whole)
    [weights] = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DamagedError, match="not a model checkpoint"):
        load_model(tmp_path, dtype="float32", device=CPU)


def test_a_model_that_is_larger_than_the_memory_is_refused_in_one_line(
    tmp_path: Path,
) -> None:
    """Its file is sparse: only the header, which says how large it is, takes space."""
    assert (
        10**9 < devices.memory_of(CPU) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    (tmp_path / "config.json").write_text(json.dumps(small_model(300, 16).config.to_dict()))
    number = devices.memory_of(CPU) // 4 + 1
    tensor = {"dtype": "F32", "shape": [number], "data_offsets": [0, 4 * number]}
    header = json.dumps({"model.embed_tokens.weight": tensor}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * number)
    assert count_parameters(tmp_path) == number
    with pytest.raises(InputError, match=r"GB in float32, more than the .*Large models") as refused:
        load_model(tmp_path, dtype="float32", device=CPU)
    assert "\n" not in str(refused.value)


def test_prompts_have_the_ids_that_transformers_gives(tmp_path: Path) -> None:
    huggingface.byte_tokenizer().save_pretrained(tmp_path)
    ours, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The", " a  b\n", "<|endoftext|>x", "ä€"):
        assert ours.prompt_ids(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert (ours.eos, ours.size) == (theirs.eos_token_id, len(theirs))
    with pytest.raises(InputError, match="makes no token"):
        ours.prompt_ids("")


@pytest.mark.parametrize("eos", [{"content": "<|endoftext|>"}, "nowhere", None, [1]])
def test_a_tokenizer_names_its_end_or_is_refused(eos: Any, tmp_path: Path) -> None:
    huggingface.byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    if isinstance(eos, dict):
        assert Tokenizer(tmp_path).eos == 0
        return
    with pytest.raises(InputError, match="no end-of-sequence token"):
        Tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused_and_a_broken_one_is_damaged(
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DamagedError, match=r"not a readable tokenizer\.json"):
        Tokenizer(tmp_path)


def test_quantised_weights_are_not_for_the_own_llama() -> None:
    config = small_model(300, 16).config.to_dict()
    assert fits(config)
    assert not fits(config | {"quantization_config": {"quant_method": "fp8"}})
    assert not fits(config | {"hidden_act": "relu"})
    assert not fits(config | {"is_causal": False})


def test_fields_of_other_families_do_not_count() -> None:
    model = small_model(300, 16)
    weights = model.state_dict()
    others = {"query_pre_attn_scalar": 7, "final_logit_softcapping": 3.0, "hidden_activation": "x"}
    config = model.config.to_dict() | others
    assert fits(config)
    made = Dense(config, weights.__getitem__, dtype=torch.float32, device=CPU)
    ids = torch.arange(8)[None]
    assert torch.equal(logits_of(made, ids), logits_of(llama_of(model), ids))


@pytest.mark.parametrize("kind", ["llama", "transformers"])
def test_lack_of_memory_is_not_damage(kind: str, tmp_path: Path) -> None:
    model = small_model(300, 16, shape=replace(SHAPE, ffn=2_000_000))
    model.config.hidden_act = "silu" if kind == "llama" else "gelu"
    model.save_pretrained(tmp_path)
    code = f"""
import resource
from pathlib import Path
import torch, transformers
from kdhpc.models import huggingface
from kdhpc.cluster.failures import of_exception
from kdhpc.models.loading import load_model
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29,) * 2)
try:
    load_model(Path({str(tmp_path)!r}), dtype="float32", device=torch.device("cpu"))
except Exception as error:
    print(of_exception(error)[:2])
"""
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    assert shown.stdout.startswith("('OOM', "), shown.stdout + shown.stderr


def test_sampling_and_scoring_load_nothing_of_transformers(tmp_path: Path) -> None:
    """Loading transformers would be more than half of the start of a task."""
    small_model(300, 16).save_pretrained(tmp_path)
    huggingface.byte_tokenizer().save_pretrained(tmp_path)
    code = f"""
import sys
from pathlib import Path
from kdhpc.models import loading
from kdhpc.scoring import likelihood
from kdhpc.cluster import task
from kdhpc.experiment.stages import sample, score
loaded = loading.load(Path({str(tmp_path)!r}), "float32", "cpu")
assert loaded.model.kind == "llama" and loaded.tokenizer.eos == 0
unwanted = "transformers torch._dynamo sympy scipy datasets pandas deepspeed".split()
print([name for name in unwanted if name in sys.modules])
"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]"
