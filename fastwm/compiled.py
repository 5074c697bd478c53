"""Parts of an update under torch.compile, with a way back to running as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch


class CompiledParts:
    """Methods of one object, compiled on first use, until something fails that works without.

    Args: owner: the object. names: of its methods; instance attributes of these names take their
    place. Shapes are fixed: every batch shape is compiled anew.
    """

    def __init__(self, owner: Any, names: Sequence[str]) -> None:
        self.owner, self.names = owner, tuple(names)
        for name in self.names:
            setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))

    def __call__(self, function: Callable[[], Any]) -> Any:
        """function(), which uses the parts; once more without torch.compile where that fails.

        The backward pass is compiled when it first runs, so `function` holds it too, and leaves
        nothing behind that running it again would count twice.
        """
        if not self.names or _capturing():  # what is recorded ran before
            return function()
        try:
            return function()
        except Exception as error:  # compilers fail with errors of any type
            self.remove()
            result = function()
            cause = (str(error).strip().splitlines() or [""])[0]
            warnings.warn(
                f"fastwm: torch.compile failed ({type(error).__name__}: {cause}); updates run "
                "without it. --compile off silences this",
                RuntimeWarning,
                stacklevel=2,
            )
            return result

    def remove(self) -> None:
        """The methods as they were."""
        for name in self.names:
            delattr(self.owner, name)
        self.names = ()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
