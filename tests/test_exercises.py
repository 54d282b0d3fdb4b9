"""The exercises: the unsolved cell of the page gets a cross, so do the common wrong answers, each with its own words, and the
folded solution gets the tick. Cells and solutions are taken from the notebooks themselves."""

import inspect
import math
import re
from collections import namedtuple
from statistics import mean
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlhf_helpers import ppo
from rlhf_helpers.config import CPU, PPOConfig
from rlhf_helpers.course import exercises
from rlhf_helpers.rollout import gae_advantages
from rlhf_helpers.sampling import pad_left
from tests import test_notebooks as pages
from tests import tiny

Exercise = namedtuple("Exercise", "check variable unsolved solutions")

# The two most common wrong answers of each exercise (an expression), and words that the cross must then say.
WRONG = {
    "check_leave_one_out": [
        ("lambda scores: [s - sum(scores) / len(scores) for s in scores]", "compared with itself"),
        ("lambda scores: [s - (sum(scores) - s) / len(scores) for s in scores]", "one fewer"),
        ("lambda scores: [(sum(scores) - s) / (len(scores) - 1) - s for s in scores]", "must come out positive"),
    ],
    "check_mean_under_new": [
        ("lambda values, old, new: sum(v * o / n for v, o, n in zip(values, old, new)) / len(values)", "the other way round"),
        ("lambda values, old, new: sum(v * n / o for v, o, n in zip(values, old, new))", "divide by the number of draws"),
        ("lambda values, old, new: sum(v * n for v, n in zip(values, new)) / len(values)", "divide by them"),
    ],
    "check_share_between": [
        ("lambda rewards: rewards.mean(1).var() / rewards.var()", "still scatters"),
        ("lambda rewards: rewards.mean(1).var() / (rewards.mean(1).var() + rewards.var(1).mean())", "take that off"),
        ("lambda rewards: rewards.var(1).mean() / rewards.var()", "share within"),
        ("lambda r: 1 / (1 + r.var(1, unbiased=False).mean() / (r.mean(1).var(unbiased=False) - r.var(1, unbiased=False).mean() / r.shape[1]))", "over n - 1"),
        ("lambda rewards: rewards.mean(1).var() - rewards.var(1).mean() / rewards.shape[1]", "divide it by between + within"),
    ],
    "check_group_normalised": [
        ("lambda groups: groups - groups.mean(1, keepdim=True)", "as well"),
        ("lambda groups: (groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True)", "0/0 is NaN"),
        ("lambda groups: (groups - groups.mean()) / (groups.std() + 1e-4)", "whole batch"),
        ("lambda groups: (groups - groups.mean(1, keepdim=True)) / (groups.std() + 1e-4)", "each group has its own"),
    ],
    "check_what_follows": [('"A"', "could have put PPO ahead"), ('"b"', "no proof that two are alike"), ("3", "one of the letters")],
    "check_quantize": [
        ("lambda block, levels: ((block[:, None] - levels).abs().argmin(1), block.abs().max())", "divide the block by its scale"),
        ("lambda block, levels: ((block[:, None] / block.max() - levels).abs().argmin(1), block.max())", "may be a negative one"),
        ("lambda block, levels: (block[:, None] / block.abs().max() - levels).abs().argmin(1)", "return the scale, too"),
    ],
    "check_bits_per_weight": [("4 + 32 / 64", "without double quantization"), ("4 + 8 / 64", "scales of their own")],
    "check_lora": [
        ("lambda x, W, A, B, alpha: W @ x + B @ (A @ x)", "alpha / r"),
        ("lambda x, W, A, B, alpha: W @ x + alpha * B @ A @ x", "divided by the rank r"),
        ("lambda x, W, A, B, alpha: alpha / len(A) * B @ A @ x", "the detour alone"),
        ("lambda x, W, A, B, alpha: W @ x + alpha / A.shape[1] * B @ A @ x", "not by the inputs"),
        ("lambda x, W, A, B, alpha: alpha / len(A) * (W @ x + B @ A @ x)", "only the detour"),
    ],
    "check_mistral_gigabytes": [
        ("(6.98e9 + 0.262e9) * 4.127 / 8 / 1e9", "embeddings and head are not quantized"),
        ("6.98e9 * 4.127 / 8 / 1e9", "embeddings and head are missing"),
        ("(6.98e9 + 0.262e9) * 4 / 8 / 1e9", "the scales are missing"),
    ],
    "check_difference_for_90_percent": [("0.9", "0.9 is the probability"), ("-math.log(0.9)", "that is the loss")],
    "check_good_log_odds": [
        ("lambda logits: logits.log_softmax(1)[:, 2]", "odds are against the *other* two"),
        ("lambda logits: logits.softmax(1)[:, 2]", "squeezed into 0 to 1"),
        ("lambda logits: logits[:, 2] - logits[:, 0] - logits[:, 1]", "probabilities are added"),
        ("lambda logits: logits[:, 2] - logits[:, :2].amax(1)", "the other counts, too"),
    ],
    "check_full_stop_reward": [
        ("lambda prompts, responses: [float(response.endswith('.')) for response in responses]", "strip it first"),
        ("lambda prompts, responses: [float('.' in response) for response in responses]", "must be the last character"),
    ],
    "check_leaked": [
        ("lambda t, h: sum(r['prompt'] in {x['prompt'] for x in h} for r in t) / len(t)", "the other way round"),
        ("lambda t, h: len({r['prompt'] for r in t} & {r['prompt'] for r in h}) / len({r['prompt'] for r in h})", "count records"),
        ("lambda t, h: len({r['prompt'] for r in t} & {r['prompt'] for r in h}) / len(h)", "several held-out records"),
        ("lambda t, h: sum(r in t for r in h) / len(h)", "compare their prompts"),
    ],
    "check_pad_left": [
        ("lambda rows, pad: padded(rows, pad, 'right')", "on the right"),
        ("lambda rows, pad: (padded(rows, pad)[0], torch.ones_like(padded(rows, pad)[0]))", "1 on pads, too"),
        ("lambda rows, pad: (padded(rows, pad)[0], (padded(rows, pad)[0] != pad).long())", "make the mask from lengths"),
        ("lambda rows, pad: padded(rows, 0)", "fill with the pad that was given"),
        ("lambda rows, pad: padded(rows, pad)[0]", "return the mask, too"),
        ("lambda rows, pad: padded(rows, pad)[::-1]", "the ids first"),
    ],
    "check_positions": [
        ("lambda mask: mask.cumsum(1)", "one too many"),
        ("lambda mask: torch.arange(mask.shape[1]).expand_as(mask)", "pads are counted too"),
    ],
    "check_kl_per_response": [
        ("lambda logprobs, ref, mask: (logprobs - ref).sum(1)", "use the mask"),
        ("lambda logprobs, ref, mask: ((logprobs - ref) * mask).sum(1)", "NaN times 0 is NaN"),
        ("lambda logprobs, ref, mask: torch.where(mask, logprobs - ref, 0.0).sum(1) / mask.sum(1)", "mean over tokens"),
    ],
    "check_gae": [
        ("lambda r, v, gamma, lam: gae(r, v, gamma, lam)", "not by lam alone"),
        ("lambda r, v, gamma, lam: gae(r, v, gamma, gamma)", "lam is missing"),
        ("lambda r, v, gamma, lam: [a + b for a, b in zip(gae(r, v, gamma, gamma * lam), v)]", "those are the returns"),
    ],
    "check_advantages": [
        ("lambda rollout, config, total: raw_and_returns(rollout, config)", "not whitened yet"),
        ("lambda r, c, total: (torch.where(r.mask, (raw(r, c) - raw(r, c).mean()) / raw(r, c).std(), 0.0), raw_and_returns(r, c)[1])", "padding has been counted"),
        ("lambda r, c, total: ((raw(r, c) - raw(r, c).mean()) / raw(r, c).std(), raw_and_returns(r, c)[1])", "it must stay 0"),
        ("lambda r, c, total: (torch.where(r.mask, raw(r, c) / raw(r, c)[r.mask].std(), 0.0), raw_and_returns(r, c)[1])", "subtract the mean"),
        ("lambda r, c, total: (whitened(r, c), whitened(r, c) + r.values)", "raw advantages + values"),
        ("lambda r, c, total: (whitened(r, no_lam), raw(r, no_lam) + r.values)", "lam is missing"),
        ("lambda r, c, total: whitened(r, c)", "return the returns, too"),
        ("lambda r, c, total: (raw(r, c) + r.values, whitened(r, c))", "the advantages first"),
        ("lambda r, c, total: (whitened(r, c), r.values)", "those are the values"),
    ],
    "check_gets_gradient": [
        ("lambda A, ratio, eps: (ratio > 1 - eps) & (ratio < 1 + eps)", "works in one direction"),
        ("lambda A, ratio, eps: torch.where(A > 0, ratio > 1 - eps, ratio < 1 + eps)", "sides are swapped"),
    ],
    "check_eight_updates": [
        ("CPU.ppo_config(mini_batch_size=2)", "gradient accumulation joins minibatches"),
        ("CPU.ppo_config(ppo_epochs=4, mini_batch_size=4, gradient_accumulation_steps=1)", "epochs and minibatches multiply"),
        ("CPU.ppo_config(batch_size=64, mini_batch_size=16, gradient_accumulation_steps=1)", "must stay 16"),
    ],
    "check_net_score": [
        ("lambda history: [row['ppo/mean_scores'] - row['objective/kl'] for row in history]", "kl_coef turns it into"),
        ("lambda rows: [row['ppo/mean_scores'] + row['objective/kl_coef'] * row['objective/kl'] for row in rows]", "not added"),
    ],
    "check_word_reward": [
        ("lambda prompts, responses: [-0.1 * (len(text.split()) - 20) for text in responses]", "use max(0, ...)"),
        ("lambda prompts, responses: [-0.1 * max(0, len(text) - 20) for text in responses]", "counts letters"),
    ],
    "check_policy_losses": [
        ("lambda new, old, A, c: torch.min(-A * (new - old).exp(), -A * (new - old).exp().clamp(1 - c, 1 + c))", "the better of the two"),
        ("lambda new, old, A, c: torch.min(A * (new - old).exp(), A * (new - old).exp().clamp(1 - c, 1 + c))", "take its negative"),
        ("lambda new, old, A, c: -A * (new - old).exp()", "nothing is clipped yet"),
        ("lambda new, old, A, c: -A * (new - old).exp().clamp(1 - c, 1 + c)", "the clipped product alone"),
        ("lambda new, old, A, c: torch.max(-A * (old - new).exp(), -A * (old - new).exp().clamp(1 - c, 1 + c))", "upside down"),
        ("lambda new, old, A, c: torch.max(-A * (new - old), -A * (new - old).clamp(1 - c, 1 + c))", "take exp"),
        ("lambda new, old, A, c: ppo.policy_losses(new, old, A, c)[0].mean()", "one number came back"),
        ("lambda new, old, A, c: ppo.policy_losses(new, old, A, c)[0].detach()", "no gradient comes back"),
    ],
    "check_kept_scores": [
        ("64 * 512 * 128_256 * 2 / 1e9", "that is bf16"),
        ("64 * 512 * 128_256 / 1e9", "each has 4 bytes"),
        ("512 * 128_256 * 4 / 1e9", "that is one response"),
    ],
    "check_share_of_four": [
        ("CPU.ppo_config()", "counted per process"),
        ("CPU.ppo_config(batch_size=4, mini_batch_size=2, gradient_accumulation_steps=1)", "2 optimizer steps"),
        ("CPU.ppo_config(batch_size=4, mini_batch_size=2, learning_rate=8e-3)", "averaged, not added"),
    ],
    "check_mean_of_all": [
        ("lambda sums, counts: sum(s / n for s, n in zip(sums, counts)) / len(sums)", "a mean of means"),
        ("lambda sums, counts: sum(sums) / len(sums)", "divide by the number of tokens"),
    ],
    "check_best_policy": [
        ("lambda ref, scores, beta: [p * math.exp(s / beta) for p, s in zip(ref, scores)]", "divide by their sum"),
        ("lambda ref, scores, beta: torch.softmax(torch.tensor(scores) / beta, 0)", "the reference is missing"),
        ("lambda ref, scores, beta: torch.softmax(torch.tensor(ref).log() + torch.tensor(scores) * beta, 0)", "the price divides"),
    ],
    "check_steps_until_spent": [
        ("lambda kls, budget: next((n for n, kl in enumerate(kls, 1) if kl > budget), len(kls))", "one step is noisy"),
        ("lambda kls, budget: next((n for n in range(len(kls)) if mean(kls[max(0, n - 3) : n + 1]) > budget), len(kls))", "one too few"),
        ("lambda kls, budget: next((n + 1 for n in range(len(kls)) if mean(kls[max(0, n - 2) : n + 1]) > budget), len(kls))", "the last four"),
        ("lambda kls, budget: next((n + 1 for n in range(len(kls)) if mean(kls[max(0, n - 4) : n + 1]) > budget), len(kls))", "the last four"),
        ("lambda kls, budget: next((n + 1 for n in range(len(kls)) if mean(kls[max(0, n - 3) : n + 1]) >= budget), len(kls))", "at the budget"),
    ],
    "check_cautious": [
        ("lambda first, second: (first + second) / 2", "outvote"),
        ("lambda first, second: torch.cat([first, second]).min()", "one number for the whole batch"),
    ],
    "check_pairs_for_half": [("2 * 198", "shrinks with the root"), ("99", "fewer pairs, a wider interval")],
    "check_diagnosis": [
        ("dict(A='healthy', B='bug', C='misled', D='hacked')", "A is not healthy"),
        ("dict(A='misled', B='healthy', C='bug', D='hacked')", "B is not healthy"),
        ("dict(A='misled', B='ill', C='bug', D='hacked')", "B is 'ill'; expected"),
        ("dict(A='misled', B=..., C='bug', D='hacked')", "B has no answer yet"),
        ("'misled'", "expected diagnosis = dict("),
        ("dict(A='bug', B='hacked', C='Healthy ', D='misled')", "D is not misled"),
        ("dict(A='misled', B='bug', C='healthy')", "expected diagnosis = dict("),
    ],
    "check_place_score": [
        ("lambda penalties, score: [p + score for p in penalties]", "paid for its length"),
        ("lambda penalties, score: [penalties[0] + score, *penalties[1:]]", "that is the bug"),
        ("lambda penalties, score: [*penalties[:-1], score]", "add the score to it"),
    ],
    "check_one_setting": [
        ("CPU.ppo_config(init_kl_coef=0.0, kl_budget=None, gradient_accumulation_steps=1, learning_rate=1e-2)", "sooner or later"),
        ("CPU.ppo_config(init_kl_coef=0.1, kl_budget=9.0, gradient_accumulation_steps=1)", "change one"),
        ("CPU.ppo_config(init_kl_coef=0.02, kl_budget=None, gradient_accumulation_steps=1)", "KL is still cheap"),
        ("CPU.ppo_config(init_kl_coef=2.0, kl_budget=None, gradient_accumulation_steps=1)", "hardly move"),
        ("CPU.ppo_config(init_kl_coef=0.0, kl_budget=20.0, gradient_accumulation_steps=1)", "far beyond"),
        ("CPU.ppo_config(init_kl_coef=0.0, kl_budget=None, gradient_accumulation_steps=1)", "that is the misled run's config"),
    ],
}  # fmt: skip

