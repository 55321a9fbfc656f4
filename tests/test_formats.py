"""Files hold what was written, can be opened without kdhpc, and are refused when damaged."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import h5py
import numpy as np
import pyarrow as pa
import pytest

from kdhpc.errors import DamagedError
from kdhpc.storage.corpora import read_corpus
from kdhpc.storage.files import Digest, digest_of
from kdhpc.storage.hdf5 import read_pieces
from kdhpc.storage.results import ScorePieces, logical_digest, read_results, write_results
from kdhpc.storage.score_shards import Scores, read_scores, write_scores
from kdhpc.storage.token_shards import (
    ROW_COLUMNS,
    Samples,
    id_type,
    map_token_rows,
    read_samples,
    write_samples,
)


def samples(num_rows: int = 7, width: int = 5) -> Samples:
    generator = np.random.default_rng(0)
    return Samples(
        ids=generator.integers(0, 65536, (num_rows, width)).astype(np.uint16),
        length=generator.integers(1, width + 1, num_rows).astype(np.int32),
        log_prob_sum=generator.normal(size=num_rows),
        log_prob_tau_sum=generator.normal(size=num_rows),
    )


def scores(num_rows: int = 7, per_token: bool = True) -> Scores:
    generator = np.random.default_rng(1)
    return Scores(
        log_prob_sum=generator.normal(size=num_rows),
        num_tokens=generator.integers(1, 9, num_rows).astype(np.int32),
        token_log_prob=generator.normal(size=(num_rows, 5)).astype(np.float32)
        if per_token
        else None,
    )


def test_token_shards_open_in_datasets_alone(tmp_path: Path) -> None:
    written = samples()
    write_samples(tmp_path / "00000.arrow", written, {"k": "v"})
    dataset = datasets.load_dataset(
        "arrow", data_files=f"{tmp_path}/*.arrow", split="train", cache_dir=f"{tmp_path}/cache"
    )
    assert np.array_equal(np.array(dataset["ids"]), written.ids)
    assert np.array_equal(dataset["length"], written.length)


def test_ids_of_a_large_vocabulary_are_kept_whole(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 2**18, (7, 5)).astype(np.uint32)
    for name in ("a", "b"):
        write_samples(tmp_path / f"{name}.arrow", replace(samples(), ids=ids), {})
    paths = [tmp_path / "a.arrow", tmp_path / "b.arrow"]
    assert np.array_equal(read_samples(paths).ids, np.concatenate([ids, ids]))
    rows = map_token_rows(paths)[np.array([8, 0])]
    assert rows.dtype == np.uint32
    assert np.array_equal(rows, ids[[1, 0]])
    with pa.memory_map(str(paths[0])) as source:
        assert pa.ipc.open_stream(source).schema.field("ids").type.value_type == pa.uint32()


@pytest.mark.parametrize(
    ("size", "kind"), [(257, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_ids_have_the_smallest_type_that_holds_the_vocabulary(size: int, kind: type) -> None:
    assert id_type(size) is kind
    assert np.iinfo(kind).max >= size - 1


def test_shards_are_joined_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / "a.arrow", tmp_path / "b.arrow"]
    for path, rows in zip(paths, (3, 4), strict=True):
        write_samples(path, samples(rows), {})
    assert np.array_equal(read_samples(paths).ids[3:], samples(4).ids)


def test_a_token_shard_is_mapped_not_copied(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.arrow", samples(1000), {})
    before = pa.total_allocated_bytes()
    ids = read_samples([tmp_path / "a.arrow"]).ids
    assert pa.total_allocated_bytes() - before < ids.nbytes
    assert not ids.flags.owndata
    assert not ids.flags.writeable


@pytest.mark.parametrize("ids", [[1, 2], ["a", "b"], [[1], [2]], [[1], [None]]])
def test_a_file_without_rows_of_ids_is_refused_by_name(tmp_path: Path, ids: list[Any]) -> None:
    path = tmp_path / "a.arrow"
    rows = {n: np.ones(2, dtype) for n, dtype in ROW_COLUMNS.items()}
    table = pa.table({"ids": ids, **rows})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DamagedError, match=r"a\.arrow: not a token shard"):
        read_samples([path])


def test_reading_a_token_shard_loads_no_pandas(tmp_path: Path) -> None:
    """Importing pandas would take half a second of every task that reads a token shard."""
    write_samples(tmp_path / "a.arrow", samples(), {})
    program = (
        "import sys; from pathlib import Path; from kdhpc.storage.token_shards import read_samples;"
        "read_samples([Path(sys.argv[1])]);"
        "print({'pandas', 'pyarrow.compute'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.arrow")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


@pytest.mark.parametrize("name", ["a.arrow", "a.h5"])
@pytest.mark.parametrize("keep", [0, 10, 100])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, name: str, keep: int) -> None:
    path = tmp_path / name
    if name.endswith("arrow"):
        write_samples(path, samples(), {})
    else:
        write_scores(path, {1.0: scores()})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedError, match=name):
        read_samples([path]) if name.endswith("arrow") else read_scores(path)


def whole(sampler: str, scorer: str, values: Scores, cuts: Sequence[int] = ()) -> ScorePieces:
    """Return scores in one piece, or cut before the rows `cuts`."""
    arrays = {name: array for name, array in vars(values).items() if array is not None}
    pieces = [
        (name, piece) for name, array in arrays.items() for piece in np.split(array, list(cuts))
    ]
    return ScorePieces(
        sampler=sampler, scorer=scorer, num_rows=len(values.num_tokens), pieces=pieces
    )


def results(
    path: Path, *, provenance: str = "here", last: float = 1.0, complete: bool = True
) -> str:
    return write_results(
        path,
        scores=[
            whole("truth", "student", scores()),
            whole("student", "truth", scores(per_token=False)),
        ],
        models={"student": {"kind": "student", "tau": last, "steps": 3}},
        recipe="r",
        complete=complete,
        provenance={"hosts": provenance},
    ).logical_digest


def test_merged_results_read_back(tmp_path: Path) -> None:
    digest = results(tmp_path / "results.h5")
    merged = read_results(tmp_path / "results.h5")
    assert np.array_equal(merged.scores["truth", "student"].log_prob_sum, scores().log_prob_sum)
    assert merged.models["student"] == {"kind": "student", "tau": 1.0, "steps": 3}
    assert (merged.recipe, merged.complete, merged.provenance["hosts"]) == ("r", True, "here")
    assert logical_digest(tmp_path / "results.h5") == digest


def test_the_logical_digest_ignores_provenance_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results.h5"
    first = results(path)
    assert results(path, provenance="elsewhere") == first
    assert results(path, last=0.9) != first
    assert results(path, complete=False) != first


@pytest.mark.parametrize("num_parts", [2, 7])
def test_the_logical_digest_does_not_know_of_shards(tmp_path: Path, num_parts: int) -> None:
    cuts = np.linspace(0, 7, num_parts + 1).astype(int)[1:-1].tolist()
    parts = {"one": whole("truth", "student", scores())}
    parts["cut"] = whole("truth", "student", scores(), cuts)
    one, cut = (
        write_results(tmp_path / f"{name}.h5", scores=[part], recipe="r", provenance={})
        for name, part in parts.items()
    )
    assert one == cut
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "cut.h5").read_bytes()
    assert cut.digest == digest_of(tmp_path / "cut.h5")


def test_fewer_rows_than_planned_are_refused(tmp_path: Path) -> None:
    part = whole("truth", "student", scores())
    with pytest.raises(ValueError, match="num_tokens"):
        write_results(
            tmp_path / "results.h5",
            scores=[replace(part, pieces=[("num_tokens", scores().num_tokens[:-1])])],
            recipe="r",
            provenance={},
        )


def test_merged_arrays_are_contiguous_aligned_and_can_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "results.h5"
    results(path)
    with h5py.File(path) as file:
        for name in ("log_prob_sum", "num_tokens", "token_log_prob"):
            dataset = file["scores/truth/student"][name]
            offset = dataset.id.get_offset()
            assert dataset.chunks is None
            assert offset % dataset.dtype.itemsize == 0
            mapped = np.memmap(path, dataset.dtype, "r", offset, dataset.shape)
            assert np.array_equal(mapped, getattr(scores(), name))
    log_probs = read_results(path).scores["truth", "student"].token_log_prob
    assert log_probs is not None
    assert not log_probs.flags.owndata
    assert not log_probs.flags.writeable
    assert log_probs.flags.aligned


PEAK = """
import sys
from pathlib import Path
import numpy as np
from kdhpc.storage.token_shards import ROW_COLUMNS, Samples, read_samples, write_samples
from kdhpc.storage.results import ScorePieces, logical_digest, read_results, write_results
from kdhpc.storage.score_shards import Scores, read_scores, write_scores
from kdhpc.storage.corpora import read_corpus
from kdhpc.storage.hdf5 import read_pieces
from kdhpc.storage.files import Digest

