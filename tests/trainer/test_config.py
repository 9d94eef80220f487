import dataclasses
from pathlib import Path

import pytest
from rpp_trainer.config import Config, ConfigError, config_from, parse_config, to_toml


def test_round_trip_through_toml(tmp_path: Path) -> None:
    config = Config(name='a "b" \\ é', learning_rate=1e-5, reward_clip=float("inf"), extras=("dual_clip",), steps=7)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert parse_config(["--config", str(file)]) == config


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("beta = 0.5\nsteps = 3\n")
    assert parse_config(["--config", str(file), "--steps", "4"]) == Config(beta=0.5, steps=4)


def test_defaults_are_those_of_table_1() -> None:
    config = Config()
    recipe = config.algorithm
    assert (recipe.name, recipe.beta, recipe.gamma, recipe.reduction) == ("reinforce_pp", 0.01, 1.0, "token-mean")
    assert recipe.loss_options["surrogate"] == "clip"  # whose own epsilons are 0.2
    assert (config.group_size, config.rollout_batch_size, config.train_batch_size) == (4, 256, 128)


def test_what_is_set_changes_the_recipe() -> None:
    recipe = Config(recipe="grpo", dialect="trl", extras=("dual_clip",), beta=0.1, reward_clip=5.0).algorithm
    assert (recipe.beta, recipe.dual_clip, recipe.std_eps, recipe.reward_clip) == (0.1, 3.0, 1e-4, (-5.0, 5.0))


def test_an_integer_will_do_for_a_float() -> None:
    assert config_from({"beta": 0}, "test").beta == 0


def test_unknown_key_in_a_file_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown key 'epsilon_hihg'; did you mean 'epsilon_high'"):
        config_from({"epsilon_hihg": 0.3}, "x.toml")


def test_unknown_option_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--group-sizee", "3"])
    assert "--group-size" in capsys.readouterr().err.replace("--group-sizee", "")


def test_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        parse_config(["--config", "nowhere.toml"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "temperature: is 0.0, wanted more than 0"),
        ({"temperature": float("nan")}, "temperature: is nan"),
        ({"train_batch_size": 100}, "train_batch_size: is 100, wanted a divisor of rollout_batch_size = 256"),
        ({"micro_batch_size": 3}, "micro_batch_size: is 3, wanted a divisor of train_batch_size = 128"),
        ({"group_size": 3}, "group_size: is 3, wanted a divisor"),
        ({"epsilon_low": 1.5}, "epsilon_low: is 1.5"),
        ({"beta": -0.1}, "beta: is -0.1, wanted 0 or more"),
        ({"steps": "many"}, "steps: is 'many', wanted a number"),
        ({"steps": 1.5}, "steps: is 1.5, wanted a number"),
        ({"logps_from": "logit"}, "logps_from: is 'logit', wanted one of"),
        ({"prompts": "x.jsonl"}, "reward: is empty, wanted with --prompts"),
        ({"baseline": "mean", "group_size": 1}, "group_size: is 1, wanted more than 1"),
        ({"recipe": "ppo"}, "recipe: is 'ppo', wanted one of"),
        ({"recipe": "raft", "dialect": "verl"}, "the dialect 'verl'"),
        ({"extras": ("duall_clip",)}, "did you mean 'dual_clip'"),
        ({"extras": "dual_clip"}, "extras: is 'dual_clip', wanted a list of texts"),
        ({"beta": "much"}, "beta: is 'much', wanted a number"),
        ({"recipe": "dr_grpo", "beta": 0.1}, "beta: has no effect on 'dr_grpo'"),
        ({"recipe": "rloo", "epsilon_low": 0.1}, "epsilon_low: want None with surrogate 'reinforce'"),
        ({"extras": ("icepop",)}, "wanted none against a rollout engine"),
        ({"recipe": "clip_cov", "micro_batch_size": 4}, "micro_batch_size: is 4, wanted 0 with token_selection"),
        ({"recipe": "raft", "group_size": 1}, "group_size: is 1, wanted more than 1"),
    ],
)
def test_bad_values_name_the_argument(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from(values, "test")


def test_help_lists_every_field_and_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "Table 1" in text
