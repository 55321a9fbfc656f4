"""The same pipelines on a real Slurm, which is started and stopped here (`slurm/devcluster`).

Faults are played in `tests/faults`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, assert_light_complete, launch, status
from own_pipeline import (
    assert_counted,
    project_without_experiment,
    words,
    write_pipeline,
    write_texts,
)
from real_slurm import (
    SMALL,
    assert_submitted_once,
    jobs_of,
    queue,
    running_cluster,
    sweep_light,
    trouble,
    wait_for,
    wait_for_end,
)

from kdhpc.cluster import slurm
from kdhpc.storage.results import logical_digest, read_results


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Path]:
    with running_cluster("--cpus-per-node", "2") as path:
        yield path


@pytest.fixture(autouse=True)
def empty_queue() -> Iterator[None]:
    """Cancel what a failed test leaves in the queue, so that the next test does not fail too."""
    yield
    subprocess.run(["scancel", "--me"], check=True)


def test_tiny_gives_the_same_digest_as_local_processes(tiny_run: Path, tmp_path: Path) -> None:
    words = ["slurm.mem_gb=1.5", "slurm.gate.mem_gb=0.2", "slurm.pack=2"]
    launch("sweep", "tiny", *words, f"runs_dir={tmp_path}")
    run = tmp_path / "tiny"
    assert status(run)["executor"] == "slurm"
    wait_for_end(run)
    assert status(run, code=0)["complete"]
    assert list((run / "attempts").rglob("0.1.jsonl")), "no task was packed"
    shown = launch("status", str(run), "--costs").stdout
    [score] = [line.split() for line in shown.splitlines() if line.split()[:1] == ["score"]]
    used_gb, asked_gb = map(float, score[-2:])
    assert 0.1 < used_gb < 1.5 == asked_gb
    name = "8-merge/results.h5"
    assert logical_digest(run / name) == logical_digest(tiny_run / name)


def test_an_experiment_takes_what_another_one_made(tmp_path: Path) -> None:
    where, memory = f"runs_dir={tmp_path}", ["slurm.mem_gb=1.5", "slurm.gate.mem_gb=0.2"]
    launch("sweep", "tiny", "temperature", "seeds=1", "cluster=local", where)
    fewer = [f"students.{size}=null" for size in ("h16", "h32", "h16x4", "h32x4")]
    words = ["tiny", "capacity", "seeds=1", *fewer, *memory, where, "reuse=tiny-temperature"]
    launch("sweep", *words)
    run = tmp_path / "tiny-capacity"
    wait_for_end(run)
    report = status(run, code=0)
    assert report["complete"]
    assert report["executor"] == "slurm"
    assert any("taken from" in note and "(reuse)" in note for note in report["notes"])
    made = {
        path.parent.name
        for path in run.glob("[1-6]-*/*/*.json")
        if "reused_from" not in json.loads(path.read_text())
    }
    assert made
    assert all(name.startswith("student-s0-h8") for name in made)
    results = read_results(run / "8-merge" / "results.h5")
    sizes = {facts["size"] for facts in results.models.values() if "size" in facts}
    assert sizes == {"teacher", "h8", "h8x4"}


@pytest.mark.long
@pytest.mark.parametrize(
    "experiment",
    [
        "temperature",
        "capacity",
        "real_data",
        "downstream",
        "post_training",
        "reasoning",
        "summarisation",
        "objective",
        "truncation",
        "modes",
        "families",
    ],
)
def test_an_experiment_gives_the_same_digest_as_local_processes(
    experiment: str, tmp_path: Path
) -> None:
    digests = []
    for where in ("slurm", "local"):
        launch("sweep", "tiny", experiment, f"cluster={where}", f"runs_dir={tmp_path / where}")
        run = tmp_path / where / f"tiny-{experiment.replace('_', '-')}"
        wait_for_end(run)
        assert status(run, code=0)["complete"]
        digests.append(logical_digest(run / "8-merge" / "results.h5"))
    assert digests[0] == digests[1]


def test_a_job_that_another_launcher_released_may_have_ended() -> None:
    command = ["sbatch", "--parsable", "--mem=50", "--array=0-1", "--output=/dev/null"]
    submitted = subprocess.run(
        [*command, "--wrap=true"], check=True, capture_output=True, text=True
    )
    wait_for(lambda: not queue(), "the end of two small tasks")
    slurm.release([submitted.stdout.strip()])
    slurm.release(["1000000"])  # unknown to Slurm, like a job that ended some minutes ago


def test_the_mixture_gives_the_same_digest_as_local_processes(tmp_path: Path) -> None:
    words = ["mixture", "seeds=2", "shard_seeds=1", "betas=[100]", "eval_points=400"]
    words.append("decode_betas=[2]")
    launch("sweep", *words, *SMALL, f"runs_dir={tmp_path / 'slurm'}")
    launch("sweep", *words, "cluster=local", f"runs_dir={tmp_path / 'local'}")
    one, two = (tmp_path / where / "mixture" for where in ("slurm", "local"))
    wait_for_end(one)
    assert status(one, code=0)["executor"] == "slurm"
    name = "3-merge/results.h5"
    assert logical_digest(one / name) == logical_digest(two / name)


@pytest.fixture
def container(tmp_path: Path) -> str:
    """Words before a command that hide Slurm's programs from it, as a container does."""
    (tmp_path / "programs").mkdir()
    hidden = {"sbatch", "srun", "scontrol", "squeue", "sacct", "scancel", "sinfo"}
    programs = {
        path.name: path for folder in ("/bin", "/usr/bin") for path in Path(folder).iterdir()
    }
    for name in programs.keys() - hidden:
        (tmp_path / "programs" / name).symlink_to(programs[name])
    return f"slurm.prefix=[env, 'PATH={tmp_path}/programs']"


