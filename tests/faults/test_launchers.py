"""Faults around submitting: lost answers, launchers that die, limits, edited code."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, status
from real_slurm import (
    SMALL,
    assert_submitted_once,
    jobs_of,
    queue,
    wait_for,
    wait_for_end,
)

from faults.scenario import Scenario, sum_of
from kdhpc.cluster.slurm import HELD_BY_SLURM, HELD_BY_USER

A_TASK_EACH = "slurm.task_min=0.0001"
"""A task length shorter than a shard takes, even after that has been measured."""


def wrapper(folder: Path, program: str, script: str) -> str:
    """Return a search path on which `script` hides a program of Slurm.

    The script finds the program as `$real`. Its function `die` kills the caller, but only once,
    because jobs inherit the path.
    """
    folder.mkdir(parents=True)
    path = folder / program
    die = 'die() { if mkdir "$0.played" 2> /dev/null; then kill -9 $PPID; exit 1; fi; }'
    path.write_text(f"#!/bin/bash\nreal={shutil.which(program)}\n{die}\n{script}\n")
    path.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.scenario(7)
def test_a_lost_answer_of_sbatch_makes_no_second_job(scenario: Scenario) -> None:
    """The controller accepts the job after sbatch has given up."""
    pid = scenario.daemon_pid("slurmctld")
    answer = scenario.folder / "answer"
    script = f"""
if [[ "$*" == *--hold* ]] && mkdir {scenario.folder}/stopped 2> /dev/null; then
    kill -STOP {pid}; $real "$@" 2> {answer}; code=$?; kill -CONT {pid}
    cat {answer} >&2; exit $code
