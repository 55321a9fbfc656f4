"""Requests of a run, and what of them reaches the next submission."""

import dataclasses
import shutil
import subprocess
import time
import types
from pathlib import Path
from typing import Any

import pytest
from commands import assert_light_complete, launch, need, status
from light import PIPELINE, LightConfig

from kdhpc.cluster import local, planning, runs, slurm
from kdhpc.cluster.advance import _failures_of, advance
from kdhpc.cluster.decide import Batch, Changes
from kdhpc.cluster.display import note_ignored_variables
from kdhpc.cluster.gate import tell
from kdhpc.cluster.ledger import Job, Ledger, Submission
from kdhpc.cluster.observe import _held, observe
from kdhpc.cluster.resources import array_resources, gate_resources
from kdhpc.cluster.runs import Run
from kdhpc.cluster.status import status_of
from kdhpc.errors import InputError


@pytest.fixture
def config(tmp_path: Path) -> LightConfig:
    return LightConfig(pipeline="light:PIPELINE", name="light", runs_dir=str(tmp_path))


@pytest.fixture
def run(config: LightConfig) -> Run:
    return runs.open_for(config, PIPELINE.plan(config))


def submitted(tasks: tuple[tuple[str, ...], ...], pack: int = 1) -> Submission:
    return Submission(
        number=1, request=1, name="make.light-0001", stage="make", tasks=tasks,
        resources={"pack": pack}, code="", time=time.time(), host="", pid=0,
    )  # fmt: skip


def resources_of(run: Run, key: str) -> Any:
    _, config, plan = runs.current(run)
    return observe(run, config, plan, with_queue=False).situation.overrides.get(key, {})


def test_resources_of_reruns_add_up_and_end_with_a_sweep(run: Run, config: LightConfig) -> None:
    key = "make/arm/00000"
    runs.add_request(run, config, kind="sweep", executor="slurm")
    for resources in ({"mem_gb": 8.0}, {"time_min": 30}, {"mem_gb": 16.0}):
        runs.add_request(run, config, kind="rerun", executor="slurm", resources=resources)
    assert resources_of(run, key) == {"mem_gb": 16.0, "time_min": 30}
    changed = dataclasses.replace(config, slurm=dataclasses.replace(config.slurm, time_min=600))
    runs.add_request(run, changed, kind="sweep", executor="slurm")
    assert resources_of(run, key) == {}


def test_a_gate_that_is_left_from_slurm_leaves_a_local_request_alone(
    run: Run, config: LightConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # whatever asks Slurm fails
    runs.add_request(run, config, kind="sweep", executor="local")
    state = advance(run)
    assert state.decision.batches
    assert state.submissions == ()


def test_a_pipeline_whose_files_are_not_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "mine.py").write_text("from light import PIPELINE\n")
    words = ["pipeline=space.mine:PIPELINE", "cluster=local", f"runs_dir={tmp_path}", "name=x"]
    path = f"{tmp_path}:{Path(__file__).parent}"
    refused = launch("sweep", *words, code=2, PYTHONPATH=path)
    assert "the package space has no __init__.py" in refused.stderr


