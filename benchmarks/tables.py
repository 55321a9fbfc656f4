"""Print and save the tables of benchmarks with the conditions under which they were measured."""

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BUILD = Path(__file__).parents[1] / "build"
"""Folder for the files that benchmarks make; git ignores it."""
RESULTS = BUILD / "benchmarks"
"""Folder that `save` writes to."""
PACKAGES = ("torch", "transformers", "deepspeed", "numpy", "h5py")


def conditions() -> dict[str, Any]:
    """Return the machine, the versions, and the cores and threads that this process may use."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "python": platform.python_version(),
        **{name: installed for name in PACKAGES if (installed := _version(name))},
    }


def save(
    name: str,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Print a Markdown table, and write it and its numbers to `RESULTS`.

    Args:
        name: stem of the files, `<name>.md` and `<name>.json`.
        title: one line that says what was measured.
        rows: one row for every system; all have the same columns in the same order.
        facts: further conditions of the numbers: sizes, measured limits, repetitions.
    """
    about = conditions() | dict(facts or {})
    head = list(rows[0])
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join(_cell(row[column]) for column in head) for row in rows]
    table = "\n".join(f"| {line} |" for line in lines)
    under = ", ".join(f"{key} {_cell(value)}" for key, value in about.items())
    text = f"**{title}**\n\n{table}\n\n{under}\n"
    print(f"\n{text}", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    saved = {"title": title, "conditions": about, "rows": list(rows)}
    (RESULTS / f"{name}.json").write_text(json.dumps(saved, indent=1) + "\n")


def options(description: str | None) -> argparse.ArgumentParser:
    """Make a parser that prints a module's docstring with its line breaks."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )


def peak_bytes(device: Any = None) -> float:
    """Return the most bytes that this process held, or on a GPU the most that torch reserved there.

    Unlike `ru_maxrss`, it does not include what the parent held when it started this process.
    """
    if device is not None and device.type == "cuda":
        import torch

        return float(torch.cuda.max_memory_reserved(device))
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) * 1024
    return float("nan")


def cpu_of_children() -> float:
    """Return the CPU seconds of all child processes that this process has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
