"""The mathematics against other ways to the same number: written-out sums, special cases, autograd, enumeration."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_helpers import fast, ppo

settings.register_profile("quick", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("quick")


@st.composite
def batches(draw, min_length=1):
    """(lengths, width, generator): a batch of responses with at least one pad column at times."""
    lengths = draw(st.lists(st.integers(min_length, 7), min_size=1, max_size=4))
    width = max(lengths) + draw(st.integers(0, 2))
    return torch.tensor(lengths), width, torch.Generator().manual_seed(draw(st.integers(0, 10_000)))


def randn(g, *shape):
    return torch.randn(*shape, generator=g)


def poisoned(x, mask):
    """`x` with NaN wherever the mask is false."""
    return torch.where(mask if x.dim() == mask.dim() else mask[..., None], x, float("nan"))


# ---------------------------------------------------------------- masks, means, whitening


@given(batches())
def test_the_mask_is_true_on_exactly_the_response(made):
    lengths, width, _ = made
    mask = ppo.response_mask(lengths, width)
    assert mask.dtype == torch.bool and mask.shape == (len(lengths), width)
    assert mask.tolist() == [[True] * n + [False] * (width - n) for n in lengths.tolist()]


@given(batches())
def test_masked_mean_and_variance_are_those_of_the_real_tokens(made):
    lengths, width, g = made
    mask, x = ppo.response_mask(lengths, width), randn(g, len(lengths), width)
    real = x[mask].double()
    assert ppo.masked_mean(poisoned(x, mask), mask).item() == pytest.approx(real.mean().item(), abs=1e-6)
    variance = real.var().item() if len(real) > 1 else 0.0
    assert ppo.masked_var(poisoned(x, mask), mask).item() == pytest.approx(variance, rel=1e-5, abs=1e-6)


@given(batches(min_length=2))
def test_whitened_tokens_have_mean_0_and_unbiased_variance_1(made):
    lengths, width, g = made
    mask, x = ppo.response_mask(lengths, width), 3 * randn(g, len(lengths), width) + 5
    white = ppo.whiten(poisoned(x, mask), mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-4)
    if x[mask].std() > 1e-2:  # two tokens may lie as close as the 1e-8 in the root
        assert white[mask].var().item() == pytest.approx(1, abs=1e-3)
    assert (white[~mask] == 0).all()


@given(batches(min_length=2))
def test_whitening_without_shift_keeps_the_mean(made):
    lengths, width, g = made
    mask, x = ppo.response_mask(lengths, width), randn(g, len(lengths), width) + 5
    kept = ppo.whiten(x, mask, shift_mean=False)
    assert kept[mask].mean().item() == pytest.approx(x[mask].mean().item(), abs=1e-4)
    torch.testing.assert_close((kept - ppo.whiten(x, mask))[mask], x[mask].mean().expand(int(mask.sum())), atol=1e-4, rtol=0)
    assert (kept[~mask] == 0).all()


@pytest.mark.parametrize("x", [[[0.0, 0.0, 0.0]], [[2.5, 2.5, 2.5]], [[7.0]]])
def test_whitening_a_constant_or_a_single_token_stays_finite(x):
    x = torch.tensor(x)
    assert torch.equal(ppo.whiten(x, torch.ones_like(x, dtype=torch.bool)), torch.zeros_like(x))


# ---------------------------------------------------------------- log-probs, entropy, KL


def logits_case(seed=0, b=3, t=5, v=11):
    g = torch.Generator().manual_seed(seed)
    mask = ppo.response_mask(torch.tensor([5, 2, 4]), t)
    return randn(g, b, t, v) * 3, torch.randint(v, (b, t), generator=g), mask, g


def test_logprobs_are_the_log_of_the_softmax_at_the_token():
    logits, ids, mask, _ = logits_case()
    logprobs = ppo.logprobs_from_logits(logits, ids, mask)
    for b, t in mask.nonzero().tolist():
        weights = [math.exp(x) for x in logits[b, t].tolist()]
        assert logprobs[b, t].item() == pytest.approx(math.log(weights[ids[b, t]] / sum(weights)), abs=1e-5)
    assert (logprobs[~mask] == 0).all()


def test_temperature_divides_the_logits_everywhere():
    logits, ids, mask, g = logits_case()
    other = randn(g, *logits.shape)
    warm, plain = [x / 0.7 for x in (logits, other)], (logits, other)
    torch.testing.assert_close(ppo.logprobs_from_logits(plain[0], ids, mask, 0.7), ppo.logprobs_from_logits(warm[0], ids, mask))
    torch.testing.assert_close(ppo.entropy_from_logits(plain[0], mask, 0.7), ppo.entropy_from_logits(warm[0], mask))
    torch.testing.assert_close(ppo.full_kl_per_token(*plain, mask, 0.7), ppo.full_kl_per_token(*warm, mask))


def test_half_precision_logits_give_fp32_numbers():
    logits, ids, mask, _ = logits_case()
    half = logits.bfloat16()
    for numbers in (
        ppo.logprobs_from_logits(half, ids, mask),
        ppo.entropy_from_logits(half, mask),
        ppo.full_kl_per_token(half, half, mask),
    ):
        assert numbers.dtype == torch.float32
    assert torch.equal(ppo.logprobs_from_logits(half, ids, mask), ppo.logprobs_from_logits(half.float(), ids, mask))


@pytest.mark.parametrize("chunk", [1, 3, 128])
def test_entropy_in_chunks_is_minus_the_sum_of_p_log_p(chunk):
    logits, _, mask, _ = logits_case()
    p = logits.double().softmax(-1)
    torch.testing.assert_close(
        ppo.entropy_from_logits(logits, mask, chunk=chunk)[mask], -(p * p.log()).sum(-1)[mask].float(), atol=1e-5, rtol=0
    )


def test_a_token_that_cannot_come_adds_nothing_to_entropy_and_kl():
    logits, mask = torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    without = torch.cat([logits, torch.full((2, 3, 1), -math.inf)], -1)
    for entropy in (ppo.entropy_from_logits(logits, mask), fast.token_logprobs(without, mask.long(), mask, 1.0)[1]):
        torch.testing.assert_close(ppo.entropy_from_logits(without, mask), entropy)
    torch.testing.assert_close(
        ppo.full_kl_per_token(without, without.roll(1, 1), mask), ppo.full_kl_per_token(logits, logits.roll(1, 1), mask)
    )


def test_a_token_that_the_reference_cannot_write_makes_the_full_kl_infinite():
    logits = torch.tensor([[[0.0, 1.0, 2.0]]])
    ref, mask = torch.tensor([[[0.0, 1.0, -math.inf]]]), torch.ones(1, 1, dtype=torch.bool)
    assert ppo.full_kl_per_token(logits, ref, mask).item() == math.inf
    assert ppo.full_kl_per_token(ref, logits, mask).isfinite().all()


def test_entropy_of_a_uniform_distribution_is_log_v_and_has_no_graph():
    entropy = ppo.entropy_from_logits(torch.zeros(1, 2, 8, requires_grad=True), torch.ones(1, 2, dtype=torch.bool))
    assert entropy.tolist() == [[pytest.approx(math.log(8))] * 2] and not entropy.requires_grad


def test_the_three_kinds_of_kl_from_logprobs():
    logprobs, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    assert ppo.kl_per_token(logprobs, ref).tolist() == [[0.5, -1.0]]
    assert ppo.kl_per_token(logprobs, ref, "abs").tolist() == [[0.5, 1.0]]
    assert ppo.kl_per_token(logprobs, ref, "mse").tolist() == [[0.125, 0.5]]
    with pytest.raises(ValueError, match="'full' is not computed from log-probs"):
        ppo.kl_per_token(logprobs, ref, "full")


def test_full_kl_is_the_expectation_of_the_log_ratio():
    logits, _, mask, g = logits_case()
    other = randn(g, *logits.shape)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=other)
    )
    full = ppo.full_kl_per_token(logits, other, mask)
    torch.testing.assert_close(full[mask], expected[mask], atol=1e-5, rtol=1e-5)
    assert (full[mask] > 0).all() and (ppo.full_kl_per_token(logits, logits, mask) == 0).all()


def three_arms():
    theta, ref = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64), torch.tensor([0.0, 0.1, -0.3], dtype=torch.float64)
    return theta.requires_grad_(), ref.log_softmax(-1)


def policy_gradient_of_penalty(theta, penalty):
    """Gradient of -E[penalty] as the policy gradient takes it: the penalty inside the reward is a constant."""
    log = theta.log_softmax(-1)
    return torch.autograd.grad((log.exp().detach() * penalty.detach() * log).sum(), theta)[0]


def test_k1_in_the_reward_pulls_with_the_gradient_of_the_kl():
    theta, ref = three_arms()
    log = theta.log_softmax(-1)
    true = torch.autograd.grad((log.exp() * (log - ref)).sum(), theta)[0]
    estimated = policy_gradient_of_penalty(theta, ppo.kl_per_token(log, ref))
    torch.testing.assert_close(estimated, true, atol=1e-12, rtol=0)


def test_k3_in_the_reward_would_hardly_pull_at_all():
    theta, ref = three_arms()
    log = theta.log_softmax(-1)
    k3 = torch.exp(ref - log) - 1 - (ref - log)
    true = policy_gradient_of_penalty(theta, ppo.kl_per_token(log, ref)).norm()
    assert policy_gradient_of_penalty(theta, k3).norm() < 0.25 * true


# ---------------------------------------------------------------- rewards and advantages


@given(batches())
def test_the_score_lands_on_the_last_response_token(made):
    lengths, width, g = made
    mask, scores, kl = ppo.response_mask(lengths, width), randn(g, len(lengths)), randn(g, len(lengths), width)
    rewards, non_score = ppo.token_rewards(scores, poisoned(kl, mask), mask, 0.3)
    added = rewards - non_score
    for row, n in enumerate(lengths.tolist()):
        assert added[row, n - 1].item() == pytest.approx(scores[row].item(), abs=1e-6)
        assert (added[row, : n - 1] == 0).all() and (added[row, n:] == 0).all()


@given(batches())
def test_the_rewards_of_a_response_sum_to_score_minus_beta_kl(made):
    lengths, width, g = made
    mask, scores, kl = ppo.response_mask(lengths, width), randn(g, len(lengths)), randn(g, len(lengths), width)
    rewards, _ = ppo.token_rewards(scores, poisoned(kl, mask), mask, 0.3)
    for row, n in enumerate(lengths.tolist()):
        assert rewards[row].sum().item() == pytest.approx((scores[row] - 0.3 * kl[row, :n].sum()).item(), abs=1e-5)
    assert (rewards[~mask] == 0).all()


rates = st.sampled_from([0.0, 0.5, 0.95, 1.0])


@given(batches(), rates, rates)
def test_gae_is_the_written_out_double_sum(made, gamma, lam):
    lengths, width, g = made
    mask, rewards, values = ppo.response_mask(lengths, width), randn(g, len(lengths), width), randn(g, len(lengths), width)
    advantages, returns = ppo.gae(poisoned(rewards, mask), poisoned(values, mask), mask, gamma, lam)
    for row, n in enumerate(lengths.tolist()):
        r, v = rewards[row, :n].tolist(), values[row, :n].tolist() + [0.0]
        for t in range(n):
            expected = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, n))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-5)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


@given(batches())
def test_lam_1_makes_returns_the_reward_to_go(made):
    lengths, width, g = made
    mask, rewards, values = ppo.response_mask(lengths, width), randn(g, len(lengths), width), randn(g, len(lengths), width)
    _, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    for row, n in enumerate(lengths.tolist()):
        for t in range(n):
            assert returns[row, t].item() == pytest.approx(rewards[row, t:n].sum().item(), abs=1e-5)


@given(batches())
def test_lam_0_makes_advantages_the_one_step_error(made):
    lengths, width, g = made
    mask, rewards, values = ppo.response_mask(lengths, width), randn(g, len(lengths), width), randn(g, len(lengths), width)
    advantages, _ = ppo.gae(rewards, values, mask, 0.9, 0.0)
    for row, n in enumerate(lengths.tolist()):
        for t in range(n):
            following = values[row, t + 1].item() if t + 1 < n else 0.0
            assert advantages[row, t].item() == pytest.approx(
                rewards[row, t].item() + 0.9 * following - values[row, t].item(), abs=1e-5
            )


@given(batches(), st.integers(1, 4))
def test_gae_does_not_depend_on_the_amount_of_padding(made, extra):
    lengths, width, g = made
    mask, rewards, values = ppo.response_mask(lengths, width), randn(g, len(lengths), width), randn(g, len(lengths), width)
    wider = lambda x, fill: torch.nn.functional.pad(x, (0, extra), value=fill)
    narrow = ppo.gae(rewards, values, mask, 1.0, 0.95)
    wide = ppo.gae(wider(rewards, 9.0), wider(values, float("nan")), ppo.response_mask(lengths, width + extra), 1.0, 0.95)
    for a, b in zip(narrow, wide):
        assert torch.equal(a, b[:, :width])


def test_whitened_rewards_do_not_leak_from_pads_into_gae():
    """A row alone, without pads, gets the same advantages as in a batch with pads and rewards whitened over the batch."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([6, 2, 4])
    mask, rewards, values = ppo.response_mask(lengths, 6), randn(g, 3, 6) + 2, randn(g, 3, 6)
    white = ppo.whiten(rewards, mask, shift_mean=False)
    together, _ = ppo.gae(white, values, mask, 1.0, 0.95)
    for row, n in enumerate(lengths.tolist()):
        alone, _ = ppo.gae(white[row : row + 1, :n], values[row : row + 1, :n], torch.ones(1, n, dtype=torch.bool), 1.0, 0.95)
        assert torch.equal(together[row, :n], alone[0])


