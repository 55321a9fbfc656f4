"""Faults of sites and of users: what programs print, cancels, holds, folders that are moved."""

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from commands import launch, status
from real_slurm import jobs_of, queue, running_cluster, wait_for

from faults.scenario import Scenario
from faults.test_data import fill
from faults.test_launchers import wrapper

KEY = "make/arm/00002"
BANNER = 'echo "-----"; echo "  Welcome. 3 news, submit host: ...OK"; echo "-----"\nexec $real "$@"'


def slurm(*words: str | bytes) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.scenario(20)
def test_banners_of_every_program_are_passed_over(scenario: Scenario) -> None:
    folders = [
        wrapper(scenario.folder / f"bin-{name}", name, BANNER).partition(":")[0]
        for name in ("sbatch", "squeue", "scontrol", "sacct")
    ]
    scenario.inject("sbatch, squeue, scontrol and sacct print a banner first, for gates too")
    scenario.sweep(PATH=":".join([*folders, os.environ["PATH"]]))
    scenario.wait()
    scenario.assert_whole(reruns=0)


@pytest.mark.scenario(20)
def test_jobs_may_begin_with_an_empty_environment(scenario: Scenario) -> None:
    path = wrapper(scenario.folder / "bin", "sbatch", 'exec $real --export=NONE "$@"')
    scenario.inject("sbatch --export=NONE")
    scenario.sweep(PATH=path)
    scenario.wait()
    scenario.assert_whole(reruns=0)


@pytest.mark.scenario(20)
def test_foreign_jobs_with_odd_names_hurt_nothing(scenario: Scenario) -> None:
    scenario.inject("held jobs of the same user, named with a line break and with a Latin-1 byte")
    foreign = [
        slurm("sbatch", "--parsable", "--hold", "--mem=1", "--wrap=true", b"--job-name=" + name)
        for name in (b"my\njob", b"f\xfcr|x")
    ]
    try:
        scenario.sweep()
        wait_for(lambda: status(scenario.run)["complete"], "the end")
        launch("cancel", str(scenario.run))
        assert set(slurm("squeue", "--noheader", "--format=%A", "--me").split()) >= set(foreign)
    finally:
        slurm("scancel", *foreign)
    scenario.wait()
    scenario.assert_whole(reruns=0)


@pytest.mark.scenario(21)
def test_a_cancelled_training_stays_cancelled(scenario: Scenario) -> None:
    """A training that is told to stop saves a checkpoint and says that it was told to."""
    stuck = scenario.sweep_until_hung(KEY, trouble="obey")
    scenario.daemon("slurmdbd", "KILL")
    scenario.inject(
        "scancel of a shard that stops when it is told to, as trainings do, which accounting does "
        "not hear of"
    )
    slurm("scancel", scenario.element(KEY))
    scenario.wait()
    scenario.start_daemon("slurmdbd")
    scenario.assert_named("CANCELLED", KEY)
    assert "stopped; the next attempt continues from here" in scenario.logs()
    stuck.unlink()
    scenario.rerun()
    scenario.wait()
    scenario.assert_whole(reruns=1)


@pytest.mark.scenario(22)
def test_a_rerun_right_after_a_cancel_goes_on(scenario: Scenario) -> None:
    """The cancelled tasks do not stop when they are told to, so they end seconds later."""
    stuck = scenario.sweep_until_hung(KEY)
    scenario.inject("cancel.py, and rerun.py at once")
    launch("cancel", str(scenario.run))
    stuck.unlink()
    scenario.rerun()
    scenario.wait()
    scenario.assert_whole(reruns=1, least=0)


@pytest.mark.scenario(22)
def test_a_cancel_while_sbatch_is_slow_leaves_nothing_running(scenario: Scenario) -> None:
    begun = scenario.folder / "begun"
    script = f'case "$*" in *--hold*) touch {begun}; sleep 4;; esac; exec $real "$@"'
    path = wrapper(scenario.folder / "bin", "sbatch", script)
    scenario.inject("cancel.py while sbatch is at work; then rerun.py")
    sweep = threading.Thread(target=scenario.sweep, kwargs={"PATH": path})
    sweep.start()
    wait_for(begun.exists, "sbatch to begin")
    launch("cancel", str(scenario.run))
    sweep.join()
    wait_for(lambda: not queue(), "the end of what was submitted")
    assert not scenario.starts()
    scenario.rerun()
    scenario.wait()
    scenario.assert_whole(reruns=0)


