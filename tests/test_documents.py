"""A corpus in place of p*: documents are split once, rows are cut from them, a judge scores."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, launch, status
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig, Truth
from kdhpc.experiment import documents
from kdhpc.models.tokenizer import Tokenizer
from kdhpc.storage.corpora import read_documents
from kdhpc.storage.results import read_results
from kdhpc.storage.token_shards import read_samples

TRUTH = Truth(source="corpus", judge_share=0.4, held_out_share=0.2)


@given(texts=st.lists(st.text(max_size=8), max_size=40), more=st.lists(st.text(max_size=8)))
@settings(max_examples=50, deadline=None)
def test_each_document_is_in_one_part_for_good(texts: list[str], more: list[str]) -> None:
    before, after = (documents.split(t, TRUTH, seed=3) for t in (texts, [*more, *texts]))
    assert sorted(text for part in before.values() for text in part) == sorted({*texts})
    for part, kept in before.items():
        assert {*kept} <= {*after[part]}


def test_parts_have_their_shares_and_a_given_judge_learns_from_none() -> None:
    texts = [str(number) for number in range(4000)]
    parts = documents.split(texts, TRUTH, seed=0)
    assert [len(parts[part]) / 4000 for part in ("judge", "eval", "train")] == pytest.approx(
        [0.4, 0.2, 0.4], abs=0.03
    )
    assert documents.split(texts, TRUTH, seed=1) != parts
    given_judge = documents.split(texts, replace(TRUTH, model="org/model"), seed=0)
    assert not given_judge["judge"]
    assert {*given_judge["eval"]} != {*parts["eval"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    launch("sweep", "tiny", "real_data", "cluster=local", f"runs_dir={folder}")
    path = folder / "tiny-real-data"
    assert status(path, code=0)["complete"]
    return path


def config_of(run: Path) -> LanguageConfig:
    [request] = (run / "requests").glob("*.json")
    return presets.build(LanguageConfig, json.loads(request.read_text())["config"])


def judge_of(run: Path) -> Path:
    [record] = (run / "1-truth" / "truth").glob("*.json")
    return Path(record.parent / json.loads(record.read_text())["data"])


def test_rows_are_pieces_of_the_documents_of_their_part(run: Path) -> None:
    config, tokenizer = config_of(run), Tokenizer(judge_of(run))
    texts = documents.split(read_documents("python-docs", "text"), config.truth, config.seed)
    prompt = len(tokenizer.prompt_ids(config.prompt))
    parts: tuple[documents.Part, ...] = ("train", "eval")
    for part in parts:
        folder = run / "2-sample-truth" / part
        samples = read_samples(sorted(folder.glob("*.arrow")))
        own, ended = "\0".join(texts[part]), 0
        for ids, length in zip(samples.ids, samples.length, strict=True):
            assert tokenizer.decode(ids[:prompt]) == config.prompt
            ends = ids[length - 1] == tokenizer.eos
            ended += bool(ends)
            piece = tokenizer.decode(ids[prompt : length - ends])
            if "\ufffd" not in piece:  # a piece may begin or end inside of a character
                assert piece in own
        assert ended
    assert len({row.tobytes() for row in samples.ids}) > 0.9 * len(samples)


def test_the_judge_scores_truth_in_place_of_the_model_that_drew_it(run: Path) -> None:
    results = read_results(run / "8-merge" / "results.h5")
    samples = read_samples(sorted((run / "2-sample-truth" / "eval").glob("*.arrow")))
    judge = AutoModelForCausalLM.from_pretrained(judge_of(run), dtype=torch.float64)
    for row in range(5):
        ids = torch.tensor(samples.ids[row : row + 1, : samples.length[row]].astype(np.int64))
        with torch.no_grad():
            log_probs = judge(ids).logits.log_softmax(-1)[0, :-1]
        token = log_probs.gather(1, ids[0, 1:, None])[:, 0]
        own = results.scores["truth", "self"]
        assert own.num_tokens[row] == len(token)
        assert own.log_prob_sum[row] == pytest.approx(float(token.sum()), abs=1e-4)


def test_analyses_say_who_judges(run: Path) -> None:
    for script in ("precision_recall", "report"):
        said = subprocess.run(
            [sys.executable, str(ROOT / "analysis" / f"{script}.py"), str(run)],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        said = " ".join(said.split())
        assert "judged by a model that was trained on its other documents" in said
        assert "second judge, per token: another model, trained on documents of its own" in said


def test_a_second_judge_has_the_tokens_of_the_first_and_other_weights(run: Path) -> None:
    scores = read_results(run / "8-merge" / "results.h5").scores
    samplers = {sampler for sampler, scorer in scores if scorer == "truth"} | {"truth"}
    for sampler in samplers:
        one = scores[sampler, "truth" if sampler != "truth" else "self"]
        two = scores[sampler, "second-judge"]
        assert two.arrays().keys() == one.arrays().keys()
        assert np.array_equal(one.num_tokens, two.num_tokens)
        assert not np.isclose(one.log_prob_sum, two.log_prob_sum).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampling.train_sequences=100000"], "rows of 24 tokens for it; expected at most that"),
        (["truth.judge_share=0.8", "truth.held_out_share=0.2"], "leave no documents for D"),
        (["scoring.expected=true"], "which a corpus does not have"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_refused(
    words: list[str], message: str, tmp_path: Path
) -> None:
    refused = launch(
        "sweep", "tiny", "real_data", "cluster=local", f"runs_dir={tmp_path}", *words, code=2
    )
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
