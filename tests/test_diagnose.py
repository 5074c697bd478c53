"""The rules fire where they should, only there, and the command says it in lines."""

import json
import re
from pathlib import Path

import pytest

from fastwm import config as cfg
from fastwm import diagnose
from fastwm.diagnose_rules import RULES, History, findings

GUIDE = Path(__file__).parents[1] / "docs" / "guide_modular.md"
# A run in which everything is as it should be: names under train/, first and last value.
HEALTHY = {
    "opt/skipped": (0, 0),
    "state_finite": (1, 1),
    "dynamics_mse": (0.5, 0.01),
    "dynamics_mse_relative": (0.9, 0.02),
    "openloop_error_5": (2.0, 0.1),
    "loss/dyn": (1.0, 3.0),
    "state_std": (0.5, 0.9),
    "decoder_reconstruction_loss": (1.0, 0.1),
    "reward_mae": (0.5, 0.1),
    "reward_mean_std": (1.0, 0.15),
    "reward_corr": (0.1, 0.95),
    "reward_abs_max": (1, 1),
    "continue_accuracy": (0.7, 0.98),
    "continue_recall_0": (0.1, 0.8),
    "warmup_phase": (1, 0),
    "mean_imagined_return": (1.0, 50.0),
    "entropy_share": (0.99, 0.4),
    "world_model_grad_norm": (9.0, 1.0),
    "actor_grad_norm": (2.0, 1.0),
    "critic_grad_norm": (9.0, 2.0),
    "critic_value_std": (0.1, 9.0),
    "critic_target_std": (1.0, 10.0),
    "critic_explained_variance": (0.0, 0.9),
    "critic_td_error_abs_mean": (1.0, 0.5),
}
SETTINGS = cfg.flatten(cfg.load(["modular"])[0]) | {"rssm.free_nats": 1.0}
# rule -> what makes it fire: newest or (first, last) values, or settings
BROKEN = {
    "numbers": {"opt/skipped": (0, 2)},
    "dynamics": {"dynamics_mse": (0.5, 0.2)},
    "dynamics_relative": {"dynamics_mse_relative": (0.9, 0.3)},
    "open_loop": {"openloop_error_5": (2.0, 0.6)},
    "kl": {"loss/dyn": (1.0, 1.0)},
    "states": {"state_std": (0.5, 0.001)},
    "decoder": {"decoder_reconstruction_loss": (1.0, 0.99)},
    "reward_spread_wide": {"reward_mae": (0.5, 0.2), "reward_mean_std": (1.0, 1.0)},
    "reward_spread_narrow": {"reward_mae": (0.5, 1.0), "reward_mean_std": (1.0, 0.1)},
    "reward_corr": {"reward_corr": (0.1, 0.7)},
    "reward_scale": {"reward_abs_max": (1, 11)},
    "continue": {"continue_accuracy": (0.7, 0.75)},
    "continue_ends": {"continue_recall_0": (0.1, 0.3)},
    "warm_up": {"warmup_phase": (1, 1)},
    "imagined_return": {"mean_imagined_return": (9.0, 9.0)},
    "entropy_gone": {"entropy_share": (0.01, 0.4)},
    "entropy_stays": {"entropy_share": (0.99, 0.99)},
    "world_model_gradient": {"world_model_grad_norm": (9.0, 101.0)},
    "actor_gradient": {"actor_grad_norm": (2.0, 1e-7)},
    "critic_gradient": {"critic_grad_norm": (9.0, 2000.0)},
    "critic_collapsed": {"critic_value_std": (0.1, 0.1)},
    "critic_explains": {"critic_explained_variance": (0.0, 0.6)},
    "critic_error": {"critic_td_error_abs_mean": (1.0, 11.0)},
    "evaluation_flat": {"eval/return": (20.0, 20.0)},
    "evaluation_fell": {"eval/return": (20.0, 500.0, 100.0)},
    "horizon": {"imagination_horizon": 4},
    "entropy_weight": {"entropy_coef": 9e-6},
}


