"""Many prompts: rows of different prompts in one batch, and what is scored of them."""

import csv
import importlib
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ROOT, launch, need, status
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import llama_of, small_model
from numpy.typing import NDArray
from scipy import stats
from transformers import AutoModelForCausalLM

from kdhpc import seeding
from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig, language_problems
from kdhpc.errors import InputError
from kdhpc.experiment import prompts
from kdhpc.models import huggingface
from kdhpc.models.huggingface import TransformersModel
from kdhpc.models.tokenizer import Tokenizer
from kdhpc.sampling import native
from kdhpc.sampling.sampler import Prompt, Sampler, sample
from kdhpc.science.intervals import Statistic, by_cluster, over_seeds, ratio
from kdhpc.scoring.counting import Counting
from kdhpc.scoring.expected import score_expected
from kdhpc.scoring.scorer import score
from kdhpc.selection import Selection
from kdhpc.storage.results import read_results
from kdhpc.storage.token_shards import Samples, read_samples

MIXED = [
    Prompt(ids=(2, 3), stream="a"),
    Prompt(ids=(7,), stream="b"),
    Prompt(ids=(4, 0, 9, 1, 4, 4, 8), stream="c"),  # with the end token inside, as in chats
]
LENGTH, EOS = 14, 0


def prompt_sizes(samples: Samples) -> NDArray[np.int32]:
    assert samples.num_prompt is not None
    return samples.num_prompt


def drawn_of(
    model: Any,
    chosen: list[Prompt],
    *,
    rows: int = 24,
    batch: int = 24,
    draw: str = "inverse_cdf",
    engine: str = "torch",
) -> Samples:
    counting = Counting(num_prompt=99, eos=EOS, count_eos=True)  # rows say their own number
    sampler = Sampler(
        model, prompts=chosen, length=LENGTH, batch_rows=batch, counting=counting,
        per_token=True, selection=Selection(tau=0.9), draw=draw, engine=engine,
    )  # fmt: skip
    return sample(sampler, rows=range(rows), seed=5, stream="test")


@pytest.mark.parametrize("decoder", ["llama", "native", "transformers"])
@pytest.mark.parametrize("method", ["inverse_cdf", "gumbel"])
def test_mixed_rows_are_those_of_one_row_at_a_time(decoder: str, method: str) -> None:
    whole = small_model(11, LENGTH)
    engine = "native" if decoder == "native" else "torch"
    need(engine == "torch" or not native.missing(), f"the extension: {native.missing()}")
    model: Any = TransformersModel(whole) if decoder == "transformers" else llama_of(whole)
    together = drawn_of(model, MIXED, draw=method, engine=engine)
    assert {*together.length} != {LENGTH}  # some rows end, and the end inside a prompt ends none
    for which, prompt in enumerate(MIXED):
        alone = drawn_of(model, [prompt], rows=8, batch=1, draw=method, engine=engine)
        mixed = together[which::3]
        assert np.array_equal(alone.length, mixed.length)
        assert {*prompt_sizes(mixed)} == {len(prompt.ids)}
        for row in range(8):
            stop = mixed.length[row]
            assert np.array_equal(alone.ids[row, :stop], mixed.ids[row, :stop])
            assert tuple(mixed.ids[row, : len(prompt.ids)]) == prompt.ids
        for name in ("log_prob_sum", "log_prob_tau_sum", "end_log_prob", "token_log_prob_tau"):
            ours, theirs = vars(mixed)[name], vars(alone)[name]
            assert np.allclose(ours, theirs, atol=1e-4, equal_nan=True), name


def test_a_prompt_has_the_same_samples_in_every_company() -> None:
    model = llama_of(small_model(11, LENGTH))
    before = drawn_of(model, MIXED)
    after = drawn_of(
        model, [MIXED[2], Prompt(ids=(6, 6), stream="d"), *MIXED[:2]], rows=48, batch=24
    )
    for old, new in ((0, 2), (1, 3), (2, 0)):
        assert np.array_equal(before.ids[old::3], after.ids[new::4][:8])


def continuations(model: Any, prompt: Prompt, size: int) -> dict[tuple[int, ...], float]:
    """Return the probability of every continuation of a prompt by at most `size` tokens."""
    found: dict[tuple[int, ...], float] = {}
    open_ends: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(size):
        longer: dict[tuple[int, ...], float] = {}
        for before, probability in open_ends.items():
            ids = torch.tensor([[*prompt.ids, *before]])
            with torch.inference_mode():
                p = model(ids).logits[0, -1].double().softmax(0)
            for token, q in enumerate(p.tolist()):
                (found if token == EOS else longer)[*before, token] = probability * q
        open_ends = longer
    return found | open_ends