def test_gates_run_outside_the_container_of_the_tasks(tmp_path: Path, container: str) -> None:
    run = sweep_light(tmp_path, container)
    wait_for_end(run)
    assert_light_complete(run, 6)
    for path in (run / "submissions").glob("*.sh"):
        assert ("/programs" in path.read_text()) == ("gate" not in path.name)


def test_the_teacher_trains_over_two_nodes(tiny_run: Path, tmp_path: Path, container: str) -> None:
    launch(
        "sweep", "tiny", "slurm.mem_gb=1.5", "slurm.gate.mem_gb=0.2", f"runs_dir={tmp_path}",
        container,
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


def test_a_poison_shard_is_named_and_rerun_with_other_resources_finishes(tmp_path: Path) -> None:
    poison = trouble(tmp_path, "make-00002", "raise")
    run = sweep_light(tmp_path)
    wait_for_end(run)
    report = status(run, code=1)
    [cause] = report["causes"]
    assert (cause["kind"], cause["shards"]) == ("EXCEPTION", ["make/arm/00002"])
    poison.unlink()
    launch("rerun", str(run), "--stage", "make", "--shards", "2", "slurm.mem_gb=0.4")
    wait_for_end(run)
    assert_light_complete(run, 6)
    scripts = sorted((run / "submissions").glob("*[0-9].sh"))
    assert any("--mem=410M" in path.read_text() for path in scripts)


def test_cancel_ends_this_run_and_nothing_else(tmp_path: Path) -> None:
    other = subprocess.run(
        ["sbatch", "--parsable", "--hold", "--mem=10M", "--job-name=other", "--wrap=true"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    ).stdout.strip()  # fmt: skip
    trouble(tmp_path, "make-00004", "sleep 600")
    run = sweep_light(tmp_path)
    wait_for(lambda: (run / "1-make/arm/00003.json").exists(), "the first shards")
    launch("cancel", str(run))
    wait_for(lambda: queue() == ["other"], "the run's jobs to go")
    assert "cancelled" in " ".join(status(run, code=1)["notes"])
    shutil.rmtree(tmp_path / "trouble")
    sweep_light(tmp_path)
    # Whoever changes their mind at once must not wait for jobs that nobody submits.
    launch("cancel", str(run))
    launch("rerun", str(run))
    subprocess.run(["scancel", other], check=True)
    wait_for_end(run)
    assert_light_complete(run, 6)


def test_typed_twice_nothing_is_submitted_twice(tmp_path: Path) -> None:
    trouble(tmp_path, "make-00000", "sleep 8")
    run = sweep_light(tmp_path)
    before = sorted(queue())
    sweep_light(tmp_path)
    assert len(queue()) <= len(before)
    wait_for_end(run)
    assert_light_complete(run, 6)
    assert_submitted_once(run)


def test_what_slurm_refuses_is_named_and_can_be_fixed(tmp_path: Path) -> None:
    run = sweep_light(tmp_path, "slurm.qos=nope", code=2)
    assert not run.exists()
    sweep_light(tmp_path, "until=make")
    wait_for_end(run)
    sweep_light(tmp_path, "slurm.stages.merge.qos=nope", code=2)
    assert len(list((run / "requests").iterdir())) == 1
    assert queue() == []
    stuck = trouble(tmp_path, "square-00000", "hang")
    sweep_light(tmp_path, "slurm.gate.time_min=2:00")
    wait_for(lambda: "square/arm/00000" in (tmp_path / "trace").read_text(), "the shard to start")
    limit = ["sacctmgr", "-i", "modify", "qos", "normal", "set"]
    subprocess.run([*limit, "MaxWall=00:05:00", "Flags=DenyOnLimit"], check=True)
    try:
        stuck.unlink()
        wait_for_end(run)
    finally:
        subprocess.run([*limit, "MaxWall=-1", "Flags=-1"], check=True)
    [cause] = status(run, code=1)["causes"]
    assert (cause["kind"], len(cause["shards"])) == ("LAUNCH", 1)
    assert "QOSMaxWallDurationPerJobLimit" in cause["message"]
    assert len(list((run / "failures").rglob("*merge*.json"))) == 1
    launch("rerun", str(run))
    wait_for_end(run)
    assert_light_complete(run, 6)


def test_the_processes_of_a_packed_task_share_its_shards_and_none_idles(tmp_path: Path) -> None:
    stuck = trouble(tmp_path, "make-00000", "hang")
    run = sweep_light(tmp_path, "slurm.pack=2", "slurm.task_min=10")
    others = [run / "1-make" / "arm" / f"{i:05d}.json" for i in range(1, 6)]
    wait_for(lambda: all(path.exists() for path in others), "the other process to do the rest")
    stuck.unlink()
    wait_for_end(run)
    assert_light_complete(run, 6)
    assert_submitted_once(run)
    attempts = run / "attempts" / "0001"
    of_process = [
        [json.loads(line) for line in (attempts / f"0.{i}.jsonl").read_text().splitlines()]
        for i in range(2)
    ]
    one, many = sorted(of_process, key=len)
    assert [event["event"] for event in one] == ["started", "ended"]
    assert [event["event"] for event in many] == ["started", "ended"] * 5
    assert one[0]["time"] < many[-1]["time"] < one[-1]["time"]
    assert not any(path.is_file() for path in (attempts / "0.claims").rglob("*"))
    [key] = {event["key"] for event in one}
    log = launch("status", str(run), "--explain", key).stdout
    assert "published" in log


def test_a_process_of_a_packed_task_that_dies_leaves_the_others_alone(tmp_path: Path) -> None:
    trouble(tmp_path, "make-00000", "once kill")
    stuck = trouble(tmp_path, "make-00001", "hang")
    run = sweep_light(tmp_path, "slurm.pack=2", "slurm.task_min=10", "num_shards=4")
    others = [run / "1-make" / "arm" / f"{i:05d}.json" for i in (2, 3)]
    wait_for(lambda: (tmp_path / "trouble" / "make-00000.taken").exists(), "a process to die")
    assert not any(path.exists() for path in others)
    stuck.unlink()
    wait_for_end(run)
    assert_light_complete(run, 4)
    starts = [line.split()[0] for line in (tmp_path / "trace").read_text().splitlines()]
    assert starts.count("make/arm/00000") == 2
    assert len(starts) == 4 + 4 + 1 + 1
    assert len(set(starts)) == 4 + 4 + 1


def test_a_signal_reaches_every_process_of_a_packed_task(tmp_path: Path) -> None:
    stuck = [trouble(tmp_path, f"make-{i:05d}", "hang") for i in range(2)]
    run = sweep_light(tmp_path, "slurm.pack=2", "slurm.task_min=10")
    trace = tmp_path / "trace"
    wait_for(lambda: trace.exists() and len(trace.read_text().splitlines()) == 2, "two processes")
    subprocess.run(["scancel", "--signal=USR2", jobs_of(run)[0]["job_id"]], check=True)
    logs = [run / "logs" / "0001" / f"0.{i}.log" for i in range(2)]
    told = "told to stop by SIGUSR2"
    wait_for(lambda: all(told in path.read_text() for path in logs), "both to be told")
    for path in stuck:
        path.unlink()
    wait_for_end(run)
    assert_light_complete(run, 6)
    starts = [line.split()[0] for line in trace.read_text().splitlines()]
    assert len(starts) == len(set(starts)) == 6 + 6 + 1


def test_a_stage_that_is_not_asked_for_waits_until_it_is(tmp_path: Path) -> None:
    run = sweep_light(tmp_path, "until=make", "--watch")
    report = status(run, code=0)
    assert [stage["done"] for stage in report["stages"]] == [6, 0, 0]
    assert queue() == []
    assert "until=make: later stages start when sweep.py is typed without it" in report["notes"]
    refused = launch("rerun", str(run), "--stage", "merge", code=2)
    assert "stop after the stage make" in refused.stderr
    sweep_light(tmp_path)
    wait_for_end(run)
    assert_light_complete(run, 6)
    assert_submitted_once(run)


def test_who_stops_watching_is_told_that_jobs_run_on(tmp_path: Path) -> None:
    trouble(tmp_path, "make-00004", "sleep 600")
    words = [*SMALL, "pipeline=light:PIPELINE", "name=light", f"runs_dir={tmp_path}", "--watch"]
    process = subprocess.Popen(
        # A shell that runs the tests in the background makes them ignore interrupts.
        ["env", "--default-signal=INT", sys.executable, ROOT / "launch" / "sweep.py", *words,
         f"trouble={tmp_path}/trouble"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
    )  # fmt: skip
    wait_for(lambda: (tmp_path / "light/1-make/arm/00003.json").exists(), "the first shards")
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 1
    assert "stopped watching; jobs in the queue run on; cancel.py light ends them" in said
    assert queue()
    launch("cancel", str(tmp_path / "light"))
    wait_for(lambda: not queue(), "the run's jobs to go")


def test_watching_from_the_login_node_needs_no_gate(tmp_path: Path) -> None:
    run = sweep_light(tmp_path, "slurm.advance_from=login", "--watch")
    assert_light_complete(run, 6)
    assert not list((run / "submissions").glob("*gate*"))


def test_status_works_without_accounting_and_without_a_controller(
    tmp_path: Path, cluster: Path
) -> None:
    run = sweep_light(tmp_path)
    wait_for_end(run)
    conf = os.environ["SLURM_CONF"]
    shown = launch("status", str(run), "--json", SLURM_CONF="/nonexistent/slurm.conf")
    assert json.loads(shown.stdout)["complete"]
    assert os.environ["SLURM_CONF"] == conf


def test_status_asks_slurm_with_one_squeue(tmp_path: Path) -> None:
    run = sweep_light(tmp_path)
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
    refused = launch("sweep", "tiny", "slurm.partition=nope", f"runs_dir={tmp_path}/r", code=2)
    assert "slurm.partition=nope" in refused.stderr
    assert "main" in refused.stderr
    assert not (tmp_path / "r").exists()


def test_a_dry_run_asks_slurm_and_creates_nothing(tmp_path: Path) -> None:
    words = [f"runs_dir={tmp_path}/r", "--dry-run"]
    planned = launch("sweep", "tiny", "slurm.mem_gb=1", *words).stdout
    assert "8-merge" in planned
    # Eight stages and the gate.
    assert "sbatch --test-only passed for 9 scripts" in planned
    refused = launch("sweep", "tiny", "slurm.cpus_per_task=99", *words, code=2)
    assert "Slurm would refuse" in refused.stderr
    assert "--test-only passed" not in refused.stdout
    assert not (tmp_path / "r").exists()
    assert queue() == []


def test_names_with_quotes_and_spaces_reach_no_shell(tmp_path: Path) -> None:
    odd = tmp_path / "a 'b' $(touch hacked) \"c\" `x`\nd;%j"
    odd.mkdir()
    launch(
        "sweep", "pipeline=light:PIPELINE", "cluster=slurm", "name=li ght;$(x)%A", *SMALL,
        f"runs_dir={json.dumps(str(odd))}",
    )  # fmt: skip
    run = odd / "li ght;$(x)%A"
    wait_for_end(run)
    assert_light_complete(run, 6)
    assert not list(ROOT.glob("hacked")) + list(tmp_path.rglob("hacked"))


def test_a_pipeline_of_somebody_else_runs_without_the_experiment(tmp_path: Path) -> None:
    write_pipeline(tmp_path)
    project = str(project_without_experiment(tmp_path / "project"))
    one, two, _ = write_texts(tmp_path)
    launch(
        "sweep", *words(tmp_path, one, two), *SMALL, project=project,
        PYTHONPATH=f"{project}:{tmp_path}",
    )  # fmt: skip
    run = tmp_path / "words"
    wait_for_end(run)
    assert json.loads((run / "requests" / "0001.json").read_text())["executor"] == "slurm"
    assert_counted(run, one, two)
