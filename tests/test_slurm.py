"""The same chain through a real Slurm, started and stopped here (`slurm/devcluster`)."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, assert_light_complete, launch, light_result, status
from light import expected

from kdhpc import store

DEVCLUSTER = str(ROOT / "slurm" / "devcluster")


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Four nodes of one CPU; `sbatch` and its like find them by SLURM_CONF."""
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        reason = "Slurm is not installed: sudo slurm/devcluster install"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    # Socket paths are short: not below pytest's own folder.
    path = Path(f"/tmp/kdhpc-test-{os.getpid()}")  # noqa: S108
    subprocess.run([DEVCLUSTER, "up", str(path), "--max-array", "11"], check=True)
    os.environ["SLURM_CONF"] = str(path / "slurm.conf")
    try:
        yield path
    finally:
        subprocess.run([DEVCLUSTER, "down", str(path)], check=True)
        del os.environ["SLURM_CONF"]


@pytest.fixture(autouse=True)
def empty_queue() -> Iterator[None]:
    """What a failed test leaves must not fail the next."""
    yield
    subprocess.run(["scancel", "--me"], check=True)


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = 150) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.5)


def queue() -> list[str]:
    found = subprocess.run(
        ["squeue", "--me", "--noheader", "--format=%j"], capture_output=True, text=True, check=True
    )
    return found.stdout.split()


def wait_for_end(run: Path) -> None:
    try:
        wait_for(lambda: not queue(), "an empty queue")
    except AssertionError:
        subprocess.run(["squeue"], check=False)
        print(launch("status", str(run), code=None).stdout)
        raise


SMALL = ["slurm.mem_gb=0.3", "slurm.gate.mem_gb=0.2"]


def light(tmp_path: Path, *words: str, code: int | None = 0) -> Path:
    """Submit the light pipeline; it takes little memory, so that many tasks fit at once."""
    launch(
        "sweep", "pipeline=light:PIPELINE", "cluster=slurm", "name=light", *SMALL,
        f"runs_dir={tmp_path}", f"trouble={tmp_path}/trouble", *words, code=code,
    )  # fmt: skip
    return tmp_path / "light"


def trouble(tmp_path: Path, shard: str, what: str) -> Path:
    (tmp_path / "trouble").mkdir(exist_ok=True)
    path = tmp_path / "trouble" / shard
    path.write_text(what)
    return path


def test_tiny_gives_the_same_digest_as_local_processes(tiny_run: Path, tmp_path: Path) -> None:
    launch("sweep", "tiny", "slurm.mem_gb=1.5", "slurm.gate.mem_gb=0.2", f"runs_dir={tmp_path}")
    run = tmp_path / "tiny"
    assert status(run)["executor"] == "slurm"
    wait_for_end(run)
    assert status(run, code=0)["complete"]
    name = "8-merge/results.h5"
    assert store.logical_digest(run / name) == store.logical_digest(tiny_run / name)


def test_the_mixture_gives_the_same_digest_as_local_processes(tmp_path: Path) -> None:
    words = ["mixture", "seeds=2", "shard_seeds=1", "betas=[1,100]", "eval_points=400"]
    launch("sweep", *words, *SMALL, f"runs_dir={tmp_path / 'slurm'}")
    launch("sweep", *words, "cluster=local", f"runs_dir={tmp_path / 'local'}")
    one, two = (tmp_path / where / "mixture" for where in ("slurm", "local"))
    wait_for_end(one)
    assert status(one, code=0)["executor"] == "slurm"
    name = "3-merge/results.h5"
    assert store.logical_digest(one / name) == store.logical_digest(two / name)


def test_the_teacher_trains_over_two_nodes(tiny_run: Path, tmp_path: Path) -> None:
    launch(
        "sweep", "tiny", "slurm.mem_gb=1.5", "slurm.gate.mem_gb=0.2", f"runs_dir={tmp_path}",
        "teacher.training.nodes=2", "teacher.training.micro_batch_sequences=16",
    )  # fmt: skip
    run = tmp_path / "tiny"
    log = "3-train-on-truth/teacher-s0/00000.checkpoints/train.jsonl"
    wait_for(lambda: (run / "3-train-on-truth/teacher-s0/00000.json").exists(), "the teacher")
    launch("cancel", str(run))
    one, two = (
        [json.loads(line)["loss"] for line in (path / log).read_text().splitlines()]
        for path in (tiny_run, run)
    )
    assert len(one) == len(two)
    assert np.allclose(one, two, rtol=1e-5)
    script = next(
        p.read_text()
        for p in (run / "submissions").glob("*.sh")
        if "train-on-truth" in p.read_text()
        and "gate" not in p.name
        and "--nodes=2" in p.read_text()
    )
    assert "#SBATCH --ntasks-per-node=1" in script
    wait_for_end(run)


