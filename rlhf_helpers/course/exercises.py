"""The exercise checks: a tick, or a cross with the likely mistake in words. None of them raises, so Run All goes through."""

import math
import operator

from rlhf_helpers.config import CPU
from rlhf_helpers.course.capstone_exercises import *  # noqa: F403 (notebook 09)
from rlhf_helpers.course.first_exercises import check_leave_one_out, check_mean_under_new  # noqa: F401 (notebook 00)
from rlhf_helpers.course.grading import function, not_a_config, number, same, say, ticked  # noqa: F401
from rlhf_helpers.course.loop_exercises import check_net_score, check_policy_losses, check_word_reward, trained_with  # noqa: F401 (05)
from rlhf_helpers.course.more_exercises import check_group_normalised, check_share_between, check_what_follows  # noqa: F401 (notebook 08)
from rlhf_helpers.course.part_exercises import check_advantages, check_lora, check_pad_left  # noqa: F401 (notebooks 01, 03, 04)

# ---------------------------------------------------------------- 01 quantized model loading


def check_bits_per_weight(answer):
    """Bits per weight of NF4 with double quantization."""
    hints = [
        (4.13, "rounded; put the formula, or four figures"),
        (4.5, "that is without double quantization: the scale of a block takes 8 bits now, not 32"),
        (4.125, "almost: the 8-bit scales have 32-bit scales of their own, one for each 256 of them"),
        (4.0, "only the codes: every block of 64 weights also has a scale"),
        (4 + 8 / 64 + 32 / 256, "the second scale serves 256 blocks, and a block is 64 weights"),
    ]
    number(answer, 4 + 8 / 64 + 32 / (64 * 256), hints, within=1e-4, praise="4 + 8/64 + 32/(64 x 256) = 4.127 bits per weight")


def check_quantize(answer):
    """A function block -> (codes, scale), on three blocks."""
    import torch
    from bitsandbytes.functional import get_4bit_type

    levels = get_4bit_type("nf4", device="cpu")
    nearest = lambda x: (x[:, None] - levels).abs().argmin(1)

    def right(block, _):
        return nearest(block / block.abs().max()), block.abs().max()

    blocks = [torch.tensor([0.3, -0.8, 0.02, 0.5]), torch.tensor([-2.0, 1.0, 0.1, 0.6]), torch.tensor([0.9, 0.4, -0.1, -0.2])]
    hints = [
        (lambda block, _: (nearest(block), block.abs().max()), "did you divide the block by its scale first?"),
        (lambda block, _: (nearest(block / block.max()), block.max()), "the scale is the largest size, |w|: the largest weight may be a negative one"),
        (lambda block, _: right(block, _)[::-1], "the other way round: the codes first, then the scale"),
        (lambda block, _: right(block, _)[0], "those are the codes; return the scale, too"),
        (lambda block, _: (levels[nearest(block / block.abs().max())], block.abs().max()), "that is the level itself; the code is its number, 0 to 15 (argmin, not min)"),
    ]  # fmt: skip
    cases = [((block, levels), right(block, levels)) for block in blocks]
    function(answer, cases, hints, praise="codes and scales are what bitsandbytes stores")


def check_mistral_gigabytes(answer):
    """NF4 with double quantization on Mistral-7B: 6.98e9 weights in linear layers, 0.262e9 in embeddings and head."""
    hints = [
        (7.242e9 * 4.127 / 8 / 1e9, "embeddings and head are not quantized: 2 bytes for each of their numbers"),
        (7.242e9 * 4 / 8 / 1e9, "4 bits for everything: the scales are missing, and embeddings and head stay in bf16"),
        (7.242e9 * 2 / 1e9, "that is bf16 throughout"),
        ((6.98e9 * 4 / 8 + 0.262e9 * 2) / 1e9, "the scales are missing: 4.127 bits for each weight"),
        ((6.98e9 * 4.5 / 8 + 0.262e9 * 2) / 1e9, "that is without double quantization: 4.127 bits, not 4.5"),
        ((6.98e9 * 4.127 / 8 + 0.262e9 * 2) / 2**30, "that is in GiB, 2**30 bytes; take 10**9"),
        (6.98e9 * 4.127 / 8 / 1e9, "embeddings and head are missing"),
        ((6.98e9 * 4.127 + 0.262e9 * 16) / 1e9, "that is gigabits: divide by 8"),
    ]
    right = (6.98e9 * 4.127 / 8 + 0.262e9 * 2) / 1e9
    number(answer, right, hints, within=0.01, praise="about 4.1 GB, against 14.5 GB in bf16: it fits a small graphics card")


