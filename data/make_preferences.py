"""Make the preference data again: `python data/make_preferences.py` (about 15 minutes on two CPU cores).

1. To every prompt of prompts_train, prompts_heldout (dev) and prompts_test the default model in NF4, without adapters and
   after the profile's system turn, writes some responses at the profile's temperature: output/base_samples/SPLIT.jsonl,
   which is used again where it is there.
2. The responses to a prompt are paired at random, each used once at most, if the annotator (rlhf_helpers/course/gold.py)
   finds them GAP or more apart; first two that are whole and on their subject, so that the pairs also tell good from better.
3. One more pair a prompt sets a response that it likes against a response to another prompt, so that whoever learns from
   the pairs must read the prompt.

On training prompts the annotator's judgement is noisy (Bradley and Terry); dev and test pairs are labelled by the rule."""

import random
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from rlhf_helpers import progress
from rlhf_helpers.config import CPU, project_root
from rlhf_helpers.course.gold import gold_reward, is_whole, prefers_first
from rlhf_helpers.data import load_prompts, read_jsonl, save_jsonl

GAP, BATCH = 0.75, 48
SPLITS = {  # name: (responses a prompt, own pairs a prompt at most, noisy labels, seed, file of pairs)
    "train": (10, 3, True, 0, "pairwise_prefs_part_1"),
    "heldout": (8, 3, False, 11, "pairwise_prefs_heldout"),
    "test": (8, 3, False, 2, "pairwise_prefs_test"),
}


def base_samples(split):
    """Records with prompt and response of the policy without its adapters, in the order of the prompts."""
    count, _, _, seed, _ = SPLITS[split]
    file = project_root() / "output" / "base_samples" / f"{split}.jsonl"
    prompts = load_prompts(HERE / f"prompts_{split}.jsonl")
    jobs = [prompt for prompt in prompts for _ in range(count)]
    rows = read_jsonl(file) if file.is_file() else []
    if [row["prompt"] for row in rows] == jobs:
        return rows
    from rlhf_helpers.models import load_policy
    from rlhf_helpers.trainer import PPOTrainer

    policy, tokenizer = load_policy(CPU)
    trainer, generator, rows = PPOTrainer(CPU.ppo_config(), policy, tokenizer=tokenizer), torch.Generator(), []
    generator.manual_seed(seed)
    with progress.bar(len(jobs), split, "samples") as done:
        for start in range(0, len(jobs), BATCH):
            batch, queries = trainer.encode(jobs[start : start + BATCH])
            texts = trainer.decode(trainer.generate(queries, reference=True, generator=generator))
            rows += [dict(prompt=prompt, response=text) for prompt, text in zip(batch, texts)]
            done.update(len(batch))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_jsonl(file, rows)
    return rows


def pairs(rows, own, noisy, seed):
    """Records with prompt, chosen, rejected: up to `own` a prompt of two responses to it, GAP or more apart in gold, and one of a
    response to it against one to another prompt."""
    rng, records, by_prompt = random.Random(seed), [], {}
    for row in rows:
        if row["response"].strip():
            by_prompt.setdefault(row["prompt"], {})[row["response"]] = gold_reward(row["prompt"], row["response"])
    liked = [(prompt, text) for prompt, gold in by_prompt.items() for text in gold if gold[text] >= GAP]

    def add(prompt, first, second):
        right = gold_reward(prompt, first) > gold_reward(prompt, second)
        first_wins = prefers_first(prompt, first, second, rng) if noisy else right
        chosen, rejected = (first, second) if first_wins else (second, first)
        records.append(dict(prompt=prompt, chosen=chosen, rejected=rejected))

    for prompt, gold in by_prompt.items():
        texts = rng.sample(list(gold), len(gold))
        for turn in range(own):
            couples = [(a, b) for i, a in enumerate(texts) for b in texts[i + 1 :] if abs(gold[a] - gold[b]) >= GAP]
            good = [(a, b) for a, b in couples if min(gold[a], gold[b]) >= GAP and is_whole(a) and is_whole(b)]
            first, second = (good if good and turn == 0 else [*couples, (None, None)])[0]
            if first is None:
                break
            add(prompt, first, second)
            texts.remove(first), texts.remove(second)
        mine = [text for text in texts if gold[text] >= GAP] or [text for text in gold if gold[text] >= GAP]
        if mine:
            others = [text for other, text in liked if other != prompt and gold_reward(prompt, text) == 0]
            add(prompt, rng.choice(mine), rng.choice(others))
    return records


def main():
    for split, (_, own, noisy, seed, name) in SPLITS.items():
        records = pairs(base_samples(split), own, noisy, seed)
        save_jsonl(HERE / f"{name}.jsonl", records)
        agree = sum(gold_reward(r["prompt"], r["chosen"]) > gold_reward(r["prompt"], r["rejected"]) for r in records)
        print(f"{name}.jsonl: {len(records)} pairs, {agree / len(records):.1%} as the rule says")


if __name__ == "__main__":
    main()