# ---------------------------------------------------------------- losses


def policy_gradient(advantage, ratio, cliprange=0.2):
    logprob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    losses, clipped = ppo.policy_losses(logprob, torch.zeros(1, 1), torch.tensor([[advantage]]), cliprange)
    losses.sum().backward()
    return logprob.grad.item(), bool(clipped)


def test_at_ratio_1_the_gradient_is_minus_the_advantage():
    for advantage in (2.0, -3.0):
        assert policy_gradient(advantage, 1.0) == (pytest.approx(-advantage), False)


@pytest.mark.parametrize("advantage, ratio", [(1.0, 1.3), (-1.0, 0.7)])
def test_the_gradient_stops_where_the_policy_has_moved_far_enough(advantage, ratio):
    assert policy_gradient(advantage, ratio) == (0.0, True)


@pytest.mark.parametrize("advantage, ratio", [(-1.0, 1.3), (1.0, 0.7)])
def test_the_gradient_goes_on_where_the_policy_moved_the_wrong_way(advantage, ratio):
    assert policy_gradient(advantage, ratio) == (pytest.approx(-advantage * ratio, rel=1e-5), False)


def test_the_ratio_is_exactly_1_for_equal_logprobs_and_finite_for_any():
    old = torch.tensor([[-0.1234567, -300.0, -2.0, 0.0]])
    assert torch.equal(ppo.policy_ratio(old.clone(), old), torch.ones(1, 4))
    far = ppo.policy_ratio(torch.tensor([[500.0, -500.0]]), torch.zeros(1, 2))
    assert far.tolist() == [[pytest.approx(math.exp(20), rel=1e-6), pytest.approx(math.exp(-20), rel=1e-6)]]