def test_samples_of_each_prompt_are_exact() -> None:
    whole, vocabulary, room, per_prompt = small_model(5, 6), 5, 2, 4000
    chosen = [
        Prompt(ids=(2, 3), stream="a"), Prompt(ids=(4,), stream="b"),
        Prompt(ids=(1, 0, 2, 3), stream="c"),
    ]  # fmt: skip
    counting = Counting(num_prompt=0, eos=EOS, count_eos=True)
    sampler = Sampler(
        llama_of(whole), prompts=chosen, length=6, batch_rows=1000, selection=Selection(),
        draw="inverse_cdf", counting=counting,
    )  # fmt: skip
    drawn = sample(sampler, rows=range(3 * per_prompt), seed=1, stream="chi")
    for which, prompt in enumerate(chosen):
        first, ids = len(prompt.ids), drawn.ids[which::3]
        stops = np.minimum(drawn.length[which::3], first + room)
        texts = zip(ids, stops, strict=True)
        counts = Counter(tuple(map(int, row[first:stop])) for row, stop in texts)
        expected = continuations(whole, prompt, room)
        assert sum(expected.values()) == pytest.approx(1.0)
        assert len(expected) == 1 + (vocabulary - 1) * vocabulary
        observed = np.array([counts[text] for text in expected])
        wanted = per_prompt * np.array([*expected.values()])
        assert observed.sum() == per_prompt
        assert stats.chisquare(observed, wanted).pvalue > 1e-4


def oracle(whole: Any, samples: Samples) -> NDArray[np.float64]:
    """Return log-probabilities [N, L] of a float64 loop, NaN where nothing was drawn."""
    ids = torch.from_numpy(samples.ids.astype(np.int64))
    with torch.inference_mode():
        log_p = whole.double()(ids).logits.log_softmax(-1)
    whole.float()
    picked = torch.full(ids.shape, torch.nan, dtype=torch.float64)
    picked[:, 1:] = log_p[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    for row, (first, stop) in enumerate(zip(prompt_sizes(samples), samples.length, strict=True)):
        picked[row, :first] = picked[row, stop:] = torch.nan
    return picked.numpy()


def test_scores_are_those_of_transformers() -> None:
    whole, other = small_model(11, LENGTH), small_model(11, LENGTH)
    samples = drawn_of(llama_of(whole), MIXED)
    for count_eos in (True, False):
        counting = Counting(num_prompt=99, eos=EOS, count_eos=count_eos)
        for model in (whole, other):
            exact = oracle(model, samples)
            scores = score(
                llama_of(model), samples, counting=counting, batch_rows=7, head_tokens=50,
                per_token=True,
            )[1.0]  # fmt: skip
            if not count_eos:
                for row, stop in enumerate(samples.length):
                    if samples.ids[row, stop - 1] == EOS and stop > prompt_sizes(samples)[row]:
                        assert scores.arrays()["end_log_prob"][row] == pytest.approx(
                            exact[row, stop - 1], 1e-5
                        )
                        exact[row, stop - 1] = np.nan
            assert np.array_equal(scores.num_tokens, (~np.isnan(exact)).sum(1))
            assert np.allclose(scores.arrays()["token_log_prob"], exact, 0, 1e-5, True)
            assert np.allclose(scores.log_prob_sum, np.nansum(exact, 1), atol=1e-4)
    averaged = score_expected(
        llama_of(whole), llama_of(other), samples,
        counting=Counting(num_prompt=99, eos=EOS, count_eos=True), batch_rows=7, head_tokens=50,
    )  # fmt: skip
    assert np.array_equal(averaged.num_tokens, samples.length - prompt_sizes(samples))


def test_influence_of_prompts_is_the_sum_of_their_rows() -> None:
    values = np.array([1.0, 5.0, 2.0, 7.0, 3.0, 6.0])
    plain = ratio(values, rows="a")
    grouped = by_cluster(plain, np.arange(6) % 2, rows="prompts")
    means = ratio(np.array([2.0, 6.0]), rows="prompts")
    assert np.allclose(grouped.influence["prompts"], means.influence["prompts"])
    assert grouped.value == plain.value
    both = plain + Statistic(value=1.0, influence={"b": plain.influence["a"]})
    twice = by_cluster(both, np.arange(6) % 2, rows="prompts").influence["prompts"]
    assert np.allclose(twice, 2.0 * means.influence["prompts"])


@given(
    texts=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=30),
    more=st.lists(st.text(min_size=1, max_size=6), max_size=10),
)
@settings(max_examples=30, deadline=None)
def test_a_prompt_is_held_out_for_good(texts: list[str], more: list[str]) -> None:
    before, after = (
        sorted({json.dumps({"text": text}) for text in some}) for some in (texts, texts + more)
    )
    names: tuple[prompts.Part, ...] = ("train", "eval")
    parts = {part: prompts.part_of(before, part, 0.3, 2) for part in names}
    assert sorted(itertools.chain(*parts.values())) == before
    for part, kept in parts.items():
        assert {*kept} <= {*prompts.part_of(after, part, 0.3, 2)}
        assert prompts.part_of(before, part, 0.0, 2) == before


