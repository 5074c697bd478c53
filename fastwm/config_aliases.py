"""Settings under the names that other DreamerV3 and World Models code gives them.

The only place where old names live. An alias is our key, several keys that all take the value, or
a Convert where units or meaning differ; `REFUSED` says why some well-known names have no alias. An
alias counts only for algorithms whose schema has its key, and only on the command line.
docs/from_other_repos.md explains where a name comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastwm.config_aliases_ha import HA, REFUSED_HA
from fastwm.settings import ConfigError


@dataclass(frozen=True)
class Convert:
    """value -> {our key: value}. needs: a key that the schema must have. wanted: for the error."""

    function: Callable[[Any], dict[str, Any]]
    needs: str
    wanted: str


Alias = str | tuple[str, ...] | Convert


def _horizon(value: Any) -> dict[str, Any]:
    """A discount per step as the horizon 1 / (1 - discount)."""
    discount = float(value)
    if not 0.0 < discount < 1.0:
        raise ValueError(value)
    return {"discount_horizon": round(1.0 / (1.0 - discount), 6)}


def _episodes(value: Any) -> dict[str, Any]:
    """0 evaluation episodes mean no evaluation."""
    return {"eval.episodes": value} if float(value) else {"eval.every": 0}


def _classes(value: Any) -> dict[str, Any]:
    """0 classes mean normal latents."""
    return {"rssm.classes": value} if float(value) else {"rssm.latent": "normal"}


def _yes(value: Any) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


def _videos(value: Any) -> dict[str, Any]:
    """Videos on: as often as the presets say. Off: never."""
    return {} if _yes(value) else {"log.video_every": 0}


def _amp(value: Any) -> dict[str, Any]:
    return {"precision": "fp16" if _yes(value) else "fp32"}


def _platform(value: Any) -> dict[str, Any]:
    return {"device": {"cpu": "cpu", "cuda": "cuda", "gpu": "cuda"}[value]}


def _dtype(value: Any) -> dict[str, Any]:
    return {"precision": {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[value]}


def _prefixed(prefix: str, group: str, names: str, **renamed: str) -> dict[str, Alias]:
    """`prefix.NAME` -> `group.NAME` for each name, and `prefix.OLD` -> `group.NEW`."""
    same = {f"{prefix}.{name}": f"{group}.{name}" for name in names.split()}
    return same | {f"{prefix}.{old}": f"{group}.{new}" for old, new in renamed.items()}


DISCOUNT = Convert(_horizon, "discount_horizon", "a discount between 0 and 1")
EPISODES = Convert(_episodes, "eval.episodes", "a number of episodes")
CLASSES = Convert(_classes, "rssm.latent", "a number of classes")
VIDEOS = Convert(_videos, "log.video_every", "true or false")
AMP = Convert(_amp, "precision", "true or false")
PLATFORM = Convert(_platform, "device", "one of 'cpu', 'cuda', 'gpu'")
DTYPE = Convert(_dtype, "precision", "one of 'float32', 'bfloat16', 'float16'")

COMMON: dict[str, Alias] = {
    # dreamerv3-torch and what grew from it
    "eval_every": "eval.every",
    "eval_episodes": EPISODES,
    "eval_episode_num": EPISODES,
    "log_every": "log.every",
    "save_every": "checkpoint.every",
    "checkpoint_every": "checkpoint.every",
    "video_pred_log": VIDEOS,
    "deterministic_run": "deterministic",
    "action_repeat": "env.action_repeat",
    "time_limit": "env.time_limit",
    "size": "env.size",
    "grayscale": "env.options.gray",
    "dataset_size": "replay.capacity",
    "prefill": "replay.prefill",
    "pretrain": "replay.pretrain",
    "num_envs": "envs",
    "profile": "log.profile",
    "total_steps": "steps",
    "logging.amp": AMP,
    "amp": AMP,
    # danijar/dreamerv3
    "run.steps": "steps",
    "run.envs": "envs",
    "run.train_ratio": "train_ratio",
    "run.eval_envs": "eval.envs",
    "run.eval_eps": "eval.episodes",
    "replay.size": "replay.capacity",
    "run.from_checkpoint": "from_checkpoint",
    "run.from_checkpoint_regex": "from_checkpoint_regex",
    "offline": "offline_traindir",
    "jax.platform": PLATFORM,
    "jax.compute_dtype": DTYPE,
}

_DREAMER: dict[str, Alias] = {
    "learning_rate": "optim.lr",
    "model_lr": "optim.lr",
    "opt_eps": "optim.eps",
    "weight_decay": "optim.weight_decay",
    "discount": DISCOUNT,
    "gamma": DISCOUNT,
    "discount_lambda": "lam",
    "lambda": "lam",
    "actor_entropy": "actent",
    "dyn_scale": "loss.dyn",
    "rep_scale": "loss.rep",
    "reward_scale": "loss.rew",
    "cont_scale": "loss.con",
    "kl_free": "rssm.free_nats",
    "free_nats": "rssm.free_nats",
    "dyn_deter": "rssm.deter",
    "dyn_hidden": "rssm.hidden",
    "dyn_stoch": "rssm.stoch",
    "dyn_discrete": "rssm.classes",
    "unimix_ratio": "rssm.unimix",
    "action_unimix_ratio": "actor.unimix",
    "units": ("reward.units", "cont.units", "actor.units", "critic.units"),
    "cnn_depth": ("encoder.depth", "decoder.depth"),
    "encoder.cnn_depth": "encoder.depth",
    "decoder.cnn_depth": "decoder.depth",
    "encoder.mlp_units": "encoder.units",
    "decoder.mlp_units": "decoder.units",
    "encoder.mlp_layers": "encoder.layers",
    "decoder.mlp_layers": "decoder.layers",
    "encoder.symlog_inputs": "encoder.symlog",
    "reward_layers": "reward.layers",
    "cont_layers": "cont.layers",
    "actor_layers": "actor.layers",
    "value_layers": "critic.layers",
    "actor_min_std": "actor.min_std",
    "actor_max_std": "actor.max_std",
    "slow_target_fraction": "critic.slow_rate",
    "slow_target_update": "critic.slow_every",
    **{f"expl_{name}": f"expl.{name}" for name in "behavior until extr_scale intr_scale".split()},
    **{
        f"disag_{name}": f"expl.disag_{name}"
        for name in "target models layers units offset log action_cond".split()
    },
    "agent.imag_length": "imag_horizon",
    "agent.imag_last": "imag_last",
    "agent.horizon": "discount_horizon",
    "agent.contdisc": "contdisc",
    "agent.imag_loss.lam": "lam",
    "agent.imag_loss.actent": "actent",
    "agent.imag_loss.slowreg": "critic.slow_reg",
    **_prefixed("agent.loss_scales", "loss", "rec rew con dyn rep policy value repval"),
    **_prefixed(
        "agent.opt",
        "optim",
        "lr agc pmin eps beta1 beta2 nesterov schedule warmup anneal",
        wd="weight_decay",
    ),
    **_prefixed(
        "agent.dyn.rssm",
        "rssm",
        "deter hidden stoch classes blocks dynlayers obslayers imglayers unimix free_nats",
    ),
    **_prefixed("agent.enc.simple", "encoder", "depth mults layers units kernel symlog"),
    **_prefixed("agent.dec.simple", "decoder", "depth mults layers units kernel bspace outscale"),
    **_prefixed("agent.rewhead", "reward", "layers units bins outscale"),
    **_prefixed("agent.conhead", "cont", "layers units outscale"),
    **_prefixed(
        "agent.policy", "actor", "layers units outscale unimix", minstd="min_std", maxstd="max_std"
    ),
    **_prefixed("agent.value", "critic", "layers units bins outscale"),
    **_prefixed("agent.slowvalue", "critic", "", rate="slow_rate", every="slow_every"),
    **_prefixed("agent.retnorm", "retnorm", "rate limit", perclo="low", perchi="high"),
}

_ONE_OPTIMIZER = ("learning_rate", "model_lr", "opt_eps", "weight_decay")
_DREAMER_2023: dict[str, Alias] = {
    **{
        name: alias
        for name, alias in _DREAMER.items()
        if not name.startswith("agent.") and name not in _ONE_OPTIMIZER
    },
    "learning_rate": "optim.model.lr",
    "model_lr": "optim.model.lr",
    "actor_lr": "optim.actor.lr",
    "value_lr": "optim.critic.lr",
    "opt_eps": "optim.model.eps",
    "ac_opt_eps": ("optim.actor.eps", "optim.critic.eps"),
    "grad_clip": "optim.model.clip",
    "training.model_grad_clip": "optim.model.clip",
    "actor_grad_clip": "optim.actor.clip",
    "value_grad_clip": "optim.critic.clip",
    "weight_decay": (
        "optim.model.weight_decay",
        "optim.actor.weight_decay",
        "optim.critic.weight_decay",
    ),
    "imag_gradient": "actor.grad",
    "imag_gradient_mix": "actor.mix",
    "initial": "rssm.initial",
    "dyn_discrete": CLASSES,
    "dyn_mean_act": "rssm.mean",
    "dyn_std_act": "rssm.std",
    "dyn_min_std": "rssm.min_std",
    "decoder.cnn_sigmoid": "decoder.sigmoid",
}

_HA: dict[str, Alias] = {
    name: Convert(alias[2], alias[0], alias[1]) if isinstance(alias, tuple) else alias
    for name, alias in HA.items()
}

ALIASES: dict[str, dict[str, Alias]] = {
    "dreamerv3": COMMON | _DREAMER,
    "dreamerv3_2023": COMMON | _DREAMER_2023,
    "random": COMMON | _DREAMER,
    "ha": COMMON | _HA,
}  # an algorithm that is not named here has COMMON

VALUES: dict[str, dict[str, str]] = {  # spellings of values, under our own keys
    "precision": {"32": "fp32", "16": "fp16"},
    "device": {"cuda:0": "cuda"},
    "compile": {"True": "full", "true": "full", "False": "off", "false": "off"},
}

REFUSED: dict[str, str] = {
    "run.log_every": "it counts seconds there; --log.every counts env_steps",
    "run.report_every": "it counts seconds there; --log.video_every counts env_steps",
    "run.save_every": "it counts seconds there; --checkpoint.every counts env_steps",
    "value_lr": "one optimizer trains all parts: --optim.lr",
    "actor_lr": "one optimizer trains all parts: --optim.lr",
    "grad_clip": "--optim.agc bounds each gradient relative to its parameter's norm",
    "imag_gradient": "reinforce trains the policy; dreamerv3_2023 has others",
    "compile": "of the algorithms here dreamerv3 has it",
    "run.duration": "give --steps, or stop the run with Ctrl-C: it goes on where it stopped",
    "model.rssm.kl_beta": "give --loss.dyn and --loss.rep, the weights of its two halves",
    "kl_beta": "give --loss.dyn and --loss.rep, the weights of its two halves",
    "run.debug": "environments never step in the main process here; leave it out",
    "parallel": "envpool steps in parallel by itself; --env.options.parallel true gives every "
    "gymnasium environment its own process",
    "debug": "it is a preset: --configs debug",
}


def table(algorithm: str) -> Mapping[str, Alias]:
    """The aliases of an algorithm."""
    return ALIASES.get(algorithm, COMMON)


def names(algorithm: str, known: Mapping[str, Any]) -> list[str]:
    """Aliases whose keys all are in `known`, for suggestions."""
    return [name for name, alias in table(algorithm).items() if _fits(alias, known)]


def meanings(algorithm: str, known: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(alias, our keys) of every alias whose keys are known."""
    for name, alias in table(algorithm).items():
        if _fits(alias, known):
            if isinstance(alias, Convert):
                yield name, (alias.needs,)
            else:
                yield name, (alias,) if isinstance(alias, str) else alias


def translate(
    algorithm: str, name: str, value: Any, known: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Our keys and values for an old name; None where there is no such alias.

    Raises: ConfigError for a value that cannot be converted, and for the names in REFUSED.
    """
    if name in known:
        return {name: VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value}
    alias = table(algorithm).get(name)
    if alias is None or not _fits(alias, known):
        refused = REFUSED | (REFUSED_HA if algorithm == "ha" else {})
        if name in refused:
            raise ConfigError(
                f"{name}: expected a setting of {algorithm}, got one of other code; {refused[name]}"
            )
        return None
    if isinstance(alias, str):
        return {alias: value}
    if isinstance(alias, tuple):
        return dict.fromkeys(alias, value)
    try:
        return alias.function(value)
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{name}: expected {alias.wanted}, got {value!r} (from command line)"
        ) from None


def _fits(alias: Alias, known: Mapping[str, Any]) -> bool:
    """Whether every key that the alias stands for is one of the schema's."""
    if isinstance(alias, Convert):
        return alias.needs in known
    keys = (alias,) if isinstance(alias, str) else alias
    return all(key in known or key.partition(".options.")[0] + ".options" in known for key in keys)
