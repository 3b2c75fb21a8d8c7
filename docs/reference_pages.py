"""Reference pages that mkdocs makes while it builds: every setting from the configuration, every option of a command.

A hook of mkdocs.yml. The pages are `reference/settings.md` and `reference/cli.md`; they are never written to disk.
"""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from hmar_mega.cli import build_parser
from hmar_mega.config import Config
from hmar_mega.config_io import packaged_configs
from hmar_mega.planning.cluster import Cluster, packaged_clusters
from hmar_mega.scaling.spec import SweepSpec

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

SETTINGS_INTRO = """# Settings

Every key of a configuration, with its type and default, made from the code that reads it. A file names the keys in
sections; on the command line each is `section.key=value`, with values as in YAML.
`hmar-mega train CONFIG --print-config` prints the whole tree with everything
in place, and an unknown key is an error that names the nearest known one.

Packaged configurations, for CONFIG and `include`: {configs}.
"""

FILES_INTRO = """
## Other files

Two more files are read: the description of a cluster (`--cluster`; packaged ones are {clusters}) and SWEEP.yaml.
"""

CLI_INTRO = """# Command line

Every command with its options, as its `--help` says it. Options named CONFIG take a YAML file or the name of a packaged
configuration, and any `section.key=value` may stand before or after options ([all settings](settings.md)). Exit
statuses are explained under [Troubleshooting](../troubleshooting.md#exit-statuses).
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for path, text in (("reference/settings.md", settings_page()), ("reference/cli.md", cli_page())):
        files.append(File.generated(config, path, content=text))
    return files


def settings_page() -> str:
    """The settings reference as Markdown."""
    parts = [SETTINGS_INTRO.format(configs=", ".join(f"`{name}`" for name in packaged_configs()))]
    for name, field in Config.model_fields.items():
        model = model_of(field)
        assert model is not None, f"{name} is no section"
        parts += section(name, model, level=2)
    parts.append(FILES_INTRO.format(clusters=", ".join(f"`{name}`" for name in packaged_clusters())))
    parts += section("", Cluster, level=3, title="A cluster")
    parts += section("", SweepSpec, level=3, title="SWEEP.yaml")
    return "\n".join(parts)


def section(prefix: str, model: type[BaseModel], level: int, title: str = "") -> Iterator[str]:
    """Heading, docstring and table of a section, then those of the sections inside it."""
    yield f"{'#' * level} {title or f'`{prefix}`'}\n"
    yield f"{(model.__doc__ or '').strip()}\n"
    inner = []
    rows = []
    for name, field in model.model_fields.items():
        nested = model_of(field)
        key = f"{prefix}.{name}" if prefix else name
        if nested is not None and (get_origin(field.annotation) is not dict):
            inner.append((key, nested))
        about = field.description or ""
        if nested is not None:
            about = f"{about}; see `{key}` below".removeprefix("; ")
        rows.append(f"| `{name}` | {type_text(field)} | {default_text(field)} | {cell(about)} |")
    yield "| key | type | default | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    for key, nested in inner:
        yield from section(key, nested, min(level + 1, 4))


def model_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, alone, in a list or optionally; None for plain values."""
    found: list[type[BaseModel]] = []

    def look(kind: Any) -> None:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.append(kind)
        for inner in get_args(kind):
            look(inner)

    look(field.annotation)
    return found[0] if found else None


def type_text(field: FieldInfo) -> str:
    """A field's type with its bounds, in words."""
    bounds = []
    for rule in field.metadata:
        for kind, sign in ((Ge, "≥"), (Gt, ">"), (Le, "≤"), (Lt, "<")):
            if isinstance(rule, kind):
                bounds.append(f"{sign} {getattr(rule, kind.__name__.lower())}")
        if isinstance(rule, MinLen):
            bounds.append(f"at least {rule.min_length}")
    return f"{kind_text(field.annotation)}{' ' + ', '.join(bounds) if bounds else ''}"


def kind_text(kind: Any) -> str:
    """A type in words: `number`, `list of whole numbers`, the choices of a Literal."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return kind_text(args[0])
    if origin is Literal:
        return " · ".join(f"`{value}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(kind_text(part) for part in args if part is not type(None))
    if origin in (tuple, list):
        return f"list of {kind_text(args[0])}"
    if origin is dict:
        return f"mapping of {kind_text(args[1])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "section"
    return {bool: "true or false", int: "integer", float: "number", str: "text"}.get(kind, "any")


def default_text(field: FieldInfo) -> str:
    """The default as YAML would have it; `required` where there is none, a dash where it is nothing."""
    if field.default is PydanticUndefined:
        return "**required**"
    value = field.default
    if value is None or isinstance(value, BaseModel) or value in ("", (), [], {}):
        return "–"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def cell(text: str) -> str:
    """Text that does not break a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def cli_page() -> str:
    """The reference of all commands as Markdown."""
    parts = [CLI_INTRO]
    for name, parser in commands(build_parser()):
        parts.append(f"{'##' if ' ' not in name else '###'} hmar-mega {name}\n")
        parts.append(f"```text\n{plain_help(parser)}```\n")
    return "\n".join(parts)


def commands(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command as it is typed, groups before what they hold."""
    if name:
        yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from commands(inner, f"{name} {word}".strip())


def plain_help(parser: argparse.ArgumentParser) -> str:
    """Help in the columns that a page has, whatever terminal builds it."""
    parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, width=92, max_help_position=28)
    return parser.format_help()
