"""What the experiments change of a run: each does what its name says, and nothing else."""

import pytest
import torch

from rlhf_helpers.config import PPOConfig
from rlhf_helpers.course import variants
from rlhf_helpers.reward import RewardModel
from rlhf_helpers.rollout import gae_advantages
from tests import tiny
from tests.test_advantages import rollout_of
from tests.test_fast import bf16_trainer, prompts, stepped

CONFIG = PPOConfig(batch_size=4, mini_batch_size=4, init_kl_coef=0.5)


def rollout_with_logprobs():
    rollout = rollout_of([1.0, 3.0, 2.0, -1.0], kl=0.2)
    shape = rollout.mask.shape
    draw = lambda seed: torch.where(rollout.mask, -torch.rand(shape, generator=torch.Generator().manual_seed(seed)), 0.0)
    rollout.logprobs, rollout.ref_logprobs, rollout.sampler_logprobs = draw(1), draw(2), draw(3)
    return rollout


def test_a_reward_of_no_known_name_is_refused():
    with pytest.raises(ValueError, match="no reward is called 'warm-words'"):
        variants.reward_named("warm-words", 0)


def test_unwhitened_is_gae_before_it_is_whitened():
    rollout = rollout_with_logprobs()
    raw, returns = variants.unwhitened(rollout, CONFIG)
    white, same = gae_advantages(rollout, CONFIG)
    assert torch.equal(returns, same) and torch.equal((raw + rollout.values)[rollout.mask], returns[rollout.mask])
    kept = raw[rollout.mask], white[rollout.mask]
    assert torch.corrcoef(torch.stack(kept))[0, 1] == pytest.approx(1, abs=1e-6) and kept[0].std() != pytest.approx(1, abs=0.1)


def test_the_slope_of_k3_is_what_autograd_says():
    """The policy's loss, -A x ratio, has at a ratio of 1 the slope -A in log pi: so what is taken off A is k3's slope, priced."""
    rollout = rollout_with_logprobs()
    found, _ = variants.k3_in_the_loss(rollout, CONFIG)
    free = rollout_with_logprobs()
    free.rewards, free.non_score_rewards = free.rewards - free.non_score_rewards, torch.zeros_like(free.rewards)
    scores, _ = gae_advantages(free, CONFIG)
    logprobs = rollout.logprobs.clone().requires_grad_(True)
    d = rollout.ref_logprobs - logprobs
    (torch.exp(d) - 1 - d).sum().backward()
    torch.testing.assert_close(scores - found, torch.where(rollout.mask, 0.5 * logprobs.grad, 0.0), rtol=0, atol=1e-6)


def test_truncated_weights_are_the_ratio_of_policy_to_sampler_and_at_most_two():
    rollout = rollout_with_logprobs()
    rollout.sampler_logprobs[0, 0] = rollout.logprobs[0, 0] - 5
    plain, found = gae_advantages(rollout, CONFIG)[0], variants.truncated(rollout, CONFIG)[0]
    weights = (found / plain)[rollout.mask]
    assert weights[0] == pytest.approx(2.0)
    ratio = torch.exp(rollout.logprobs - rollout.sampler_logprobs)[rollout.mask]
    torch.testing.assert_close(weights[1:], ratio[1:].clamp(max=2), rtol=1e-5, atol=0)


def test_a_detached_value_loss_moves_the_head_and_no_adapter():
    moved = {}
    for detached in (False, True):
        trainer = tiny.trainer(vf_coef=1.0)
        if detached:
            variants.detach_value_loss(trainer)
        trainer.advantages = lambda rollout, config, total: (torch.zeros_like(rollout.values), rollout.mask.float())
        torch.nn.init.ones_(trainer.model.v_head.summary.weight)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.model.require_gradients = lambda: None  # the policy's loss is flat here
        queries, responses, scores = tiny.batch()
        trainer.step(queries, responses, scores)
        moved[detached] = {
            name for name, p in trainer.model.named_parameters() if name in before and not torch.equal(p, before[name])
        }
    assert any("v_head" in name for name in moved[True]) and not any("lora_" in name for name in moved[True])
    assert any("lora_" in name for name in moved[False])


@pytest.mark.parametrize("change", ["sample_merged", "sample_int8"])
def test_a_sampler_that_is_not_quite_the_policy_shows_in_the_stats(change, nf4):
    trainer = bf16_trainer(nf4(b_scale=0.1), 8)
    variants.CHANGES[change](trainer)
    for _ in range(2):
        _, stats = stepped(trainer, prompts(8))
        assert 0 < stats["objective/sampler_max_diff"] < 1 and stats["ppo/policy/first_ratio_error"] == 0


@pytest.mark.parametrize("change", ["sample_merged", "sample_int8"])
def test_adapters_that_are_still_0_do_not_make_it_trusted(change, nf4):
    """A merged copy of them is exact; the step after is scored by the policy all the same."""
    trainer = bf16_trainer(nf4(b_scale=0.0), 8, learning_rate=1e-2)
    variants.CHANGES[change](trainer)
    for _ in range(3):
        _, stats = stepped(trainer, prompts(8))
        assert stats["ppo/policy/first_ratio_error"] == 0


