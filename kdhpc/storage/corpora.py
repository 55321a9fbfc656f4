"""Read text corpora and compute their fingerprints."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import unicodedata
from pathlib import Path

from kdhpc import addition, docstrings
from kdhpc.errors import InputError

CORPUS_KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
BYTE_ORDER_MARK = "\ufeff"
"""First character of files that some programs write; it is no text."""


def read_corpus(source: str, text_column: str) -> list[str]:
    """Read the documents of a corpus.

    A text file is split at blank lines: the documents become short, so that a model sees many ends
    of documents.

    Args:
        source: a name of `BUILT_IN`, a local text, JSONL or Parquet file, or a hub id.
        text_column: name of the column that holds the text.

    Raises:
        InputError: if the corpus cannot be read, has no such column, or has no text in it. The
            message names the first bad line.
    """
    import datasets

    if source in BUILT_IN:
        return [part for text in BUILT_IN[source]() for part in _paragraphs(text)]
    path = Path(source)
    datasets.disable_progress_bars()
    try:
        if path.suffix in CORPUS_KINDS:
            dataset = datasets.load_dataset(
                CORPUS_KINDS[path.suffix],
                data_files=str(path),
                split="train",
                **({"sample_by": "paragraph"} if path.suffix == ".txt" else {}),
            )
        else:
            dataset = datasets.load_dataset(source, split="train")
        has_column = text_column in dataset.column_names
        texts = [text for text in dataset[text_column] if text] if has_column else []
    except Exception as error:  # datasets raises its own errors, and those of pyarrow and the hub
        cause = _bad_content(path) or " ".join(str(error.__cause__ or error).split())
        raise InputError(f"truth.corpus={source}: {cause}") from error
    if not has_column:
        raise InputError(
            f"truth.text_column={text_column}: {source} has the columns "
            f"{', '.join(dataset.column_names)}"
        )
    for text in texts:
        if not isinstance(text, str):
            raise InputError(
                f"truth.text_column={text_column}: {source} holds {_kind_of(text)} there; expected "
                "text, such as messages that were put through a chat template"
            )
    if path.suffix == ".txt" and texts:
        first = texts[0].removeprefix(BYTE_ORDER_MARK)
        texts = [first, *texts[1:]] if first else texts[1:]
    if not any(text.strip() for text in texts):
        raise InputError(
            f"truth.corpus={source}: none of its {len(dataset)} rows has text in the column "
            f"{text_column}; expected documents"
        )
    return texts


def read_documents(source: str, text_column: str) -> list[str]:
    """Read the documents of a corpus whole, not in paragraphs; each built-in text is one.

    Raises:
        InputError: as `read_corpus`.
    """
    return BUILT_IN[source]() if source in BUILT_IN else read_corpus(source, text_column)


def _python_docs() -> list[str]:
    from pydoc_data import topics

    return [topics.topics[name] for name in sorted(topics.topics)]


def _python_source() -> list[str]:
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    return [path.read_text("utf-8", errors="replace") for path in paths]


def _unicode_names() -> list[str]:
    """Return the names of characters in blocks of 256; names that a rule makes are left out."""
    by_rule = ("CJK UNIFIED", "CJK COMPATIBILITY", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN")
    blocks = []
    for start in range(0, sys.maxunicode + 1, 256):
        names = (unicodedata.name(chr(code), "") for code in range(start, start + 256))
        blocks.append("\n".join(name for name in names if name and not name.startswith(by_rule)))
    return [block for block in blocks if block]


def _c_headers() -> list[str]:
    import numpy as np

    paths = sorted(Path(np.get_include()).rglob("*.h"))
    return [path.read_text("utf-8", errors="replace") for path in paths]


def _required() -> dict[str, importlib.metadata.Distribution]:
    """Return the installed packages that kdhpc needs, directly or not, without extras."""
    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = ["kdhpc"]
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in found:
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.distribution(name)
            needs = (need for need in found[name].requires or () if "extra ==" not in need)
            wanted += [re.split(r"[^A-Za-z0-9._-]", need, maxsplit=1)[0] for need in needs]
    return found


def _licences() -> list[str]:
    """Return the licences of the packages that kdhpc needs, each text once.

    Those of other packages that are installed would make the text another one with every package.
    """
    names = ("LICENSE", "LICENCE", "COPYING", "NOTICE")
    texts = set()
    for package in _required().values():
        for file in package.files or ():
            path = Path(str(package.locate_file(file)))
            if ".dist-info" in str(file) and file.name.upper().startswith(names):
                with contextlib.suppress(OSError):  # listed and not installed
                    texts.add(path.read_text("utf-8", errors="replace"))
    return sorted(texts)


BUILT_IN = {
    "python-docs": _python_docs, "python-source": _python_source, "c-headers": _c_headers,
    "licences": _licences, "unicode-names": _unicode_names, "addition": addition.texts,
    "docstrings": docstrings.texts,
}  # fmt: skip
"""Texts that every installation has: the topics of Python's documentation, the modules of its
standard library that are single files, numpy's C headers, the licences of the packages that kdhpc
needs, the names of Unicode's characters, sums (kdhpc/addition.py), and the docstrings of those
modules with their first sentences (kdhpc/docstrings.py)."""


def _kind_of(value: object) -> str:
    """Describe a value that is no text: lists of messages, lists, numbers."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"lists of {' and '.join(value[0])}"
    return {list: "lists", dict: "keys and values", int: "numbers", float: "numbers"}.get(
        type(value), type(value).__name__
    )