@pytest.mark.scenario(22)
def test_a_cancel_while_a_gate_submits_leaves_nothing_queued(scenario: Scenario) -> None:
    """What sbatch has sent is a job, even if Slurm kills the gate before it hears of it."""
    begun = scenario.folder / "begun"
    answer = scenario.folder / "answer"
    script = f"""case "$*" in *0002.gate.sh) ;; *) exec $real "$@";; esac
touch {begun}
(setsid bash -c "sleep 2; $real $* > {answer}.part; mv {answer}.part {answer}" &)
until [ -e {answer} ]; do sleep 0.1; done; cat {answer}"""
    path = wrapper(scenario.folder / "bin", "sbatch", script)
    scenario.inject("cancel.py while the sbatch of a gate is at work; then rerun.py")
    scenario.sweep(PATH=path)
    wait_for(begun.exists, "the gate to submit")
    launch("cancel", str(scenario.run))
    wait_for(answer.exists, "what sbatch had sent")
    wait_for(lambda: not queue(), "the end of what was submitted")
    scenario.rerun()
    scenario.wait()
    scenario.assert_whole(reruns=0)


@pytest.mark.scenario(22)
def test_a_cancel_works_on_a_full_disk(scenario: Scenario, small_disk: Path) -> None:
    scenario.use_disk(small_disk)
    stuck = scenario.sweep_until_hung(KEY)
    scenario.inject("3 MB tmpfs, full; cancel.py, then rerun.py when there is space")
    filler = fill(small_disk, leave=0)
    cancelled = launch("cancel", str(scenario.run))
    assert "not recorded" in cancelled.stderr
    wait_for(lambda: not queue(), "the end of the cancelled jobs")
    stuck.unlink()
    filler.unlink()
    scenario.rerun()
    scenario.wait()
    scenario.assert_whole(reruns=4, least=1)


@pytest.mark.scenario(23)
def test_what_a_user_holds_stays_held(scenario: Scenario) -> None:
    scenario.trouble("make-00000", "sleep 2")
    scenario.sweep("slurm.task_min=0.01", "slurm.max_parallel=1")
    [job] = jobs_of(scenario.run)
    scenario.inject("scontrol uhold of a queued task; sweep.py and rerun.py do not release it")
    held = f"{job['job_id']}_5"
    slurm("scontrol", "uhold", held)
    scenario.rerun()
    scenario.sweep("slurm.task_min=0.01", "slurm.max_parallel=1")
    wait_for(lambda: scenario.record("make/arm/00004").exists(), "the others")
    assert not scenario.record("make/arm/00005").exists()
    notes = "\n".join(status(scenario.run)["notes"])
    assert f"held by somebody: scontrol release {job['job_id']}" in notes
    slurm("scontrol", "release", held)
    scenario.wait()
    scenario.assert_whole(reruns=0)


@pytest.mark.scenario(24)
def test_a_run_that_is_moved_away_is_not_made_anew_and_goes_on(scenario: Scenario) -> None:
    stuck = scenario.sweep_until_hung(KEY)
    scenario.inject("mv of the run folder while a task runs; sweep.py with the new runs_dir")
    old, new = scenario.run, scenario.folder / "moved"
    new.mkdir()
    old.rename(new / "light")
    stuck.unlink()
    wait_for(lambda: not queue(), "the jobs of the folder that is gone")
    assert not old.exists()
    scenario.use_disk(new)
    scenario.sweep("slurm.task_min=0.01")
    scenario.wait()
    scenario.assert_whole(reruns=1)


@pytest.mark.scenario(25)
def test_a_process_of_a_packed_task_dies_alone(scenario: Scenario) -> None:
    """The others go on with the shards of the task, and the shard that it had is tried again."""
    with running_cluster("--cpus-per-node", "2"):
        stuck = scenario.trouble("make-00000", "hang")
        scenario.trouble("make-00002", "once kill")
        scenario.inject("kill -9 of one of two processes of a packed task")
        scenario.sweep("slurm.pack=2", "slurm.task_min=10")
        scenario.taken("make-00002")
        time.sleep(2)  # srun would tell the other process to stop within a second
        stuck.unlink()
        scenario.wait()
        assert "told to stop" not in scenario.logs()
        assert scenario.failure_kinds() == {KEY: ["LOST"]}
        scenario.assert_whole(reruns=1)
