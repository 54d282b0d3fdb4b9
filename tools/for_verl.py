"""Hands what this course made to verl, for models and batches beyond `--shard`: prompts, reward model, adapters, settings.

    python tools/for_verl.py output/for_verl [--profile gpu] [--checkpoint output/run/checkpoint]

writes train.jsonl, val.jsonl, adapter/ (with --checkpoint) and command.txt: how verl is started with them. In verl's environment
this repository must be on PYTHONPATH: verl scores with `compute_score` below. The formats are those of verl 0.9.1
(tests/verl_0_9_1.json); verl itself was not run here.

What does not come along: the value head (verl trains a critic of its own), the 4-bit base (verl keeps it in bf16), the penalty for a
missing EOS (verl shows a reward function the text alone), and the KL budget."""

import argparse
import functools
import json
import shlex
import shutil
from pathlib import Path

from rlhf_helpers.config import PROFILES, profile_named, project_root
from rlhf_helpers.data import load_prompts, save_jsonl, turns
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import read_json

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def rows(prompts, split, system=None):
    """A row for each prompt, as verl's RLHFDataset reads it. `prompt` is what a chat template takes; the prompt as the reward model
    reads it is in extra_info, and travels with the row to `compute_score`."""
    chats = [turns(prompt) for prompt in prompts]
    first = [{"role": "system", "content": system}] if system else []
    return [
        {
            "data_source": "rlhf-ppo-notebooks",
            "prompt": chat if chat[0]["role"] == "system" else first + chat,
            "ability": "chat",
            "reward_model": {"style": "model", "ground_truth": ""},  # verl wants one; a preference has none
            "extra_info": {"split": split, "index": index, "prompt": prompt},
        }
        for index, (prompt, chat) in enumerate(zip(prompts, chats))
    ]


def compute_score(data_source, solution_str, ground_truth, extra_info=None, folder=None, **_):
    """verl's reward.custom_reward_function: the reward model's standardised score of one response, a float."""
    return float(reward_model(folder)([extra_info["prompt"]], [solution_str])[0])


@functools.cache
def reward_model(folder):
    from rlhf_helpers.reward import RewardModel

    return RewardModel.load(folder)


def settings(profile, folder, reward_folder, model, cards=1):
    """{verl's key: value} of a PPO run as near to the profile's as verl has settings for, on one machine. A leading + adds a key."""
    config, adapter = profile.ppo_config(), folder / "adapter"
    lora = dict(r=profile.lora_r, lora_alpha=profile.lora_alpha, target_modules=list(profile.lora_targets))
    if adapter.is_dir():
        lora |= json.loads((adapter / ADAPTER[0]).read_text(encoding="utf-8"))
    actor, rollout, micro = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "micro_batch_size_per_gpu"
    keys = {
        "data.train_files": str(folder / "train.jsonl"),
        "data.val_files": str(folder / "val.jsonl"),
        "data.train_batch_size": config.batch_size,
        "data.max_response_length": config.max_new_tokens,
        "actor_rollout_ref.model.path": model,
        "actor_rollout_ref.model.lora_rank": lora["r"],
        "actor_rollout_ref.model.lora_alpha": lora["lora_alpha"],
        "actor_rollout_ref.model.target_modules": sorted(lora["target_modules"]),
        f"{actor}.ppo_mini_batch_size": config.mini_batch_size * config.gradient_accumulation_steps,
        f"{actor}.ppo_{micro}": config.mini_batch_size,
        f"{actor}.ppo_epochs": config.ppo_epochs,
        f"{actor}.optim.lr": config.learning_rate,
        f"{actor}.clip_ratio": config.cliprange,
        f"{actor}.grad_clip": config.max_grad_norm,
        f"{rollout}.name": "vllm",
        f"{rollout}.load_format": "safetensors",  # verl asks for it where there is LoRA
        f"{rollout}.temperature": config.temperature,
        f"{rollout}.log_prob_{micro}": config.mini_batch_size,
        f"actor_rollout_ref.ref.log_prob_{micro}": config.mini_batch_size,
        "critic.model.path": model,
        f"critic.ppo_{micro}": config.mini_batch_size,
        "critic.cliprange_value": config.cliprange_value,
        "critic.optim.lr": config.value_learning_rate or config.learning_rate,
        "algorithm.adv_estimator": "gae",
        "algorithm.gamma": config.gamma,
        "algorithm.lam": config.lam,
        "algorithm.use_kl_in_reward": True,  # k1, a token at a time, as here
        "algorithm.kl_penalty": "kl",
        "algorithm.kl_ctrl.kl_coef": config.init_kl_coef,
        "reward.custom_reward_function.path": str(Path(__file__).resolve()),
        "reward.custom_reward_function.name": "compute_score",
        "+reward.custom_reward_function.reward_kwargs.folder": str(reward_folder),
        f"{rollout}.tensor_model_parallel_size": 1,  # by default two cards share a sampler
        "trainer.nnodes": 1,
        "trainer.n_gpus_per_node": cards,
        "trainer.logger": ["console"],
    }
    return keys | ({"actor_rollout_ref.model.lora_adapter_path": str(adapter)} if adapter.is_dir() else {})


def command(keys):
    """The line that starts verl with these settings, as a shell reads it."""
    written = lambda value: json.dumps(value) if isinstance(value, (bool, list)) else str(value)
    return shlex.join(["python", "-m", "verl.trainer.main_ppo", *(f"{key}={written(value)}" for key, value in keys.items())])


def hand_over(folder, profile, checkpoint=None, cards=1):
    """Write everything into `folder`. Raises InputError, having written nothing, without adapters in the checkpoint, or
    with another model's."""
    from rlhf_helpers.models import resolve

    for name in ADAPTER if checkpoint else ():
        if not (Path(checkpoint) / name).is_file():
            raise InputError(f"{checkpoint}: no {name}; expected a folder made by PPOTrainer.save, or by PEFT")
    if checkpoint:
        base = read_json(Path(checkpoint) / "adapter_config.json").get("base_model_name_or_path")
        if base and Path(base).name != Path(profile.model).name:
            raise InputError(f"{checkpoint}: adapters of {base}; expected those of profile {profile.name}, {profile.model}")
    folder, root = Path(folder).resolve(), project_root()
    heldout = load_prompts(root / profile.heldout_prompts)
    prompts = [prompt for prompt in load_prompts(root / profile.prompts) if prompt not in set(heldout)]
    (folder / "adapter" if checkpoint else folder).mkdir(parents=True, exist_ok=True)
    for name in ADAPTER if checkpoint else ():
        shutil.copy(Path(checkpoint) / name, folder / "adapter" / name)
    save_jsonl(folder / "train.jsonl", rows(prompts, "train", profile.system))
    save_jsonl(folder / "val.jsonl", rows(heldout, "val", profile.system))
    keys = settings(profile, folder, (root / profile.reward_model).resolve(), resolve(profile.model), cards)
    (folder / "command.txt").write_text(command(keys) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--profile", default="gpu", help=f"{' or '.join(PROFILES)} (default: gpu)")
    parser.add_argument("--cards", type=int, default=1, help="of the machine that verl will run on (default: 1)")
    parser.add_argument("--checkpoint", help="a folder of adapters to go on from (default: new ones)")
    options = parser.parse_args()
    try:
        print(f"written to {hand_over(options.folder, profile_named(options.profile), options.checkpoint, options.cards)}")
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
