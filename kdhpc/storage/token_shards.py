"""Write and read token shards (Arrow): sequences and their log-probabilities under their sampler.

A token shard opens without this project:
`datasets.load_dataset("arrow", data_files="runs/demo/2-sample-truth/train/*.arrow", split="train")`
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kdhpc.errors import DamagedError

Ids: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]
"""Token ids, in the smallest of the two types that holds every id of the vocabulary."""
ID_TYPES = (np.uint16, np.uint32)
ROW_COLUMNS = {"length": np.int32, "log_prob_sum": np.float64, "log_prob_tau_sum": np.float64}
OPTIONAL_COLUMNS = {
    "end_log_prob": np.float64,
    "end_log_prob_tau": np.float64,
    "token_log_prob_tau": np.float32,
    "num_prompt": np.int32,
    "right": np.uint8,
    "rouge_l": np.float32,
    "component": np.uint8,
    "component_log_prob": np.float64,
    "component_first_log_prob": np.float64,
}
"""Columns that older shards lack, and others in part."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Sequences and their log-probabilities under their sampler."""

    ids: Ids
    """[N, L] token ids, the prompt first; values beyond a row's length are undefined."""
    length: NDArray[np.int32]
    """[N] number of tokens: the prompt, the drawn tokens, and the end token if it was drawn."""
    log_prob_sum: NDArray[np.float64]
    """[N] nats: log-probability of the counted tokens under the sampler at temperature 1."""
    log_prob_tau_sum: NDArray[np.float64]
    """[N] nats: the same under the distribution that they were drawn from (tau, truncation)."""
    end_log_prob: NDArray[np.float64] | None = None
    """[N] nats: log-probability of the end token at temperature 1, whether or not it counts; 0 if
    the sequence did not end. None in shards of earlier versions."""
    end_log_prob_tau: NDArray[np.float64] | None = None
    """[N] nats: the same under the distribution that the sequences were drawn from."""
    token_log_prob_tau: NDArray[np.float32] | None = None
    """[N, L] nats: log-probability of each token under that distribution, NaN where it does not
    count. Only in evaluation sets, with `scoring.per_token`."""
    num_prompt: NDArray[np.int32] | None = None
    """[N] number of tokens of each sequence's prompt; None if all have the same prompt."""
    right: NDArray[np.uint8] | None = None
    """[N] 1 if the answer is right, else 0; in evaluation sets whose prompts all have answers."""
    rouge_l: NDArray[np.float32] | None = None
    """[N] ROUGE-L of the text after the prompt, 0 to 1; in evaluation sets whose prompts all have
    references."""
    component: NDArray[np.uint8] | None = None
    """[N] index of the component that a sequence was drawn from, if the truth is a mixture."""
    component_log_prob: NDArray[np.float64] | None = None
    """[N, K] nats: log-probability of all drawn tokens under each component of that truth."""
    component_first_log_prob: NDArray[np.float64] | None = None
    """[N, K] nats: the same of the first four drawn tokens."""

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, rows: slice) -> "Samples":
        """Return some of the sequences as views, without copying."""
        return Samples(**{name: array[rows] for name, array in self.arrays().items()})

    def arrays(self) -> dict[str, Any]:
        """Return the arrays that are there, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}

    @classmethod
    def join(cls, parts: "Sequence[Samples]") -> "Samples":
        """Concatenate sequences; an array that one of the parts lacks is left out."""
        if len(parts) == 1:
            return parts[0]
        names = [name for name in parts[0].arrays() if all(name in p.arrays() for p in parts)]
        return cls(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in names})


def id_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the type in which the ids of a vocabulary are stored."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def padded(rows: Sequence[Sequence[int]], length: int, num_ids: int) -> Samples:
    """Return N rows of at most `length` ids as sequences without log-probabilities, which are 0."""
    ids: Any = np.zeros((len(rows), length), id_type(num_ids))
    for out, row in zip(ids, rows, strict=True):
        out[: len(row)] = row
    none = np.zeros(len(rows))
    return Samples(
        ids=ids,
        length=np.array([len(row) for row in rows], np.int32),
        log_prob_sum=none,
        log_prob_tau_sum=none,
    )


def write_samples(path: Path, samples: Samples, metadata: Mapping[str, str]) -> None:
    """Write a token shard as one Arrow record batch and read it back.

    Raises:
        DamagedError: if its ids or lengths read back differently.
    """
    import pyarrow as pa

    columns = {}
    for name, array in samples.arrays().items():
        dtype = {**ROW_COLUMNS, **OPTIONAL_COLUMNS}.get(name, array.dtype)
        column = pa.array(array.astype(dtype).reshape(-1))
        is_flat = array.ndim == 1
        columns[name] = (
            column if is_flat else pa.FixedSizeListArray.from_arrays(column, array.shape[1])
        )
    table = pa.table(columns).replace_schema_metadata(dict(metadata))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    again = vars(read_samples([path]))
    if any(again[name].tobytes() != column.tobytes() for name, column in samples.arrays().items()):
        raise DamagedError(f"{path}: reads back differently from what was written")


def read_samples(paths: Sequence[Path]) -> Samples:
    """Read and concatenate token shards; a single one is mapped into memory, not copied.

    Raises:
        DamagedError: if a file is no token shard.
    """
    return Samples.join([_read_sample_shard(path) for path in paths])


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Token ids of several shards as one array [N, L], mapped into memory, never copied whole."""

    parts: tuple[Ids, ...]
    """Token ids [n_i, L] of each shard."""
    length: NDArray[np.int32]
    """[N] number of tokens in each row."""
    num_prompt: NDArray[np.int32] | None = None
    """[N] number of tokens of each row's prompt; None if all have the same prompt."""

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, rows: NDArray[np.int64]) -> Ids:
        """Copy the rows with the given indices [n] into an array [n, L]."""
        ends = np.cumsum([len(part) for part in self.parts])
        part_index = np.searchsorted(ends, rows, side="right")
        ids = np.empty((len(rows), self.parts[0].shape[1]), self.parts[0].dtype)
        for index in np.unique(part_index):
            part = self.parts[index]
            start = ends[index] - len(part)
            ids[part_index == index] = part[rows[part_index == index] - start]
        return ids


