"""Right answers: sums, what counts as right, pass@k, and whether its curves cross."""

import csv
import importlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT, launch
from numpy.typing import NDArray

from kdhpc import addition, docstrings
from kdhpc.errors import InputError
from kdhpc.experiment import prompts
from kdhpc.experiment.claims import read_term
from kdhpc.models.tokenizer import Tokenizer, write_byte_tokenizer
from kdhpc.sampling.sampler import Prompt
from kdhpc.science.best_of import best_of_k
from kdhpc.storage.results import ScorePieces, read_results, write_results
from kdhpc.storage.token_shards import Samples

Run = Callable[[Path, list[str]], str]


def test_sums_are_worked_out_digit_by_digit() -> None:
    assert addition.text_of(47, 85) == "47+85=\n7+5=12\n4+8+1=13\n132"
    for text in addition.texts():
        problem, units, tens, answer = text.split("\n")
        for line in (problem.rstrip("=") + f"={answer}", units, tens):
            left, right = line.split("=")
            assert sum(map(int, left.split("+"))) == int(right)
    assert len(addition.texts()) == len({*addition.texts()}) == 8100
    lines = addition.prompts()
    assert len({line["text"] for line in lines}) == addition.NUM_PROMPTS
    texts = {*addition.texts()}
    assert all(any(t.startswith(p["text"]) and t.endswith(f"\n{p['answer']}") for t in texts)
               for p in lines[:20])  # fmt: skip


def test_docstrings_are_summed_up_by_their_first_sentences() -> None:
    texts = {*docstrings.texts()}
    assert len(texts) > 500
    lines = docstrings.prompts()
    assert len({line["text"] for line in lines}) == docstrings.NUM_PROMPTS
    assert {line["text"] + line["reference"] for line in lines} <= texts
    for text in texts:
        rest, sentence = text.split(docstrings.SUMMARY)
        assert docstrings.MIN_REST <= len(rest) <= docstrings.MAX_REST
        assert sentence.endswith(".")
        assert "\n" not in rest + sentence


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_best_of_k_is_the_mean_over_all_choices(k: int) -> None:
    """Also with ties, several prompts whose rows are mixed, and answers that are right or wrong."""
    generator = np.random.default_rng(k)
    by_prompt = [generator.choice([0.0, 0.1, 0.5, 0.7], size=n) for n in range(k, 8)] + [
        np.array([1] * c + [0] * (6 - c), np.uint8) for c in range(7)
    ]
    values = np.concatenate(by_prompt)
    prompt = np.repeat(np.arange(len(by_prompt)), [*map(len, by_prompt)])
    mixed = generator.permutation(len(values))
    exact = [np.mean([max(c) for c in itertools.combinations(of, k)]) for of in by_prompt]
    assert best_of_k(values[mixed], prompt[mixed], k) == pytest.approx(exact, abs=1e-12)


def test_the_best_of_many_answers_is_exact() -> None:
    right = np.array([1] * 3 + [0] * 1997, np.uint8)
    [found] = best_of_k(right, np.zeros(2000, int), 64)
    exact = 1 - math.comb(1997, 64) / math.comb(2000, 64)
    assert found == pytest.approx(exact, rel=1e-12)
    with pytest.raises(ValueError, match="a prompt has 4 answers; expected at least 5"):
        best_of_k(np.ones(13), np.array([0] * 9 + [1] * 4), 5)


