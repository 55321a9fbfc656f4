"""The time left comes from shards that are done, from progress, and from earlier runs."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from commands import begin, launch
from light import PIPELINE, LightConfig

from kdhpc.cluster import eta, pace, places, runs
from kdhpc.cluster.display import between
from kdhpc.cluster.eta import Factor, History, Range, Took
from kdhpc.cluster.ledger import Job, Ledger
from kdhpc.cluster.observe import observe
from kdhpc.cluster.runs import Run
from kdhpc.cluster.status import look, status_of
from kdhpc.plan.shards import Arm, Plan, Shard

STAGES = ("first", "second")


def plan_of(*stages: tuple[str, list[float], bool]) -> Plan:
    """Make a plan; a stage's shards read all of the stage before it, or nothing."""
    plan = Plan()
    before: tuple[str, ...] = ()
    for name, works, reads in stages:
        arm = Arm(stage=name, name="arm", fields={}, inputs={})
        shards = [
            Shard(arm=arm, name=f"{i:05d}", work=work, reads=before if reads else ())
            for i, work in enumerate(works)
        ]
        plan.add(shards)
        before = tuple(shard.key for shard in shards)
    return plan


def exact(plan: Plan, **changes: object) -> float:
    """Return the time left if every shard takes exactly its estimate."""
    known = {stage: Factor(log_mean=0.0, spread=0.0) for stage in plan.stages}
    settings: dict[str, object] = {"num_places": 2, "task_s": 1.0, "start_s": 0.0}
    left = eta.seconds_left(plan, plan.shards, known, {}, **(settings | changes))  # type: ignore[arg-type]
    assert left.low == left.middle == left.high
    return left.middle


def test_shards_start_as_soon_as_there_is_a_place() -> None:
    plan = plan_of(("first", [4.0, 1.0, 1.0, 1.0], False))
    assert exact(plan) == 4.0
    assert exact(plan, num_places=1) == 7.0
    assert exact(plan, num_places=100) == 4.0


def test_a_shard_waits_for_what_it_reads_and_for_its_task_to_start() -> None:
    plan = plan_of(("first", [4.0, 1.0], False), ("second", [2.0], True))
    assert exact(plan) == 6.0
    assert exact(plan, start_s=8.0) == 14.0


def test_a_stage_without_inputs_overlaps_the_stage_before_it() -> None:
    assert exact(plan_of(("first", [4.0], False), ("second", [3.0], False))) == 4.0


def test_small_shards_share_tasks() -> None:
    """Twenty seconds of work fill two tasks of ten seconds, however many nodes are free."""
    assert exact(plan_of(("first", [1.0] * 20, False)), num_places=50, task_s=10.0) == 10.0


def test_what_is_done_of_a_running_shard_is_not_left() -> None:
    plan = plan_of(("first", [10.0], False))
    known = {"first": Factor(log_mean=math.log(2), spread=0.0)}
    key = next(iter(plan.shards))
    left = eta.seconds_left(
        plan, plan.shards, known, {key: 0.75}, num_places=1, task_s=1.0, start_s=0.0
    )
    assert left.middle == pytest.approx(5.0)


def test_the_first_stage_says_something_of_the_next() -> None:
    """A machine that takes three times as long as estimated will do so in the next stage too."""
    before = eta.factors(STAGES, {}, History())
    assert {factor.at(0) for factor in before.values()} == {1.0}
    seen = Took(seconds=300.0, estimated_s=100.0, num_shards=50)
    after = eta.factors(STAGES, {"first": seen}, History())
    assert after["first"].at(0) == pytest.approx(3.0, rel=0.02)
    assert 1.8 < after["second"].at(0) < 3.0
    assert after["first"].spread < after["second"].spread < before["second"].spread


def test_more_shards_are_trusted_more() -> None:
    spreads = []
    for count in (0.05, 1, 10, 100):
        seen = Took(seconds=3.0 * count, estimated_s=count, num_shards=count)
        factor = eta.factors(STAGES, {"first": seen}, History())["first"]
        spreads.append(factor.spread)
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < 0.2 < spreads[0]


