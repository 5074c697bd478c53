"""Dreams to watch and to play: GIF files, keys, and what a terminal shows."""

from __future__ import annotations

import io
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastwm import assemble, checkpoint, dream, settings
from fastwm import config as configs
from fastwm.episodes import EpisodeStore
from fastwm.loops import dreams, terminal
from fastwm.spaces import Space

PICTURE = {"image": Space("image", (64, 64, 3))}


def save(folder, argv, act_space):
    """A run folder with an untrained agent."""
    config = configs.load([*argv, "--device", "cpu"])[0]
    agent = assemble.make_agent(config, PICTURE, act_space)
    parts = {
        "config": configs.to_toml(config),
        "agent": agent.state_dict(),
        "obs_space": {k: s.to_dict() for k, s in PICTURE.items()},
        "act_space": act_space.to_dict(),
    }
    checkpoint.save(folder / "checkpoint" / "best.pt", parts)
    return agent


@pytest.fixture(scope="module")
def ha_run(tmp_path_factory):
    """World Models whose dreams last: with stored first latents, no environment is needed."""
    folder = tmp_path_factory.mktemp("dream") / "ha"
    argv = "ha debug --task takecover --env.rows 0 --dream.length 6 --ctrl.action tanh".split()
    argv += ["--rnn.done", "true"]
    agent = save(folder, argv, Space("continuous", (1,)))
    rnn = agent.policy.rnn
    with torch.no_grad():
        rnn.head.bias[-1] = -50
    state = {k: v.clone() for k, v in agent.policy.state_dict().items()}
    stored = checkpoint.load(folder / "checkpoint" / "best.pt")
    checkpoint.save(folder / "checkpoint" / "best.pt", stored | {"agent": state})
    store = EpisodeStore.create(folder / "data", (64, 64, 3), 1)
    for length in (2, 3):
        zeros = np.zeros((length, 64, 64, 3), np.uint8)
        store.append(zeros, np.zeros((length, 1), np.float32), np.zeros(length, np.float32), True)
    (folder / "latents").mkdir()
    mu = np.arange(5, dtype=np.float16)[:, None].repeat(4, 1)
    np.save(folder / "latents" / "mu.npy", mu)
    np.save(folder / "latents" / "logvar.npy", np.full_like(mu, -20))
    return folder


@pytest.fixture(scope="module")
def dreamer_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dream") / "dreamer"
    argv = "dreamerv3 debug --task dummy_image --env.size 64,64".split()
    save(folder, argv, Space("discrete", (), (2,)))
    return folder


def frames(path):
    image = Image.open(path)
    return image.n_frames, image.size


def test_ha_dreams_are_filmed(ha_run, tmp_path, capsys):
    argv = [str(ha_run), "--episodes", "2", "--gif-dir", str(tmp_path), "--scale", "2"]
    assert dream.main(argv) == 0
    assert "dream 1: return 6, 6 steps" in capsys.readouterr().out
    assert frames(tmp_path / "dream-000.gif")[1] == (128, 128)
    assert (tmp_path / "dream-000.gif").read_bytes() != (tmp_path / "dream-001.gif").read_bytes()


def test_dreamer_dreams_are_filmed(dreamer_run, tmp_path, capsys):
    argv = [str(dreamer_run), "--max-steps", "4", "--context", "3", "--gif-dir", str(tmp_path)]
    assert dream.main(argv) == 0
    assert "4 steps" in capsys.readouterr().out
    assert frames(tmp_path / "dream-000.gif")[1] == (256, 256)


def test_starts_are_the_first_rows_of_stored_episodes(ha_run):
    config, agent, *_ = assemble.load_run(str(ha_run), "best")
    mu, logvar = dreams.ha_starts(ha_run, config, agent.policy, None)
    assert mu[:, 0].tolist() == [0, 2] and (logvar == -20).all()


def test_starts_come_from_the_task_where_none_are_stored(ha_run, tmp_path):
    config, agent, *_ = assemble.load_run(str(ha_run), "best")

    class Env:
        def reset(self):
            return {"image": np.full((3, 64, 64, 3), 7, np.uint8)}

        def close(self):
            self.closed = True

    env = Env()
    mu, _ = dreams.ha_starts(tmp_path, config, agent.policy, lambda count, seed: env)
    assert mu.shape == (3, 4) and env.closed


def test_the_persons_action_is_the_one_that_is_dreamt(ha_run):
    """Two dreams of one seed agree until the actions differ."""
    _, agent, *_ = assemble.load_run(str(ha_run), "best")
    with torch.no_grad():
        agent.policy.rnn.lstm.weight_ih_l0[:, 4] *= 50
    starts = torch.zeros(1, 4), torch.full((1, 4), -20.0)
    found = []
    for keys in (set(), {"left"}, {"right"}):
        one = dreams.HaDream(agent.policy, starts, temperature=0.0, length=9)
        first = one.reset()
        action = one.pressed(keys)
        assert action.tolist() == [{"left": -1.0, "right": 1.0}.get("".join(keys), 0.0)]
        one.step(action)
        found.append((first, one.world.z.clone()))
    assert all((first == found[0][0]).all() for first, _ in found)
    assert not torch.equal(found[1][1], found[2][1])


