"""A second judge of precision: what it scores, what it is refused for, how two judges agree."""

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as tk
import torch
from commands import ROOT, launch, status
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_given_models import float64_log_probs, save
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kdhpc.config import presets
from kdhpc.config.language import Judge, LanguageConfig, Truth
from kdhpc.errors import InputError
from kdhpc.experiment import documents, inputs
from kdhpc.models.loading import load_model
from kdhpc.models.tokenizer import Tokenizer, write_byte_tokenizer
from kdhpc.pipeline import LANGUAGE
from kdhpc.plan.shards import digest
from kdhpc.scoring.characters import encode, score_texts, texts_of, unwritable
from kdhpc.storage.corpora import read_documents
from kdhpc.storage.results import ScorePieces, read_results, write_results
from kdhpc.storage.token_shards import padded, read_samples

PROMPT, END = "\n", "<end>"
TEXTS = [
    "def f(x):\n    return x", "", " a leading space", "\n\nnew lines at the border",
    "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve \N{SNOWMAN}", "x" * 40, "the end",
    "cut \N{REPLACEMENT CHARACTER}",
]  # fmt: skip


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and of some words, with tokens that span the prompt's border."""
    tokenizer = tk.Tokenizer(tk.models.BPE())
    tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END],
        initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_documents("python-docs", "text")[:20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random model with a tokenizer of its own."""
    path = tmp_path_factory.mktemp("judge")
    save(path, "GPT-2", vocab_size=400, n_positions=48)
    word_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(path)
    return Tokenizer(path)


@pytest.fixture(scope="module", autouse=True)
def analysis() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "analysis"))
        yield


def test_texts_are_scored_as_a_plain_loop_of_transformers_scores_them(judge: Path) -> None:
    model = load_model(judge, dtype="float32", device=torch.device("cpu"))
    texts = [*TEXTS, None, "y" * 4000]
    scores, left_out = score_texts(
        model, Tokenizer(judge), texts, prompt=PROMPT, num_positions=48, batch_rows=4,
        head_tokens=64,
    )  # fmt: skip
    assert left_out == 2
    assert scores.num_characters is not None
    assert scores.num_replaced is not None
    assert scores.num_characters.tolist() == [*map(len, TEXTS), 0, 0]
    assert scores.num_replaced.tolist() == [*(text.count("\ufffd") for text in TEXTS), 0, 0]
    plain = AutoTokenizer.from_pretrained(judge)
    [prompt_id] = plain(PROMPT)["input_ids"]
    spans = 0
    for row, text in enumerate(TEXTS):
        ids = plain(PROMPT + text)["input_ids"]
        if ids[0] != prompt_id:  # a token spans the border, so the two are encoded one by one
            ids, spans = [prompt_id, *plain(text)["input_ids"]], spans + 1
        log_probs = (
            float64_log_probs(judge, torch.tensor([ids])) if len(ids) > 1 else torch.zeros(1)
        )
        assert scores.log_prob_sum[row] == pytest.approx(float(log_probs.sum()), abs=1e-4)
        assert scores.num_tokens[row] == len(ids) - 1
    assert spans
    assert not scores.log_prob_sum[len(TEXTS) :].any()


def test_scores_of_texts_do_not_depend_on_what_is_scored_beside_them(judge: Path) -> None:
    model = load_model(judge, dtype="float32", device=torch.device("cpu"))
    whole, part = (
        score_texts(
            model, Tokenizer(judge), texts, prompt=PROMPT, num_positions=None, batch_rows=3,
            head_tokens=64,
        )[0]
        for texts in (TEXTS, TEXTS[3:])
    )  # fmt: skip
    assert np.array_equal(whole.log_prob_sum[3:], part.log_prob_sum)


def test_a_judge_whose_texts_are_all_too_long_is_refused(judge: Path) -> None:
    model = load_model(judge, dtype="float32", device=torch.device("cpu"))
    with pytest.raises(InputError, match="has 8 positions, and the shortest of 1 texts"):
        score_texts(
            model, Tokenizer(judge), ["z" * 400], prompt=PROMPT, num_positions=8, batch_rows=4,
            head_tokens=64,
        )  # fmt: skip


@given(text=st.text(st.characters(codec="utf-8"), max_size=30), prompt=st.sampled_from(["\n", "T"]))
@settings(max_examples=50, deadline=None)
def test_the_tokens_after_the_prompt_are_those_of_the_text(
    judge: Path, text: str, prompt: str
) -> None:
    tokenizer = Tokenizer(judge)
    ids, prompt_ids = encode(text, tokenizer, prompt), tokenizer.prompt_ids(prompt)
    assert ids is not None
    assert ids[: len(prompt_ids)] == prompt_ids
    assert tokenizer.decode(ids[len(prompt_ids) :]) == text


def test_a_tokenizer_that_adds_a_space_leaves_out_what_it_cannot_write(tmp_path: Path) -> None:
    """As those of Llama 2, it puts a space before a text, and takes it away when it decodes."""
    vocabulary = {t: i for i, t in enumerate(["<end>", "\u2581", "\n", "a", "b", "\na"])}
    whole = tk.Tokenizer(tk.models.BPE(vocab=vocabulary, merges=[("\n", "a")]))
    whole.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    whole.decoder = tk.decoders.Metaspace(prepend_scheme="first")
    whole.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    tokenizer = Tokenizer(tmp_path)
    assert encode("ba", tokenizer, "\n") == [1, 2, 4, 3]
    assert encode("ab", tokenizer, "\n") is None  # alone it would be " ab"


def test_characters_without_a_token_are_replaced_not_passed_over(tmp_path: Path) -> None:
    """As SmolLM2's, the tokenizer has no token for some control characters."""
    alphabet = [s for s in tk.pre_tokenizers.ByteLevel.alphabet() if s != "\u0113"]  # byte 0x13
    whole = word_tokenizer().backend_tokenizer
    whole.model = tk.models.BPE(vocab={s: i for i, s in enumerate(alphabet)}, merges=[])
    whole.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.text_ids("x\x13") == tokenizer.text_ids("x")
    replaced = unwritable(["x\x13", None, " y\n\u00ef"], tokenizer)
    assert "x\x13 y\n\u00ef".translate(replaced) == "x\ufffd y\n\u00ef"


def test_texts_are_those_between_prompt_and_end(byte_tokenizer: Tokenizer) -> None:
    prompt, end = byte_tokenizer.text_ids("The"), byte_tokenizer.eos
    snow = byte_tokenizer.text_ids("\N{SNOWMAN}")
    rows = [
        [*prompt, *byte_tokenizer.text_ids(" cat"), end], [*prompt, *snow], [*prompt, *snow[:2]],
        [*prompt, *snow[1:], end], [*prompt, end], prompt, [*prompt[1:], *prompt],
    ]  # fmt: skip
    texts = texts_of(padded(rows, 12, 257), byte_tokenizer, prompt)
    replaced = "\N{REPLACEMENT CHARACTER}"
    assert texts == [" cat", "\N{SNOWMAN}", replaced, 2 * replaced, "", "", None]


def test_ids_are_the_same_if_tokens_and_ends_are(judge: Path, byte_tokenizer: Tokenizer) -> None:
    assert Tokenizer(judge).has_ids_of(Tokenizer(judge))
    assert not Tokenizer(judge).has_ids_of(byte_tokenizer)
    assert not Tokenizer(judge).has_ids_of(Tokenizer(judge, ends=[7]))


TRUTH = Truth(source="corpus", judge_share=0.4, held_out_share=0.2)


def config_of(*words: str) -> LanguageConfig:
    more = ["tiny", "real_data", "device=cpu", *words]
    return presets.build(LanguageConfig, presets.compose(more))


def test_two_judges_learn_from_halves_and_take_nothing_from_others(tmp_path: Path) -> None:
    texts = [str(number) for number in range(4000)]
    training = config_of().truth.training
    one = replace(TRUTH, training=training)
    two = replace(one, second_judge=Judge())
    alone, shared = (documents.split(texts, truth, seed=0) for truth in (one, two))
    assert shared["train"] == alone["train"]
    assert shared["eval"] == alone["eval"]
    assert sorted([*shared["judge"], *shared["second-judge"]]) == sorted(alone["judge"])
    assert len(shared["judge"]) == pytest.approx(len(shared["second-judge"]), rel=0.1)
    own = Judge(shape=config_of().truth.shape, training=training)
    only_second = documents.split(texts, replace(two, model="a/b", second_judge=own), seed=0)
    assert not only_second["judge"]
    assert sorted(only_second["second-judge"]) == sorted(alone["judge"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "f4329acbefc1"),
        (["truth.model=package:a/b", "truth.tokenizer=model"], "f36aef1ee358"),
    ],
)
def test_runs_without_a_second_judge_keep_their_recipes(words: list[str], expected: str) -> None:
    config = config_of("truth.second_judge=null", "truth.judge_share=0.3", *words)
    shards = LANGUAGE.plan(config).shards
    assert digest({key: shard.recipe for key, shard in shards.items()})[:12] == expected


