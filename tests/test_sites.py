"""What other sites want and print: options, recorded lines, small programs instead of Slurm's."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT, launch, status

from kdhpc.cluster import runs, slurm
from kdhpc.cluster.batch_script import batch_script
from kdhpc.cluster.decide import Batch
from kdhpc.cluster.resources import array_resources, gate_resources
from kdhpc.cluster.task import find_rank
from kdhpc.errors import ClusterError, InputError

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


FULL = "Batch job submission failed: Resource temporarily unavailable"
NO_NODE = "allocation failure: Requested node configuration is not available"


@pytest.mark.parametrize(
    ("said", "states", "objection"),
    [
        ("", "idle\\n", ""),
        (NO_NODE, "idle\\nmixed\\nallocated\\n", NO_NODE),
        (NO_NODE, "idle\\ndrained\\n", None),
        (NO_NODE, "down*\\nidle\\n", None),
        (NO_NODE, "idle*\\n", None),
        (NO_NODE, "", None),
        (FULL, "idle\\n", None),
        ("sbatch: error: Unable to contact slurm controller", "idle\\n", None),
        ("sbatch: error: Invalid qos specification", "down\\n", "Invalid qos specification"),
    ],
)
def test_what_may_pass_is_no_objection_to_a_script(
    program: Path, said: str, states: str, objection: str | None
) -> None:
    install(program, "sbatch", err=f"{said}\\n", code=1 if said else 0)
    install(program, "sinfo", out=states)
    assert slurm.check_script("#!/bin/sh\n") == objection


def test_everything_that_sbatch_said_is_shown(program: Path, tmp_path: Path) -> None:
    first = "sbatch: error: a memory request is not allowed here"
    last = "sbatch: error: Batch job submission failed: Memory specification invalid"
    install(program, "sbatch", err=f"{first}\\n{last}\\n", code=1)
    with pytest.raises(slurm.RefusedError) as refused:
        submit(tmp_path)
    assert "a memory request is not allowed here; Batch job submission" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_scontrol_calls_no_error_is_none(program: Path) -> None:
    install(program, "scontrol", err="71_1: No error\\n", code=1)
    slurm.release(["71"])
    install(program, "scontrol", err="71: Access denied\\n", code=1)
    with pytest.raises(ClusterError, match="Access denied"):
        slurm.release(["71"])


def test_hidden_partitions_are_listed(program: Path) -> None:
    line = "PartitionName=secret Default=NO Hidden=YES MaxTime=02:00:00\\n"
    install(program, "scontrol", out=f"news\\n{line}")
    slurm.partitions.cache_clear()
    assert slurm.partitions() == {"secret": 120.0}
    slurm.partitions.cache_clear()
    assert "--all" in (program / "scontrol.arguments").read_text()
    assert shutil.which("scontrol") == str(program / "scontrol")


def scripts(*words: str) -> tuple[list[str], list[str]]:
    """Lines of the batch scripts of an array of scores and of its gate."""
    _, config = runs.from_words(["tiny", *words])
    batch = Batch(stage="score", tasks=(("a",),), nodes=1, ranks_per_node=1)
    array = array_resources(config, batch, uses_device=True)
    gate = gate_resources(config.slurm, {})
    return (
        batch_script(name="x", command="true", num_tasks=1, resources=array).splitlines(),
        batch_script(name="gate-x", command="true", num_tasks=None, resources=gate).splitlines(),
    )


def test_any_option_is_given_and_any_default_taken_away() -> None:
    array, gate = scripts(
        "slurm.gpus_per_node=1",
        "slurm.sbatch={gres: 'gpu:h100:4', gpus-per-node: null, exclusive: true, mem: null}",
        "slurm.sbatch.reservation=maintenance",
        "slurm.srun=[--gpu-bind=none]",
        "slurm.gate.sbatch={gres: null, qos: debug}",
    )
    assert {"#SBATCH --gres=gpu:h100:4", "#SBATCH --exclusive"} <= set(array)
    assert "#SBATCH --exclusive" in gate
    assert "#SBATCH --qos=debug" in gate
    for script in (array, gate):
        assert "#SBATCH --reservation=maintenance" in script
        assert not any("--mem" in line or "--gpus-per-node" in line for line in script)
        assert " --gpu-bind=none " in script[-1]
    assert not any("--gres" in line for line in gate)


def test_options_of_a_stage_come_on_top_of_those_for_all() -> None:
    array, gate = scripts(
        "slurm.sbatch.constraint=cpu",
        "slurm.stages.score={account: me_g, qos: fast, sbatch: {constraint: gpu}}",
        "slurm.stages.score.srun=[--mpi=none]",
    )
    assert {"#SBATCH --constraint=gpu", "#SBATCH --account=me_g", "#SBATCH --qos=fast"} <= set(
        array
    )
    assert " --mpi=none " in array[-1]
    assert "#SBATCH --constraint=cpu" in gate
    assert not any("--account" in line or "--qos" in line for line in gate)


def test_memory_and_even_the_time_limit_may_be_left_to_the_site() -> None:
    array, gate = scripts("slurm.mem_gb=null", "slurm.sbatch.time=null")
    for script in (array, gate):
        assert not any("--mem" in line or "--time" in line for line in script)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("slurm.sbatch.array=0-9", "slurm.sbatch.array: kdhpc sets this option itself"),
        ("slurm.gate.sbatch.output=x", "slurm.gate.sbatch.output: kdhpc sets this option itself"),
        ("slurm.sbatch.C=gpu", "slurm.sbatch.C: expected the long name of an option"),
        ("slurm.sbatch.comment='a b'", "slurm.sbatch.comment='a b': expected a word"),
        ("slurm.srun=['a b']", "slurm.srun=['a b']: expected every item to be a word"),
    ],
)
def test_options_that_cannot_be_are_refused(words: str, named: str) -> None:
    with pytest.raises(InputError) as refused:
        runs.from_words(["tiny", words])
    assert str(refused.value).startswith(named)


def setup_lines(num_nodes: int, *setup: str) -> str:
    """The shell text that the batch script of an array runs before srun."""
    _, config = runs.from_words(["tiny", f"slurm.setup=[{','.join(setup)}]"])
    batch = Batch(stage="score", tasks=(("a",),), nodes=num_nodes, ranks_per_node=1)
    resources = array_resources(config, batch, uses_device=True)
    text = batch_script(name="x", command="true", num_tasks=1, resources=resources)
    return text.partition("# setup")[2].partition("# command")[0]


def master_addr(program: Path, text: str) -> str:
    """The address that is set after setup lines, on a job of the nodes n1 and n2."""
    environment = {"PATH": f"{program}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-2]"}
    command = ["bash", "-c", f'{text}\necho "at ${{MASTER_ADDR-nowhere}}"']
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return shown.stdout.removeprefix("at ").rstrip("\n")


def answer_for_nodes(program: Path, node: str) -> None:
    """A scontrol that expands a list of nodes, and describes the first of them alone."""
    (program / "scontrol").write_text(
        '#!/bin/sh\n[ "$2 $3" = "hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n'
        f'[ "$2 $3" = "node n1" ] && printf "{node}"\n'
    )
    (program / "scontrol").chmod(0o755)


def test_ranks_meet_at_the_address_of_the_first_node(program: Path) -> None:
    answer_for_nodes(
        program, "NodeName=n1 Arch=x86_64\\n   NodeAddr=10.1.2.3 NodeHostName=n1 Version=22.05\\n"
    )
    assert master_addr(program, setup_lines(2)) == "10.1.2.3"
    assert master_addr(program, setup_lines(2, "export MASTER_ADDR=n1i")) == "n1i"
    assert master_addr(program, setup_lines(1)) == "nowhere"
    answer_for_nodes(program, "slurm_load_node error: Unable to contact slurm controller\\n")
    assert master_addr(program, setup_lines(2)) == "n1"
    install(program, "scontrol", code=1)
    assert master_addr(program, setup_lines(2)) == ""


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Environment of the last of eight ranks on two nodes, in a container without Slurm."""
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in {
        "PROCID": "7", "NTASKS": "8", "LOCALID": "3", "JOB_ID": "1000", "JOB_NUM_NODES": "2",
        "JOB_NODELIST": "n[1-2]",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return monkeypatch


def test_ranks_find_each_other_without_scontrol(step: pytest.MonkeyPatch) -> None:
    step.setenv("MASTER_ADDR", "10.1.2.3")
    assert find_rank() == (7, 8)
    first = os.environ["MASTER_PORT"]
    assert (os.environ["MASTER_ADDR"], os.environ["LOCAL_RANK"]) == ("10.1.2.3", "3")
    assert 10000 <= int(first) < 30000
    step.delenv("MASTER_PORT")
    step.setenv("SLURM_RESTART_COUNT", "1")
    find_rank()
    assert os.environ["MASTER_PORT"] != first, "a requeued attempt needs another port"
    step.setenv("MASTER_PORT", "29500")
    find_rank()
    assert os.environ["MASTER_PORT"] == "29500"


def test_ranks_of_one_node_need_no_address(step: pytest.MonkeyPatch) -> None:
    step.setenv("SLURM_JOB_NUM_NODES", "1")
    assert find_rank() == (7, 8)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize("address", [None, ""])
def test_ranks_without_an_address_say_so_in_one_line(
    step: pytest.MonkeyPatch, address: str | None
) -> None:
    if address is not None:
        step.setenv("MASTER_ADDR", address)
    with pytest.raises(ClusterError, match=r"rank 7 of 8: MASTER_ADDR .* slurm\.setup") as refused:
        find_rank()
    assert "\n" not in str(refused.value)


def test_a_rank_alone_takes_the_gpu_of_its_place_on_the_node(step: pytest.MonkeyPatch) -> None:
    step.setenv("SLURM_NTASKS", "1")
    step.setenv("SLURM_PROCID", "0")
    step.setenv("SLURM_LOCALID", "2")
    assert find_rank() == (0, 1)
    assert os.environ["LOCAL_RANK"] == "2"
    assert "MASTER_ADDR" not in os.environ
    step.setenv("LOCAL_RANK", "1")  # as processes that share a task are given it
    find_rank()
    assert os.environ["LOCAL_RANK"] == "1"


VERSIONS = Path(__file__).parent / "data" / "slurm"


def play(folder: Path, version: str) -> None:
    """Let Slurm's programs print what they print in a version (see tests/data/slurm/README.md)."""
    shutil.copytree(VERSIONS / version, folder / version)
    for name in ("squeue", "sacct", "sbatch", "scontrol"):
        what = "-$last" if name == "scontrol" else ""  # it shows a partition, or the config
        path = folder / version / f"{name}{what}.txt"
        (folder / name).write_text(f"#!/bin/sh\nfor last; do :; done\nexec cat {path}\n")
        (folder / name).chmod(0o755)


@pytest.fixture(params=["22.05", "23.11", "24.05", "25.05"])
def version(program: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Each version of Slurm in turn; its programs come first on PATH."""
    play(program, request.param)
    for cached in (slurm.partitions, slurm.max_array_size):
        cached.cache_clear()
    yield request.param
    for cached in (slurm.partitions, slurm.max_array_size):
        cached.cache_clear()


def test_the_queue_is_read_in_every_version(version: str) -> None:
    tasks = [task for task in slurm.queue() if ".run.3f9a-" in task.name]
    shown = {(task.job_id, task.index): (task.state, task.reason) for task in tasks}
    assert shown == {
        ("30", 0): ("RUNNING", "None"),
        ("30", 1): ("COMPLETING", "None"),
        ("30", 2): ("PENDING", "launch failed requeued held"),
        ("30", 3): ("PENDING", "JobArrayTaskLimit"),
        ("30", 4): ("PENDING", "JobArrayTaskLimit"),
        ("34", None): ("PENDING", "Dependency"),
        ("35", 0): ("PENDING", slurm.HELD_BY_USER),
    }
    assert shown["30", 2][1] in slurm.HELD_BY_SLURM


def test_the_holds_of_every_version_are_known(version: str) -> None:
    """Slurm holds what it could not start; such a job is released, or named as one that stays."""
    held = {task.reason for task in slurm.queue() if "requeued held" in task.reason}
    to_release = held & slurm.HELD_BY_SLURM
    assert "launch failed requeued held" in to_release
    assert all(slurm.NEVER_STARTS.match(reason) for reason in held - to_release)
    assert not any(slurm.NEVER_STARTS.match(reason) for reason in to_release)


def test_accounting_is_read_in_every_version(version: str) -> None:
    ends = {
        index: (end.state, end.exit_code) for (_, index), end in slurm.accounting(["30"]).items()
    }
    assert ends == {
        0: ("COMPLETED", "0:0"),
        1: ("COMPLETED", "0:0"),
        2: ("OUT_OF_MEMORY", "0:125"),
        3: ("FAILED", "0:9"),
        4: ("FAILED", "9:0"),
        5: ("CANCELLED by 1000", "0:0"),
        6: ("CANCELLED by 1000", "0:0"),
        7: ("TIMEOUT", "0:0"),
        8: ("CANCELLED by 1000", "0:0"),
        9: ("PREEMPTED", "0:15"),
        10: ("CANCELLED by 1000", "0:15"),
        11: ("BOOT_FAIL", "0:0"),
    }
    assert slurm.accounting(["30"])["30", 1].node == "n2"


def test_what_the_controller_remembers_is_read(program: Path) -> None:
    """Also beside names of other jobs with blanks, in both forms of an exit code."""
    lines = [
        "Welcome, 3 news",
        "30 0 CANCELLED 15 make.run.3f9a-0001 n1", "30 1 FAILED 768 make.run.3f9a-0001 n[1-2]",
        "30 2 FAILED 9 make.run.3f9a-0001 n2", "30 3 CANCELLED 0 make.run.3f9a-0001",
        "30 4 RUNNING 0 make.run.3f9a-0001 n1", "30 5 COMPLETING 0 make.run.3f9a-0001 n1",
        "31 0 FAILED 3:0 make.run.3f9a-0002 n2", "32 N/A FAILED 256 make.run.3f9a-0001 n2",
        "33 0 FAILED 256 other job n2", "34 0 FAILED 256 my", "job n2", "",
    ]  # fmt: skip
    (program / "lines").write_text("\n".join(lines))
    (program / "squeue").write_text(f"#!/bin/sh\nexec cat {program}/lines\n")
    (program / "squeue").chmod(0o755)
    names = {"make.run.3f9a-0001", "make.run.3f9a-0002"}
    found = slurm.remembered(names)
    assert {key: (end.state, end.exit_code, end.node) for key, end in found.items()} == {
        ("30", 0): ("CANCELLED", "0:15", "n1"),
        ("30", 1): ("FAILED", "3:0", "n[1-2]"),
        ("30", 2): ("FAILED", "0:9", "n2"),
        ("30", 3): ("CANCELLED", "0:0", ""),
        ("31", 0): ("FAILED", "3:0", "n2"),
    }
    (program / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert slurm.remembered(names) == {}


def test_the_cluster_is_described_in_every_version(version: str) -> None:
    inf = float("inf")
    assert slurm.partitions() == {"batch": 1440.0, "": 1440.0, "secret": 120.0, "long": inf}
    assert slurm.time_limit_min("secret,batch") == 1440.0
    assert slurm.max_array_size() == 4001
    booted = time.strptime("2026-11-02 08:15", "%Y-%m-%d %H:%M")
    assert slurm.boot_time() == time.mktime(booted)


def test_the_job_id_is_read_in_every_version(version: str, program: Path, tmp_path: Path) -> None:
    assert submit(tmp_path) == "30"
    shutil.copy(program / version / "sbatch-clusters.txt", program / version / "sbatch.txt")
    assert submit(tmp_path) == "30"


REFUSALS = {
    "queue-is-full": slurm.OverLimitError,
    "too-long": slurm.RefusedError,
    "no-such-time": slurm.RefusedError,
    "no-such-account": slurm.RefusedError,
    "no-such-node": slurm.RefusedError,
}


@pytest.mark.parametrize("name", sorted(path.stem for path in VERSIONS.glob("refusals/*")))
def test_refusals_are_told_apart(program: Path, tmp_path: Path, name: str) -> None:
    said = VERSIONS / "refusals" / f"{name}.txt"
    (program / "sbatch").write_text(f"#!/bin/sh\ncat {said} >&2\nexit 1\n")
    (program / "sbatch").chmod(0o755)
    install(program, "sinfo", out="idle\\n")
    with pytest.raises(REFUSALS[name]) as refused:
        submit(tmp_path)
    assert str(refused.value).count("Batch job submission failed: ") == 1
    assert "\n" not in str(refused.value)
    assert (slurm.check_script("") is None) == (REFUSALS[name] is slurm.OverLimitError)


@pytest.fixture
def stand_in(program: Path) -> Path:
    """Programs that queue every job and start none; srun runs its command in its own place.

    The file `queue` is what squeue prints.
    """
    (program / "queue").touch()
    for name, text in {
        "sbatch": f"""
            case "$*" in *--test-only*) exit;; esac
            for script; do :; done
            name=$(sed -n 's/^#SBATCH --job-name=//p' "$script")
            case "$script" in *.gate.sh) index=N/A;; *) index=0;; esac
            echo "$$|$$|$index|PENDING|Priority|$name" >> {program}/queue
            echo $$""",
        "squeue": f"cat {program}/queue",
        "sacct": "",
        "scontrol": "echo PartitionName=main Default=YES MaxTime=UNLIMITED",
        "srun": 'while [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"',
    }.items():
        (program / name).write_text(f"#!/bin/sh\n{text}\n")
        (program / name).chmod(0o755)
    return program


SWEEP = ("sweep", "pipeline=light:PIPELINE", "cluster=slurm", "name=light", "num_shards=2")


def test_the_scripts_of_a_project_in_a_folder_with_a_space_run(
    stand_in: Path, tmp_path: Path
) -> None:
    project = tmp_path / "my 'new' project"
    for name in ("kdhpc", "configs", "launch", "slurm"):
        shutil.copytree(ROOT / name, project / name)
    launch(*SWEEP, project=str(project))
    run = project / "runs" / "light"
    for script in ("0001.sh", "0001.gate.sh"):
        assert not (run / "submissions" / "0002.sh").exists()
        subprocess.run(
            ["bash", str(run / "submissions" / script)],
            check=True,
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": f"{ROOT}/tests",
                "SLURM_ARRAY_TASK_ID": "0",
            },
        )
        (stand_in / "queue").write_text("")
    assert [stage["done"] for stage in status(run)["stages"]] == [2, 0, 0]
    assert (run / "submissions" / "0002.sh").exists(), "the gate submits the next stage"


def test_status_stays_while_only_a_gate_is_queued(stand_in: Path, tmp_path: Path) -> None:
    launch(*SWEEP, f"runs_dir={tmp_path}")
    [gate] = [line for line in (stand_in / "queue").read_text().split() if "|gate-" in line]
    calls = stand_in / "calls"
    (stand_in / "squeue").write_text(
        f"#!/bin/sh\necho >> {calls}\n[ $(wc -l < {calls}) -gt 2 ] || echo '{gate}'\n"
    )
    launch("status", f"{tmp_path}/light", "--watch", code=1)
    assert calls.read_text() == "\n" * 3
