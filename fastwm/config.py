"""The settings of a run: the schema with every default, and the loader.

A run is `python -m fastwm.train ALGORITHM [PRESET ...] [--dotted.key value ...]`. Values stack from
left to right: the defaults below, each preset (a TOML file that holds only differences), then the
flags. What is resolved is written to the run folder as a TOML file that is itself a valid preset.
Needs the standard library only.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

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


def _key(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    fixed: bool = False,
) -> Any:
    """A field. `fixed`: a run folder that was started with another value cannot be continued."""
    limits = {"help": help, "low": low, "high": high, "fixed": fixed}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=limits)
    return field(default=default, metadata=limits)


def _group(schema: type) -> Any:
    return field(default_factory=schema)


@dataclass(frozen=True)
class Env:
    action_repeat: int | None = _key(
        None, "frames per decision; none: as usual for the task", 1, fixed=True
    )
    size: tuple[int, int] = _key((64, 64), "image height and width, pixels", 1, fixed=True)
    options: dict = _key({}, "anything else for the adapter: --env.options.NAME VALUE", fixed=True)


@dataclass(frozen=True)
class Replay:
    capacity: int = _key(5_000_000, "rows kept, all envs together", 1, fixed=True)
    online: bool = _key(True, "feed every fresh row once before sampling uniformly")
    storage: Literal["ram", "mmap"] = _key("ram", "where the rows lie")
    save: bool = _key(True, "put the replay into the checkpoints, so that a run resumes exactly")
    force: bool = _key(False, "start even if the rows at capacity do not fit the free memory")


@dataclass(frozen=True)
class Encoder:
    depth: int = _key(64, "channels of the first convolution, before mults", 1, fixed=True)
    mults: tuple[int, ...] = _key((2, 3, 4, 4), "channels per stage, times depth", 1, fixed=True)
    layers: int = _key(3, "dense layers for vector observations", 1, fixed=True)
    units: int = _key(1024, "width of the dense layers", 1, fixed=True)
    kernel: int = _key(5, "convolution kernel, pixels", 1, fixed=True)
    symlog: bool = _key(True, "symlog vector observations first", fixed=True)


@dataclass(frozen=True)
class Decoder:
    depth: int = _key(64, "channels of the last convolution, before mults", 1, fixed=True)
    mults: tuple[int, ...] = _key((2, 3, 4, 4), "channels per stage, times depth", 1, fixed=True)
    layers: int = _key(3, "dense layers for vector observations", 1, fixed=True)
    units: int = _key(1024, "width of the dense layers", 1, fixed=True)
    kernel: int = _key(5, "convolution kernel, pixels", 1, fixed=True)
    bspace: int = _key(8, "blocks of the linear map from deter to the first image", 1, fixed=True)
    outscale: float = _key(1.0, "scale of the last layer's initial weights", 0)


@dataclass(frozen=True)
class RSSM:
    deter: int = _key(8192, "size D of the deterministic state", 1, fixed=True)
    hidden: int = _key(1024, "width U of the layers around it", 1, fixed=True)
    stoch: int = _key(32, "categorical groups S of the stochastic state", 1, fixed=True)
    classes: int = _key(64, "classes K per group", 2, fixed=True)
    blocks: int = _key(8, "blocks G of the block-diagonal GRU; they divide deter", 1, fixed=True)
    dynlayers: int = _key(1, "hidden layers before the GRU", 1, fixed=True)
    obslayers: int = _key(1, "layers of the posterior", 1, fixed=True)
    imglayers: int = _key(2, "layers of the prior", 1, fixed=True)
    unimix: float = _key(0.01, "share of the uniform distribution in every categorical", 0, 1)
    free_nats: float = _key(1.0, "KL below which its loss is constant, nats", 0)


@dataclass(frozen=True)
class Reward:
    layers: int = _key(1, "dense layers", 1, fixed=True)
    units: int = _key(1024, "width", 1, fixed=True)
    bins: int = _key(255, "bins of the two-hot distribution", 2, fixed=True)
    outscale: float = _key(0.0, "scale of the last layer's initial weights", 0)


@dataclass(frozen=True)
class Cont:
    layers: int = _key(1, "dense layers", 1, fixed=True)
    units: int = _key(1024, "width", 1, fixed=True)
    outscale: float = _key(1.0, "scale of the last layer's initial weights", 0)


@dataclass(frozen=True)
class Actor:
    layers: int = _key(3, "dense layers", 1, fixed=True)
    units: int = _key(1024, "width", 1, fixed=True)
    outscale: float = _key(0.01, "scale of the last layer's initial weights", 0)
    unimix: float = _key(0.01, "share of the uniform distribution, discrete actions", 0, 1)
    min_std: float = _key(0.1, "smallest standard deviation, continuous actions", 0)
    max_std: float = _key(1.0, "largest standard deviation, continuous actions", 0)


@dataclass(frozen=True)
class Critic:
    layers: int = _key(3, "dense layers", 1, fixed=True)
    units: int = _key(1024, "width", 1, fixed=True)
    bins: int = _key(255, "bins of the two-hot distribution", 2, fixed=True)
    outscale: float = _key(0.0, "scale of the last layer's initial weights", 0)
    slow_rate: float = _key(0.02, "share of the critic that its slow copy takes per step", 0, 1)
    slow_every: int = _key(1, "updates between steps of the slow copy", 1)
    slow_reg: float = _key(1.0, "weight of the loss towards the slow copy", 0)


@dataclass(frozen=True)
class Loss:
    rec: float = _key(1.0, "weight of every reconstruction loss", 0)
    rew: float = _key(1.0, "weight of the reward loss", 0)
    con: float = _key(1.0, "weight of the continuation loss", 0)
    dyn: float = _key(1.0, "weight of the KL that trains the prior", 0)
    rep: float = _key(0.1, "weight of the KL that trains the posterior", 0)
    policy: float = _key(1.0, "weight of the policy loss", 0)
    value: float = _key(1.0, "weight of the value loss in imagination", 0)
    repval: float = _key(0.3, "weight of the value loss on replayed rows", 0)


@dataclass(frozen=True)
class Retnorm:
    rate: float = _key(0.01, "share of the newest percentiles in the running ones", 0, 1)
    limit: float = _key(1.0, "smallest divisor of the advantage, reward units", 0)
    low: float = _key(5.0, "lower percentile", 0, 100)
    high: float = _key(95.0, "upper percentile", 0, 100)


@dataclass(frozen=True)
class Optim:
    lr: float = _key(4e-5, "learning rate", 0)
    agc: float = _key(0.3, "largest gradient, relative to its parameter's norm; 0: no clipping", 0)
    pmin: float = _key(1e-3, "smallest parameter norm that the clipping assumes", 0)
    eps: float = _key(1e-20, "added to the gradient's second moment", 0)
    beta1: float = _key(0.9, "decay of the momentum", 0, 1)
    beta2: float = _key(0.999, "decay of the second moment", 0, 1)
    weight_decay: float = _key(0.0, "decay of weight matrices per unit of learning rate", 0)
    nesterov: bool = _key(False, "look-ahead momentum")
    warmup: int = _key(1000, "updates over which the learning rate rises from 0", 0)
    schedule: Literal["const", "linear", "cosine"] = _key("const", "after the warm-up")
    anneal: int = _key(0, "updates until the schedule reaches a tenth of lr; const: 0", 0)


@dataclass(frozen=True)
class Eval:
    every: int = _key(10_000, "env_steps between evaluations; 0: none", 0)
    episodes: int = _key(10, "episodes per evaluation", 1)
    envs: int = _key(4, "environments that play them in parallel", 1)
    mode: Literal["greedy", "sample"] = _key("greedy", "how actions are chosen")
    stop_at: float | None = _key(None, "mean evaluation return that ends the run; none: never")


@dataclass(frozen=True)
class Log:
    every: int = _key(1000, "env_steps between rows of metrics.jsonl", 1)
    every_s: float = _key(0.5, "seconds between refreshes of the progress bar; 0: no bar", 0)
    tensorboard: bool = _key(True, "write TensorBoard events")
    video_every: int = _key(10_000, "env_steps between open-loop videos, image tasks; 0: none", 0)


@dataclass(frozen=True)
class Checkpoint:
    every: int = _key(10_000, "env_steps between latest.pt; 0: only at the end", 0)
    best: bool = _key(True, "keep best.pt, the highest mean evaluation return")


@dataclass(frozen=True)
class DreamerConfig:
    """DreamerV3. The defaults are those of the reference's newest version."""

    algorithm: str = _key("dreamerv3", "what trains", fixed=True)
    task: str = _key(
        "cartpole",
        "cartpole, atari_pong, dmc_walker_walk, envpool:ID, gymnasium:ID, package.module:factory",
        fixed=True,
    )
    logdir: str = _key("", "run folder; empty: runs/<algorithm>-<task>-<time>")
    seed: int = _key(0, "of networks, actions, sampling and environments", 0, fixed=True)
    device: Literal["auto", "cpu", "cuda"] = _key("auto", "where networks run")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _key("auto", "of matrix products")
    deterministic: bool = _key(False, "same seed, same machine: same bytes; no times in the log")
    threads: int = _key(0, "CPU threads of PyTorch; 0: PyTorch's choice", 0)
    steps: int = _key(10_000_000_000, "env_steps of the whole run", 0)
    envs: int = _key(16, "environments N stepped together", 1, fixed=True)
    batch_size: int = _key(16, "sequences B per update", 1)
    batch_length: int = _key(64, "rows T per sequence", 1, fixed=True)
    train_ratio: float = _key(32.0, "replayed rows per env_step", 0)
    imag_horizon: int = _key(15, "imagined steps I", 1)
    imag_last: int = _key(0, "imagine from only the last so many rows; 0: from all", 0)
    discount_horizon: float = _key(333.0, "steps; the discount is 1 - 1 / horizon", 1)
    lam: float = _key(0.95, "lambda of the lambda-return", 0, 1)
    actent: float = _key(3e-4, "weight of the policy's entropy", 0)
    contdisc: bool = _key(True, "the continuation head learns the discount too")
    env: Env = _group(Env)
    replay: Replay = _group(Replay)
    encoder: Encoder = _group(Encoder)
    decoder: Decoder = _group(Decoder)
    rssm: RSSM = _group(RSSM)
    reward: Reward = _group(Reward)
    cont: Cont = _group(Cont)
    actor: Actor = _group(Actor)
    critic: Critic = _group(Critic)
    loss: Loss = _group(Loss)
    retnorm: Retnorm = _group(Retnorm)
    optim: Optim = _group(Optim)
    eval: Eval = _group(Eval)
    log: Log = _group(Log)
    checkpoint: Checkpoint = _group(Checkpoint)


