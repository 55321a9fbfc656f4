"""Models with new weights of any architecture of transformers: checked, sized, made, trained."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from commands import ROOT
from test_given_models import differences_of_a_step
from toy_training import CPU, RECIPE, WIDTH, corpus, one_process

from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.config.model import Sizes, Training
from kdhpc.errors import InputError
from kdhpc.experiment.estimates import training_seconds
from kdhpc.experiment.stages.downstream import DownstreamSettings
from kdhpc.experiment.trainings import TrainSettings
from kdhpc.models import huggingface
from kdhpc.models.architectures import sizes_of
from kdhpc.models.sizes import num_parameters
from kdhpc.pipeline import LANGUAGE
from kdhpc.plan.shards import settings_of
from kdhpc.training.engine import State
from kdhpc.training.loop import Trained, Watch, train

NEW: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = NEW | {"num_key_value_heads": 2, "intermediate_size": 64}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": GATED | {"head_dim": 8},
    "gemma2": GATED | {"head_dim": 8, "sliding_window": 6},
    "gemma3_text": GATED | {"head_dim": 8},
    "phi": GATED,
    "gpt2": NEW,
    "granite": GATED | {"logits_scaling": 8.0},
    "cohere": GATED,
    "mixtral": GATED | {"num_local_experts": 4},
}
ARCHITECTURES = {name: {"model_type": name} | of for name, of in ARCHITECTURES.items()}
MAMBA: dict[str, Any] = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1}
QWEN = ARCHITECTURES["qwen3"]


def new(architecture: dict[str, Any], seed: int = 1) -> Any:
    torch.set_num_threads(1)
    return huggingface.new_model(architecture, vocab_size=257, length=WIDTH, eos=0, seed=seed)


def config_of(*words: str) -> LanguageConfig:
    return LANGUAGE.checked(presets.build(LanguageConfig, presets.compose(["tiny", *words])))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sizes_are_exact_and_weights_depend_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(5)
    one = new(ARCHITECTURES[name])
    torch.manual_seed(6)
    two, other = new(ARCHITECTURES[name]), new(ARCHITECTURES[name], seed=2)
    assert all(torch.equal(one.state_dict()[n], value) for n, value in two.state_dict().items())
    assert not all(
        torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True)
    )
    assert {p.dtype for p in one.parameters()} == {torch.float32}
    assert one.config.max_position_embeddings == WIDTH
    assert (one.config.vocab_size, one.config.eos_token_id, one.config.pad_token_id) == (
        257,
        0,
        None,
    )
    sizes = sizes_of(ARCHITECTURES[name], length=WIDTH)
    assert num_parameters(sizes, 257) == sum(p.numel() for p in one.parameters())
    assert (sizes.layers, sizes.hidden, sizes.attention) == (2, 32, 32)


def test_values_of_another_size_than_queries_keep_the_attention_of_transformers() -> None:
    architecture = NEW | {
        "model_type": "deepseek_v3", "num_key_value_heads": 4, "intermediate_size": 48,
        "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1,
    }  # fmt: skip
    loss, worst, has_own = differences_of_a_step(new(architecture))
    assert has_own
    assert max(loss, worst) < 1e-5


@pytest.mark.parametrize("name", ["gemma3_text", "cohere", "mixtral"])
def test_a_step_of_these_has_the_gradients_of_transformers_too(name: str) -> None:
    """The models of tests/test_given_models.py have short windows, and no experts."""
    loss, worst, has_own = differences_of_a_step(
        new(ARCHITECTURES[name] | {"initializer_range": 0.2})
    )
    assert not has_own
    assert max(loss, worst) < 1e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen33"}, "model_type=qwen33: transformers has no causal language model"),
        ({"model_type": "t5"}, "model_type=t5: transformers has no causal language model"),
        ({"model_type": "gemma3"}, "more parts than a decoder of text; expected gemma3_text"),
        (MAMBA, "model_type=mamba: keeps a state instead of keys and values"),
        (GATED | {"model_type": "llama4_text"}, "has no hidden states apart from its logits"),
        (QWEN | {"hiden_size": 64}, "hiden_size=64: transformers' Qwen3Config has no such field; "
         "did you mean hidden_size?"),
        (QWEN | {"hidden_size": "wide"}, "hidden_size=wide: Field 'hidden_size' expected int"),
        (QWEN | {"num_hidden_layers": 0}, "its layers=0: expected at least 1"),
        (QWEN | {"num_key_value_heads": 3}, "expected a divisor of that of the query heads, 32"),
        (QWEN | {"hidden_act": "loud"}, "cannot be built of these fields: no 'loud' is known"),
        (QWEN | {"head_dim": 7}, "RoPE requires an even rotary dimension"),
        (QWEN | {"layer_types": ["full_attention"]}, "equal to the number of `layer_types`"),
        (QWEN | {"vocab_size": 300}, "vocab_size=300: follows from the truth's tokenizer"),
        (QWEN | {"attention_dropout": 0.1}, "attention_dropout=0.1: expected 0"),
        (ARCHITECTURES["mixtral"] | {"router_jitter_noise": 0.1}, "jitter_noise=0.1: expected"),
        (GATED | {"model_type": "gemma4_text", "head_dim": 8}, "its sizes are not known"),
        (QWEN | {"max_position_embeddings": 8}, "max_position_embeddings=8: expected at least"),
        (ARCHITECTURES["gpt2"] | {"n_embd": 32}, "n_embd=32: is given twice"),
    ],
)  # fmt: skip
def test_what_transformers_cannot_build_is_refused_in_one_line(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        sizes_of(fields, length=WIDTH)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bert"} | NEW, "cannot be trained, because its logits are not what kdhpc"),
        ({"model_type": "qwen3_moe", "num_experts": 4} | NEW, "does not run with these fields"),
    ],
)
def test_what_only_shows_with_weights_is_refused_too(fields: dict[str, Any], message: str) -> None:
    sizes_of(fields, length=24)
    with pytest.raises(InputError, match=message):
        huggingface.check_architecture(fields, length=24)


def test_a_model_that_draws_random_numbers_in_training_is_refused() -> None:
    model = new(ARCHITECTURES["gpt2"])
    huggingface._check_trainable(model)
    model.transformer.drop.p = 0.1
    with pytest.raises(InputError, match="model type gpt2: draws random numbers in training"):
        huggingface._check_trainable(model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["students.small.architecture.model_type=qwen3"], "students.small.architecture: expected"),
        (["teacher.shape=null"], "teacher.shape: expected an architecture"),
        (["teacher.shape=null", "teacher.architecture.hidden_size=8"], "model_type=None"),
        (["families", "teacher.training.compile=true"], "teacher.training.compile=true"),
        (["truth.shape=null"], "expected truth.shape or truth.architecture"),
    ],
)
def test_a_model_has_one_architecture(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_of(*words)


def test_values_take_the_types_that_they_say_from_words_and_files_alike() -> None:
    words = ["teacher.shape=null", "teacher.architecture.model_type=qwen3"]
    words += ["teacher.architecture.rms_norm_eps=1e-5", "teacher.architecture.attention_bias=True"]
    words += ["teacher.architecture.layer_types=[full_attention]"]
    words += ["teacher.architecture.rope_parameters={rope_type: default, rope_theta: 5e4}"]
    words += ["teacher.architecture.sliding_window=null", "teacher.architecture.hidden_size=64"]
    config = config_of(*words)
    assert config.teacher.architecture == {
        "model_type": "qwen3", "rms_norm_eps": 1e-5, "attention_bias": True,
        "layer_types": ["full_attention"], "sliding_window": None, "hidden_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    }  # fmt: skip
    stored = json.loads(json.dumps(presets.plain(config)))
    assert presets.build(LanguageConfig, stored) == config
    assert presets.build(LanguageConfig, presets.from_yaml(presets.to_yaml(config))) == config
    students = config_of("families").students["small"].architecture
    assert students is not None
    assert (students["sliding_window"], students["model_type"]) == (12, "gemma3_text")


def test_an_architecture_is_in_the_recipe_and_its_sizes_are_not() -> None:
    def arms(*words: str) -> dict[str, Any]:
        plan = LANGUAGE.plan(config_of("families", "truth.shape=null", *words))
        return {key: shard.arm for key, shard in plan.shards.items()}

    truth = [f"truth.architecture={json.dumps(QWEN)}"]
    one, wider = arms(*truth), arms(*truth, "students.small.architecture.intermediate_size=48")
    changed = {key for key in one.keys() & wider.keys() if one[key].recipe != wider[key].recipe}
    assert "train-on-truth/student-s0-small-direct/00000" in changed
    assert not changed & {"truth/truth/00000", "train-on-truth/teacher-s0/00000"}
    fields = json.loads(json.dumps(one["truth/truth/00000"].fields))
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    settings = settings_of({n: v for n, v in fields.items() if n in names}, TrainSettings)
    assert (settings.shape, settings.architecture) == (None, QWEN)
    assert all(
        "architecture" not in shard.arm.fields
        for shard in LANGUAGE.plan(config_of()).shards.values()
    )


def test_initial_weights_are_evaluated_in_either_form() -> None:
    config = config_of("families", "downstream.tasks=[truth_order]")
    arms = [shard.arm for shard in LANGUAGE.plan(config).stage("downstream")]
    initial = {
        arm.name: settings_of(json.loads(json.dumps(arm.fields)), DownstreamSettings).initial
        for arm in arms
    }
    small = initial["initial-small-on-truth_order"]
    assert small is not None
    assert small.architecture == config.students["small"].architecture
    assert small.shape is None


def test_sizes_are_measured_once_at_submission_and_decide_estimates() -> None:
    config = LANGUAGE.prepare(config_of("families"))
    assert {*config.sizes} == {"teacher", "students.small"}
    teacher = config.sizes["teacher"]
    assert (teacher.layers, teacher.hidden, teacher.key_values, teacher.ffn) == (1, 32, 16, 64)

    def seconds(sizes: Sizes) -> float:
        return training_seconds(config, "train-on-truth", sizes, Training(), 10.0)

    larger = dataclasses.replace(teacher, parameters=10**9)
    assert seconds(larger) > 1000 * seconds(teacher)
    taken = dataclasses.replace(config, sizes={**config.sizes, "teacher": larger})
    work = {shard.key: shard.work for shard in LANGUAGE.plan(taken).stage("train-on-truth")}[
        "train-on-truth/teacher-s0/00000"
    ]
    assert work > 1000


def test_a_submitted_run_is_planned_without_torch() -> None:
    stored = json.dumps(presets.plain(LANGUAGE.prepare(config_of("families"))))
    code = (
        "import json, sys\n"
        "from kdhpc.config import presets\n"
        "from kdhpc.pipeline import LANGUAGE\n"
        "config = presets.build(LANGUAGE.config, json.loads(sys.stdin.read()))\n"
        "print(len(LANGUAGE.plan(LANGUAGE.checked(config)).shards), {'torch'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=stored, capture_output=True, text=True, check=True,
        cwd=ROOT,
    )  # fmt: skip
    assert done.stdout == "48 set()\n"


def trained(name: str, recipe: Training, **options: Any) -> Trained:
    return train(
        new(ARCHITECTURES[name]), corpus(), recipe, seed=0, stream="test", device=CPU, **options
    )


@pytest.mark.parametrize(("name", "stages"), [("phi", (1, 2, 3)), ("gemma2", (3,))])
def test_zero_stages_train_the_same_model_of_another_family(
    name: str, stages: tuple[int, ...]
) -> None:
    """One has a head of its own with a bias; the other a cap, and windows."""
    one_process()
    recipe = dataclasses.replace(RECIPE, epochs=0.25, zero_stage=0, head_tokens=100)
    first = trained(name, recipe)
    for stage in stages:
        other = trained(name, dataclasses.replace(recipe, zero_stage=stage))
        assert np.allclose(other.losses, first.losses, rtol=1e-5, atol=0)
        assert other.weights.keys() == first.weights.keys()
        for key, weight in first.weights.items():
            assert torch.allclose(other.weights[key], weight, atol=1e-4), key


def test_a_stopped_training_of_another_family_goes_on_bit_for_bit() -> None:
    one_process()
    recipe = dataclasses.replace(RECIPE, epochs=0.25)
    states: list[State] = []
    stopped = trained(
        "phi", recipe,
        watch=Watch(save=states.append, should_stop=lambda: True),
    )  # fmt: skip
    assert (stopped.finished, stopped.step) == (False, 1)
    rest, whole = trained("phi", recipe, state=states[-1]), trained("phi", recipe)
    assert stopped.losses + rest.losses == whole.losses
    assert all(torch.equal(rest.weights[name], value) for name, value in whole.weights.items())