# What got a tick once, and must not: right for the example on the page, or for the check's own, and wrong beyond. And what got a cross
# without the words that help.
WRONG_BEYOND = [
    ("check_gae", "lambda r, v, g, l: [sum((g * l) ** (u - t) * (r[u] + [*v[1:], 0.0][u] - v[u]) for u in range(t, len(r))) for t in range(len(r))]", "gamma is missing in delta"),
    ("check_gae", "lambda r, v, g, l: [r[t] + g * [*v[1:], 0.0][t] - v[t] for t in range(len(r))]", "those are the deltas"),
    ("check_gae", "lambda r, v, g, l: [-sum((g * l) ** (u - t) * (r[u] + g * [*v[1:], 0.0][u] - v[u]) for u in range(t, len(r))) for t in range(len(r))]", "the sign"),
    ("check_advantages", "lambda r, config, total: (lambda raw, returns: (ppo.whiten(raw, r.mask) / ppo.masked_var(raw, r.mask) ** 0.5, returns))(*ppo.gae(r.rewards, r.values, r.mask, config.gamma, config.lam))", "not by the variance"),
    ("check_advantages", "lambda r, config, total: (lambda raw, returns: (torch.cat([ppo.whiten(raw[i : i + 1], r.mask[i : i + 1]) for i in range(3)]), returns))(*ppo.gae(r.rewards, r.values, r.mask, config.gamma, config.lam))", "not row by row"),
    ("check_best_policy", "lambda ref, scores, beta: [p * math.exp(-s / beta) / sum(q * math.exp(-t / beta) for q, t in zip(ref, scores)) for p, s in zip(ref, scores)]", "the sign"),
    ("check_best_policy", "lambda ref, scores, beta: [p * math.exp(s / beta) / sum(math.exp(t / beta) for t in scores) for p, s in zip(ref, scores)]", "has the reference in it"),
    ("check_share_between", "lambda rewards: 1 - rewards.var(1).mean() / rewards.var()", "leaves the scatter of the means in"),
    ("check_steps_until_spent", "lambda kls, budget: next((n for n in range(1, len(kls) + 1) if sum(kls[:n]) > budget), len(kls))", "nothing is used up"),
    ("check_net_score", "lambda history: [0.3] * len(history)", "expected"),
    ("check_net_score", "lambda h: [h[0]['ppo/mean_scores'] - h[0]['objective/kl_coef'] * h[0]['objective/kl'] for row in h]", "expected"),
    ("check_gets_gradient", "lambda a, r, c: (r - 1) * a < c", "sign of A alone"),
    ("check_gets_gradient", "lambda a, r, c: torch.where(a > 0, r < 1.2, r > 0.8)", "expected"),
    ("check_gets_gradient", "lambda a, r, c: torch.where(a > 0, r.log() < c, r.log() > -c)", "the ratio itself"),
    ("check_gets_gradient", "lambda a, r, c: torch.where(a > 0, r < 1 + c, r > 1 - c).long()", "boolean"),
    ("check_gae", "lambda r, v, g, l: [sum((g * l) ** (u - t) * (r[u] + g * [*v[1:], 0.0][u] - v[u]) for u in range(t, 4)) for t in range(4)]", "expected"),
    ("check_pad_left", "lambda rows, pad: tuple(x.float() for x in padded(rows, pad))", "LongTensors"),
    ("check_pad_left", "lambda rows, pad: tuple(x.tolist() for x in padded(rows, pad))", "lists"),
    ("check_pad_left", "lambda rows, pad: padded(rows, pad) if len(rows[0]) == max(map(len, rows)) else 1 / 0", "ZeroDivisionError"),
    ("check_place_score", "lambda penalties, score: [p + score if p == penalties[-1] else p for p in penalties]", "expected"),
    ("check_full_stop_reward", "lambda prompts, texts: [float(t.rstrip('\\n').endswith('.')) for t in texts]", "white space"),
    ("check_full_stop_reward", "lambda prompts, texts: [float(t.strip().endswith(('.', '!', '?'))) for t in texts]", "a full stop alone"),
    ("check_advantages", "lambda r, c, total=None: (whitened(r, c) * math.sqrt(9 / 8), raw_and_returns(r, c)[1])", "n - 1"),
    ("check_good_log_odds", "lambda z: torch.stack([z[i, 2] - z[i, :2].logsumexp(0) for i in range(z.shape[1])])", "expected"),
    ("check_word_reward", "lambda p, texts: [-0.5 if len(t.split()) > 20 else 0.0 for t in texts]", "expected"),
    ("check_lora", "lambda x, W, A, B, alpha: W @ x + alpha // len(A) * (B @ (A @ x))", "expected"),
    ("check_cautious", "lambda a, b: torch.where(a.abs() < b.abs(), a, b)", "with its sign"),
    ("check_leaked", "lambda t, h: sum(x['prompt'] in [y['prompt'] for y in t] for x in h) // len(h)", "divide with /"),
    ("check_kl_per_response", "lambda a, b, m: torch.where(m, torch.exp(b - a) - 1 + a - b, 0.0).sum(1)", "that is k3"),
    ("check_positions", "lambda mask: (mask.cumsum(1) - 1).clamp(min=0).float()", "whole numbers"),
    ("check_steps_until_spent", "lambda kls, budget: next((n for n in range(1, len(kls) + 1) if mean(kls[max(0, n - 4) : n]) > budget), None)", "expected 3"),
    ("check_steps_until_spent", "lambda kls, budget: next((n for n in range(1, len(kls) + 1) if mean(kls[max(0, n - 4) : n]) > 8.0), len(kls))", "expected"),
    ("check_advantages", "lambda r, c: (whitened(r, c), raw_and_returns(r, c)[1])", "takes 2 positional arguments but 3 were given"),
    ("check_advantages", "lambda r, c, t: ((raw(r, c) - raw(r, c)[r.mask].mean()) / raw(r, c)[r.mask].std(), raw_and_returns(r, c)[1])", "padding must stay 0"),
    ("check_share_between", "lambda r: (r.mean(1).var() - r.var(1).mean() / 4) / (r.mean(1).var() - r.var(1).mean() / 4 + r.var(1).mean())", "expected"),
    ("check_share_between", "lambda r: (r.mean(1).var() - r.var(1).mean() / len(r)) / (r.mean(1).var() - r.var(1).mean() / len(r) + r.var(1).mean())", "not the number of prompts"),
    ("check_word_reward", "lambda p, texts: [-0.1 * max(0, t.count(' ') - 20) for t in texts]", "spaces are not words"),
    ("check_word_reward", "lambda p, texts: [-0.1 * max(0, len(t.split(' ')) - 20) for t in texts]", "without an argument"),
    ("check_word_reward", "lambda p, texts: [-0.1 * max(0, len(t.split()) - 19) for t in texts]", "twenty words cost nothing"),
    ("check_word_reward", "lambda p, texts: (-0.1 * max(0, len(t.split()) - 20) for t in texts)", "wrap it in list"),
    ("check_group_normalised", "lambda g: ((g - g.mean(1, keepdim=True)) / g.std(1, keepdim=True)).nan_to_num()", "more than rounding"),
    ("check_group_normalised", "lambda g: (g - g.mean(1, keepdim=True)) / (g.std(1, keepdim=True) + 1e-8)", "more than rounding"),
    ("check_positions", "lambda m: torch.arange(5).expand_as(m) - (5 - m.sum(1, keepdim=True))", "for tensor"),
    ("check_pad_left", "lambda rows, pad: (torch.stack([torch.cat([torch.full((4 - len(row),), pad), row]) for row in rows]), torch.stack([torch.cat([torch.zeros(4 - len(row)).long(), torch.ones_like(row)]) for row in rows]))", "expected"),
    ("check_pad_left", "lambda rows, pad: (padded(rows, pad)[0], padded(rows, pad)[1].bool())", "the mask is a LongTensor"),
    ("check_lora", "lambda x, W, A, B, alpha: W @ x + alpha / 2 * (B @ (A @ x))", "expected"),
    ("check_lora", "lambda x, W, A, B, alpha: W @ x + alpha / len(B) * (B @ (A @ x))", "a row for each output"),
    ("check_kl_per_response", "lambda a, b, m: (a - b).nansum(1)", "not padding"),
    ("check_gets_gradient", "lambda a, r, c: torch.ones_like(r, dtype=torch.bool)", "nothing is stopped"),
    ("check_gets_gradient", "lambda a, r, c: r > 1 - c", "right for bad tokens"),
    ("check_full_stop_reward", "lambda p, texts: [float(t.strip()[-1] == '.') for t in texts]", "for ['a', 'b', 'c']"),
    ("check_bits_per_weight", "4.13", "rounded"),
    ("check_kept_scores", "64 * 512 * 32_000 * 4 / 1e9", "vocabulary of 32,000"),
]  # fmt: skip
RIGHT_TOO = [
    (
        "check_group_normalised",
        "lambda g: (g.double() - g.double().mean(1, keepdim=True)) / (g.double().std(1, keepdim=True) + 1e-4)",
    ),
    ("check_gets_gradient", "lambda a, r, c: ~(((a > 0) & (r >= 1 + c)) | ((a < 0) & (r <= 1 - c)))"),
    ("check_what_follows", "'(c)'"),
    ("check_pad_left", "lambda rows, pad: list(padded(rows, pad))"),
    ("check_positions", "lambda mask: torch.where(mask == 1, mask.cumsum(1) - 1, 7)"),
    ("check_bits_per_weight", "'4.127'"),
    ("check_kept_scores", "'16,8 GB'"),
    ("check_kept_scores", "(16, 8)"),  # what Python makes of 16,8
    ("check_advantages", "lambda r, c, t: (torch.where(r.mask, (raw(r, c) - raw(r, c)[r.mask].mean()) / (raw(r, c)[r.mask].std() + 1e-4), 0.0), raw_and_returns(r, c)[1])"),
    ("check_group_normalised", "lambda g: (g - g.mean(1, keepdim=True)) / (g.std(1, keepdim=True) + 1e-5)"),
    ("check_gets_gradient", "lambda a, r, c: (torch.where(a > 0, r < 1 + c, r > 1 - c)).numpy()"),
    ("check_word_reward", "lambda p, texts: [min(0.0, (20 - len(text.split())) / 10) for text in texts]"),
]  # fmt: skip

