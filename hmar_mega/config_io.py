"""Reading configurations: YAML files with includes, `key=value` overrides that win over them, clear errors.

`load_config("demo", ["optim.base_lr=2e-4"])` reads configs/demo.yaml (with the files its `include` list names, earlier
ones first) and applies the overrides. Unknown keys are errors that name the nearest known key.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from hmar_mega.config import Config
from hmar_mega.errors import UserError


class ConfigError(UserError):
    """A configuration that cannot be used; the message says what was given, what is allowed and what to do."""


def load_config(name_or_path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a configuration.

    Args:
        name_or_path: a YAML file, or the name of a packaged one (`demo`, `train/d16-256`); None: only defaults.
        overrides: `section.key=value` strings, values in YAML; they win over the file.

    Raises:
        ConfigError: for an unknown file, key or value.
    """
    tree = _read_yaml(_find(name_or_path), seen=()) if name_or_path is not None else {}
    for text in overrides:
        _apply_override(tree, text)
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Validate a nested mapping into a `Config`; ConfigError says which key is wrong and how to mend it."""
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as err:
        raise ConfigError("\n".join(_explain(e) for e in err.errors())) from None


def config_to_yaml(config: Config) -> str:
    """The full configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)


def packaged_configs() -> list[str]:
    """The names `load_config` knows without a path, sorted; cluster descriptions are no configurations of runs."""
    root = Path(str(resources.files("hmar_mega.configs")))
    names = (p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("cluster/"))


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return path
    packaged = Path(str(resources.files("hmar_mega.configs"))) / f"{str(name_or_path).removesuffix('.yaml')}.yaml"
    if packaged.is_file():
        return packaged
    close = difflib.get_close_matches(str(name_or_path), packaged_configs(), n=3, cutoff=0.3) or packaged_configs()
    raise ConfigError(
        f"no config {str(name_or_path)!r}: not a .yaml file, and not a packaged one; nearest: {', '.join(close)}"
    )


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path} includes itself through {' → '.join(p.name for p in seen)}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise ConfigError(f"cannot read {path}: {err}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping of sections, not {type(tree).__name__}")
    includes = tree.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise ConfigError(f"include of {path} must be a config name or a list of them, not {includes!r}")
    merged: dict[str, Any] = {}
    for name in includes:
        beside = path.parent / name
        _merge(merged, _read_yaml(beside if beside.is_file() else _find(name), (*seen, path.resolve())))
    _merge(merged, tree)
    return merged


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> None:
    for key, value in top.items():
        if value is None and key in Config.model_fields:
            base.setdefault(key, {})  # a section with nothing but comments
        elif isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value


def _apply_override(tree: dict[str, Any], text: str) -> None:
    key, eq, raw = text.partition("=")
    if not eq or not key.strip():
        raise ConfigError(f"override {text!r} is not of the form section.key=value, for example optim.base_lr=1e-4")
    try:
        value = yaml.safe_load(raw) if raw else None
    except yaml.YAMLError as err:
        raise ConfigError(f"override {text!r}: the value is not YAML ({str(err).splitlines()[0]})") from None
    if isinstance(value, str):
        value = _number(value)
    *parents, last = key.strip().split(".")
    node = tree
    for parent in parents:
        if not isinstance(node.setdefault(parent, {}), dict):
            raise ConfigError(f"override {text!r}: {parent} is a value, not a section")
        node = node[parent]
    node[last] = value


def _number(text: str) -> str | float:
    """YAML 1.1 reads 1e-4 as a string; users mean a number."""
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text


def _explain(error: Any) -> str:
    path = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path, list(known_keys()), n=1, cutoff=0.4)
        last = str(error["loc"][-1])
        same_name = [k for k in known_keys() if k.rsplit(".", 1)[-1] == last]
        hint = (same_name or near or [""])[0]
        return f"unknown key {path}" + (
            f"; did you mean {hint}?" if hint else "; see --print-config for the known keys"
        )
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {message}" if path else message
    if error["type"] == "literal_error":
        return f"{path}={error['input']!r}: allowed are {message.removeprefix('Input should be ')}"
    return f"{path}={error['input']!r}: {message[0].lower()}{message[1:]}"


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree; what is a list, such as `data.mix`, is given as a whole."""
    for name, field in section.model_fields.items():
        yield prefix + name
        is_list = get_origin(field.annotation) is tuple
        for kind in () if is_list else (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from known_keys(kind, f"{prefix}{name}.")
