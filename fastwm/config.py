"""The settings of a run: the loader.

The schemas, with every default, are in `config_common` and one `config_<algorithm>` each.
A run is `python -m fastwm.train ALGORITHM [PRESET ...] [--dotted.key value ...]`. Values stack from
left to right: the defaults below, each preset (a TOML file that holds only differences), then the
flags. What is resolved is written to the run folder as a TOML file that is itself a valid preset.
Needs the standard library only.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from fastwm import config_aliases
from fastwm.config_dreamer import DreamerConfig
from fastwm.config_dreamer_2023 import DreamerConfig2023
from fastwm.config_ha import HaConfig
from fastwm.config_modular import ModularConfig
from fastwm.settings import (
    ConfigError,
    coerce,
    literal,
    split,
    toml,
    type_name,
    unknown,
    write_toml,
)

SCHEMAS: dict[str, type] = {
    "dreamerv3": DreamerConfig,
    "dreamerv3_2023": DreamerConfig2023,
    "ha": HaConfig,
    "modular": ModularConfig,
    "random": DreamerConfig,
}
DEFAULT_PRESETS = {  # when none is named
    "dreamerv3": ("cartpole",),
    "dreamerv3_2023": ("cartpole",),
    "ha": ("ha_carracing",),
    "modular": ("modular_cartpole",),
    "random": ("cartpole",),
}


# ---- reading


def load(argv: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """Settings from a command line.

    Args:    argv: `[ALGORITHM] [PRESET ...] [--configs NAME ...] [--key value ...] [--help [WORD]]`
    Returns: (config, origins): a frozen dataclass, and where each dotted key's value came from.
    Raises:  ConfigError with key, value, expected type and origin. SystemExit(0) after --help.
    """
    names, overrides, wanted = split(argv)
    stored = Path(str(overrides.get("logdir", ""))) / "config.toml"
    if not names and "logdir" in overrides and stored.is_file():  # go on with what that run is
        names = [str(stored)]
    algorithm, presets = _algorithm(names)
    config, origins = resolve(algorithm, presets, overrides)
    if wanted is not None:
        print(describe(config, origins, wanted))
        raise SystemExit(0)
    return config, origins


def resolve(
    algorithm: str, presets: Sequence[str | Path] = (), overrides: Mapping[str, Any] | None = None
) -> tuple[Any, dict[str, str]]:
    """Defaults, then each preset, then overrides by dotted key.

    Args:    algorithm: a key of SCHEMAS. presets: names in configs/ or paths of TOML files; none:
             the algorithm's own (DEFAULT_PRESETS). overrides: dotted key -> value or text.
    Returns: (config, origins), as `load`.
    Raises:  ConfigError.
    """
    if algorithm not in SCHEMAS:
        raise ConfigError(unknown("algorithm", algorithm, list(SCHEMAS), "command line"))
    hints = dict(_hints(SCHEMAS[algorithm]))
    values: dict[str, Any] = {"algorithm": algorithm}
    origins = {key: "default" for key in hints}
    for preset in presets or DEFAULT_PRESETS.get(algorithm, ()):
        path = find_preset(preset, algorithm)
        flat, origin = _flat(_read(path)), f"{path.parent.name}/{path.name}"
        if path.parent == preset_folder():
            _check_fits(path.stem, flat, algorithm)
        _overlay(values, origins, hints, flat, origin)
    _override(values, origins, hints, algorithm, dict(overrides or {}))
    if values["algorithm"] != algorithm:
        raise ConfigError(
            f"algorithm: expected {algorithm!r}, got {values['algorithm']!r} "
            f"(from {origins['algorithm']}); name that algorithm first"
        )
    config = _build(SCHEMAS[algorithm], values)
    _check(config, origins)
    return config, origins


def from_dict(values: Mapping[str, Any]) -> Any:
    """The config that `flatten` or a nested dict of a TOML file describes."""
    flat = _flat(dict(values))
    return resolve(str(flat.get("algorithm", "dreamerv3")), [_EMPTY], flat)[0]


def find_preset(name: str | Path, algorithm: str = "") -> Path:
    """The TOML file of a preset name or path; for `ha` the name debug means ha_debug first."""
    if name is _EMPTY:
        return _EMPTY
    path = Path(name)
    if path.suffix == ".toml":
        if path.is_file():
            return path
        raise ConfigError(f"preset: expected an existing TOML file, got {str(name)!r}")
    own, found = (preset_folder() / f"{n}.toml" for n in (f"{algorithm}_{name}", name))
    if own.is_file():
        return own
    if not found.is_file():
        raise ConfigError(unknown("preset", str(name), preset_names(), "command line"))
    return found


def preset_folder() -> Path:
    """configs/, inside the installed package or beside it in a source tree."""
    here = Path(__file__).resolve().parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def preset_names() -> list[str]:
    return sorted(path.stem for path in preset_folder().glob("*.toml"))


def _fits(tree: Mapping[str, Any], algorithm: str) -> bool:
    """Whether an algorithm has every setting of a preset; options are free."""
    hints = dict(_hints(SCHEMAS[algorithm]))
    options = (f"{key.partition('.options.')[0]}.options" for key in tree if key not in hints)
    return tree.get("algorithm", algorithm) == algorithm and all(key in hints for key in options)


def _check_fits(preset: str, tree: Mapping[str, Any], algorithm: str) -> None:
    """A preset of the package holds no misspelt key: what does not fit is another algorithm's."""
    others = [name for name in SCHEMAS if _fits(tree, name)]
    if algorithm in others or not others:
        return
    trees = ((name, _flat(_read(preset_folder() / f"{name}.toml"))) for name in preset_names())
    mine = [name for name, other in trees if _fits(other, algorithm)]
    raise ConfigError(
        f"preset: expected one for {algorithm}, got {preset!r}, which is for {', '.join(others)}; "
        f"those for {algorithm} are {', '.join(mine)}"
    )