CHECKS = {name: check for name, check in inspect.getmembers(exercises, inspect.isfunction) if name.startswith("check_")}


def found_exercises():
    """{name of the check: Exercise} of all notebooks: what stands between the exercise's heading and its check, and the Python
    in the folded solution below: its code blocks or, if it has none, its first formula in a line."""
    found = {}
    for notebook in pages.NOTEBOOKS:
        cells = dict(pages.cells(notebook))
        for i, cell in pages.exercise_cells(notebook):
            start = max(j for j in range(i) if "### Exercise" in cells[j]["source"])
            unsolved = "\n".join(cells[j]["source"] for j in range(start, i + 1) if cells[j]["cell_type"] == "code")
            check, variable = re.search(r"exercises\.(check_\w+)\((\w+)\)", cell["source"]).groups()
            folded = re.match(r"<details>(.*?)</details>", cells[i + 1]["source"], re.DOTALL)[1]
            solutions = re.findall(r"```python\n(.*?)```", folded, re.DOTALL)
            solutions = solutions or [f"{variable} = {re.search('`([^`]+)`', folded)[1]}"]
            found[check] = Exercise(check, variable, unsolved, solutions)
    return found


EXERCISES = found_exercises()


def gae(rewards, values, gamma, decay):
    """The loop of exercise 2 in notebook 04, right for `decay` = gamma * lam."""
    advantages, next_value, carried = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values)):
        carried = reward + gamma * next_value - value + decay * carried
        next_value = value
        advantages.insert(0, carried)
    return advantages