# ---------------------------------------------------------------- 02 reward model scoring


def check_difference_for_90_percent(answer):
    """The score difference at which Bradley-Terry prefers the first with 90 %."""
    hints = [
        (0.9, "0.9 is the probability; which difference d has sigmoid(d) = 0.9?"),
        (-math.log(0.9), "that is the loss, -log 0.9; the difference is log(0.9 / 0.1)"),
        (math.log(0.9), "log 0.9 forgets the other side: log(0.9 / 0.1)"),
        (-math.log(9), "the sign: the first one is preferred, so its score is the higher one"),
        (9.0, "9 is the odds, 0.9 / 0.1; the difference is their logarithm"),
        (math.log2(9), "that is the logarithm to base 2; sigmoid has e"),
        (-math.log(0.1), "log 0.1 forgets the other side: log(0.9 / 0.1)"),
        (math.log10(9), "that is the logarithm to base 10"),
        (1 / (1 + math.exp(-0.9)), "that is sigmoid(0.9), the probability at a difference of 0.9; here we go the other way"),
    ]
    number(answer, math.log(9), hints, within=0.01, praise="log(0.9 / 0.1) = log 9 = 2.197")


def check_good_log_odds(answer):
    """A function logits (B, 3) of bad, fair, good -> log-odds of good against the other two (B,)."""
    import torch

    logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 3.0], [0.5, 2.0, -1.0], [2.0, 0.5, 1.0]])
    right = lambda z: z[:, 2] - z[:, :2].logsumexp(1)
    hints = [
        (lambda z: -right(z), "the sign: good goes up, the other two go down"),
        (lambda z: z.log_softmax(1)[:, 2], "that is good's log-probability; odds are against the *other* two alone"),
        (lambda z: z.softmax(1)[:, 2], "that is a probability, squeezed into 0 to 1: the log-odds are wanted"),
        (lambda z: z[:, 2] - z[:, 0], "fair counts, too: the others' probabilities are added"),
        (lambda z: z[:, 2] - z[:, 0] - z[:, 1], "probabilities are added, and logits are logs: logsumexp of the two"),
        (lambda z: z[:, 2] - z[:, :2].mean(1), "not the mean of the logits: logsumexp adds what they are the logs of"),
        (lambda z: z[:, 2] - z[:, :2].amax(1), "the larger one alone is close, but the other counts, too: logsumexp"),
    ]
    function(answer, [((logits,), right(logits))], hints, praise="with two labels, the same is the difference of the logits")


def check_full_stop_reward(answer):
    """A reward function: 1.0 for a response that ends with a full stop, 0.0 for another."""
    prompts = ["What is tea?", "Tell me about rain.", "Why?"]
    responses = ["A drink.", "Rain is water that", "Because it is so. \n"]
    hints = [
        (lambda p, r: [float(t.endswith(".")) for t in p], "you looked at the prompts"),
        (lambda p, r: [float(t.endswith(".")) for t in r], "a response may end in white space: strip it first"),
        (lambda p, r: [float("." in t) for t in r], "a full stop anywhere is not enough: it must be the last character"),
        (lambda p, r: [float(t.strip().endswith((".", "!", "?"))) for t in r], "a full stop alone counts, not another mark"),
        (lambda p, r: sum(float(t.strip().endswith(".")) for t in r), "one number for the whole batch; return one for each response"),
    ]  # fmt: skip
    cases = [((prompts, responses), [1.0, 0.0, 1.0]), ((["a", "b", "c"], ["b.c", "", "so!"]), [0.0, 0.0, 0.0])]
    function(answer, cases, hints, praise="PPOTrainer would take it as it is")


# ---------------------------------------------------------------- 03 prompt loading


def check_positions(answer):
    """A function attention_mask (B, L) -> position ids (B, L) of left-padded rows; a pad's position does not matter."""
    import torch

    masks = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]), torch.tensor([[0, 1, 1], [0, 0, 1], [1, 1, 1]])
    right = lambda m: torch.where(m == 1, m.cumsum(1) - 1, -1)  # -1: whatever stands there
    alike = lambda a, b: a.shape == b.shape and a.is_floating_point() == b.is_floating_point()
    agree = lambda a, b: alike(a, b) and same(a[b >= 0], b[b >= 0])
    hints = [
        (lambda m: (m.cumsum(1) - 1).float(), "positions are whole numbers: leave them a LongTensor"),
        (lambda m: torch.arange(m.shape[1]).expand_as(m), "every row counts from its left edge: pads are counted too"),
        (lambda m: m.cumsum(1), "one too many: the first real token should be at position 0"),
        (lambda m: m.cumsum(0) - 1, "summed down the batch; sum along the row, dimension 1"),
    ]
    function(answer, [((mask,), right(mask)) for mask in masks], hints, agree, praise="the first real token is at 0 in every row")


