"""Where the time of an update goes: a trace of some of them, and how busy a GPU was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

WARMUP = 5  # updates before the trace begins: the first ones set things up


class Trace:
    """Records `updates` updates after WARMUP others, once, with all that a run does between them.

    Call at the start of every update. Writes `trace.json` for https://ui.perfetto.dev and
    `summary.txt`, a table of the operations by time, into the folder `profile` of the run.
    """

    def __init__(self, updates: int, folder: Path, say: Callable[[str], None]) -> None:
        self.updates, self.folder, self.say = updates, folder / "profile", say
        self.seen = 0
        self.profiler: torch.profiler.profile | None = None

    def __call__(self) -> None:
        if self.updates and self.seen == WARMUP:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        if self.profiler is not None and self.seen == WARMUP + self.updates:
            self.close()
        self.seen += 1

    def close(self) -> None:
        """Write what there is."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        self.folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json"))
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        table = profiler.key_averages().table(f"self_{kind}_time_total", row_limit=40)
        (self.folder / "summary.txt").write_text(table + "\n")
        count = self.seen - WARMUP
        self.say(f"profile  {self.folder}/trace.json, {count} updates (open in ui.perfetto.dev)")


def gpu_busy(device: torch.device) -> dict[str, float]:
    """`speed/gpu_busy`, the share of the driver's last sample (at most 1 s) with a kernel running.

    Empty on a CPU, and where the package nvidia-ml-py is missing.
    """
    if device.type != "cuda":
        return {}
    try:
        return {"speed/gpu_busy": torch.cuda.utilization(device) / 100.0}
    except (ModuleNotFoundError, RuntimeError):  # no package, or a driver that does not tell
        return {}