def padded(rows, pad, side="left"):
    """(ids, mask) of exercise 2 in notebook 03."""
    fill = lambda rows, what: torch.nn.utils.rnn.pad_sequence(rows, True, what, padding_side=side)
    return fill(rows, pad), fill([torch.ones_like(row) for row in rows], 0)


def raw_and_returns(rollout, config):
    """Those of exercise 4 in notebook 04, before whitening."""
    return ppo.gae(rollout.rewards, rollout.values, rollout.mask, config.gamma, config.lam)


def raw(rollout, config):
    return raw_and_returns(rollout, config)[0]


def whitened(rollout, config):
    return ppo.whiten(raw(rollout, config), rollout.mask)


HELPERS = dict(
    padded=padded, raw_and_returns=raw_and_returns, raw=raw, whitened=whitened, no_lam=SimpleNamespace(gamma=0.95, lam=1.0)
)


def run(code):
    """The names that a cell leaves behind."""
    names = dict(
        torch=torch, math=math, mean=mean, exercises=exercises, CPU=CPU, PPOConfig=PPOConfig, gae=gae, ppo=ppo, **HELPERS
    )
    exec(code, names)
    return names


def verdict(capsys, check, answer):
    """What a check prints about an answer: (tick or cross, words)."""
    capsys.readouterr()
    assert CHECKS[check](answer) is None
    mark, words = capsys.readouterr().out.strip().split(" ", 1)
    return mark, words


