"""What the programs of other sites print: recorded lines and small programs instead of Slurm's."""

import shutil
from pathlib import Path

import pytest

from kdhpc.cluster import slurm
from kdhpc.errors import ClusterError

BANNER = "-----\\n   Welcome to this machine. Submit host: ...OK\\n-----\\n"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder that comes first on PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return tmp_path / "bin"


def install(folder: Path, name: str, *, out: str = "", err: str = "", code: int = 0) -> None:
    """A program that prints these bytes, given with printf's escapes."""
    path = folder / name
    path.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/{name}.arguments\n'
        f"printf '%b' '{out}'\nprintf '%b' '{err}' >&2\nexit {code}\n"
    )
    path.chmod(0o755)


def submit(tmp_path: Path) -> str:
    return slurm.submit_held(tmp_path / "0001.sh", "score.run-0001", tmp_path / "%a.log")


@pytest.mark.parametrize(
    "answer", ["17\\n", "17;cluster\\n", f"{BANNER}17\\n", f"{BANNER}17;east\\nHave 2 fun\\n"]
)
def test_the_job_id_is_found_among_other_lines(program: Path, tmp_path: Path, answer: str) -> None:
    install(program, "sbatch", out=answer)
    assert submit(tmp_path) == "17"


def test_a_job_whose_id_was_not_printed_is_found_by_its_name(program: Path, tmp_path: Path) -> None:
    install(program, "sbatch", out=BANNER)
    install(program, "squeue", out=f"{BANNER}23\\n")
    assert submit(tmp_path) == "23"


def test_foreign_lines_and_names_in_the_queue_are_passed_over(program: Path) -> None:
    ours = (
        "31|30|0|RUNNING|None|score.run-0001\\n33|33|N/A|PENDING|Dependency|gate-score.run-0001\\n"
    )
    foreign = "40|40|N/A|PENDING|Priority|my\\njob\\n41|41|N/A|PENDING|Priority|f\\0374r|x\\n"
    install(program, "squeue", out=f"NOTE: maintenance on Monday\\n{foreign}{ours}")
    tasks = {task.name: (task.job_id, task.index, task.state) for task in slurm.queue()}
    assert tasks["score.run-0001"] == ("30", 0, "RUNNING")
    assert tasks["gate-score.run-0001"] == ("33", None, "PENDING")
    assert "--all" in (program / "squeue.arguments").read_text()


SAID = (
    "sbatch: error: {}\\nsbatch: error: Batch job submission failed: Job violates accounting/QOS "
)
SAID += "policy (job submit limit, the user's size and/or time limits)\\n"


@pytest.mark.parametrize(
    ("reason", "over_limit"),
    [
        ("QOSMaxSubmitJobPerUserLimit", True),
        ("AssocMaxSubmitJobLimit", True),
        ("QOSMaxWallDurationPerJobLimit", False),
        ("QOSMaxCpuPerUserLimit", False),
        ("AssocGrpCpuLimit", False),
        ("a limit that is not named", True),
    ],
)
def test_a_full_queue_is_told_from_a_request_that_can_never_run(
    program: Path, tmp_path: Path, reason: str, over_limit: bool
) -> None:
    install(program, "sbatch", err=SAID.format(reason).replace("'", "'\\''"), code=1)
    with pytest.raises(ClusterError, match=reason) as refused:
        submit(tmp_path)
    assert isinstance(refused.value, slurm.OverLimitError) == over_limit
    assert isinstance(refused.value, slurm.RefusedError) != over_limit


def test_everything_that_sbatch_said_is_shown(program: Path, tmp_path: Path) -> None:
    first = "sbatch: error: a memory request is not allowed here"
    last = "sbatch: error: Batch job submission failed: Memory specification invalid"
    install(program, "sbatch", err=f"{first}\\n{last}\\n", code=1)
    with pytest.raises(slurm.RefusedError) as refused:
        submit(tmp_path)
    assert "a memory request is not allowed here; Batch job submission" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_hidden_partitions_are_listed(program: Path) -> None:
    line = "PartitionName=secret Default=NO Hidden=YES MaxTime=02:00:00\\n"
    install(program, "scontrol", out=f"news\\n{line}")
    slurm.partitions.cache_clear()
    assert slurm.partitions() == {"secret": 120.0}
    slurm.partitions.cache_clear()
    assert "--all" in (program / "scontrol.arguments").read_text()
    assert shutil.which("scontrol") == str(program / "scontrol")
