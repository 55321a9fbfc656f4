"""Models are evaluated on tasks, by the harness as its command line does, and on tasks of ours."""

import csv
import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ROOT, launch, status
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import SHAPE, small_model
from numpy.typing import NDArray
from scipy.stats import spearmanr
from test_bad_input import NO_SLURM, assert_refused
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdhpc.config import downstream as tasks
from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.errors import InputError
from kdhpc.experiment import harness, own_tasks
from kdhpc.experiment.own_tasks import Item, make_items
from kdhpc.experiment.stages.downstream import text_of
from kdhpc.models import huggingface
from kdhpc.models.tokenizer import Tokenizer
from kdhpc.pipeline import LANGUAGE
from kdhpc.science import diversity
from kdhpc.storage.corpora import read_documents
from kdhpc.storage.results import ScorePieces, logical_digest, read_results, write_results

LENGTH = 64
CHOICES = [task for task in tasks.OWN_TASKS if task not in (tasks.ANSWERS, tasks.OPEN)]
"""Tasks whose items are scored by which ending is likelier."""


@pytest.fixture(scope="module", autouse=True)
def analysis() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "analysis"))
        yield


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    huggingface.byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Return texts of 60 ASCII characters, such as rows of truth's evaluation set."""
    whole = " ".join(" ".join(read_documents("python-docs", "text")).split())
    kept = "".join(character for character in whole if character.isascii())
    return [kept[start : start + 60] for start in range(0, 60 * 3000, 60)]


@pytest.fixture(scope="module")
def items(tokenizer_path: Path, texts: list[str]) -> dict[str, list[Item]]:
    """Return 256 items of each task with right and wrong endings."""
    encode = Tokenizer(tokenizer_path).text_ids
    return {
        task: make_items(task, seed=0, num_items=256, length=LENGTH, encode=encode, texts=texts)
        for task in (*CHOICES, tasks.ANSWERS)
    }


def saved(model: PreTrainedModel, tokenizer_path: Path, path: Path) -> Path:
    huggingface.save_model(model, tokenizer_path, path)
    return path


def evaluated(model_path: Path, task: str, items: list[Item], folder: Path) -> dict[str, float]:
    """Evaluate a model on items of one of kdhpc's own tasks; return the mean of each metric."""
    harness.write_own_task(folder, task, items, max_tokens=20)
    arrays = harness.evaluate(
        model_path, task, include=folder, limit=None, dtype="float32", device="cpu", batch_rows=32,
        add_begin=None,
    )  # fmt: skip
    assert arrays["cluster"].tolist() == [item.cluster for item in items]
    return {name: float(array.mean()) for name, array in arrays.items() if name != "cluster"}


@pytest.mark.parametrize("task", [*CHOICES, tasks.ANSWERS])
def test_both_endings_have_one_length_and_each_is_right_once(
    task: str, items: dict[str, list[Item]], texts: list[str], tokenizer_path: Path
) -> None:
    assert len(items[task]) == 256
    for item in items[task]:
        one, two = item.endings
        assert one != two
        assert len(one.encode()) == len(two.encode())
        assert one.startswith(" ")
        assert len((item.context + one).encode()) < LENGTH
    groups: dict[int, list[Item]] = {}
    for item in items[task]:
        groups.setdefault(item.cluster, []).append(item)
    for group in groups.values():
        if task != tasks.CORRUPTED:
            assert [item.right for item in group] == [0, 1]
            if task != tasks.PAIRS:  # where each of two subjects is right once
                assert len({item.endings for item in group}) == 1
    assert Counter(item.right for item in items[task]) == {0: 128, 1: 128}
    encode = Tokenizer(tokenizer_path).text_ids
    few, other = (
        make_items(task, seed=seed, num_items=10, length=LENGTH, encode=encode, texts=texts)
        for seed in (0, 1)
    )
    assert few == items[task][:10]
    assert (few != other) == (task != tasks.CLOZE)  # cloze takes texts as they come


def test_words_are_different_and_of_one_length() -> None:
    assert len({*own_tasks.WORDS}) == len(own_tasks.WORDS)
    assert {len(word) for word in own_tasks.WORDS} == {3}
    assert all(len(one) == len(two) for one, two in own_tasks.SUBJECTS)