def test_every_exercise_of_the_notebooks_has_wrong_answers_here_and_every_check_its_exercise():
    assert EXERCISES.keys() == WRONG.keys() == CHECKS.keys()
    assert all(len(answers) >= 2 for answers in WRONG.values())


@pytest.mark.parametrize("check", EXERCISES)
def test_the_unsolved_cell_gets_a_cross(check, capsys):
    run(EXERCISES[check].unsolved)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("✗ no answer yet")


@pytest.mark.parametrize("check", EXERCISES)
def test_every_folded_solution_gets_the_tick(check, capsys):
    exercise = EXERCISES[check]
    for solution in exercise.solutions:
        assert verdict(capsys, check, run(solution)[exercise.variable])[0] == "✓"


@pytest.mark.parametrize("check, answer, words", [(c, *pair) for c, pairs in WRONG.items() for pair in pairs])
def test_a_common_wrong_answer_gets_a_cross_and_the_words_that_help(check, answer, words, capsys):
    mark, said = verdict(capsys, check, run(f"answer = {answer}")["answer"])
    assert mark == "✗" and words in said


@pytest.mark.parametrize("check, answer, words", WRONG_BEYOND)
def test_what_is_right_by_luck_alone_gets_a_cross(check, answer, words, capsys):
    mark, said = verdict(capsys, check, run(f"answer = {answer}")["answer"])
    assert mark == "✗" and words in said


