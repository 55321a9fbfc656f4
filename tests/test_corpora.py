"""A corpus is read whole, or refused with the file, the line and what is wrong."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
from commands import launch

from kdhpc.cluster.ledger import Ledger
from kdhpc.errors import InputError
from kdhpc.storage.corpora import BYTE_ORDER_MARK, corpus_fingerprint, read_corpus

GOOD = [{"text": f"The row {n} of a corpus. " * 4} for n in range(300)]


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


MESSAGES = {"text": [{"role": "user", "content": "Hello"}]}
CASES: dict[str, tuple[str, bytes, str]] = {
    "a cut line": ("cut.jsonl", lines(*GOOD)[:-40], "line 300 is not JSON, or is cut short"),
    "a Latin-1 byte in JSONL": (
        "a.jsonl",
        lines(*GOOD).replace(b"row 7 ", b"row \xe9 "),
        "line 8 is not UTF-8 (byte 0xe9 at column",
    ),
    "Latin-1 in the first line": (
        "a.jsonl",
        lines(*GOOD).replace(b"row 0 ", b"row \xe9 "),
        "line 1 is not UTF-8",
    ),
    "a Latin-1 text": ("a.txt", "Gut.\nF\u00fcr alle.\n".encode("latin-1"), "line 2 is not UTF-8"),
    "nulls": ("a.jsonl", lines(*[{"text": None}] * 300), "none of its 300 rows has text"),
    "empty texts": ("a.jsonl", lines(*[{"text": ""}] * 7), "none of its 7 rows has text"),
    "blanks": ("a.txt", b" \n\n \t \n" * 99, "has text in the column text; expected documents"),
    "empty lines": ("a.jsonl", b"\n\n\n", "a.jsonl: has no rows; expected documents"),
    "messages": ("a.jsonl", lines(*[MESSAGES] * 3), "holds lists of role and content there"),
    "numbers": ("a.jsonl", lines(*[{"text": 5}] * 3), "holds numbers there"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_corpus_that_cannot_be_used_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    name, content, message = CASES[case]
    path = tmp_path / name
    path.write_bytes(content)
    corpus_fingerprint(str(path))
    with pytest.raises(InputError) as refused:
        read_corpus(str(path), "text")
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), path)
    with pytest.raises(InputError, match=r"a\.parquet: has no rows; expected documents"):
        read_corpus(str(path), "text")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", BYTE_ORDER_MARK])
def test_how_an_editor_saves_a_text_changes_nothing(mark: str, end: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes((mark + end.join(["one", "more", "", "two"])).encode())
    assert read_corpus(str(path), "text") == ["one\nmore", "two"]


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "one"}, {"text": None}, {"text": ""}, {"text": "two"}))
    assert read_corpus(str(path), "text") == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines(*GOOD[:3]), "rows of 24 tokens; expected at least truth.training.batch_sequences="),
        (lines(*GOOD)[:-40], "line 300 is not JSON"),
    ],
)
def test_a_run_with_such_a_corpus_stops_at_once_and_is_not_retried(
    content: bytes, message: str, tmp_path: Path
) -> None:
    corpus = tmp_path / "a.jsonl"
    corpus.write_bytes(content)
    words = ["tiny", "cluster=local", f"runs_dir={tmp_path}", f"truth.corpus={corpus}"]
    shown = launch("sweep", *words, code=1).stdout
    assert message in " ".join(shown.split())
    [failure] = Ledger(tmp_path / "tiny").failures()
    assert failure.kind == "REFUSED"
