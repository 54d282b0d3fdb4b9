"""Sampling responses. The loop is ours for one reason: what is sampled must be exactly what is scored afterwards, softmax
(logits / temperature) over the whole vocabulary. `model.generate` would add what the checkpoint's generation_config says
(top_k is 50 unless told otherwise), and the log-probs of such samples belong to another distribution.

`sample` gives the log-probs it drew with, so that nobody has to believe this: the trainer compares them with its own. With
the CPU profile they are equal to the last bit (see `fast.py`, which changes how soon a token comes, never which)."""

import contextlib
import functools
import hashlib
import math
import numbers
import warnings
from dataclasses import dataclass

import torch

from rlhf_helpers import fast
from rlhf_helpers.classic import GENERATE, instead
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import shown
from rlhf_helpers.models import at_the_last, positions_of
from rlhf_helpers.shard import everywhere

# What `generate` takes so that calls written for TRL keep working; any other value would change what is sampled.
NEUTRAL = {
    "top_k": (0, None), "top_p": (1.0, None), "typical_p": (1.0, None), "min_p": (0.0, None), "repetition_penalty": (1.0, None),
    "min_length": (-1, 0, None), "min_new_tokens": (0, None), "num_beams": (1, None), "no_repeat_ngram_size": (0, None),
}  # fmt: skip


def checked_options(vocabulary, own_temperature, temperature, greedy, eos_token_id, pad_token_id, do_sample=True, **options):
    """(temperature, greedy, the ids that end a response, pad id) of a call to `generate`. Raises InputError for an option that is
    unknown, or that would change the distribution: what is sampled is softmax(logits / own_temperature), whole."""
    for name, value in dict(greedy=greedy, do_sample=do_sample).items():
        if type(value) is not bool:
            raise InputError(f"generate: {name} is {value!r:.80}; expected True or False")
    temperature, greedy = own_temperature if temperature is None else temperature, greedy or not do_sample
    if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real) or not 0 < temperature < math.inf:
        raise InputError(f"generate: temperature is {temperature!r:.80}; expected a number above 0")
    check_whole("generate", 0, pad_token_id=pad_token_id)
    if pad_token_id >= vocabulary:
        raise InputError(f"generate: pad_token_id is {pad_token_id}; expected 0 to {vocabulary - 1}")
    if not greedy and temperature != own_temperature:
        raise InputError(
            f"generate: temperature {temperature} is not PPOConfig.temperature {own_temperature}, at which log-probs are taken"
        )
    for name, value in options.items():
        if name not in NEUTRAL:
            raise InputError(f"generate: unknown option {name}={shown(value)}{instead(name, GENERATE)}")
        if not isinstance(value, (numbers.Real, type(None))) or value not in NEUTRAL[name]:
            raise InputError(
                f"generate: {name}={value!r:.80} would sample from another distribution than the one that is scored; expected {NEUTRAL[name][0]}"
            )
    ends = end_ids(eos_token_id)
    if min(ends) >= vocabulary:
        raise InputError(
            f"generate: an EOS of id {min(ends)}, which the model does not have: no response would end; expected -1 (never) to {vocabulary - 1}"
        )
    return temperature, greedy, ends, pad_token_id


def check_whole(call, least, **sizes):
    """Raises InputError, by its name, for an argument of `call` that is no whole number from `least`."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise InputError(f"{call}: {name} is {value!r:.80}; expected a whole number from {least}")


def positions_in(config):
    """Tokens that a prompt and its response may have together, of a text model's config."""
    return getattr(config, "max_position_embeddings", None) or math.inf


def check_room(config, queries, lengths):
    """Raises InputError for a query with no room behind it for a response of so many tokens, where positions are learnt (GPT-2).
    Rotary ones go on, and how well, their scaling decides."""
    most = learnt_positions(config)
    for row, (query, length) in enumerate(zip(queries, lengths)):
        if len(query) + length > most:
            raise InputError(
                f"query {row} has {len(query)} tokens and its response {length}; expected at most {most} together, the positions "
                "of the model"
            )


def learnt_positions(config):
    """As `positions_in`, where positions are learnt; without an end where they are rotary."""
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    return math.inf if rotary else positions_in(config)


def end_ids(eos_id):
    """One token id, or several, that end a response, as a tuple. Raises InputError for anything else."""
    ids = tuple(eos_id) if isinstance(eos_id, (list, tuple)) else (eos_id,)
    if not ids:
        raise InputError("generate: neither tokenizer nor generation_config names an EOS; expected eos_token_id (-1: never)")
    if not all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in ids):
        raise InputError(f"generate: eos_token_id={eos_id!r}; expected one token id, or a list of them")
    return tuple(map(int, ids))


def pad_left(sequences, pad_id):
    """Lists of 1-D LongTensors to (input_ids, attention_mask), both (B, P), padded on the left: a response must follow its
    prompt without a gap."""
    pad = lambda rows, value: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")
    return pad(list(sequences), pad_id), pad([torch.ones_like(row) for row in sequences], 0)