@pytest.mark.parametrize("check, answer", RIGHT_TOO)
def test_what_is_right_and_written_otherwise_gets_the_tick(check, answer, capsys):
    assert verdict(capsys, check, run(f"answer = {answer}")["answer"])[0] == "✓"


class Hostile:
    """An object with which nothing can be done."""

    def refuse(self, *_):
        raise RuntimeError("no")

    __float__ = __eq__ = __repr__ = __bool__ = __len__ = __getitem__ = refuse
    __hash__ = None


THINGS = [
    None, ..., True, math.nan, -math.inf, 10**400, 1j, "four", "4.127.0", "", b"4.127", [], {}, (1, 2), object(), int, Hostile(), Hostile,
    torch.zeros(3), torch.zeros(2, 3), torch.tensor([]), np.zeros((2, 2)), pd.DataFrame({"a": [1, 2]}),
    CPU, PPOConfig, CPU.ppo_config,
]  # fmt: skip


def returns(thing):
    return lambda *arguments: thing


def raises(*arguments):
    raise LookupError("lost")


def broken_config():
    config = CPU.ppo_config()
    config.mini_batch_size = 0
    return config


@pytest.mark.parametrize("check", CHECKS)
def test_no_answer_whatever_raises_or_gets_a_tick(check, capsys):
    for thing in THINGS:
        for answer in (thing, returns(thing), returns([thing, thing]), lambda only: thing):
            assert verdict(capsys, check, answer)[0] == "✗"
    for answer in (raises, returns(raises), broken_config(), lambda *arguments: arguments, lambda *arguments: arguments[0]):
        assert verdict(capsys, check, answer)[0] == "✗"