def test_a_mail_or_hook_that_fails_is_a_warning(
    run: Run,
    config: LightConfig,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    told = dataclasses.replace(config.slurm, on_end="/nonexistent", mail_user="me@example.org")
    config = dataclasses.replace(config, slurm=told)
    runs.add_request(run, config, kind="sweep", executor="local")
    state = observe(run, config, PIPELINE.plan(config), with_queue=False)
    monkeypatch.setenv("PATH", "/nowhere")
    tell(run, state)
    said = capfd.readouterr()
    assert "warning: slurm.on_end: /nonexistent" in said.err
    assert "warning: slurm.mail_user: mail" in said.err
    assert said.out == "light: stopped\n"


def test_a_cancel_by_the_user_is_one_whatever_the_task_said_last(
    run: Run, config: LightConfig
) -> None:
    runs.add_request(run, config, kind="sweep", executor="slurm")
    ledger, key = Ledger(run.path), "make/arm/00000"
    submission = submitted(((key,),))
    for event in ("started", "stopped"):
        ledger.note_attempt(1, 0, key, event)
    for state, kind in (("CANCELLED by 1000", "CANCELLED"), ("FAILED", "STOPPED")):
        ended = slurm.Ended(state=state, exit_code="0:15", node="n1")
        [failure] = _failures_of(run, ledger, submission, 0, [key], ended)
        assert (failure.key, failure.kind) == (key, kind)


def test_a_rerun_takes_a_resource_away_with_null(run: Run, config: LightConfig) -> None:
    asked = planning.resource_overrides(["slurm.mem_gb=null", "slurm.partition=null"], config)
    batch = Batch(
        stage="make", tasks=(("a",),), nodes=1, ranks_per_node=1, changes=Changes(asked=asked)
    )
    slurm_ = dataclasses.replace(config.slurm, partition="p")
    resources = array_resources(dataclasses.replace(config, slurm=slurm_), batch, False)
    assert (resources.mem_gb, resources.partition) == (None, None)


def test_a_task_that_cancel_ended_is_cancelled_even_without_accounting(
    run: Run, config: LightConfig
) -> None:
    runs.add_request(run, config, kind="sweep", executor="slurm")
    key = "make/arm/00000"
    runs.add_request(run, config, kind="cancel", executor="slurm")
    ended = slurm.Ended(state="", exit_code="", node="")
    [failure] = _failures_of(run, Ledger(run.path), submitted(((key,),)), 0, [key], ended)
    assert (failure.kind, failure.message) == ("CANCELLED", "was cancelled by cancel.py")


def test_only_the_stage_that_is_asked_for_is_put_aside(tmp_path: Path) -> None:
    words = ["pipeline=light:PIPELINE", "cluster=local", f"runs_dir={tmp_path}", "name=x"]
    launch("sweep", *words)
    for name in ("1-make", "2-square"):
        next((tmp_path / "x" / name / "arm").glob("00000.*.txt")).write_text("damage")
    launch("rerun", str(tmp_path / "x"), "--stage", "square", code=1)
    assert len(list((tmp_path / "x" / "2-square").rglob("*.damaged-*"))) == 1
    assert not list((tmp_path / "x" / "1-make").rglob("*.damaged-*"))


def test_more_processes_than_gpus_of_a_node_are_refused() -> None:
    for words, named in (
        (
            ["slurm.pack=4", "slurm.gpus_per_node=2"],
            "slurm.pack=4: expected at most",
        ),
        (["slurm.gpus_per_node=2", "slurm.stages.score.pack=3"], "slurm.stages.score.pack=3"),
    ):
        with pytest.raises(InputError, match=named):
            runs.from_words(["tiny", *words])
    runs.from_words(["tiny", "slurm.pack=4", "slurm.gpus_per_node=4"])
    runs.from_words(["tiny", "slurm.pack=4"])


def test_a_stage_of_another_pipeline_may_stand_in_the_file_of_a_cluster() -> None:
    runs.from_words(["mixture", "cluster=sites/jean_zay"])
    with pytest.raises(InputError, match=r"slurm\.stages\.nope: no such stage"):
        runs.from_words(["mixture", "slurm.stages.nope.mem_gb=1"])


def test_a_gate_follows_a_rerun_to_another_partition_but_keeps_its_size(
    config: LightConfig,
) -> None:
    asked = {"partition": "other", "account": "me", "mem_gb": 64.0, "time_min": 600, "pack": 4}
    gate = gate_resources(config.slurm, asked)
    assert (gate.partition, gate.account) == ("other", "me")
    assert (gate.mem_gb, gate.time_min, gate.pack) == (1.0, 10, 1)
    own = dataclasses.replace(config.slurm.gate, partition="cpu")
    left = dataclasses.replace(config.slurm, mem_gb=None)
    assert gate_resources(left, {}).mem_gb is None
    typed = dataclasses.replace(left, gate=dataclasses.replace(left.gate, mem_gb=0.2))
    assert gate_resources(typed, {}).mem_gb == 0.2
    gate = gate_resources(dataclasses.replace(config.slurm, gate=own), asked)
    assert (gate.partition, gate.account) == ("cpu", "me")


@pytest.mark.parametrize(
    ("released_ago_s", "booted_ago_s", "to_release"),
    [
        (None, 1e6, True),  # its launcher died before it released the job
        (100.0, 1e6, False),  # somebody has held it since
        (100.0, 50.0, True),  # the controller started again and forgot the release
        (5000.0, 50.0, False),  # a hold from before the controller started again
    ],
)
def test_a_hold_by_a_user_is_told_from_a_job_that_was_never_released(
    released_ago_s: float | None,
    booted_ago_s: float,
    to_release: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scontrol = tmp_path / "scontrol"
    booted = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - booted_ago_s))
    scontrol.write_text(f"#!/bin/sh\necho 'BOOT_TIME               = {booted}'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    queued = slurm.Queued(
        job_id="7", index=0, state="PENDING", reason="JobHeldUser", name="make.light-0001"
    )
    jobs = {1: Job(job_id="7")}
    released = {} if released_ago_s is None else {1: time.time() - released_ago_s}
    held = _held([submitted((("make/arm/00000",),))], jobs, [queued], released)
    assert held == ((frozenset("7"), frozenset()) if to_release else (frozenset(), frozenset("7")))


