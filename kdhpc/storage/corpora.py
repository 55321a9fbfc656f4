"""Read text corpora and compute their fingerprints."""

import hashlib
import json
import os
from pathlib import Path

from kdhpc.errors import InputError

CORPUS_KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_corpus(source: str, text_column: str) -> list[str]:
    """Read the documents of a corpus.

    A text file is split at blank lines: the documents become short, so that a model sees many ends
    of documents.

    Args:
        source: `python-docs`, a local text, JSONL or Parquet file, or a hub id.
        text_column: name of the column that holds the text.

    Raises:
        InputError: if the corpus cannot be read or has no such column.
    """
    import datasets

    if source == "python-docs":
        from pydoc_data import topics

        texts = [topics.topics[name] for name in sorted(topics.topics)]
        return [part for text in texts for part in _paragraphs(text)]
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
    except Exception as error:  # datasets raises its own errors, and those of pyarrow and the hub
        raise InputError(f"truth.corpus={source}: cannot be read ({error})") from error
    if text_column not in dataset.column_names:
        raise InputError(
            f"truth.text_column={text_column}: {source} has the columns "
            f"{', '.join(dataset.column_names)}"
        )
    return [str(text) for text in dataset[text_column] if text]


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
    with path.open() as file:
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
    if source == "python-docs":
        from pydoc_data import topics

        text = "\0".join(topics.topics[name] for name in sorted(topics.topics))
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