def test_endings_have_as_many_tokens_in_a_vocabulary_that_splits_some_words() -> None:
    def encode(text: str) -> list[int]:
        return [0 for word in text.split() for _ in range(1 + (word in {"sun", "oak", "she"}))]

    for task in (tasks.INSTRUCTIONS, tasks.PAIRS, tasks.INDUCTION):
        made = make_items(task, seed=0, num_items=400, length=64, encode=encode, texts=[])
        assert len(made) == 400
        for item in made:
            assert len({len(encode(ending)) for ending in item.endings}) == 1


def test_instructions_have_examples_where_there_is_room() -> None:
    [item, *_] = make_items(
        tasks.INSTRUCTIONS, seed=0, num_items=2, length=128, encode=str.encode, texts=[]
    )
    pattern = r"copy: (\w+ ){4}= \w+( \w+){3}\nreverse: (\w+ ){4}= \w+( \w+){3}\ncopy: (\w+ ){4}="
    assert re.fullmatch(pattern, item.context)
    assert len((item.context + item.endings[0]).encode()) <= 128


def test_texts_without_words_make_no_item() -> None:
    for task in (tasks.CLOZE, tasks.CORRUPTED):
        with pytest.raises(InputError, match=f"no item can be made for {task}"):
            make_items(
                task, seed=0, num_items=10, length=64, encode=str.encode, texts=["x 1 2"] * 9
            )


