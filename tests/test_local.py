"""Runs on this machine are typed again, extended, damaged and disturbed."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import LIGHT_RESULTS, ROOT, assert_light_complete, launch, light_result, status
from light import expected

from kdhpc.cluster import runs
from kdhpc.cluster.ledger import Failure, Job, Ledger, Submission
from kdhpc.cluster.observe import observe
from kdhpc.cluster.runs import Run
from kdhpc.cluster.status import look, status_of
from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.errors import InputError
from kdhpc.experiment.trainings import states_recipe
from kdhpc.pipeline import LANGUAGE
from kdhpc.plan.shards import Shard
from kdhpc.storage.results import logical_digest, read_results
from kdhpc.storage.token_shards import read_samples
from kdhpc.storage.work import Work, Written
from kdhpc.training.log import read_log

RESULTS = Path("8-merge/results.h5")


def records(run: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.glob("[0-9]-*/*/*.json"))
    }


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished tiny run that may be damaged."""
    shutil.copytree(tiny_run, tmp_path / "tiny")
    return tmp_path / "tiny"


def again(run: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return launch("sweep", "tiny", "cluster=local", f"runs_dir={run.parent}", *words, code=code)


def test_typed_again_a_finished_run_changes_nothing(copy: Path) -> None:
    before, submitted = records(copy), sorted((copy / "submissions").iterdir())
    again(copy)
    assert records(copy) == before
    assert sorted((copy / "submissions").iterdir()) == submitted


def test_deleted_and_damaged_shards_are_made_again_to_the_same_digest(
    tiny_run: Path, copy: Path
) -> None:
    before = records(copy)
    lost = [
        "2-sample-truth/train/00001",
        "5-train-students/student-s0-small-tau1/00000",
        "7-score/truth-under-teacher-s0/00000",
    ]
    for name in lost:
        [data] = [p for p in copy.glob(f"{name}.*") if p.suffix not in {".json", ".checkpoints"}]
        shutil.rmtree(data) if data.is_dir() else data.unlink()
    (copy / f"{lost[0]}.json").unlink()
    [merged] = (copy / "8-merge" / "results").glob("*.h5")
    merged.write_bytes(merged.read_bytes()[:-7])
    assert len(status(copy, code=1)["damaged"]) == 3
    again(copy)
    after = records(copy)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {f"{name}.json" for name in lost} | {
        name for name in before if name.startswith("8-merge/")
    }
    assert logical_digest(copy / RESULTS) == logical_digest(tiny_run / RESULTS)
    assert "0 damaged" in launch("verify", str(copy)).stdout


def test_a_flipped_bit_is_named_by_verify(copy: Path) -> None:
    [data] = (copy / "2-sample-truth" / "eval").glob("00000.*.arrow")
    raw = bytearray(data.read_bytes())
    raw[200] ^= 1
    data.write_bytes(bytes(raw))
    verified = launch("verify", str(copy), code=1)
    assert data.name in verified.stdout


def test_watching_a_training_changes_no_weight(tiny_run: Path, copy: Path) -> None:
    """The log has losses and costs, TensorBoard events are beside it, named checkpoints stay."""
    teacher = copy / "3-train-on-truth" / "teacher-s0"
    shutil.rmtree(teacher)
    watching = {"validate_every_steps": 4, "keep_epochs": "[1.0]", "checkpoint_every_steps": 5}
    words = [f"teacher.training.{name}={value}" for name, value in watching.items()]
    again(copy, "tensorboard=true", *words)
    assert logical_digest(copy / RESULTS) == logical_digest(tiny_run / RESULTS)
    folder = teacher / "00000.checkpoints"
    log = read_log(folder)
    assert [facts["step"] for facts in log] == list(range(1, 17))
    assert [f["step"] for f in log if "validation_loss" in f] == [4, 8, 12, 16]
    assert [f["step"] for f in log if "checkpoint_s" in f] == [5, 8, 10, 15]
    assert sorted(int(path.stem) for path in folder.glob("*/*.json")) == [8, 10, 15]
    assert all(0 < facts["mfu"] <= 1 and facts["data_s"] >= 0 for facts in log)
    assert log[-1]["validation_loss"] == pytest.approx(log[-1]["loss"], rel=0.1)
    assert list(folder.glob("events.out.tfevents.*"))


def test_an_interrupted_training_is_seen_live_and_goes_on_with_another_zero_stage(
    copy: Path,
) -> None:
    for folder in copy.glob("[3-8]-*"):
        shutil.rmtree(folder)
    words = ["tiny", "cluster=local", f"runs_dir={copy.parent}", "teacher.training.epochs=60"]
    # A shell that runs the tests in the background makes them ignore interrupts.
    heard = ["env", "--default-signal=INT"]
    process = subprocess.Popen(
        [*heard, sys.executable, str(ROOT / "launch/sweep.py"), *words], stdout=subprocess.DEVNULL
    )
    live: list[str] = []
    while not live:
        assert process.poll() is None
        lines = status(copy)["live"]
        live = [line for line in lines if "teacher" in line and "MFU" in line]
    assert re.search(
        r"train-on-truth/teacher-s0/00000 \d+% step \d+ of 480 loss \d\.\d+ lr \S+ norm \S+ "
        r"\d+ tokens/s MFU \d+%$",
        live[0],
    )
    process.send_signal(signal.SIGINT)
    process.wait()
    record = copy / "3-train-on-truth/teacher-s0/00000.json"
    assert not record.exists()
    launch("sweep", *words, "teacher.training.zero_stage=2")
    stats = json.loads(record.read_text())["stats"]
    assert (stats["steps"], 0 < stats["resumed_from_step"] < 480) == (480, True)
    log = read_log(record.with_suffix(".checkpoints"))
    assert [facts["step"] for facts in log] == list(range(1, 481))


def test_checkpoints_serve_other_ranks_but_no_other_recipe() -> None:
    def recipe(*words: str) -> str:
        plan = LANGUAGE.plan(presets.build(LanguageConfig, presets.compose(["tiny", *words])))
        [teacher] = plan.arm("train-on-truth", "teacher-s0")
        return states_recipe(teacher.arm)

    training = "teacher.training"
    for same in ("nodes=2", "ranks_per_node=4", "zero_stage=3", "micro_batch_sequences=8"):
        assert recipe(f"{training}.{same}") == recipe()
    for other in ("learning_rate=1.0e-4", "batch_sequences=64", "epochs=3"):
        assert recipe(f"{training}.{other}") != recipe()
    assert recipe("seed=1") != recipe()


def test_adding_a_tau_runs_nothing_that_exists(copy: Path) -> None:
    before = records(copy)
    again(copy, "taus=[1.0,0.6,0.7]")
    after = records(copy)
    assert all(after[name] == digest for name, digest in before.items())
    new = set(after) - set(before)
    assert {name for name in new if "tau0.7" not in name and "8-merge" not in name} == set()
    results = read_results(copy / RESULTS)
    assert ("student-s0-small-tau0.7", "truth") in results.scores


def test_a_partial_merge_says_so_and_leaves_the_run_alone(copy: Path) -> None:
    before = records(copy)
    for path in (copy / "7-score" / "truth-under-teacher-s0").glob("00001*"):
        path.unlink()
    launch("rerun", str(copy), "--partial")
    merged = read_results(copy / "8-merge" / "partial.h5")
    whole = read_results(copy / RESULTS)
    assert not merged.complete
    assert whole.scores.keys() - merged.scores.keys() == {("truth", "teacher-s0")}
    assert set(before) - set(records(copy)) == {"7-score/truth-under-teacher-s0/00001.json"}


def test_cleaning_deletes_only_what_nobody_needs(copy: Path) -> None:
    before = records(copy)
    (copy / "2-sample-truth" / "train" / "00000.deadbeef.arrow").write_text("half")
    assert "00000.deadbeef.arrow" in launch("clean", str(copy)).stdout
    launch("clean", str(copy), "--yes")
    assert not (copy / "2-sample-truth" / "train" / "00000.deadbeef.arrow").exists()
    assert records(copy) == before
    assert status(copy, code=0)["complete"]


def run_here(path: Path, *words: str) -> Path:
    """Run all shards in this process, in the order of the plan."""
    config = LANGUAGE.checked(presets.build(LanguageConfig, presets.compose(["tiny", *words])))
    plan = LANGUAGE.plan(config)
    path.mkdir()
    run = Run(path, LANGUAGE)
    for shard in plan.shards.values():
        work = Work(run, config, plan)
        written = LANGUAGE.stage(shard.stage).run(shard, work)
        assert written is not None
        work.publish(shard, written, time.time())
    return path


def test_shards_of_any_size_give_the_same_ids_scores_and_digest(tmp_path: Path) -> None:
    """Shards begin where batches begin, so that nothing is rounded differently."""
    words = ["sampling.train_sequences=224", "sampling.eval_sequences=224", "scoring.batch_rows=32"]
    ids, digests = [], set()
    for num_shards, size in ((1, 224), (4, 64), (7, 32)):
        sizes = [f"sampling.shard_sequences={size}", f"scoring.shard_sequences={size}"]
        run = run_here(tmp_path / str(num_shards), *words, *sizes)
        shards = sorted((run / "2-sample-truth/train").glob("*.arrow"))
        assert len(shards) == num_shards
        ids.append(read_samples(shards).ids)
        assert np.array_equal(ids[-1], ids[0])
        digests.add(logical_digest(run / RESULTS))
    assert len(digests) == 1


def test_a_model_that_has_changed_since_is_not_taken_for_the_truth(
    tiny_run: Path, tmp_path: Path
) -> None:
    [model] = [path.parent for path in tiny_run.glob("1-truth/truth/*/config.json")]
    words = [
        "tiny",
        f"truth.model={model}",
        "truth.tokenizer=model",
        f"truth.fingerprint={'0' * 64}",
    ]
    config = LANGUAGE.checked(presets.build(LanguageConfig, presets.compose(words)))
    plan = LANGUAGE.plan(config)
    [shard] = plan.stage("truth")
    work = Work(Run(tmp_path, LANGUAGE), config, plan)
    with pytest.raises(InputError, match="has changed since the run was submitted"):
        LANGUAGE.stage("truth").run(shard, work)


def test_status_shows_a_shard_that_was_added_elsewhere_and_failed(copy: Path) -> None:
    """status.py keeps no plan of its own, so it shows a tau that another launcher added."""
    run = Run(copy, LANGUAGE)
    config: Any = runs.current(run)[1]
    wider = dataclasses.replace(config, taus=(1.0, 0.6, 0.5))
    request = runs.add_request(run, wider, kind="sweep", executor="local")
    ledger, key = Ledger(copy), "sample-teacher/s0-tau0.5/00000"
    submission = Submission(
        number=90, request=request.number, name="other", stage="sample-teacher", tasks=((key,),),
        resources={}, code=request.code, time=time.time(), host="", pid=0,
    )  # fmt: skip
    assert ledger.claim(submission)
    assert ledger.settle(90, Job(job_id=None))
    assert ledger.add_failure(Failure(key=key, kind="OOM", message="too large", submission=90))
    [cause] = status_of(run, look(run)).causes
    assert (cause.kind, cause.shards) == ("OOM", (key,))


LIGHT = ["pipeline=light:PIPELINE", "cluster=local", "name=light"]


def light(tmp_path: Path, *words: str, code: int | None = 0) -> Path:
    words = (*LIGHT, f"runs_dir={tmp_path}", f"trouble={tmp_path}/trouble", *words)
    launch("sweep", *words, code=code)
    return tmp_path / "light"


def trouble(tmp_path: Path, shard: str, what: str) -> Path:
    (tmp_path / "trouble").mkdir(exist_ok=True)
    path = tmp_path / "trouble" / shard
    path.write_text(what)
    return path


def test_any_pipeline_of_the_same_shape_runs(tmp_path: Path) -> None:
    assert_light_complete(light(tmp_path), 6)


def test_a_poison_shard_is_named_and_rerun_finishes(tmp_path: Path) -> None:
    poison = trouble(tmp_path, "make-00002", "raise")
    run = light(tmp_path, code=1)
    report = status(run, code=1)
    [cause] = report["causes"]
    assert cause["kind"] == "EXCEPTION"
    assert cause["shards"] == ["make/arm/00002"]
    assert "trouble was asked for" in cause["message"]
    assert any("RuntimeError" in line for line in cause["last_lines"])
    poison.unlink()
    launch("rerun", str(run), "--stage", "make", "--shards", "2")
    assert_light_complete(run, 6)


def test_a_bug_in_every_shard_is_shown_once_with_a_count(tmp_path: Path) -> None:
    for index in range(6):
        trouble(tmp_path, f"make-{index:05d}", "raise")
    run = light(tmp_path, code=1)
    report = status(run, code=1)
    [cause] = report["causes"]
    assert len(cause["shards"]) >= 2
    not_started = 6 - len(cause["shards"])
    assert not not_started or f"{not_started} shards are not started" in report["notes"][0]
    shutil.rmtree(tmp_path / "trouble")
    light(tmp_path)
    assert_light_complete(run, 6)


def test_a_killed_worker_costs_one_attempt(tmp_path: Path) -> None:
    trouble(tmp_path, "square-00003", "kill")
    run = light(tmp_path, code=1)
    [cause] = status(run, code=1)["causes"]
    assert cause["kind"] == "LOST"
    assert "SIGKILL" in cause["message"]
    (tmp_path / "trouble" / "square-00003").unlink()
    light(tmp_path)
    assert_light_complete(run, 6)


def start(tmp_path: Path) -> subprocess.Popen[bytes]:
    """Start a run in the background that hangs in one shard."""
    trouble(tmp_path, "square-00001", "sleep 600")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch/sweep.py"), *LIGHT, f"runs_dir={tmp_path}",
         f"trouble={tmp_path}/trouble"],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
    )  # fmt: skip
    while not (tmp_path / "light/2-square/arm/00000.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    return process


def kill(process: subprocess.Popen[bytes], tmp_path: Path, number: int = signal.SIGKILL) -> None:
    """End a launcher, then its workers, one of which hangs and would go on without it."""
    command = ["pgrep", "-f", f"kdhpc.cluster.task {tmp_path}/light"]
    workers = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    process.send_signal(number)
    time.sleep(0.5)
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(worker), signal.SIGKILL)
    process.wait()


