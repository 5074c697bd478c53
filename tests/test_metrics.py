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
# Windows of 52 rows reach the longest open-loop error.
MODULAR = (
    "modular --log.tensorboard false --log.every_s 0 --threads 1 --steps 400 --log.every 40 --envs "
    "4 --batch_size 2 --batch_length 52 --train_ratio 8 --world_model_warmup_steps 340 "
    "--imagination_horizon 5 --multi_step_loss_weight 0.1 --openloop_every 1 --eval.every 0"
).split()


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
    fp16 = [*RUN, "--eval.every", "0", "--precision", "fp16"]
    commands = [("cartpole", RUN), ("pendulum", fp16), ("dummy_image", RUN), ("cartpole", MODULAR)]
    explore = "--expl.behavior plan2explore --expl.disag_units 8 --expl.disag_models 2".split()
    commands.append(("cartpole", ["dreamerv3_2023", *fp16[1:], *explore]))
    for task, argv in commands:
        run = tmp_path_factory.mktemp("metrics") / task
        assert train.main([*argv, "--task", task, "--logdir", str(run)]) == 0
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