def test_the_order_of_a_file_determines_nothing(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"prompt {i}", "id": i}) for i in range(9)]
    found = []
    for name, content in (("a", lines), ("b", [*reversed(lines), "", lines[3]])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(content))
        found.append(prompts.read_prompts(str(path)))
    assert found[0] == found[1]
    assert len(found[0]) == 9


def test_signatures_come_from_every_installation() -> None:
    entries = prompts.read_prompts("python-signatures")
    assert len(entries) > 1000
    texts = [json.loads(entry)["text"] for entry in entries]
    assert all(text.startswith("def ") and text.endswith(":\n") for text in texts)
    assert max(map(len, texts)) <= 40


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_messages_go_through_the_chat_template_of_the_model(tmp_path: Path) -> None:
    whole = huggingface.byte_tokenizer()
    whole.chat_template = TEMPLATE
    whole.save_pretrained(tmp_path / "model")
    lines = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "?"},
            ]
        },
        {"text": "plain"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = Tokenizer(tmp_path / "model")
    of = prompts.Prompts(fingerprint="", held_out_share=0.0, part="eval")
    made = prompts.prompts_of(
        tokenizer, prompt="", begin="always", prompts=of, source=str(file), seed=0
    )
    texts = {tokenizer.decode(prompt.ids) for prompt in made}
    end = "<|endoftext|>"
    assert texts == {f"[system]Be brief.{end}[user]?{end}[assistant]", f"{end}plain"}
    assert len({prompt.stream for prompt in made}) == 2


REFERENCE = "e t a, o: i_n"
TEXTS = ["The", "An if statement", "See also", "A", "Note that the", "Its syntax is", "x = "]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    file = folder / "prompts.jsonl"
    lines = [
        json.dumps({"text": text, "answer": "e", "reference": f"{REFERENCE} {text}"})
        for text in TEXTS
    ]
    file.write_text("\n".join(lines))
    launch(
        "sweep", "tiny", "cluster=local", f"runs_dir={folder}", f"prompts={file}", "seeds=2",
        "held_out_prompts=0.6", "scoring.expected=true", "scoring.corruptions=[swap]",
        "students.small.training.validate_every_steps=16",
    )  # fmt: skip
    assert status(folder / "tiny", code=0)["complete"]
    return folder / "tiny"


def samples_of(run: Path, stage: str, arm: str) -> Samples:
    records = sorted((run / stage / arm).glob("*.json"))
    return read_samples([run / stage / arm / json.loads(r.read_text())["data"] for r in records])


def model_of(run: Path, stage: str, name: str) -> Path:
    record = json.loads((run / stage / name / "00000.json").read_text())
    return run / stage / name / str(record["data"])


def test_another_chat_template_is_refused(tmp_path: Path) -> None:
    whole = huggingface.byte_tokenizer()
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "?"}]}\n{"text": "x"}\n')
    entries, tokenizers = prompts.read_prompts(str(file)), []
    for name, template in (
        ("a", TEMPLATE),
        ("b", f"!{TEMPLATE}"),
        ("c", "{{ strftime_now('%d') }}"),
    ):
        whole.chat_template = template
        whole.save_pretrained(tmp_path / name)
        tokenizers.append(Tokenizer(tmp_path / name))
    texts = prompts.digest_of_texts(entries, tokenizers[0])
    of = prompts.Prompts(fingerprint="", held_out_share=0.0, part="train", texts=texts)
    words = {"prompt": "", "begin": "never", "prompts": of, "source": str(file)}
    assert len(prompts.prompts_of(tokenizers[0], **words)) == 2  # type: ignore[arg-type]
    with pytest.raises(InputError, match="makes other texts of the messages"):
        prompts.prompts_of(tokenizers[1], **words)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="writes the date into each prompt"):
        prompts.digest_of_texts(entries, tokenizers[2])