def draw(logits, generator, block=256):
    """One token id per row of `logits` (B, V), by inverting the cumulative distribution: (B, 1). First the block of tokens in which
    it falls, then the token in the block: the sums are in fp64, and few. The random numbers come from a CPU generator, so a seed
    means the same on every device. (torch.multinomial is 30 times slower on a CPU.)"""
    p = logits.float().softmax(-1)
    p = torch.nn.functional.pad(p, (0, -p.shape[1] % block)).unflatten(1, (-1, block))
    below = p.sum(-1, dtype=torch.float64).cumsum(-1)  # (B, V / block)
    u = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device) * below[:, -1:]
    which = torch.searchsorted(below, u, right=True).clamp(max=below.shape[1] - 1)
    inside = p[torch.arange(len(p), device=p.device), which[:, 0]].cumsum(-1, dtype=torch.float64)  # (B, block)
    u = (u - torch.nn.functional.pad(below, (1, 0)).gather(1, which)).clamp(max=inside[:, -1:] * (1 - 1e-12))
    return which * block + torch.searchsorted(inside, u, right=True)


class Plain:
    """Reads tokens through the model itself, with its cache: any architecture, on any device. `read(tokens, attention,
    positions)`, (B, n), (B, so far), (B, n), gives (logits (B, V), last hidden states (B, H)) at the last place."""

    def __init__(self, lm, device=None):
        self.lm, self.cache = lm, None
        self.least_rows = fast.enough_rows() if device is None or device.type == "cpu" else 1

    def read(self, tokens, attention, positions):
        last = torch.tensor([tokens.shape[1] - 1], device=tokens.device)
        logits, hidden, self.cache = at_the_last(self.lm, tokens, attention, positions, self.cache, last)
        return logits, hidden


@dataclass
class Samples:
    """Responses as they were drawn; row i of each belongs to response i of length T_i."""

    responses: list  # 1-D LongTensors, the first EOS included
    logprobs: list  # (T_i,) fp32: log softmax(logits / temperature) of each token, nats
    hidden: list  # (T_i, H): the last hidden state that each token was drawn from


@dataclass
class Drawn:
    """How one response was drawn. `generate` leaves it on the tensor that it gives, as `response.drawn`; a tensor made in any
    other way has none. It counts as long as query, ids, temperature and weights are those of the drawing."""

    query: torch.Tensor  # (L,) what it answers
    ids: torch.Tensor  # (T,) a copy: the response itself may be changed
    logprobs: torch.Tensor  # (T,)
    hidden: torch.Tensor  # (T, H)
    temperature: float
    weights: bytes  # a digest of all weights that learn; None if others drew it, or the likeliest token was taken each time
    ends: tuple = ()  # the token ids that could end it