def map_token_rows(paths: Sequence[Path]) -> TokenRows:
    """Map the ids of token shards into memory, for random access to rows.

    Raises:
        DamagedError: if a file is no token shard.
    """
    parts = [_read_sample_shard(path) for path in paths]
    prompts = [part.num_prompt for part in parts if part.num_prompt is not None]
    return TokenRows(
        parts=tuple(part.ids for part in parts),
        length=np.concatenate([part.length for part in parts]),
        num_prompt=np.concatenate(prompts) if len(prompts) == len(parts) else None,
    )


def _read_sample_shard(path: Path) -> Samples:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_stream(source).read_all()
        dtypes: dict[str, tuple[type, ...]] = {"ids": ID_TYPES}
        dtypes |= {name: (dtype,) for name, dtype in ROW_COLUMNS.items()}
        for name in set(OPTIONAL_COLUMNS).intersection(table.column_names):
            dtypes[name] = (OPTIONAL_COLUMNS[name],)
        rows: dict[str, Any] = {}
        for name, expected in dtypes.items():
            column = _contiguous(table[name])
            if pa.types.is_fixed_size_list(column.type):
                rows[name] = _numbers(column.values, *expected).reshape(len(table), -1)
            else:
                rows[name] = _numbers(column, *expected)
        return Samples(**rows)
    except (pa.ArrowException, AttributeError, KeyError, ValueError, OSError) as error:
        raise DamagedError(f"{path}: not a token shard ({error})") from error


def _contiguous(column: Any) -> Any:
    """Return a column as one array; it stays mapped if the table was written as one batch."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _numbers(array: Any, *dtypes: type) -> NDArray[Any]:
    """View an Arrow array of numbers without copying; Arrow's own `to_numpy` imports pandas."""
    import pyarrow as pa

    fitting = [dtype for dtype in dtypes if array.type == pa.from_numpy_dtype(dtype)]
    if not fitting or array.null_count:
        expected = " or ".join(str(np.dtype(dtype)) for dtype in dtypes)
        raise ValueError(f"expected {expected}, found {array.type}")
    [dtype] = fitting
    start = array.offset * np.dtype(dtype).itemsize
    return np.frombuffer(array.buffers()[1], dtype, len(array), start)