def test_each_shard_of_a_packed_task_is_taken_once_in_each_start_of_the_task(run: Run) -> None:
    ledger = Ledger(run.path)
    taken = [ledger.claim_shard(1, 0, start, index) for start in (0, 1) for index in (0, 1, 0)]
    assert taken == [True, True, False] * 2
    ledger.forget_claim(1, 0, 0, 0)
    assert ledger.claim_shard(1, 0, 0, 0)
    shutil.rmtree(run.path / "attempts")
    (run.path / "attempts").write_text("")
    assert ledger.claim_shard(1, 0, 0, 0) is None


def test_of_a_packed_task_every_process_that_ended_early_loses_its_own_shard(
    run: Run, config: LightConfig
) -> None:
    runs.add_request(run, config, kind="sweep", executor="slurm")
    ledger, keys = Ledger(run.path), [f"make/arm/{i:05d}" for i in range(5)]
    submission = submitted((tuple(keys),), pack=3)
    for process, key, events in (
        (0, keys[0], ["started", "ended"]),
        (1, keys[1], ["started"]),
        (2, keys[2], ["started", "stopped"]),
        (0, keys[3], ["started"]),
    ):
        for event in events:
            ledger.note_attempt(1, 0, key, event, process)  # type: ignore[arg-type]
    ended = slurm.Ended(state="FAILED", exit_code="137:0", node="n1")
    found = {f.key: f for f in _failures_of(run, ledger, submission, 0, keys[1:], ended)}
    assert {key: failure.kind for key, failure in found.items()} == {
        keys[1]: "LOST",
        keys[2]: "STOPPED",
        keys[3]: "LOST",
    }
    logs = [Path(found[key].log).name for key in keys[1:4]]
    assert logs == ["0.1.log", "0.2.log", "0.0.log"]


def test_a_local_run_ends_after_the_stage_that_was_asked_for(tmp_path: Path) -> None:
    words = ["pipeline=light:PIPELINE", "cluster=local", f"runs_dir={tmp_path}", "name=x"]
    refused = launch("sweep", *words, "until=nope", code=2)
    assert "until=nope: no such stage; expected one of make, square, merge" in refused.stderr
    launch("sweep", *words, "until=make")
    report = status(tmp_path / "x", code=0)
    assert [stage["done"] for stage in report["stages"]] == [6, 0, 0]
    assert (report["finished"], report["complete"]) == (True, False)
    launch("rerun", str(tmp_path / "x"))
    assert [stage["done"] for stage in status(tmp_path / "x", code=0)["stages"]] == [6, 0, 0]
    explained = launch("status", str(tmp_path / "x"), "--explain", "square/arm/00000", code=1)
    assert "run sweep.py without until=make" in explained.stdout
    launch("sweep", *words)
    assert_light_complete(tmp_path / "x", 6)


def test_after_a_fault_of_its_gpu_a_process_starts_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "trouble").mkdir()
    trouble = tmp_path / "trouble" / "make-00001"
    trouble.write_text("once raise CUDA error: unspecified launch failure")
    words = ["pipeline=light:PIPELINE", "cluster=local", f"runs_dir={tmp_path}", "name=x"]
    words += ["local_workers=1", f"trouble={tmp_path}/trouble", f"trace={tmp_path}/trace"]
    launch("sweep", *words)
    assert_light_complete(tmp_path / "x", 6)
    [failure] = Ledger(tmp_path / "x").failures()
    assert (failure.key, failure.kind) == ("make/arm/00001", "GPU_BAD")
    starts = [line.split() for line in (tmp_path / "trace").read_text().splitlines()]
    assert len(starts) == 6 + 6 + 1 + 1
    broken = next(pid for key, _, pid in starts if key == "make/arm/00001")
    assert [key for key, _, pid in starts if pid == broken][-1] == "make/arm/00001"


@pytest.mark.parametrize(("asked_for", "num_gpus", "workers"), [(0, 4, 4), (2, 4, 2), (3, 0, 3)])
def test_there_are_as_many_local_workers_as_gpus(
    asked_for: int, num_gpus: int, workers: int, config: LightConfig
) -> None:
    config = dataclasses.replace(config, local_workers=asked_for)
    assert local.num_workers(config, num_gpus) == workers


