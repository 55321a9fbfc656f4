"""What --dry-run says: times, requests and stages that do not start, in lines that fit."""

import dataclasses
import io

import pytest
from commands import launch
from hypothesis import given
from hypothesis import strategies as st
from light import PIPELINE, LightConfig
from rich.console import Console

from kdhpc.cluster import runs
from kdhpc.cluster.display import WIDTH, preview_view
from kdhpc.cluster.eta import Range
from kdhpc.cluster.planning import (
    Preview,
    StagePreview,
    batches_by_stage,
    describe,
    preview_stages,
)
from kdhpc.cluster.resources import Resources
from kdhpc.config.run import Slurm

SECOND_MIN = 1 / 60


def previewed(config: LightConfig, at_once: int) -> dict[str, StagePreview]:
    """Preview the light pipeline, whose shards take a second each, on Slurm."""
    plan = PIPELINE.plan(config)
    batches = batches_by_stage(PIPELINE, plan, config, max_array=1000)
    rows = preview_stages(PIPELINE, plan, config, batches, at_once=at_once)
    return {row.folder: row for row in rows}


@pytest.mark.parametrize("preset", ["demo", "tiny", "paper", "mixture"])
@pytest.mark.parametrize("more", [[], ["--verbose"]])
def test_every_line_of_a_dry_run_fits(preset: str, more: list[str]) -> None:
    shown = launch("sweep", preset, "cluster=local", "--dry-run", *more).stdout.splitlines()
    assert max(len(line) for line in shown) <= WIDTH
    assert any(line.split()[:1] == ["total"] for line in shown)
    assert ("writes" in " ".join(shown)) == bool(more)


@pytest.mark.parametrize("preset", ["demo", "tiny", "paper", "mixture"])
@pytest.mark.parametrize("word", ["slurm.pack=8", "slurm.partition=a-long-name", "until=STAGE"])
def test_every_line_of_a_dry_run_for_slurm_fits(preset: str, word: str) -> None:
    stage = "fit-students" if preset == "mixture" else "train-students"
    pipeline, config = runs.from_words([preset, word.replace("STAGE", stage)])
    plan = pipeline.plan(config)
    batches = batches_by_stage(pipeline, plan, config, max_array=1000)
    rows = preview_stages(pipeline, plan, config, batches, at_once=64)
    left = Range(low=60, middle=90, high=7200)
    preview = Preview(stages=rows, at_once=64, left_s=left, num_accepted=9, refused=())
    file = io.StringIO()
    console = Console(file=file, width=WIDTH, soft_wrap=True)
    console.print(preview_view(preview, config, "slurm"))
    lines = [*file.getvalue().splitlines(), *pipeline.estimate(config)]
    assert max(len(line) for line in lines) <= WIDTH
    assert "…" not in file.getvalue()
    assert "sbatch --test-only passed for 9 scripts" in file.getvalue()


@given(num_shards=st.integers(1, 40), at_once=st.integers(1, 50), pack=st.integers(1, 5))
def test_equal_shards_run_in_rounds(num_shards: int, at_once: int, pack: int) -> None:
    config = LightConfig(
        num_shards=num_shards, slurm=Slurm(task_min=SECOND_MIN, pack=pack, time_min=1)
    )
    row = previewed(config, at_once)["1-make"]
    num_tasks = -(-num_shards // pack)
    assert (row.num_shards, row.num_tasks) == (num_shards, num_tasks)
    assert row.wall_s == -(-num_tasks // min(at_once, num_tasks))
    assert row.rank_hours * 3600 == pytest.approx(num_shards)


def test_shards_of_one_task_take_their_turn_in_its_processes() -> None:
    slurm = Slurm(task_min=3 * SECOND_MIN, pack=2)
    row = previewed(LightConfig(num_shards=6, slurm=slurm), at_once=1)["1-make"]
    assert (row.num_tasks, row.wall_s) == (1, 3.0)
    row = previewed(LightConfig(num_shards=6, slurm=Slurm(task_min=1)), at_once=1)["1-make"]
    assert (row.num_tasks, row.wall_s) == (1, 6.0)


def test_a_training_takes_the_gpus_of_this_machine_that_it_has_ranks() -> None:
    pipeline, config = runs.from_words(["paper"])
    plan = pipeline.plan(config)
    batches = batches_by_stage(pipeline, plan, config, max_array=None)

    def wall_s(at_once: int, *, ranks_count: bool) -> float:
        rows = preview_stages(
            pipeline, plan, config, batches, at_once=at_once, ranks_count=ranks_count, asks=False
        )
        [row] = [row for row in rows if row.folder == "5-train-students"]
        return row.wall_s

    of_one = wall_s(20, ranks_count=False)  # twenty students, each with four ranks
    assert wall_s(80, ranks_count=True) == pytest.approx(of_one)
    assert wall_s(8, ranks_count=True) == pytest.approx(10 * of_one)
    assert wall_s(3, ranks_count=True) == pytest.approx(20 * of_one)


def test_stages_after_until_are_planned_and_marked() -> None:
    rows = previewed(LightConfig(until="square"), at_once=1)
    assert [row.starts for row in rows.values()] == [True, True, False]
    assert [row.num_tasks for row in rows.values()] == [1, 1, 1]
    shown = launch(
        "sweep", "pipeline=light:PIPELINE", "cluster=local", "until=square", "--dry-run"
    ).stdout
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in shown.splitlines()}
    assert "not now" in lines["3-merge"]
    assert "not now" not in lines["2-square"]
    assert lines["until"].startswith("square 12 ")
    assert "until=square: later stages start when sweep.py is typed without it" in shown


def test_a_request_is_described_as_sbatch_will_get_it() -> None:
    one = Resources(time_min=90, mem_gb=1.5, cpus_per_task=1, gpus_per_node=1, signal_s=60)
    assert describe(one) == "1 core 1.5 GB 1 GPU 90 min"
    many = Resources(
        time_min=1440, mem_gb=256, cpus_per_task=8, gpus_per_node=4, nodes=2, ranks_per_node=4,
        partition="gpu", signal_s=60,
    )  # fmt: skip
    assert describe(many) == "2x4: 8 cores 256 GB 4 GPUs 24 h on gpu"
    own = dataclasses.replace(
        one, pack=4, mem_gb=None, sbatch={"gres": "gpu:h100:4", "gpus-per-node": None}
    )
    assert describe(own) == "pack 4: 1 core 90 min gres=gpu:h100:4"
