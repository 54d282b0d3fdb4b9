"""Sampling: what is drawn is softmax(logits / temperature), and how a batch is padded changes nothing."""

import copy
import math

import pytest
import torch

from rlhf_helpers.models import PolicyWithValueHead, response_logits
from rlhf_helpers.sampling import MergedCopy, can_merge, draw, pad_left, sample
from tests import tiny
from tests.tiny import EOS, PAD

FAMILIES = pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def chi_square(tokens, probabilities):
    """Chi-square of the counts against the probabilities, in deviations from what is expected of it (0 is typical)."""
    expected = probabilities.double() * len(tokens)
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    rare = expected < 5  # together they are one cell
    expected, counts = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (expected, counts))
    cells = expected > 0
    freedom = int(cells.sum()) - 1
    return (((counts - expected) ** 2 / expected)[cells].sum().item() - freedom) / math.sqrt(2 * freedom)


def test_prompts_are_padded_on_the_left_with_a_mask_from_their_lengths():
    ids, mask = pad_left([torch.tensor([5, PAD, 6]), torch.tensor([7])], PAD)
    assert ids.tolist() == [[5, PAD, 6], [PAD, PAD, 7]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]  # a pad id inside a prompt is a token like any other


def test_draws_follow_the_softmax():
    logits = torch.randn(12, generator=generator(1)) * 1.5
    tokens = draw(logits.expand(20_000, 12), generator()).flatten()
    assert chi_square(tokens, logits.softmax(-1)) < 4
    assert chi_square(tokens, (logits / 0.9).softmax(-1)) > 10  # the test can tell a temperature of 0.9


def test_tokens_without_probability_are_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(2000, 5)
    assert set(draw(logits, generator()).flatten().tolist()) == {1, 3}