def second_judge_shards(*words: str) -> dict[str, str]:
    """Return the recipes of all that a second judge adds to a run that has none."""
    before, after = (
        {
            k: s.recipe
            for k, s in LANGUAGE.plan(config_of(*typed)).shards.items()
            if "merge/" not in k
        }
        for typed in (["truth.second_judge=null"], words)
    )
    assert before.items() <= after.items()
    return {key: recipe for key, recipe in after.items() if key not in before}


def test_a_given_judge_adds_only_its_own_shards() -> None:
    place = ["truth.second_judge.model=a/b", "truth.second_judge.fingerprint"]
    new = second_judge_shards(*place[:1], f"{place[1]}=1")
    assert {key.split("/")[1] for key in new} == {
        "second-judge",
        *(
            f"{sampler}-under-second-judge"
            for sampler in (
                "truth", "teacher-s0-tau1", "teacher-s0-tau0.6", "student-s0-small-direct",
                "student-s0-small-tau1", "student-s0-small-tau0.6",
            )
        ),
    }  # fmt: skip
    other = second_judge_shards("truth.second_judge.model=elsewhere/b", f"{place[1]}=1")
    assert new == other
    another = second_judge_shards(*place[:1], f"{place[1]}=2")
    assert new.keys() == another.keys()
    assert not new.items() & another.items()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["truth.source=model"], "truth.second_judge: p* is a model, which needs no judge"),
        (
            ["truth.second_judge.shape={layers: 1, hidden: 32, heads: 3, kv_heads: 1, ffn: 64}"],
            "truth.second_judge.shape.heads=3",
        ),
        (["truth.second_judge=train"], "second_judge=train: train is given; expected keys"),
        (["truth.second_judge.shape.hidden=8"], "truth.second_judge.shape.layers"),
        (
            ["truth.model=a/b", "truth.tokenizer=model"],
            "truth.second_judge.model=train: expected truth.second_judge.shape",
        ),
        (
            ["truth.model=a/b", "truth.tokenizer=model", "truth.second_judge.model=a/b"],
            "truth.second_judge.model=a/b: is the first judge",
        ),
        (["truth.second_judge.model=./none"], "no such file or folder, and not a hub id"),
        (["truth.second_judge.model={files}"], "expected a folder with config.json"),
        (["truth.second_judge.model={judge}", "prompt="], "prompt"),
        (["truth.judge_share=0"], "truth.training.batch_sequences=64: truth.corpus=python-docs"),
        (
            ["truth.second_judge.training={batch_sequences: 100000}"],
            "truth.second_judge.training.batch_sequences=100000: truth.corpus=python-docs makes",
        ),
        (
            ["truth.second_judge.model={judge}", "teacher.model={judge}", "teacher.training=null"],
            "/judge0: is the teacher, teacher.model=",
        ),
        (
            ["truth.model={judge}", "truth.tokenizer=model", "truth.second_judge.model={copy}"],
            "/copy: has the files of the first judge",
        ),
        (
            ["truth.second_judge.model={judge}", "runs_dir={files}", "name=judge0"],
            "/judge0: is a model of this very run",
        ),
        (
            ["truth.second_judge.model={judge}", "truth.second_judge.fingerprint=123"],
            "truth.second_judge.fingerprint=123: the fingerprint is now",
        ),
    ],
)
def test_a_judge_that_cannot_judge_is_refused(
    words: list[str], message: str, judge: Path, tmp_path: Path
) -> None:
    places = {"files": str(judge.parent), "judge": str(judge), "copy": str(tmp_path / "copy")}
    (tmp_path / "copy").mkdir()
    for file in judge.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    typed = words
    for name, place in places.items():
        typed = [word.replace(f"{{{name}}}", place) for word in typed]
    with pytest.raises(InputError) as refused:
        inputs.prepare(LANGUAGE.checked(config_of(*typed)))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


