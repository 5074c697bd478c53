"""Old names of settings: each leads to a key that exists, and says so when it does not."""

import pytest

from fastwm import config as cfg
from fastwm import config_aliases
from fastwm.config_aliases import COMMON, Convert


def load(*argv: str):
    return cfg.load(["dreamerv3", *argv])[0]


def message(*argv: str) -> str:
    with pytest.raises(cfg.ConfigError) as error:
        load(*argv)
    return str(error.value)


@pytest.mark.parametrize("algorithm", sorted(cfg.SCHEMAS))
def test_every_alias_of_an_algorithm_leads_somewhere(algorithm):
    """Also: none shadows a key, which would make the key unreachable."""
    schema = cfg.flatten(cfg.SCHEMAS[algorithm]())
    own = {n: a for n, a in config_aliases.table(algorithm).items() if n not in COMMON}
    assert set(config_aliases.names(algorithm, schema)) >= set(own)
    assert not set(config_aliases.table(algorithm)) & set(schema)


def test_every_common_alias_leads_somewhere_for_dreamer():
    known = cfg.flatten(cfg.SCHEMAS["dreamerv3"]())
    assert set(config_aliases.names("dreamerv3", known)) >= set(COMMON)


@pytest.mark.parametrize(
    "argv, same",
    [
        (["--model_lr", "3e-4"], ["--optim.lr", "3e-4"]),
        (["--learning_rate=3e-4"], ["--optim.lr", "3e-4"]),
        (["--eval_every", "1e4"], ["--eval.every", "10000"]),
        (["--eval_episode_num", "3"], ["--eval.episodes", "3"]),
        (["--eval_episode_num", "0"], ["--eval.every", "0"]),
        (["--discount", "0.99"], ["--discount_horizon", "100"]),
        (["--discount_lambda", "0.9"], ["--lam", "0.9"]),
        (["--video_pred_log", "False"], ["--log.video_every", "0"]),
        (["--video_pred_log", "true"], []),
        (["--deterministic_run", "true"], ["--deterministic", "true"]),
        (["--deterministic"], ["--deterministic", "true"]),
        (["--precision", "32"], ["--precision", "fp32"]),
        (["--logging.amp", "true"], ["--precision", "fp16"]),
        (["--dataset_size", "2e5"], ["--replay.capacity", "200000"]),
        (["--grayscale", "true"], ["--env.options.gray", "true"]),
        (["--size", "96,96"], ["--env.size", "96,96"]),
        (
            ["--units", "64"],
            "--reward.units 64 --cont.units 64 --actor.units 64 --critic.units 64".split(),
        ),
        (["--run.envs", "2"], ["--envs", "2"]),
        (["--agent.opt.wd", "0.1"], ["--optim.weight_decay", "0.1"]),
        (["--agent.dyn.rssm.deter", "1024"], ["--rssm.deter", "1024"]),
        (["--agent.policy.minstd", "0.2"], ["--actor.min_std", "0.2"]),
        (["--jax.platform", "cpu"], ["--device", "cpu"]),
        (["--compile", "True"], ["--compile", "full"]),
        (["--configs", "defaults", "debug"], ["debug"]),
    ],
)
def test_an_alias_is_its_key(argv, same):
    assert load(*argv) == load(*same)


def test_the_algorithm_of_2023_has_an_optimizer_for_each_part():
    argv = "--model_lr 1 --actor_lr 2 --value_lr 3 --grad_clip 4 --dyn_discrete 0".split()
    config = cfg.load(["dreamerv3_2023", *argv])[0]
    rates = (config.optim.model.lr, config.optim.actor.lr, config.optim.critic.lr)
    assert rates == (1, 2, 3) and config.optim.model.clip == 4
    assert config.rssm.latent == "normal"
    assert cfg.load(["dreamerv3_2023", "--dyn_discrete", "8"])[0].rssm.classes == 8
    assert "--optim.lr" in message("--value_lr", "1")
    assert cfg.load(["modular", "--actor_lr", "2"])[0].actor_lr == 2


@pytest.mark.parametrize(
    "alias, key, value",
    [
        ("prefill", "replay.prefill", "7"),
        ("expl_behavior", "expl.behavior", "plan2explore"),
        ("disag_models", "expl.disag_models", "3"),
    ],
)
def test_aliases_of_exploring_and_starting(alias, key, value):
    one, two = (cfg.load(["dreamerv3_2023", f"--{k}", value])[0] for k in (alias, key))
    assert one == two != cfg.load(["dreamerv3_2023"])[0]


def test_the_origin_names_the_flag_that_was_typed():
    origins = cfg.load(["dreamerv3", "--model_lr", "1e-3"])[1]
    assert origins["optim.lr"] == "command line: --model_lr"


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--modl_lr", "1"], ["unknown key 'modl_lr'", "model_lr"]),
        (["--eval_evry", "1"], ["unknown key", "eval_every"]),
        (["--model_lr", "fast"], ["optim.lr: expected a number, got 'fast'", "--model_lr"]),
        (["--discount", "1.5"], ["discount: expected a discount between 0 and 1, got '1.5'"]),
        (["--video_pred_log", "7"], ["video_pred_log: expected true or false, got '7'"]),
        (["--discount"], ["discount: expected a discount", "got none"]),
        (["--model_lr", "1", "--optim.lr", "2"], ["optim.lr: expected once", "--model_lr"]),
        (["--units", "8", "--actor.units", "9"], ["actor.units: expected once", "--units"]),
        (["--run.log_every", "120"], ["run.log_every", "seconds", "--log.every"]),
        (["--kl_beta", "1"], ["--loss.dyn"]),
        (["--compile", "yes"], ["compile: expected one of 'auto', 'off'", "got 'yes'"]),
    ],
)
def test_bad_aliases_say_what_to_do(argv, parts):
    text = message(*argv)
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_an_alias_counts_only_where_its_key_exists():
    known = {"steps": None}
    assert config_aliases.translate("dreamerv3", "model_lr", "1", known) is None
    assert config_aliases.names("dreamerv3", known) == ["total_steps", "run.steps"]


