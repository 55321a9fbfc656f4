"""The log of a training: JSON lines in the run folder and, if asked for, TensorBoard events."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdhpc.errors import InputError
from kdhpc.types import Json

FILE = "train.jsonl"


class TrainingLog(contextlib.AbstractContextManager["TrainingLog"]):
    """Writes one line per step.

    After a kill, the steps since the last checkpoint are done again and are logged twice.

    Raises:
        InputError: if events are asked for and TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, events: bool) -> None:
        self.folder = folder
        self._open_events = _event_writer() if events else None
        self._events: Any = None

    def write(self, facts: Mapping[str, Json]) -> None:
        """Add the facts of a step, which must include `step`."""
        with (self.folder / FILE).open("a") as log:
            log.write(json.dumps({"time": round(time.time(), 3), **facts}) + "\n")
        if self._open_events is None:
            return
        self._events = self._events or self._open_events(str(self.folder))
        for name, value in facts.items():
            self._events.add_scalar(name, value, facts["step"])

    def __exit__(self, *exception: object) -> None:
        if self._events:
            self._events.close()


def _event_writer() -> Callable[[str], Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "tensorboard=true: TensorBoard is not installed; "
            "install it with `pip install 'kdhpc[tensorboard]'`"
        ) from error
    return SummaryWriter


def last_line(folder: Path) -> str:
    """Return the last line of a log without reading all of it; empty if the log is empty."""
    with (folder / FILE).open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 8192))
        lines = file.read().decode(errors="replace").splitlines()
    return lines[-1] if lines else ""


def read_log(folder: Path) -> list[dict[str, Json]]:
    """Return the facts of every step in order; of a step that was logged twice, the last ones."""
    lines = (folder / FILE).read_text().splitlines()
    facts_by_step = {facts["step"]: facts for facts in map(json.loads, lines)}
    return [facts_by_step[step] for step in sorted(facts_by_step)]
