"""What the experiments change of a run that no setting of PPOConfig changes: how rewards become advantages, what the value loss
reaches, a sampler that is merely close to the policy, and reward models from less data or from several members."""

import math

import torch

from rlhf_helpers import advantages, fast, ppo
from rlhf_helpers.config import DATA_FILE, project_root
from rlhf_helpers.course import capstone, gold
from rlhf_helpers.data import load_preferences
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import find_whole, shown
from rlhf_helpers.reward import RewardModel, base_samples, ensure_reward_model, train_reward_model
from rlhf_helpers.rollout import gae_advantages

# ---------------------------------------------------------------- advantages


def unwhitened(rollout, config, total=ppo.alone):
    """GAE as it is: neither centred nor scaled. Returns as in `gae_advantages`."""
    return ppo.gae(rollout.rewards, rollout.values, rollout.mask, config.gamma, config.lam)


def k3_in_the_loss(rollout, config, total=ppo.alone):
    """GAE of the scores alone, whitened; the price of KL stands in the loss, as price x k3 of every token (GRPO, Shao et al. 2024,
    arXiv:2402.03300). k3 = e^d - 1 - d with d = log ref - log pi, whose slope in log pi is 1 - e^d: taken off the advantage,
    it gives the gradient that k3 in the loss would give where the ratio is 1."""
    scores = rollout.rewards - rollout.non_score_rewards
    raw, returns = ppo.gae(scores, rollout.values, rollout.mask, config.gamma, config.lam)
    slope = 1 - torch.exp(rollout.ref_logprobs - rollout.logprobs)
    price = config.init_kl_coef * torch.where(rollout.mask, slope, 0.0)
    return ppo.whiten(raw, rollout.mask, total=total) - price, returns


def truncated(rollout, config, total=ppo.alone, most=2.0):
    """GAE, times the ratio of policy to sampler of each token, at most `most`: truncated importance weights for a sampler that is
    not quite the policy (Yao, Liu et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training")."""
    found, returns = gae_advantages(rollout, config, total)
    if rollout.sampler_logprobs is None:  # responses from elsewhere
        return found, returns
    weights = torch.exp(rollout.logprobs - rollout.sampler_logprobs).clamp(max=most)
    return torch.where(rollout.mask, found * weights, 0.0), returns


def score_on_the_first_token(rollout, config, total=ppo.alone):
    """GAE, whitened, with a bug: the score stands on the first token of a response, where it tells the later ones nothing."""
    misplaced = rollout.non_score_rewards.clone()
    misplaced[:, 0] += (rollout.rewards - rollout.non_score_rewards).sum(1)
    raw, returns = ppo.gae(misplaced, rollout.values, rollout.mask, config.gamma, config.lam)
    return ppo.whiten(raw, rollout.mask, total=total), returns


ADVANTAGES = advantages.ADVANTAGES | dict(
    gae=gae_advantages,
    unwhitened=unwhitened,
    k3_in_the_loss=k3_in_the_loss,
    truncated=truncated,
    score_on_the_first_token=score_on_the_first_token,
)


# ---------------------------------------------------------------- changes to a trainer


def detach_value_loss(trainer):
    """The value head learns from hidden states that its loss cannot change: no gradient of it reaches the adapters."""
    trainer.model.v_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(),))


class Merged(fast.Unpacked):
    """The adapters added to the weights, in bf16, as samplers for serving want them: what is less than half a step of bf16
    vanishes. `renew` after every update."""

    def renew(self):
        for layer, own in zip(self.layers, self.lm.model.layers):
            layer.modules = [[fast.base_of(module) for module in modules] for modules in layer.modules]  # added, not beside
            for place, names in enumerate(fast.STACKS):
                modules = [fast.linear(own, name) for name in names]
                if any(hasattr(module, "lora_A") for module in modules):
                    layer.weights[place] = fast.in_layout(torch.cat([merged(module) for module in modules]))


@torch.no_grad()
def merged(module):
    """The weights of a layer, (out, in) in bf16, with its adapter added."""
    weight = fast.unpacked(fast.base_of(module))
    if hasattr(module, "lora_A"):
        name = module.active_adapters[0]
        weight = (weight.float() + module.get_delta_weight(name).float()).to(torch.bfloat16)
    return weight


