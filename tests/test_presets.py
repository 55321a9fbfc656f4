"""What is typed and stored stays what it is."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.config.run import Slurm
from kdhpc.errors import InputError
from kdhpc.pipeline import LANGUAGE

BASE = presets.build(LanguageConfig, presets.compose(["tiny", "slurm.stages.score.partition=p"]))
LOOKALIKES = [
    "On", "no", "yes", "true", "0123", "2024_10", "1e5", "1:30", "0x1F", "a: b", "x # y", "-1",
    "${HOME}/hf", "\\${x}", "${", "$$", "100%", "a=b", "&x", "*x", "!x", "@x", "'", "ü\ue000\ue001",
]  # fmt: skip
"""Texts that YAML or omegaconf would take for something else."""


def built(*words: str) -> LanguageConfig:
    return presets.build(LanguageConfig, presets.compose(["tiny", *words]))


@pytest.mark.parametrize("text", [text for text in LOOKALIKES if text != "'"])
def test_a_field_of_text_keeps_what_was_typed(text: str) -> None:
    config = built(f"prompt={text}", f"slurm.qos={text}", f"name={text}")
    assert (config.prompt, config.slurm.qos, config.name) == (text, text, text)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("prompt='on'", "on"),
        ('prompt="a\\n"', "a\n"),
        ('prompt="[x]"', "[x]"),
        ("prompt='null'", "null"),
    ],
)
def test_a_quoted_text_is_read_as_yaml(words: str, expected: str) -> None:
    assert built(words).prompt == expected


def test_typed_values_take_the_type_of_their_field() -> None:
    config = built("length=12", "taus=[1, 0.5]", "small=no", "slurm.account=null", "slurm.mem_gb=2")
    assert (config.length, config.taus, config.small) == (12, (1.0, 0.5), False)
    assert (config.slurm.account, config.slurm.mem_gb) == (None, 2.0)
    lines = ["export HF_HOME=${HOME}/hf", "module load cuda/12: yes"]
    assert built(f"slurm.setup={json.dumps(lines)}").slurm.setup == tuple(lines)


@pytest.mark.parametrize(
    "words", ["length=1.5", "length=On", "taus=[a]", "small=maybe", "seeds=1e2x"]
)
def test_a_value_of_another_type_is_refused(words: str) -> None:
    with pytest.raises(InputError, match=words.partition("=")[0]) as refused:
        built(words)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("1:30:00", 90),
        ("0-1:30", 90),
        ("2-0", 2880),
        ("1-02:03:04", 1564),
        ("24:00:00", 1440),
        ("2:00", 2),
        ("0:30", 1),
    ],
)
def test_a_time_is_in_minutes_or_as_sbatch_has_it(text: str, minutes: int) -> None:
    config = built(f"slurm.time_min={text}", f"slurm.gate.time_min='{text}'")
    assert (config.slurm.time_min, config.slurm.gate.time_min) == (minutes, minutes)
    assert built(f"slurm.task_min={text}").slurm.task_min == minutes


@pytest.mark.parametrize("text", ["2h", "1:99", "2-24", "1:2:3:4", "1.5", ":30", "-"])
def test_a_time_that_sbatch_would_not_take_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"slurm\.time_min"):
        built(f"slurm.time_min={text}")


def test_a_cluster_file_keeps_texts_and_refuses_a_key_that_is_given_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "tiny.yaml").write_text((presets.CONFIGS_DIR / "tiny.yaml").read_text())
    site = tmp_path / "cluster" / "site.yaml"
    site.write_text(
        "executor: slurm\nslurm:\n  account: 0123\n  qos: no\n  setup: ['cd ${HOME}']\n"
    )
    # Presets are looked up in the project's own folder, which a test must not change.
    monkeypatch.setattr(presets, "CONFIGS_DIR", tmp_path)
    slurm = built("cluster=site").slurm
    assert (slurm.account, slurm.qos, slurm.setup) == ("0123", "no", ("cd ${HOME}",))
    site.write_text("slurm:\n  account: a\n  account: b\n")
    with pytest.raises(InputError, match="duplicate key account"):
        built("cluster=site")


@pytest.mark.parametrize("preset", ["tiny", "paper", "smollm2"])
def test_a_cluster_with_its_defaults_leaves_time_and_memory_to_the_preset(preset: str) -> None:
    alone, there = (
        presets.build(LanguageConfig, presets.compose([preset, *words])).slurm
        for words in ([], ["cluster=slurm"])
    )
    assert (there.time_min, there.mem_gb) == (alone.time_min, alone.mem_gb)


def test_the_path_of_a_corpus_is_absolute_before_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpora").mkdir()
    corpus = tmp_path / "corpora" / "good.txt"
    corpus.write_text("one\n\ntwo\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for typed in ("corpora/good.txt", "~/corpora/good.txt", str(corpus)):
        prepared = LANGUAGE.prepare(built(f"truth.corpus={typed}"))
        assert prepared.truth.corpus == str(corpus)


def test_the_path_of_a_model_is_absolute_before_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    bpe = {"type": "BPE", "vocab": {"T": 0, "h": 1, "e": 2}, "merges": []}
    (model / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": bpe}))
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "e"}))
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for typed in ("model", "./model", "~/model"):
        config = built(f"truth.model={typed}", "truth.tokenizer=model")
        assert LANGUAGE.prepare(config).truth.model == str(model)


def test_a_cluster_file_is_found_in_a_folder_but_not_outside_of_configs_cluster() -> None:
    assert built("cluster=sites/lumi").slurm.partition == "standard-g"
    for name in ("../tiny", "sites/../slurm", "lumi", "sites", "/etc/hosts"):
        with pytest.raises(InputError, match=r"one of local, slurm, sites/alps, "):
            built(f"cluster={name}")


def texts_in(part: Any, kind: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all fields of text, also of optional ones."""
    paths = []
    for name, hint in typing.get_type_hints(kind).items():
        value = getattr(part, name)
        if dataclasses.is_dataclass(value):
            paths += texts_in(value, type(value), (*path, name))
        elif hint in (str, str | None):
            paths.append((*path, name))
    return paths


TEXTS = texts_in(BASE, LanguageConfig)


def replaced(part: Any, path: tuple[str, ...], value: object) -> Any:
    if not path:
        return value
    inner = replaced(getattr(part, path[0]), path[1:], value)
    return dataclasses.replace(part, **{path[0]: inner})


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(
    path=st.sampled_from(TEXTS),
    text=st.one_of(
        st.sampled_from(LOOKALIKES),
        st.text(st.characters(exclude_categories=["Cs"])),
        st.text("${}\\\ue000\ue001:x"),
    ),
)
def test_what_is_stored_reads_back_as_it_was(path: tuple[str, ...], text: str) -> None:
    config = replaced(BASE, path, text)
    stored = json.loads(json.dumps(presets.plain(config)))
    assert presets.build(LanguageConfig, stored) == config
    assert presets.build(LanguageConfig, presets.merged(stored, {})) == config


def test_the_fields_of_text_are_found() -> None:
    assert {("prompt",), ("truth", "model"), ("slurm", "account")} <= set(TEXTS)
    assert len(TEXTS) > len([f for f in dataclasses.fields(Slurm) if f.type == "str | None"])
