"""What the doctor says of the device at hand is what an agent does on it."""

import pytest
import torch
from test_dreamer import tiny_agent, tiny_config

from fastwm import config, doctor
from fastwm.agents import defaults


def test_it_prints_every_default_and_its_reason(capsys):
    doctor.main([])
    text = capsys.readouterr().out
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = config.flatten(tiny_config())
    for key, default in [*defaults.DEFAULTS.items(), ("replay.storage", defaults.storage)]:
        value, reason = default(device)
        assert f"--{key} {value}: {reason}" in " ".join(text.split())
        assert settings[key] == ("auto" if key in defaults.DEFAULTS else value)


@pytest.mark.parametrize("load, advice", [(0.1, False), (9.0, True)])
def test_it_says_when_the_cores_are_busy(load, advice, monkeypatch, capsys):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    doctor.main([])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("--threads "))
    assert ("--threads 1" in line and "(load 9.0)" in line) == advice
    assert line.split()[1] == f"{config.load(['dreamerv3'])[0].threads}:"


def test_agents_follow_it():
    cpu, agent = torch.device("cpu"), tiny_agent()
    assert agent.precision == defaults.precision(cpu).value
    assert agent.step == agent.updates_on_device  # no graph
    assert defaults.cudagraphs(cpu).value == "off"


@pytest.mark.parametrize("supported, value", [(True, "bf16"), (False, "fp16")])
def test_precision_of_a_gpu(supported, value, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert defaults.precision(torch.device("cuda")).value == value
    assert defaults.chosen("precision", "fp32", torch.device("cuda")) == "fp32"
    assert defaults.cudagraphs(torch.device("cuda")).value == "on"