fi
exec $real "$@" """
    path = wrapper(scenario.folder / "bin", "sbatch", script)
    scenario.touched_daemons = True
    scenario.inject("slurmctld stopped around sbatch, which fails and has made the job")
    scenario.sweep(PATH=path)
    assert "timed out" in answer.read_text()
    jobs = set(queue("%F %j"))
    assert len(jobs) == len({job.split()[1] for job in jobs}), jobs
    scenario.wait()
    assert_submitted_once(scenario.run)
    scenario.assert_whole(reruns=0)


@pytest.mark.scenario(7)
def test_a_controller_killed_in_the_middle_of_an_array_costs_nothing(scenario: Scenario) -> None:
    stuck = scenario.trouble("make-00002", "hang")
    scenario.sweep()
    wait_for(lambda: "make/arm/00002" in scenario.starts(), "the shard to start")
    scenario.wait_until_saved("make/arm/00002")
    scenario.inject("slurmctld killed in the middle of an array, started again when it was done")
    scenario.daemon("slurmctld", "KILL")
    stuck.unlink()
    wait_for(scenario.record("make/arm/00002").exists, "the shard")
    scenario.start_daemon("slurmctld")
    scenario.wait()
    scenario.assert_whole(reruns=0)


@pytest.mark.long
@pytest.mark.scenario(7)
def test_a_controller_that_forgot_the_jobs_is_made_good_by_sweep(scenario: Scenario) -> None:
    """The controller was killed before it saved the jobs.

    They are gone, or they are held because the controller starts them a second time.
    """
    stuck = scenario.trouble("make-00002", "hang")
    scenario.sweep()
    wait_for(lambda: "make/arm/00002" in scenario.starts(), "the shard to start")
    scenario.inject("slurmctld killed before it saved the jobs; sweep again")
    scenario.daemon("slurmctld", "KILL")
    scenario.jobs_forgotten = True
    stuck.unlink()
    wait_for(scenario.record("make/arm/00002").exists, "the shard")
    scenario.start_daemon("slurmctld")

    def quiet() -> bool:
        reasons = set(queue("%r"))
        return not reasons or bool(reasons & {*HELD_BY_SLURM, HELD_BY_USER})

    def complete() -> bool:
        wait_for(quiet, "nothing to run")
        report = status(scenario.run)
        if not report["complete"]:
            assert any("sweep.py" in note for note in report["notes"]), report["notes"]
            scenario.sweep()
        return bool(report["complete"])

    wait_for(complete, "nodes to take ids that they know, which they refuse for a while")
    scenario.assert_whole(reruns=1, least=0)  # a gate with nothing left to do may still be held


DEATHS = {
    "before-sbatch": ("sbatch", 'case "$*" in *--hold*) die;; esac; exec $real "$@"'),
    "after-sbatch": (
        "sbatch",
        '$real "$@"; code=$?; case "$*" in *--hold*) die;; esac; exit $code',
    ),
    "after-the-gates-sbatch": (
        "sbatch",
        '$real "$@"; code=$?; case "$*" in *.gate.sh) die;; esac; exit $code',
    ),
    "before-release": ("scontrol", 'case "$1" in release) die;; esac; exec $real "$@"'),
    "after-release": (
        "scontrol",
        '$real "$@"; code=$?; case "$1" in release) die;; esac; exit $code',
    ),
}
"""How the launcher is killed at each step: by the Slurm program that it has just called."""


@pytest.mark.scenario(8)
def test_a_launcher_killed_after_any_step_is_continued_by_the_next(scenario: Scenario) -> None:
    played = []
    for name, (program, script) in DEATHS.items():
        one = Scenario(8, name, scenario.folder / name, scenario.cluster)
        one.folder.mkdir()
        one.inject(name)
        one.sweep(code=-9, PATH=wrapper(one.folder / "bin", program, script))
        one.sweep()
        played.append(one)
    wait_for_end(*(one.run for one in played))
    for one in played:
        assert_submitted_once(one.run)
        one.assert_whole(reruns=0)
    injected = f"launcher killed {', '.join(DEATHS).replace('-', ' ')}; then sweep again"
    rows = [row for one in played for row in one.rows]
    scenario.rows.append(sum_of(8, scenario.title, injected, rows))


@pytest.mark.scenario(9)
def test_two_launchers_at_once_submit_everything_once(scenario: Scenario) -> None:
    words = [
        "pipeline=light:PIPELINE",
        "cluster=slurm",
        "name=light",
        *SMALL,
        "slurm.task_min=0.04",
    ]
    words += [f"runs_dir={scenario.folder}", f"trace={scenario.folder}/trace"]
    scenario.inject("two launchers started together")
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "launch/sweep.py"), *words],
            env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
            stdout=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    assert all(process.wait() in {0, 3} for process in processes)
    scenario.wait()
    assert_submitted_once(scenario.run)
    scenario.assert_whole(reruns=0)


@pytest.mark.scenario(9)
def test_a_relaunch_while_half_the_array_is_queued_changes_no_queued_task(
    scenario: Scenario,
) -> None:
    """The relaunch adds shards, so that it has something to submit."""
    stuck = [scenario.trouble(f"make-{index:05d}", "hang") for index in range(4)]
    words = ["slurm.task_min=0.01", "slurm.canary=0"]
    scenario.sweep(*words)
    wait_for(lambda: len(scenario.starts()) == 4, "four busy nodes")
    scenario.inject("sweep again, with three more shards, while two of six tasks are queued")
    scenario.sweep(*words, "num_shards=9")
    for path in stuck:
        path.unlink()
    scenario.wait()
    assert_submitted_once(scenario.run)
    assert not scenario.failure_kinds()
    scenario.assert_whole(reruns=0)


@pytest.mark.scenario(12)
def test_limits_of_the_site_make_waves(scenario: Scenario) -> None:
    """The limits are not in the config, so sbatch refuses and less is submitted."""

    def limit(number: int) -> None:
        words = ["sacctmgr", "-i", "modify", "qos", "normal", "set"]
        subprocess.run([*words, f"MaxSubmitJobsPerUser={number}"], check=True, capture_output=True)

    scenario.inject("MaxArraySize=11, MaxSubmitJobs=6; 25 shards, a task each, three stages")
    limit(6)
    try:
        scenario.sweep("num_shards=25", A_TASK_EACH)
        scenario.wait()
    finally:
        limit(-1)
    assert any("sbatch refused" in job["note"] for job in jobs_of(scenario.run))
    scenario.assert_whole(reruns=0)


@pytest.mark.scenario(12)
def test_more_shards_than_an_array_may_hold_run_in_waves(scenario: Scenario) -> None:
    scenario.inject("MaxArraySize=11, slurm.max_submit=14; 25 shards, a task each")
    scenario.sweep("num_shards=25", A_TASK_EACH, "slurm.canary=0", "slurm.max_submit=14")
    assert len(queue("%A")) <= 14
    scenario.wait()
    sizes = [len(scenario.submission(n)["tasks"]) for n in range(1, len(jobs_of(scenario.run)) + 1)]
    assert max(sizes) == 11
    scenario.assert_whole(reruns=0)


@pytest.mark.scenario(14)
def test_a_run_needs_no_accounting(scenario: Scenario) -> None:
    scenario.trouble("make-00002", "once kill")
    scenario.inject("slurmdbd killed before a run in which a task dies; started again after it")
    scenario.daemon("slurmdbd", "KILL")
    scenario.sweep()
    scenario.wait()
    scenario.start_daemon("slurmdbd")
    assert scenario.failure_kinds() == {"make/arm/00002": ["LOST"]}
    scenario.assert_whole(reruns=1)


@pytest.mark.scenario(16)
def test_the_code_that_was_submitted_is_the_code_that_runs(scenario: Scenario) -> None:
    project = scenario.folder / "project"
    for name in ("kdhpc", "configs", "launch", "slurm"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, project / name, ignore=ignored)
    (project / "tests").mkdir()
    light = project / "tests" / "light.py"
    shutil.copy(ROOT / "tests" / "light.py", light)
    stuck = [scenario.trouble(f"make-{index:05d}", "hang") for index in range(4)]
    scenario.sweep(
        "slurm.task_min=0.01",
        project=str(project),
        PYTHONPATH=f"{project}:{project / 'tests'}",
    )
    wait_for(lambda: len(scenario.starts()) == 4, "four busy nodes")
    scenario.inject("the project's code edited, and broken, while most of it has not started")
    light.write_text(light.read_text().replace("** 2", "** 3"))
    (project / "kdhpc" / "storage" / "work.py").write_text("raise SystemExit('half an edit')\n")
    for path in stuck:
        path.unlink()
    scenario.wait()
    scenario.assert_whole(reruns=0)