def check_leaked(answer):
    """A function (train records, held-out records) -> share of the held-out records whose prompt is trained on."""
    records = lambda prompts, by: [{"prompt": prompt, "chosen": f"{by} {i}"} for i, prompt in enumerate(prompts)]
    train, heldout = records("aab", "kept"), records("aacb", "apart")
    prompts = lambda some: [r["prompt"] for r in some]
    leaks = lambda t, h: sum(prompt in prompts(t) for prompt in prompts(h))
    both = lambda t, h: len(set(prompts(t)) & set(prompts(h)))
    hints = [
        (lambda t, h: leaks(h, t) / len(t), "the other way round: how many of the *held-out* records"),
        (leaks, "that is a number of records; divide by how many there are"),
        (lambda t, h: both(t, h) / len(set(prompts(h))), "you counted different prompts; count records"),
        (lambda t, h: both(t, h) / len(h), "you counted different prompts; a prompt may have several held-out records"),
        (lambda t, h: leaks(t, h) // len(h), "a share lies between 0 and 1: divide with /, not with //"),
        (lambda t, h: sum(r in t for r in h) / len(h), "whole records are hardly ever equal: compare their prompts"),
    ]
    cases = [((train, heldout), 0.75), ((train, records("bdd", "other")), 1 / 3), ((train, records("ab", "third")), 1.0)]
    function(answer, cases, hints, praise="a leak is counted by prompt")


# ---------------------------------------------------------------- 04 one PPO step, opened


def check_kl_per_response(answer):
    """A function (logprobs, ref_logprobs, mask), all (B, T) -> KL estimate of each response, (B,). Pads hold NaN."""
    import torch

    nan = math.nan
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.5, nan]])
    ref_logprobs = torch.tensor([[-1.5, -2.5, -1.5], [-1.0, -1.5, nan]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    kept = lambda a, b, m: torch.where(m, a - b, 0.0)
    hints = [
        (lambda a, b, m: (a - b).sum(1), "the pads are in it: use the mask"),
        (lambda a, b, m: (a - b).nansum(1), "that drops NaN, not padding: a pad may hold any number; use the mask"),
        (lambda a, b, m: ((a - b) * m).sum(1), "NaN times 0 is NaN: choose with torch.where(mask, ..., 0.0) instead of multiplying"),
        (lambda a, b, m: torch.where(m, torch.exp(b - a) - 1 + (a - b), 0.0).sum(1), "that is k3; here by k1, the difference of the log-probs"),
        (lambda a, b, m: kept(b, a, m).sum(1), "the sign: logprobs - ref_logprobs"),
        (lambda a, b, m: kept(a, b, m).sum(1) / m.sum(1), "that is the mean over tokens; a response's log-probability is the sum"),
        (lambda a, b, m: kept(a, b, m).mean(1), "that is a mean, and over pads too; a response's log-probability is the sum"),
        (lambda a, b, m: kept(a, b, m), "that is per token; sum over the tokens, dimension 1"),
        (lambda a, b, m: kept(a, b, m).sum(), "one number for the whole batch; sum over the tokens, dimension 1"),
    ]
    finite = (logprobs.nan_to_num(-9.0), ref_logprobs.nan_to_num(-7.0), mask)  # tells a forgotten mask from a multiplied one
    cases = [((logprobs, ref_logprobs, mask), torch.tensor([2.0, 0.5])), (finite, torch.tensor([2.0, 0.5]))]
    function(answer, cases, hints, praise="summed over real tokens, and no NaN from a pad")


def check_gae(answer):
    """A function (rewards, values, gamma, lam) -> advantages, lists of floats."""

    def gae(rewards, values, gamma, lam, start=0.0, decay=None, forget_value=False, forget_gamma=False):
        advantages, next_value, carried = [], start, 0.0
        for reward, value in zip(reversed(rewards), reversed(values)):
            delta = reward + (1.0 if forget_gamma else gamma) * next_value - (0.0 if forget_value else value)
            carried = delta + (gamma * lam if decay is None else decay(gamma, lam)) * carried
            next_value = value
            advantages.insert(0, carried)
        return advantages

    rewards, values = [-0.1, 0.2, 0.0, 1.0], [0.5, -0.3, 0.4, 0.6]
    hints = [
        (lambda r, v, g, l: gae(r, v, g, l, decay=lambda g, l: l), "the advantage carried back is multiplied by gamma * lam, not by lam alone"),
        (lambda r, v, g, l: gae(r, v, g, l, decay=lambda g, l: g), "lam is missing: carry gamma * lam times the next advantage"),
        (lambda r, v, g, l: gae(r, v, g, l, start=v[-1]), "nothing follows the last token: its next value is 0"),
        (lambda r, v, g, l: gae(r, v, g, l, forget_value=True), "subtract the value: delta = r + gamma * V_next - V"),
        (lambda r, v, g, l: gae(r, v, g, l, forget_gamma=True), "gamma is missing in delta: r + gamma * V_next - V"),
        (lambda r, v, g, l: gae(r, v, g, l, decay=lambda g, l: 0.0), "those are the deltas: carry gamma * lam times the next advantage back"),
        (lambda r, v, g, l: [-a for a in gae(r, v, g, l)], "the sign: better than expected must come out positive"),
        (lambda r, v, g, l: gae(r, v, g, l)[::-1], "those come in reverse order"),
        (lambda r, v, g, l: [a + b for a, b in zip(gae(r, v, g, l), v)], "those are the returns: advantage + value"),
    ]  # fmt: skip
    cases = [((rewards, values, gamma, lam), gae(rewards, values, gamma, lam)) for gamma, lam in ((0.9, 0.8), (1.0, 0.95), (1.0, 0.0))]
    longer = (rewards[:3] * 2, values[:3] * 2, 0.9, 0.8)  # of another length
    cases.append((longer, gae(*longer)))
    function(answer, cases, hints, praise="the same advantages as ppo.gae")


def check_gets_gradient(answer):
    """A function (advantages, ratios, cliprange) -> which tokens the clipped loss still moves, boolean."""
    import torch

    advantages = torch.tensor([1.0, 1.0, 0.4, -0.4, -1.0, -1.0, 2.0, 1.0])
    ratios = torch.tensor([0.7, 1.0, 1.3, 0.7, 1.0, 1.3, 1.3, 1.21])
    inside = lambda a, r, c: (r > 1 - c) & (r < 1 + c)
    hints = [
        (inside, "clipping works in one direction: a good token below 1 - cliprange and a bad one above 1 + cliprange still move"),
        (lambda a, r, c: torch.where(a > 0, r > 1 - c, r < 1 + c), "the sides are swapped: a good token (A > 0) is stopped above 1 + cliprange"),
        (lambda a, r, c: ~torch.where(a > 0, r < 1 + c, r > 1 - c), "those are the tokens that are stopped"),
        (lambda a, r, c: torch.where(a > 0, r < 1 + c, r > 1 - c).float(), "those are numbers; a boolean tensor is wanted"),
        (lambda a, r, c: torch.ones_like(r, dtype=torch.bool), "nothing is stopped there: a good token is above 1 + cliprange, a bad one below 1 - cliprange"),
        (lambda a, r, c: torch.where(a > 0, r.log() < c, r.log() > -c), "the ratio itself is held against 1 + cliprange, not its logarithm against cliprange"),
        (lambda a, r, c: r > 1 - c, "right for bad tokens; a good one (A > 0) is stopped above 1 + cliprange"),
        (lambda a, r, c: (r - 1) * a < c, "whether a token is stopped depends on its ratio and the sign of A alone"),
        (lambda a, r, c: r < 1 + c, "right for good tokens; a bad one (A < 0) is stopped below 1 - cliprange"),
    ]
    cases = [((advantages, ratios, 0.2), torch.tensor([True, True, False, False, True, True, False, False]))]
    cases.append(((advantages, ratios, 0.4), torch.ones(8, dtype=torch.bool)))
    truths = lambda x: str(x.dtype).endswith("bool")  # numpy's, too
    agree = lambda a, b: truths(a) == truths(b) and same(a, b)
    function(answer, cases, hints, agree, praise="a brake in one direction on each side")


# ---------------------------------------------------------------- 05 the training loop


def check_eight_updates(answer):
    """A PPOConfig with 16 responses a step and eight optimizer steps a PPO step."""
    if wrong := not_a_config(answer):
        return say(False, wrong)
    group = answer.mini_batch_size * answer.gradient_accumulation_steps
    updates = answer.ppo_epochs * answer.batch_size // group
    if answer.batch_size != 16:
        halved = "" if CPU.ppo_config().batch_size == 16 else " (RLHF_FAST=1 has halved the profile's: give batch_size=16)"
        return say(False, f"batch_size is {answer.batch_size}; it must stay 16{halved}")
    if updates == 8:
        return say(True, f"{answer.ppo_epochs} epochs x 16 responses / {group} for each optimizer step = 8")
    hint = ""
    if answer.gradient_accumulation_steps > 1 and answer.ppo_epochs * 16 // answer.mini_batch_size == 8:
        hint = "; gradient accumulation joins minibatches into one optimizer step, so it makes them fewer"
    elif updates > 8:
        hint = "; epochs and minibatches multiply"
    say(False, f"that makes {updates} optimizer step{'s' * (updates != 1)}{hint}")


# ---------------------------------------------------------------- 06 TRL, and beyond one machine


def check_kept_scores(answer):
    """Gigabytes of fp32 scores over 128,256 token ids, for 64 responses of 512 tokens."""
    numbers = 64 * 512 * 128_256
    hints = [
        (numbers * 2 / 1e9, "that is bf16; fp32 has 4 bytes a number"),
        (numbers / 1e9, "that is how many numbers, in billions; each has 4 bytes"),
        (64 * 512 * 32_000 * 4 / 1e9, "that is for a vocabulary of 32,000; here it has 128,256 ids"),
        (numbers * 4, "those are bytes"),
        (numbers * 8 / 1e9, "that is fp64; fp32 has 4 bytes a number"),
        (512 * 128_256 * 4 / 1e9, "that is one response, and there are 64"),
        (64 * 128_256 * 4 / 1e9, "that is one token of each response, and TRL keeps all 512"),
        (64 * 512 * 4 / 1e9, "that is one number a token; a score stands there for each id of the vocabulary"),
        (numbers * 4 / 2**30, "that is in GiB, 2**30 bytes; take 10**9"),
        (numbers * 4 * 8 / 1e9, "those are gigabits"),
        (numbers * 4 / 1e6, "those are megabytes"),
    ]
    number(answer, numbers * 4 / 1e9, hints, within=0.01, praise="16.8 GB, four times as much as a 7B model in NF4")


def check_share_of_four(answer):
    """The PPOConfig of each of four processes that together make the update of the CPU profile, 16 responses."""
    if wrong := not_a_config(answer):
        return say(False, wrong)
    if answer.batch_size != 4:
        total = f"with four processes that makes {4 * answer.batch_size} responses"
        return say(False, f"batch_size is {answer.batch_size}, and {total}: it is counted per process")
    group = answer.mini_batch_size * answer.gradient_accumulation_steps
    if group != 4:
        return say(False, f"that makes {4 / group:g} optimizer steps from one pass over a batch; the profile makes one, of 16 responses")
    for name, value in vars(CPU.ppo_config()).items():
        if name not in ("batch_size", "mini_batch_size", "gradient_accumulation_steps") and getattr(answer, name) != value:
            hint = "gradients are averaged, not added: the update is the same, and so is its rate" if "learning_rate" in name else "leave it"
            return say(False, f"{name} is {getattr(answer, name)!r}, in the profile {value!r}: {hint}")
    say(True, "4 responses on each of 4 processes, one optimizer step a pass, all else as it was")


def check_mean_of_all(answer):
    """A function (sums, counts), a number of each for every process -> the mean over all tokens of all processes."""
    cases = [(([6.0, 2.0], [2, 8]), 0.8), (([1.0, 2.0, 9.0], [1, 1, 4]), 2.0)]
    means = lambda sums, counts: [s / n for s, n in zip(sums, counts)]
    hints = [
        (lambda s, n: sum(means(s, n)) / len(s), "a mean of means counts a token more where there are few; add up sums and counts first"),
        (lambda s, n: sum(s) / len(s), "that is a sum per process; divide by the number of tokens"),
        (lambda s, n: sum(means(s, n)), "those are means added up; divide the whole sum by the whole count"),
        (lambda s, n: sum(s), "that is the sum over all tokens; divide by their number"),
        (means, "that is a mean for each process; one number is wanted for all"),
    ]
    function(answer, cases, hints, praise="one sum over one count, whoever holds the tokens")


# ---------------------------------------------------------------- 07 reward hacking


def check_best_policy(answer):
    """A function (ref, scores, beta) -> the probabilities that maximise score minus beta times KL, a list."""

    def ideal(weigh):
        def policy(ref, scores, beta):
            weights = [weigh(p, score, beta) for p, score in zip(ref, scores)]
            return [weight / sum(weights) for weight in weights]

        return policy

    right = ideal(lambda p, score, beta: p * math.exp(score / beta))
    hints = [
        (ideal(lambda p, score, beta: p * math.exp(score * beta)), "the price divides the score: a high price must keep the policy near the reference"),
        (ideal(lambda p, score, beta: math.exp(score / beta)), "the reference is missing: what it never writes, the policy hardly writes"),
        (ideal(lambda p, score, beta: p * math.exp(score)), "the price is missing: divide the score by it"),
        (ideal(lambda p, score, beta: p * score / beta), "the exponential is missing: exp(score / beta)"),
        (ideal(lambda p, score, beta: p * math.exp(-score / beta)), "the sign: a higher score must be written more often"),
        (lambda ref, scores, beta: [p * math.exp(s / beta) / sum(math.exp(s / beta) for s in scores) for p, s in zip(ref, scores)],
         "the sum to divide by has the reference in it, too: these do not add up to 1"),
        (lambda ref, scores, beta: [p * math.exp(s / beta) for p, s in zip(ref, scores)], "probabilities add up to 1: divide by their sum"),
    ]  # fmt: skip
    cases = [(arguments, right(*arguments)) for arguments in (([0.7, 0.3], [0.0, 1.0], 0.5), ([0.5, 0.4, 0.1], [0.2, -1.0, 2.0], 2.0))]
    function(answer, cases, hints, praise="the reference, tilted by exp(score / beta)")


def check_steps_until_spent(answer):
    """A function (KL of each step, budget) -> how many steps a run makes before its budget ends it."""

    def until(window=4, count=1, late=False, above=operator.gt):
        def steps(kls, budget):
            for n in range(window if late else 1, len(kls) + 1):
                last = kls[max(0, n - window) : n]
                if above(sum(last) / len(last), budget):
                    return n - 1 + count
            return len(kls)

        return steps

    hints = [
        (until(window=1), "one step is noisy; take the mean of the last four"),
        (until(window=10**6), "that is the mean of all steps so far; only the last four count"),
        (until(count=0), "one too few: the step that passes the budget has been made"),
        *((until(window), "the mean is that of the last four steps") for window in (2, 3, 5)),
        (until(above=operator.ge), "at the budget it goes on; it ends once the mean is above"),
        (until(late=True), "while there are fewer than four steps, the mean is over those"),
        (lambda kls, budget: next((n for n in range(1, len(kls) + 1) if sum(kls[:n]) > budget), len(kls)),
         "nothing is used up: the KL of a step is all that lies between policy and reference then; compare the mean of the last four"),
        (lambda kls, budget: sum(kl <= budget for kl in kls), "a KL may fall again, but the run has ended; find the first step, by the mean of four"),
    ]
    runs = [[1.0, 2.0, 9.0, 3.0, 4.0, 12.0, 14.0, 15.0, 2.0], [0.1, 0.2, 0.3], [20.0, 1.0, 1.0, 1.0, 1.0]]
    runs += [[1.0, 1.0, 1.0, 12.0, 14.0, 9.0, 1.0], [8.0, 8.0, 9.0]]  # where other windows end elsewhere; at the budget
    cases = [((kls, budget), until()(kls, budget)) for kls, budget in [*((kls, 8.0) for kls in runs), (runs[0], 5.0)]]
    function(answer, cases, hints, praise="the same rule as PPOTrainer.train's")


def check_cautious(answer):
    """A function of two tensors of scores (B,) -> the smaller one for each response, (B,)."""
    import torch

    first, second = torch.tensor([1.0, -0.5, 2.0, -3.0]), torch.tensor([0.5, 0.4, -2.5, 1.0])
    hints = [
        (lambda a, b: torch.where(a.abs() < b.abs(), a, b), "smaller means lower, with its sign: -3 is below 1"),
        (lambda a, b: (a + b) / 2, "the mean lets one enthusiast outvote the other"),
        (torch.maximum, "that is the larger one: whoever is fooled decides"),
        (lambda a, b: min(a.min(), b.min()), "one number for the whole batch; one for each response is wanted"),
        (lambda a, b: a if a.sum() < b.sum() else b, "that chooses one model for the whole batch; choose for each response"),
    ]
    function(answer, [((first, second), torch.minimum(first, second))], hints, praise="a response is as good as its sterner judge says")
