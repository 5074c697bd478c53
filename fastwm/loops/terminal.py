"""A picture and the arrow keys in a terminal, with the standard library."""

from __future__ import annotations

import os
import select
import shutil
import sys
import time
from typing import Any

import numpy as np

ARROWS = {b"A": "up", b"B": "down", b"C": "right", b"D": "left"}
HOLD = 0.25  # s that a key counts as held: terminals say when it is pressed, not when it is let go


def half_blocks(image: np.ndarray, columns: int) -> str:  # (H, W, 3) uint8
    """The picture in 24-bit colours, two pixels per character: the upper half block."""
    height, width, _ = image.shape
    columns = max(1, min(columns, 2 * width))
    lines = max(1, round(height * columns / width / 2))
    y = np.minimum((np.arange(2 * lines) + 0.5) * height / (2 * lines), height - 1).astype(int)
    x = np.minimum((np.arange(columns) + 0.5) * width / columns, width - 1).astype(int)
    small = image[y][:, x]
    text = []
    for upper, lower in zip(small[::2].tolist(), small[1::2].tolist(), strict=True):
        line = [
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m\u2580"
            for a, b in zip(upper, lower, strict=True)
        ]
        text.append("".join(line) + "\x1b[0m\x1b[K")
    return "\n".join(text)


def names(data: bytes) -> list[str]:
    """Keys of what a terminal sent: arrows by name, other keys as themselves."""
    found = []
    while data:
        if data[:2] in (b"\x1b[", b"\x1bO") and data[2:3] in ARROWS:
            found.append(ARROWS[data[2:3]])
            data = data[3:]
        else:
            found.append(data[:1].decode("latin-1").lower())
            data = data[1:]
    return found


def is_terminal() -> bool:
    """Whether keys can be read and pictures be shown here."""
    try:
        import termios  # noqa: F401
    except ImportError:  # Windows
        return False
    return sys.stdin.isatty() and sys.stdout.isatty()


class Keys:
    """Reads single keys from a terminal, which is as it was again on leaving.

    file: a file descriptor; standard input by default.
    """

    def __init__(self, file: int | None = None) -> None:
        self.file = sys.stdin.fileno() if file is None else file
        self._held: dict[str, float] = {}

    def __enter__(self) -> Keys:
        import termios
        import tty

        self._before: Any = termios.tcgetattr(self.file)
        tty.setcbreak(self.file)
        return self

    def __exit__(self, *error: object) -> None:
        import termios

        termios.tcsetattr(self.file, termios.TCSADRAIN, self._before)

    def read(self, wait: float = 0.0) -> list[str]:
        """Keys pressed since the last call, waiting at most `wait` seconds for the first."""
        found: list[str] = []
        while select.select([self.file], [], [], 0 if found else wait)[0]:
            data = os.read(self.file, 1024)
            if not data:
                break
            found += names(data)
        now = time.monotonic()
        self._held |= dict.fromkeys(found, now)
        return found

    def held(self) -> set[str]:
        """Keys pressed a moment ago."""
        now = time.monotonic()
        return {key for key, when in self._held.items() if now - when < HOLD}


class Screen:
    """Shows pictures one over the other, with a line of text below, on the alternate screen."""

    def __enter__(self) -> Screen:
        sys.stdout.write("\x1b[?1049h\x1b[?25l\x1b[2J")
        return self

    def __exit__(self, *error: object) -> None:
        sys.stdout.write("\x1b[0m\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()

    def show(self, image: np.ndarray, text: str) -> None:
        size = shutil.get_terminal_size((80, 24))
        height, width, _ = image.shape
        columns = min(size.columns, int(2 * (size.lines - 2) * width / height))
        sys.stdout.write(f"\x1b[H{half_blocks(image, columns)}\n{text[: size.columns]}\x1b[K")
        sys.stdout.flush()
