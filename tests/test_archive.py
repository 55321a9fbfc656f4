"""A run fits into one file, and what is restored from it reads as the run did."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, launch, status
from hypothesis import given, settings
from hypothesis import strategies as st
from light import PIPELINE, LightConfig
from test_run_folder import write as write_data

from kdhpc.cluster import archive, housekeeping, runs
from kdhpc.cluster.observe import observe
from kdhpc.cluster.runs import Run
from kdhpc.cluster.status import look, status_of
from kdhpc.errors import BusyError, DamagedError, InputError
from kdhpc.storage.files import digest_of
from kdhpc.storage.results import logical_digest
from kdhpc.storage.work import Work, Written

DATA = Path(__file__).parent / "data"
MERGES = {"language": "8-merge", "mixture": "3-merge"}


@pytest.fixture(scope="module", params=MERGES)
def old_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of an earlier commit, which tests must not change."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(DATA / f"format-1-{request.param}.tar.xz") as file:
        file.extractall(folder, filter="data")
    run: Path = folder / request.param
    run.chmod(0o700)
    return run


def light(tmp_path: Path, num_published: int = 7, executor: str = "local") -> Run:
    """Return a light run of three shards in each stage, of which the first shards are published."""
    config = LightConfig(
        pipeline="light:PIPELINE", name="light", runs_dir=str(tmp_path), num_shards=3
    )
    plan = PIPELINE.plan(config)
    run = runs.open_for(config, plan)
    runs.add_request(run, config, kind="sweep", executor=executor)
    for shard in list(plan.shards.values())[:num_published]:
        work: Work[Any] = Work(run, config, plan)
        written = Written(path=write_data(shard, work).path, num_rows=1)
        work.publish(shard, written, time.time())
    return run


def archived(run: Run, file: Path) -> Path:
    state = look(run)
    housekeeping.check_at_rest(run, state, "archive it")
    archive.archive(run, state, file)
    return file


def members(file: Path) -> dict[str, bytes]:
    """Return the content of the files in an archive, by path."""
    with tarfile.open(file) as tar:
        return {
            member.name: content.read()
            for member in tar
            if (content := tar.extractfile(member)) is not None
        }


def packed(file: Path, contents: Mapping[str, bytes], *more: tarfile.TarInfo) -> Path:
    """Write an archive by hand; members in `more` are empty."""
    with tarfile.open(file, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in more:
            tar.addfile(member)
    return file


def report(*words: str | Path, cwd: Path, tmp: Path) -> bytes:
    """Run analysis/report.py, with a folder for temporary files, and return the page."""
    tmp.mkdir()
    finished = subprocess.run(
        [sys.executable, str(ROOT / "analysis" / "report.py"), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp)},
    )
    assert finished.returncode == 0, finished.stderr
    return (cwd / finished.stdout.splitlines()[-1]).read_bytes()


def test_an_archive_elsewhere_gives_the_same_report_and_the_same_digest(
    tiny_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / f"tiny{archive.SUFFIX}"
    said = launch("runs", "archive", str(tiny_run), str(file)).stdout
    assert said.startswith(f"{file}: ")
    assert "without data of 33 shards" in said
    size = sum(path.stat().st_size for path in tiny_run.rglob("*") if path.is_file())
    assert file.stat().st_size < size / 3
    names = {name.removeprefix("tiny/") for name in members(file)}
    for pattern, is_kept in {
        "1-truth/*/00000.????????/*.safetensors": False,
        "1-truth/*/*/tokenizer.json": True,
        "2-sample-truth/eval/*.arrow": True,
        "3-train-on-truth/*/00000.????????/*": False,
        "4-sample-teacher/*/*.arrow": False,
        "5-train-students/*/00000.checkpoints/train.jsonl": True,
        "6-sample-students/*/*.arrow": True,
        "7-score/*/*.h5": False,
        "8-merge/results/*.h5": True,
        "[1-8]-*/*/*.json": True,
        "code/*/kdhpc/pipeline.py": True,
        "logs/*/*.log": True,
    }.items():
        there = {str(p.relative_to(tiny_run)) for p in tiny_run.glob(pattern) if p.is_file()}
        assert there, pattern
        assert there & names == (there if is_kept else set()), pattern

    elsewhere = tmp_path / "elsewhere"
    restored = Path(launch("runs", "restore", str(file), "--runs-dir", str(elsewhere)).stdout[:-1])
    assert restored == elsewhere / "tiny"
    before, after = status(tiny_run, code=0), status(restored, code=0)
    assert after["complete"]
    assert after["logical_digest"] == before["logical_digest"]
    assert after["notes"] == ["restored from an archive, which left out data of 33 shards"]
    assert after["stages"] == before["stages"]
    assert logical_digest(restored / "8-merge/results.h5") == before["logical_digest"]
    said = launch("verify", str(restored)).stdout
    assert said.endswith(
        "48 records, 0 damaged\ndata of 33 of them was not in the archive that the run is from\n"
    )

    here, away = tmp_path / "here", tmp_path / "away"
    here.mkdir()
    away.mkdir()
    page = report(tiny_run, "--out", here, cwd=here, tmp=tmp_path / "tmp1")
    assert report(file, cwd=away, tmp=tmp_path / "tmp2") == page
    assert report(restored, cwd=away, tmp=tmp_path / "tmp3") == page
    assert [path.name for path in away.iterdir()] == ["tiny"]
    assert (away / "tiny" / "report.html").read_bytes() == page
    for folder in ("tmp1", "tmp2", "tmp3"):
        assert not [p for p in (tmp_path / folder).iterdir() if "kdhpc" in p.name]


def test_a_run_of_an_earlier_commit_is_archived_and_restored(old_run: Path, tmp_path: Path) -> None:
    file = archived(runs.open_run(old_run), tmp_path / f"x{archive.SUFFIX}")
    results = f"{MERGES[old_run.name]}/results.h5"
    restored = runs.open_run(archive.restore(file, str(tmp_path), name="again"))
    assert restored.path == tmp_path / "again"
    assert logical_digest(restored.path / results) == logical_digest(old_run / results)
    records = restored.scan().records
    assert records.keys() == runs.open_run(old_run).scan().records.keys()
    [merged] = [r for key, r in records.items() if key.startswith("merge/")]
    assert merged.data.samefile(restored.path / results)
    assert status_of(restored, look(restored)).complete
    same = launch("runs", "compare", str(old_run), str(file)).stdout
    assert same.endswith("the results are equal\n")


def test_a_run_that_is_not_finished_is_restored_as_it_was(tmp_path: Path) -> None:
    run = light(tmp_path, num_published=4)
    file = archived(run, tmp_path / f"x{archive.SUFFIX}")
    restored = runs.open_run(archive.restore(file, str(tmp_path / "other")))
    before, after = look(run), look(restored)
    assert after.situation.done == before.situation.done
    assert after.missing == before.missing
    assert restored.left_out == before.situation.done
    assert not after.situation.damaged


def test_a_restored_run_says_what_it_cannot_do_and_stays_as_it_is(tmp_path: Path) -> None:
    file = archived(light(tmp_path), tmp_path / f"x{archive.SUFFIX}")
    restored = archive.restore(file, str(tmp_path / "other"))
    before = {path: path.read_bytes() for path in restored.rglob("*") if path.is_file()}
    words = ["pipeline=light:PIPELINE", "num_shards=3", "cluster=local"]
    for script, typed in {
        "sweep": [*words, "name=light", f"runs_dir={restored.parent}"],
        "rerun": [str(restored)],
        "cancel": [str(restored)],
        "verify": [str(restored), "--put-aside"],
        "runs": ["archive", str(restored), str(tmp_path / f"y{archive.SUFFIX}")],
    }.items():
        refused = launch(script, *typed, code=2).stderr
        assert refused.startswith(f"error: {restored}: was restored from an archive, ")
        assert refused.count("\n") == 1
    reusing = [*words, "name=new", f"runs_dir={tmp_path}", f"reuse={restored}"]
    assert "nothing of it can be reused" in launch("sweep", *reusing, code=2).stderr
    assert not (tmp_path / "new").exists()
    launch("status", str(restored))
    launch("clean", str(restored), "--yes")
    after = {path: path.read_bytes() for path in restored.rglob("*") if path.is_file()}
    logs = {path for path in before if "logs" in path.parts}
    assert after == {path: content for path, content in before.items() if path not in logs}


def test_a_restored_run_asks_no_slurm_whose_jobs_may_be_those_of_the_archived_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = light(tmp_path, executor="slurm")
    _, config, plan = runs.current(run)
    state = observe(run, config, plan, policy=None, with_queue=False)
    file = tmp_path / f"x{archive.SUFFIX}"
    archive.archive(run, state, file)
    restored = runs.open_run(archive.restore(file, str(tmp_path / "other")))
    monkeypatch.setenv("PATH", "/nowhere")  # whatever asks Slurm fails
    assert look(run).queue_error
    assert not look(restored).queue_error


def test_a_new_run_is_not_sent_to_a_restored_one_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = archived(light(tmp_path), tmp_path / f"x{archive.SUFFIX}")
    monkeypatch.chdir(tmp_path)
    archive.restore(file, str(tmp_path / "other"))
    shutil.rmtree(tmp_path / "light")
    runs.check_place(LightConfig(pipeline="light:PIPELINE", name="light"))


def test_an_active_run_is_not_archived(tmp_path: Path) -> None:
    run = light(tmp_path)
    file = tmp_path / f"x{archive.SUFFIX}"
    with runs.launcher_lock(run):
        refused = launch("runs", "archive", str(run.path), str(file), code=3)
    assert refused.stderr == (
        f"error: {run.path}: is active; archive it when nothing runs, or cancel.py it first\n"
    )
    assert not file.exists()
    archived(run, file)
    with runs.launcher_lock(run), pytest.raises(BusyError, match="clean it when"):
        housekeeping.check_at_rest(run, look(run), "clean it")


def test_what_is_typed_wrong_is_refused_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    run = light(tmp_path)
    file = archived(run, tmp_path / f"x{archive.SUFFIX}")
    (tmp_path / f"text{archive.SUFFIX}").write_text("a text\n")
    before = sorted(tmp_path.rglob("*"))
    for words, problem in {
        ("archive", "nowhere"): "nowhere: no run of this name",
        ("archive", str(run.path), str(file)): "exists already; expected the name of a new file",
        ("archive", str(run.path), f"{tmp_path}/x.zip"): f"ends with {archive.SUFFIX}",
        ("archive", str(run.path), f"{tmp_path}/no/x{archive.SUFFIX}"): "no such folder",
        ("restore", f"{tmp_path}/gone{archive.SUFFIX}"): "no such file",
        ("restore", f"{tmp_path}/text{archive.SUFFIX}"): "not a whole archive",
        ("restore", str(file), "--runs-dir", str(tmp_path)): "light: exists already",
        ("restore", str(file), "--name", "../x"): "expected the name of a folder",
        ("compare", str(run.path), "nowhere"): "nowhere: no run of this name",
        ("compare", str(run.path), str(file)): "not a merged results file",
        ("compare", str(file), f"{tmp_path}/text{archive.SUFFIX}"): "not a whole archive",
        ("list", "--runs-dir", f"{tmp_path}/no"): "no such folder",
    }.items():
        refused = launch("runs", *words, code=2)
        assert refused.stderr.startswith("error: ")
        assert problem in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert refused.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_shard_is_named_and_nothing_is_archived(tmp_path: Path) -> None:
    run = light(tmp_path)
    [merged] = [r for key, r in run.scan().records.items() if key.startswith("merge/")]
    merged.data.write_bytes(merged.data.read_bytes()[::-1])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DamagedError, match="its bytes differ from what was published"):
        archived(run, tmp_path / f"x{archive.SUFFIX}")
    run.scan().records["make/arm/00000"].data.unlink()
    with pytest.raises(DamagedError, match="is missing"):
        archived(run, tmp_path / f"x{archive.SUFFIX}")
    assert len(sorted(tmp_path.rglob("*"))) == len(before) - 1


@given(part=st.floats(0.0, 1.0, exclude_max=True))
@settings(max_examples=40, deadline=None)
def test_a_truncated_archive_is_refused_and_leaves_nothing(
    part: float, whole_archive: Path
) -> None:
    whole = whole_archive.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"x{archive.SUFFIX}"
        file.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(InputError, match="not a whole archive"):
            archive.restore(file, f"{folder}/runs")
        assert not [*Path(folder).glob("runs/*"), *Path(folder).glob("runs/.*")]


@pytest.fixture(scope="module")
def whole_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return archived(light(folder), folder / f"x{archive.SUFFIX}")


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


@pytest.mark.parametrize(
    "bad",
    [
        member("light/../../x"),
        member("../x"),
        member("/light/x"),
        member("other/run.json"),
        member("light/more"),
        member("light/run.json"),
        member("light/link", tarfile.SYMTYPE, "/etc/passwd"),
        member("light/hard", tarfile.LNKTYPE, "light/run.json"),
        member("light/pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda member: member.name,
)
def test_what_should_not_be_in_an_archive_is_never_unpacked(
    bad: tarfile.TarInfo, whole_archive: Path, tmp_path: Path
) -> None:
    file = packed(tmp_path / f"x{archive.SUFFIX}", members(whole_archive), bad)
    with pytest.raises(InputError, match=r"is no file inside of the run|should not be in it"):
        archive.restore(file, f"{tmp_path}/runs/deeper")
    assert [*(tmp_path / "runs" / "deeper").iterdir()] == []
    assert {path.name for path in tmp_path.iterdir()} == {file.name, "runs"}


def changed(contents: dict[str, bytes]) -> None:
    [name] = [name for name in contents if "3-merge" in name and not name.endswith(".json")]
    contents[name] = contents[name][::-1]


def missing(contents: dict[str, bytes]) -> None:
    del contents["light/run.json"]


def manifest(contents: dict[str, bytes]) -> None:
    contents["light/archive.json"] = contents["light/archive.json"].replace(b"make", b"fake")


def foreign(contents: dict[str, bytes]) -> None:
    del contents["light/archive.json"]


@pytest.mark.parametrize("change", [changed, missing, manifest, foreign])
def test_an_archive_that_was_changed_is_refused(
    change: Callable[[dict[str, bytes]], None], whole_archive: Path, tmp_path: Path
) -> None:
    contents = members(whole_archive)
    change(contents)
    file = packed(tmp_path / f"x{archive.SUFFIX}", contents)
    with pytest.raises(InputError) as refused:
        archive.restore(file, f"{tmp_path}/runs")
    assert str(file) in str(refused.value)
    assert not (tmp_path / "runs" / "light").exists()


def test_an_archive_of_another_format_says_which_version_reads_it(
    whole_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "FORMAT", 2)
    with pytest.raises(InputError, match=r"has format 1, from version [\d.]+ of kdhpc; expected"):
        archive.restore(whole_archive, f"{tmp_path}/runs")


def test_the_files_of_an_archive_are_those_of_the_run(whole_archive: Path, tmp_path: Path) -> None:
    run = light(tmp_path)
    file = archived(run, tmp_path / f"x{archive.SUFFIX}")
    contents = members(file)
    about = json.loads(contents.pop("light/archive.json"))
    assert about["files"] == {
        name.removeprefix("light/"): digest_of(run.path / name.removeprefix("light/"))
        for name in contents
    }
    assert about["left_out"] == [
        f"{stage}/arm/{number:05d}" for stage in ("make", "square") for number in range(3)
    ]
    assert gzip.decompress(file.read_bytes())[257:262] == b"ustar"


def test_a_run_is_not_restored_into_a_file(tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / f"tiny{archive.SUFFIX}"
    launch("runs", "archive", str(tiny_run), str(file))
    (tmp_path / "text").write_text("")
    refused = launch("runs", "restore", str(file), "--runs-dir", str(tmp_path / "text"), code=2)
    assert "text: is a file; expected a folder" in refused.stderr
    refused = launch("runs", "restore", str(file), "--name", "n" * 300, code=2)
    assert "expected the name of a folder" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text", file.name]
