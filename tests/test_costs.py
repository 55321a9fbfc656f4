"""What a run has cost comes from its attempts and its records."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, begin, launch
from light import PIPELINE, LightConfig

from kdhpc.cluster import costs, eta, runs, slurm
from kdhpc.cluster.costs import StageCost
from kdhpc.cluster.eta import Range
from kdhpc.cluster.ledger import Attempt, Failure, Job, Ledger, Submission
from kdhpc.cluster.observe import observe
from kdhpc.cluster.pace import measure
from kdhpc.cluster.runs import Run
from kdhpc.cluster.status import look, status_of
from kdhpc.config.run import Slurm

KEYS = [f"make/arm/{index:05d}" for index in range(6)]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "trouble").mkdir()
    config = LightConfig(
        pipeline="light:PIPELINE",
        name="light",
        runs_dir=str(tmp_path),
        trouble=str(tmp_path / "trouble"),
        seconds=0.2,
        executor="local",
        threads=2,
    )
    run = runs.open_for(config, PIPELINE.plan(config))
    runs.add_request(run, config, kind="sweep", executor="local")
    return run


def write_events(run: Run, *events: tuple[str, str, float]) -> None:
    path = run.path / "attempts" / "0001" / "0.jsonl"
    path.parent.mkdir(parents=True)
    lines = [json.dumps({"key": k, "event": e, "time": t}) for k, e, t in events]
    path.write_text("\n".join(lines))


def test_attempts_are_paired_from_their_events(run: Run) -> None:
    write_events(
        run,
        ("a", "started", 1.0), ("a", "ended", 4.0),
        ("b", "started", 4.0), ("b", "stopped", 6.0),
        ("c", "started", 6.0),  # the node died
        ("c", "started", 9.0), ("c", "ended", 10.0),
        ("d", "started", 10.0),
    )  # fmt: skip
    assert Ledger(run.path).attempts(1, 0) == [
        Attempt("a", started=1.0, ended=4.0),
        Attempt("b", started=4.0, ended=6.0, stopped=True),
        Attempt("c", started=6.0),
        Attempt("c", started=9.0, ended=10.0),
        Attempt("d", started=10.0),
    ]


def test_hours_of_attempts_that_came_to_nothing_are_lost(run: Run, tmp_path: Path) -> None:
    """One shard sleeps and fails, three are published; every attempt has two cores."""
    (tmp_path / "trouble" / "make-00001").write_text("raise")
    started = time.time()
    begin(run, 1, KEYS[:4]).wait()
    Ledger(run.path).settle(1, Job(job_id=None))
    state = look(run)
    pace = measure(run, state)
    make, square, merge = costs.costs(run, state, pace.factors)
    records = run.scan().records
    assert set(records) == {KEYS[0], KEYS[2], KEYS[3]}
    published_s = sum(record.seconds for record in records.values())
    assert make.core_hours - make.lost_core_hours == pytest.approx(2 * published_s / 3600)
    assert 0 < make.lost_core_hours <= 2 * (time.time() - started) / 3600
    assert make.left_core_hours.low > 0
    assert square.core_hours == merge.core_hours == make.gpu_hours == 0
    assert 0 < make.memory_gb < 8
    shown = launch("status", str(run.path), "--costs", code=1).stdout
    assert "core-hours were useful" in shown
    assert max(map(len, shown.splitlines())) <= 80
    hours = status_of(run, state).hours
    assert hours.unit == "core"
    assert hours.done == pytest.approx(2 * published_s / 3600)
    assert 0 < hours.left.low < hours.left.high


def test_memory_is_that_of_one_attempt() -> None:
    """A process that worked on a large shard does not say so of the next one.

    It is a process of its own, as this one may have kept memory that others have freed.
    """
    code = """
from kdhpc.storage.work import attempt_facts, forget_memory
used = []
for size in (400_000_000, 1):
    forget_memory()
    memory = bytearray(size)
    memory[::4096] = b"x" * len(memory[::4096])
    used.append(attempt_facts(0, 0)["memory_gb"])
    del memory
