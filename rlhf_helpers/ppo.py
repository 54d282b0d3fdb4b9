"""The mathematics of PPO for language models, as pure functions on ``(B, T)`` tensors over response tokens.

B is the number of responses, T the length of the longest one. ``mask`` is boolean and true on the tokens that the
policy really wrote, its first EOS included; whatever stands elsewhere, even NaN, changes nothing. Everything is fp32.

Sources: Ziegler et al. 2019 (arXiv:1909.08593), Schulman et al. 2016 (GAE, arXiv:1506.02438) and 2017 (PPO,
arXiv:1707.06347), Huang et al. 2024 (the N+ implementation details, arXiv:2403.17031), TRL 0.11.4 `PPOTrainer`.
"""

import torch
import torch.nn.functional as F

LOWEST = torch.finfo(torch.float32).min  # in place of log 0: 0 log 0 counts as 0
MAX_LOG_RATIO = 20.0  # exp(20) is finite in fp32; a log-ratio beyond it is an accident, not a policy


def alone(number):
    """The sum over processes where there is one: the number itself. PPOTrainer passes Accelerate's sum as `total`."""
    return number


def masked_mean(x, mask, total=alone):
    """Mean of `x` over the true positions of `mask` (a scalar). Shapes: both (B, T)."""
    return total(torch.where(mask, x, 0.0).sum()) / total(mask.sum()).clamp(min=1)


def masked_var(x, mask, total=alone):
    """Unbiased variance of `x` over the true positions of `mask` (a scalar; 0 for a single token)."""
    squares = torch.where(mask, (x - masked_mean(x, mask, total)) ** 2, 0.0).sum()
    return total(squares) / (total(mask.sum()) - 1).clamp(min=1)


def whiten(x, mask, shift_mean=True, total=alone):
    """`x` with variance 1 and mean 0 (or its own mean, with `shift_mean=False`) over the mask; 0 elsewhere."""
    mean = masked_mean(x, mask, total)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask, total) + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def response_mask(lengths, width):
    """Boolean (B, width): true on the first `lengths[i]` positions. From lengths, never from `ids == pad`: where pad and
    EOS are one token, that would remove EOS from the loss, and the model would never learn to stop."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def logprobs_from_logits(logits, ids, mask, temperature=1.0, chunk=128):
    """log pi(token | what came before) in nats, (B, T), 0 outside the mask; pi is softmax(logits / temperature).

    `logits` (B, T, V) are those that predict `ids` (B, T). The softmax is taken in fp32, `chunk` tokens at a time, and on real
    tokens only, so a pad costs nothing and cannot send a NaN into the gradient."""
    out = torch.zeros(ids.shape, dtype=torch.float32, device=logits.device)
    rows = zip(logits[mask].split(chunk), ids[mask].split(chunk))
    out[mask] = -torch.cat([F.cross_entropy(row.float() / temperature, token, reduction="none") for row, token in rows])
    return out


@torch.no_grad()
def entropy_from_logits(logits, mask, temperature=1.0, chunk=128):
    """Entropy in nats of the whole next-token distribution, (B, T), 0 outside the mask; `chunk` tokens at a time."""
    out = torch.zeros(mask.shape, dtype=torch.float32, device=logits.device)
    logs = ((rows.float() / temperature).log_softmax(-1) for rows in logits[mask].split(chunk))
    out[mask] = torch.cat([-(log.exp() * log.clamp(min=LOWEST)).sum(-1) for log in logs])
    return out


def kl_per_token(logprobs, ref_logprobs, kind="kl"):
    """The penalised quantity per token, (B, T): "kl" is the estimator k1 = log pi - log pi_ref, "abs" its size, "mse"
    half its square. (k1 may be negative on a token; its mean over samples of the policy is the KL divergence. k3 is not
    offered: inside the reward its pull vanishes much faster near the reference.)"""
    difference = logprobs - ref_logprobs
    if kind == "kl":
        return difference
    if kind == "abs":
        return difference.abs()
    if kind == "mse":
        return 0.5 * difference**2
    raise ValueError(f'kl_penalty {kind!r} is not computed from log-probs; expected "kl", "abs" or "mse"')


def full_kl_per_token(logits, ref_logits, mask, temperature=1.0):
    """KL(pi || pi_ref) in nats over the whole vocabulary, (B, T), 0 outside the mask. Shapes: two (B, T, V)."""
    out = torch.zeros(mask.shape, dtype=torch.float32, device=logits.device)
    log, ref_log = ((x[mask].float() / temperature).log_softmax(-1) for x in (logits, ref_logits))
    out[mask] = torch.where(log.isneginf(), 0.0, log.exp() * (log - ref_log)).sum(-1)
    return out


def token_rewards(scores, kl, mask, kl_coef):
    """Rewards per token: -kl_coef * kl everywhere, and the score (B,) of the whole response on its last token.

    Returns (rewards, non_score_rewards), both (B, T) and 0 outside the mask. Ziegler et al. 2019, equation 2."""
    non_score_rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = mask.sum(1) - 1
    rewards = non_score_rewards.clone()
    rewards[torch.arange(len(last), device=last.device), last] += scores
    return rewards, non_score_rewards


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation. Returns (advantages, returns), both (B, T), 0 outside the mask.

    delta_t = r_t + gamma * V_{t+1} - V_t,  A_t = delta_t + gamma * lam * A_{t+1},  R_t = A_t + V_t, and nothing follows
    the last token. Schulman et al. 2016, equations 11 to 16."""
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = advantages[:, t] = delta + gamma * lam * next_advantage
        next_value = values[:, t]
    advantages = torch.where(mask, advantages, 0.0)
    return advantages, advantages + values


def policy_ratio(logprobs, old_logprobs):
    """pi_new / pi_old per token, (B, T); exactly 1 where the log-probs agree."""
    return torch.exp((logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def policy_losses(logprobs, old_logprobs, advantages, cliprange):
    """The clipped surrogate as a loss, per token: (losses, clipped), the second boolean, both (B, T).

    max(-A * ratio, -A * clip(ratio, 1 - cliprange, 1 + cliprange)). Schulman et al. 2017, equation 7."""
    ratio = policy_ratio(logprobs, old_logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.max(unclipped, clipped), clipped > unclipped


def value_losses(values, old_values, returns, cliprange_value):
    """Half the squared error of the value, the worse of the value itself and the value kept within `cliprange_value` of the
    old one: (losses, clipped), both (B, T). As in TRL 0.11.4 and in Huang et al. 2022, *The 37 Implementation Details of PPO*."""
    near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    unclipped, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.max(unclipped, clipped), clipped > unclipped


def next_kl_coef(kl_coef, kl, target, horizon, n_samples):
    """The adaptive KL coefficient after `n_samples` more responses. Ziegler et al. 2019, section 2.2, with
    n_samples / horizon for their constant, as in TRL 0.11.4:
    kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n_samples / horizon)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n_samples / horizon)
