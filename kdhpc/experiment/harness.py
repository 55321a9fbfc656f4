"""Evaluate models with EleutherAI's lm-evaluation-harness: the only module that imports it.

Its numbers are those of its own command line, `lm_eval --model hf` with
`softmax_dtype=float32`, for the same task, model, dtype and batch size.
"""

import contextlib
import functools
import gc
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdhpc.config import downstream as config
from kdhpc.errors import InputError
from kdhpc.experiment.downstream import CLUSTER
from kdhpc.experiment.own_tasks import Item
from kdhpc.models.tokenizer import read_vocabulary
from kdhpc.types import Json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RANK_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_SIZE", "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK",
)  # fmt: skip
"""Variables from which accelerate 1.15, which loads models for the harness, takes ranks."""
DOC_CLUSTER = "kdhpc_cluster"
"""Field of the items of kdhpc's own tasks that numbers groups of them."""
ANSWER_TOKENS = 256
"""Most tokens of an answer for which the task says nothing; the harness has the same."""
CHOICES = """\
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: right
process_results: !function kdhpc.experiment.harness.score_choice
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ANSWERS = """\
output_type: generate_until
doc_to_target: answer
generation_kwargs: {do_sample: false, until: ["\\n"], max_gen_toks: %d}
process_results: !function kdhpc.experiment.harness.score_answer
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
"""Task files of kdhpc's own tasks, as far as they differ."""


def fingerprint_of(folder: Path) -> str:
    """Return the digest of the names and contents of all task files in a folder.

    Raises:
        InputError: if the folder has no task file, or a file is not readable.
    """
    key = f"downstream.include={folder}"
    digest = hashlib.sha256()
    try:
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc")
        for file in files:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(folder)} {content}\n".encode())
    except OSError as error:
        raise InputError(f"{key}: not readable ({error.strerror})") from error
    if not any(file.suffix == ".yaml" for file in files):
        raise InputError(f"{key}: has no task file; expected a folder with files *.yaml")
    return digest.hexdigest()


def check_tasks(tasks: Sequence[str], include: Path | None, length: int) -> tuple[str, ...]:
    """Check that tasks can be run, and fetch their data.

    Args:
        tasks: names of tasks, kdhpc's own among them.
        include: folder of more task files.
        length: number of tokens of a sequence.

    Returns:
        The names of the tasks whose files are in `include`.

    Raises:
        InputError: if the harness is not installed, it has no such task, its data cannot be
            fetched, or a task runs code that a model has written or asks for too long answers.
    """
    key = f"downstream.tasks={list(tasks)}"
    if any(task != config.OPEN for task in tasks) and not importlib.util.find_spec("lm_eval"):
        raise InputError(
            f"{key}: lm-evaluation-harness is not installed; expected pip install "
            "'kdhpc[downstream]'"
        )
    for task in tasks:
        if task in config.OWN_TASKS:
            continue
        _be_quiet()
        manager = _manager(task, include)
        if task not in manager.all_tasks:
            names = [*config.OWN_TASKS, *manager.all_tasks]
            near = ", ".join(get_close_matches(task, names, n=3))
            hint = f"such as {near}" if near else f"or one of {', '.join(config.OWN_TASKS)}"
            raise InputError(
                f"{key}: no task {task!r}; expected one of lm-evaluation-harness, {hint}"
            )
        try:
            loaded = manager.load([task])["tasks"]
        except Exception as error:  # tasks raise what their data sets and own code raise
            cause = " ".join(str(error).split())[:300]
            raise InputError(
                f"{key}: the data of {task} cannot be fetched or read ({cause}); expected a "
                "network, or its data in the cache of Hugging Face"
            ) from error
        for one in loaded.values():
            if problem := _problem(one, length):
                raise InputError(f"{key}: {task} {problem}")
    others = [task for task in tasks if task not in config.OWN_TASKS]
    return tuple(task for task in others if include and task in _in_folder(include).all_tasks)


def _problem(task: Any, length: int) -> str:
    """Return why a task cannot be run, and what was expected; empty if it can."""
    if getattr(task, "UNSAFE_CODE", False):
        return "runs code that a model has written; expected a task that does not"
    if getattr(task, "MULTIMODAL", False):
        return "shows images or plays sounds; expected a task of text alone"
    if task.OUTPUT_TYPE == "generate_until":
        options = task.get_config("generation_kwargs") or {}
        num_tokens = int(options.get("max_gen_toks", ANSWER_TOKENS))
        if num_tokens >= length:
            return f"asks for answers of {num_tokens} tokens; expected fewer than length={length}"
    return ""