def test_an_answer_changes_neither_part_nor_stream(tmp_path: Path) -> None:
    parts = []
    for more in ({}, {"answer": "7"}, {"answer": "7", "reference": "seven"}):
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps({"text": f"{i}"} | more) + "\n" for i in range(30)))
        entries = prompts.read_prompts(str(file))
        chosen = prompts.part_of(entries, "eval", 0.3, 0)
        parts.append([json.loads(entry)["text"] for entry in chosen])
    assert parts[0] == parts[1] == parts[2] != []


def prompts_used(run: Path, stage: str, arm: str) -> list[str]:
    tokenizer, samples = Tokenizer(model_of(run, "1-truth", "truth")), samples_of(run, stage, arm)
    rows = zip(samples.ids, prompt_sizes(samples), strict=True)
    return [tokenizer.decode(ids[:first]) for ids, first in rows]


def test_training_and_evaluation_sets_share_no_prompt(run: Path) -> None:
    used = {
        arm: prompts_used(run, stage, arm)
        for stage, arm in (
            ("2-sample-truth", "train"), ("2-sample-truth", "eval"),
            ("4-sample-teacher", "s0-tau0.6"), ("6-sample-students", "student-s0-small-direct"),
        )
    }  # fmt: skip
    assert {*used["train"]} == {*used["s0-tau0.6"]}
    assert used["eval"] == used["student-s0-small-direct"]
    assert {*used["train"]} | {*used["eval"]} == {*TEXTS}
    assert not {*used["train"]} & {*used["eval"]}
    assert max(Counter(used["eval"]).values()) - min(Counter(used["eval"]).values()) <= 1


def test_results_are_conditional_on_prompts(run: Path) -> None:
    samples = samples_of(run, "2-sample-truth", "eval")
    direct = "student-s0-small-direct"
    whole = AutoModelForCausalLM.from_pretrained(model_of(run, "3-train-on-truth", direct))
    exact = oracle(whole, samples)
    results = read_results(run / "8-merge" / "results.h5")
    scores = results.scores["truth", direct]
    assert np.allclose(scores.log_prob_sum, np.nansum(exact, 1), atol=1e-3)
    assert np.array_equal(scores.num_tokens, (~np.isnan(exact)).sum(1))
    words = [sys.executable, str(ROOT / "analysis" / "precision_recall.py"), str(run)]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "precision and recall are given the prompt" in printed
    with (run / "8-merge" / "precision_recall.csv").open() as file:
        rows = {(row["tau"], row["seed"]): row for row in csv.DictReader(file)}
    number = len({*prompts_used(run, "2-sample-truth", "eval")})
    assert number > 1
    for pair, name in ((("truth", direct), "recall"), ((direct, "truth"), "precision")):
        of = results.scores[pair]
        plain = ratio(of.log_prob_sum, of.num_tokens, rows="any")
        mean = over_seeds([by_cluster(plain, np.arange(len(samples)) % number, rows="prompts")])
        row = rows["direct", "0"]
        ours = [float(row[name]), float(row[f"{name}_low"]), float(row[f"{name}_high"])]
        assert ours == pytest.approx([mean.estimate, mean.low, mean.high], abs=1e-3)


def test_curves_are_of_the_tokens_after_each_prompt(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "analysis")
    results = read_results(run / "8-merge" / "results.h5")
    study = importlib.import_module("study").Study(results)
    [student] = [s for s in study.students if s.name == "student-s0-small-direct"]
    samples = samples_of(run, "2-sample-truth", "eval")
    log_p, log_q = (
        results.scores["truth", scorer].arrays()["token_log_prob"]
        for scorer in ("self", student.name)
    )
    terms = []
    for row, first in enumerate(prompt_sizes(samples)):
        drawn = slice(first, min(first + 16, samples.length[row]))
        log_ratio = log_q[row, drawn].astype(float).sum() - log_p[row, drawn].astype(float).sum()
        terms.append(min(1.0, np.exp(log_ratio)))
    [coverage] = study.coverages(student, 16, np.zeros(1))
    assert coverage.value == pytest.approx(np.mean(terms), abs=1e-6)


