"""What README.md and docs/ tell people to type is understood, and the README's Python runs."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from fastwm import config, envs
from fastwm.agents.dreamer import DreamerAgent
from fastwm.envs.registry import resolve
from fastwm.spaces import Space

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    (page.name, found)
    for page in PAGES
    for found in re.findall(r"python -m fastwm\.[^`#\n(]+", page.read_text())
]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("page, command", COMMANDS, ids=lambda x: x.strip().replace("/", "."))
def test_commands_are_understood(page, command, capsys):
    module, *argv = shlex.split(command)[2:]
    assert importlib.util.find_spec(module), f"{page}: no {module}"
    if module != "fastwm.train" or "ALGORITHM" in argv:
        return
    if "--help" in argv:
        with pytest.raises(SystemExit) as stop:
            config.load(argv)
        assert stop.value.code == 0 and "no setting contains" not in capsys.readouterr().out
        return
    found = config.load(argv)[0]
    task = found.task
    if task == "offline" and found.offline_traindir:  # no environment
        return
    assert task in envs.task_names() or callable(resolve(task))


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 15 and len(BLOCKS) == 2


def test_the_policy_of_the_readme(tmp_path, monkeypatch):
    settings = config.load(["dreamerv3", "debug"])[0]
    agent = DreamerAgent({"vector": Space("vector", (4,))}, Space("discrete", (), (2,)), settings)
    run = tmp_path / "runs" / "dreamerv3-cartpole-..."
    (run / "checkpoint").mkdir(parents=True)
    agent.save_policy(run / "checkpoint" / "policy.pt")
    monkeypatch.chdir(tmp_path)
    names = {}  # a reader has nothing but the page
    exec(BLOCKS[0], names)
    assert names["action"].shape == (8,)


def test_the_kernels_of_the_readme():
    names = {}
    exec(BLOCKS[1], names)
    assert names["loss"].shape == names["value"].shape == (16, 64) and names["loss"].requires_grad
    assert names["returns"].shape == (16, 63) and names["returns"].requires_grad
    assert names["dyn"].shape == (16, 64) and len(names["entropies"]) == 2
