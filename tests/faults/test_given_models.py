"""Runs that start from finished models give the same numbers on Slurm as in local processes."""

import json
import subprocess
from pathlib import Path

import pytest
import transformers as hf
from commands import launch, status
from real_slurm import wait_for_end
from tokenizers import Tokenizer

from kdhpc.models.huggingface import byte_tokenizer
from kdhpc.storage.results import logical_digest

SIZES = ["sampling.train_sequences=128", "sampling.eval_sequences=64", "taus=[0.6]"]
MEMORY = ["slurm.mem_gb=1.3", "slurm.gate.mem_gb=0.2"]


def model(path: Path, *, num_ids: int = 257, seed: int = 0) -> Path:
    """Save a random Llama with a byte tokenizer, which has more words if `num_ids` is more."""
    config = hf.LlamaConfig(
        vocab_size=num_ids, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    hf.set_seed(seed)
    hf.LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    if num_ids > 257:
        content = json.loads((path / "tokenizer.json").read_text())
        content["model"]["vocab"] |= {f"w{i}": i for i in range(257, num_ids)}
        (path / "tokenizer.json").write_text(json.dumps(content))
        assert Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size() == num_ids
    return path


def words_of(case: str, folder: Path) -> list[str]:
    if case == "teacher and student":
        truth, student = model(folder / "truth"), model(folder / "student", seed=1)
        return [
            f"truth.model={truth}", "truth.tokenizer=model", f"teacher.model={truth}",
            "teacher.training=null", f"students.small.model={student}",
        ]  # fmt: skip
    if case == "a part of the vocabulary":
        whole = model(folder / "whole")
        return [f"truth.model={whole}", "truth.tokenizer=model", "truth.vocabulary=100"]
    large = model(folder / "large", num_ids=70_000)
    return [f"truth.model={large}", "truth.tokenizer=model"]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "case",
    [
        "teacher and student",
        pytest.param("a part of the vocabulary", marks=pytest.mark.long),
        pytest.param("a vocabulary of 70,000", marks=pytest.mark.long),
    ],
)
def test_given_models_give_the_same_digest_on_slurm(case: str, tmp_path: Path) -> None:
    words = ["tiny", *SIZES, *words_of(case, tmp_path)]
    launch("sweep", *words, "cluster=local", f"runs_dir={tmp_path}/local")
    launch("sweep", *words, "cluster=slurm", *MEMORY, f"runs_dir={tmp_path}/slurm")
    runs = [tmp_path / place / "tiny" for place in ("slurm", "local")]
    wait_for_end(runs[0])
    assert status(runs[0], code=0)["complete"], subprocess.run(["squeue"], check=False)
    one, two = (logical_digest(run / "8-merge" / "results.h5") for run in runs)
    assert one == two
