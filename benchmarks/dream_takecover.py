"""TakeCover: the controller that was trained in its dream, against random ones, in the real game.

python benchmarks/dream_takecover.py RUN [--json FILE] [--plot FILE]

RUN is a finished run of `python -m fastwm.train ha takecover`. Random actions play the same
episodes as its test (test.json): held for 1 to 100 tics, like those that the data was collected
with, for 1 to 10, and new at every tic, as the paper's random policy, which survived 210.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path

import numpy as np

from fastwm import config as settings
from fastwm.assemble_ha import real_lanes
from fastwm.loops.evaluate import seed_of
from fastwm.loops.ha_collect import RandomActions
from fastwm.loops.ha_ctrl import TEST
from fastwm.worldmodels.ha_controller import ActionCode

NAMES = {
    "dream": "trained in the dream",
    "mixed": "random, held for 1 to 100",
    "held": "random, held for 1 to 10",
    "white": "random, every tic",
}


def random_lengths(config, kind: str, count: int) -> list[int]:
    """Tics survived in the test's episodes by random actions."""
    seeds, found = [seed_of(config.seed, TEST, i) for i in range(count)], []
    for start in range(0, count, config.final.envs):
        part = seeds[start : start + config.final.envs]
        lanes = real_lanes(config, part)
        code = ActionCode.of(config.ctrl.action, lanes.act_space)
        random = RandomActions(kind, code, len(part), seed_of(config.seed, TEST, start, 1))
        lanes.reset()
        live, lengths = np.arange(len(part)), np.zeros(len(part), int)
        while len(live):
            lanes.send(code.to_env(random.step()[live], lanes.act_space), live)
            rows = lanes.receive()
            lengths[live] += 1
            live = live[~rows["is_last"]]
        lanes.close()
        found += lengths.tolist()
    return found


def plot(lengths: dict[str, list[int]], path: Path) -> None:
    """The three distributions as steps, with their means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.2), dpi=120)
    bins = np.arange(0, 2101, 100)
    for (key, values), color in zip(lengths.items(), ("C1", "C0", "C2", "C7"), strict=True):
        mean = np.mean(values)
        axis.hist(
            values, bins, histtype="step", lw=2, color=color, label=f"{NAMES[key]}: {mean:.0f}"
        )
        axis.axvline(mean, color=color, ls=":")
    axis.set(xlabel="tics survived in the real game", ylabel="episodes")
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    tested = json.loads((args.run / "test.json").read_text())
    config = settings.from_dict(tomllib.loads((args.run / "config.toml").read_text()))
    lengths = {"dream": [int(score) for score in tested["scores"]]}
    for kind in ("mixed", "held", "white"):
        lengths[kind] = random_lengths(config, kind, tested["n"])
    summary = {
        key: {
            "mean": float(np.mean(values)),
            "std": float(np.std(values)),
            "median": float(np.median(values)),
            "max": max(values),
            "n": len(values),
            "lengths": values,
        }
        for key, values in lengths.items()
    }
    for key in NAMES:
        s = summary[key]
        s["ratio"] = summary["dream"]["mean"] / s["mean"]
        than = "" if key == "dream" else f"; the controller {s['ratio']:.2f} times as long"
        print(f"{NAMES[key]:26} {s['mean']:6.1f} +- {s['std']:.1f}, median {s['median']:.0f}{than}")
    if args.json:
        args.json.write_text(json.dumps(summary) + "\n")
    if args.plot:
        plot(lengths, args.plot)


if __name__ == "__main__":
    main()
