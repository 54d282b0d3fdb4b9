"""Sampling: what is drawn is softmax(logits / temperature), and how a batch is padded changes nothing."""

import math

import pytest
import torch

from rlhf_helpers import ppo, sampling
from rlhf_helpers.errors import InputError
from rlhf_helpers.sampling import draw, end_ids, pad_left
from tests import tiny
from tests.tiny import EOS, PAD

FAMILIES = pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])


def sample(*args, **kwargs):
    """The responses alone."""
    return sampling.sample(*args, **kwargs).responses


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
        self.head = torch.nn.Identity()

    def get_input_embeddings(self):
        return torch.nn.Embedding(1, 1)

    def get_output_embeddings(self):
        return self.head

    def __call__(self, input_ids, past_key_values, **kwargs):
        self.widths.append(input_ids.shape[1])
        self.positions = kwargs["position_ids"]
        self.head(torch.zeros(len(input_ids), 1, 4))  # hidden states
        logits = torch.zeros(len(input_ids), 1, self.vocabulary)
        for row, tokens in enumerate(self.rows):
            logits[row, 0, tokens[min(self.step, len(tokens) - 1)]] = 100.0  # copies of rows may follow
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
    assert script.positions[:2].tolist() == [[5], [3]]  # the last token read stands behind three others in its own row's count


def test_any_of_several_ids_ends_a_response():
    script = Script([[7, 8, 9], [7, EOS, 9], [7, 7, 7]])
    responses = sample(script, [torch.tensor([5])] * 3, 4, [EOS, 8], PAD, greedy=True)
    assert [r.tolist() for r in responses] == [[7, 8], [7, EOS], [7] * 4]


@pytest.mark.parametrize("wrong", [None, "2", 1.0, True, [], [1, None]])
def test_what_is_no_token_id_ends_nothing(wrong):
    with pytest.raises(InputError, match="eos_token_id"):
        end_ids(wrong)


@FAMILIES
def test_the_log_probs_it_drew_with_are_those_of_its_tokens(make):
    lm, queries = make(), tiny.batch(6)[0]
    samples = sampling.sample(lm, queries, 10, EOS, PAD, 0.7, generator())
    for query, response, logprobs, hidden in zip(queries, samples.responses, samples.logprobs, samples.hidden):
        out = lm(input_ids=torch.cat([query, response])[None], output_hidden_states=True)
        predicting = slice(len(query) - 1, -1)
        mask = torch.ones(1, len(response), dtype=torch.bool)
        expected = ppo.logprobs_from_logits(out.logits[:, predicting], response[None], mask, 0.7)[0]
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(hidden, out.hidden_states[-1][0, predicting], atol=1e-5, rtol=1e-5)
        assert logprobs.dtype == torch.float32


def test_how_a_response_was_drawn_counts_as_long_as_query_ids_temperature_and_weights_are_the_same():
    response = torch.tensor([5, 6])
    query, other = torch.tensor([3]), torch.tensor([4])
    response.drawn = sampling.Drawn(query, response.clone(), torch.zeros(2), torch.zeros(2, 4), 0.7, b"weights")
    known = lambda *args: [note is not None for note in sampling.how_drawn(*args)]
    assert known([query, query], [response, torch.tensor([5, 6])], 0.7, b"weights") == [True, False]
    assert known([query], [response], 0.8, b"weights") == known([query], [response], 0.7, b"others") == [False]
    assert known([other], [response], 0.7, b"weights") == [False]
    response[1] = 7
    assert known([query], [response], 0.7, b"weights") == [False]


def test_a_digest_tells_whether_a_weight_has_changed_however_it_was_done():
    weights = [torch.zeros(3), torch.zeros(2, 2, dtype=torch.bfloat16)]
    before = sampling.digest(weights)
    assert sampling.digest([w.clone() for w in weights]) == before
    weights[1].data[0, 0] = 1e-3  # past autograd's own counter
    assert sampling.digest(weights) != before
