"""One setting's value: from text or TOML to the type its schema names, and back to TOML.

`fastwm.config` holds the schema; here is what does not depend on it.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, out of range, or does not fit another one."""


class Bare:
    """What a flag without a value carries: true for a switch, an error for anything else."""

    def __repr__(self) -> str:
        return "none"


BARE = Bare()


def split(argv: Sequence[str]) -> tuple[list[str], dict[str, Any], str | None]:
    """A command line as names, overrides by key (text, or BARE), and the filter of --help."""
    names: list[str] = []
    overrides: dict[str, Any] = {}
    wanted: str | None = None
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            wanted = words.pop(0) if words and not words[0].startswith("--") else ""
        elif word == "--configs":
            while words and not words[0].startswith("--"):
                names.append(words.pop(0))
        elif word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if not equals:
                value = BARE if not words or words[0].startswith("--") else words.pop(0)
            overrides[key] = value
        elif word.startswith("-"):
            raise ConfigError(f"command line: expected --key value, got {word!r}")
        else:
            names.append(word)
    return names, overrides, wanted


def coerce(key: str, value: Any, hint: Any, item: Any, origin: str) -> Any:
    """The value as the type that the key wants."""
    if isinstance(value, Bare):
        if hint is not bool:
            raise ConfigError(f"{key}: expected a value after --{key}, got none")
        return True
    try:
        result = _convert(value, hint)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(
            f"{key}: expected {type_name(hint)}, got {value!r} (from {origin})"
        ) from None
    low, high = item.metadata["low"], item.metadata["high"]
    for number in result if isinstance(result, tuple) else (result,):
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            if (
                number != number
                or (low is not None and number < low)
                or (high is not None and number > high)
            ):
                limits = f">= {low}" if high is None else f"between {low} and {high}"
                raise ConfigError(
                    f"{key}: expected {type_name(hint)} {limits}, got {value!r} (from {origin})"
                )
    return result


def _convert(value: Any, hint: Any) -> Any:
    origin = get_origin(hint)
    if origin is Literal:
        return _one_of(value, get_args(hint))
    if origin in (Union, UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return _convert(value, next(a for a in get_args(hint) if a is not NoneType))
    if origin is tuple:
        return _convert_tuple(value, get_args(hint))
    if hint is bool:
        if isinstance(value, str):
            return {"true": True, "false": False}[_one_of(value.lower(), ("true", "false"))]
        return _one_of(value, (True, False)) if isinstance(value, bool) else _one_of(value, ())
    if isinstance(value, bool):
        raise TypeError
    if hint is int:
        if isinstance(value, str):
            value = int(value) if value.lstrip("+-").isdigit() else float(value)
        if int(value) != value:
            raise ValueError
        return int(value)
    if hint is float:
        return float(value)
    if not isinstance(value, hint):
        raise TypeError
    return value


def _convert_tuple(value: Any, args: tuple[Any, ...]) -> tuple:
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("()[] ").split(",") if part.strip()]
    elif isinstance(value, (int, float)):
        value = [value]
    if args[-1] is not Ellipsis and len(value) != len(args):
        raise ValueError
    return tuple(_convert(part, args[0]) for part in value)


def _one_of(value: Any, choices: tuple) -> Any:
    if value not in choices:
        raise ValueError
    return value


def literal(value: Any) -> Any:
    """The value of a free option: a TOML value, or the text itself."""
    if isinstance(value, Bare):
        return True
    if not isinstance(value, str):
        return value
    try:
        return tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return value


def type_name(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in args)
    if origin in (Union, UnionType):
        return " or ".join("'none'" if a is NoneType else type_name(a) for a in args)
    if origin is tuple:
        count = "" if args[-1] is Ellipsis else f"{len(args)} "
        kind = {int: "integers like 1,2", str: "names like a,b"}.get(args[0], "numbers like 1,2")
        return count + kind
    return {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        dict: "options",
    }[hint]


def unknown(what: str, name: str, known: Sequence[str], origin: str) -> str:
    close = difflib.get_close_matches(name, known, 3, 0.6)
    leaf = name.rpartition(".")[2]
    close += [key for key in known if key.rpartition(".")[2] == leaf and key not in close]
    way = f"did you mean {', '.join(close[:4])}?" if close else "see --help"
    if not close and what != "key":
        way = f"expected one of {', '.join(known)}"
    return f"unknown {what} {name!r} (from {origin}); {way}"


def bare(name: str) -> str:
    return name if name.replace("_", "a").replace("-", "a").isalnum() else json.dumps(name)


def toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(toml(part) for part in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{bare(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def write_toml(flat: Mapping[str, Any]) -> str:
    """Dotted keys and values as a TOML file with one table per group."""
    tables: dict[str, list[str]] = {"": []}
    for key, value in flat.items():
        group, _, name = key.rpartition(".")
        if isinstance(value, dict):
            tables[key] = [f"{bare(k)} = {toml(v)}" for k, v in value.items()]
        else:
            tables.setdefault(group, []).append(f"{name} = {toml(value)}")
    lines = tables.pop("")
    for group, entries in tables.items():
        if entries:
            lines += ["", f"[{group}]", *entries]
    return "\n".join(lines) + "\n"
