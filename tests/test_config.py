"""The loader: stacking, types, errors that say everything, and files that read back."""

import subprocess
import sys
import tomllib
from dataclasses import FrozenInstanceError

import pytest

from fastwm import config as cfg

PRESETS = cfg.preset_names()


def algorithm_of(preset: str) -> str:
    tree = tomllib.loads((cfg.preset_folder() / f"{preset}.toml").read_text())
    return tree.get("algorithm", "dreamerv3")


def message(*argv: str) -> str:
    with pytest.raises(cfg.ConfigError) as error:
        cfg.load(argv)
    return str(error.value)


def test_presets_stack_left_to_right_then_flags():
    config, origins = cfg.load(["dreamerv3", "size1m", "atari100k", "size12m", "--batch_size", "8"])
    assert (config.rssm.deter, config.train_ratio, config.batch_size) == (2048, 256.0, 8)
    assert origins["rssm.deter"] == "configs/size12m.toml"
    assert origins["train_ratio"] == "configs/atari100k.toml"
    assert origins["batch_size"] == "command line"
    assert origins["lam"] == "default"


def test_later_preset_wins():
    assert cfg.load(["dreamerv3", "size12m", "size1m"])[0].rssm.deter == 512


def test_configs_is_an_alias():
    one = cfg.load(["--configs", "dreamerv3", "debug", "--seed", "3"])[0]
    assert one == cfg.load(["dreamerv3", "debug", "--seed=3"])[0]
    assert one == cfg.load(["dreamerv3", "--configs", "debug", "--seed=3"])[0]


def test_alone_is_cartpole():
    assert cfg.load(["dreamerv3"])[0] == cfg.load(["dreamerv3", "cartpole"])[0]
    assert cfg.load([])[0] == cfg.load(["dreamerv3"])[0]


def test_values_take_the_type_of_the_key():
    config, _ = cfg.load(
        [
            "dreamerv3",
            "--steps",
            "1e6",
            "--env.size",
            "96,80",
            "--eval.stop_at",
            "475",
            "--log.tensorboard",
            "False",
            "--encoder.mults=1,2",
            "--env.options.gray",
            "true",
            "--env.options.name",
            "abc",
            "--retnorm.low=-0",
        ]
    )
    assert config.steps == 10**6 and isinstance(config.steps, int)
    assert config.env.size == (96, 80) and config.encoder.mults == (1, 2)
    assert config.eval.stop_at == 475.0 and config.log.tensorboard is False
    assert config.env.options == {"gray": True, "name": "abc"}
    assert cfg.load(["dreamerv3", "--eval.stop_at", "none"])[0].eval.stop_at is None


def test_values_may_be_negative():
    assert cfg.load(["dreamerv3", "--eval.stop_at", "-150"])[0].eval.stop_at == -150


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--rssm.detr", "5"], ["unknown key 'rssm.detr'", "rssm.deter", "command line"]),
        (["--deter", "5"], ["unknown key 'deter'", "rssm.deter"]),
        (["--rssm.deter", "5.5"], ["rssm.deter: expected an integer, got '5.5'", "command line"]),
        (["--rssm.deter", "many"], ["rssm.deter: expected an integer, got 'many'"]),
        (["--batch_size", "true"], ["batch_size: expected an integer, got 'true'"]),
        (["--batch_size", "0"], ["batch_size: expected an integer >= 1, got '0'"]),
        (["--optim.lr", "nan"], ["optim.lr", "nan"]),
        (["--lam", "1.5"], ["lam: expected a number between 0 and 1, got '1.5'"]),
        (["--device", "gpu"], ["device: expected one of 'auto', 'cpu', 'cuda', got 'gpu'"]),
        (["--contdisc", "1"], ["contdisc: expected true or false, got '1'"]),
        (["--env.size", "64"], ["env.size: expected 2 integers", "'64'"]),
        (["--rssm.deter", "100"], ["rssm.deter: expected a multiple of rssm.blocks = 8, got 100"]),
        (["--optim.schedule", "linear"], ["optim.anneal: expected more than optim.warmup = 100"]),
        (["--optim.beta1", "1"], ["optim.beta1: expected less than 1"]),
        (["--optim.beta2", "1"], ["optim.beta2: expected less than 1"]),
        (["--discount_horizon", "1"], ["discount_horizon: expected more than 1"]),
        (["--batch_length", "1"], ["batch_length: expected at least 2"]),
        (["--imag_last", "1"], ["imag_last: expected 0 or at least 2"]),
        (["--encoder.kernel", "4"], ["encoder.kernel: expected an odd number, got 4"]),
        (["--decoder.bspace", "0"], ["decoder.bspace: expected an integer >= 1"]),
        (["--decoder.bspace", "5"], ["decoder.bspace: expected a divisor of", "= 32"]),
        (["--replay.capacity", "10"], ["replay.capacity: expected at least"]),
        (["--seed"], ["seed: expected a value after --seed"]),
        (["--seed", "--task", "x"], ["seed: expected a value"]),
        (["-x"], ["'-x'"]),
        (["atari10k"], ["unknown preset 'atari10k'", "atari100k"]),
        (["nowhere/x.toml"], ["expected an existing TOML file", "nowhere/x.toml"]),
        (["--task", ""], ["task: expected a task", "--task"]),
        (["random"], ["expected one of", "dreamerv3 and random"]),
    ],
)
def test_bad_input(argv, parts):
    text = message("dreamerv3", *argv)
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_unknown_algorithm_has_a_suggestion():
    assert "did you mean dreamerv3, " in message("dreamer3")


