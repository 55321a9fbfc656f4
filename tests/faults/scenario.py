"""The checks that every scenario must pass, and its row in the table of docs/reliability.md."""

import collections
import json
import os
import re
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from commands import LIGHT_RESULTS, ROOT, launch, status
from light import PIPELINE
from real_slurm import DEVCLUSTER, jobs_of, log_of, sweep_light, trouble, wait_for, wait_for_end

from kdhpc.cluster.ledger import Ledger
from kdhpc.pipeline import LANGUAGE
from kdhpc.storage.results import logical_digest

_digests: dict[tuple[str, ...], str] = {}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of a scenario that was played to its end."""

    number: int
    scenario: str
    injected: str
    recover_s: float
    """Seconds from the fault to the end of the run, including the waiting of the fault itself."""
    rerun: int
    """Starts of shards beyond the first start of each."""
    lost: int
    """Planned shards without a published result."""
    duplicated: int
    """Publications of shards beyond the first of each."""


def undisturbed(*words: str) -> str:
    """Return the logical digest of the merged file of an undisturbed light run, made locally."""
    if words not in _digests:
        folder = Path(os.environ["FAULTS_DIR"]) / f"undisturbed-{len(_digests)}"
        where = [f"runs_dir={folder}", "name=light", "cluster=local"]
        launch("sweep", "pipeline=light:PIPELINE", *where, *words)
        _digests[words] = logical_digest(folder / "light" / LIGHT_RESULTS)
    return _digests[words]


class Scenario:
    """A run of the light pipeline on the cluster, what is done to it, and what must then be true.

    The trace of starts is on the local disk and exists only in tests.
    """

    def __init__(self, number: int, title: str, folder: Path, cluster: Path) -> None:
        self.number, self.title, self.folder, self.cluster = number, title, folder, cluster
        self.run = folder / "light"
        self.words: tuple[str, ...] = ()
        self.injected: list[str] = []
        self.rows: list[Row] = []
        self.touched_daemons = False
        self.jobs_forgotten = False
        self.on_disk: tuple[str, ...] = ()

    # What the user types.

    def sweep(
        self,
        *words: str,
        code: int | None = 0,
        project: str = str(ROOT),
        **environment: str,
    ) -> Path:
        self.words = tuple(w for w in words if w.startswith(("num_shards", "width")))
        packed = [] if any("task_min" in word for word in words) else ["slurm.task_min=0.04"]
        return sweep_light(
            self.folder, *packed, *self.on_disk, *words, code=code, project=project, **environment
        )

    def use_disk(self, path: Path) -> None:
        """Put the run on another disk, but not its troubles and its trace."""
        self.run, self.on_disk = path / "light", (f"runs_dir={path}",)

    def rerun(self, *words: str) -> None:
        launch("rerun", str(self.run), *words)

    def sweep_until_hung(self, key: str, *, trouble: str = "hang") -> Path:
        """Sweep, a shard in each task, until this shard hangs; return the file that holds it."""
        stage, _, name = key.split("/")
        stuck = self.trouble(f"{stage}-{name}", trouble)
        self.sweep("slurm.task_min=0.01")
        wait_for(lambda: key in self.starts(), "the shard to start")
        return stuck

    # What happens to the run.

    def trouble(self, shard: str, what: str) -> Path:
        return trouble(self.folder, shard, what)

    def taken(self, shard: str) -> Path:
        """Wait until a shard has met its trouble; return the file of the trouble."""
        path = self.folder / "trouble" / f"{shard}.taken"
        wait_for(path.exists, f"{shard} to meet its trouble")
        return path

    def inject(self, what: str) -> None:
        """Note the fault that is injected now; the clock starts at the first one."""
        if not self.injected:
            self.started = time.monotonic()
        self.injected.append(what)

    def seconds(self) -> float:
        """Return the seconds since the fault."""
        return round(time.monotonic() - self.started, 1)

    def daemon(self, name: str, signal: str) -> None:
        self.touched_daemons = True
        subprocess.run(
            [DEVCLUSTER, "kill", str(self.cluster), name, "--signal", signal], check=True
        )

    def daemon_pid(self, name: str) -> int:
        return int((self.cluster / "pid" / name).read_text().split()[0])

    def wait_until_saved(self, key: str) -> None:
        """Wait until the controller has saved its state, which it does every few seconds."""
        words = ["scontrol", "update", f"JobId={self.element(key)}", f"Comment=saved-{key}"]
        subprocess.run(words, check=True)
        path = self.cluster / "state" / "job_state"
        wait_for(lambda: f"saved-{key}".encode() in path.read_bytes(), "the controller to save")

    def start_daemon(self, name: str) -> None:
        subprocess.run([DEVCLUSTER, "start", str(self.cluster), name], check=True)

    # Where a shard is.

    def place(self, key: str) -> tuple[str, int]:
        """Return job id and array index of the newest submission of a shard."""
        for number, job in reversed(list(enumerate(jobs_of(self.run), 1))):
            for index, task in enumerate(self.submission(number)["tasks"]):
                if key in task and job["job_id"]:
                    return job["job_id"], index
        raise AssertionError(f"{key} was never submitted")

    def submission(self, number: int) -> dict[str, Any]:
        path = self.run / "submissions" / f"{number:04d}.json"
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    def job_ids(self) -> list[str]:
        return [i for job in jobs_of(self.run) for i in (job["job_id"], job["gate_id"]) if i]

    def known_to_slurm(self, job_ids: list[str]) -> bool:
        """Return whether the controller still knows any of these jobs."""
        command = ["scontrol", "--oneliner", "show", "jobs"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return any(f"JobId={i} " in shown or f"ArrayJobId={i} " in shown for i in job_ids)

    def element(self, key: str) -> str:
        job_id, index = self.place(key)
        return f"{job_id}_{index}"

    def node(self, key: str) -> str:
        command = ["squeue", "--noheader", "--format=%N", "--jobs", self.element(key)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def starts(self) -> collections.Counter[str]:
        """Return, for each shard, how many attempts began to work on it."""
        trace = self.folder / "trace"
        lines = trace.read_text().splitlines() if trace.exists() else []
        return collections.Counter(line.split()[0] for line in lines)

    def pid(self, key: str) -> int:
        """Return the process id of the newest attempt of a shard."""
        lines = (self.folder / "trace").read_text().splitlines()
        return int(next(line.split()[2] for line in reversed(lines) if line.split()[0] == key))

    def reruns(self) -> int:
        return sum(number - 1 for number in self.starts().values())

    def record(self, key: str) -> Path:
        stage, arm, name = key.split("/")
        pipeline = LANGUAGE if self.run.name == "tiny" else PIPELINE
        return self.run / pipeline.folders[stage] / arm / f"{name}.json"

    def failure_kinds(self) -> dict[str, list[str]]:
        """Return, for each shard, the classes of its failures, oldest first."""
        kinds: dict[str, list[str]] = {}
        for failure in Ledger(self.run).failures():
            kinds.setdefault(failure.key, []).append(failure.kind)
        return kinds

    def log(self, number: int, task: int) -> str:
        return log_of(self.run, number, task)

    def logs(self) -> str:
        """Return all logs, for the message of a test that fails."""
        paths = sorted(self.run.glob("logs/*/*.log"))
        return "".join(f"{path.relative_to(self.run)}\n{path.read_text()}" for path in paths)

    def wait(self) -> None:
        wait_for_end(self.run)

    # What must be true.

    def assert_named(self, kind: str, *keys: str) -> None:
        """Check that status.py exits with 1 and names the class, these shards and a remedy."""
        causes = status(self.run, code=1)["causes"]
        assert kind in {cause["kind"] for cause in causes}, causes
        named = {key for cause in causes if cause["kind"] == kind for key in cause["shards"]}
        assert named == set(keys), causes
        shown = launch("status", str(self.run), code=1).stdout
        assert kind in shown
        assert "what to do: " in shown
        for key in keys:
            answer = launch("status", str(self.run), "--explain", key, code=1).stdout
            assert kind in answer, answer
            assert "what to do: " in answer, answer

    def assert_whole(self, *, reruns: int, least: int | None = None) -> None:
        """Check that the run is complete and equals an undisturbed one, and that little was rerun.

        Args:
            reruns: the largest allowed number of starts beyond the first of each shard.
            least: the smallest allowed number, which shows that the fault had an effect; equals
                `reruns` if it is not given.
        """
        recover_s = self.seconds()
        launch("status", str(self.run), code=0)
        assert logical_digest(self.run / LIGHT_RESULTS) == undisturbed(*self.words)
        assert "0 damaged" in launch("verify", str(self.run), code=0).stdout
        planned = self.starts().keys()
        lost = [key for key in planned if not self.record(key).exists()]
        duplicated = published_again(self.run)
        assert (lost, duplicated) == ([], [])
        num_reruns = self.reruns()
        assert (reruns if least is None else least) <= num_reruns <= reruns, self.starts()
        row = Row(
            number=self.number,
            scenario=self.title,
            injected="; ".join(self.injected),
            recover_s=recover_s,
            rerun=num_reruns,
            lost=len(lost),
            duplicated=len(duplicated),
        )
        print(asdict(row))
        self.rows.append(row)


def published_again(run: Path) -> list[str]:
    """Return the shards that, by the logs, were published again without having been damaged."""
    publications = collections.Counter(
        match[1]
        for path in run.glob("logs/*/[0-9]*.log")
        for match in re.finditer(
            r"^(\S+): published", path.read_text(errors="replace"), re.MULTILINE
        )
    )
    for path in run.glob("[0-9]-*/*/*.json.damaged-*"):  # meant to be made again
        stage, arm, name = str(path.relative_to(run)).split("/")
        publications[f"{stage.partition('-')[2]}/{arm}/{name.partition('.')[0]}"] -= 1
    return [key for key, number in publications.items() if number > 1]


def sum_of(number: int, title: str, injected: str, rows: list[Row]) -> Row:
    """Return one row for several runs that were played together."""
    return Row(
        number=number,
        scenario=title,
        injected=injected,
        recover_s=max(row.recover_s for row in rows),
        rerun=sum(row.rerun for row in rows),
        lost=sum(row.lost for row in rows),
        duplicated=sum(row.duplicated for row in rows),
    )


HEAD = [
    "| # | scenario | injected | seconds to recover | shards rerun | lost | duplicated |",
    "|--:|---|---|--:|--:|--:|--:|",
]


def write_table(rows: list[Row], path: Path) -> None:
    """Write all rows as a Markdown table; with UPDATE_DOCS=1 also into docs/reliability.md."""
    ordered = sorted(rows, key=lambda row: (row.number, row.scenario))
    lines = [f"| {' | '.join(str(value) for value in asdict(row).values())} |" for row in ordered]
    text = "\n".join([*HEAD, *lines]) + "\n"
    print(f"\n{text}")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    if os.environ.get("UPDATE_DOCS"):
        docs = ROOT / "docs" / "reliability.md"
        before, begin, rest = docs.read_text().partition("<!-- scenarios -->\n")
        _, end, after = rest.partition("<!-- end of scenarios -->\n")
        docs.write_text(f"{before}{begin}{text}{end}{after}")