def test_what_an_answer_prints_is_no_verdict():
    right = lambda p, texts: print("✗ three responses") or [float(text.strip().endswith(".")) for text in texts]
    wrong = lambda p, texts: print("✓ done") or [1.0 for _ in texts]
    assert exercises.ticked(exercises.check_full_stop_reward, right)
    assert not exercises.ticked(exercises.check_full_stop_reward, wrong)
    assert not exercises.ticked(exercises.check_full_stop_reward, ...)
    without_an_end = lambda p, texts: print(len(texts), end=" ") or [float(text.strip().endswith(".")) for text in texts]
    assert exercises.ticked(exercises.check_full_stop_reward, without_an_end)


def test_the_right_numbers_in_another_container_are_told_so(capsys):
    answer = lambda a, r, c: torch.where(a > 0, r < 1 + c, r > 1 - c).tolist()
    exercises.check_gets_gradient(answer)
    assert "the numbers are right; expected a Tensor of torch.bool, got a list" in capsys.readouterr().out


def test_an_answer_may_change_its_arguments(capsys):
    def in_place(rewards, values, gamma, lam):
        rewards.reverse(), values.reverse()
        return gae(rewards[::-1], values[::-1], gamma, gamma * lam)

    assert verdict(capsys, "check_gae", in_place)[0] == "✓"


