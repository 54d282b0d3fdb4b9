"""`Rollout`: every tensor of one PPO step, named and shaped once, and how it is made."""

from dataclasses import dataclass

import torch

from rlhf_helpers import ppo
from rlhf_helpers.sampling import pad_left


@dataclass
class Rollout:
    """One batch of B responses of at most T tokens. Per-token tensors are (B, T) over response tokens and 0 outside `mask`."""

    queries: list  # B LongTensors: token ids of the rendered prompts
    responses: list  # B LongTensors: token ids that the policy wrote, EOS included
    scores: torch.Tensor  # (B,) what the reward model gave, after clipping and the penalty for a missing EOS
    input_ids: torch.Tensor  # (B, P + T) prompt padded on the left, response on the right
    attention_mask: torch.Tensor  # (B, P + T) 1 on real tokens
    response_ids: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, T) bool, from lengths
    logprobs: torch.Tensor = None  # log pi of each token before the update, nats
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


def fill_rewards(rollout, kl_coef):
    """Rewards per token from the scores and the KL penalty."""
    rollout.rewards, rollout.non_score_rewards = ppo.token_rewards(rollout.scores, rollout.kl, rollout.mask, kl_coef)


def fill_advantages(rollout, gamma, lam, whiten_rewards=False, total=ppo.alone):
    """Advantages and returns from rewards and values. `total` sums a number over processes, for the whitening."""
    mask, rewards = rollout.mask, rollout.rewards
    if whiten_rewards:
        rewards = ppo.whiten(rewards, mask, shift_mean=False, total=total)
    raw, rollout.returns = ppo.gae(rewards, rollout.values, mask, gamma, lam)
    rollout.advantages = ppo.whiten(raw, mask, total=total)