print(*used)
"""
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    with_large, without = map(float, finished.stdout.split())
    assert with_large > without + 0.3


@pytest.mark.parametrize(
    ("used", "asked", "suggested"),
    [
        (0.3, 4.0, 1),  # a quarter would do
        (3.0, 4.0, None),
        (3.9, 4.0, 6),  # it may not fit next time
        (0.4, 1.0, None),
        (0.0, 4.0, None),  # nothing is known
        (3.0, None, None),  # nothing was asked for
    ],
)
def test_memory_is_suggested_where_what_was_asked_for_does_not_fit(
    used: float, asked: float | None, suggested: int | None
) -> None:
    nothing = Range(low=0, middle=0, high=0)
    cost = StageCost(
        stage="score", core_hours=1, lost_core_hours=0, left_core_hours=nothing,
        gpu_hours=2, memory_gb=used, gpu_memory_gb=0, asked_gb=asked,
    )  # fmt: skip
    assert cost.suggested_gb == suggested
    assert cost.energy_kwh == pytest.approx((costs.CORE_WATTS + 2 * costs.GPU_WATTS) / 1000)


def test_accounting_says_what_the_tasks_of_an_array_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program sacct is replaced by one that prints what Slurm 22.05 printed for an array."""
    program = tmp_path / "sacct"
    lines = ["7_0|", "7_0.batch|6912K", "7_0.0|412000.50K", "7_1.0|9K", "8|", "8.extern|0K", "9_0|"]
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    used = slurm.memory_used(["7", "8", "9"])
    assert used == {"7": pytest.approx(0.421888512), "8": 0.0}
    assert slurm.memory_used([]) == {}
    program.write_text("#!/bin/sh\nexit 1\n")
    assert slurm.memory_used(["7"]) == {}


def test_what_is_left_is_a_range_of_core_hours(run: Run) -> None:
    state = look(run)
    known = {stage: eta.Factor(log_mean=0.0, spread=0.0) for stage in state.plan.stages}
    make = costs.costs(run, state, known)[0]
    assert make.left_core_hours.middle == pytest.approx(2 * 6 / 3600)


def submit(run: Run, number: int, **resources: object) -> None:
    submission = Submission(
        number=number, request=1, name=f"make.light-{number}", stage="make", tasks=((KEYS[0],),),
        resources=resources, code="", time=time.time(), host="elsewhere", pid=1,
    )  # fmt: skip
    assert Ledger(run.path).claim(submission)


def test_an_attempt_that_died_is_lost_while_the_next_one_runs(run: Run) -> None:
    hour = time.time() - 3600
    for number, started in ((1, hour), (2, time.time() - 36)):
        submit(run, number)
        path = run.path / "attempts" / f"{number:04d}" / "0.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"key": KEYS[0], "event": "started", "time": started}))
    Ledger(run.path).settle(1, Job(job_id=None))
    Ledger(run.path).add_failure(
        Failure(key=KEYS[0], kind="LOST", message="", submission=1, time=hour + 1800)
    )
    _, config, plan = runs.current(run)
    active = frozenset(KEYS[:1])
    state = observe(run, config, plan, local_active=active, with_queue=False)
    make = costs.costs(run, state, measure(run, state).factors)[0]
    assert make.lost_core_hours == pytest.approx(2 * 0.5)
    assert make.core_hours == pytest.approx(2 * (0.5 + 0.01), rel=0.01)


@pytest.mark.parametrize(("pack", "uses_device"), [(1, True), (4, True), (1, False)])
def test_hours_are_of_gpus_where_tasks_have_some(
    tmp_path: Path, pack: int, uses_device: bool
) -> None:
    """Six shards of an estimated second; the four of a packed task share its GPU."""
    stages = [dataclasses.replace(s, uses_device=uses_device) for s in PIPELINE.stages]
    pipeline = dataclasses.replace(PIPELINE, stages=tuple(stages))
    limits = Slurm(gpus_per_node=1, pack=pack)
    config = LightConfig(
        pipeline="light:PIPELINE", name="gpus", runs_dir=str(tmp_path), executor="local",
        slurm=limits, until="make",
    )  # fmt: skip
    run = Run(runs.open_for(config, pipeline.plan(config)).path, pipeline)
    runs.add_request(run, config, kind="sweep", executor="slurm")
    state = observe(run, config, pipeline.plan(config), with_queue=False)
    known = {stage: eta.Factor(log_mean=0.0, spread=0.0) for stage in state.plan.stages}
    hours = costs.hours_of_shards(run, state, known)
    assert hours.unit == ("GPU" if uses_device else "core")
    assert hours.left.middle * 3600 == pytest.approx(6 / pack if uses_device else 6)
