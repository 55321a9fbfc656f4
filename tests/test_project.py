"""The project keeps its promises: tables, goldens, planning without heavy imports."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kdhpc.cluster import runs
from kdhpc.cluster.batch_script import batch_script
from kdhpc.cluster.decide import Batch
from kdhpc.cluster.resources import array_resources, gate_resources
from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.pipeline import LANGUAGE, MIXTURE

ROOT = Path(__file__).parents[1]
GOLDENS = Path(__file__).parent / "goldens"
HEAVY = {
    "torch", "transformers", "deepspeed", "datasets", "h5py", "pyarrow", "scipy", "sklearn",
    "matplotlib", "numpy", "submitit",
}  # fmt: skip
PRESETS = {
    "tiny": ["tiny"],
    "tiny-families": ["tiny", "families"],
    "demo": ["demo"],
    "mini": ["mini"],
    "mini-gguf": ["mini", "smollm2_gguf"],
    "paper": ["paper"],
    "mixture": ["mixture"],
    "mixture_wide": ["mixture_wide"],
}


def golden(name: str, text: str) -> None:
    """Compare a text with a golden file; with `UPDATE_GOLDENS=1` the file is written first."""
    import os

    path = GOLDENS / name
    if os.environ.get("UPDATE_GOLDENS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{name} changed; if on purpose: UPDATE_GOLDENS=1 make test"


def config_of(words: list[str]) -> LanguageConfig:
    return LANGUAGE.checked(presets.build(LanguageConfig, presets.compose(words)))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_compose_to_their_goldens(name: str) -> None:
    _, config = runs.from_words(PRESETS[name])
    golden(f"{name}.yaml", presets.to_yaml(config))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_plan_to_their_goldens(name: str) -> None:
    pipeline, config = runs.from_words(PRESETS[name])
    plan = pipeline.plan(config)
    lines = [
        f"{stage.name}/{arm}: {len(shards)} shards, reads {len(shards[0].reads)}"
        for stage in pipeline.stages
        for arm, shards in plan.arms(stage.name).items()
    ]
    golden(f"{name}.plan.txt", "\n".join(lines) + "\n")


def test_the_batch_script_is_the_golden_one() -> None:
    config = config_of(
        ["paper", "slurm.account=me", "slurm.setup=[module load cuda]", "slurm.scratch=/local/x y"]
    )
    batch = Batch(stage="score", tasks=(("a",), ("b",)), nodes=2, ranks_per_node=4)
    text = batch_script(
        name="score.paper.3f9a-0007",
        command="bash environment.sh code python -m kdhpc.cluster.task run 7",
        num_tasks=2,
        resources=array_resources(config, batch, uses_device=True),
    )
    golden("score.sbatch", text)


SITES = [name for name in presets.cluster_names() if name.startswith("sites/")]
TRAININGS = {"sites/lumi": (1, 8), "sites/vista": (8, 1)}
"""Nodes and ranks on each for a training, where the preset's two nodes of four do not fit."""


@pytest.mark.parametrize("name", SITES)
def test_the_batch_scripts_of_a_site_are_the_golden_ones(name: str) -> None:
    _, config = runs.from_words(["paper", f"cluster={name}", "slurm.account=my_account"])
    nodes, ranks_per_node = TRAININGS.get(name, (2, 4))
    batches = {
        ".score": Batch(
            stage="score",
            tasks=(("a",), ("b",)),
            nodes=1,
            ranks_per_node=1,
            pack=config.slurm.pack,
        ),
        ".train": Batch(
            stage="train-on-truth",
            tasks=(("c",),),
            nodes=nodes,
            ranks_per_node=ranks_per_node,
        ),
    }
    for part, batch in batches.items():
        text = batch_script(
            name=f"{batch.stage}.paper.3f9a-0007",
            command="bash environment.sh code python -m kdhpc.cluster.task run 7",
            num_tasks=len(batch.tasks),
            resources=array_resources(config, batch, uses_device=True),
        )
        golden(f"{name}{part}.sbatch", text)
    gate = batch_script(
        name="gate-score.paper.3f9a-0007",
        command="bash environment.sh code python -m kdhpc.cluster.gate run",
        num_tasks=None,
        resources=gate_resources(config.slurm, {}),
    )
    golden(f"{name}.gate.sbatch", gate)


