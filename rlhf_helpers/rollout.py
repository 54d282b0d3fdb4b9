"""`Rollout`: every tensor of one PPO step, named and shaped once, and how it is made."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_helpers import ppo
from rlhf_helpers.data import checked_list
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import shown
from rlhf_helpers.sampling import check_room, check_whole, checked_options, pad_left, warn_of_padded


@dataclass
class Rollout:
    """One batch of B responses of at most T tokens. Per-token tensors are (B, T) over response tokens and 0 outside `mask`; the two of
    the update are NaN in rows that it has not yet met."""

    queries: list  # B LongTensors: token ids of the rendered prompts
    responses: list  # B LongTensors: token ids that the policy wrote, EOS included
    scores: torch.Tensor  # (B,) what the reward model gave, after clipping and the penalty for a missing EOS
    input_ids: torch.Tensor  # (B, P + T) prompt padded on the left, response on the right
    attention_mask: torch.Tensor  # (B, P + T) 1 on real tokens
    response_ids: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, T) bool, from lengths
    ended: torch.Tensor = None  # (B,) bool: it ends by itself
    weights: bytes = None  # the digest of what learns, when it was scored
    prompts: list = None  # B strings, as they were given to `train`, else decoded from the queries
    texts: list = None  # B strings: the responses without special tokens, what the reward function reads
    logprobs: torch.Tensor = None  # log pi of each token before the update, nats
    sampler_logprobs: torch.Tensor = None  # the same as it was drawn; None where that is not known
    new_logprobs: torch.Tensor = None  # log pi in the update's latest pass
    first_logprobs: torch.Tensor = None  # log pi in its first pass, before anything moved
    first_rows: torch.Tensor = None  # the rows that it met: those of the first optimizer step
    ref_logprobs: torch.Tensor = None  # the same under the reference
    values: torch.Tensor = None  # the value head's guess of what is still to come
    kl: torch.Tensor = None  # the penalised quantity, by default logprobs - ref_logprobs
    non_score_rewards: torch.Tensor = None  # -kl_coef * kl
    rewards: torch.Tensor = None  # non_score_rewards, and the score on the last token
    returns: torch.Tensor = None  # raw advantages + values: what the value head should have said
    advantages: torch.Tensor = None  # GAE, whitened over the batch

    def __len__(self):
        return len(self.responses)

    def inputs(self, rows):
        """What a forward pass takes for these rows: (input_ids, attention_mask, T). T is the same for all, so that the same
        tokens meet the same shapes in every pass, and give the same numbers."""
        return self.input_ids[rows], self.attention_mask[rows], self.mask.shape[1]

    @property
    def lengths(self):
        return self.mask.sum(1)


def collate(queries, responses, scores, pad_id, device):
    """A Rollout with its tokens and masks; the rest is still None."""
    prompt_ids, prompt_mask = pad_left(queries, pad_id)
    response_ids = torch.nn.utils.rnn.pad_sequence(responses, batch_first=True, padding_value=pad_id)
    mask = ppo.response_mask(torch.tensor([len(r) for r in responses]), response_ids.shape[1])
    return Rollout(
        queries=queries,
        responses=responses,
        scores=scores.to(device),
        input_ids=torch.cat([prompt_ids, response_ids], 1).to(device),
        attention_mask=torch.cat([prompt_mask, mask.long()], 1).to(device),
        response_ids=response_ids.to(device),
        mask=mask.to(device),
    )


def clipped_scores(scores, ended, config):
    """Scores (B,) within score_clip, less missing_eos_penalty for a response that has not `ended`, (B,) bool, by itself."""
    if config.score_clip is not None:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    if config.missing_eos_penalty is not None:
        scores = scores - config.missing_eos_penalty * ~ended
    return scores


def checked_advantages(made, rollout):
    """What a function of advantages made, (advantages, returns). Raises InputError unless both are (B, T) of floats; warns of NaN
    made of finite numbers, whose update will be left out."""
    shape, mask = tuple(rollout.mask.shape), rollout.mask
    fits = lambda part: isinstance(part, torch.Tensor) and tuple(part.shape) == shape and part.is_floating_point()
    if not (isinstance(made, (tuple, list)) and len(made) == 2 and all(map(fits, made))):
        raise InputError(
            f"the trainer's function of advantages gave {shown(made)}; expected two float tensors {shape}, advantages and returns"
        )
    finite = lambda *parts: all(part[mask].isfinite().all() for part in parts)
    if finite(rollout.rewards, rollout.values) and not finite(*made):
        warnings.warn(
            "the advantages have numbers that are not finite, of rewards and values that are: updates will be left out",
            stacklevel=4,
        )
    return made


def fill_rewards(rollout, kl_coef):
    """Rewards per token from the scores and the KL penalty."""
    rollout.rewards, rollout.non_score_rewards = ppo.token_rewards(rollout.scores, rollout.kl, rollout.mask, kl_coef)


def gae_advantages(rollout, config, total=ppo.alone):
    """(advantages, returns), both (B, T), from a Rollout with rewards and values: GAE, whitened over the batch. `total` sums a
    number over processes. Another function of this shape in `PPOTrainer(advantages=...)` is another algorithm."""
    mask, rewards = rollout.mask, rollout.rewards
    if config.whiten_rewards:
        rewards = ppo.whiten(rewards, mask, shift_mean=False, total=total)
    raw, returns = ppo.gae(rewards, rollout.values, mask, config.gamma, config.lam)
    return ppo.whiten(raw, mask, total=total), returns


# ---------------------------------------------------------------- checked input


def checked_batch(call, queries, responses, scores, size, config, expected=None, prompts=None):
    """(queries, responses, scores, prompts) of one `call`, step or inspect: lists of `size` CPU LongTensors, one float tensor (B,), a list of str or
    None. `config`: a text model's. Raises InputError that names the row."""
    all_given = dict(queries=queries, responses=responses, scores=scores)
    if prompts is not None:
        prompts = all_given["prompts"] = checked_list(f"{call}: prompts", prompts)
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise InputError(f"{call}: prompts[{row}] is {shown(prompt)}; expected some text")
    if size == 0:
        raise InputError("no responses; expected at least one")
    for name, given in all_given.items():
        if not is_list(given) or not hasattr(given, "__len__"):
            raise InputError(f"{call}: {name} is {shown(given)}; expected a list, one for each response")
        if len(given) != size:
            raise InputError(f"{call}: {len(given)} {name}; expected {expected or size}")
    scores = checked_scores(call, scores)
    queries, responses = checked_ids("query", queries, config.vocab_size), checked_ids("response", responses, config.vocab_size)
    check_room(config, queries, map(len, responses))
    return queries, responses, scores, prompts