def test_the_last_line_decides(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    asked = [
        Prompt(ids=tuple(tokenizer.prompt_ids(text)), stream=text, answer=answer)
        for text, answer in (("1+1=", "2"), ("23+4=\n", "27"))
    ]
    drawn = [
        ("3+4=7\n27", True, True), ("2", True, True), ("27\n7", True, False), ("12", True, False),
        (" 27 ", True, True), ("1\n2\n", True, True), ("", True, False), ("2 2", True, False),
        ("27", False, False), ("3\x1c2", True, False),
    ]  # fmt: skip
    ids = np.zeros((len(drawn), 24), np.uint16)
    length = np.zeros(len(drawn), np.int32)
    for row, (text, ended, _) in enumerate(drawn):
        whole = [*asked[(3 + row) % 2].ids, *tokenizer.text_ids(text), *[tokenizer.eos] * ended]
        ids[row, : len(whole)], length[row] = whole, len(whole)
        ids[row, len(whole) :] = tokenizer.text_ids("9")[0]  # what is beyond the length is nothing
    zeros = np.zeros(len(drawn))
    samples = Samples(ids=ids, length=length, log_prob_sum=zeros, log_prob_tau_sum=zeros)
    right = prompts.right_answers(samples, asked, 3, tokenizer)
    assert right is not None
    assert right.tolist() == [int(is_right) for _, _, is_right in drawn]
    unknown = [*asked[:1], Prompt(ids=(1,), stream="?")]
    assert prompts.right_answers(samples, unknown, 0, tokenizer) is None


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.syspath_prepend(ROOT / "analysis")
    script = importlib.import_module("pass_at_k")

    def on(path: Path, words: list[str]) -> str:
        assert script.main([str(path), *words]) == 0
        return " ".join(capsys.readouterr().out.split())

    return on


NUM_PROMPTS, ANSWERS = 60, 16


def results_of(path: Path, shares: dict[str, tuple[float, float]], *kinds: str) -> Path:
    """Write results in which a share of the prompts is solved, each with some probability."""
    generator = np.random.default_rng(0)
    parts, models = [], {}
    rows = NUM_PROMPTS * ANSWERS
    for seed, (label, (solved, chance)) in itertools.product(range(4), shares.items()):
        arm = "direct" if label == "direct" else f"tau{label}"
        name = f"student-s{seed}-small-{arm}"
        models[name] = {
            "kind": "student", "seed": seed, "size": "small", "arm": arm,
            "tau": 1.0 if label == "direct" else float(label), "parameters": 1,
        }  # fmt: skip
        known = np.arange(rows) % NUM_PROMPTS < solved * NUM_PROMPTS
        right = (known & (generator.random(rows) < chance)).astype(np.uint8)
        numbers: dict[str, NDArray[Any]] = {
            "log_prob_sum": -np.ones(rows),
            "num_tokens": np.ones(rows, np.int32),
        }
        for sampler, scorer in ((name, "truth"), ("truth", name), (name, "self")):
            good: dict[str, NDArray[Any]] = {
                "right": right,
                "rouge_l": right.astype(np.float32) / 2,
            }
            own = {kind: good[kind] for kind in kinds or ["right"]}
            arrays = numbers | (own if scorer == "self" else {})
            parts.append(
                ScorePieces(sampler=sampler, scorer=scorer, num_rows=rows, pieces=[*arrays.items()])
            )
    config = f"prompts: addition\neval_prompts: {NUM_PROMPTS}\n"
    write_results(path, recipe="r", provenance={"config": config}, scores=parts, models=models)
    return path


def test_curves_that_cross_are_told_from_those_that_do_not(tmp_path: Path, run: Run) -> None:
    shares = {"direct": (0.9, 0.3), "1": (0.9, 0.3), "0.6": (0.5, 0.9)}
    path = results_of(tmp_path / "results.h5", shares)
    said = run(path, ["--k", "1", "16", "--out", str(tmp_path)])
    assert "holds: the curves of tau 0.6 and of direct cross" in said
    assert "undecided: the curves of tau 1 and of direct cross" in said
    worse = results_of(tmp_path / "worse.h5", shares | {"0.6": (0.5, 0.2)})
    said = run(worse, ["--out", str(tmp_path)])
    assert "fails: the curves of tau 0.6 and of direct cross" in said
    assert "pass@16" in said
    assert "pass@32" not in said
    assert "rouge@" not in said


def test_prompts_with_answers_and_references_have_both(tmp_path: Path, run: Run) -> None:
    path = results_of(tmp_path / "results.h5", {"direct": (0.5, 0.5)}, "right", "rouge_l")
    said = run(path, ["--k", "1", "--out", str(tmp_path)])
    assert "pass@1" in said
    assert "rouge@1" in said
    with (tmp_path / "pass_at_k.csv").open() as file:
        rows = {row["measure"]: row for row in csv.DictReader(file)}
    assert 0.2 < float(rows["pass"]["pass@1"]) == 2 * float(rows["rouge"]["rouge@1"])
    assert rows["pass"]["rouge@1"] == ""


def test_the_best_of_many_texts_is_said_like_right_answers(tmp_path: Path, run: Run) -> None:
    shares = {"direct": (1.0, 0.9), "0.6": (0.5, 1.0)}
    path = results_of(tmp_path / "results.h5", shares, "rouge_l")
    said = run(path, ["--k", "1", "16", "--out", str(tmp_path)])
    assert "ROUGE-L of the best text: small student T rouge@1 rouge@16 direct 1 0.45" in said
    assert "0.6 1 0.250 0.250" in said
    assert "fails: the curves of tau 0.6 and of direct cross: rouge@1 is higher" in said
    assert "rouge@1 differs by -0.2" in said
    assert "pass@" not in said


def test_more_answers_than_there_are_and_runs_without_any_are_refused(
    tmp_path: Path, tiny_run: Path, run: Run
) -> None:
    path = results_of(tmp_path / "results.h5", {"direct": (0.5, 0.5)})
    with pytest.raises(InputError, match="expected numbers from 1 to 16"):
        run(path, ["--k", "32"])
    with pytest.raises(InputError, match="its prompts have no answers"):
        run(tiny_run, [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reasoning"], "sequences of a prompt; expected at least 64"),
        (["post_training"], "the prompts have no answers"),
        (["reasoning", "rouge"], "the prompts have no references"),
        (["summarisation", "rouge"], "sequences of a prompt; expected at least 64"),
    ],
)
def test_claims_about_answers_that_are_not_there_are_refused(
    words: list[str], message: str, tmp_path: Path
) -> None:
    claims = tmp_path / "claims.yaml"
    measure = "rouge@64" if words[1:] else "pass@64"
    claims.write_text(
        "claims: [{name: n, says: s, test: less,"
        f" terms: [{{measure: {measure}, of: '0.6', against: direct}}]}}]\n"
    )
    where = ["cluster=local", f"runs_dir={tmp_path / 'runs'}", f"claims={claims}"]
    refused = launch("sweep", "tiny", words[0], *where, code=2)
    assert message in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_claims_may_be_about_right_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "analysis")
    terms, study = (importlib.import_module(name) for name in ("claim_terms", "study"))
    path = results_of(tmp_path / "results.h5", {"direct": (0.9, 0.3), "0.6": (0.5, 0.9)})
    of = study.Study(read_results(path))
    for measure, sign in (("pass@1", 1), ("pass@16", -1)):
        term = read_term({"measure": measure, "of": "0.6", "against": "direct"}, "test")
        mean = terms.mean_of(of, term, "small")
        assert sign * mean.estimate > 0.1
        assert mean.num_rows == NUM_PROMPTS
    too_many = read_term({"measure": "pass@64", "of": "0.6", "against": "direct"}, "test")
    assert terms.mean_of(of, too_many, "small") is None
