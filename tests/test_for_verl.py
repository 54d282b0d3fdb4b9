"""What tools/for_verl.py hands over, beside what verl 0.9.1 reads: tests/verl_0_9_1.json has the keys and defaults of its
configuration (trainer/config, as its package has it), the fields of a row and the arguments of a reward function."""

import inspect
import json
import shlex
from pathlib import Path

import pytest
import yaml
from peft import PeftModel

from rlhf_helpers.config import GPU, profile_named
from rlhf_helpers.data import read_jsonl, save_jsonl
from rlhf_helpers.errors import InputError
from rlhf_helpers.models import encode_prompt
from rlhf_helpers.reward import RewardModel
from tests import tiny
from tools import for_verl

VERL = json.loads((Path(__file__).parent / "verl_0_9_1.json").read_text(encoding="utf-8"))
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
PROMPTS = ["t5 t6 t7", "\n\nHuman: t8\n\nAssistant: t9\n\nHuman: t10 t11\n\nAssistant:"]
KINDS = {"str": str, "int": int}


def check_row(expected, found, where="row"):
    """The same names, at every depth, and values of the documented kinds; extra_info may have more."""
    if isinstance(expected, dict):
        assert expected.keys() == found.keys() or where == "row.extra_info" and expected.keys() <= found.keys(), where
        for name in expected:
            check_row(expected[name], found[name], f"{where}.{name}")
    elif isinstance(expected, list):
        assert isinstance(found, list) and found
        for part in found:
            check_row(expected[0], part, where)
    else:
        assert type(found) is KINDS[expected], where


@pytest.fixture(scope="module")
def handed(tmp_path_factory, llama_folder, reward_folders):
    """(folder, profile, reward model's folder) after a run's adapters, prompts and reward model were handed over."""
    import dataclasses

    folder = tmp_path_factory.mktemp("verl")
    save_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in [*PROMPTS, "t20"]])
    save_jsonl(folder / "heldout.jsonl", [{"prompt": "t20"}])
    tiny.trainer(tiny.with_lora(tiny.llama(hidden_size=64), b_scale=0.1)).save(folder / "checkpoint")
    files = dict(prompts=str(folder / "prompts.jsonl"), heldout_prompts=str(folder / "heldout.jsonl"))
    profile = dataclasses.replace(GPU, model=str(llama_folder), reward_model=str(reward_folders[1]), **files)
    return for_verl.hand_over(folder / "out", profile, folder / "checkpoint"), profile, reward_folders[1]


def test_rows_have_the_documented_fields_and_kinds(handed):
    folder, _, _ = handed
    for split, count in (("train", 2), ("val", 1)):
        rows = read_jsonl(folder / f"{split}.jsonl")
        assert len(rows) == count and (folder / f"{split}.jsonl").suffix[1:] in VERL["data files"]
        for index, row in enumerate(rows):
            check_row(VERL["row"], row)
            assert (row["extra_info"]["split"], row["extra_info"]["index"]) == (split, index)
            assert all(message["role"] in ("system", "user", "assistant") for message in row["prompt"])


def test_the_chat_template_makes_of_a_row_the_query_that_our_trainer_makes_of_its_prompt(handed):
    folder, profile, _ = handed
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    for prompt, row in zip(PROMPTS, read_jsonl(folder / "train.jsonl")):
        theirs = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False)
        assert theirs == encode_prompt(tokenizer, prompt, profile.system).tolist()
        assert row["extra_info"]["prompt"] == prompt


def test_the_reward_function_takes_what_verl_gives_and_scores_as_our_reward_model(handed):
    folder, _, reward = handed
    accepted = inspect.signature(for_verl.compute_score).parameters
    assert list(accepted)[: len(VERL["compute_score"])] == VERL["compute_score"]
    row = read_jsonl(folder / "train.jsonl")[0]
    given = dict(data_source=row["data_source"], ground_truth=row["reward_model"]["ground_truth"])
    extra = row["extra_info"] | {"num_turns": None, "rollout_reward_scores": {}}  # verl adds these
    score = for_verl.compute_score(solution_str="a cat", extra_info=extra, folder=str(reward), **given)
    assert type(score) is float and score == RewardModel.load(reward)([PROMPTS[0]], ["a cat"]).item()


def test_every_setting_is_one_that_verl_has_and_of_its_kind(handed):
    folder, profile, reward = handed
    python, m, module, *given = shlex.split((folder / "command.txt").read_text())
    assert (python, m, module) == ("python", "-m", "verl.trainer.main_ppo")
    settings = dict(argument.split("=", 1) for argument in given)
    for key, text in settings.items():
        if key.startswith("+"):
            assert any(key[1:].startswith(name) for name in VERL["not in settings"]), key
            continue
        value, default = yaml.safe_load(text), VERL["settings"][key]
        if isinstance(default, (bool, int, float)):
            assert isinstance(value, bool) == isinstance(default, bool) and isinstance(value, (int, float)), key
            assert not isinstance(default, int) or isinstance(value, int), key
    config = profile.ppo_config()
    assert settings["actor_rollout_ref.rollout.temperature"] == str(config.temperature)
    assert settings["trainer.n_gpus_per_node"] == settings["actor_rollout_ref.rollout.tensor_model_parallel_size"] == "1"
    assert settings["critic.optim.lr"] == str(config.value_learning_rate or config.learning_rate)
    assert settings["algorithm.use_kl_in_reward"] == "true" and settings["algorithm.adv_estimator"] == "gae"
    assert settings["actor_rollout_ref.model.lora_rank"] == "4", "the adapter's own, not the profile's"
    assert settings["+reward.custom_reward_function.reward_kwargs.folder"] == str(Path(reward).resolve())
    for key in ("data.train_files", "data.val_files", "reward.custom_reward_function.path"):
        assert Path(settings[key]).is_file(), key


def test_the_adapter_is_a_folder_that_plain_peft_goes_on_from(handed):
    """verl loads it by PeftModel.from_pretrained(base, folder, is_trainable=True)."""
    folder, _, _ = handed
    lm = PeftModel.from_pretrained(tiny.llama(hidden_size=64), folder / "adapter", is_trainable=True)
    assert any(p.requires_grad and p.any() for name, p in lm.named_parameters() if "lora_B" in name)


def test_a_folder_without_adapters_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match="no adapter_config.json"):
        for_verl.hand_over(tmp_path / "out", profile_named("gpu"), tmp_path)
    assert not (tmp_path / "out").exists()


def test_adapters_of_another_model_than_the_profile_s_are_refused(tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "models/smollm2-135m-instruct"}')
    with pytest.raises(InputError, match="adapters of models/smollm2-135m-instruct; expected those of profile gpu"):
        for_verl.hand_over(tmp_path / "out", profile_named("gpu"), tmp_path)
    assert not (tmp_path / "out").exists()