def test_a_seed_fixes_the_draws():
    logits = torch.zeros(50, 100)
    assert torch.equal(draw(logits, generator(3)), draw(logits, generator(3)))
    assert not torch.equal(draw(logits, generator(3)), draw(logits, generator(4)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_tokens_follow_the_model_at_the_temperature(temperature):
    lm = tiny.llama(vocab_size=16)
    query = torch.tensor([5, 6, 7])
    tokens = torch.cat(sample(lm, [query] * 5000, 1, EOS, PAD, temperature, generator()))
    assert chi_square(tokens, (lm(query[None]).logits[0, -1] / temperature).softmax(-1)) < 4


@FAMILIES
def test_greedy_responses_of_a_left_padded_batch_are_those_of_each_prompt_alone(make):
    lm, queries = make(), tiny.batch(6)[0]
    together = sample(lm, queries, 10, EOS, PAD, greedy=True)
    for query, response in zip(queries, together):
        ids = query
        for _ in range(len(response)):  # no cache, no padding
            ids = torch.cat([ids, lm(input_ids=ids[None]).logits[0, -1].argmax()[None]])
        assert response.tolist() == ids[len(query) :].tolist()


class Script:
    """A stand-in for a language model that says row by row what it is told."""

    def __init__(self, rows, vocabulary=20):
        self.rows, self.vocabulary, self.step, self.widths = rows, vocabulary, 0, []

    def get_input_embeddings(self):
        return torch.nn.Embedding(1, 1)

    def __call__(self, input_ids, past_key_values, **kwargs):
        self.widths.append(input_ids.shape[1])
        self.positions = kwargs["position_ids"]
        logits = torch.zeros(len(self.rows), 1, self.vocabulary)
        for row, tokens in enumerate(self.rows):
            logits[row, 0, tokens[min(self.step, len(tokens) - 1)]] = 100.0
        self.step += 1
        return type("Output", (), dict(logits=logits, past_key_values="cache"))


def test_eos_is_kept_and_what_follows_is_cut():
    script = Script([[7, 8, EOS, 9, 9], [EOS, 7, 7, 7, 7], [7, 7, 7, 7, 7]])
    responses = sample(script, [torch.tensor([5])] * 3, 5, EOS, PAD, greedy=True)
    assert [r.tolist() for r in responses] == [[7, 8, EOS], [EOS], [7] * 5]


def test_sampling_stops_when_all_rows_have_ended():
    script = Script([[7, EOS], [EOS]])
    sample(script, [torch.tensor([5])] * 2, 50, EOS, PAD, greedy=True)
    assert script.step == 2


def test_eos_inside_the_prompt_ends_nothing():
    responses = sample(Script([[7, 8]]), [torch.tensor([5, EOS, 6])], 4, EOS, PAD, greedy=True)
    assert responses[0].tolist() == [7, 8, 8, 8]


def test_pad_may_be_eos():
    script = Script([[7, EOS, 9], [7, 8, 9]])
    responses = sample(script, [torch.tensor([5]), torch.tensor([EOS, 6])], 3, EOS, EOS, greedy=True)
    assert [r.tolist() for r in responses] == [[7, EOS], [7, 8, 9]]


def test_a_sampled_pad_id_is_a_token_of_the_response():
    responses = sample(Script([[PAD, 7, EOS]]), [torch.tensor([5])], 5, EOS, PAD, greedy=True)
    assert responses[0].tolist() == [PAD, 7, EOS]


def test_after_the_prompt_one_token_a_time_is_read_at_the_right_position():
    script = Script([[7], [7]])
    sample(script, [torch.tensor([5, 6, 7]), torch.tensor([5])], 4, EOS, PAD, greedy=True)
    assert script.widths == [3, 1, 1, 1]
    assert script.positions.tolist() == [[5], [3]]  # the last token read stands behind three others in its own row's count


# ---------------------------------------------------------------- the merged copy


def inputs():
    queries, responses, _ = tiny.batch(4, lengths=(6,))
    ids, mask = pad_left(queries, PAD)
    return torch.cat([ids, torch.stack(responses)], 1), torch.cat([mask, torch.ones(4, 6, dtype=torch.long)], 1), 6


@torch.no_grad()
def logprobs(lm):
    return response_logits(lm, *inputs()).float().log_softmax(-1)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear", None])
def test_the_merged_copy_says_what_the_policy_says(nf4, targets):
    lm = nf4(targets=targets, b_scale=0.2)
    policy = PolicyWithValueHead(lm)
    merged = MergedCopy(lm).refresh()
    assert not any(module.training for module in merged.modules())
    difference = (logprobs(merged) - logprobs(policy.pretrained_model)).abs()
    assert difference.mean() < 0.03  # bf16 has three digits, and merging rounds once more
    assert (logprobs(merged).argmax(-1) == logprobs(lm).argmax(-1)).float().mean() > 0.9
    if targets:
        with policy.adapters_off():
            base = logprobs(lm)
        assert (base - logprobs(lm)).abs().mean() > 10 * difference.mean()  # the adapters matter here


def test_the_copy_without_adapters_is_the_reference_and_follows_the_adapters_again(nf4):
    lm = nf4(b_scale=0.2)
    policy, copied = PolicyWithValueHead(lm), MergedCopy(lm)
    with policy.adapters_off():
        reference = logprobs(lm)
    first = logprobs(copied.refresh())
    torch.testing.assert_close(logprobs(copied.refresh(adapters=False)), reference, atol=0.1, rtol=0)
    assert torch.equal(logprobs(copied.refresh()), first)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.5
    assert not torch.equal(logprobs(copied.refresh()), first)


def test_making_the_copy_changes_nothing_in_the_policy(nf4):
    lm = nf4(targets="all-linear", b_scale=0.2)
    PolicyWithValueHead(lm)
    before = logprobs(lm)
    MergedCopy(lm).refresh()
    assert torch.equal(logprobs(lm), before)


def test_the_copy_shares_embeddings_and_norms(nf4):
    lm = nf4()
    copied = MergedCopy(lm).lm
    assert copied.get_input_embeddings().weight is lm.get_input_embeddings().weight
    assert copied.model.norm.weight is lm.get_base_model().model.norm.weight
    assert not any(p.is_meta for p in copied.parameters()) and not any(b.is_meta for b in copied.buffers())


def test_only_plain_lora_is_merged():
    plain = tiny.with_lora(tiny.llama())
    assert can_merge(plain) and can_merge(tiny.llama())
    for change in (dict(use_dora=True), dict(modules_to_save=["lm_head"])):
        other = copy.deepcopy(plain)
        vars(other.active_peft_config).update(change)
        assert not can_merge(other)
    plain.add_adapter("second", plain.peft_config["default"])
    plain.base_model.set_adapter(["default", "second"])
    assert not can_merge(plain)