def test_more_shards_than_an_array_may_hold_run_in_waves(tmp_path: Path) -> None:
    run = light(tmp_path, "num_shards=25", "slurm.task_min=0.04", "slurm.max_submit=14")
    assert len(queue()) <= 14
    wait_for_end(run)
    assert_light_complete(run, 25)
    sizes = [
        len(json.loads(path.read_text())["tasks"])
        for path in (run / "submissions").glob("*[0-9].json")
    ]
    assert max(sizes) <= 11


def test_a_poison_shard_is_named_and_rerun_with_other_resources_finishes(tmp_path: Path) -> None:
    poison = trouble(tmp_path, "make-00002", "raise")
    run = light(tmp_path)
    wait_for_end(run)
    found = status(run, code=1)
    [cause] = found["causes"]
    assert (cause["kind"], cause["shards"]) == ("EXCEPTION", ["make/arm/00002"])
    poison.unlink()
    launch("rerun", str(run), "--stage", "make", "--shards", "2", "slurm.mem_gb=0.4")
    wait_for_end(run)
    assert_light_complete(run, 6)
    scripts = sorted((run / "submissions").glob("*[0-9].sh"))
    assert any("--mem=410M" in path.read_text() for path in scripts)


def test_a_killed_task_is_tried_again_by_the_gate(tmp_path: Path) -> None:
    stuck = trouble(tmp_path, "square-00003", "sleep 600")
    run = light(tmp_path)
    pattern = f"kdhpc.cluster.task {run}"
    wait_for(lambda: (run / "2-square/arm/00002.json").exists(), "the shard before")
    stuck.unlink()
    subprocess.run(["pkill", "-KILL", "-f", pattern], check=True)
    wait_for_end(run)
    assert_light_complete(run, 6)


def test_cancel_ends_this_run_and_nothing_else(tmp_path: Path) -> None:
    other = subprocess.run(
        ["sbatch", "--parsable", "--hold", "--mem=10M", "--job-name=other", "--wrap=true"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    ).stdout.strip()  # fmt: skip
    trouble(tmp_path, "make-00004", "sleep 600")
    run = light(tmp_path)
    wait_for(lambda: (run / "1-make/arm/00003.json").exists(), "the first shards")
    launch("cancel", str(run))
    wait_for(lambda: queue() == ["other"], "the run's jobs to go")
    assert "cancelled" in " ".join(status(run, code=1)["notes"])
    shutil.rmtree(tmp_path / "trouble")
    light(tmp_path)
    subprocess.run(["scancel", other], check=True)
    wait_for_end(run)
    assert_light_complete(run, 6)


def test_typed_twice_nothing_is_submitted_twice(tmp_path: Path) -> None:
    trouble(tmp_path, "make-00000", "sleep 8")
    run = light(tmp_path)
    before = sorted(queue())
    light(tmp_path)
    assert len(queue()) <= len(before)
    wait_for_end(run)
    assert_light_complete(run, 6)
    assert_submitted_once(run)


def assert_submitted_once(run: Path) -> None:
    """No shard stands in two jobs; a submission that was given up in time has none."""
    submitted = [
        key
        for path in (run / "submissions").glob("*[0-9].json")
        if json.loads(path.with_suffix(".job.json").read_text())["job_id"]
        for task in json.loads(path.read_text())["tasks"]
        for key in task
    ]
    assert len(submitted) == len(set(submitted))


def test_two_launchers_at_once_submit_everything_once(tmp_path: Path) -> None:
    words = [
        "pipeline=light:PIPELINE", "cluster=slurm", "name=light", *SMALL, f"runs_dir={tmp_path}"
    ]  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "launch/sweep.py"), *words],
            env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
            stdout=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    assert all(process.wait() in {0, 3} for process in processes)
    run = tmp_path / "light"
    wait_for_end(run)
    assert_light_complete(run, 6)
    assert_submitted_once(run)


def test_a_launcher_that_dies_between_sbatch_and_record_leaves_one_run(tmp_path: Path) -> None:
    """A held job without a record is cancelled by the next sweep, and its shards run once."""
    code = f"""
import os, sys
sys.path[:0] = [{str(ROOT / "launch")!r}, {str(ROOT / "tests")!r}]
import sweep
from kdhpc.cluster.ledger import Ledger
Ledger.settle = lambda self, number, job: os._exit(9)
sweep.main(["pipeline=light:PIPELINE", "cluster=slurm", "name=light", "runs_dir={tmp_path}"])
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 9
    assert len(queue()) == 2  # the array and its gate, held
    run = light(tmp_path)
    wait_for_end(run)
    assert light_result(run) == expected(6)
    jobs = [json.loads(p.read_text()) for p in sorted((run / "submissions").glob("*.job.json"))]
    assert jobs[0]["job_id"] is None


def test_a_job_that_was_recorded_but_never_released_is_released(tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path[:0] = [{str(ROOT / "launch")!r}, {str(ROOT / "tests")!r}]
import sweep
from kdhpc.cluster import slurm
slurm.release = lambda job_ids: os._exit(9)
sweep.main(["pipeline=light:PIPELINE", "cluster=slurm", "name=light", "runs_dir={tmp_path}"])
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 9
    run = light(tmp_path)
    wait_for_end(run)
    assert_light_complete(run, 6)
    assert all(s["job_id"] for s in jobs_of(run))


def jobs_of(run: Path) -> list[dict[str, str]]:
    return [json.loads(p.read_text()) for p in sorted((run / "submissions").glob("*.job.json"))]


def test_a_limit_on_submitted_jobs_makes_waves(tmp_path: Path) -> None:
    """The site's limit is not in the config: sbatch refuses, and less is submitted."""

    def limit(number: int) -> None:
        words = ["sacctmgr", "-i", "modify", "qos", "normal", "set"]
        subprocess.run([*words, f"MaxSubmitJobsPerUser={number}"], check=True, capture_output=True)

    limit(6)
    try:
        run = light(tmp_path, "num_shards=12", "slurm.task_min=0.02")
        wait_for_end(run)
    finally:
        limit(-1)
    assert_light_complete(run, 12)


