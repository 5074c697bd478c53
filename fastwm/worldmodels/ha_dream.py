"""The dream: M plays the environment, for a whole population at once.

A step: M reads (z, action[, restart]) and predicts; the next z is drawn at the temperature; the
dream is over where M says so with more than one half. A step earns what M says if it was trained to
(--rnn.reward true), and else 1: the return is how long the dream was survived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastwm.worldmodels.ha import MDNRNN, State, latent_sample, sample_next
from fastwm.worldmodels.ha_controller import ActionCode, Controller

Result = tuple[Tensor, Tensor, Tensor]
CHUNK = 64  # steps whose noise is drawn at once


class Noise:
    """Random numbers of lanes: equal seeds, equal numbers, whoever else dreams beside them.

    seeds: one per lane. width: how many uniform and how many normal numbers per step.
    Drawn on the CPU, so that the same dream is dreamt on every device.
    """

    def __init__(self, seeds: Sequence[int], width: int) -> None:
        unique, which = np.unique(np.asarray(seeds, np.int64), return_inverse=True)
        self.which = torch.from_numpy(which.reshape(-1))  # (N,) lane -> row of `unique`
        self.width = width
        self._sources = [torch.Generator().manual_seed(int(seed)) for seed in unique]
        self._uniform = self._normal = torch.empty(0)
        self._step = 0

    def start(self, count: int) -> tuple[Tensor, Tensor]:
        """Per lane: a number below `count` (N,), and normal numbers (N, width)."""
        picks = torch.cat([torch.randint(count, (1,), generator=g) for g in self._sources])
        normal = torch.stack([torch.randn(self.width, generator=g) for g in self._sources])
        return picks[self.which], normal[self.which]

    def step(self, lanes: Tensor) -> tuple[Tensor, Tensor]:  # (n,) int64, on the CPU
        """Uniform and normal numbers (n, width) of the next step of these lanes."""
        at = self._step % CHUNK
        if at == 0:
            shape = (CHUNK, self.width)
            self._uniform = torch.stack([torch.rand(shape, generator=g) for g in self._sources], 1)
            self._normal = torch.stack([torch.randn(shape, generator=g) for g in self._sources], 1)
        self._step += 1
        rows = self.which[lanes]
        return self._uniform[at, rows], self._normal[at, rows]


class DreamWorld:
    """N dreams side by side; lanes that ended are left out by whoever steps them.

    Args: rnn: M; without a done head only max_steps ends a dream. controller: names what `features`
          hold. code: what its outputs mean. starts: (mu, logvar), each (E, Z), of first real
          pictures. seeds: one per lane, N of them; lanes with equal seeds dream the same as long
          as their actions are the same. temperature: of M's predictions: 0 takes the most likely
          mean, 1 is M's own belief, more is less certain. max_steps: where a dream ends at last.
          others: further Ms. Lanes are dreamt by `rnn` and by these in turn, those with equal seeds
          by the same; the controller sees the state of `rnn` everywhere, as in the game. What it
          finds out about one M's mistakes then does not help it in the dreams of the others.
    """

    def __init__(
        self,
        rnn: MDNRNN,
        controller: Controller,
        code: ActionCode,
        starts: tuple[Tensor, Tensor],
        seeds: Sequence[int],
        temperature: float = 1.0,
        max_steps: int = 2100,
        others: Sequence[MDNRNN] = (),
    ) -> None:
        _check(rnn, starts, seeds, temperature, max_steps)
        self.rnn, self.controller, self.code = rnn.eval(), controller, code
        self.others = [other.eval() for other in others]
        self.device = rnn.head.weight.device
        self.mu, self.logvar = (part.to(self.device, torch.float32) for part in starts)
        self.lanes, self.seeds = len(seeds), seeds
        self.temperature, self.max_steps = float(temperature), int(max_steps)
        self._live: Tensor | None = None  # (n,) int64, the lanes that z and state belong to

    @torch.inference_mode()
    def reset(self) -> Tensor:  # (N, F)
        """Begins every lane anew, with the same noise each time; features of its first latent."""
        self._noise = Noise(self.seeds, self.rnn.latent)
        pick, normal = self._noise.start(len(self.mu))
        pick, normal = pick.to(self.device), normal.to(self.device)
        self.z = latent_sample(self.mu[pick], self.logvar[pick], normal)  # (n, Z)
        self.state: State = self.rnn.initial(self.lanes)
        self.states = [other.initial(self.lanes) for other in self.others]
        self.dreamer = (self._noise.which % (1 + len(self.others))).to(self.device)  # (n,)
        self._live, self.steps = torch.arange(self.lanes), 0
        return self.controller.features(self.z, self.state)

    def start(self, raw: Tensor, lanes: Tensor) -> Callable[[], Result]:
        """Controller outputs (n, outputs) of lanes (n,) -> a function that ends the step.

        It gives features (n, F), reward (n,) and done (n,), like that of `RealWorld`. Nothing else
        could work while a dream is dreamt, so the whole step happens there.
        """
        return lambda: self.step(self.code.code(raw.to(self.device)), lanes.cpu())

    @torch.inference_mode()
    def step(self, action: Tensor, lanes: Tensor) -> Result:
        """One step of lanes (n,) with actions (n, A) as M reads them: features, reward, done."""
        self._leave(lanes)
        restart = action.new_full((len(lanes),), float(self.steps == 0))
        noise = [part.to(self.device) for part in self._noise.step(lanes)]
        x = self.rnn.features(self.z, action, restart)
        hidden, self.state = self.rnn.step(x, self.state)
        z, reward, done = self._dream(self.rnn, hidden, *noise)
        for number, (other, state) in enumerate(zip(self.others, self.states, strict=True), 1):
            mine = torch.nonzero(self.dreamer == number)[:, 0]
            hidden, new = other.step(x[mine], tuple(part[mine] for part in state))
            for part, value in zip(state, new, strict=True):
                part[mine] = value
            found = self._dream(other, hidden, *(part[mine] for part in noise))
            z[mine], reward[mine], done[mine] = found
        self.z, self.steps = z, self.steps + 1
        if self.steps >= self.max_steps:
            done = torch.ones_like(done)
        return self.controller.features(self.z, self.state), reward, done

    def _dream(self, rnn: MDNRNN, hidden: Tensor, uniform: Tensor, normal: Tensor) -> Result:
        """What an M makes of its LSTM's output (n, R): the next z (n, Z), reward and end (n,)."""
        said = rnn.predict(hidden)
        uniform = uniform if rnn.mixture == "factored" else uniform[:, 0]
        z = sample_next(said, rnn.mixture, uniform, normal, self.temperature)
        ones = hidden.new_ones(len(hidden))
        done = torch.zeros_like(ones, dtype=torch.bool) if said.done is None else said.done > 0
        return z, ones if said.reward is None else said.reward, done

    def _leave(self, lanes: Tensor) -> None:
        """Forgets the lanes that are not stepped any more."""
        if self._live is None:
            raise RuntimeError("DreamWorld: expected reset() before the first step(), got step()")
        if torch.equal(lanes, self._live):
            return
        if not torch.isin(lanes, self._live).all():
            raise ValueError(
                f"DreamWorld: expected lanes among those of the last step, got {lanes.tolist()}; "
                "a lane that was left out has ended"
            )
        keep = torch.searchsorted(self._live, lanes)
        self._live, keep = lanes, keep.to(self.device)
        self.z, self.state = self.z[keep], tuple(part[keep] for part in self.state)
        self.states = [tuple(part[keep] for part in state) for state in self.states]
        self.dreamer = self.dreamer[keep]

    def close(self) -> None:
        """Nothing is held open."""


def _check(
    rnn: MDNRNN,
    starts: tuple[Tensor, Tensor],
    seeds: Sequence[int],
    temperature: float,
    max_steps: int,
) -> None:
    shapes = [tuple(part.shape) for part in starts]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][1:] != (rnn.latent,):
        raise ValueError(
            f"DreamWorld: expected mu and logvar of shape (E, Z) = (E, {rnn.latent}), got {shapes}"
        )
    if len(shapes) and shapes[0][0] == 0:
        raise ValueError("DreamWorld: expected at least one first frame to start from, got none")
    if len(seeds) == 0:
        raise ValueError("DreamWorld: expected a seed for each lane, got none")
    if not temperature >= 0 or max_steps < 1:
        raise ValueError(
            f"DreamWorld: expected a temperature >= 0 and max_steps >= 1, got {temperature} and "
            f"{max_steps}"
        )
