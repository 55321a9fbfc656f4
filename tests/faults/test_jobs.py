"""Faults of jobs and nodes: cancelled, killed, requeued, too slow."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from real_slurm import jobs_of, wait_for

from faults.conftest import resume_nodes
from faults.scenario import Scenario

KEY = "make/arm/00002"


def slurm(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@pytest.mark.scenario(1)
def test_an_element_cancelled_while_it_writes_waits_for_the_user(scenario: Scenario) -> None:
    stuck = scenario.sweep_until_hung(KEY)
    scenario.inject("scancel of one array element in the middle of its file")
    slurm("scancel", scenario.element(KEY))
    scenario.wait()
    scenario.assert_named("CANCELLED", KEY)
    assert not scenario.record(KEY).exists()
    stuck.unlink()
    scenario.rerun()
    scenario.wait()
    scenario.assert_whole(reruns=1)


@pytest.mark.scenario(2)
def test_a_process_killed_before_it_publishes_is_tried_again(scenario: Scenario) -> None:
    scenario.trouble("make-00002", "once kill")
    scenario.trouble("square-00005-written", "once kill")
    scenario.inject("kill -9 of the Python: in the middle of a file; between data and record")
    scenario.sweep()
    scenario.wait()
    scenario.assert_whole(reruns=2)


@pytest.mark.scenario(3)
def test_a_node_that_goes_down_loses_its_shard_to_another(scenario: Scenario) -> None:
    scenario.trouble("make-00002", "once hang")
    scenario.sweep()
    stuck = scenario.taken("make-00002")
    node = scenario.node(KEY)
    scenario.touched_daemons = True
    scenario.inject("scontrol state=DOWN of a node with a running task, RESUME 3 s later")
    slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    time.sleep(3)
    resume_nodes()
    wait_for(scenario.record(KEY).exists, "the second attempt")
    stuck.unlink()
    scenario.wait()
    scenario.assert_whole(reruns=1)


@pytest.mark.scenario(4)
def test_of_two_live_writers_the_first_wins(scenario: Scenario) -> None:
    """The process on an unreachable node goes on writing while Slurm starts the task elsewhere."""
    scenario.trouble("make-00002", "once hang")
    scenario.sweep()
    stuck = scenario.taken("make-00002")
    node, zombie = scenario.node(KEY), scenario.pid(KEY)
    scenario.inject(
        "SIGSTOP of slurmd until the requeued copy has published, then the first goes on"
    )
    scenario.daemon(node, "STOP")
    wait_for(scenario.record(KEY).exists, "the copy elsewhere")
    published = scenario.record(KEY).read_bytes()
    assert Path(f"/proc/{zombie}").exists()
    stuck.unlink()
    wait_for(lambda: not alive(zombie), "the first writer to end")
    scenario.daemon(node, "CONT")
    scenario.wait()
    assert scenario.record(KEY).read_bytes() == published
    assert len(list(scenario.record(KEY).parent.glob("00002.*.txt"))) == 1
    scenario.assert_whole(reruns=1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except OSError:
        return False


@pytest.mark.scenario(5)
def test_a_time_limit_stops_between_shards_and_kills_who_does_not_listen(
    scenario: Scenario,
) -> None:
    """Slurm's shortest time limit is a minute, and Slurm checks limits every half minute."""
    scenario.trouble("make-00000", "once hang")
    listens = scenario.trouble("make-00004", "hang")
    scenario.inject("time limit of 1 min: a task of four shards; one that never returns")
    scenario.sweep("slurm.time_min=1", "slurm.signal_s=10", "slurm.task_min=0.07")
    wait_for(lambda: "told to stop" in scenario.log(1, 1), "the second task to be told")
    listens.unlink()
    scenario.wait()
    assert scenario.failure_kinds() == {"make/arm/00000": ["TIMEOUT"]}
    log = scenario.log(1, 1)
    assert "told to stop by SIGUSR2" in log
    assert "make/arm/00004: published" in log
    assert "make/arm/00005: started" not in log
    minutes = [path.read_text() for path in (scenario.run / "submissions").glob("*[0-9].sh")]
    assert any("#SBATCH --time=2\n" in text for text in minutes)
    scenario.assert_whole(reruns=1)


@pytest.mark.scenario(6)
def test_a_preempted_task_starts_again_when_the_others_are_done(scenario: Scenario) -> None:
    scenario.trouble("make-00002", "once hang")
    scenario.sweep("slurm.partition=low")
    scenario.taken("make-00002")
    scenario.inject("preemption by a job of a higher partition on all nodes")
    slurm(
        "sbatch", "--partition=hi", "--nodes=4", "--exclusive", "--mem=100M", "--wrap=sleep 1",
        "--output=/dev/null", "--chdir=/tmp",
    )  # fmt: skip
    scenario.wait()
    scenario.assert_whole(reruns=1)


@pytest.mark.scenario(6)
def test_a_requeued_task_keeps_the_log_of_its_first_try(scenario: Scenario) -> None:
    scenario.trouble("make-00002", "once hang")
    scenario.sweep()
    scenario.taken("make-00002")
    scenario.inject("scontrol requeue of a running element")
    slurm("scontrol", "requeue", scenario.element(KEY))
    scenario.wait()
    [job, *_] = jobs_of(scenario.run)
    assert job["job_id"]
    index = next(i for i, t in enumerate(scenario.submission(1)["tasks"]) if KEY in t)
    assert scenario.log(1, index).count(f"{KEY}: started") == 2
    scenario.assert_whole(reruns=1)


@pytest.mark.scenario(6)
def test_a_task_that_gets_sigterm_only_ends_after_its_shard(scenario: Scenario) -> None:
    stuck = scenario.trouble("make-00000", "hang")
    scenario.sweep("slurm.task_min=0.07")
    wait_for(lambda: "make/arm/00000" in scenario.starts(), "the shard to start")
    scenario.inject("SIGTERM alone, to the task's Python")
    os.kill(scenario.pid("make/arm/00000"), 15)
    stuck.unlink()
    scenario.wait()
    log = scenario.log(1, 0)
    assert "told to stop by SIGTERM" in log
    assert "make/arm/00000: published" in log
    assert "make/arm/00001: started" not in log
    assert not scenario.failure_kinds()
    scenario.assert_whole(reruns=0)
