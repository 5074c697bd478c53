"""World models for reinforcement learning in PyTorch, at the speed of the hardware."""

from importlib import import_module

__version__ = "0.1.0"

# Public names, and where they live. Loaded when asked for, so that `--help` needs no torch.
_LAZY = {
    "load_policy": "fastwm.agents.policy",
    "DreamerAgent": "fastwm.agents.dreamer",
    "Replay": "fastwm.replay",
    "Space": "fastwm.spaces",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastwm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