SCHEMAS: dict[str, type] = {"dreamerv3": DreamerConfig, "random": DreamerConfig}
DEFAULT_PRESETS = {"dreamerv3": ("cartpole",), "random": ("cartpole",)}  # when none is named


# ---- reading


def load(argv: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """Settings from a command line.

    Args:    argv: `[ALGORITHM] [PRESET ...] [--configs NAME ...] [--key value ...] [--help [WORD]]`
    Returns: (config, origins): a frozen dataclass, and where each dotted key's value came from.
    Raises:  ConfigError with key, value, expected type and origin. SystemExit(0) after --help.
    """
    names, overrides, wanted = split(argv)
    stored = Path(overrides.get("logdir", "")) / "config.toml"
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
        path = find_preset(preset)
        _overlay(values, origins, hints, _flat(_read(path)), f"{path.parent.name}/{path.name}")
    _overlay(values, origins, hints, dict(overrides or {}), "command line")
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


def find_preset(name: str | Path) -> Path:
    """The TOML file of a preset name or path."""
    if name is _EMPTY:
        return _EMPTY
    path = Path(name)
    if path.suffix == ".toml":
        if path.is_file():
            return path
        raise ConfigError(f"preset: expected an existing TOML file, got {str(name)!r}")
    found = preset_folder() / f"{name}.toml"
    if not found.is_file():
        raise ConfigError(unknown("preset", str(name), preset_names(), "command line"))
    return found


def preset_folder() -> Path:
    """configs/, inside the installed package or beside it in a source tree."""
    here = Path(__file__).resolve().parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def preset_names() -> list[str]:
    return sorted(path.stem for path in preset_folder().glob("*.toml"))


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
        if name.endswith(".toml"):
            algorithm = _read(find_preset(name)).get("algorithm")
            if algorithm is not None:
                return str(algorithm), presets
    if presets and presets[0] not in preset_names():
        raise ConfigError(unknown("algorithm", presets[0], list(SCHEMAS), "command line"))
    return "dreamerv3", presets


# ---- schema


def _hints(schema: type, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(dotted key, (type, dataclass field)) of every setting, in order."""
    types = get_type_hints(schema)
    for item in fields(schema):
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
    for key, value in new.items():
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
    if config.rssm.deter % config.rssm.blocks:
        refuse("rssm.deter", f"a multiple of rssm.blocks = {config.rssm.blocks}")
    if config.retnorm.low >= config.retnorm.high:
        refuse("retnorm.low", f"less than retnorm.high = {config.retnorm.high}")
    if config.actor.min_std > config.actor.max_std:
        refuse("actor.min_std", f"at most actor.max_std = {config.actor.max_std}")
    if config.optim.schedule != "const" and config.optim.anneal <= config.optim.warmup:
        refuse("optim.anneal", f"more than optim.warmup = {config.optim.warmup} updates")
    for key, beta in (("optim.beta1", config.optim.beta1), ("optim.beta2", config.optim.beta2)):
        if beta == 1.0:
            refuse(key, "less than 1: the moments are divided by 1 - beta^updates")
    if config.discount_horizon == 1.0:
        refuse("discount_horizon", "more than 1 step: the discount would be 0")
    if config.batch_length < 2:
        refuse("batch_length", "at least 2 rows: the value loss needs a row after the first")
    if config.imag_last == 1:
        refuse("imag_last", "0 or at least 2 rows: the value loss needs a row after the first")
    if config.encoder.kernel % 2 == 0:
        refuse("encoder.kernel", "an odd number")
    if config.decoder.depth * config.decoder.mults[-1] % config.decoder.bspace:
        channels = config.decoder.depth * config.decoder.mults[-1]
        refuse("decoder.bspace", f"a divisor of decoder.depth * decoder.mults[-1] = {channels}")
    if config.replay.capacity < config.envs * (config.batch_length + 1):
        refuse(
            "replay.capacity",
            f"at least envs * (batch_length + 1) = {config.envs * (config.batch_length + 1)}",
        )


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
    if len(lines) == 5:
        lines.append(f"no setting contains {wanted!r}")
    return "\n".join(lines)
