"""How much of the score could a value head know? `python tools/value_head.py` (two to four minutes on two cores).

The untrained policy answers 400 training prompts, 16 at a time as PPO does. A linear head on the last hidden states is then fitted by
ridge regression on the first batches, to the score that ends each response, and tried on the answers of the last nine batches. Printed:
the share of the variance (over tokens) that it explains there. 0 is what a constant explains; the strength of the ridge is the best
of those tried on these same answers, so the numbers are a ceiling."""

import random

import torch

from rlhf_helpers.config import CPU, project_root
from rlhf_helpers.data import load_prompts
from rlhf_helpers.models import load_policy
from rlhf_helpers.reward import ensure_reward_model
from rlhf_helpers.trainer import PPOTrainer

BATCHES, TRIED_ON = 25, 9
STRENGTHS = (1e3, 1e4, 1e5, 1e6)


def batches_of(trainer, reward_model):
    """For each batch (hidden states of all tokens (N, H), the score of the response each belongs to (N,))."""
    prompts = load_prompts(project_root() / CPU.prompts)
    random.Random(0).shuffle(prompts)
    found, size = [], trainer.config.batch_size
    for start in range(0, BATCHES * size, size):
        batch = [prompts[i % len(prompts)] for i in range(start, start + size)]
        responses = trainer.generate(trainer.encode(batch)[1])
        scores = reward_model(batch, trainer.decode(responses))
        hidden = [response.drawn.hidden.float() for response in responses]
        found.append((torch.cat(hidden), torch.cat([torch.full((len(h),), float(s)) for h, s in zip(hidden, scores)])))
    return found


def ridge(hidden, scores, strength):
    """(w, b) of the head w h + b that is nearest to the scores, with a penalty of `strength` x |w|^2."""
    mean, level = hidden.mean(0), scores.mean()
    centred = hidden - mean
    w = torch.linalg.solve(centred.T @ centred + strength * torch.eye(hidden.shape[1]), centred.T @ (scores - level))
    return w, level - mean @ w


def explained(head, hidden, scores):
    w, b = head
    return (1 - ((scores - hidden @ w - b) ** 2).mean() / scores.var()).item()


def main():
    policy, tokenizer = load_policy(CPU)
    trainer = PPOTrainer(CPU.ppo_config(), policy, tokenizer=tokenizer)
    found = batches_of(trainer, ensure_reward_model())
    tried_on = [torch.cat(parts) for parts in zip(*found[-TRIED_ON:])]
    print("batches to learn from   share of the variance explained, by strength of the ridge")
    for number in (1, 2, 4, 8, BATCHES - TRIED_ON):
        learnt = [torch.cat(parts) for parts in zip(*found[:number])]
        shares = {strength: explained(ridge(*learnt, strength), *tried_on) for strength in STRENGTHS}
        print(f"{number:21d}   " + "  ".join(f"{strength:.0e}: {share:+.2f}" for strength, share in shares.items()))


if __name__ == "__main__":
    main()