def test_earlier_runs_narrow_the_range() -> None:
    history = History(log_factors={"first": math.log(2), "second": math.log(8)})
    known = eta.factors(STAGES, {}, history)
    assert known["first"].at(0) == pytest.approx(2)
    assert known["second"].at(0) == pytest.approx(8)
    assert known["first"].spread < eta.factors(STAGES, {}, History())["first"].spread
    # What this run does moves them together: it is twice as slow as those before.
    seen = Took(seconds=400.0, estimated_s=100.0, num_shards=50)
    moved = eta.factors(STAGES, {"first": seen}, history)
    assert moved["first"].at(0) == pytest.approx(4, rel=0.02)
    assert 12 < moved["second"].at(0) < 16.5


def test_a_range_has_one_unit_if_it_can() -> None:
    assert between(Range(low=130, middle=150, high=210)) == "2.2 to 3.5 min"
    assert between(Range(low=50, middle=60, high=150)) == "50 s to 2.5 min"
    assert between(Range(low=180, middle=180, high=181)) == "3.0 min"


@pytest.fixture
def config(tmp_path: Path) -> LightConfig:
    (tmp_path / "trouble").mkdir()
    return LightConfig(
        pipeline="light:PIPELINE",
        name="light",
        runs_dir=str(tmp_path),
        trouble=str(tmp_path / "trouble"),
        executor="local",
    )


def test_progress_inside_a_shard_counts(config: LightConfig) -> None:
    """Half of a shard took 100 s, which was estimated as half a second."""
    run = runs.open_for(config, PIPELINE.plan(config))
    runs.add_request(run, config, kind="sweep", executor="local")
    (Path(config.trouble) / "make-00000").write_text("hang")
    key = "make/arm/00000"
    task = begin(run, 1, [key])
    while Ledger(run.path).last_events(1, 0).get(key) != "started":
        assert task.poll() is None
    plan = PIPELINE.plan(config)

    def left() -> Range:
        state = observe(run, config, plan, local_active=frozenset({key}), with_queue=False)
        seconds = pace.time_left(state, pace.measure(run, state))
        assert seconds is not None
        return seconds

    assert left().middle < 20
    path = run.path / "progress" / "0001-0.json"
    path.write_text(json.dumps({"key": key, "fraction": 0.75}))  # of an earlier version
    assert left().middle < 20
    first = [0.25, path.stat().st_mtime - 100]
    path.write_text(json.dumps({"key": key, "fraction": 0.75, "first": first}))
    assert left().middle > 100
    (Path(config.trouble) / "make-00000").unlink()
    task.wait()
    Ledger(run.path).settle(1, Job(job_id=None))
    assert status_of(run, look(run)).left_s is None


def test_a_finished_run_is_history_for_others_in_its_place(
    config: LightConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    words = ["pipeline=light:PIPELINE", "cluster=local", f"runs_dir={tmp_path}", "name=light"]
    launch("sweep", *words, f"trouble={config.trouble}", PYTHONPATH=str(Path(__file__).parent))
    path = places.locate("light")
    noted = json.loads((path / pace.HISTORY).read_text())
    place = pace.place_of("local", config)
    assert noted["place"] == place
    assert noted["num_at_once"] >= 1
    plan = PIPELINE.plan(config)
    history = pace.read_history(PIPELINE, place, config, plan)
    assert history.log_factors == noted["log_factors"]
    assert history.log_factors.keys() == {stage.name for stage in PIPELINE.stages}
    assert pace.read_history(PIPELINE, place, config, plan, but_not=path) == History()
    assert pace.read_history(PIPELINE, "another", config, plan) == History()
    other = dataclasses.replace(PIPELINE, name="other")
    assert pace.read_history(other, place, config, plan) == History()
    noted["throughput"] = {"make": 5.0}
    (path / pace.HISTORY).write_text(json.dumps(noted))
    history = pace.read_history(PIPELINE, place, config, plan)
    assert history.log_factors.keys() == {"square", "merge"}
    large = plan_of(*((stage, [5.0, 5.0], False) for stage in plan.stages))
    assert pace.read_history(PIPELINE, place, config, large).log_factors == {}
    (path / pace.HISTORY).write_text("{")
    assert pace.read_history(PIPELINE, place, config, plan) == History()
    assert Run(path, PIPELINE).scan().damaged == {}
