"""Advantages without a critic. Each takes the place of `rollout.gae_advantages` in `PPOTrainer(advantages=...)`.

A response's return is the sum of its rewards: the score less the price of its KL. These methods give all tokens of a response the
same advantage (Ahmadian et al. 2024, arXiv:2402.14740): its return less a baseline from the other responses. The responses to
one prompt stand together, PPOConfig.num_generations of them. The value head is asked nothing, and in a batch's first pass taught
nothing; in later ones its loss holds it where it was, unless PPOConfig.vf_coef is 0."""

import torch

from rlhf_helpers import ppo
from rlhf_helpers.errors import InputError


def no_baseline(rollout, config, total=ppo.alone):
    """The return itself: REINFORCE (Williams 1992)."""
    return of_responses(rollout, rollout.rewards.sum(1), total)


def batch_mean(rollout, config, total=ppo.alone):
    """The return less the mean over the batch: REINFORCE with the simplest baseline."""
    returns = rollout.rewards.sum(1)
    return of_responses(rollout, returns - total(returns.sum()) / total(torch.ones_like(returns).sum()), total)


def leave_one_out(rollout, config, total=ppo.alone):
    """The return less the mean of the prompt's other responses (RLOO; Kool et al. 2019). That is k / (k - 1) times `group_mean`, a
    factor which `of_responses` takes out again: here the two are one method."""
    k, groups = config.num_generations, by_prompt(rollout, config)
    return of_responses(rollout, (groups - groups.mean(1, keepdim=True)) * k / (k - 1), total)


def group_mean(rollout, config, total=ppo.alone):
    """The return less the mean of the prompt's responses, itself included: the baseline of "Dr. GRPO" (Liu et al. 2025,
    arXiv:2503.20783), which has no scaling of the batch either."""
    groups = by_prompt(rollout, config)
    return of_responses(rollout, groups - groups.mean(1, keepdim=True), total)


def group_normalised(rollout, config, total=ppo.alone):
    """The same over the deviation of the prompt's responses (GRPO, Shao et al. 2024, arXiv:2402.03300)."""
    groups = by_prompt(rollout, config)
    return of_responses(rollout, (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4), total)


def by_prompt(rollout, config):
    """The returns of the batch, (prompts, num_generations)."""
    if config.num_generations < 2:
        raise InputError(f"PPOConfig.num_generations is {config.num_generations}; expected at least 2 responses to compare")
    size = config.num_generations
    if len(rollout.rewards) % size:
        raise InputError(f"{len(rollout.rewards)} responses; expected a multiple of num_generations = {size}")
    prompts = getattr(rollout, "prompts", None) or []
    for start in range(0, len(prompts), size):
        if len(set(prompts[start : start + size])) > 1:
            raise InputError(f"responses {start} to {start + size - 1} are to different prompts; expected one prompt a group")
    return rollout.rewards.sum(1).view(-1, size)


def of_responses(rollout, advantages, total):
    """(advantages, returns), both (B, T): each response's number on all its tokens, brought to a mean square of 1 over the batch's
    tokens as whitening does (so that one learning rate serves all methods), and returns that ask nothing of the value head."""
    advantages = torch.where(rollout.mask, advantages.reshape(-1, 1), 0.0)
    return advantages * torch.rsqrt(ppo.masked_mean(advantages**2, rollout.mask, total) + 1e-8), rollout.values.clone()


ADVANTAGES = dict(
    no_baseline=no_baseline,
    batch_mean=batch_mean,
    leave_one_out=leave_one_out,
    group_mean=group_mean,
    group_normalised=group_normalised,
)