def test_every_local_process_has_a_gpu_of_its_own(run: Run, config: LightConfig) -> None:
    """A worker is any object with a slot here; no process is started."""
    pool = local._Pool(run, dataclasses.replace(config, local_workers=4), Ledger(run.path))
    pool.num_gpus = 4
    batch = Batch(stage="make", tasks=(("a",),), nodes=1, ranks_per_node=3)

    def task(*slots: int) -> local._Task:
        workers: Any = [types.SimpleNamespace(slot=slot) for slot in slots]
        return local._Task(submission=submitted((("a",),)), workers=workers, codes={})

    assert (pool.num_free, pool.fits(batch), pool._free_slots(3)) == (4, True, [0, 1, 2])
    pool.tasks = [task(1)]
    assert (pool.num_free, pool.fits(batch), pool._free_slots(3)) == (3, True, [0, 2, 3])
    pool.tasks = [task(1), task(0)]
    assert (pool.num_free, pool.fits(batch), pool._free_slots(1)) == (2, False, [2])
    pool.tasks = [task(0, 2, 3)]
    assert (pool.num_free, pool._free_slots(1)) == (1, [1])
    pool.tasks, pool.broken = [], {0, 2}
    assert (pool.num_free, pool._free_slots(3)) == (2, [1, 3, 0])
    pool.broken = {0, 1, 2, 3}
    assert (pool.num_free, pool.fits(batch)) == (1, True)


def test_the_words_of_a_gate_that_died_are_shown(run: Run, config: LightConfig) -> None:
    runs.add_request(run, config, kind="sweep", executor="slurm")
    ledger = Ledger(run.path)
    ledger.claim(submitted((("make/arm/00000",),)))
    ledger.settle(1, Job(job_id="7", gate_id="8"))
    log = ledger.log_path(1, 0).with_name("gate.log")
    log.parent.mkdir()
    state = observe(run, config, PIPELINE.plan(config), with_queue=False)
    [note] = [note for note in status_of(run, state).notes if "could start" in note]
    assert "the last gate said nothing: sacct -j 8 says why" in note
    log.write_text("error: sbatch did not answer in 120 s\n\n")
    [note] = [note for note in status_of(run, state).notes if "could start" in note]
    assert f"the last gate said: error: sbatch did not answer in 120 s ({log})" in note


@pytest.mark.parametrize(
    ("reason", "never"),
    [
        ("PartitionTimeLimit", True),
        ("BadConstraints", True),
        ("QOSMaxWallDurationPerJobLimit", True),
        ("AssocMaxNodePerJobLimit", True),
        ("InvalidQOS", True),
        ("Priority", False),
        ("Resources", False),
        ("QOSMaxJobsPerUserLimit", False),
        ("AssocGrpCpuLimit", False),
        ("ReqNodeNotAvail, Reserved for maintenance", False),
    ],
)
def test_a_job_that_can_never_start_is_named_with_what_to_do(
    reason: str, never: bool, run: Run, config: LightConfig
) -> None:
    runs.add_request(run, config, kind="sweep", executor="slurm")
    state = observe(run, config, PIPELINE.plan(config), with_queue=False)
    task = slurm.Queued(job_id="7", index=0, state="PENDING", reason=reason, name="x")
    notes = status_of(run, dataclasses.replace(state, queued=(task,))).notes
    said = [note for note in notes if f"1 jobs can never start ({reason})" in note]
    assert len(said) == never
    assert all("rerun.py RUN" in note for note in said)


def test_variables_that_sbatch_would_read_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in slurm.ignored_variables():
        monkeypatch.delenv(name)
    note_ignored_variables()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("SBATCH_ACCOUNT", "me")
    note_ignored_variables()
    assert "SBATCH_ACCOUNT: not used" in capsys.readouterr().err


def test_a_file_system_without_locks_is_named(tmp_path: Path) -> None:
    need(shutil.which("cc") is not None, "no C compiler")
    source = "#include <errno.h>\nint flock(int f, int o) { errno = ENOLCK; return -1; }\n"
    (tmp_path / "no.c").write_text(source)
    build = ["cc", "-shared", "-fPIC", "-o", f"{tmp_path}/no.so", f"{tmp_path}/no.c"]
    subprocess.run(build, check=True)
    words = ["pipeline=light:PIPELINE", "cluster=local", f"runs_dir={tmp_path}", "name=x"]
    refused = launch("sweep", *words, code=2, LD_PRELOAD=f"{tmp_path}/no.so")
    assert "its file system has no locks" in refused.stderr
    assert refused.stderr.count("\n") == 1
    shown = launch("status", str(tmp_path / "x"), code=None, LD_PRELOAD=f"{tmp_path}/no.so")
    assert "Traceback" not in shown.stderr