def test_a_second_launcher_is_told_that_the_run_is_held(tmp_path: Path) -> None:
    process = start(tmp_path)
    try:
        words = [*LIGHT, f"runs_dir={tmp_path}", f"trouble={tmp_path}/trouble"]
        second = launch("sweep", *words, code=3)
        assert str(process.pid) in second.stderr
        assert status(tmp_path / "light")["stages"][1]["running"] > 0
        launch("clean", str(tmp_path / "light"), code=3)
    finally:
        kill(process, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_after_a_killed_launcher_the_same_command_goes_on(tmp_path: Path, number: int) -> None:
    process = start(tmp_path)
    kept = records(tmp_path / "light")
    (tmp_path / "trouble" / "square-00001").write_text("raise")
    kill(process, tmp_path, number)
    shutil.rmtree(tmp_path / "trouble")
    run = light(tmp_path)
    assert_light_complete(run, 6)
    assert all(records(run)[name] == digest for name, digest in kept.items())


def test_status_reads_each_folder_and_each_record_once(tiny_run: Path) -> None:
    """The work of status grows no faster than the number of shards."""
    code = f"""
import sys, collections, os
from pathlib import Path
from kdhpc.cluster import runs, status
folders, files = collections.Counter(), collections.Counter()
seen = {{"os.scandir": folders, "open": files}}
run = runs.find({str(tiny_run)!r})
def hook(name, args):
    if name in seen:
        seen[name].update([os.path.relpath(str(args[0]), run.path)])
sys.addaudithook(hook)
status.look(run)
stages = tuple(run.folders.values())
reads = {{path: n for path, n in folders.items() if path.startswith(stages)}}
assert len(reads) > 20 and set(reads.values()) == {{1}}, reads
reads = {{path: n for path, n in files.items() if path.startswith(stages)}}
records = [str(path.relative_to(run.path)) for path in run.path.glob("[0-9]-*/*/*.json")]
assert reads == dict.fromkeys(records, 1), reads
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_measured_seconds_decide_how_shards_are_packed(copy: Path) -> None:
    """Two of four shards are done and took 60 s each, so the others get a task each."""
    run = Run(copy, LANGUAGE)
    _, config, plan = runs.current(run)
    shards = plan.arm("sample-truth", "train")
    for shard in shards:
        run.record_path(shard.key).unlink()
    policy = dataclasses.replace(observe(run, config, plan).policy, task_s=40.0)
    before = observe(run, config, plan, policy=policy)
    assert sum(len(batch.tasks) for batch in before.decision.batches) == 1
    work = Work(run, config, plan)
    for shard in shards[:2]:
        path = work.new_path(shard)
        path.write_text("ids")
        work.publish(shard, Written(path=path, num_rows=1), time.time() - 60)
    after = observe(run, config, plan, policy=policy)
    assert after.situation.factors["sample-truth"] * shards[0].work > 30
    assert sum(len(batch.tasks) for batch in after.decision.batches) == 2


def test_a_refresh_asks_slurm_once(copy: Path, tmp_path: Path) -> None:
    """Slurm's programs are replaced by ones that note that they were called."""
    (tmp_path / "bin").mkdir()
    for name in ("squeue", "sacct", "scontrol", "sbatch", "scancel", "sinfo"):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/called\n")
        program.chmod(0o755)
    run = Run(copy, LANGUAGE)
    _, config, _ = runs.current(run)
    runs.add_request(run, config, kind="sweep", executor="slurm")
    launch("status", str(copy), PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert (tmp_path / "called").read_text().split() == ["squeue"]


def opens_of_truth(run: Run, submission: int, shards: Sequence[Shard]) -> dict[str, int]:
    """Make shards again as one task of a fresh process.

    Audit hooks see the files that Python opens. Weights are opened by Rust and are not seen.

    Returns:
        How often the process opened each file of the model.
    """
    for shard in shards:
        run.record_path(shard.key).unlink()
    Ledger(run.path).claim(
        Submission(
            number=submission,
            request=runs.current(run)[0],
            name="again",
            stage=shards[0].stage,
            tasks=(tuple(shard.key for shard in shards),),
            resources={},
            code="",
            time=time.time(),
            host="",
            pid=0,
        )
    )
    code = f"""
import collections, json, sys
from pathlib import Path
from kdhpc.cluster.task import run_task
opened = collections.Counter()
[model] = Path({str(run.path)!r}).glob("1-truth/*/*/config.json")
def hook(name, args):
    if name == "open" and Path(str(args[0])).parent == model.parent:
        opened[Path(str(args[0])).name] += 1
sys.addaudithook(hook)
assert run_task(Path({str(run.path)!r}), {submission}, 0) == 0
print(json.dumps(opened))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    num_opened: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return num_opened


def test_a_task_loads_a_model_once(copy: Path) -> None:
    """The model's files are opened as often for one shard as for all shards of an arm."""
    run = Run(copy, LANGUAGE)
    shards = runs.current(run)[2].arm("sample-truth", "train")
    assert len(shards) > 2
    for_one = opens_of_truth(run, 98, shards[:1])
    assert for_one["config.json"] > 0
    assert opens_of_truth(run, 99, shards) == for_one


def test_core_seconds_go_somewhere(tiny_run: Path) -> None:
    """Processes start before their shards, and shards before they are ready; the rest is idle."""
    command = [sys.executable, str(ROOT / "benchmarks/core_seconds.py"), str(tiny_run), "--json"]
    shown = subprocess.run([*command, "--cores", "2"], capture_output=True, text=True).stdout
    report = json.loads(shown.splitlines()[-1])
    stages = [
        stage for stage in LANGUAGE.stages if (tiny_run / LANGUAGE.folders[stage.name]).exists()
    ]
    wanted = {f"useful: {stage.name}" for stage in stages}
    assert len(wanted) == 8
    assert all(report["spent"][name] > 0 for name in wanted)
    assert all(seconds >= 0 for seconds in report["spent"].values())


def test_an_input_with_a_flipped_bit_is_made_again_by_its_reader(tmp_path: Path) -> None:
    run = light(tmp_path)
    [data] = (run / "1-make/arm").glob("00002.*.txt")
    data.write_text("9")
    for path in (run / "2-square/arm").glob("00002.*"):
        path.unlink()
    for path in (run / "3-merge/all").iterdir():
        path.unlink()
    light(tmp_path, code=None)
    assert light_result(run) == expected(6)
    assert "0 damaged" in launch("verify", str(run)).stdout


def test_a_lost_alias_is_made_again(tmp_path: Path) -> None:
    run = light(tmp_path)
    (run / LIGHT_RESULTS).unlink()
    light(tmp_path)
    assert light_result(run) == expected(6)


def test_the_hook_is_told_how_a_run_ended(tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    hook.chmod(0o755)
    poison = trouble(tmp_path, "make-00002", "raise")
    run = light(tmp_path, f"slurm.on_end={hook}", code=1)
    poison.unlink()
    light(tmp_path, f"slurm.on_end={hook}")
    told = (tmp_path / "told").read_text().splitlines()
    assert told == [f"{run} stopped", f"{run} complete"]


def test_other_settings_under_published_results_are_refused_and_elsewhere_allowed(
    tmp_path: Path,
) -> None:
    run = light(tmp_path)
    before = records(run)
    words = [*LIGHT, f"runs_dir={tmp_path}", "seed=5"]
    assert "seed: 0 -> 5" in launch("sweep", *words, code=2).stderr
    assert records(run) == before
    launch("sweep", *words, "name=other")


def test_a_run_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    run = light(tmp_path)
    run.chmod(0o777)
    assert "its code would run as you" in launch("status", str(run), code=2).stderr


def test_a_student_with_fewer_sequences_is_that_of_a_run_with_fewer(
    tiny_run: Path, tmp_path: Path
) -> None:
    """The teacher still learns from all of D; a size with all of it shares everything else."""
    words = ["tiny", "cluster=local", f"runs_dir={tmp_path}", "until=train-on-truth"]
    launch("sweep", *words, "name=few", "students.small.train_sequences=100")
    launch("sweep", *words, "name=less", "sampling.train_sequences=100")
    direct, teacher = ("3-train-on-truth/student-s0-small-direct", "3-train-on-truth/teacher-s0")
    records = {
        (name, model): json.loads((tmp_path / name / model / "00000.json").read_text())
        for name in ("few", "less")
        for model in (direct, teacher)
    }
    few, less = records["few", direct], records["less", direct]
    assert few["recipe"] == less["recipe"]
    assert few["stats"]["steps"] == less["stats"]["steps"] == 6
    weights = [
        (tmp_path / name / direct / record["data"] / "model.safetensors").read_bytes()
        for name, record in (("few", few), ("less", less))
    ]
    assert weights[0] == weights[1]
    whole = json.loads((tiny_run / teacher / "00000.json").read_text())
    assert (
        records["few", teacher]["recipe"] == whole["recipe"] != records["less", teacher]["recipe"]
    )
    assert len(list((tmp_path / "few" / "2-sample-truth" / "train").glob("*.json"))) == 4
    for limit, message in (
        (
            1000,
            "students.small.train_sequences=1000: expected at most sampling.train_sequences=256",
        ),
        (8, "expected at most students.small.train_sequences=8"),
    ):
        refused = launch("sweep", *words, f"students.small.train_sequences={limit}", code=2)
        assert message in refused.stderr
