"""Sequences begin with the tokenizer's begin token where they should, and end at any end token."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from commands import launch, status
from models_for_tests import llama_of, small_model
from test_given_models import save
from test_own_models import model_of
from tokenizers import Tokenizer as Backend
from tokenizers import models, processors

from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.errors import DamagedError, InputError
from kdhpc.experiment import given, inputs, vocabulary
from kdhpc.models import huggingface
from kdhpc.models.tokenizer import Tokenizer
from kdhpc.pipeline import LANGUAGE
from kdhpc.sampling.sampler import Prompt, Sampler, sample
from kdhpc.scoring.counting import Counting
from kdhpc.selection import Selection
from kdhpc.storage.token_shards import Samples, read_samples

WORDS = {"<s>": 0, "</s>": 1, "T": 2, "h": 3, "e": 4}


def tokenizer_of(path: Path, *, adds: bool, begin: str | None = "<s>") -> Tokenizer:
    """Make a tokenizer of five ids that may put its begin token before a text."""
    backend = Backend(models.BPE(vocab=WORDS, merges=[]))
    backend.add_special_tokens(["<s>", "</s>"])
    if adds:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    config = {"eos_token": "</s>"} | ({"bos_token": begin} if begin else {})
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(path)


def ends_at(path: Path, ends: object) -> None:
    """Write the ids that end a sequence into a checkpoint folder."""
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))


@pytest.mark.parametrize(
    ("adds", "begin", "prompt", "ids"),
    [
        (False, "tokenizer", "The", [2, 3, 4]),
        (False, "always", "The", [0, 2, 3, 4]),
        (False, "never", "The", [2, 3, 4]),
        (True, "tokenizer", "The", [0, 2, 3, 4]),
        (True, "always", "The", [0, 2, 3, 4]),
        (True, "never", "The", [2, 3, 4]),
        (True, "tokenizer", "<s>The", [0, 2, 3, 4]),
        (False, "always", "<s>", [0]),
        (False, "tokenizer", "Th</s>e", [2, 3, 1, 4]),
    ],
)
def test_the_begin_token_comes_first_once_where_it_should(
    adds: bool, begin: str, prompt: str, ids: list[int], tmp_path: Path
) -> None:
    assert tokenizer_of(tmp_path, adds=adds).prompt_ids(prompt, begin) == ids


def test_without_a_begin_token_none_can_come_first(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, adds=False, begin=None)
    assert tokenizer.prompt_ids("The") == [2, 3, 4]
    with pytest.raises(InputError, match=r"begin=always: the tokenizer in .* has no begin token"):
        tokenizer.prompt_ids("The", "always")


def test_the_byte_tokenizer_puts_nothing_first_and_knows_special_tokens(tmp_path: Path) -> None:
    huggingface.byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    plain = tokenizer.prompt_ids("The")
    assert len(plain) == 3
    assert plain == tokenizer.prompt_ids("The", "never")
    assert tokenizer.prompt_ids("<|endoftext|>The") == [0, *plain]


def test_a_cut_vocabulary_keeps_begin_and_every_end(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole", "Llama")
    ends_at(whole, [7, 0, 300, 9])
    settings = vocabulary.Cut(
        num_ids=6, fingerprint="", seed=0, prompt="The", begin="always", length=12, threads=1
    )
    given.take("truth", str(whole), "main", "", tmp_path / "taken", dtype="float32")
    assert Tokenizer(tmp_path / "taken").other_ends == (7, 9)
    vocabulary.cut(
        tmp_path / "taken", tmp_path / "cut", settings, ids_file=None, dtype="float32", device="cpu"
    )
    tokenizer = Tokenizer(tmp_path / "cut")
    assert (tokenizer.eos, tokenizer.other_ends, tokenizer.size) == (0, (1, 2), 6)
    assert tokenizer.prompt_ids("The", "always")[0] == 0


@pytest.mark.parametrize("count_eos", [True, False])
def test_a_sequence_is_cut_off_at_the_first_of_its_ends(count_eos: bool) -> None:
    """The same numbers are drawn with one end and with three, up to where a sequence ends."""
    model = llama_of(small_model(16, 24))

    def draw(*other_ends: int) -> tuple[Samples, Counting]:
        counting = Counting(num_prompt=2, eos=0, other_ends=other_ends, count_eos=count_eos)
        sampler = Sampler(
            model, prompts=[Prompt(ids=(2, 5))], length=24, batch_rows=64, selection=Selection(),
            draw="inverse_cdf", counting=counting,
        )  # fmt: skip
        return sample(sampler, rows=range(64), seed=0, stream="test"), counting

    (one, _), (three, counting) = draw(), draw(5, 9)
    longer = 0
    for row in range(64):
        whole = one.ids[row, : one.length[row]].tolist()
        stops = [at for at in range(2, len(whole)) if whole[at] in {0, 5, 9}]
        expected = whole[: stops[0] + 1] if stops else whole
        assert three.ids[row, : three.length[row]].tolist() == expected
        longer += len(whole) > len(expected)
    assert longer > 32
    ids, length = torch.from_numpy(three.ids.astype(np.int64)), torch.from_numpy(three.length)
    last = ids.gather(1, length[:, None].long() - 1)[:, 0]
    ended = (last == 0) | (last == 5) | (last == 9)
    expected_counts = length - 2 - (ended & (not count_eos)).int()
    assert torch.equal(counting.of(ids, length).sum(1), expected_counts.long())


ENDS = [
    (0, ()), (5, (5,)), ([0], ()), ([5, 0, 9], (5, 9)), (-1, ()), ([-1, 0, 5], (5,)), (300, ()),
    ([300, 5], (5,)), ("5", ()), (None, ()), (True, ()),
]  # fmt: skip


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(("ends", "others"), ENDS)
def test_a_given_model_ends_at_the_ids_that_its_files_name(
    ends: object, others: tuple[int, ...], name: str, tmp_path: Path
) -> None:
    whole, out = save(tmp_path / "whole", "Llama"), tmp_path / "taken"
    (whole / "generation_config.json").unlink()
    file = whole / name
    config = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(config | {"eos_token_id": ends}))
    assert given.tokenizer_of(whole, "x").other_ends == others
    if name == "generation_config.json":
        given.take("truth", str(whole), "main", "", out, dtype="float32")
        assert (Tokenizer(out).eos, Tokenizer(out).other_ends) == (0, others)


def test_the_default_end_of_an_architecture_is_not_an_end(tmp_path: Path) -> None:
    whole, out = save(tmp_path / "whole", "Llama"), tmp_path / "taken"
    (whole / "generation_config.json").unlink()
    config = json.loads((whole / "config.json").read_text())
    del config["eos_token_id"]
    (whole / "config.json").write_text(json.dumps(config))
    assert hf.LlamaConfig().eos_token_id == 2
    given.take("truth", str(whole), "main", "", out, dtype="float32")
    assert Tokenizer(out).other_ends == ()


@pytest.mark.parametrize(("ends", "others"), [(0, ()), (5, ()), ([0], ()), ([5, 0, 9], (5, 9))])
def test_in_a_checkpoint_of_a_run_only_a_list_adds_ends(
    ends: object, others: tuple[int, ...], tmp_path: Path
) -> None:
    huggingface.byte_tokenizer().save_pretrained(tmp_path)
    assert Tokenizer(tmp_path).other_ends == ()
    ends_at(tmp_path, ends)
    assert (Tokenizer(tmp_path).eos, Tokenizer(tmp_path).other_ends) == (0, others)


def test_ends_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    huggingface.byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(DamagedError, match="its special tokens are not readable"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("of_truth", "of_teacher"), [([0, 5], 0), (0, [0, 9]), ([0, 5], [9]), (0, 9)]
)
def test_a_given_teacher_ends_where_the_truth_does(
    of_truth: object, of_teacher: object, tmp_path: Path
) -> None:
    truth, teacher = (save(tmp_path / name, "Llama") for name in ("truth", "teacher"))
    ends_at(truth, of_truth)
    ends_at(teacher, of_teacher)
    out = tmp_path / "taken"
    given.take("teacher", str(teacher), "main", "", out, dtype="float32", tokenizer_path=truth)
    assert Tokenizer(out).other_ends == Tokenizer(truth).other_ends


def test_begin_belongs_to_recipes_unless_it_is_the_default() -> None:
    def recipes(*words: str) -> dict[str, str]:
        config = presets.build(LanguageConfig, presets.compose(["tiny", *words]))
        return {key: shard.recipe for key, shard in LANGUAGE.plan(config).shards.items()}

    default, never = recipes(), recipes("begin=never")
    assert recipes("begin=tokenizer") == default
    same = {key for key in default if default[key] == never.get(key)}
    assert same == {"truth/truth/00000"}


def test_a_run_may_begin_with_a_special_token_and_end_in_two_ways(
    tiny_run: Path, tmp_path: Path
) -> None:
    truth = shutil.copytree(model_of(tiny_run, "1-truth", "truth"), tmp_path / "truth")
    [space] = Tokenizer(truth).prompt_ids(" ")
    ends_at(truth, [0, space])
    words = ["tiny", "cluster=local", f"runs_dir={tmp_path}", f"truth.model={truth}"]
    words += ["truth.tokenizer=model", "truth.shape=null", "truth.training=null"]
    launch("sweep", *words, "begin=always")
    run = tmp_path / "tiny"
    assert status(run, code=0)["complete"]
    student = model_of(run, "3-train-on-truth", "student-s0-small-direct")
    assert Tokenizer(student).other_ends == (space,)
    prompt = Tokenizer(student).prompt_ids("The", "always")
    for arm in ("2-sample-truth/train", "6-sample-students/student-s0-small-direct"):
        samples = read_samples(sorted((run / arm).glob("*.arrow")))
        assert (samples.ids[:, :4] == prompt).all()
        for ids, length in zip(samples.ids, samples.length, strict=True):
            drawn = ids[4:length].tolist()
            assert not {0, space} & {*drawn[:-1]}
            assert length == 24 or drawn[-1] in {0, space}


def test_a_prompt_that_fills_a_row_with_its_begin_is_refused(tmp_path: Path) -> None:
    model = save(tmp_path / "model", "Llama")
    words = ["tiny", f"truth.model={model}", "truth.tokenizer=model", "length=4", "prompt=The"]
    for begin, fits in {"tokenizer": True, "always": False}.items():
        config = presets.build(LanguageConfig, presets.compose([*words, f"begin={begin}"]))
        if fits:
            assert inputs.prepare(config).truth.fingerprint
            continue
        with pytest.raises(InputError, match="has 4 tokens; expected fewer than length=4"):
            inputs.prepare(config)