CLAIMS = """
claims:
- name: a teacher costs precision
  says: precision is lower at tau 1 than direct
  test: less
  terms: [{measure: precision, of: 1, against: direct}]
"""


@pytest.fixture(scope="module")
def gained(judge: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """Return a finished run that has gained a judge with other tokens, and its new arms."""
    folder = tmp_path_factory.mktemp("gained")
    words = ["tiny", "real_data", "cluster=local", f"runs_dir={folder}", "truth.judge_share=0.3"]
    words += ["students.small.training.learning_rate=0.03", "students.small.training.epochs=6"]
    words += ["teacher.training.learning_rate=0.03", "teacher.training.epochs=6"]
    words += ["taus=[1.0]", "sampling.eval_sequences=64"]
    launch("sweep", *words, "truth.second_judge=null")
    run = folder / "tiny-real-data"
    before = {path: path.read_bytes() for path in run.glob("[1-7]-*/*/*.json")}
    (folder / "claims.yaml").write_text(CLAIMS)
    launch("sweep", *words, f"truth.second_judge.model={judge}", f"claims={folder}/claims.yaml")
    assert status(run, code=0)["complete"]
    assert {path: path.read_bytes() for path in before} == before
    return run, {path.parent.name for path in run.glob("[1-7]-*/*/*.json") if path not in before}


def test_a_finished_run_gains_a_judge_with_other_tokens(
    gained: tuple[Path, set[str]], judge: Path, byte_tokenizer: Tokenizer
) -> None:
    run, new = gained
    samplers = {path.name for path in run.glob("6-sample-students/*")} | {"truth"}
    assert new == {"second-judge", *(f"{name}-under-second-judge" for name in samplers)}
    results = read_results(run / "8-merge" / "results.h5")
    assert results.models["second-judge"]["kind"] == "second-judge"
    samples = read_samples(sorted((run / "2-sample-truth" / "eval").glob("*.arrow")))
    scores = results.scores["truth", "second-judge"]
    assert scores.arrays().keys() == {
        "log_prob_sum", "num_tokens", "num_characters", "num_replaced",
    }  # fmt: skip
    assert scores.num_characters is not None
    texts = texts_of(samples, byte_tokenizer, byte_tokenizer.prompt_ids(PROMPT))
    for row in (0, 7, 55):
        ids = encode(texts[row] or "", Tokenizer(judge), PROMPT)
        expected = float64_log_probs(judge, torch.tensor([ids])).sum()
        assert scores.log_prob_sum[row] == pytest.approx(float(expected), abs=1e-4)
        assert scores.num_characters[row] == len(texts[row] or "")
    launch("verify", str(run))


def test_pages_say_how_two_judges_agree(gained: tuple[Path, set[str]], judge: Path) -> None:
    judges, report, study = (importlib.import_module(n) for n in ("judges", "report", "study"))
    scores = study.Study(read_results(gained[0] / "8-merge" / "results.h5"))
    by, agrees = judges.notes(scores)
    assert "precision is judged by a model that was trained on its other documents" in by
    assert agrees.startswith(f"second judge, per character: {judge}: rank correlation over 3 arms")
    [part] = report._judge_parts(scores)
    assert "Precision under each judge, in nats per character" in part.body
    assert "Verdicts that depend on the judge" in part.body


def test_a_page_is_made_from_an_archive_of_two_judges(
    gained: tuple[Path, set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, judges, study, files, experiment = (
        importlib.import_module(n) for n in ("archive", "judges", "study", "files", "experiment")
    )
    folder = tmp_path / experiment.PAGES["real_data"].folder
    folder.mkdir(parents=True)
    path = folder / "scores-0.h5.xz"
    assert archive.main([str(gained[0]), str(path), "--samples"]) == 0
    first_of = []
    for results in (files.read_file(p) for p in (gained[0] / "8-merge" / "results.h5", path)):
        both = judges.judged(study.Study(results))
        first_of.append(both.first.score("truth", "self").value)
        assert both.num_left_out == 0
        assert 0 < both.num_replaced < both.num_texts
    assert first_of[0] == pytest.approx(first_of[1], abs=0.01)  # with the ends taken away
    (folder / "claims.yaml").write_text(CLAIMS)
    monkeypatch.setattr(experiment, "DOCS_DIR", tmp_path)
    monkeypatch.setattr(importlib.import_module("page_sections"), "REAL_DATA", folder)
    _, text = experiment.found("real_data")
    assert "Second judge, per character: " in text
    assert "| student | first judge | second judge |" in text
    assert text.count("| precision is lower at tau 1 than direct | undecided |") == 2


def results_of_judges(path: Path, change: dict[str, float], noise: float, seeds: int = 4) -> Any:
    """Return a study of students that two judges have scored.

    Args:
        path: a file to write.
        change: change of precision under the second judge from that under the first, by tau.
        noise: its standard deviation over texts, in nats per token.
        seeds: number of seeds.
    """
    random = np.random.default_rng(0)
    models: dict[str, dict[str, Any]] = {}
    pieces = []

    def add(sampler: str, scorer: str, of_text: Any) -> None:
        counts = np.full(len(of_text), 10, np.int32)
        pieces.append(
            ScorePieces(
                sampler=sampler, scorer=scorer, num_rows=len(of_text),
                pieces=[("log_prob_sum", 10.0 * of_text), ("num_tokens", counts)],
            )
        )  # fmt: skip

    truth = random.normal(-2.0, 0.3, 400)
    for scorer in ("self", "second-judge"):
        add("truth", scorer, truth)
    for seed in range(seeds):
        for tau, precision in (("1", -3.0), ("0.8", -2.5), ("0.6", -2.0)):
            name = f"student-s{seed}-a-tau{tau}"
            models[name] = {
                "kind": "student", "seed": seed, "size": "a", "arm": f"tau{tau}",
                "tau": float(tau), "parameters": 10,
            }  # fmt: skip
            first = precision + random.normal(0.0, 0.05) + random.normal(0.0, 0.3, 400)
            add(name, "truth", first)
            add(
                name, "second-judge", first + change[tau] + random.normal(0.0, noise or 1e-300, 400)
            )
            add(name, "self", np.full(400, -1.0 / float(tau)))
            add("truth", name, truth - 0.2)
    config = {"truth": {"source": "corpus", "model": "train", "second_judge": {"model": "train"}}}
    provenance = {"config": json.dumps(config)}
    write_results(path, recipe="r", provenance=provenance, scores=pieces, models=models)
    return importlib.import_module("study").Study(read_results(path))


SAME = {"1": 0.0, "0.8": 0.0, "0.6": 0.0}


def test_equal_judges_agree_in_everything(tmp_path: Path) -> None:
    judges = importlib.import_module("judges")
    study = results_of_judges(tmp_path / "r.h5", SAME, noise=0.0)
    found = judges.agreement(judges.judged(study))
    assert found.arms.estimate == pytest.approx(1.0)
    assert found.texts.estimate == pytest.approx(1.0)
    assert found.texts.high - found.texts.low < 1e-6
    assert (found.same_order, found.num_orders) == (4, 4)
    assert found.verdicts == []


def test_a_judge_that_prefers_high_taus_contradicts_the_first(tmp_path: Path) -> None:
    judges = importlib.import_module("judges")
    change = {"1": 0.0, "0.8": -1.0, "0.6": -2.0}
    study = results_of_judges(tmp_path / "r.h5", change, noise=0.3)
    found = judges.agreement(judges.judged(study))
    assert found.arms.estimate == pytest.approx(-1.0)
    assert (found.same_order, found.num_orders) == (0, 4)
    decisions = {one.name: (one.decision, two.decision) for one, two in found.other_decisions}
    assert decisions["precision-rises"] == ("holds", "fails")
    assert "recall-falls" not in {one.name for one, _ in found.verdicts}
    assert "precision-rises (a) holds and fails" in judges.said(study)


def test_the_correlation_over_texts_has_the_interval_of_a_jackknife(tmp_path: Path) -> None:
    judges = importlib.import_module("judges")
    study = results_of_judges(tmp_path / "r.h5", SAME, noise=0.3, seeds=1)
    name = "student-s0-a-tau0.8"
    one, two = (study.scores[name, scorer] for scorer in ("truth", "second-judge"))
    made = judges.correlation(one, two, rows=name)
    z, w = one.log_prob_sum / 10, two.log_prob_sum / 10
    assert made.value == pytest.approx(float(stats.pearsonr(z, w).statistic))
    without = [
        float(np.corrcoef(np.delete(z, row), np.delete(w, row))[0, 1]) for row in range(len(z))
    ]
    error = np.sqrt((len(z) - 1) * np.var(without))
    assert np.sqrt((made.influence[name] ** 2).sum()) == pytest.approx(error, rel=0.05)
    assert 0.6 < made.value < 0.8


def test_the_claims_of_the_page_fit_its_run() -> None:
    """They were written before the run, with a row of what is predicted for each of them."""
    claims = importlib.import_module("claims")
    folder = ROOT / "docs" / "experiments" / "real_data"
    words = ["demo", "real_data", "smollm2_judge", f"claims={folder}/claims.yaml"]
    config = presets.build(LanguageConfig, presets.compose(words))
    made = claims.read_claims(folder / "claims.yaml")
    importlib.import_module("kdhpc.experiment.claims").check_claims(made, config)
    page = folder.with_suffix(".md").read_text()
    predicted = page.partition("## Predicted")[2].partition("## ")[0]
    assert len([line for line in predicted.splitlines() if line.startswith("| ")]) - 1 == len(made)
    experiment = importlib.import_module("experiment")
    assert experiment.with_block(experiment.DOCS_DIR / experiment.PAGES["real_data"].path, "")