def test_of_two_hints_the_nearer_one_is_given(capsys):
    exercises.number(1.02, 2.0, hints=[(1.0, "far"), (1.021, "near")], within=0.05)
    assert capsys.readouterr().out == "✗ near\n"


def test_the_right_gae_of_the_check_is_the_one_that_the_trainer_uses(capsys):
    def course(rewards, values, gamma, lam):
        mask = torch.ones(1, len(rewards), dtype=torch.bool)
        return ppo.gae(torch.tensor([rewards]), torch.tensor([values]), mask, gamma, lam)[0][0]

    assert verdict(capsys, "check_gae", course)[0] == "✓"


def test_a_loss_of_one_s_own_trains_once_it_is_right_and_not_before(capsys):
    """The folded solution of notebook 05 in PPOTrainer: with several passes over a batch, so that the clip acts, it makes the library's
    steps; and after it the library has its own loss again."""
    own, package, seen = run(EXERCISES["check_policy_losses"].solutions[0])["my_losses"], ppo.policy_losses, []

    def train():
        seen.append(tiny.trainer(tiny.with_lora(tiny.llama(), b_scale=0.3), ppo_epochs=4, learning_rate=0.05))
        return seen[-1].train(["t4 t5", "t6 t7", "t8", "t9 t10"], lambda p, r: [float(len(t.split())) for t in r], steps=3)

    for unsolved in (lambda new, old, A, c: ..., ..., Hostile(), lambda new, old, A, c: -A * (new - old).exp()):
        assert exercises.trained_with(unsolved, train) == {} and seen == []
    assert "once the exercise has its tick" in capsys.readouterr().out
    untimed = lambda history: [{k: v for k, v in row.items() if not k.startswith("time/")} for row in history]
    ours, theirs = untimed(exercises.trained_with(own, train)), untimed(train())
    assert ours == theirs and len(ours) == 3 and ours[-1]["ppo/policy/clipfrac"] > 0
    assert ppo.policy_losses is package


def test_the_layer_of_the_check_is_peft_s_own(capsys):
    def peft_s(x, W, A, B, alpha):
        layer = torch.nn.Sequential(torch.nn.Linear(*W.shape[::-1], bias=False))
        layer[0].weight.data = W
        model = get_peft_model(layer, LoraConfig(r=len(A), lora_alpha=alpha, target_modules=["0"]))
        (adapted,) = (module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer"))
        adapted.lora_A["default"].weight.data, adapted.lora_B["default"].weight.data = A, B
        return model(x[None])[0].detach()

    assert verdict(capsys, "check_lora", peft_s)[0] == "✓"


def test_padding_and_advantages_of_the_checks_are_those_that_the_trainer_uses(capsys):
    assert verdict(capsys, "check_pad_left", pad_left)[0] == "✓"
    assert verdict(capsys, "check_advantages", gae_advantages)[0] == "✓"


def test_a_trainer_takes_the_advantages_of_the_folded_solution_and_makes_the_library_s_step():
    mine = run(EXERCISES["check_advantages"].solutions[0])["my_advantages"]
    steps = []
    for advantages in (mine, gae_advantages):
        trainer = tiny.trainer(tiny.with_lora(tiny.llama(), b_scale=0.3))
        trainer.advantages = advantages
        stats = trainer.step(*tiny.batch(seed=0))
        steps.append((stats["ppo/loss/policy"], stats["ppo/loss/value"], *trainer.parameters))
    assert len(steps[0]) > 4
    for ours, theirs in zip(*steps):
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=1e-4, atol=1e-6)
