"""docs/metrics.md names everything that a run writes, and nothing that it does not."""

import json
import re
from pathlib import Path

import pytest

from fastwm import train

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
RUN = (
    "dreamerv3 debug --log.tensorboard false --log.every_s 0 --threads 1 --steps 96 --log.every "
    "16 --eval.every 48 --eval.episodes 1 --checkpoint.every 0 --log.video_every 96"
).split()
HA = "ha debug --log.tensorboard false --threads 1 --rnn.done true --rnn.reward true".split()


def documented() -> list[str]:
    return re.findall(r"^\| `([^`]+)` \| [^|]+ \|", PAGE.read_text(), re.M)


def pattern(name: str) -> re.Pattern:
    return re.compile(re.escape(name).replace(re.escape("<key>"), "[^/]+") + "$")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> set[str]:
    names: set[str] = set()
    run = tmp_path_factory.mktemp("metrics") / "ha"
    assert train.main([*HA, "--logdir", str(run)]) == 0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        names |= set(json.loads(line))
    for task in ("cartpole", "pendulum", "dummy_image"):
        run = tmp_path_factory.mktemp("metrics") / task
        more = ["--eval.every", "0", "--precision", "fp16"] if task == "pendulum" else []
        assert train.main([*RUN, *more, "--task", task, "--logdir", str(run)]) == 0
        for line in (run / "metrics.jsonl").read_text().splitlines():
            names |= set(json.loads(line))
        files = {p.name.split("-")[0] for p in run.glob("videos/*.gif")}
        names |= {name.replace("openl_", "openl/") for name in files}
    return names


def test_every_name_is_documented(written):
    patterns = [pattern(name) for name in documented()]
    assert [name for name in sorted(written) if not any(p.match(name) for p in patterns)] == []


def test_every_documented_name_is_written(written):
    unused = [n for n in documented() if not any(pattern(n).match(name) for name in written)]
    assert unused == []


def test_names_stand_once():
    assert len(documented()) == len(set(documented())) > 60
