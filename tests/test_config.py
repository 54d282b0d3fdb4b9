"""PPOConfig and the profiles: TRL's defaults, and errors that name the field."""

import ast
from pathlib import Path

import numpy as np
import pytest

from rlhf_helpers import config
from rlhf_helpers.config import CPU, GPU, PPO_FIELDS, PPOConfig, profile_named
from rlhf_helpers.errors import InputError


def test_the_defaults_are_those_of_trl_0_11():
    trl = dict(
        batch_size=128,
        mini_batch_size=128,
        gradient_accumulation_steps=1,
        ppo_epochs=4,
        learning_rate=1.41e-5,
        gamma=1.0,
        lam=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        vf_coef=0.1,
        init_kl_coef=0.2,
        adap_kl_ctrl=True,
        target=6.0,
        horizon=10000.0,
        kl_penalty="kl",
        whiten_rewards=False,
        score_clip=None,
        early_stopping=False,
        target_kl=1.0,
        max_grad_norm=None,
        ratio_threshold=10.0,
        seed=0,
        log_with=None,
    )
    assert {name: value for name, value in vars(PPOConfig()).items() if name in trl} == trl


@pytest.mark.parametrize(
    "name, value",
    [
        ("batch_size", 0),
        ("batch_size", 4.0),
        ("batch_size", True),
        ("mini_batch_size", -1),
        ("ppo_epochs", 0),
        ("max_new_tokens", 0),
        ("gradient_accumulation_steps", "2"),
        ("learning_rate", -1e-5),
        ("learning_rate", float("nan")),
        ("learning_rate", None),
        ("cliprange", float("inf")),
        ("vf_coef", -0.1),
        ("init_kl_coef", -1),
        ("gamma", 1.5),
        ("lam", -0.1),
        ("target", 0),
        ("horizon", 0),
        ("temperature", 0.0),
        ("target_kl", -1.0),
        ("ratio_threshold", 0),
        ("score_clip", 0),
        ("max_grad_norm", -1.0),
        ("seed", -1),
        ("kl_penalty", "k3"),
        ("value_learning_rate", 0.0),
        ("kl_budget", float("nan")),
        ("kl_budget", 0),
        ("kl_penalty", ["kl"]),
        ("seed", 0.0),
        ("seed", True),
        ("seed", 2**32),
        ("log_with", ""),
        ("log_with", True),
        ("log_with", ["wandb"]),
    ],
)
def test_a_bad_value_is_refused_with_the_field_and_the_value(name, value):
    with pytest.raises(InputError) as error:
        PPOConfig(**{name: value})
    assert f"PPOConfig.{name} is {value!r}; expected " in str(error.value)


def test_a_setting_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(
        InputError, match="^PPOConfig has no setting batchsize .*; expected one of batch_size, mini_batch_size, "
    ):
        PPOConfig(batchsize=8)


# The settings of TRL 0.11.4's PPOConfig (trainer/ppo_config.py).
TRL = """exp_name seed log_with task_name model_name query_dataset reward_model remove_unused_columns tracker_kwargs accelerator_kwargs
    project_kwargs tracker_project_name push_to_hub_if_best_kwargs steps learning_rate adap_kl_ctrl init_kl_coef kl_penalty target
    horizon gamma lam cliprange cliprange_value vf_coef batch_size forward_batch_size mini_batch_size gradient_accumulation_steps
    world_size ppo_epochs max_grad_norm optimize_cuda_cache optimize_device_cache early_stopping target_kl compare_steps
    ratio_threshold use_score_scaling use_score_norm score_clip whiten_rewards gradient_checkpointing is_encoder_decoder
    is_peft_model backward_batch_size global_backward_batch_size global_batch_size dataset_num_proc""".split()


def test_a_setting_of_trl_is_one_here_or_is_refused_with_what_stands_in_its_place():
    elsewhere = [name for name in TRL if name not in PPOConfig.__dataclass_fields__]
    assert 20 < len(elsewhere) < len(TRL) - 20
    for name in elsewhere:
        with pytest.raises(InputError, match=f"^PPOConfig has no setting {name} .given as 1.: (?!expected one of)"):
            PPOConfig(batch_size=8, mini_batch_size=8, **{name: 1})