def test_a_row_is_a_text_if_it_is_read_back_as_the_same_tokens(tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    ids, end = list(tokenizer.text_ids("The cat é")), tokenizer.eos
    for row in (ids, [*ids, end], [end, *ids, end]):
        assert text_of(row, tokenizer) == "The cat é"
    assert text_of(ids[:-1], tokenizer) is None  # half of a character


def test_a_tie_counts_one_half() -> None:
    doc = {"right": 1, "answer": "a b"}
    for log_probs, score in (((-2.0, -1.0), 1.0), ((-1.0, -2.0), 0.0), ((-1.0, -1.0), 0.5)):
        results = [(log_prob, False) for log_prob in log_probs]
        assert harness.score_choice(doc, results) == {"acc": score}
    assert harness.score_answer(doc, [" a b\n"]) == {"exact_match": 1.0}
    assert harness.score_answer(doc, ["a b c"]) == {"exact_match": 0.0}


def test_a_model_that_knows_nothing_ties_everywhere(
    items: dict[str, list[Item]], tokenizer_path: Path, tmp_path: Path
) -> None:
    model = small_model(257, LENGTH)
    for weight in model.parameters():
        weight.zero_()
    path = saved(model, tokenizer_path, tmp_path / "model")
    for task in CHOICES:
        assert evaluated(path, task, items[task][:32], tmp_path) == {"acc": 0.5}


def test_initial_weights_are_at_chance_and_a_model_that_knows_is_not(
    items: dict[str, list[Item]], tokenizer_path: Path, tmp_path: Path
) -> None:
    """The model that knows has been trained on the very items that it is asked."""
    torch.manual_seed(0)
    shape = dataclasses.replace(SHAPE, heads=4, kv_heads=4, ffn=128, init_std=0.05)
    model = small_model(257, LENGTH, shape=shape)
    initial = saved(model, tokenizer_path, tmp_path / "initial")
    some = {task: of_task[:16] for task, of_task in items.items()}
    train(model, [item for task in CHOICES for item in some[task]], Tokenizer(tokenizer_path))
    knowing = saved(model, tokenizer_path, tmp_path / "knowing")
    for task in CHOICES:
        chance = evaluated(initial, task, items[task], tmp_path)["acc"]
        assert abs(chance - 0.5) < 3.5 * 0.5 / np.sqrt(256), task
        assert evaluated(knowing, task, some[task], tmp_path)["acc"] > 0.8, task
    answers = some[tasks.ANSWERS]
    assert answers == some[tasks.INSTRUCTIONS]
    assert evaluated(initial, tasks.ANSWERS, answers, tmp_path) == {"exact_match": 0.0}
    assert evaluated(knowing, tasks.ANSWERS, answers, tmp_path)["exact_match"] > 0.7


def train(model: PreTrainedModel, learnt: list[Item], tokenizer: Tokenizer) -> None:
    """Train a model on items with their right endings until it knows them by heart."""
    rows = torch.zeros((len(learnt), LENGTH), dtype=torch.int64)
    labels = torch.full_like(rows, -100)
    for row, item in enumerate(learnt):
        ids = torch.tensor(tokenizer.text_ids(f"{item.context}{item.endings[item.right]}\n"))
        rows[row, : len(ids)] = labels[row, : len(ids)] = ids
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=300)
    for _ in range(300):
        batch = torch.randint(len(rows), (24,))
        loss = model(rows[batch], labels=labels[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().requires_grad_(False)


def test_the_ranks_of_a_job_are_not_those_of_the_harness(
    items: dict[str, list[Item]],
    tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = saved(small_model(257, LENGTH), tokenizer_path, tmp_path / "model")
    alone = evaluated(path, tasks.PAIRS, items[tasks.PAIRS][:16], tmp_path)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert evaluated(path, tasks.PAIRS, items[tasks.PAIRS][:16], tmp_path) == alone
    assert os.environ["LOCAL_RANK"] == "1"


def test_a_cut_vocabulary_scores_with_the_ids_of_the_model(
    items: dict[str, list[Item]], tokenizer_path: Path, tmp_path: Path
) -> None:
    chosen = items[tasks.INDUCTION][:64]
    texts = [item.context + ending for item in chosen for ending in item.endings]
    whole = saved(small_model(257, LENGTH), tokenizer_path, tmp_path / "whole")
    used = {i for text in texts for i in Tokenizer(whole).text_ids(text)}
    kept = sorted({0, *used, *range(100, 120)})
    path = tmp_path / "cut"
    huggingface.cut_vocabulary(whole, kept, path)
    arrays = {}
    for model_path in (whole, path):
        harness.write_own_task(tmp_path, tasks.INDUCTION, chosen, max_tokens=5)
        arrays[model_path] = harness.evaluate(
            model_path, tasks.INDUCTION, include=tmp_path, limit=None, dtype="float32",
            device="cpu", batch_rows=32, add_begin=None,
        )["acc"]  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)
        tokenizer = Tokenizer(model_path)
        for item, score in zip(chosen, arrays[model_path], strict=True):
            one, two = (log_prob(model, tokenizer, item, ending) for ending in item.endings)
            if abs(one - two) > 1e-3:
                assert score == ((one > two) == (item.right == 0))
    assert (arrays[whole] != arrays[path]).any()
    unknown = dataclasses.replace(chosen[0], endings=(" Z%", " Q%"))
    with pytest.raises(InputError, match="not in the vocabulary of"):
        evaluated(path, tasks.INDUCTION, [unknown, unknown], tmp_path)


def log_prob(model: PreTrainedModel, tokenizer: Tokenizer, item: Item, ending: str) -> float:
    """Return the log-probability of an ending after the context, in nats."""
    num_context = len(tokenizer.text_ids(item.context))
    ids = torch.tensor(tokenizer.text_ids(item.context + ending))[None]
    with torch.inference_mode():
        log_p = model(ids).logits.log_softmax(-1)
    picked = log_p[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    return float(picked[num_context - 1 :].sum())


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(st.lists(st.integers(0, 2), min_size=0, max_size=9), min_size=1, max_size=6),
    n=st.integers(1, 4),
)
def test_the_shares_of_sequences_make_the_share_of_all(rows: list[list[int]], n: int) -> None:
    length = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), 9), np.uint16)
    for out, row in zip(ids, rows, strict=True):
        out[: len(row)] = row
    shares = diversity.distinct_shares(ids, length, n)
    num_ngrams = np.maximum(length - n + 1, 0)
    assert np.array_equal(np.isnan(shares), num_ngrams == 0)
    if num_ngrams.sum():
        whole = np.nansum(shares * num_ngrams) / num_ngrams.sum()
        assert whole == pytest.approx(diversity.distinct_share(ids, length, n))


