"""Make the logs of data/runs/ again: `python data/make_runs.py RUN --seed N` (5 to 8 minutes each on two CPU cores).

Notebook 07 plots these runs: PPO with and without a price on KL, and three remedies against reward hacking. All of them
take the CPU profile with four times its learning rate, so that what takes a day on a large model shows in minutes. Every step is one
line: the proxy (what the reward model gave), the gold (what the annotator's rule gives the same responses), KL, entropy."""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch

from rlhf_helpers.config import CPU, project_root
from rlhf_helpers.course.gold import distinct2, gold_reward, names_subject, prefers_first, warm_words
from rlhf_helpers.data import load_preferences, load_prompts, save_jsonl
from rlhf_helpers.models import load_policy
from rlhf_helpers.reward import RewardModel, ensure_reward_model, train_reward_model
from rlhf_helpers.trainer import PPOTrainer

RUNS = {  # the price of KL, and which reward model is asked
    "none": (0.0, "one"),
    "kl_0.1": (0.1, "one"),
    "kl_0.4": (0.4, "one"),
    "ensemble": (0.0, "ensemble"),
    "retrained": (0.0, "retrained"),
}
STEPS, LEARNING_RATE = 48, 2e-3


def log_of(trainer, stats):
    """One line of a log: what the step's responses got, and what they are like."""
    rollout = trainer.rollout
    prompts, texts = rollout.prompts, rollout.texts
    return dict(
        step=trainer.steps_done,
        proxy=round(stats["ppo/mean_scores"], 4),
        gold=round(mean(map(gold_reward, prompts, texts)), 4),
        kl=round(stats["objective/kl"], 3),
        entropy=round(stats["ppo/policy/entropy"], 3),
        warm_words=round(mean(map(warm_words, texts)), 3),
        on_subject=round(mean(map(names_subject, prompts, texts)), 3),
        distinct2=round(distinct2(texts), 3),
        length=round(stats["tokens/responses_len_mean"], 2),
        value_loss=round(stats["ppo/loss/value"], 4),
        text=texts[0],
    )


def reward_of(kind):
    """The reward function of a run. The first reward model is the course's; others are made where they are missing."""
    first = ensure_reward_model()
    if kind == "one":
        return first
    second = project_root() / "output" / f"reward_model_{kind}"
    if not second.exists():
        pairs = load_preferences(HERE / "pairwise_prefs_part_1.jsonl")
        if kind == "retrained":
            pairs += hacked_pairs()
        train_reward_model(pairs, second, seed=1 if kind == "ensemble" else 0)
    second = RewardModel.load(second)
    if kind == "retrained":
        return second
    return lambda prompts, responses: torch.minimum(first(prompts, responses), second(prompts, responses))


def hacked_pairs():
    """New preference pairs: what the run without a penalty wrote in its second half, against base responses to the same
    prompts, judged by the annotator with its usual noise."""
    import random

    rng, base = random.Random(0), {}
    for pair in load_preferences(HERE / "pairwise_prefs_part_1.jsonl"):
        base.setdefault(pair["prompt"], []).append(pair["chosen"])
    pairs = []
    for row in load_samples():
        for text in base.get(row["prompt"], [])[:1]:
            first = prefers_first(row["prompt"], row["response"], text, rng)
            chosen, rejected = (row["response"], text) if first else (text, row["response"])
            pairs.append(dict(prompt=row["prompt"], chosen=chosen, rejected=rejected))
    return pairs


def load_samples():
    file = project_root() / "output" / "runs" / "hacked.jsonl"
    if not file.is_file():
        raise SystemExit(f"{file}: missing; first run: python data/make_runs.py none --seed 0")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    kl_coef, kind = RUNS[options.run]
    reward = reward_of(kind)
    config = CPU.ppo_config(init_kl_coef=kl_coef, learning_rate=LEARNING_RATE, kl_budget=float("inf"), seed=options.seed)
    policy, tokenizer = load_policy(CPU, seed=config.seed)
    trainer = PPOTrainer(config=config, model=policy, tokenizer=tokenizer)
    log, samples = [], []

    def scored(prompts, responses):
        samples.extend(dict(step=trainer.steps_done + 1, prompt=p, response=r) for p, r in zip(prompts, responses))
        return reward(prompts, responses)

    def note(trainer, stats):
        log.append(log_of(trainer, stats))
        print({k: v for k, v in log[-1].items() if k != "text"}, flush=True)

    trainer.train(load_prompts(HERE / "pairwise_prefs_part_1.jsonl"), scored, steps=options.steps, on_step=note)
    save_jsonl(HERE / "runs" / f"{options.run}_seed{options.seed}.jsonl", log)
    if options.run == "none" and options.seed == 0:
        made = project_root() / "output" / "runs"
        made.mkdir(parents=True, exist_ok=True)
        save_jsonl(made / "hacked.jsonl", [row for row in samples if row["step"] > options.steps // 2])


if __name__ == "__main__":
    main()