def test_what_slurm_refuses_is_named_and_can_be_mended(tmp_path: Path) -> None:
    run = light(tmp_path, "slurm.qos=nope", code=2)
    assert queue() == []
    [cause] = status(run, code=1)["causes"]
    assert (cause["kind"], len(cause["shards"])) == ("LAUNCH", 6)
    assert "qos" in cause["message"].lower()
    light(tmp_path)
    wait_for_end(run)
    assert_light_complete(run, 6)


def test_a_task_that_the_user_cancels_is_not_tried_again_by_itself(tmp_path: Path) -> None:
    stuck = trouble(tmp_path, "make-00000", "sleep 600")
    run = light(tmp_path)
    wait_for(lambda: "make/arm/00000: started" in log_of(run, 1, 0), "the first shard")
    [job] = jobs_of(run)
    subprocess.run(["scancel", f"{job['job_id']}_0"], check=True)
    wait_for_end(run)
    [cause] = status(run, code=1)["causes"]
    assert cause["kind"] == "CANCELLED"
    assert len(jobs_of(run)) == 1
    stuck.unlink()
    light(tmp_path)
    wait_for_end(run)
    assert_light_complete(run, 6)


def log_of(run: Path, number: int, task: int) -> str:
    path = run / "logs" / f"{number:04d}" / f"{task}.log"
    return path.read_text() if path.exists() else ""


def test_watching_from_the_login_node_needs_no_gate(tmp_path: Path) -> None:
    run = light(tmp_path, "slurm.advance_from=login", "--watch")
    assert_light_complete(run, 6)
    assert not list((run / "submissions").glob("*gate*"))


def test_status_works_without_accounting_and_without_a_controller(
    tmp_path: Path, cluster: Path
) -> None:
    run = light(tmp_path)
    wait_for_end(run)
    conf = os.environ["SLURM_CONF"]
    found = launch("status", str(run), "--json", SLURM_CONF="/nonexistent/slurm.conf")
    assert json.loads(found.stdout)["complete"]
    assert os.environ["SLURM_CONF"] == conf


def test_status_asks_slurm_with_one_squeue(tmp_path: Path) -> None:
    run = light(tmp_path)
    wrappers = tmp_path / "bin"
    wrappers.mkdir()
    for name in ("squeue", "sacct", "scontrol", "sinfo"):
        real = shutil.which(name)
        (wrappers / name).write_text(
            f'#!/bin/sh\necho {name} >> {wrappers}/called\nexec {real} "$@"\n'
        )
        (wrappers / name).chmod(0o755)
    launch("status", str(run), code=None, PATH=f"{wrappers}:{os.environ['PATH']}")
    assert (wrappers / "called").read_text().split() == ["squeue"]
    wait_for_end(run)


def test_a_partition_that_does_not_exist_is_refused_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    found = launch("sweep", "tiny", "slurm.partition=nope", f"runs_dir={tmp_path}/r", code=2)
    assert "slurm.partition=nope" in found.stderr
    assert "main" in found.stderr
    assert not (tmp_path / "r").exists()


def test_a_dry_run_asks_slurm_and_creates_nothing(tmp_path: Path) -> None:
    words = [f"runs_dir={tmp_path}/r", "--dry-run"]
    assert "8-merge" in launch("sweep", "tiny", "slurm.mem_gb=1", *words).stdout
    found = launch("sweep", "tiny", "slurm.cpus_per_task=99", *words, code=2)
    assert "Slurm would refuse" in found.stderr
    assert not (tmp_path / "r").exists()
    assert queue() == []


def test_names_with_quotes_and_spaces_reach_no_shell(tmp_path: Path) -> None:
    odd = tmp_path / "a 'b' $(touch hacked) \"c\""
    odd.mkdir()
    launch(
        "sweep", "pipeline=light:PIPELINE", "cluster=slurm", "name=li ght;$(x)", *SMALL,
        f"runs_dir={odd}",
    )  # fmt: skip
    run = odd / "li ght;$(x)"
    wait_for_end(run)
    assert_light_complete(run, 6)
    assert not list(ROOT.glob("hacked")) + list(tmp_path.rglob("hacked"))