def checked_call(queries, config, text, max_new_tokens, batch_size, temperature, greedy, **options):
    """A call of `generate`, with the PPOConfig and the text model's config: (queries, the same in batches, what `sample` takes beside
    them: length, EOS ids, pad id, temperature; greedy). Raises InputError for what cannot be meant."""
    temperature, greedy, eos, pad_id = checked_options(text.vocab_size, config.temperature, temperature, greedy, **options)
    queries = checked_ids("query", queries, text.vocab_size)
    warn_of_padded(queries, pad_id)
    size = len(queries) if batch_size is None else batch_size
    length = config.max_new_tokens if max_new_tokens is None else max_new_tokens
    check_whole("generate", 1, batch_size=size, max_new_tokens=length)
    check_room(text, queries, [length] * len(queries))
    batches = [queries[start : start + size] for start in range(0, len(queries), size)]
    return queries, batches, (length, eos, pad_id, temperature), greedy


def is_list(given):
    """Whether this has one value after the other: no text, no dict or set, and no tensor or array without dimensions."""
    return hasattr(given, "__iter__") and not isinstance(given, (str, bytes, dict, set)) and getattr(given, "shape", None) != ()


def checked_scores(call, scores):
    """Scores as one float tensor (B,). Raises InputError that names the row."""
    scores = torch.stack([checked_score(f"{call}: scores[{row}]", score) for row, score in enumerate(scores)])
    for row in (~torch.isfinite(scores)).nonzero().flatten().tolist():
        raise InputError(f"{call}: scores[{row}] is {scores[row].item()}; expected a finite number")
    return scores


def checked_score(name, score):
    """One score as a float tensor without dimensions. Raises InputError that names it."""
    try:
        number = torch.as_tensor(score if hasattr(score, "dtype") else np.asarray(score)).detach().cpu()  # floats as they are
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"{name} is {shown(score)}; expected a finite number") from None
    if number.numel() != 1 or number.is_complex():
        what = "a complex number" if number.is_complex() else f"a score with {number.numel()} values"
        raise InputError(f"{name} is {what}; expected one number a response")
    return number.float().reshape(())


def checked_ids(name, sequences, vocabulary):
    """Token ids as 1-D LongTensors on the CPU. Raises InputError that names the row."""
    checked = []
    if not is_list(sequences) or not hasattr(sequences, "__len__"):
        raise InputError(f"{name}: {shown(sequences)}; expected a list of 1-D LongTensors of token ids")
    if (ndim := getattr(sequences, "ndim", 1)) > 1:
        raise InputError(f"{name}: one tensor of {ndim} dimensions; expected a list of 1-D LongTensors, without padding")
    if len(sequences) == 0:
        raise InputError(f"no {name}: expected at least one, a 1-D LongTensor of token ids")
    if all(isinstance(ids, int) or getattr(ids, "ndim", 1) == 0 for ids in sequences):
        raise InputError(f"{name}: one sequence of {len(sequences)} token ids; expected a list of such, [{name}]")
    for row, ids in enumerate(sequences):
        try:
            ids = torch.as_tensor(ids).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"{name} {row} is {shown(ids)}; expected a 1-D LongTensor of token ids") from None
        if ids.dim() != 1 or ids.dtype not in (torch.long, torch.int):
            raise InputError(f"{name} {row} is {tuple(ids.shape)} {ids.dtype}; expected a 1-D LongTensor of token ids")
        if len(ids) == 0:
            raise InputError(f"{name} {row} is empty; expected at least one token")
        if ids.min() < 0 or ids.max() >= vocabulary:
            wrong = ids[(ids < 0) | (ids >= vocabulary)][0].item()
            raise InputError(f"{name} {row} has token id {wrong}; expected 0 to {vocabulary - 1}")
        checked.append(ids.long())
    return checked
