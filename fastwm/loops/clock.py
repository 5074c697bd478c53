"""When something is due, counted in steps and not in seconds, so that a run repeats exactly."""

from __future__ import annotations


class Every:
    """True once whenever a counter passes a multiple of `every`; never for 0.

    The counter may jump: passing several multiples at once is one event. Multiples of the counter
    itself are used, so that a resumed or interrupted run keeps the same grid.
    """

    def __init__(self, every: int, *, first: bool = False) -> None:
        self.every = every
        self.next = 0 if first else every

    def __call__(self, step: int) -> bool:
        if self.every <= 0 or step < self.next:
            return False
        self.next = (step // self.every + 1) * self.every
        return True

    def state_dict(self) -> dict:
        return {"every": self.every, "next": self.next}

    def load_state_dict(self, state: dict) -> None:
        if state["every"] == self.every:  # a changed interval starts on its own grid
            self.next = state["next"]
        elif self.every > 0:
            self.next = (state["next"] // self.every + 1) * self.every


class Ratio:
    """How many repeats are due, to keep `ratio` of them per step of a counter.

    The first call returns 1 and starts the count; later calls return the whole repeats that the
    steps since then are worth, and carry the fraction. At most `limit` come back at once: what a
    gap (a resume without replay, say) piled up beyond that is dropped instead of caught up.
    """

    def __init__(self, ratio: float, limit: int | None = None) -> None:
        self.ratio = ratio
        self.limit = limit
        self.start: float | None = None
        self.done = 0

    def __call__(self, step: int) -> int:
        if self.ratio <= 0:
            return 0
        if self.start is None:
            self.start = step
            return 1
        repeats = int((step - self.start) * self.ratio) - self.done
        if self.limit is not None and repeats > self.limit:
            self.start, self.done = step, 0
            return self.limit
        self.done += repeats
        return repeats

    def state_dict(self) -> dict:
        return {"ratio": self.ratio, "start": self.start, "done": self.done}

    def load_state_dict(self, state: dict) -> None:
        if state["ratio"] == self.ratio:
            self.start, self.done = state["start"], state["done"]
        elif state["start"] is not None:  # count on from where the old ratio was
            self.start, self.done = state["start"] + state["done"] / state["ratio"], 0


class Once:
    """True on the first call only."""

    def __init__(self) -> None:
        self.due = True

    def __call__(self) -> bool:
        due, self.due = self.due, False
        return due

    def state_dict(self) -> dict:
        return {"due": self.due}

    def load_state_dict(self, state: dict) -> None:
        self.due = state["due"]


class Until:
    """True while a counter is below `until`; 0 means for ever."""

    def __init__(self, until: int) -> None:
        self.until = until

    def __call__(self, step: int) -> bool:
        return self.until <= 0 or step < self.until

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore: a changed end applies at once."""