def digest(parameters):
    """A few bytes that tell whether any of these tensors has changed."""
    sha = hashlib.sha1(usedforsecurity=False)
    for parameter in parameters:
        sha.update(parameter.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    return sha.digest()


def how_drawn(queries, responses, temperature, weights):
    """The Drawn of every response, or None where it is missing or no longer true."""
    notes = [getattr(response, "drawn", None) for response in responses]
    alike = lambda note: weights is not None and note.temperature == temperature and note.weights == weights
    true = lambda note, query, ids: alike(note) and torch.equal(note.query, query) and torch.equal(note.ids, ids.cpu())
    rows = zip(notes, queries, responses)
    return [note if note is not None and true(note, query, ids) else None for note, query, ids in rows]


def ended(responses, eos_ids):
    """Whether each response ends by itself, (B,) bool: by the ids that `generate` was given for it, else by `eos_ids`."""
    ends = [getattr(getattr(response, "drawn", None), "ends", ()) or eos_ids for response in responses]
    has = lambda response, ids: not set(torch.as_tensor(response).tolist()).isdisjoint(ids)
    return torch.tensor(list(map(has, responses, ends)))


def warn_of_slips(queries, responses, notes, eos_ids, pad_id):
    """Warns of responses that `generate` has not cut (`notes` has None for them) and that look like somebody's slip: pads behind their
    EOS, which count as tokens, and the score falls on the last of them; or the query in front. And of queries that do (`warn_of_padded`)."""
    if None in notes:  # else `generate` has looked at the queries
        warn_of_padded(queries, pad_id, stacklevel=5)
    for row, (ids, note) in enumerate(zip(responses, notes)):
        ends = torch.isin(ids, torch.tensor(list(eos_ids), dtype=torch.long)).nonzero().flatten().tolist()
        tail = ids[ends[0] + 1 :] if note is None and ends else ids[:0]
        if len(tail) and bool((tail == pad_id).all()):
            said = f"response {row} has {len(tail)} pads behind its EOS, which count as tokens of it; is it a row of a padded tensor?"
            return warnings.warn(said, stacklevel=4)
    if all(len(query) > 1 and torch.equal(ids[: len(query)], query) for query, ids in zip(queries, responses)):
        warnings.warn("every response begins with its query, which is learnt, too; expected it cut off", stacklevel=4)


def warn_of_padded(queries, pad_id, stacklevel=4):
    """Warns of queries that look like the rows of a padded tensor, all equally long, some with pads at an end: they would be read as text.
    (One such token in every row may be a BOS or an EOS, and a group has one prompt.)"""
    different = {tuple(ids.tolist()) for ids in queries}
    if len({len(ids) for ids in queries}) > 1 or len(different) == 1:
        return
    for outside in (lambda ids: ids != pad_id, lambda ids: ids.flip(0) != pad_id):
        pads = [int(outside(ids).int().cumsum(0).eq(0).sum()) for ids in queries]
        if (most := max(pads)) > min(1, min(pads)):
            said = f"query {pads.index(most)} looks like a row of a padded tensor: {most} times the pad at an end, read as text"
            return warnings.warn(f"{said}; expected it without", stacklevel=stacklevel)


def padded(notes, device):
    """(log-probs (B, T), hidden states (B, T, H)) of responses from their Drawn; (None, None) unless all have one."""
    if None in notes:
        return None, None
    pad = lambda parts: torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(device)
    return pad([note.logprobs for note in notes]), pad([note.hidden for note in notes])


@torch.no_grad()
def sample(lm, queries, max_new_tokens, eos_id, pad_id, temperature=1.0, generator=None, greedy=False, reader=None,
           each_token=lambda: None):  # fmt: skip
    """Samples for `queries`, a list of 1-D LongTensors: up to `max_new_tokens` each, cut after the first EOS (one id or
    several), which stays. `reader(n)` makes what reads up to n tokens a row, by default `Plain(lm)`; `each_token` is called
    after each."""
    device = lm.get_input_embeddings().weight.device
    ends = torch.tensor(end_ids(eos_id), device=device)
    reader = reader(max(map(len, queries)) + max_new_tokens) if reader else Plain(lm, device)
    # A few rows alone may meet other kernels than the many rows of a scoring pass, with other bits: copies keep them company.
    company = torch.arange(max(len(queries), reader.least_rows)) % len(queries)
    tokens, attention = (x[company].to(device) for x in pad_left(queries, pad_id))
    positions, written = positions_of(attention), []
    ended = torch.zeros(len(queries), 1, dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        logits, hidden = reader.read(tokens, attention, positions)
        logits = logits[: len(queries)].float() / temperature  # fp32, as log-probs are taken
        if not logits.amax(-1).isfinite().all():  # NaN, or infinite: no token could be drawn from that
            raise InputError(
                "generate: the model gave logits that are not finite; expected finite ones: are its weights finite?"
            )
        drawn = logits.argmax(-1, keepdim=True) if greedy else draw(logits, generator)
        written.append((torch.where(ended, -1, drawn), -nll(logits, drawn), hidden[: len(queries), None]))  # -1: after the end
        each_token()
        drawn = torch.where(ended, pad_id, drawn)
        ended |= torch.isin(drawn, ends)
        if everywhere(ended.all(), lm):  # of a model in shards, each process is asked for its share of every token
            break
        tokens = drawn[company]
        positions = positions[:, -1:] + 1
        attention = torch.cat([attention, torch.ones_like(tokens)], 1)
    ids, logprobs, hidden = (torch.cat(parts, 1).cpu() for parts in zip(*written))
    real = ids >= 0
    return Samples(*([row[keep] for row, keep in zip(rows, real)] for rows in (ids, logprobs, hidden)))


def nll(logits, ids):
    """-log softmax of `logits` (B, V), fp32, at `ids` (B, 1): (B, 1), by the arithmetic of ppo.logprobs_from_logits."""
    return torch.nn.functional.cross_entropy(logits, ids[:, 0], reduction="none")[:, None]


@contextlib.contextmanager
def reader_of(model, reference=None, unpacked=None):
    """Gives (lm, reader) as `sample` takes them, for the policy `model`, a PolicyWithValueHead; or for its reference:
    `reference` is another model, or True for the adapters switched off. Dropout is off inside. `unpacked` is `fast.Unpacked`
    of the policy, or None."""
    if isinstance(reference, torch.nn.Module):
        yield reference.eval(), None
        return
    lm = model.pretrained_model
    with model.without_dropout(), model.adapters_off() if reference else contextlib.nullcontext():
        if unpacked:
            yield lm, functools.partial(fast.Reader, unpacked, not model.adapters_are_off())
        else:
            # Beyond a sliding window the plain way is taken: a mask that is given whole does not know it.
            window = getattr(lm.config.get_text_config(), "sliding_window", None) or math.inf
            graphed = lambda most: fast.Graphed(lm, most) if most <= window else Plain(lm, lm.device)
            yield lm, graphed if fast.can_graph(lm) else None