def history(changes=(), updates=1000) -> History:
    changes = dict(changes)
    settings = {key: changes.pop(key) for key in list(changes) if key in SETTINGS}
    courses = {f"train/{key}": value for key, value in HEALTHY.items()}
    courses["eval/return"] = (20.0, 500.0)
    for key, value in changes.items():
        courses[key if key.startswith("eval/") else f"train/{key}"] = value
    rows = []
    for i in range(12):
        row = {key: v[min(i * len(v) // 12, len(v) - 1)] for key, v in courses.items()}
        rows.append(row | {"env_steps": 100 * i, "updates": updates * i // 11})
    return History(rows, SETTINGS | settings)


def states(history: History) -> dict[str, str]:
    return {finding.rule.name: finding.state for finding in findings(history)}


def test_a_healthy_run_fires_nothing():
    assert set(states(history()).values()) == {"fine"}


@pytest.mark.parametrize("name", BROKEN)
def test_a_rule_fires_on_what_it_is_about(name):
    assert states(history(BROKEN[name]))[name] == "fires"


def test_every_rule_has_a_case_and_stands_in_the_guide():
    assert [rule.name for rule in RULES] == list(BROKEN)
    named = re.findall(r"^\| `(\w+)` \|", GUIDE.read_text(), re.M)
    assert [name for name in BROKEN if name not in named] == []
    for rule in RULES:  # advice speaks of settings that exist
        keys = [*SETTINGS, *cfg.flatten(cfg.load(["dreamerv3"])[0]), "nan_dump", "best"]
        for word in re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", rule.advice):
            known = any(word in key for key in keys) or f"train/{word}" in PAGE
            known = known or word in ("residual", "next_state", "min_std", "learn_std")
            assert known, f"{rule.name}: {word}"


PAGE = (GUIDE.parent / "metrics.md").read_text()


def test_a_young_run_is_not_blamed_for_not_having_learned():
    found = states(history({"dynamics_mse": (0.5, 0.5)}, updates=100))
    assert found["dynamics"] == "unknown" and found["reward_scale"] == "fine"


def test_what_is_not_logged_is_unknown():
    empty = History([{"env_steps": 1, "updates": 1}], {})
    assert set(states(empty).values()) == {"unknown"}
    nulls = history({"reward_corr": (None, None)})
    assert states(nulls)["reward_corr"] == "unknown"


def test_states_that_are_not_numbers_fire():
    assert states(history({"state_finite": (1, None)}))["numbers"] == "fires"


def write(folder: Path, made: History, argv=("modular",)) -> Path:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in made.rows)
    (folder / "metrics.jsonl").write_text(text + '{"env_steps": 13')  # a line being written
    (folder / "config.toml").write_text(cfg.to_toml(cfg.load(argv)[0]))
    return folder


def test_the_command(tmp_path, capsys):
    run = write(tmp_path / "run", history(BROKEN["continue_ends"]))
    assert diagnose.main([str(run)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("modular on cartpole: env_steps 1100, updates 1000\n")
    assert re.search(r"fires +continue_ends +continue_accuracy 0.98, continue_recall_0 0.3", text)
    assert "try: class imbalance" in text and "1 rules fire" in text and "fine " not in text
    assert diagnose.main([str(run), "--all"]) == 0
    text = capsys.readouterr().out
    assert "fine     dynamics " in text and "unknown  kl " in text  # no free_nats here


def test_dreamer_runs_too(tmp_path, capsys):
    rows = [
        {"env_steps": i, "updates": 100 * i, "train/rand": 0.99, "train/loss/dyn": 1.0}
        | {"train/opt/grad_norm": 1.0, "train/opt/skipped": 0}
        for i in range(12)
    ]
    run = write(tmp_path / "run", History(rows, {}), ("dreamerv3", "--imag_horizon", "3"))
    assert diagnose.main([str(run)]) == 0
    text = capsys.readouterr().out
    for name in ("kl", "entropy_stays", "horizon"):
        assert re.search(rf"^fires +{name} ", text, re.M), name
    assert "3 rules fire" in text


def test_no_run_is_a_mistake(tmp_path, capsys):
    assert diagnose.main([str(tmp_path)]) == 2
    assert "expected a run folder with metrics.jsonl and config.toml" in capsys.readouterr().err