def test_no_site_comes_with_an_account() -> None:
    assert len(SITES) >= 10
    for name in SITES:
        assert runs.from_words(["paper", f"cluster={name}"])[1].slurm.account is None


def test_a_warning_that_comes_before_python_listens_kills_no_task() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2); print('goes on')"
    start = ["bash", str(ROOT / "slurm" / "environment.sh"), str(ROOT), sys.executable, "-c", code]
    finished = subprocess.run(start, capture_output=True, text=True, check=True)
    assert finished.stdout == "goes on\n"


def test_composed_configs_survive_json() -> None:
    config = config_of(["paper"])
    assert presets.build(LanguageConfig, json.loads(json.dumps(presets.plain(config)))) == config


def test_later_presets_and_overrides_win() -> None:
    config = config_of(["tiny", "demo", "length=32", "taus=[0.5]"])
    assert (config.name, config.length, config.taus) == ("demo", 32, (0.5,))


@pytest.mark.parametrize(
    "statement",
    [
        "import sys; sys.argv = ['sweep.py', 'paper', '--dry-run', 'cluster=local']; "
        "sys.path.insert(0, 'launch'); import sweep; sweep.main(sys.argv[1:])",
        "import sys; sys.argv = ['sweep.py', 'mixture', '--dry-run', 'cluster=local']; "
        "sys.path.insert(0, 'launch'); import sweep; sweep.main(sys.argv[1:])",
        "import sys; sys.path.insert(0, 'launch'); import status, rerun, cancel, clean, "
        "verify, runs",
        "import kdhpc.cluster.gate, kdhpc.cluster.task, kdhpc.pipeline",
        "import kdhpc.__main__; kdhpc.__main__.main([])",
    ],
)
def test_planning_and_status_load_nothing_heavy(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint('LOADED', *sorted(sys.modules))"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(finished.stdout.rpartition("LOADED")[2].split())
    assert not loaded & HEAVY


def test_the_readme_tables_are_the_pipelines() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(\d-[\w-]+)/` \| (.*) \| (.*) \|$", readme, re.MULTILINE)
    expected = [
        (pipeline.folders[stage.name], stage.reads, stage.writes)
        for pipeline in (LANGUAGE, MIXTURE)
        for stage in pipeline.stages
    ]
    assert rows == expected


def test_the_table_of_remedies_is_the_code() -> None:
    command = [sys.executable, "-m", "kdhpc.cluster.failures"]
    table = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    docs = (ROOT / "docs" / "reliability.md").read_text()
    assert f"<!-- remedies -->\n{table}<!-- end of remedies -->\n" in docs


def test_the_readme_installs_like_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    block = makefile.partition("$(VENV)/installed:")[2].partition("\n\n")[0]
    commands = [
        line.strip()
        .replace("$(PYTHON)", "python3")
        .replace("$(VENV)", ".venv")
        .replace("$(BIN)/pip", ".venv/bin/pip")
        for line in block.splitlines()
        if "pip install" in line or "venv $(VENV)" in line
    ]
    assert commands
    readme = (ROOT / "README.md").read_text()
    for command in commands:
        assert command.replace("$(BIN)", ".venv/bin") in readme, command


def test_every_field_of_the_config_is_explained() -> None:
    import ast

    trees = [ast.parse(path.read_text()) for path in (ROOT / "kdhpc" / "config").glob("*.py")]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(classes) > 9
    for node in classes:
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{node.name}.{ast.unparse(field.target)}"
                assert isinstance(after.value, ast.Constant)


def test_the_map_names_every_module() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = text.partition("kdhpc/\n")[2].partition("\nslurm/")[0]
    listed: list[str] = []
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        name = line.split()[0]
        folders = [*folders[:depth], name]
        if name.endswith(".py"):
            listed.append("".join(folders))
    there = {str(path.relative_to(ROOT / "kdhpc")) for path in (ROOT / "kdhpc").rglob("*.py")}
    stages = {path for path in there if path.startswith("experiment/stages/")}
    expected = {path for path in there - stages if not path.endswith("__init__.py")}
    assert sorted(listed) == sorted(expected)


def test_todos_carry_an_issue_number() -> None:
    for path in [*ROOT.glob("kdhpc/**/*.py"), *ROOT.glob("launch/*.py")]:
        for line in path.read_text().splitlines():
            if "TODO" in line:
                assert re.search(r"TODO\(#\d+\)", line), f"{path}: {line}"