def test_temperature_can_change_while_dreaming(ha_run):
    _, agent, *_ = assemble.load_run(str(ha_run), "best")
    starts = torch.zeros(1, 4), torch.full((1, 4), -20.0)
    hot, cold = (
        dreams.HaDream(agent.policy, starts, temperature=heat, length=9) for heat in (1.0, 1.0)
    )
    hot.reset(), cold.reset()
    cold.temperature = 0.0
    hot.step(), cold.step()
    assert not torch.equal(hot.world.z, cold.world.z)


def test_keys_of_dreamer(dreamer_run):
    config, agent, *_ = assemble.load_run(str(dreamer_run), "best")
    one = dreams.DreamerDream(agent, assemble.make_envs(config), length=5, context=1)
    assert one.reset().shape == (64, 64, 3)
    assert one.pressed({"1"}) == 1 and one.pressed({"0"}) == 0 and one.pressed({"9"}) == 1
    for choice in (0, 1):
        image, reward, _ = one.step(one.pressed({str(choice)}))
        assert image.dtype == np.uint8 and isinstance(reward, float)
        assert one._encode(np.array(choice))[0].tolist() == [1 - choice, choice]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature", "-1"], "--temperature: expected a number >= 0, got -1.0"),
        (["--checkpoint", "/none/a.pt"], "/none/a.pt"),
    ],
)
def test_mistakes_end_with_one_line(ha_run, capsys, argv, message):
    assert dream.main([str(ha_run), *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_dreamer_has_no_temperature(dreamer_run, capsys):
    assert dream.main([str(dreamer_run), "--temperature", "1.2"]) == 2
    assert "--temperature: expected a run of ha, got one of dreamerv3" in capsys.readouterr().err


def test_keys_without_a_terminal_film(ha_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert dream.main([str(ha_run), "--keys", "--gif-dir", str(tmp_path)]) == 0
    assert "no terminal with keys here, filming instead" in capsys.readouterr().err
    assert (tmp_path / "dream-000.gif").is_file()


# ---------------------------------------------------------------------------------------- terminal


def test_half_blocks_show_every_pixel():
    image = np.zeros((4, 3, 3), np.uint8)
    image[0, 0], image[1, 0], image[3, 2] = (255, 0, 0), (0, 255, 0), (1, 2, 3)
    lines = terminal.half_blocks(image, 3).split("\n")
    assert len(lines) == 2 and all(line.count("\u2580") == 3 for line in lines)
    assert lines[0].startswith("\x1b[38;2;255;0;0m\x1b[48;2;0;255;0m\u2580")
    assert "\x1b[48;2;1;2;3m\u2580\x1b[0m" in lines[1]
    wide = terminal.half_blocks(image, 80).split("\n")
    assert len(wide) == 4 and all(line.count("\u2580") == 6 for line in wide)  # twice, no more


def test_names_of_keys():
    assert terminal.names(b"\x1b[A\x1b[Dq\x1bOC+Q") == ["up", "left", "q", "right", "+", "q"]
    assert terminal.names(b"") == []


def test_keys_are_read_one_by_one_and_the_terminal_is_restored():
    termios = pytest.importorskip("termios")
    person, program = os.openpty()
    before = termios.tcgetattr(program)
    with terminal.Keys(program) as keys:
        assert keys.read() == []
        os.write(person, b"\x1b[Cx")
        assert keys.read(wait=2) == ["right", "x"]  # without a line's end
        assert keys.held() == {"right", "x"}
        keys._held["x"] -= terminal.HOLD
        assert keys.held() == {"right"}
    assert termios.tcgetattr(program) == before
    os.close(person), os.close(program)


def test_playing_in_a_terminal(ha_run, monkeypatch, capsys):
    """A person takes over, warms the dream up, and leaves."""
    pytest.importorskip("termios")
    person, program = os.openpty()
    real = terminal.Keys
    monkeypatch.setattr(dreams, "Keys", lambda: real(program))
    _, agent, *_ = assemble.load_run(str(ha_run), "best")
    starts = torch.zeros(1, 4), torch.zeros(1, 4)
    one = dreams.HaDream(agent.policy, starts, temperature=1.0, length=1000)
    taken = []
    step = one.step

    def watched(action=None):
        taken.append(action)
        script = {3: b"\x1b[D", 6: b"+", 9: b"c", 12: b"r", 15: b"q"}
        os.write(person, script.get(len(taken), b""))
        return step(action)

    one.step = watched
    dreams.play(one, 1000, "help")
    kinds = [None if action is None else float(action[0]) for action in taken]
    assert kinds[:3] == [None] * 3 and kinds[3] == -1.0 and kinds[9] is None
    assert len(taken) == 16 and one.temperature == pytest.approx(1.05)
    assert one.seed == 2  # r began another dream
    text = capsys.readouterr().out
    assert "you: " in text and "agent: " in text and text.endswith("\x1b[?1049l")
    os.close(person), os.close(program)


def test_settings_name_the_algorithm(tmp_path, monkeypatch):
    monkeypatch.setattr(
        assemble,
        "load_run",
        lambda *_: (configs.load(["random", "debug"])[0], None, tmp_path, []),
    )
    with pytest.raises(settings.ConfigError, match="expected a run of ha or dreamerv3, got random"):
        dream._dream(tmp_path, dream.options().parse_args([str(tmp_path)]))