def round_to_int8(weight):
    """The weights (out, in) as 8 bits and one scale a row would hold them, back in their dtype."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return ((weight.float() / scale).round() * scale).to(weight.dtype)


def sample_merged(trainer):
    """Sample from a merged copy of the policy, made anew for every batch."""
    trainer.unpacked = Merged(trainer.model.pretrained_model)
    never_trusted(trainer, trainer.unpacked.renew)


def never_trusted(trainer, before=lambda: None):
    """Call `before` before every batch; and let the policy score every sample itself, also after the first step, at which adapters
    that are still 0 make any sampler look exact."""
    generate = trainer.generate

    def renewed(*args, **options):
        trainer.sampler_is_exact = False
        before()
        return generate(*args, **options)

    trainer.generate = renewed


def sample_int8(trainer):
    """Sample with the layers' weights rounded to 8 bits, the adapters beside them; the head stays as it is."""
    never_trusted(trainer)
    trainer.unpacked = fast.Unpacked(trainer.model.pretrained_model)
    for layer in trainer.unpacked.layers:
        for place, modules in enumerate(layer.modules):
            weights = [fast.unpacked(fast.base_of(module)) for module in modules]
            layer.weights[place] = fast.in_layout(torch.cat([round_to_int8(weight) for weight in weights]))


CHANGES = dict(detach_value_loss=detach_value_loss, sample_merged=sample_merged, sample_int8=sample_int8)


# ---------------------------------------------------------------- reward models


def small_reward_model(pairs, seed):
    """A reward model from the first `pairs` pairs of a shuffle by `seed`, and at least as many steps as 600 pairs take in two
    epochs, 74 of 16 pairs (so that a small one has seen its pairs more often, and is not merely unfinished). Kept in output/."""
    every = load_preferences(project_root() / DATA_FILE)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:pairs]
    return kept(f"pairs_{pairs}_seed{seed}", [every[i] for i in order], seed, epochs=math.ceil(74 / (pairs // 16)))


class Ensemble:
    """Several reward models as one: `how`, "mean" or "min", over what each says of a response, standardised like one."""

    def __init__(self, members, how, pairs):
        self.members, self.how, self.mean, self.std = members, how, 0.0, 1.0
        raw = self(*base_samples(pairs))
        self.mean, self.std = raw.mean().item(), raw.std().item()

    def of_each(self, prompts, responses):
        """(members, B)."""
        return torch.stack([member(prompts, responses) for member in self.members])

    def __call__(self, prompts, responses):
        each = self.of_each(prompts, responses)
        raw = each.mean(0) if self.how == "mean" else each.amin(0)
        return (raw - self.mean) / self.std


def resampled(member):
    """A reward model on as many pairs as there are, drawn anew with replacement: members that saw the same pairs would err alike."""
    every = load_preferences(project_root() / DATA_FILE)
    drawn = torch.randint(len(every), (len(every),), generator=torch.Generator().manual_seed(member)).tolist()
    return kept(f"resampled_{member}", [every[i] for i in drawn], member)


def ensemble(how, size=5):
    """Five `resampled` reward models as one."""
    return Ensemble([resampled(member) for member in range(size)], how, load_preferences(project_root() / DATA_FILE))


def kept(name, pairs, seed, **options):
    """The reward model output/reward_models/NAME, trained first if it is not there."""
    folder = project_root() / "output" / "reward_models" / name
    if find_whole(folder).exists():
        return RewardModel.load(folder)
    return train_reward_model(pairs, folder, seed=seed, **options)[0]


class CountsWarmWords:
    """A reward that never reads the prompt: how many different warm words a response has, in deviations of what the responses in
    `pairs` have, so that a nat of KL costs as much as with the reward model."""

    def __init__(self, pairs):
        self.mean, self.std = 0.0, 1.0
        counts = self(*base_samples(pairs))
        self.mean, self.std = counts.mean(), counts.std()

    def __call__(self, prompts, responses):
        counts = torch.tensor([gold.warm_words(response) for response in responses], dtype=torch.float32)
        return (counts - self.mean) / self.std


def reward_named(name, seed):
    """The reward function of a run: "model" (the course's), "random", "warm_words", "labelled" (the capstone's, from 50 pairs),
    "pairs_N", "resampled", "ensemble_mean", "ensemble_min"."""
    if name == "warm_words":
        return CountsWarmWords(load_preferences(project_root() / DATA_FILE))
    if name == "random":  # placebo: as spread as the reward model's scores are, and about nothing
        generator = torch.Generator().manual_seed(seed)
        return lambda prompts, responses: torch.randn(len(prompts), generator=generator)
    if name == "labelled":
        pairs = capstone.pairs_to_label()
        return kept("labelled", capstone.stand_in(pairs).preferences(pairs), 0, **capstone.TRAINING)
    if name.startswith("pairs_"):
        return small_reward_model(int(name.removeprefix("pairs_")), seed)
    if name == "resampled":
        return resampled(seed)
    if name.startswith("ensemble_"):
        return ensemble(name.removeprefix("ensemble_"))
    if name == "model":
        return ensure_reward_model()
    raise InputError(f"no reward is called {shown(name)}; expected one of those that `reward_named` lists")