def test_right_answers_are_merged(run: Path) -> None:
    """Of a model that hardly knows letters, one in a few hundred texts ends in a line of `e`."""
    tokenizer = Tokenizer(model_of(run, "1-truth", "truth"))
    results = read_results(run / "8-merge" / "results.h5")
    for stage, arm, name in (
        ("2-sample-truth", "eval", "truth"),
        ("6-sample-students", "student-s1-small-tau0.6", "student-s1-small-tau0.6"),
    ):
        samples = samples_of(run, stage, arm)
        rows = zip(samples.ids, prompt_sizes(samples), samples.length, strict=True)
        texts = [tokenizer.decode(ids[first:stop]) for ids, first, stop in rows]
        ended = [text.endswith("<|endoftext|>") for text in texts]
        lines = [text.removesuffix("<|endoftext|>").strip().split("\n")[-1] for text in texts]
        right = results.scores[name, "self"].right
        assert right is not None
        pairs = zip(lines, ended, strict=True)
        assert right.tolist() == [int(line.strip() == "e" and is_whole) for line, is_whole in pairs]


def test_likeness_to_references_is_merged(run: Path) -> None:
    """Words are runs of letters and digits, so `i_n` is two."""
    tokenizer = Tokenizer(model_of(run, "1-truth", "truth"))
    name = "student-s1-small-tau0.6"
    samples = samples_of(run, "6-sample-students", name)
    used = prompts_used(run, "6-sample-students", name)
    measured = read_results(run / "8-merge" / "results.h5").scores[name, "self"].rouge_l
    assert measured is not None
    assert measured.any()
    expected = []
    for row, first in enumerate(prompt_sizes(samples)):
        ids = samples.ids[row, first : samples.length[row]]
        text = tokenizer.decode([i for i in ids if i != tokenizer.eos]).lower()
        words = re.findall("[a-z0-9]+", text)
        wanted = re.findall("[a-z0-9]+", f"{REFERENCE} {used[row]}".lower())
        common = longest_common(words, wanted)
        expected.append(2 * common / (len(words) + len(wanted)))
    assert measured == pytest.approx(expected, abs=1e-6)
    assert samples_of(run, "2-sample-truth", "train").rouge_l is None
    versions = read_results(run / "8-merge" / "results.h5").provenance["versions"]
    assert "rouge-score" in json.loads(versions)