@pytest.mark.parametrize(
    "value, old, ret, loss, clipped",
    [
        (1.1, 1.0, 2.0, 0.5 * 0.9**2, False),  # within the range: the plain squared error
        (1.5, 1.0, 2.0, 0.5 * 0.8**2, True),  # moved towards the return and too far: as if it stood at 1.2
        (0.5, 1.0, 2.0, 0.5 * 1.5**2, False),  # moved away: its own error is the worse one
        (3.0, 1.0, 2.0, 0.5 * 1.0**2, False),  # overshot: at 1.2 the error is 0.8, its own is 1.0
    ],
)
def test_the_value_loss_is_the_worse_of_the_value_and_the_clipped_value(value, old, ret, loss, clipped):
    losses, was_clipped = ppo.value_losses(*(torch.tensor([[x]]) for x in (value, old, ret)), 0.2)
    assert (losses.item(), bool(was_clipped)) == (pytest.approx(loss, rel=1e-5), clipped)


def test_nan_in_pad_logits_changes_neither_loss_nor_gradient():
    def loss_and_gradient(poison):
        logits, ids, mask, g = logits_case()
        logits = (poisoned(logits, mask) if poison else logits).requires_grad_()
        old, advantages = randn(g, *mask.shape) - 2, randn(g, *mask.shape)
        if poison:
            old, advantages = poisoned(old, mask), poisoned(advantages, mask)
        losses, _ = ppo.policy_losses(ppo.logprobs_from_logits(logits, ids, mask), old, advantages, 0.2)
        loss = ppo.masked_mean(losses, mask)
        loss.backward()
        return loss.item(), logits.grad

    clean, dirty = loss_and_gradient(False), loss_and_gradient(True)
    assert clean[0] == dirty[0] and torch.equal(clean[1], dirty[1])


# ---------------------------------------------------------------- KL controller


def test_the_kl_controller_follows_its_closed_form():
    """Far above the target every step multiplies by 1 + 0.2 n / horizon; far below, by 1 - 0.2 n / horizon."""
    up = down = 0.2
    for _ in range(5):
        up, down = ppo.next_kl_coef(up, 60.0, 6.0, 1000.0, 100), ppo.next_kl_coef(down, 0.0, 6.0, 1000.0, 100)
    assert (up, down) == (pytest.approx(0.2 * 1.02**5), pytest.approx(0.2 * 0.98**5))


def test_the_kl_controller_rests_at_its_target_and_is_proportional_near_it():
    assert ppo.next_kl_coef(0.3, 6.0, 6.0, 1000.0, 100) == 0.3
    assert ppo.next_kl_coef(0.3, 6.6, 6.0, 1000.0, 100) == pytest.approx(0.3 * (1 + 0.1 * 100 / 1000))
