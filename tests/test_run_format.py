"""A run of each format, made by an earlier commit, is read, verified, extended and merged."""

import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import launch, status

from kdhpc.storage.files import digest_of, write_once
from kdhpc.storage.results import logical_digest, read_results

DATA = Path(__file__).parent / "data"
RUNS = {
    "format-1-language": (
        "8-merge",
        ["taus=[1.0,0.6,0.8]", "decode_temperatures=[0.7]"],
        {"student-s0-small-tau0.8"},
    ),
    "format-1-mixture": (
        "3-merge",
        ["betas=[1,10,100]", "decode_betas=[2]"],
        {"paper-beta10", "paper-direct-decode2", "paper-beta1-decode2"},
    ),
}
"""For each archive: the folder of its merge, what extends it, and the models that this adds."""
DIGESTS = {
    "format-1-language": "a30d7a624b047c1d559a0a8a8069cdb82a08f49bdd27a042f8cc36ae90ad8582",
    "format-1-mixture": "3e536ba561d92237e1a226bed993ecce96bc2fb214775a7ba45f0b3f62246b62",
}
"""Logical digests of the results, as printed by the commit that made the runs."""


def flat(config: Mapping[str, Any], key: str = "") -> Iterator[str]:
    """Yield a config as words of a command line: presets may change, these words may not."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{key}{name}.")
        else:
            yield f"{key}{name}={json.dumps(value)}"


@pytest.fixture(params=RUNS)
def unpacked(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """Return the name of an archive, and the folder of the run in it."""
    name: str = request.param
    with tarfile.open(DATA / f"{name}.tar.xz") as file:
        file.extractall(tmp_path, filter="data")
    run = tmp_path / name.rpartition("-")[2]
    run.chmod(0o700)
    return name, run


def test_a_run_of_an_earlier_commit_lives(unpacked: tuple[str, Path]) -> None:
    name, run = unpacked
    folder, wider, new = RUNS[name]
    before = {path: digest_of(path) for path in run.glob("[0-9]-*/*/*") if path.suffix == ".json"}
    old = read_results(run / folder / "results.h5")
    assert logical_digest(run / folder / "results.h5") == DIGESTS[name]
    assert status(run, code=0)["complete"]
    launch("verify", str(run))

    config = json.loads((run / "requests" / "0001.json").read_text())["config"]
    config["runs_dir"] = str(run.parent)
    if "truth" in config:
        config["truth"]["corpus"] = str(run.parent / "corpus.txt")
    launch("sweep", *flat(config), *wider)
    assert {path: digest_of(path) for path in before} == before
    extended = read_results(run / folder / "results.h5")
    assert extended.complete
    links = {path.name: path for path in run.glob("models/*")}
    assert links.keys() == ({*extended.models} if name.endswith("language") else set())
    assert all((link / "model.safetensors").is_file() for link in links.values())
    assert set(extended.models) - set(old.models) == new
    if "truth" in config:  # the new arms alone have what the format lacked
        direct = "student-s0-small-direct"
        for pair in ((f"{direct}-T0.7", "truth"), ("truth", f"{direct}-T0.7")):
            assert extended.scores[pair].end_log_prob is not None
    for pair, scores in old.scores.items():
        for array, values in vars(scores).items():
            same = getattr(extended.scores[pair], array)
            assert same is values if values is None else same.tobytes() == values.tobytes()
    for table, arrays in old.tables.items():
        assert all(np.array_equal(arrays[key], extended.tables[table][key]) for key in arrays)


def test_a_run_of_another_format_is_refused_in_one_line(tmp_path: Path) -> None:
    run = tmp_path / "old"
    run.mkdir(mode=0o700)
    assert write_once(run / "run.json", {"pipeline": "language", "identity": "0000"})
    refused = launch("status", str(run), code=2)
    assert refused.stderr.count("\n") == 1
    assert "this run has format 0" in refused.stderr
    assert "expected format 1" in refused.stderr
