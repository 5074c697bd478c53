"""World Models' settings under the names of torchwm and ctallec/world-models.

Theirs are flags of one command and fields of three configurations, whose names repeat: a bare
`learning_rate` could be V's or M's, so those are known with the part in front (`vae.learning_rate`,
`mdrnn.learning_rate`, or the class: `WMVAEConfig.learning_rate`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastwm.settings import Bare

# (needed key, what was expected, function); `config_aliases` makes a Convert of each.
Conversion = tuple[str, str, Callable[[Any], dict[str, Any]]]


def _switched(value: Any) -> bool:
    return True if isinstance(value, Bare) else {"true": True, "false": False}[str(value).lower()]


def _task(value: Any) -> dict[str, Any]:
    """A gym id: the tasks that we know by their own names, any other through gymnasium."""
    known = {
        "CarRacing": "carracing",
        "VizdoomTakeCover": "takecover",
        "DoomTakeCover": "takecover",
    }
    if isinstance(value, Bare):
        raise ValueError(value)
    return {"task": known.get(str(value).partition("-v")[0], f"gymnasium:{value}")}


def _no_samples(value: Any) -> dict[str, Any]:
    return {f"{part}.sample_interval": 0 for part in ("vae", "rnn")} if _switched(value) else {}


def _side(value: Any) -> dict[str, Any]:
    if int(value) != 64:
        raise ValueError(value)
    return {}


TASK: Conversion = ("task", "the id of an environment", _task)
NO_SAMPLES: Conversion = ("vae.sample_interval", "true or false", _no_samples)
SIDE: Conversion = ("vae.latent", "64, the only size of pictures that V sees", _side)

_VAE = {
    "latent_size": "vae.latent",
    "train_batch_size": "vae.batch_size",
    "num_epochs": "vae.epochs",
    "learning_rate": "vae.lr",
    "scheduler_patience": "vae.scheduler_patience",
    "scheduler_factor": "vae.scheduler_factor",
    "early_stopping_patience": "vae.early_stopping_patience",
    "sample_interval": "vae.sample_interval",
    "nosamples": NO_SAMPLES,
    "height": SIDE,
    "width": SIDE,
}
_RNN = {
    "latent_size": "vae.latent",
    "hidden_size": "rnn.hidden",
    "gmm_components": "rnn.mixtures",
    "batch_size": "rnn.batch_size",
    "seq_len": "rnn.batch_length",
    "num_epochs": "rnn.epochs",
    "learning_rate": "rnn.lr",
    "include_reward": "rnn.reward",
    "scheduler_patience": "rnn.scheduler_patience",
    "scheduler_factor": "rnn.scheduler_factor",
    "early_stopping_patience": "rnn.early_stopping_patience",
}
_CTRL = {
    "latent_size": "vae.latent",
    "hidden_size": "rnn.hidden",
    "env_name": TASK,
    "n_samples": "ctrl.samples",
    "pop_size": "ctrl.pop",
    "target_return": "ctrl.target",
    "max_workers": "ctrl.env_threads",
    "time_limit": "ctrl.time_limit",
}
_PARTS = {"vae": _VAE, "mdrnn": _RNN, "ctrl": _CTRL}
_CLASSES = {"WMVAEConfig": _VAE, "WMMDNRNNConfig": _RNN, "WMControllerConfig": _CTRL}
_UNIQUE = (  # fields whose name says whose they are
    "latent_size train_batch_size height width hidden_size gmm_components seq_len include_reward "
    "env_name n_samples pop_size target_return max_workers"
).split()

HA: dict[str, str | Conversion] = {
    "env": TASK,
    "num_rollouts": "collect.episodes",
    "rollout_length": "collect.length",
    "vae_epochs": "vae.epochs",
    "vae_batch_size": "vae.batch_size",
    "vae_lr": "vae.lr",
    "rnn_hidden": "rnn.hidden",
    "rnn_epochs": "rnn.epochs",
    "rnn_batch_size": "rnn.batch_size",
    "rnn_lr": "rnn.lr",
    "ctrl_pop_size": "ctrl.pop",
    "ctrl_samples": "ctrl.samples",
    "ctrl_target": "ctrl.target",
    "ctrl_time_limit": "ctrl.time_limit",
    "ctrl_workers": "ctrl.env_threads",
    "nosamples": NO_SAMPLES,
    # ctallec/world-models
    "n-samples": "ctrl.samples",
    "pop-size": "ctrl.pop",
    "target-return": "ctrl.target",
    "max-workers": "ctrl.env_threads",
    **{name: {**_VAE, **_RNN, **_CTRL}[name] for name in _UNIQUE},
    **{
        f"{part}.{name}": alias
        for part, table in (_PARTS | _CLASSES).items()
        for name, alias in table.items()
        if alias != f"{part}.{name}"
    },
}

REFUSED_HA = {
    "noreload": "a stage goes on from its checkpoint.tar; to begin anew give another --logdir",
    "no_precompute_latents": "stage latents stores mean and variance of every picture, and z is "
    "drawn anew for every batch",
    "precompute_latents": "stage latents always does that",
    "no_amp": "networks run in float32 on a CPU; only V's training uses bfloat16, on CUDA",
    "use_amp": "V's training uses bfloat16 on CUDA by itself",
    "action_size": "the task says it",
    "learning_rate": "of V or of M? --vae.lr or --rnn.lr",
    "batch_size": "of V or of M? --vae.batch_size or --rnn.batch_size",
    "num_epochs": "of V or of M? --vae.epochs or --rnn.epochs",
    "extra": "every setting has a key of its own: --help lists them",
    "display": "progress is a line per epoch and generation; 2>&1 >/dev/null hides it",
}
