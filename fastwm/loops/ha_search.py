"""CMA-ES over the controller's parameters, by the package `cma`, that stops and goes on exactly."""

from __future__ import annotations

import io
import pickle
import warnings
from typing import Any

import numpy as np

# What a stored search may be made of: unpickling executes nothing else.
_NAMES = {
    ("builtins", "range"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.linalg", "eigh"),
    ("numpy.linalg.linalg", "eigh"),
    ("numpy.random._pcg64", "PCG64"),
    ("numpy.random._pickle", "__bit_generator_ctor"),
    ("numpy.random._pickle", "__generator_ctor"),
    ("numpy.random.bit_generator", "SeedSequence"),
    ("numpy.random.bit_generator", "__pyx_unpickle_SeedSequence"),
}


class Normal:
    """Standard normal numbers of a generator of its own: a search draws nothing from elsewhere."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> np.ndarray:
        return self.generator.standard_normal(shape)


class Search:
    """Maximises a return over `size` numbers.

    pop: candidates per generation. sigma: their first standard deviation. diagonal: of the
    covariance only its diagonal, for controllers of many parameters. start: the first mean.
    """

    def __init__(
        self,
        size: int,
        pop: int,
        sigma: float,
        seed: int,
        *,
        diagonal: bool = False,
        start: np.ndarray | None = None,
    ) -> None:
        import cma

        options = {
            "popsize": pop,
            "randn": Normal(seed),
            "seed": float("nan"),  # numpy's global generator stays as it is
            "CMA_diagonal": diagonal,
            "verbose": -9,
            "verb_log": 0,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a person chose the population
            self._es = cma.CMAEvolutionStrategy(
                np.zeros(size) if start is None else start, sigma, options
            )

    def ask(self) -> np.ndarray:  # (P, size) float32
        """A generation of candidates."""
        self._asked = self._es.ask()
        return np.array(self._asked, np.float32)

    def tell(self, returns: np.ndarray) -> None:  # (P,)
        """Their returns: higher is better (the package itself minimises)."""
        returns = np.asarray(returns, np.float64)
        if not np.isfinite(returns).all():
            raise ValueError(
                f"Search: expected finite returns, got {returns[~np.isfinite(returns)][0]}"
            )
        self._es.tell(self._asked, (-returns).tolist())

    @property
    def mean(self) -> np.ndarray:  # (size,) float32
        return np.array(self._es.mean, np.float32)

    @property
    def sigma(self) -> float:
        return float(self._es.sigma)

    def state(self) -> np.ndarray:  # (bytes,) uint8
        """Everything, between `tell` and `ask`."""
        return np.frombuffer(self._es.pickle_dumps(), np.uint8)

    @classmethod
    def restore(cls, state: np.ndarray) -> Search:
        """The search of `state()`. Raises ValueError for anything else, and executes none of it."""
        search = cls.__new__(cls)
        try:
            search._es = _Reader(io.BytesIO(np.asarray(state, np.uint8).tobytes())).load()
        except (pickle.UnpicklingError, AttributeError, ImportError, EOFError, TypeError) as error:
            raise ValueError(
                f"Search: expected a stored search of this version of cma, got {error}; "
                "move ctrl/checkpoint.tar away to start it anew from the best controller"
            ) from None
        return search


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        own = (module, name) == (Normal.__module__, "Normal")
        if own or module.split(".")[0] == "cma" or (module, name) in _NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")
