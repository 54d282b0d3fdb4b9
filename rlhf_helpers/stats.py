"""The stats of a step under TRL 0.11's keys (its logging guide says what each means): floats, and numpy arrays for distributions.
Ours in addition: objective/sampler_kl and sampler_max_diff, ppo/policy/ratio_mean and first_ratio_error, ppo/grad_norm,
ppo/skipped_updates, tokens/responses_eos_frac."""

import math
import time

import numpy as np
import torch

from rlhf_helpers import ppo

ARRAYS = ("policy/advantages", "policy/ratio")


def as_array(values):
    """A float array of a list, an array, or a tensor on whatever device, with a gradient or without."""
    return np.asarray(values.detach().cpu().double() if isinstance(values, torch.Tensor) else values, dtype=float)


def minibatch_stats(rollout, rows, new, vf_coef, total):
    """A dict of one minibatch, some `rows` of the Rollout: floats (means over its tokens), and the arrays of ARRAYS over its tokens.

    `new` holds what its pass gave, (B, T) tensors: logprobs, values, entropy, policy_losses, policy_clipped, value_losses,
    value_clipped. `total` sums a number over processes: floats are those of all, arrays of this process."""
    mask, advantages, returns = rollout.mask[rows], rollout.advantages[rows], rollout.returns[rows]
    old_logprobs, old_values = rollout.logprobs[rows], rollout.values[rows]
    mean = lambda x: ppo.masked_mean(x, mask, total).item()
    ratio = ppo.policy_ratio(new.logprobs, old_logprobs)
    policy_loss, value_loss = mean(new.policy_losses), mean(new.value_losses)
    return {
        "loss/policy": policy_loss,
        "loss/value": value_loss,
        "loss/total": policy_loss + vf_coef * value_loss,
        "policy/entropy": mean(new.entropy),
        "policy/approxkl": 0.5 * mean((new.logprobs - old_logprobs) ** 2),
        "policy/policykl": mean(old_logprobs - new.logprobs),
        "policy/clipfrac": mean(new.policy_clipped.float()),
        "policy/advantages_mean": mean(advantages),
        "policy/ratio_mean": mean(ratio),
        "policy/advantages": advantages[mask].cpu().numpy(),
        "policy/ratio": ratio[mask].cpu().numpy(),
        "returns/mean": mean(returns),
        "returns/var": ppo.masked_var(returns, mask, total).item(),
        "val/vpred": mean(new.values),
        "val/error": mean((new.values - returns) ** 2),
        "val/clipfrac": mean(new.value_clipped.float()),
        "val/mean": mean(old_values),
        "val/var": ppo.masked_var(old_values, mask, total).item(),
    }


def step_stats(rollout, updates, kl_coef, total):
    """The dict of one step, from its Rollout and the list of its minibatches' stats. `ppo/*` are means over minibatches.
    `total` sums a number over processes: floats are those of all, arrays of this process."""
    mask, device = rollout.mask, rollout.mask.device
    every = torch.ones(len(rollout), dtype=torch.bool, device=device)
    mean = lambda x: ppo.masked_mean(x, every, total).item()
    std = lambda x: ppo.masked_var(x, every, total).sqrt().item()
    kl = torch.where(mask, rollout.kl, 0.0).sum(1)
    lengths = rollout.lengths.float()
    query_lengths = torch.tensor([float(len(query)) for query in rollout.queries], dtype=torch.float32, device=device)
    stats = {
        "objective/kl": mean(kl),
        "objective/kl_dist": kl.cpu().numpy(),
        "objective/logprobs": rollout.logprobs.cpu().numpy(),
        "objective/ref_logprobs": rollout.ref_logprobs.cpu().numpy(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": -mean(rollout.logprobs.sum(1)),
        "ppo/mean_non_score_reward": ppo.masked_mean(rollout.non_score_rewards, mask, total).item(),
        "ppo/mean_scores": mean(rollout.scores),
        "ppo/std_scores": std(rollout.scores),
        "tokens/queries_len_mean": mean(query_lengths),
        "tokens/queries_len_std": std(query_lengths),
        "tokens/queries_dist": query_lengths.cpu().numpy(),
        "tokens/responses_len_mean": mean(lengths),
        "tokens/responses_len_std": std(lengths),
        "tokens/responses_dist": lengths.cpu().numpy(),
        "tokens/responses_eos_frac": mean(rollout.ended.float()),
    }
    steps = [update for update in updates if "grad_norm" in update]  # the last minibatch of each optimizer step
    for name in [name for name in updates[0] if name not in ("grad_norm", "skipped", *ARRAYS)]:
        stats[f"ppo/{name}"] = sum(update[name] for update in updates) / len(updates)
    for name in ARRAYS:
        stats[f"ppo/{name}"] = np.concatenate([update[name] for update in updates])
    first_ratio = updates[0]["policy/ratio"]  # 1: nothing has moved yet (of this process)
    stats["ppo/policy/first_ratio_error"] = float(np.abs(first_ratio - 1).max())
    stats["ppo/grad_norm"] = sum(update["grad_norm"] for update in steps) / len(steps)
    stats["ppo/skipped_updates"] = sum(update["skipped"] for update in steps)
    returns_var = stats["ppo/returns/var"]
    stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / returns_var if returns_var else math.nan
    return stats


def sampler_stats(rollout, accelerator, logprobs, rows=slice(None)):
    """How far the sampler is from the policy that learns, over all processes: with d = the sampler's minus the trainer's log-prob
    of a token (`logprobs`, (B, T)), objective/sampler_kl is e^-d - 1 + d summed over a response and averaged (k3, nats), and
    objective/sampler_max_diff the largest |d|. Only `rows` count, those that were compared. Both are NaN for responses that
    `generate` did not give."""
    if rollout.sampler_logprobs is None:
        difference = torch.full_like(rollout.mask, math.nan, dtype=torch.float32)[rows]
    else:
        difference = torch.where(rollout.mask, rollout.sampler_logprobs - logprobs, 0.0)[rows]
    per_response = (torch.exp(-difference) - 1 + difference).sum(1)
    total, count = accelerator.gather(torch.stack([per_response.sum(), torch.ones_like(per_response).sum()])).view(-1, 2).sum(0)
    largest = accelerator.gather(difference.abs().amax()[None])
    return {"objective/sampler_kl": (total / count).item(), "objective/sampler_max_diff": largest.max().item()}


class Clock:
    """Seconds between laps, by name, in `laps`."""

    def __init__(self):
        self.laps, self.last = {}, time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now