def _bad_content(path: Path) -> str:
    """Describe the first line of a file that cannot be read, or that there is none; or nothing."""
    if _is_blank(path):
        return "has no rows; expected documents"
    if path.suffix not in {".txt", ".jsonl"} or not path.is_file():
        return ""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                return (
                    f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x} at column "
                    f"{error.start + 1}); convert the file, for example with iconv"
                )
            try:
                if path.suffix == ".jsonl" and text.strip():
                    json.loads(text)
            except ValueError as error:
                return f"line {number} is not JSON, or is cut short ({error})"
    return ""


def _is_blank(path: Path) -> bool:
    """Return whether a Parquet file has no rows, or another file no line with anything in it."""
    if not path.is_file():
        return False
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return bool(pyarrow.parquet.read_metadata(path).num_rows == 0)
    with path.open("rb") as file:
        return not any(line.strip() for line in file)


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in text.split("\n\n") if part.strip()]


def _columns(path: Path) -> list[str] | None:
    """Read the column names from the schema or the first document; None if they cannot be told."""
    if path.suffix == ".txt":
        return ["text"]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return list(pyarrow.parquet.read_schema(path).names)
        except (OSError, ValueError) as error:
            raise InputError(f"truth.corpus={path}: not a Parquet file ({error})") from error
    with path.open("rb") as file:
        try:
            first = json.loads(file.readline())
        except ValueError:
            return None
    return list(first) if isinstance(first, dict) else None


def corpus_fingerprint(source: str, text_column: str = "text") -> str:
    """Compute the sha256 of a local corpus without parsing it; a hub id is its own fingerprint.

    Raises:
        InputError: if a local file is missing, empty, of an unknown type, or lacks the column.
    """
    if source in BUILT_IN:
        text = "\0".join(BUILT_IN[source]())
        return hashlib.sha256(text.encode()).hexdigest()
    path = Path(source)
    if path.is_dir():
        raise InputError(
            f"truth.corpus={source}: is a folder; expected a file that ends in "
            f"{', '.join(CORPUS_KINDS)}"
        )
    if path.is_file():
        if path.suffix not in CORPUS_KINDS:
            raise InputError(
                f"truth.corpus={source}: expected a file that ends in {', '.join(CORPUS_KINDS)}"
            )
        if not path.stat().st_size:
            raise InputError(f"truth.corpus={source}: the file is empty; expected documents")
        columns = _columns(path)
        if columns is not None and text_column not in columns:
            raise InputError(
                f"truth.text_column={text_column}: {source} has the columns {', '.join(columns)}"
            )
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    looks_local = path.suffix in CORPUS_KINDS or source.startswith((".", "~", os.sep))
    if looks_local:
        raise InputError(f"truth.corpus={source}: no such file")
    return f"hub:{source}"
