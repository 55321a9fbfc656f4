"""Text corpora: documents and their fingerprint."""

import hashlib
import json
import os
from pathlib import Path

from kdhpc.errors import InputError

CORPUS_KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_corpus(source: str, text_column: str) -> list[str]:
    """Documents of a corpus: `python-docs`, a local text, JSONL or Parquet file, or a hub id.

    A text file is cut at blank lines, so that short documents have an end to learn.

    Raises:
        InputError: if it cannot be read or has no such column.
    """
    import datasets

    if source == "python-docs":
        from pydoc_data import topics

        texts = [topics.topics[name] for name in sorted(topics.topics)]
        return [part for text in texts for part in _paragraphs(text)]
    kinds = CORPUS_KINDS
    path = Path(source)
    datasets.disable_progress_bars()
    try:
        if path.suffix in kinds:
            found = datasets.load_dataset(
                kinds[path.suffix],
                data_files=str(path),
                split="train",
                **({"sample_by": "paragraph"} if path.suffix == ".txt" else {}),
            )
        else:
            found = datasets.load_dataset(source, split="train")
    except Exception as error:  # datasets raises its own, pyarrow's and the hub's errors
        raise InputError(f"truth.corpus={source}: cannot be read ({error})") from error
    if text_column not in found.column_names:
        raise InputError(
            f"truth.text_column={text_column}: {source} has the columns "
            f"{', '.join(found.column_names)}"
        )
    return [str(text) for text in found[text_column] if text]


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in text.split("\n\n") if part.strip()]


def _columns(path: Path) -> list[str] | None:
    """Columns of a corpus by its first document; None where that does not tell."""
    if path.suffix == ".txt":
        return ["text"]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return list(pyarrow.parquet.read_schema(path).names)
        except (OSError, ValueError) as error:
            raise InputError(f"truth.corpus={path}: not a Parquet file ({error})") from error
    with path.open() as file:
        try:
            first = json.loads(file.readline())
        except ValueError:
            return None
    return list(first) if isinstance(first, dict) else None


def corpus_fingerprint(source: str, text_column: str = "text") -> str:
    """sha256 of a local corpus, without reading it as a data set; hub ids stand for themselves.

    Raises:
        InputError: for a local file that is not there, is empty, of no known kind, or without the
            column.
    """
    if source == "python-docs":
        from pydoc_data import topics

        text = "\0".join(topics.topics[name] for name in sorted(topics.topics))
        return hashlib.sha256(text.encode()).hexdigest()
    path = Path(source)
    if path.is_file():
        if path.suffix not in CORPUS_KINDS:
            raise InputError(
                f"truth.corpus={source}: expected a file named {', '.join(CORPUS_KINDS)}"
            )
        if not path.stat().st_size:
            raise InputError(f"truth.corpus={source}: is empty; expected documents")
        columns = _columns(path)
        if columns is not None and text_column not in columns:
            raise InputError(
                f"truth.text_column={text_column}: {source} has the columns {', '.join(columns)}"
            )
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    looks_local = path.suffix in {".txt", ".jsonl", ".json", ".parquet"} or source.startswith(
        (".", "~", os.sep)
    )
    if looks_local:
        raise InputError(f"truth.corpus={source}: no such file")
    return f"hub:{source}"