OTHER_TYPES = ["0.5", "false", True, np.float64(0.5), np.int64(1), np.float32(0.5), [1], b"1", 1 + 0j]


@pytest.mark.parametrize("field", PPO_FIELDS, ids=lambda field: field.name)
def test_a_value_of_another_type_is_refused_with_the_field_s_name(field):
    right = {"log_with": str, "system": str}.get(field.name, bool if type(field.default) is bool else None)
    for value in (value for value in OTHER_TYPES if type(value) is not right):
        with pytest.raises(InputError, match=f"^PPOConfig.{field.name} is .*; expected "):
            PPOConfig(**{field.name: value})


@pytest.mark.parametrize("name", ["learning_rate", "batch_size", "seed", "score_clip"])
def test_a_number_beyond_all_bounds_is_refused_in_a_short_sentence(name):
    with pytest.raises(InputError, match=f"PPOConfig.{name} is 1000*; expected .{{,60}}$"):
        PPOConfig(**{name: 10**400})


@pytest.mark.parametrize("name", ["adap_kl_ctrl", "whiten_rewards", "early_stopping"])
def test_a_switch_is_true_or_false_and_nothing_that_counts_as_one(name):
    assert PPOConfig(**{name: True}) != PPOConfig(**{name: False})
    for value in (1, 0, "true", "false", None, ""):
        with pytest.raises(InputError, match=f"PPOConfig.{name} is {value!r}; expected True or False"):
            PPOConfig(**{name: value})


def test_the_batch_must_divide_into_groups_of_minibatches():
    assert PPOConfig(batch_size=8, mini_batch_size=2, gradient_accumulation_steps=4).batch_size == 8
    with pytest.raises(ValueError, match=r"batch_size is 8; expected a multiple of .* = 3 x 1 = 3"):
        PPOConfig(batch_size=8, mini_batch_size=3)
    with pytest.raises(ValueError, match=r"= 2 x 3 = 6"):
        PPOConfig(batch_size=8, mini_batch_size=2, gradient_accumulation_steps=3)


def test_every_field_says_what_it_is():
    assert all(field.metadata["help"] for field in PPO_FIELDS)


def test_a_profile_s_config_takes_overrides_as_they_are_given_none_included():
    made = CPU.ppo_config(learning_rate=5e-3, kl_budget=None)
    assert (made.learning_rate, made.kl_budget, made.batch_size) == (5e-3, None, CPU.ppo["batch_size"])
    assert CPU.ppo_config().kl_budget == CPU.ppo["kl_budget"] is not None
    with pytest.raises(InputError, match="PPOConfig.gamma is None; expected a number"):
        CPU.ppo_config(gamma=None)


def test_both_profiles_are_valid_and_quantized_runs_of_the_same_batch():
    assert CPU.ppo_config().batch_size == GPU.ppo_config().batch_size
    assert GPU.gradient_checkpointing and not CPU.gradient_checkpointing


def test_an_unknown_profile_is_refused_with_the_known_ones():
    assert profile_named("cpu") is CPU
    with pytest.raises(ValueError, match="unknown profile 'tpu'; expected one of: cpu, gpu"):
        profile_named("tpu")


def test_the_root_is_the_nearest_folder_above_with_the_data(tmp_path, monkeypatch):
    monkeypatch.delenv("RLHF_HOME", raising=False)
    (tmp_path / "data").mkdir()
    (tmp_path / config.DATA_FILE).write_text("")
    inner = tmp_path / "notebooks" / "more"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert config.project_root() == tmp_path
    monkeypatch.setenv("RLHF_HOME", str(inner))
    assert config.project_root() == inner


def test_config_does_not_import_torch():
    tree = ast.parse(Path(config.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {
        "math",
        "os",
        "sys",
        "dataclasses",
        "pathlib",
        "rlhf_helpers.classic",
        "rlhf_helpers.errors",
        "rlhf_helpers.files",
    }
