"""Make data/pairwise_prefs_part_1.jsonl again: `python data/make_preferences.py` (about 10 minutes on two CPU cores).

For every prompt of prompts_train.jsonl (and, into pairwise_prefs_heldout.jsonl, of prompts_heldout.jsonl) the default model
in NF4, without adapters, writes twelve responses at temperature 0.7. They are paired at random, each used once at most, and
the annotator of rlhf_helpers/course/gold.py says which one it prefers. Responses that it finds about equal (gold less than 1 apart)
are not paired. On training prompts its judgement is noisy (Bradley-Terry); the held-out pairs are labelled by the rule
itself, to measure by."""

import random
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from rlhf_helpers.config import CPU
from rlhf_helpers.course.gold import gold_reward, prefers_first
from rlhf_helpers.data import load_prompts, save_jsonl
from rlhf_helpers.models import load_policy
from rlhf_helpers.trainer import PPOTrainer

SAMPLES, PAIRS, GAP, BATCH = 12, 5, 1.0, 48


def responses_to(prompts, policy, tokenizer, config, seed):
    """{prompt: SAMPLES texts}, sampled from the policy without its adapters."""
    trainer = PPOTrainer(config, policy, tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(seed)
    jobs, texts = [p for p in prompts for _ in range(SAMPLES)], []
    for start in range(0, len(jobs), BATCH):
        _, queries = trainer.encode(jobs[start : start + BATCH])
        texts += trainer.decode(trainer.generate(queries, reference=True, generator=generator))
        print(f"\r{len(texts)} of {len(jobs)} responses", end="", flush=True)
    print()
    by_prompt = {}
    for prompt, text in zip(jobs, texts):
        by_prompt.setdefault(prompt, []).append(text)
    return by_prompt


def pairs(by_prompt, noisy, seed):
    """Records with prompt, chosen, rejected: up to PAIRS a prompt, each of two responses GAP or more apart in gold."""
    rng, records = random.Random(seed), []
    for prompt, texts in by_prompt.items():
        texts = [text for text in dict.fromkeys(texts) if text.strip()]
        gold = {text: gold_reward(prompt, text) for text in texts}
        rng.shuffle(texts)
        for _ in range(PAIRS):
            apart = ((a, b) for i, a in enumerate(texts) for b in texts[i + 1 :] if abs(gold[a] - gold[b]) >= GAP)
            first, second = next(apart, (None, None))
            if first is None:
                break
            first_wins = prefers_first(prompt, first, second, rng) if noisy else gold[first] > gold[second]
            chosen, rejected = (first, second) if first_wins else (second, first)
            records.append(dict(prompt=prompt, chosen=chosen, rejected=rejected))
            texts.remove(first), texts.remove(second)
    return records


def main():
    config = CPU.ppo_config()
    policy, tokenizer = load_policy(CPU)
    for split, name, noisy, seed in (
        ("heldout", "pairwise_prefs_heldout", False, 1),
        ("train", "pairwise_prefs_part_1", True, 0),
    ):
        by_prompt = responses_to(load_prompts(HERE / f"prompts_{split}.jsonl"), policy, tokenizer, config, seed)
        records = pairs(by_prompt, noisy, seed)
        save_jsonl(HERE / f"{name}.jsonl", records)
        agree = sum(gold_reward(r["prompt"], r["chosen"]) > gold_reward(r["prompt"], r["rejected"]) for r in records)
        print(f"{name}.jsonl: {len(records)} pairs on {len(by_prompt)} prompts, {agree / len(records):.1%} as the rule says")


if __name__ == "__main__":
    main()
