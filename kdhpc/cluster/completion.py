"""What the Tab key completes: presets, keys and their values, names of runs.

The shell starts a command with `_ARGCOMPLETE` set, and argcomplete answers it in the place of the
command. Without that variable nothing here loads or does anything.
"""

import argparse
import os
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from kdhpc.cluster import places, runs
from kdhpc.cluster.resources import Resources
from kdhpc.config import presets
from kdhpc.config.run import StageResources
from kdhpc.errors import KdhpcError
from kdhpc.plan.stages import AnyPipeline

Completer = Callable[[str, argparse.Namespace], list[str]]
"""Takes the word that is being typed and what was parsed before it; returns what it may become."""
VARIABLE = "_ARGCOMPLETE"
"""Set by the shell: the number of words that start the command, such as 2 for `python FILE`."""


def answer(parser: argparse.ArgumentParser, words: Completer | None = None) -> None:
    """Print completions and end the process, if the shell asks for them; else do nothing.

    Args:
        parser: the parser of the command. Its arguments `run`, `stage` and `list` are completed to
            names of runs and stages.
        words: completes its argument `words`.
    """
    if VARIABLE not in os.environ:
        return
    import argcomplete

    completers = {"run": run_names, "stage": stage_names, "list": stage_names, "words": words}

    def complete(
        prefix: str, action: argparse.Action, parsed_args: argparse.Namespace, **_: object
    ) -> list[str]:
        completer = completers.get(action.dest)
        try:
            return completer(prefix, parsed_args) if completer else []
        except KdhpcError:  # what was typed so far is no run, or has a mistake
            return []

    argcomplete.autocomplete(
        parser,
        always_complete_options=False,
        default_completer=complete,  # type: ignore[arg-type]  # any callable does
    )


def command(scripts: Mapping[str, bool]) -> str | None:
    """Return the command whose arguments are being completed, and count it as one that starts it.

    What can be answered without the command is printed, and ends the process.

    Args:
        scripts: names of the commands, and whether each answers for its own arguments. Others take
            the name of a run.

    Returns:
        The name; None if the shell does not ask for completions.
    """
    if VARIABLE not in os.environ:
        return None
    from argcomplete.lexers import split_line

    num_words = int(os.environ[VARIABLE])
    *_, words, _ = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))
    parser = argparse.ArgumentParser()
    if len(words) <= num_words:
        parser.add_argument("command", choices=scripts)
    elif scripts.get(name := words[num_words], True):
        os.environ[VARIABLE] = str(num_words + 1)
        return name
    else:
        parser.add_argument("command")
        parser.add_argument("run", nargs="+")
    answer(parser)
    return None


def run_names(prefix: str, parsed: argparse.Namespace) -> list[str]:
    """Return the names of the runs in runs/ and of those that are noted elsewhere."""
    return places.names(getattr(parsed, "runs_dir", None))


def stage_names(prefix: str, parsed: argparse.Namespace) -> list[str]:
    """Return the names of the stages of the run that was typed."""
    return [stage.name for stage in runs.find(parsed.run, parsed.runs_dir).pipeline.stages]


def settings(prefix: str, parsed: argparse.Namespace) -> list[str]:
    """Return presets, and the keys of their config with a `=` after each; values after a `=`.

    Of keys with dots, the parts up to the next dot are returned.
    """
    words: list[str] = parsed.words or []
    try:
        pipeline, config = runs.from_words(words)
    except KdhpcError:  # a mistake is reported when the command is run
        pipeline, config = runs.from_words([word for word in words if "=" not in word])
    key, is_value, _ = prefix.partition("=")
    leaves = dict(_leaves(type(config), _with_stages(pipeline, config)))
    if is_value:
        named = {
            "cluster": ["auto", *presets.cluster_names()],
            "until": [stage.name for stage in pipeline.stages],
            "reuse": places.names(),
        }
        values = named[key] if key in named else _choices(leaves.get(key))
        return [f"{key}={value}" for value in values]
    added = [name for name, bases in presets.added_names().items() if {*bases} & {*words}]
    return [*presets.preset_names(), *added, *_next_parts(prefix, [f"{key}=" for key in leaves])]


def resources(prefix: str, parsed: argparse.Namespace) -> list[str]:
    """Return the keys of resources that a rerun takes, such as `slurm.mem_gb=`."""
    return [f"slurm.{field.name}=" for field in fields(Resources)]


def _with_stages(pipeline: AnyPipeline, config: Any) -> Any:
    """Return a config in which every stage has resources of its own, so that it has their keys."""
    own = {stage.name: StageResources() for stage in pipeline.stages}
    return replace(config, slurm=replace(config.slurm, stages=own | config.slurm.stages))


def _leaves(kind: Any, value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a config, such as `slurm.mem_gb`, each with the type of its value.

    Args:
        kind: type of a config or of a part of it.
        value: the config or the part; None where it has a default that is not made yet.
        key: key of the part.
    """
    parts = [part for part in (kind, *typing.get_args(kind)) if _is_config(part)]
    prefix = f"{key}." if key else ""
    if isinstance(value, Mapping) and parts:
        for name, entry in value.items():
            yield from _leaves(parts[0], entry, f"{prefix}{name}")
    elif parts:
        for name, hint in typing.get_type_hints(parts[0], include_extras=True).items():
            yield from _leaves(hint, getattr(value, name, None), f"{prefix}{name}")
    else:
        yield key, kind


def _is_config(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(
        kind
    )  # a bound of a type is one too, but no type


def _choices(kind: Any) -> list[str]:
    """Return the values that a type names one by one; empty if it does not."""
    if kind is bool:
        return ["true", "false"]
    if typing.get_origin(kind) is typing.Literal:
        return [str(value) for value in typing.get_args(kind)]
    return [value for part in typing.get_args(kind) for value in _choices(part)]


def _next_parts(prefix: str, keys: list[str]) -> list[str]:
    """Cut keys that begin with a prefix after the next dot, or after the one where they differ."""
    found = [key for key in keys if key.startswith(prefix)]
    parts = list(dict.fromkeys(_until_dot(key, len(prefix)) for key in found))
    if len(parts) == 1 and parts[0].endswith("."):
        return _next_parts(parts[0], found)
    return parts


def _until_dot(key: str, start: int) -> str:
    end = key.find(".", start)
    return key if end < 0 else key[: end + 1]