def test_an_alias_is_for_the_command_line_only(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("model_lr = 1e-3\n")
    assert "unknown key 'model_lr'" in message(str(path))


def test_conversions_name_their_key():
    for alias in config_aliases.table("dreamerv3").values():
        if isinstance(alias, Convert):
            assert alias.needs in cfg.flatten(cfg.SCHEMAS["dreamerv3"]())


def test_help_finds_aliases(capsys):
    with pytest.raises(SystemExit):
        load("--help", "model_lr")
    assert "--model_lr" in (text := capsys.readouterr().out) and "the same as --optim.lr" in text


def ha(*argv: str):
    return cfg.load(["ha", *argv])[0]


@pytest.mark.parametrize(
    "argv, same",
    [
        (["--env", "CarRacing-v2"], []),
        (["--env", "BipedalWalker-v3"], ["--task", "gymnasium:BipedalWalker-v3"]),
        (["--latent_size", "16"], ["--vae.latent", "16"]),
        (["--rnn_hidden", "128"], ["--rnn.hidden", "128"]),
        (
            ["--vae_epochs", "50", "--rnn_epochs", "30"],
            ["--vae.epochs", "50", "--rnn.epochs", "30"],
        ),
        (["--ctrl_pop_size", "16"], ["--ctrl.pop", "16"]),
        (["--ctrl_samples", "4"], ["--ctrl.samples", "4"]),
        (["--ctrl_time_limit", "500"], ["--ctrl.time_limit", "500"]),
        (["--ctrl_target", "900"], ["--ctrl.target", "900"]),
        (["--num_rollouts", "1000"], ["--collect.episodes", "1000"]),
        (["--nosamples"], ["--vae.sample_interval", "0", "--rnn.sample_interval", "0"]),
        (["--nosamples", "false"], []),
        (["--seq_len", "32"], ["--rnn.batch_length", "32"]),
        (["--vae.learning_rate", "2e-3"], ["--vae.lr", "2e-3"]),
        (["--mdrnn.learning_rate", "2e-3"], ["--rnn.lr", "2e-3"]),
        (["--WMControllerConfig.pop_size", "10"], ["--ctrl.pop", "10"]),
        (["--WMVAEConfig.height", "64"], []),
        (["--include_reward", "true"], ["--rnn.reward", "true"]),
        (["--max-workers", "8"], ["--ctrl.env_threads", "8"]),
        (["--generate_only"], ["--generate_only", "true"]),
    ],
)
def test_names_of_world_models(argv, same):
    assert ha(*argv) == ha(*same)


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--noreload"], ["noreload", "another --logdir"]),
        (["--no_precompute_latents"], ["stage latents"]),
        (["--learning_rate", "1"], ["--vae.lr or --rnn.lr"]),
        (["--WMVAEConfig.width", "96"], ["expected 64", "got '96'"]),
        (["--vae_epoch", "1"], ["unknown key 'vae_epoch'", "vae_epochs"]),
        (["--ctrl_samples", "1,2,3"], ["ctrl.samples: expected one number, or one for each"]),
    ],
)
def test_bad_names_of_world_models_say_what_to_do(argv, parts):
    with pytest.raises(cfg.ConfigError) as error:
        ha(*argv)
    assert all(part in str(error.value) for part in parts), error.value


def test_every_field_of_the_three_configurations_is_known():
    """The fields that torchwm documents, each as an alias, a key of ours, or with a reason."""
    fields = {
        "vae": "height width latent_size train_batch_size num_epochs learning_rate nosamples "
        "scheduler_patience scheduler_factor early_stopping_patience sample_interval",
        "mdrnn": "latent_size hidden_size gmm_components batch_size seq_len num_epochs "
        "learning_rate include_reward scheduler_patience scheduler_factor early_stopping_patience",
        "ctrl": "latent_size hidden_size env_name n_samples pop_size target_return max_workers "
        "time_limit",
    }
    classes = {"vae": "WMVAEConfig", "mdrnn": "WMMDNRNNConfig", "ctrl": "WMControllerConfig"}
    schema = cfg.flatten(cfg.SCHEMAS["ha"]())
    table = config_aliases.table("ha")
    for part, names in fields.items():
        for name in names.split():
            assert f"{part}.{name}" in table or f"{part}.{name}" in schema, (part, name)
            assert f"{classes[part]}.{name}" in table, (part, name)
    assert {"device", "data_dir", "logdir", "stage", "generate_only", "test"} <= set(schema)
    assert {"noreload", "extra", "display", "action_size"} <= set(config_aliases.REFUSED_HA)
