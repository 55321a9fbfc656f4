"""Turn the words of a command line into a config, and a config into plain data.

A bare word names a preset in `configs/`, which may extend another with `extends:`; `a.b=value` is
an override. Later words win. A preset that is a folder has one file for each preset that it can be
added to: `paper capacity` reads `paper.yaml`, then `capacity/paper.yaml`. This is the only module
that imports omegaconf.

Values are read as text, in YAML files too, and take the type of their field when the config is
built. A field of text keeps what was typed: `no`, `0123`, `1e5` and `${HOME}` are texts there. A
field of minutes, whose name ends with `_min`, also takes the times that sbatch takes: `90`,
`1:30:00` and `0-1:30` are the same, and `2-0` is two days. Inside an `architecture`, whose fields
are those of transformers, a text that is a number, `true` or `false` is that.
"""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from kdhpc.config.run import RunConfig
from kdhpc.errors import InputError
from kdhpc.project import PROJECT_DIR
from kdhpc.types import Json

CONFIGS_DIR = PROJECT_DIR / "configs"

T = TypeVar("T")
QUOTED = ('"', "'", "[", "{")
"""First characters of typed values that are read as YAML; any other value is text as it stands."""
STUDENTS, COMPONENTS = ("students",), ("truth", "components")
"""Keys of which an entry can be taken away with null."""
NOTHING = ("", "null", "~")
"""Typed values that take a value away."""
DOLLAR, ESCAPE = "\ue000", "\ue001"
"""Private characters that keep `$` from omegaconf, which would look for interpolations."""


def preset_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS_DIR.glob("*.yaml"))


def added_names() -> dict[str, list[str]]:
    """Return the presets that are added to others, each with those that it can be added to."""
    added: dict[str, list[str]] = {}
    for path in sorted(CONFIGS_DIR.glob("*/*.yaml")):
        if path.parent.name != "cluster":
            added.setdefault(path.parent.name, []).append(path.stem)
    return added


def cluster_names() -> list[str]:
    """List the files in configs/cluster/, then those in its folders, such as `sites/lumi`."""
    folder = CONFIGS_DIR / "cluster"
    paths = [path.relative_to(folder) for path in folder.rglob("*.yaml")]
    paths.sort(key=lambda path: (len(path.parts), path))
    return [path.with_suffix("").as_posix() for path in paths]


def compose(words: list[str]) -> dict[str, Json]:
    """Merge presets from left to right, then the cluster's YAML, then overrides.

    Raises:
        InputError: if a preset or cluster is unknown, YAML is unreadable, or an override is
            malformed.
    """
    presets = [word for word in words if "=" not in word]
    overrides = _dotlist([word for word in words if "=" in word])
    merged = OmegaConf.create()
    for position, name in enumerate(presets):
        merged = _merge(merged, _added(name, presets[:position]) or _preset(name))
    try:
        selected = OmegaConf.select(_merge(merged, overrides), "cluster", default="auto")
        cluster = _revealed(str(selected))
    except OmegaConfBaseException as error:
        raise InputError(_one_line(error)) from error
    if cluster != "auto":
        path = CONFIGS_DIR / "cluster" / f"{cluster}.yaml"
        if cluster not in cluster_names():
            raise InputError(
                f"cluster={cluster}: no file {path}; expected auto or one of "
                f"{', '.join(cluster_names())}"
            )
        site = _load(path)
        if "slurm" in site and site["slurm"] is None:
            site.pop("slurm")  # all of its lines are comments
        merged = _merge(merged, site)
    _check_taken_away(_plain(overrides), _plain(merged))
    return _plain(_merge(merged, overrides))


def _check_taken_away(overrides: dict[str, Json], values: dict[str, Json]) -> None:
    """Check that sizes of students and components that are taken away with null are there."""
    for key in (STUDENTS, COMPONENTS):
        asked, there = _at(overrides, key), _at(values, key)
        for name, value in asked.items():
            if value is None and there and name not in there:
                raise InputError(
                    f"{'.'.join(key)}.{name}=null: there is no such "
                    f"{'size' if key == STUDENTS else 'component'} to take away; expected one of "
                    f"{', '.join(there)}"
                )


