"""Faults of a training on two nodes."""

import json
import os
import shutil
from pathlib import Path

import pytest
from commands import ROOT, launch, status

from faults.scenario import Row, Scenario, published_again
from kdhpc.cluster.ledger import Ledger
from kdhpc.storage.results import logical_digest

RESULTS = "8-merge/results.h5"
WORDS = [
    "tiny",
    "teacher.training.nodes=2",
    "teacher.training.micro_batch_sequences=16",
    "teacher.training.checkpoint_every_steps=2",
]
KEY = "train-on-truth/teacher-s0/00000"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the same run, undisturbed, in local processes."""
    runs_dir = tmp_path_factory.mktemp("whole")
    launch("sweep", *WORDS, "cluster=local", "local_workers=2", f"runs_dir={runs_dir}")
    return runs_dir / "tiny"


def without_teacher(whole: Path, run: Path) -> None:
    """Copy a run without everything that comes from the teacher."""
    shutil.copytree(whole, run)
    for folder in ("requests", "submissions", "failures", "logs"):
        shutil.rmtree(run / folder)
        (run / folder).mkdir()
    for path in (run / "3-train-on-truth/teacher-s0", *run.glob("[4-8]-*")):
        shutil.rmtree(path)


@pytest.mark.scenario(15)
def test_a_training_that_loses_ranks_and_half_a_checkpoint_ends_the_same(
    scenario: Scenario, whole: Path
) -> None:
    scenario.run = scenario.folder / "tiny"
    without_teacher(whole, scenario.run)
    rules = []
    for event, pattern, action in (
        ("os.link", "*/teacher-s0/*/000000004.json", "kill-rank-1"),
        ("open", "*/teacher-s0/*/000000008.*.safetensors", "halve"),
        ("os.link", "*/teacher-s0/*/000000010.json", "told-to-stop"),
    ):
        flag = scenario.folder / action
        flag.touch()
        rules.append([event, pattern, action, str(flag)])
    scenario.inject(
        "one of two ranks killed; rank 0 killed in the middle of a checkpoint; told to stop by USR2"
    )
    launch(
        "sweep", *WORDS, "cluster=slurm", "slurm.mem_gb=1.2", "slurm.gate.mem_gb=0.2",
        f"runs_dir={scenario.folder}",
        KDHPC_INJECT=json.dumps(rules),
        PYTHONPATH=f"{ROOT}/tests/faults/injected:{os.environ.get('PYTHONPATH', '')}",
    )  # fmt: skip
    scenario.wait()
    recover_s = scenario.seconds()
    assert len(list(scenario.folder.glob("*.taken"))) == 3
    assert status(scenario.run, code=0)["complete"]
    assert scenario.failure_kinds() == {KEY: ["LOST", "LOST", "STOPPED"]}
    record = json.loads(scenario.record(KEY).read_text())
    assert record["stats"]["resumed_from_step"] >= 10
    assert logical_digest(scenario.run / RESULTS) == logical_digest(whole / RESULTS)
    starts = [key for s in Ledger(scenario.run).submissions() for key in s.keys]
    rerun, duplicated = len(starts) - len(set(starts)), published_again(scenario.run)
    assert (rerun, duplicated) == (3, [])
    scenario.rows.append(
        Row(
            number=15,
            scenario=scenario.title,
            injected="; ".join(scenario.injected),
            recover_s=recover_s,
            rerun=rerun,
            lost=0,
            duplicated=len(duplicated),
        )
    )