def test_a_merged_sampler_has_the_adapters_of_the_latest_update(nf4):
    """Adapters that are far from zero, then others: what is sampled follows them, up to rounding."""
    trainer = bf16_trainer(nf4(b_scale=0.5), 8)
    variants.sample_merged(trainer)
    for scale in (1.0, -1.0):
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data *= scale
        responses = trainer.generate(prompts(8))
        rollout = trainer.inspect(prompts(8), responses)
        near = (rollout.sampler_logprobs - rollout.logprobs)[rollout.mask].abs().mean()
        far = (rollout.sampler_logprobs - rollout.ref_logprobs)[rollout.mask].abs().mean()
        assert near < 0.2 * far


def test_an_int8_weight_is_off_by_half_a_step_at_most():
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    rounded = variants.round_to_int8(weight)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded - weight).abs() <= step / 2 + 1e-6).all() and len(torch.unique((rounded / step).round())) <= 255


def test_an_ensemble_is_the_mean_or_the_least_of_its_members_standardised_on_the_pairs(reward_folders):
    member = RewardModel.load(reward_folders[1])
    other = lambda prompts, responses: -member(prompts, responses)
    pairs = [
        dict(prompt="a cat", chosen="is lovely", rejected="bad"),
        dict(prompt="the sun", chosen="is warm", rejected="good"),
    ]
    prompts_, responses = variants.base_samples(pairs)
    for how, expected in (("min", -member(prompts_, responses).abs()), ("mean", member(prompts_, responses) / 3)):
        found = variants.Ensemble([member, member if how == "mean" else other, other], how, pairs)
        scores = found(prompts_, responses)
        assert scores.mean().item() == pytest.approx(0, abs=1e-5) and scores.std().item() == pytest.approx(1, abs=1e-5)
        assert torch.corrcoef(torch.stack([scores, expected]))[0, 1] == pytest.approx(1, abs=1e-5)


def test_counting_warm_words_never_reads_the_prompt_and_costs_what_the_reward_model_does():
    score = variants.reward_named("warm_words", 0)
    texts = ["love joy peace happy calm", "love love", "The bee makes honey."]
    scores = score(["a bee"] * 3, texts)
    assert torch.equal(scores, score(["tell me of trains"] * 3, texts))
    assert (scores[0] - scores[1]) / (scores[1] - scores[2]) == pytest.approx(4.0)  # a fourth and fifth pay as the second does
    prompts_, responses = variants.base_samples(variants.load_preferences(variants.project_root() / variants.DATA_FILE))
    every = score(prompts_, responses)
    assert every.mean().item() == pytest.approx(0, abs=1e-5) and every.std().item() == pytest.approx(1, abs=1e-5)


def test_small_reward_models_get_as_many_steps_as_600_pairs_take(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        variants, "kept", lambda name, pairs, seed, **options: asked.update({name: (len(pairs), options["epochs"])})
    )
    for pairs in (75, 150, 300, 600):
        variants.reward_named(f"pairs_{pairs}", 1)
    assert asked == {
        "pairs_75_seed1": (75, 19),
        "pairs_150_seed1": (150, 9),
        "pairs_300_seed1": (300, 5),
        "pairs_600_seed1": (600, 2),
    }


def test_a_score_on_the_first_token_tells_the_later_ones_nothing():
    config = PPOConfig(batch_size=4, mini_batch_size=4, init_kl_coef=0.5, lam=1.0)
    rollout = rollout_with_logprobs()
    _, right = gae_advantages(rollout, config)
    _, misplaced = variants.score_on_the_first_token(rollout, config)
    scores = (rollout.rewards - rollout.non_score_rewards).sum(1)
    first, later = rollout.mask.clone(), rollout.mask.clone()
    first[:, 1:], later[:, 0] = False, False
    torch.testing.assert_close(misplaced[first], right[first])  # what is earned in all is the same
    expected = torch.where(later, right - scores[:, None], 0.0)
    torch.testing.assert_close(torch.where(later, misplaced, 0.0), expected)
    found, _ = variants.score_on_the_first_token(rollout, config)
    assert found[rollout.mask].mean().item() == pytest.approx(0, abs=1e-6)  # whitened as always


def test_the_capstone_s_reward_model_learns_from_the_annotator_s_labels_of_its_50_pairs(monkeypatch):
    monkeypatch.setattr(variants, "kept", lambda name, pairs, seed, **options: (name, pairs, seed, options))
    pairs = variants.capstone.pairs_to_label()
    assert variants.reward_named("labelled", 7) == (
        "labelled", variants.capstone.stand_in(pairs).preferences(pairs), 0, variants.capstone.TRAINING,
    )  # fmt: skip
