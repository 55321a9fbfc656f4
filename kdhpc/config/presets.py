"""Turn the words of a command line into a config, and a config into plain data.

A bare word names a preset in `configs/`, which may extend another with `extends:`; `a.b=value` is
an override. Later words win. This is the only module that imports omegaconf.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kdhpc.config.run import RunConfig
from kdhpc.errors import InputError
from kdhpc.types import Json

CONFIGS_DIR = Path(__file__).resolve().parents[2] / "configs"

T = TypeVar("T")


def preset_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS_DIR.glob("*.yaml"))


def cluster_names() -> list[str]:
    return sorted(path.stem for path in (CONFIGS_DIR / "cluster").glob("*.yaml"))


def compose(words: list[str]) -> dict[str, Json]:
    """Merge presets from left to right, then the cluster's YAML, then overrides.

    Raises:
        InputError: if a preset or cluster is unknown, YAML is unreadable, or an override is
            malformed.
    """
    presets = [word for word in words if "=" not in word]
    overrides = _dotlist([word for word in words if "=" in word])
    merged = OmegaConf.create()
    for name in presets:
        merged = _merge(merged, _preset(name))
    try:
        cluster = str(OmegaConf.select(_merge(merged, overrides), "cluster", default="auto"))
    except OmegaConfBaseException as error:
        raise InputError(_one_line(error)) from error
    if cluster != "auto":
        path = CONFIGS_DIR / "cluster" / f"{cluster}.yaml"
        if cluster not in cluster_names():
            raise InputError(
                f"cluster={cluster}: no file {path}; expected auto or one of "
                f"{', '.join(cluster_names())}"
            )
        merged = _merge(merged, _load(path))
    values = OmegaConf.to_container(_merge(merged, overrides))
    return cast(dict[str, Json], values)


def build(config_class: type[T], values: dict[str, Json]) -> T:
    """Build a frozen config from plain values.

    Raises:
        InputError: if a key is unknown, or a value is missing or has the wrong type.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(config_class), OmegaConf.create(values))
        built = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or _list_that_does_not_fit(config_class, values)
        raise InputError(_one_line(error, key)) from error
    return cast(T, built)


def _list_that_does_not_fit(config_class: type, values: dict[str, Json]) -> str:
    """Return the key of a list with an item of the wrong type, which omegaconf 2.4 omits."""
    for key, part in _lists(values):
        try:
            OmegaConf.merge(OmegaConf.structured(config_class), OmegaConf.create(part))
        except OmegaConfBaseException:
            return key
    return ""


def _lists(values: dict[str, Json]) -> Iterator[tuple[str, dict[str, Json]]]:
    """Yield every list, as the text `a.b=[...]` and as `values` reduced to that list."""
    for name, value in values.items():
        if isinstance(value, dict):
            for key, part in _lists(value):
                yield f"{name}.{key}", {name: part}
        elif isinstance(value, list):
            yield f"{name}={value}", {name: value}


def plain(config: RunConfig) -> dict[str, Json]:
    """Return a config as JSON-ready values; `build` is the inverse."""
    values: dict[str, Json] = dataclasses.asdict(config)
    return values


def merged(values: dict[str, Json], more: dict[str, Json]) -> dict[str, Json]:
    """Merge `more` over plain values, key by key."""
    combined = OmegaConf.to_container(_merge(OmegaConf.create(values), OmegaConf.create(more)))
    return cast(dict[str, Json], combined)


def to_yaml(config: RunConfig) -> str:
    """Return a config as YAML with every field written out."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


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


def _preset(name: str, trail: tuple[str, ...] = ()) -> DictConfig:
    if name not in preset_names():
        from difflib import get_close_matches

        close = get_close_matches(name, preset_names(), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise InputError(f"no preset {name!r}; expected one of {', '.join(preset_names())}.{hint}")
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
        loaded = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as error:
        raise InputError(f"{path}: not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{path}: expected keys and values, got a list")
    return loaded


def _dotlist(overrides: list[str]) -> DictConfig:
    merged = OmegaConf.create()
    for text in overrides:
        key = text.partition("=")[0].strip()
        if not key or "[" in key:
            raise InputError(
                f"{text!r}: expected key=value; a list is given as a whole, such as taus=[1.0,0.8]"
            )
        try:
            merged = _merge(merged, OmegaConf.from_dotlist([text]))
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            raise InputError(f"{text}: {error}; expected key=value with a YAML value") from error
    return merged


def _one_line(error: Exception, key: str = "") -> str:
    """Return the first line of omegaconf's message, without its jargon."""
    key = key or getattr(error, "full_key", None) or ""
    message = str(error).split("\n")[0]
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
    elif "type hint length" in message:
        message = f"expected {message.rpartition(' ')[2]} items"
    return f"{key}: {message}" if key else message
