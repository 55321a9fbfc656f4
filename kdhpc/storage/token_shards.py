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

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, rows: slice) -> "Samples":
        """Return some of the sequences as views, without copying."""
        return Samples(**{name: array[rows] for name, array in vars(self).items()})


def id_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the type in which the ids of a vocabulary are stored."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_samples(path: Path, samples: Samples, metadata: Mapping[str, str]) -> None:
    """Write a token shard as one Arrow record batch and read it back.

    Raises:
        DamagedError: if its ids or lengths read back differently.
    """
    import pyarrow as pa

    width = samples.ids.shape[1]
    columns = {"ids": pa.FixedSizeListArray.from_arrays(pa.array(samples.ids.reshape(-1)), width)}
    for name, dtype in ROW_COLUMNS.items():
        columns[name] = pa.array(getattr(samples, name).astype(dtype))
    table = pa.table(columns).replace_schema_metadata(dict(metadata))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    again = vars(read_samples([path]))
    if any(again[name].tobytes() != column.tobytes() for name, column in vars(samples).items()):
        raise DamagedError(f"{path}: reads back differently from what was written")


def read_samples(paths: Sequence[Path]) -> Samples:
    """Read and concatenate token shards; a single one is mapped into memory, not copied.

    Raises:
        DamagedError: if a file is no token shard.
    """
    parts = [_read_sample_shard(path) for path in paths]
    if len(parts) == 1:
        return parts[0]
    return Samples(
        ids=np.concatenate([part.ids for part in parts]),
        length=np.concatenate([part.length for part in parts]),
        log_prob_sum=np.concatenate([part.log_prob_sum for part in parts]),
        log_prob_tau_sum=np.concatenate([part.log_prob_tau_sum for part in parts]),
    )


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Token ids of several shards as one array [N, L], mapped into memory, never copied whole."""

    parts: tuple[Ids, ...]
    """Token ids [n_i, L] of each shard."""
    length: NDArray[np.int32]
    """[N] number of tokens in each row."""

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
    return TokenRows(
        parts=tuple(part.ids for part in parts),
        length=np.concatenate([part.length for part in parts]),
    )


def _read_sample_shard(path: Path) -> Samples:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_stream(source).read_all()
        ids = _numbers(_contiguous(table["ids"]).values, *ID_TYPES)
        rows: dict[str, Any] = {
            name: _numbers(_contiguous(table[name]), dtype) for name, dtype in ROW_COLUMNS.items()
        }
        return Samples(ids=ids.reshape(len(table), -1), **rows)
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