def _be_quiet() -> None:
    """Leave out what the harness and its libraries tell; errors are raised as well."""
    import datasets

    datasets.disable_progress_bars()
    for name in ("lm_eval", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _manager(task: str, include: Path | None) -> Any:
    """Return what knows the task: of the folder alone if it is there, which is faster."""
    if include is not None and task in (own := _in_folder(include)).all_tasks:
        return own
    return _all_tasks(include)


def _in_folder(include: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(include), include_defaults=False)


@functools.lru_cache(maxsize=1)
def _all_tasks(include: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(include) if include else None)


def write_own_task(folder: Path, task: str, items: Sequence[Item], max_tokens: int) -> None:
    """Write one of kdhpc's own tasks as a task file of the harness, with its items beside it.

    Args:
        folder: a folder that exists, for `include`.
        task: name of the task.
        items: its items.
        max_tokens: most tokens of an answer that is generated.
    """
    file = folder / f"{task}.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for item in items:
            doc = {
                "context": item.context,
                "choices": list(item.endings),
                "right": item.right,
                "answer": item.endings[item.right].strip(),
                DOC_CLUSTER: item.cluster,
            }
            out.write(json.dumps(doc) + "\n")
    shared = (
        f"task: {task}\n"
        "custom_dataset: !function kdhpc.experiment.harness.load_items\n"
        f"dataset_kwargs: {{file: {json.dumps(str(file))}}}\n"
        "test_split: test\ndoc_to_text: context\ntarget_delimiter: ''\n"
    )
    kind = ANSWERS % max_tokens if task == config.ANSWERS else CHOICES
    (folder / f"{task}.yaml").write_text(shared + kind, encoding="utf-8")


def load_items(file: str, **_: Json) -> dict[str, Any]:
    """Return the items of one of kdhpc's own tasks; the harness calls this."""
    import datasets

    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def score_choice(
    doc: Mapping[str, Json], results: Sequence[tuple[float, bool]]
) -> dict[str, float]:
    """Score an item by the log-probabilities of its endings: 1, 0, or one half for a tie."""
    log_probs = [log_prob for log_prob, _ in results]
    right = log_probs[doc["right"]]
    if right < max(log_probs):
        return {"acc": 0.0}
    return {"acc": 1.0 / sum(log_prob == right for log_prob in log_probs)}


def score_answer(doc: Mapping[str, Json], results: Sequence[str]) -> dict[str, float]:
    """Score an item by a generated answer, which has to be the right one exactly."""
    return {"exact_match": float(results[0].strip() == doc["answer"])}


def evaluate(
    model_path: Path,
    task: str,
    *,
    include: Path | None,
    limit: int | None,
    dtype: str,
    device: str,
    batch_rows: int,
    add_begin: bool | None,
) -> "dict[str, NDArray[np.generic]]":
    """Evaluate a model on a task of the harness.

    Args:
        model_path: checkpoint folder.
        task: name of the task, or of a group of tasks, whose items are joined.
        include: folder of more task files.
        limit: largest number of items of each task; None for all.
        dtype: dtype of the model.
        device: device that it runs on, as torch names it.
        batch_rows: number of requests in a batch.
        add_begin: whether the tokenizer's begin token comes first; None if the tokenizer decides.

    Returns:
        By the name of each metric that is a number for every item: [N] float64. `cluster` is [N]
        int32, the number of the group of items that depend on each other.

    Raises:
        InputError: if the task has no such metric.
    """
    from lm_eval.evaluator import simple_evaluate

    _be_quiet()
    gc.collect()  # a model of an earlier shard may be in a circle of references
    with _alone():
        results = simple_evaluate(
            model=_model(
                model_path, dtype=dtype, device=device, batch_rows=batch_rows, add_begin=add_begin
            ),
            tasks=[task],
            task_manager=_manager(task, include),
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    if results is None:
        raise RuntimeError("lm-evaluation-harness gave no results on this rank")
    return _arrays(task, [samples for _, samples in sorted(results["samples"].items())])


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hide the ranks of a job, which the harness would take for its own.

    It would wait for other processes, and give results to the first alone.
    """
    hidden = {name: os.environ.pop(name) for name in RANK_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _model(path: Path, *, dtype: str, device: str, batch_rows: int, add_begin: bool | None) -> Any:
    """Load a checkpoint folder as a model of the harness."""
    from lm_eval.models.huggingface import HFLM

    options = {
        "pretrained": str(path),
        "dtype": dtype,
        "softmax_dtype": "float32",
        "device": device,
        "batch_size": batch_rows,
        "add_bos_token": add_begin,
    }
    vocabulary = read_vocabulary(path)
    return HFLM(**options) if vocabulary is None else _cut_model(vocabulary)(**options)


def _cut_model(vocabulary: Sequence[int]) -> Any:
    """Return the class of models of the harness whose vocabulary is cut to some ids.

    Their tokenizer has the ids of the whole vocabulary, which are mapped to those of the model.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    new_ids = {whole: new for new, whole in enumerate(vocabulary)}

    def to_new(ids: Iterable[int]) -> list[int]:
        ids = list(ids)
        if unknown := [whole for whole in ids if whole not in new_ids]:
            raise InputError(
                f"downstream.tasks: an item has the token {unknown[0]} of tokenizer.json, which is "
                f"not in the vocabulary of {len(vocabulary)} ids; expected truth.vocabulary=null"
            )
        return [new_ids[whole] for whole in ids]

    class CutModel(HFLM):  # type: ignore[misc]  # the harness is untyped here
        @property
        def eot_token_id(self) -> int:
            return to_new([super().eot_token_id])[0]

        @property
        def prefix_token_id(self) -> int:
            return to_new([super().prefix_token_id])[0]

        def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
            return to_new(super().tok_encode(string, *args, **options))

        def tok_batch_encode(self, *args: Any, **options: Any) -> Any:
            ids, mask = super().tok_batch_encode(*args, **options)
            rows = [
                [new_ids[whole] if real else 0 for whole, real in zip(row, real_row, strict=True)]
                for row, real_row in zip(ids.tolist(), mask.tolist(), strict=True)
            ]
            return torch.tensor(rows), mask

        def tok_decode(self, tokens: Any, *args: Any, **options: Any) -> Any:
            new = [tokens] if isinstance(tokens, int) else list(tokens)
            return super().tok_decode([vocabulary[i] for i in new], *args, **options)

    return CutModel


def _arrays(
    task: str, of_tasks: Sequence[Sequence[Mapping[str, Json]]]
) -> "dict[str, NDArray[np.generic]]":
    """Return the metrics of all items, by name; those of several tasks are joined.

    Args:
        task: name for errors.
        of_tasks: for each task, what the harness has noted of each of its items and filters.
    """
    import numpy as np

    columns: list[dict[str, dict[int, float]]] = []
    for samples in of_tasks:
        columns.append({})
        for sample in samples:
            for metric in sample["metrics"]:
                value = sample[metric]
                if isinstance(value, bool | int | float | np.number):
                    name = metric if sample["filter"] == "none" else f"{metric}-{sample['filter']}"
                    columns[-1].setdefault(name, {})[sample["doc_id"]] = float(value)
    names = sorted(set.intersection(*({*column} for column in columns)))
    if not names:
        raise InputError(
            f"downstream.tasks: {task} has no metric that is a number for each item; expected one "
            "such as acc or exact_match"
        )
    arrays: dict[str, NDArray[np.generic]] = {
        name: np.array([v for column in columns for _, v in sorted(column[name].items())])
        for name in names
    }
    clusters = [
        sample["doc"].get(DOC_CLUSTER, number) if isinstance(sample["doc"], dict) else number
        for number, sample in enumerate(_first_of_each(of_tasks))
    ]
    return {**arrays, CLUSTER: np.array(clusters, np.int32)}


def _first_of_each(
    of_tasks: Sequence[Sequence[Mapping[str, Json]]],
) -> Iterable[Mapping[str, Json]]:
    """Yield one note of each item, in order of tasks and items."""
    for samples in of_tasks:
        by_item = {sample["doc_id"]: sample for sample in reversed(samples)}
        for _, sample in sorted(by_item.items()):
            yield sample