def test_bad_file_names_itself(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[rssm]\ndeter = 5.5\n")
    assert "mine.toml" in message("dreamerv3", str(path))
    path.write_text("rssm.deter = = 3\n")
    assert "mine.toml: expected TOML" in message("dreamerv3", str(path))
    path.write_text('algorithm = "random"\n')
    assert "algorithm: expected 'dreamerv3', got 'random'" in message("dreamerv3", str(path))


@pytest.mark.parametrize("algorithm", cfg.SCHEMAS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_loads_or_says_whose_it_is(preset, algorithm):
    try:
        assert cfg.load([algorithm, preset])[0].algorithm == algorithm
    except cfg.ConfigError as error:
        own = algorithm_of(preset)
        text = str(error)
        assert f"preset: expected one for {algorithm}, got {preset!r}, which is for " in text
        assert own in text and algorithm != own


@pytest.mark.parametrize("algorithm", cfg.SCHEMAS)
def test_every_algorithm_has_a_debug_preset(algorithm):
    assert cfg.load([algorithm, "debug"])[0].device == "cpu"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads_and_reads_back(preset, tmp_path):
    config, _ = cfg.load(
        [algorithm_of(preset), preset, "--task", "x", "--env.options.note", 'a"b\\c']
    )
    path = tmp_path / "config.toml"
    path.write_text(cfg.to_toml(config))
    assert cfg.load([str(path)])[0] == config
    assert cfg.from_dict(tomllib.loads(cfg.to_toml(config))) == config
    assert cfg.from_dict(cfg.flatten(config)) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hold_only_differences(preset):
    """The values of size200m are the defaults; every other preset states what deviates."""
    if preset == "size200m":  # whoever stacks it after another size wants all of it
        return
    plain = cfg.flatten(cfg.SCHEMAS[algorithm_of(preset)]())
    tree = tomllib.loads((cfg.preset_folder() / f"{preset}.toml").read_text())
    given = cfg.flatten(cfg.load([algorithm_of(preset), preset, "--task", "x"])[0])
    allowed = {
        "task",
        "algorithm",
        "envs",
        "train_ratio",
        "precision",  # the default of one algorithm is not that of the other
    }  # a benchmark states these even where default
    same = [k for k in cfg._flat(tree) if k in given and given[k] == plain[k] and k not in allowed]
    assert not same


def test_config_cannot_be_changed():
    config, _ = cfg.load(["dreamerv3"])
    with pytest.raises(FrozenInstanceError):
        config.seed = 1


def test_differences_say_which_matter():
    old = cfg.load(["dreamerv3"])[0]
    new = cfg.load(["dreamerv3", "--seed", "1", "--optim.lr", "7e-3", "--logdir", "x"])[0]
    changed = [("seed", 0, 1, True), ("optim.lr", old.optim.lr, 7e-3, False)]
    assert cfg.differences(old, new) == changed
    other = cfg.load(["random"])[0]
    assert cfg.differences(old, other)[0][0] == "algorithm"


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        cfg.load(["dreamerv3", "--batch_size", "7", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key in cfg.flatten(cfg.DreamerConfig()):
        assert f"--{key} " in text
    assert "command line" in text and "configs/cartpole.toml" in text


def test_help_filters(capsys):
    with pytest.raises(SystemExit):
        cfg.load(["dreamerv3", "--help", "retnorm"])
    text = capsys.readouterr().out
    assert "--retnorm.rate" in text and "--batch_size" not in text


def test_needs_only_the_standard_library():
    code = "import sys, fastwm.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