CHOICE = """
task: my_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "The {{word}} and the"
doc_to_choice: "{{[' ' + word, ' ' + other, ' they']}}"
doc_to_target: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ANSWER = """
task: my_answer
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "The {{word}}"
doc_to_target: "{{word}}"
generation_kwargs: {do_sample: false, until: ["z"], max_gen_toks: 6}
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "(.)"}, {function: take_first}]}
  - {name: all, filter: [{function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two tasks of somebody else."""
    folder = tmp_path_factory.mktemp("include")
    pairs = zip(own_tasks.WORDS[:40], own_tasks.WORDS[20:60], strict=True)
    lines = [json.dumps({"word": one, "other": two}) for one, two in pairs]
    (folder / "words.jsonl").write_text("\n".join(lines))
    for name, text in (("choice", CHOICE), ("answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(text % json.dumps(str(folder / "words.jsonl")))
    return folder


@pytest.fixture(scope="module")
def run_with_tasks(
    tiny_run: Path, include: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, set[str]]:
    """Return a finished run that gained tasks, and the names of what is new in it."""
    runs_dir = tmp_path_factory.mktemp("downstream")
    run = shutil.copytree(tiny_run, runs_dir / "tiny")
    before = {path: path.read_bytes() for path in run.glob("[1-7]-*/*/*.json")}
    words = ["tiny", "cluster=local", f"runs_dir={runs_dir}", f"downstream.include={include}"]
    words += ["downstream.tasks=[my_choice,my_answer,kdhpc_open]", "downstream.limit=32"]
    launch("sweep", *words, HF_DATASETS_CACHE=str(runs_dir / "cache"))
    assert status(run, code=0)["complete"]
    assert {path: path.read_bytes() for path in before} == before
    new = {path.parent.name for path in run.glob("[1-7]-*/*/*.json") if path not in before}
    return run, new


def test_a_finished_run_gains_tasks_and_keeps_what_it_has(
    run_with_tasks: tuple[Path, set[str]], tiny_run: Path
) -> None:
    run, new = run_with_tasks
    models = {"truth", "teacher-s0", "initial-teacher", "initial-small"}
    models |= {f"student-s0-small-{arm}" for arm in ("direct", "tau1", "tau0.6")}
    names = ("my_choice", "my_answer", tasks.OPEN)
    assert new == {f"{model}-on-{task}" for model in models for task in names}
    old, results = (read_results(folder / "8-merge" / "results.h5") for folder in (tiny_run, run))
    assert not old.downstream
    assert results.downstream.keys() == {(model, task) for model in models for task in names}
    for pair, scores in old.scores.items():
        assert np.array_equal(scores.log_prob_sum, results.scores[pair].log_prob_sum)
    assert results.models["initial-small"] == {"kind": "initial", "size": "small"}
    for (model, task), arrays in results.downstream.items():
        assert {array.shape for array in arrays.values()} == {(32,)}, (model, task)
        expected = {
            "my_choice": {"acc", "acc_norm"},
            "my_answer": {"exact_match-first", "exact_match-all"},
            tasks.OPEN: {"distinct", "log_prob"},
        }[task]
        assert arrays.keys() == expected | {"cluster"}
        assert arrays["cluster"].tolist() == ([0, 1] * 16 if task == tasks.OPEN else [*range(32)])
    launch("verify", str(run))


def test_continuations_are_likelier_under_the_truth_if_it_wrote_them(
    run_with_tasks: tuple[Path, set[str]],
) -> None:
    downstream = read_results(run_with_tasks[0] / "8-merge" / "results.h5").downstream
    of = {name: downstream[name, tasks.OPEN]["log_prob"].mean() for name, _ in downstream}
    assert of["truth"] > of["teacher-s0"] + 0.2 > of["initial-teacher"] + 0.2
    distinct = downstream["initial-small", tasks.OPEN]["distinct"]
    assert distinct.mean() > 0.9
    assert distinct.max() <= 1.0


def test_the_numbers_are_those_of_the_command_line_of_the_harness(
    run_with_tasks: tuple[Path, set[str]], include: Path, tmp_path: Path
) -> None:
    run, _ = run_with_tasks
    name = "student-s0-small-direct"
    record = json.loads((run / "3-train-on-truth" / name / "00000.json").read_text())
    model = run / "3-train-on-truth" / name / record["data"]
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
        f"pretrained={model},dtype=float32,softmax_dtype=float32", "--tasks", "my_choice",
        "my_answer", "--include_path", str(include), "--batch_size", "32", "--device",
        "cpu", "--limit", "32", "--log_samples", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    # Trainings of other tests may have left their ranks here, which the harness would join.
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    downstream = read_results(run / "8-merge" / "results.h5").downstream
    compared = 0
    for file in tmp_path.glob("out/**/samples_*.jsonl"):
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        task = "my_choice" if "my_choice" in file.name else "my_answer"
        for sample in samples:
            for metric in sample["metrics"]:
                filtered = "" if sample["filter"] == "none" else f"-{sample['filter']}"
                ours = downstream[name, task][metric + filtered][sample["doc_id"]]
                assert ours == sample[metric]
                compared += 1
    assert compared == 32 * 4
    [file] = tmp_path.glob("out/**/results_*.json")
    theirs = json.loads(file.read_text())["results"]["my_choice"]
    for metric in ("acc", "acc_norm"):
        assert downstream[name, "my_choice"][metric].mean() == theirs[f"{metric},none"]
    assert 0 < theirs["acc,none"] < 1


@pytest.mark.parametrize(
    ("words", "begins", "names"),
    [
        (["[kdhpc_pairs]"], "length=24: is too short for kdhpc_pairs", ["48"]),
        (["[kdhpc_open,kdhpc_open]"], "downstream.tasks", ["duplicate kdhpc_open"]),
        (["[a/b]"], "downstream.tasks.a/b", ["letters"]),
        (
            [
                "[kdhpc_cloze,arc_easy]",
                "truth.model=/m",
                "truth.tokenizer=model",
                "truth.vocabulary=9",
            ],
            "downstream.tasks",
            ["arc_easy has words", "kdhpc_cloze"],
        ),
        (["[kdhpc_open]", "downstream.limit=1"], "downstream.limit=1", ["at least 2"]),
        (["[x]", "downstream.include={empty}"], "downstream.include=", ["*.yaml"]),
    ],
)
def test_tasks_that_cannot_be_run_are_refused_in_one_line(
    words: list[str], begins: str, names: list[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    words = [word.format(empty=tmp_path / "empty") for word in words]
    typed = ["tiny", f"runs_dir={tmp_path}/runs", f"downstream.tasks={words[0]}", *words[1:]]
    assert_refused(launch("sweep", *typed, code=2, **NO_SLURM), begins, *names)
    assert not (tmp_path / "runs").exists()


def test_tasks_of_the_harness_are_checked_before_anything_is_submitted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, include: Path
) -> None:
    for module, name in (
        ("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE"),
    ):  # fmt: skip
        monkeypatch.setattr(importlib.import_module(module), name, True)
    refused = {
        "arc_eazy": "no task 'arc_eazy'.* such as arc_easy",
        "my_choise": "no task 'my_choise'.* such as my_choice",
        "kdhpc_pear": "no task 'kdhpc_pear'.* such as kdhpc_pairs",
        "arc_easy": "the data of arc_easy cannot be fetched .*expected a network",
        "my_answer": "my_answer asks for answers of 6 tokens; expected fewer than length=6",
    }
    for task, message in refused.items():
        with pytest.raises(InputError, match=message) as error:
            harness.check_tasks([task], include, 6)
        assert "\n" not in str(error.value)
    assert harness.check_tasks(["my_answer", tasks.OPEN], include, 7) == ("my_answer",)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"expected pip install 'kdhpc\[downstream\]'"):
        harness.check_tasks(["arc_easy"], None, 24)
    harness.check_tasks([tasks.OPEN], None, 24)


def test_task_files_that_have_changed_are_refused(include: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(include, tmp_path / "tasks")
    words = ["tiny", f"downstream.include={folder}", "downstream.tasks=[my_choice]"]
    config = LANGUAGE.prepare(presets.build(LanguageConfig, presets.compose(words)))
    assert LANGUAGE.prepare(config) == config
    [shard] = LANGUAGE.plan(config).arm("downstream", "truth-on-my_choice")
    with (folder / "words.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(InputError, match="has changed since the run was submitted"):
        LANGUAGE.prepare(config)
    words.append("downstream.include_fingerprint=''")
    changed = LANGUAGE.prepare(presets.build(LanguageConfig, presets.compose(words)))
    assert LANGUAGE.plan(changed).shards[shard.key].recipe != shard.recipe
    words = ["tiny", "downstream.tasks=[kdhpc_open]"]
    alone, beside = (
        LANGUAGE.plan(LANGUAGE.prepare(presets.build(LanguageConfig, presets.compose(typed))))
        for typed in (words, [*words, f"downstream.include={folder}"])
    )
    assert {s.recipe for s in alone.stage("downstream")} == {
        s.recipe for s in beside.stage("downstream")
    }


def test_the_folders_of_earlier_runs_keep_their_names() -> None:
    assert list(LANGUAGE.folders.values()) == [
        "1-truth", "2-sample-truth", "3-train-on-truth", "4-sample-teacher", "5-train-students",
        "6-sample-students", "7-score", "7-downstream", "8-merge",
    ]  # fmt: skip
    plan = LANGUAGE.plan(presets.build(LanguageConfig, presets.compose(["tiny"])))
    assert "downstream" not in plan.stages


def test_a_rank_correlation_is_given_the_size() -> None:
    study = importlib.import_module("downstream")
    noise = np.random.default_rng(0)
    one, two = noise.normal(size=(2, 30))
    constant = np.ones(30)
    assert study.partial_spearman(one, two, constant) == pytest.approx(spearmanr(one, two)[0])
    sizes = np.repeat([1.0, 2.0, 3.0], 10)
    both = [10 * sizes + values for values in (one, two)]  # size alone makes them go together
    assert spearmanr(*both)[0] > 0.8
    r_one, r_two, r_both = (
        spearmanr(a, b)[0] for a, b in ((both[0], sizes), (both[1], sizes), (both[0], both[1]))
    )
    formula = (r_both - r_one * r_two) / np.sqrt((1 - r_one**2) * (1 - r_two**2))
    assert study.partial_spearman(*both, sizes) == pytest.approx(formula)
    assert abs(formula) < 0.5
    for values in (constant, sizes):
        assert np.isnan(study.partial_spearman(values, two, sizes))
    assert np.isnan(study.partial_spearman([1, 2], [1, 2], [1, 1]))


def results_with_tasks(path: Path, *, seeds: int, noise: float) -> Path:
    """Write results in which precise students follow instructions better and are less various."""
    random = np.random.default_rng(0)
    counts = np.full(20, 10, np.int32)
    means: dict[tuple[str, str], float] = {("truth", "self"): -2.0}
    models: dict[str, dict[str, object]] = {"truth": {"kind": "truth", "parameters": 9}}
    downstream: dict[tuple[str, str], dict[str, NDArray[Any]]] = {}
    cluster = np.repeat(np.arange(200, dtype=np.int32), 2)
    for seed in range(seeds):
        for level, tau in enumerate((1.0, 0.8, 0.6, 0.4)):
            name = f"student-s{seed}-small-tau{tau:g}"
            models[name] = {
                "kind": "student", "seed": seed, "size": "small", "arm": f"tau{tau:g}",
                "tau": tau, "parameters": 5,
            }  # fmt: skip
            means[name, "truth"], means["truth", name] = -4.0 + 0.5 * level, -3.0 - 0.3 * level
            of = level + random.normal(0.0, noise)
            for task, metric, rate in (
                (tasks.INSTRUCTIONS, "acc", 0.5 + 0.1 * of),
                (tasks.OPEN, "distinct", 0.9 - 0.1 * of),
                (tasks.ANSWERS, "exact_match", 0.0),
            ):
                score = (np.arange(400) < 400 * rate).astype(np.float64)
                downstream[name, task] = {metric: score, "cluster": cluster}
    pieces = [
        ScorePieces(
            sampler=sampler, scorer=scorer, num_rows=20,
            pieces=[("log_prob_sum", mean * counts), ("num_tokens", counts)],
        )
        for (sampler, scorer), mean in means.items()
    ]  # fmt: skip
    write_results(
        path, recipe="r", provenance={}, scores=pieces, models=models,
        downstream=downstream.items(),
    )  # fmt: skip
    return path


def test_the_verdict_follows_from_the_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    downstream = importlib.import_module("downstream")
    path = results_with_tasks(tmp_path / "r.h5", seeds=4, noise=0.1)
    assert downstream.main([str(path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "follow instructions better? yes (kdhpc_instructions acc rises" in printed
    assert "where the end is open? yes (kdhpc_open distinct falls)" in printed
    with (tmp_path / "downstream_correlations.csv").open() as file:
        rows = {(r["task"], r["measure"]): r for r in csv.DictReader(file)}
    assert rows[tasks.INSTRUCTIONS, "recall"]["direction"] == "falls"
    assert rows[tasks.ANSWERS, "precision"]["num_seeds"] == "0"
    with (tmp_path / "downstream.csv").open() as file:
        scores = {(r["task"], r["model"]): r for r in csv.DictReader(file)}
    assert float(scores[tasks.OPEN, "small, tau 1"]["score"]) == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize(("seeds", "noise"), [(2, 0.1), (4, 20.0)])
def test_few_seeds_and_noise_decide_nothing(
    seeds: int, noise: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = results_with_tasks(tmp_path / "r.h5", seeds=seeds, noise=noise)
    assert importlib.import_module("downstream").main([str(path)]) == 0
    assert "follow instructions better? undecided" in " ".join(capsys.readouterr().out.split())


def test_a_pair_of_items_counts_once() -> None:
    statistic = importlib.import_module("downstream").statistic
    scores = np.array([1.0, 0.0] * 50 + [1.0, 1.0] * 50)
    pairs = {"acc": scores, "cluster": np.repeat(np.arange(100, dtype=np.int32), 2)}
    mean = statistic(pairs, "acc", "t")
    assert mean.value == 0.75
    by_hand = scores.reshape(-1, 2).mean(1)
    assert (mean.influence["t"] ** 2).sum() == pytest.approx(by_hand.var() / 100)
    gaps = np.where(np.arange(200) % 4 == 0, np.nan, scores)
    assert statistic({**pairs, "acc": gaps}, "acc", "t").value == np.nanmean(gaps)


def test_results_hold_scores_in_tasks_and_their_digest_covers_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, files = (importlib.import_module(name) for name in ("archive", "files"))
    path = results_with_tasks(tmp_path / "r.h5", seeds=1, noise=0.0)
    other = results_with_tasks(tmp_path / "o.h5", seeds=1, noise=0.1)
    assert logical_digest(path) != logical_digest(other)
    kept = tmp_path / "kept.h5.xz"
    assert archive.main([str(path), str(kept)]) == 0
    capsys.readouterr()
    whole, read = read_results(path).downstream, files.read_file(kept).downstream
    assert read.keys() == whole.keys() != set()
    for pair, arrays in whole.items():
        assert all(np.array_equal(read[pair][name], array) for name, array in arrays.items())


def test_a_run_without_tasks_says_how_to_gain_them(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="no scores in tasks; expected a run with downstream"):
        importlib.import_module("downstream").main([str(tiny_run)])


@pytest.mark.long
def test_the_preset_runs_from_end_to_end(tmp_path: Path) -> None:
    launch("sweep", "tiny", "downstream", "cluster=local", f"runs_dir={tmp_path}")
    run = tmp_path / "tiny-downstream"
    downstream = read_results(run / "8-merge" / "results.h5").downstream
    assert {task for _, task in downstream} == {*tasks.OWN_TASKS}
    for arrays in downstream.values():
        assert len(arrays["cluster"]) >= 2
    subprocess.run([sys.executable, "analysis/downstream.py", str(run)], check=True, cwd=ROOT)
