"""Records are published whole and once, and damage is named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from kdhpc.config.run import RunConfig
from kdhpc.errors import DamagedError
from kdhpc.plan.shards import Arm, Plan, Shard
from kdhpc.plan.stages import Pipeline, Stage
from kdhpc.storage.files import disk_errors, write_once
from kdhpc.storage.run_folder import RunFolder, verify
from kdhpc.storage.work import Work, Written

SHARD = Shard(arm=Arm(stage="only", name="arm", fields={"x": 1}, inputs={}), name="00000")


def write(shard: Shard, work: Work[RunConfig]) -> Written:
    path = work.new_path(shard, ".txt")
    path.write_text("data")
    return Written(path=path, num_rows=1)


STAGE = Stage(
    name="only",
    reads="",
    writes="",
    plan=lambda c, b: [SHARD],
    run=write,
    alias="last",
)
PIPELINE = Pipeline(name="test", config=RunConfig, stages=(STAGE,))


@pytest.fixture
def work(tmp_path: Path) -> Work[RunConfig]:
    run = RunFolder(tmp_path, PIPELINE.folders, PIPELINE.aliases)
    return Work(run, RunConfig(), Plan())


def test_a_published_shard_is_found_and_verified(work: Work[RunConfig]) -> None:
    assert work.publish(SHARD, write(SHARD, work), time.time())
    record = work.run.scan().records[SHARD.key]
    verify(record)
    assert record.data.read_text() == "data"
    assert (record.recipe, record.num_rows) == (SHARD.recipe, 1)
    assert (work.run.path / "1-only" / "last").read_text() == "data"


def test_the_first_attempt_wins_and_the_second_leaves_nothing(work: Work[RunConfig]) -> None:
    first, second = write(SHARD, work), write(SHARD, work)
    assert work.publish(SHARD, first, time.time())
    assert not work.publish(SHARD, second, time.time())
    assert first.path.exists()
    assert not second.path.exists()
    assert work.run.scan().records[SHARD.key].data == first.path


def test_writing_the_same_record_again_counts_as_won(tmp_path: Path) -> None:
    """A file server may repeat a request that it has already carried out."""
    assert write_once(tmp_path / "a.json", {"nonce": 1})
    assert write_once(tmp_path / "a.json", {"nonce": 1})
    assert not write_once(tmp_path / "a.json", {"nonce": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("damage", ["truncated", "deleted", "half a record", "another record"])
def test_damage_is_named_and_the_shard_is_not_done(work: Work[RunConfig], damage: str) -> None:
    work.publish(SHARD, write(SHARD, work), time.time())
    path = work.run.record_path(SHARD.key)
    data = work.run.scan().records[SHARD.key].data
    if damage == "truncated":
        data.write_text("dat")
    elif damage == "deleted":
        data.unlink()
    elif damage == "half a record":
        path.write_bytes(path.read_bytes()[:40])
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": "../../elsewhere"}))
    scan = work.run.scan()
    assert scan.records == {}
    assert str(work.run.path) in scan.damaged[SHARD.key]
    work.run.quarantine(SHARD.key)
    assert work.publish(SHARD, write(SHARD, work), time.time())
    assert list(work.run.scan().records) == [SHARD.key]


def test_a_flipped_bit_is_found_when_the_data_is_read(work: Work[RunConfig]) -> None:
    work.publish(SHARD, write(SHARD, work), time.time())
    record = work.run.scan().records[SHARD.key]
    record.data.write_text("dbta")
    fresh = Work(work.run, RunConfig(), Plan())
    with pytest.raises(DamagedError, match=record.data.name):
        fresh.input(SHARD.key)


def test_what_is_published_during_a_scan_is_not_called_damaged(tmp_path: Path) -> None:
    """A large folder is listed in pieces, so a record may be listed when its data is not."""
    run = RunFolder(tmp_path, PIPELINE.folders, PIPELINE.aliases)
    folder = tmp_path / "1-only" / "arm"
    folder.mkdir(parents=True)
    for number in range(50_000):
        (folder / f"other-{number}").touch()
    work = Work(run, RunConfig(), Plan())
    shards = [replace(SHARD, name=f"{number:05d}") for number in range(300)]

    def publish() -> None:
        for shard in shards:
            work.publish(shard, write(shard, work), time.time())

    with ThreadPoolExecutor() as pool:
        writer = pool.submit(publish)
        while not writer.done():
            assert run.scan().damaged == {}
        writer.result()
    assert len(run.scan().records) == len(shards)
    shutil.rmtree(folder)  # pytest would keep these many files for days


def test_killed_writer_leaves_no_shard(tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from pathlib import Path
from test_run_folder import PIPELINE, SHARD, write
from kdhpc.storage.run_folder import RunFolder
from kdhpc.storage.work import Work
from kdhpc.config.run import RunConfig
from kdhpc.plan.shards import Plan
run = RunFolder(Path({str(tmp_path)!r}), PIPELINE.folders)
work = Work(run, RunConfig(), Plan())
written = write(SHARD, work)
print("written", flush=True)
time.sleep(600)
work.publish(SHARD, written, time.time())
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    run = RunFolder(tmp_path, PIPELINE.folders, PIPELINE.aliases)
    assert run.scan().records == {}
    work = Work(run, RunConfig(), Plan())
    assert work.publish(SHARD, write(SHARD, work), time.time())


def test_a_full_disk_and_an_unwritable_one_are_named(tmp_path: Path) -> None:
    with (
        pytest.raises(DamagedError, match="disk is full"),
        disk_errors(tmp_path),
        open("/dev/full", "w") as file,
    ):
        file.write("x" * 100_000)
    with pytest.raises(DamagedError, match="cannot be written"), disk_errors(tmp_path):
        raise PermissionError(13, "Permission denied")


@pytest.fixture
def linked(tmp_path: Path) -> RunFolder:
    """Return a run folder whose only stage has links to the output of each arm."""
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run", PIPELINE.folders, links={"only": "models"})


def test_what_is_published_has_a_link_under_its_arms_name_that_moves_with_the_run(
    linked: RunFolder, tmp_path: Path
) -> None:
    work = Work(linked, RunConfig(), Plan())
    written = write(SHARD, work)
    assert work.publish(SHARD, written, time.time())
    assert not work.publish(SHARD, write(SHARD, work), time.time())
    assert (linked.path / "models" / "arm").resolve() == written.path.resolve()
    moved = linked.path.rename(tmp_path / "moved")
    assert (moved / "models" / "arm").read_text() == "data"


def test_a_lost_link_leaves_the_shard_done_and_is_made_again(linked: RunFolder) -> None:
    work = Work(linked, RunConfig(), Plan())
    work.publish(SHARD, write(SHARD, work), time.time())
    link = linked.path / "models" / "arm"
    link.unlink()
    assert list(linked.scan().records) == [SHARD.key]
    linked.make_lost_links()
    assert link.read_text() == "data"
    link.unlink()
    link.symlink_to("../nowhere")  # as after the data was made again under another name
    linked.make_lost_links()
    assert link.read_text() == "data"


def test_where_links_cannot_be_made_shards_are_published_all_the_same(linked: RunFolder) -> None:
    (linked.path / "models").write_text("somebody's file")
    work = Work(linked, RunConfig(), Plan())
    assert work.publish(SHARD, write(SHARD, work), time.time())
    linked.make_lost_links()
    assert list(linked.scan().records) == [SHARD.key]
    (linked.path / "models").unlink()
    (linked.path / "models" / "arm").mkdir(parents=True)
    linked.make_lost_links()
    assert [path.name for path in (linked.path / "models").iterdir()] == ["arm"]