def peak():
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) * 1024

folder, num_shards = Path(sys.argv[1]), int(sys.argv[2])
def merge(name, num_shards):
    pieces = (
        piece for _ in range(num_shards) for piece in read_pieces(folder / "a.h5", Digest())
    )
    part = ScorePieces(
        sampler="truth", scorer="student", num_rows=num_shards * 4096, pieces=pieces
    )
    path = folder / f"{name}.h5"
    write_results(path, scores=[part], recipe="r", provenance={})
    return logical_digest(path)

merge("small", 1)
before = peak()
merge("large", num_shards)
print(peak() - before)
"""


def test_the_merge_holds_a_piece_at_a_time(tmp_path: Path) -> None:
    """A file of 256 MB is merged and read back within 8 MB of memory."""
    shard = Scores(
        log_prob_sum=np.zeros(4096),
        num_tokens=np.zeros(4096, np.int32),
        token_log_prob=np.ones((4096, 512), np.float32),
    )
    write_scores(tmp_path / "a.h5", {1.0: shard})
    command = [sys.executable, "-c", PEAK, str(tmp_path), "32"]
    peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (tmp_path / "large.h5").stat().st_size > 256e6
    assert int(peak) < 8e6


@pytest.mark.parametrize("offset", [0, 3000, -1])
def test_pieces_name_a_file_that_is_cut_off(tmp_path: Path, offset: int) -> None:
    write_scores(tmp_path / "a.h5", {1.0: scores()})
    raw = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(raw[:offset])
    with pytest.raises(DamagedError, match=r"a\.h5"):
        list(read_pieces(tmp_path / "a.h5", Digest()))


def test_pieces_feed_every_byte_to_the_digest(tmp_path: Path) -> None:
    path, whole_file = tmp_path / "a.h5", Digest()
    write_scores(path, {1.0: scores()})
    parts: dict[str, list[Any]] = {}
    for name, piece in read_pieces(path, whole_file):
        parts.setdefault(name, []).append(piece.copy())
    assert whole_file.hexdigest() == digest_of(path)
    assert parts.keys() == scores().arrays().keys()
    for name, array in scores().arrays().items():
        assert np.array_equal(np.concatenate(parts[name]), array)


def test_a_flipped_bit_in_merged_scores_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "results.h5"
    results(path)
    raw = bytearray(path.read_bytes())
    where = raw.find(scores().log_prob_sum.tobytes())
    raw[where + 3] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(DamagedError, match=r"results\.h5"):
        read_results(path)


def test_a_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    assert [t.strip() for t in read_corpus(str(tmp_path / "a.txt"), "text")] == [
        "one\ntwo",
        "three",
    ]
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')
    assert read_corpus(str(tmp_path / "a.jsonl"), "body") == ["x", "y"]