def _at(values: dict[str, Json], key: tuple[str, ...]) -> dict[str, Json]:
    """Return the part of some values at a key; nothing if there is none."""
    part: Json = values
    for name in key:
        part = part.get(name) if isinstance(part, dict) else None
    return part if isinstance(part, dict) else {}


def build(config_class: type[T], values: dict[str, Json]) -> T:
    """Build a frozen config from plain values.

    Raises:
        InputError: if a key is unknown, or a value is missing or has the wrong type.
    """
    values = _with_minutes(_with_own_types(_without_nothing(values)))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(config_class), _config(values))
        built = _revealed(OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or _value_that_does_not_fit(config_class, values)
        line = _one_line(error, key)
        if isinstance(error, ConfigKeyError) and "Did you mean" not in line:
            line += _elsewhere(key, values, config_class)
        raise InputError(line) from error
    return cast(T, built)


def _elsewhere(key: str, values: dict[str, Json], config_class: type) -> str:
    """Say where else a key has a value: `teacher.training.epochs` if `teacher.epochs` is given."""
    above, _, name = key.rpartition(".")
    places = [place for place in _places(name, values) if _is_known(place, config_class)]
    below = [place for place in places if place.startswith(f"{above}.")]
    return f"; did you mean {' or '.join(below or places)}?" if places else ""


def _is_known(key: str, config_class: type) -> bool:
    """Return whether a config has a field at a key, whatever its type."""
    part: Json = None
    for name in reversed(key.split(".")):
        part = {name: part}
    try:
        OmegaConf.merge(OmegaConf.structured(config_class), _config(part))
    except OmegaConfBaseException as error:
        return not isinstance(error, ConfigKeyError)
    return True


def _places(name: str, values: dict[str, Json], above: str = "") -> Iterator[str]:
    """Yield the places of a key in nested values, with dots between the names."""
    for key, value in values.items():
        if key == name:
            yield f"{above}{key}"
        if isinstance(value, dict):
            yield from _places(name, value, f"{above}{key}.")


def _without_nothing(values: dict[str, Json]) -> dict[str, Json]:
    """Return the same values without sizes of students and components of the truth that are null.

    This takes them away.
    """
    students, truth = values.get("students"), values.get("truth")
    if isinstance(students, dict):
        values = {**values, "students": _given(students)}
    if isinstance(truth, dict) and isinstance(components := truth.get("components"), dict):
        values = {**values, "truth": {**truth, "components": _given(components)}}
    return values


def _given(values: dict[str, Json]) -> dict[str, Json]:
    return {name: value for name, value in values.items() if value is not None}


def _with_own_types(values: dict[str, Json]) -> dict[str, Json]:
    """Return the same values with what is inside each `architecture` as what it says it is.

    Such fields belong to transformers, so that their types are not known here.
    """
    return {
        name: _own_type(value)
        if name == "architecture"
        else _with_own_types(value)
        if isinstance(value, dict)
        else value
        for name, value in values.items()
    }


def _own_type(value: Json) -> Json:
    """Return texts that are numbers, true or false as these, in lists and keys too."""
    if isinstance(value, dict):
        return {name: _own_type(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_own_type(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.lower() in TRUTH_VALUES:
        return TRUTH_VALUES[value.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            number = kind(value)
            return number if math.isfinite(number) else value
    return value


def _with_minutes(values: dict[str, Json], key: str = "") -> dict[str, Json]:
    """Return the same values with every time of a key `..._min` in minutes.

    Args:
        values: a part of a config.
        key: key of the part, with a dot at its end; empty for a whole config.
    """
    return {
        name: _with_minutes(value, f"{key}{name}.")
        if isinstance(value, dict)
        else _minutes(f"{key}{name}", value)
        if isinstance(value, str) and name.endswith("_min")
        else value
        for name, value in values.items()
    }


def _minutes(name: str, text: str) -> Json:
    """Convert a time as sbatch has it to minutes, rounded up; return a number as it is.

    Raises:
        InputError: if it is neither.
    """
    found = DAYS.fullmatch(text) or CLOCK.fullmatch(text)
    if found is None:
        if NUMBER.fullmatch(text):
            return text
        raise InputError(
            f"{name}={text}: expected minutes, or a time as sbatch has it, such as 90, 1:30:00 or "
            "2-0 (two days)"
        )
    parts = {unit: int(part or 0) for unit, part in found.groupdict().items()}
    seconds = sum(SECONDS[unit] * number for unit, number in parts.items())
    return math.ceil(seconds / 60)


TRUTH_VALUES = {"true": True, "false": False}
NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?|[-+]?(inf|nan)", re.IGNORECASE)
DAYS = re.compile(
    r"(?P<days>\d+)-(?P<hours>[01]?\d|2[0-3])(:(?P<minutes>[0-5]?\d))?(:(?P<s>[0-5]?\d))?"
)
"""A time of sbatch that begins with days: D-H, D-H:M or D-H:M:S."""
CLOCK = re.compile(r"((?P<hours>\d+):(?=\d+:))?(?P<minutes>\d+):(?P<s>[0-5]?\d)")
"""A time of sbatch without days: M:S or H:M:S."""
SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "s": 1}


def _value_that_does_not_fit(config_class: type, values: dict[str, Json]) -> str:
    """Return the key of a value of the wrong type, which omegaconf 2.4 omits for some."""
    for key, part in _leaves(values):
        try:
            OmegaConf.merge(OmegaConf.structured(config_class), _config(part))
        except OmegaConfBaseException:
            return key
    return ""


def _leaves(values: dict[str, Json]) -> Iterator[tuple[str, dict[str, Json]]]:
    """Yield every value, as the text `a.b=[...]` and as `values` reduced to that value."""
    for name, value in values.items():
        if isinstance(value, dict):
            for key, part in _leaves(value):
                yield f"{name}.{key}", {name: part}
        else:
            yield f"{name}={value}", {name: value}


def plain(config: RunConfig) -> dict[str, Json]:
    """Return a config as JSON-ready values; `build` is the inverse."""
    values: dict[str, Json] = dataclasses.asdict(config)
    return values


def merged(values: dict[str, Json], more: dict[str, Json]) -> dict[str, Json]:
    """Merge `more` over plain values, key by key."""
    return _plain(_merge(_config(values), _config(more)))


def to_yaml(config: RunConfig) -> str:
    """Return a config as YAML with every field written out."""
    values = json.loads(json.dumps(plain(config)))
    return str(yaml.dump(values, sort_keys=False, allow_unicode=True))


def from_yaml(text: str) -> dict[str, Json]:
    """Read back the values that `to_yaml` wrote; an empty text has none.

    Raises:
        ValueError: if the text is no YAML.
    """
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def difference(old: Json, new: Json, path: str = "") -> list[str]:
    """Return the fields in which two plain configs differ, as lines `a.b: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line
            for key in keys
            for line in difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"{path}: {old} -> {new}"]


def _merge(*parts: DictConfig) -> DictConfig:
    try:
        return cast(DictConfig, OmegaConf.merge(*parts))
    except (OmegaConfBaseException, TypeError) as error:
        raise InputError(_one_line(error)) from error


def _added(name: str, before: list[str]) -> DictConfig | None:
    """Load a preset that is added to those before it; None if it is no such preset."""
    bases = added_names().get(name)
    if bases is None:
        return None
    base = next((word for word in reversed(before) if word in bases), None)
    if base is None:
        raise InputError(
            f"{name}: is added to another preset; expected one of {', '.join(bases)} before it, "
            f"such as {bases[0]} {name}"
        )
    return _load(CONFIGS_DIR / name / f"{base}.yaml")


def _preset(name: str, trail: tuple[str, ...] = ()) -> DictConfig:
    if name not in preset_names():
        from difflib import get_close_matches

        names = preset_names() + [
            f"{base} {more}" for more, to in added_names().items() for base in to
        ]
        close = get_close_matches(name, [*preset_names(), *added_names()], n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise InputError(f"no preset {name!r}; expected one of {', '.join(names)}.{hint}")
    if name in trail:
        raise InputError(f"configs/{name}.yaml: extends itself through {' > '.join(trail)}")
    loaded = _load(CONFIGS_DIR / f"{name}.yaml")
    base = loaded.pop("extends", None)
    if base is None:
        return loaded
    try:
        return _merge(_preset(str(base), (*trail, name)), loaded)
    except InputError as error:
        raise InputError(f"configs/{name}.yaml: extends {base}: {error}") from error


def _load(path: Path) -> DictConfig:
    try:
        loaded = yaml.load(path.read_text("utf-8"), _TextLoader)  # noqa: S506 (a safe loader)
        if isinstance(loaded, dict):
            return _config(loaded)
    except (yaml.YAMLError, ValueError, OSError, OmegaConfBaseException) as error:
        raise InputError(f"{path}: not readable YAML: {' '.join(str(error).split())}") from error
    kinds = {list: "a list", type(None): "nothing"}
    raise InputError(f"{path}: expected keys and values, got {kinds.get(type(loaded), 'one text')}")


def _dotlist(overrides: list[str]) -> DictConfig:
    merged = OmegaConf.create()
    for text in overrides:
        key, _, typed = text.partition("=")
        names = [name.strip() for name in key.split(".")]
        if not all(names) or "[" in key:
            raise InputError(
                f"{text!r}: expected key=value; a list is given as a whole, such as taus=[1.0,0.8]"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError(f"{key}: its value is not UTF-8; expected text")
        try:
            value: Json = _typed_value(typed.strip())
            for name in reversed(names):
                value = {name: value}
            merged = _merge(merged, _config(value))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            message = " ".join(str(error).split())
            raise InputError(f"{text}: {message}; expected key=value with a YAML value") from error
    return merged


def _typed_value(text: str) -> Json:
    """Read a typed value: a list, keys, or a quoted text is YAML; anything else is text."""
    if text in NOTHING:
        return None
    return yaml.load(text, _TextLoader) if text.startswith(QUOTED) else text  # noqa: S506


class _TextLoader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML is untyped here
    """Reads YAML whose plain scalars are texts, but for null; a key may be given once."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as the base class has it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Json]:
        names = [key.value for key, _ in node.value if not key.tag.endswith(":merge")]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {name}", node.start_mark
                )
        return cast(dict[str, Json], super().construct_mapping(node, deep=deep))


def _config(values: Json) -> DictConfig:
    return cast(DictConfig, OmegaConf.create(_each_text(values, _hidden)))


def _plain(config: DictConfig) -> dict[str, Json]:
    return cast(dict[str, Json], _revealed(OmegaConf.to_container(config)))


def _revealed(value: T) -> T:
    """Give texts their `$` back."""
    return _each_text(value, lambda text: REVEAL.sub(lambda found: found[1] or "$", text))


def _hidden(text: str) -> str:
    return text.replace(ESCAPE, ESCAPE * 2).replace(DOLLAR, ESCAPE + DOLLAR).replace("$", DOLLAR)


REVEAL = re.compile(f"{ESCAPE}(.)|{DOLLAR}", re.DOTALL)


def _each_text(value: T, change: Callable[[str], str]) -> T:
    """Return the same lists, keys and dataclasses with every text in them changed."""
    changed: object = value
    if isinstance(value, str):
        changed = change(value)
    elif isinstance(value, dict):
        changed = {_each_text(k, change): _each_text(v, change) for k, v in value.items()}
    elif isinstance(value, list | tuple):
        changed = type(value)(_each_text(item, change) for item in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        items = {name: _each_text(getattr(value, name), change) for name in names}
        changed = dataclasses.replace(value, **items)
    return cast(T, changed)


def _one_line(error: Exception, key: str = "") -> str:
    """Return the first line of omegaconf's message, without its jargon."""
    key = key or getattr(error, "full_key", None) or ""
    message = _revealed(str(error).split("\n")[0])
    if "$VALUE" in message:  # omegaconf 2.4 leaves its placeholder for items of a tuple
        message = f"expected every item to be a {message.rpartition(' ')[2]}"
    elif "Incompatible value 'None'" in message:
        value_type = message.partition("of type ")[2].strip("'")
        message = f"no value is given; expected a value of type {value_type}"
    elif "is not Optional" in message:
        message = "no value is given; expected one"
    elif "incompatible container types" in message:
        message = "a list is given instead of keys, or the reverse; expected the form in configs/"
    elif "is not a TupleConfig" in message:
        message = "expected a list, such as [1.0,0.8]"
    elif "is not a subclass of" in message:
        of, _, typed = message.rpartition(" subclass of ")[2].partition(". value: ")
        message = f"{typed} is given; expected keys, those of {of} in kdhpc/config"
    elif "type hint length" in message:
        message = f"expected {message.rpartition(' ')[2]} items"
    return f"{key}: {message}" if key else message
