"""How one batch becomes tensors: shapes, masks, dtypes, and what padding may not change."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_helpers.config import PPOConfig
from rlhf_helpers.rollout import collate, fill_rewards, gae_advantages
from tests import tiny
from tests.tiny import EOS, PAD


def filled(queries, responses, scores, whiten_rewards=False):
    """A rollout with the log-probs of a made-up policy, row by row the same whatever the padding."""
    rollout = collate(queries, responses, torch.tensor(scores), PAD, "cpu")
    numbers = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))[:, : len(responses), : rollout.mask.shape[1]]
    rollout.logprobs, rollout.ref_logprobs, rollout.values = (torch.where(rollout.mask, x, 0.0) for x in numbers)
    rollout.kl = rollout.logprobs - rollout.ref_logprobs
    fill_rewards(rollout, 0.2)
    rollout.advantages, rollout.returns = gae_advantages(rollout, PPOConfig(whiten_rewards=whiten_rewards))
    return rollout


def test_a_prompt_ends_where_its_response_begins():
    queries, responses, scores = tiny.batch()
    rollout = collate(queries, responses, torch.tensor(scores), PAD, "cpu")
    width = max(map(len, queries))
    for row, (query, response) in enumerate(zip(queries, responses)):
        assert rollout.input_ids[row, width - len(query) : width + len(response)].tolist() == query.tolist() + response.tolist()
        assert rollout.attention_mask[row].tolist() == (
            [0] * (width - len(query)) + [1] * (len(query) + len(response)) + [0] * (rollout.mask.shape[1] - len(response))
        )


def test_the_mask_comes_from_lengths_where_eos_and_pad_are_one_token():
    responses = [torch.tensor([EOS, 5, EOS]), torch.tensor([EOS])]
    rollout = collate([torch.tensor([EOS]), torch.tensor([5])], responses, torch.zeros(2), EOS, "cpu")
    assert rollout.mask.tolist() == [[True, True, True], [True, False, False]]
    assert rollout.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert rollout.lengths.tolist() == [3, 1] and len(rollout) == 2


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 8)), min_size=1, max_size=5))
def test_the_mask_has_as_many_tokens_as_the_response(lengths):
    queries, responses = ([torch.full((pair[i],), 7) for pair in lengths] for i in (0, 1))
    rollout = collate(queries, responses, torch.zeros(len(lengths)), PAD, "cpu")
    assert rollout.lengths.tolist() == [pair[1] for pair in lengths]
    assert (rollout.response_ids[~rollout.mask] == PAD).all()
    assert rollout.attention_mask.sum(1).tolist() == [sum(pair) for pair in lengths]


def test_the_inputs_of_some_rows_keep_the_shapes_of_the_whole_batch():
    rollout = collate(*tiny.batch()[:2], torch.zeros(4), PAD, "cpu")
    ids, mask, width = rollout.inputs(torch.tensor([1]))  # the shortest response
    assert torch.equal(ids[0], rollout.input_ids[1]) and torch.equal(mask[0], rollout.attention_mask[1])
    assert width == 8


def test_every_per_token_tensor_is_fp32_and_0_outside_the_mask():
    rollout = filled(*tiny.batch())
    for name in ("logprobs", "ref_logprobs", "values", "kl", "non_score_rewards", "rewards", "returns", "advantages"):
        tensor = getattr(rollout, name)
        assert tensor.shape == rollout.mask.shape and tensor.dtype == torch.float32, name
        assert (tensor[~rollout.mask] == 0).all() and (tensor[rollout.mask] != 0).all(), name


def test_advantages_are_whitened_over_the_batch_and_returns_are_not():
    rollout = filled(*tiny.batch())
    real = rollout.advantages[rollout.mask]
    assert abs(real.mean()) < 1e-5 and abs(real.var() - 1) < 1e-4
    alone = filled(*(x[:1] for x in tiny.batch()))  # one row: its returns do not depend on the others
    torch.testing.assert_close(rollout.returns[0, :6], alone.returns[0], atol=1e-6, rtol=0)


def test_whitened_rewards_leave_rewards_as_they_are_for_looking_at():
    plain, white = filled(*tiny.batch()), filled(*tiny.batch(), whiten_rewards=True)
    assert torch.equal(plain.rewards, white.rewards)
    assert not torch.equal(plain.returns, white.returns)


# ---------------------------------------------------------------- padding, through the whole trainer


@functools.cache
def trained(family):
    """A policy away from its reference, with values that matter; minibatches of two."""
    lm = {"llama": tiny.llama, "gpt2": tiny.gpt2}[family]()
    lm = tiny.with_lora(lm, "all-linear", b_scale=0.1)
    return tiny.trainer(lm, mini_batch_size=2, init_kl_coef=0.3, temperature=0.8)


sizes = st.tuples(st.integers(1, 6), st.integers(1, 8))  # of a query and its response


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(rows=st.lists(sizes, min_size=2, max_size=4), data=st.data())
def test_what_a_response_gets_depends_on_neither_its_neighbours_nor_its_row(family, rows, data):
    """In another order, alone, and beside one that is longer on both sides."""
    everyone, order = list(range(len(rows))), data.draw(st.permutations(range(len(rows))))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    queries, responses = ([torch.randint(4, tiny.V, (n,), generator=g) for n in column] for column in zip(*rows, (12, 15)))
    scores = torch.randn(len(rows) + 1, generator=g)
    inspect = lambda places: trained(family).inspect(*([x[i] for i in places] for x in (queries, responses, scores)))
    together = inspect(everyone)
    assert (together.kl[together.mask] != 0).all() and (together.values[together.mask] != 0).all()
    for places in (order, [*everyone, len(rows)], *([i] for i in everyone)):
        rollout = inspect(places)
        for name in ("logprobs", "ref_logprobs", "values", "kl", "rewards", "returns"):
            for row, place in enumerate(place for place in places if place in everyone):
                n = len(responses[place])
                got, expected = getattr(rollout, name)[row], getattr(together, name)[place]
                assert (got[:n] - expected[:n]).abs().max() < 1e-5, name
                assert (got[n:] == 0).all(), name