_EMPTY = Path("-")  # a preset without values: switches the default presets off


def _read(path: Path) -> dict[str, Any]:
    if path is _EMPTY:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected TOML, got {error}") from None


def _algorithm(names: list[str]) -> tuple[str, list[str]]:
    """The algorithm among the names, and the presets. A resolved config.toml names its own."""
    found = [name for name in names if name in SCHEMAS]
    if len(found) > 1:
        raise ConfigError(
            f"algorithm: expected one of {', '.join(SCHEMAS)}, got {' and '.join(found)}"
        )
    presets = [name for name in names if name not in SCHEMAS]
    if found:
        return found[0], presets
    for name in presets:
        if name.endswith(".toml") or name in preset_names():
            algorithm = _read(find_preset(name)).get("algorithm")
            if algorithm is not None:
                return str(algorithm), presets
    if presets and not presets[0].endswith(".toml") and presets[0] not in preset_names():
        raise ConfigError(unknown("algorithm", presets[0], list(SCHEMAS), "command line"))
    return "dreamerv3", presets


# ---- schema


def _hints(schema: type, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(dotted key, (type, dataclass field)) of every setting, in order, groups after the others."""
    types = get_type_hints(schema)
    for item in sorted(fields(schema), key=lambda item: is_dataclass(types[item.name])):
        if is_dataclass(types[item.name]):
            yield from _hints(types[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, (types[item.name], item)


def flatten(config: Any) -> dict[str, Any]:
    """Dotted key -> value, in the schema's order."""
    flat: dict[str, Any] = {}
    for key, _ in _hints(type(config)):
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        flat[key] = value
    return flat


def differences(old: Any, new: Any) -> list[tuple[str, Any, Any, bool]]:
    """(key, old value, new value, fixed) of every setting that differs, without logdir."""
    if type(old) is not type(new):
        return [("algorithm", old.algorithm, new.algorithm, True)]
    before, after = flatten(old), flatten(new)
    fixed = {key: item.metadata["fixed"] for key, (_, item) in _hints(type(new))}
    return [
        (key, before[key], after[key], fixed[key])
        for key in after
        if key != "logdir" and before[key] != after[key]
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _overlay(values: dict, origins: dict, hints: dict, new: Mapping[str, Any], origin: str) -> None:
    for key, value in _names_first(new):
        group, _, option = key.partition(".options.")
        if option and f"{group}.options" in hints:
            whole = f"{group}.options"
            values[whole] = {**values.get(whole, {}), option: literal(value)}
            origins[whole] = origin
            continue
        if key not in hints:
            raise ConfigError(unknown("key", key, list(hints), origin))
        if isinstance(value, Mapping):
            values[key] = {**values.get(key, {}), **value}
        else:
            values[key] = coerce(key, value, *hints[key], origin)
        origins[key] = origin
        options = f"{key.removesuffix('.name')}.options"
        if key.endswith(".name") and options in hints:  # another component: not its options
            values.pop(options, None)
            origins[options] = "default"


def _names_first(new: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """A component's name before its options, in whatever order they were given."""
    return sorted(new.items(), key=lambda item: not item[0].endswith(".name"))


def _override(
    values: dict, origins: dict, hints: dict, algorithm: str, new: Mapping[str, Any]
) -> None:
    """Flags, under our names or under those of other code (config_aliases)."""
    names: dict[str, str] = {}
    for name, value in _names_first(new):
        found = config_aliases.translate(algorithm, name, value, hints)
        known = [*hints, *config_aliases.names(algorithm, hints)]
        if found is None and ".options." not in name:
            raise ConfigError(unknown("key", name, known, "command line"))
        for key, converted in ({name: value} if found is None else found).items():
            if key in names:
                raise ConfigError(f"{key}: expected once, got --{names[key]} and --{name}")
            names[key] = name
            origin = "command line" if key == name else f"command line: --{name}"
            _overlay(values, origins, hints, {key: converted}, origin)


def _build(schema: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    types = get_type_hints(schema)
    given: dict[str, Any] = {}
    for item in fields(schema):
        key = prefix + item.name
        if is_dataclass(types[item.name]):
            given[item.name] = _build(types[item.name], values, f"{key}.")
        elif key in values:
            given[item.name] = values[key]
    return schema(**given)


def _check(config: Any, origins: Mapping[str, str]) -> None:
    """What one setting alone cannot say."""

    def refuse(key: str, expected: str) -> None:
        raise ConfigError(
            f"{key}: expected {expected}, got {flatten(config)[key]!r} (from {origins[key]})"
        )

    if not config.task:
        refuse("task", "a task; give --task NAME")
    config.check(refuse)


# ---- writing


def to_toml(config: Any) -> str:
    """The whole config as TOML; a valid preset."""
    return write_toml(flatten(config))


def describe(config: Any, origins: Mapping[str, str], wanted: str = "") -> str:
    """Every setting whose key or meaning contains `wanted`: key, value, type, origin, meaning."""
    lines = [
        "python -m fastwm.train ALGORITHM [PRESET ...] [--dotted.key value ...] [--help [FILTER]]",
        f"algorithms: {' '.join(SCHEMAS)}   (a PRESET may also be the path of a TOML file)",
        f"presets:    {' '.join(preset_names())}",
        f"without a preset: {' '.join(DEFAULT_PRESETS[config.algorithm])}",
        "",
    ]
    flat = flatten(config)
    for key, (hint, item) in _hints(type(config)):
        meaning = item.metadata["help"]
        if wanted.lower() in f"{key} {meaning}".lower():
            kind = type_name(hint).removeprefix("an ").removeprefix("a ")
            lines.append(f"--{key:22} {toml(flat[key]):18} {meaning} [{kind}; {origins[key]}]")
    for name, keys in config_aliases.meanings(config.algorithm, flat) if wanted else ():
        if wanted.lower() in name.lower():
            lines.append(f"--{name:22} the same as --{', --'.join(keys)}")
    if len(lines) == 5:
        lines.append(f"no setting contains {wanted!r}")
    return "\n".join(lines)