def longest_common(one: list[str], two: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    before = [0] * (len(two) + 1)
    for word in one:
        row = [0]
        for at, other in enumerate(two):
            row.append(before[at] + 1 if word == other else max(row[at], before[at + 1]))
        before = row
    return before[-1]


def test_prompts_are_not_learnt(run: Path) -> None:
    """The loss of a training, here on truth's evaluation set, is over drawn tokens alone."""
    folder = run / "3-train-on-truth" / "student-s0-small-direct" / "00000.checkpoints"
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    scores = read_results(run / "8-merge" / "results.h5").scores["truth", "student-s0-small-direct"]
    recall = scores.log_prob_sum.sum() / scores.num_tokens.sum()
    assert lines[-1]["validation_loss"] == pytest.approx(-recall, abs=1e-4)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    launch("sweep", "tiny", "post_training", "cluster=local", f"runs_dir={folder}")
    assert status(folder / "tiny-post-training", code=0)["complete"]
    return folder / "tiny-post-training"


def log_of(run: Path, stage: str, name: str) -> list[dict[str, float]]:
    path = run / stage / name / "00000.checkpoints" / "train.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_fine_tuning_starts_from_the_direct_student(tuned: Path) -> None:
    direct = log_of(tuned, "3-train-on-truth", "student-s0-small-direct")
    for tau in ("1", "0.6"):
        after = log_of(tuned, "5-train-students", f"student-s0-small-tau{tau}")
        assert len(after) == 256 // 32
        assert after[0]["loss"] < direct[0]["loss"] - 0.2
        assert after[0]["loss"] == pytest.approx(loss_at_start(tuned, tau), abs=1e-3)


def test_what_cannot_be_fine_tuned_is_named() -> None:
    settings = "{learning_rate: 0.1, epochs: 1, batch_sequences: 512, micro_batch_sequences: 8}"
    words = [f"{model}.fine_tuning={settings}" for model in ("teacher", "students.small")]
    config = presets.build(LanguageConfig, presets.compose(["tiny", *words]))
    found = "; ".join(language_problems(config))
    assert "teacher.fine_tuning: expected null; only distilled students are fine-tuned" in found
    assert (
        "students.small.fine_tuning.batch_sequences=512: expected at most "
        "sampling.train_sequences=256"
    ) in found


def loss_at_start(run: Path, tau: str) -> float:
    """Return the loss of the direct student on the first batch that a fine-tuning sees."""
    samples = samples_of(run, "4-sample-teacher", f"s0-tau{tau}")
    rows = seeding.permutation(0, "student/s0/small/order", 0, len(samples))[:32]
    chosen = Samples(
        ids=samples.ids[rows], length=samples.length[rows], log_prob_sum=samples.log_prob_sum[rows],
        log_prob_tau_sum=samples.log_prob_tau_sum[rows], num_prompt=prompt_sizes(samples)[rows],
    )  # fmt: skip
    path = model_of(run, "3-train-on-truth", "student-s0-small-direct")
    return float(-np.nanmean(oracle(AutoModelForCausalLM.from_pretrained(path), chosen)))


BAD = {
    "not JSON": ("{\n", "line 1 is not JSON"),
    "neither": ('{"prompt": "x"}\n', "line 1 has neither of the two"),
    "both": ('{"text": "x", "messages": []}\n', "line 1 has both of the two"),
    "empty text": ('{"text": "a"}\n{"text": ""}\n', "line 2: its text is empty"),
    "no role": ('{"messages": [{"content": "x"}]}\n', "line 1: its messages lack a role"),
    "answer": ('{"text": "x", "answer": " 7"}\n', "line 1: its answer is ' 7'"),
    "two answers": (
        '{"text": "x", "answer": "7"}\n{"text": "x", "answer": "8"}\n', "has two answers",
    ),
    "long answer": ('{"text": "x", "answer": "7\\n8"}\n', "expected a line of text"),
    "empty reference": ('{"text": "x", "reference": " "}\n', "line 1: its reference is"),
    "no letters": ('{"text": "x", "reference": "\u65e5\u672c"}\n', "with letters a to z or digits"),
    "two references": (
        '{"text": "x", "reference": "a"}\n{"text": "x", "reference": "b"}\n', "two references",
    ),
    "half a character": ('{"text": "a\\ud83d"}\n', "line 1 has half a character"),
    "no lines": ("\n\n", "has no lines"),
    "too long": (json.dumps({"text": "x" * 24}) + "\n", "has 24 tokens; expected fewer than"),
    "no template": (
        '{"messages": [{"role": "user", "content": "x"}]}\n', "messages need a chat template",
    ),
    "one prompt": ('{"text": "x"}\n', "leaves"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_prompts_are_named_before_anything_is_written(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    refused = launch(
        "sweep", "tiny", "cluster=local", f"runs_dir={tmp_path / 'runs'}", f"prompts={file}",
        code=2,
    )  # fmt: skip
    assert message in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompts=nowhere.jsonl"], "nowhere.jsonl: not readable"),
        (["prompts=prompts.txt"], "expected a file that ends in .jsonl, or python-signatures"),
        (
            ["prompts=addition", "length=64", "downstream.tasks=[kdhpc_cloze]"],
            "kdhpc_cloze is made of truth's texts",
        ),
        (["prompts=python-signatures", "real_data"], "rows of a corpus start with `prompt` alone"),
        (["prompts=python-signatures", "held_out_prompts=1.0"], "leaves no prompts to train on"),
    ],
)
def test_bad_words_are_named(words: list[str], message: str, tmp_path: Path) -> None:
    presets = [word for word in words if "=" not in word]
    words = [word for word in words if "=" in word]
    where = ["cluster=local", f"runs_dir={tmp_path / 'runs'}"]
    refused = launch("sweep", "tiny", *presets, *words, *where, code=2)
    assert message in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_prompts_that_have_changed_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"text": "a"}\n')
    fingerprint = prompts.fingerprint_of(prompts.read_prompts(str(file)))
    file.write_text('{"text": "b"}\n')
    of = prompts.Prompts(fingerprint=fingerprint, held_out_share=0.0, part="train")
    with pytest.raises(InputError, match="have changed since the run was submitted"):
        prompts.prompts_of(None, prompt="", begin="never", prompts=of, source=str(file))  # type: ignore[arg-type]
