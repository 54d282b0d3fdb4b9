"""Advantages without a critic: by hand, and in the trainer."""

import pytest
import torch

from rlhf_helpers import advantages
from rlhf_helpers.config import PPOConfig
from rlhf_helpers.rollout import collate, fill_rewards
from rlhf_helpers.trainer import PPOTrainer
from tests import tiny

CONFIG = PPOConfig(batch_size=4, mini_batch_size=4, num_generations=2)


def rollout_of(scores, lengths=(2, 3, 1, 3), kl=0.0, kl_coef=0.5):
    """Responses of these lengths; a KL of `kl` on every token."""
    ids = [torch.arange(4, 4 + n) for n in lengths]
    rollout = collate([torch.tensor([4])] * len(ids), ids, torch.tensor(scores), 0, "cpu")
    rollout.kl = torch.where(rollout.mask, kl, 0.0)
    rollout.values = torch.where(rollout.mask, 0.7, 0.0)
    fill_rewards(rollout, kl_coef)
    return rollout


def first_token(found):
    return found[0][:, 0]


def mean_square(x, mask):
    return (x[mask] ** 2).mean().item()


@pytest.mark.parametrize("name", advantages.ADVANTAGES)
def test_all_tokens_of_a_response_have_its_advantage_and_the_value_head_is_taught_nothing(name):
    rollout = rollout_of([1.0, 3.0, 2.0, -1.0])
    found, returns = advantages.ADVANTAGES[name](rollout, CONFIG)
    assert (found[~rollout.mask] == 0).all() and torch.equal(returns, rollout.values)
    for row, n in enumerate((2, 3, 1, 3)):
        assert (found[row, :n] == found[row, 0]).all()


def test_leave_one_out_compares_a_response_with_the_others_to_its_prompt():
    rollout = rollout_of([1.0, 3.0, 2.0, -1.0])
    found = first_token(advantages.leave_one_out(rollout, CONFIG))
    assert (found / found[1]).tolist() == pytest.approx([-1, 1, 1.5, -1.5])  # -2, 2, 3, -3, less the batch's mean square


def test_the_group_s_mean_is_leave_one_out_but_for_a_factor_that_scaling_takes_out():
    rollout = rollout_of([1.0, 3.0, 2.0, -1.0])
    one, other = (first_token(how(rollout, CONFIG)) for how in (advantages.leave_one_out, advantages.group_mean))
    assert torch.allclose(one, other, atol=1e-6)


def test_over_the_group_s_deviation_every_pair_counts_alike():
    found = first_token(advantages.group_normalised(rollout_of([1.0, 3.0, 2.0, -1.0]), CONFIG))
    assert found.tolist() == pytest.approx([-1, 1, 1, -1], abs=1e-3)


def test_the_price_of_a_response_s_kl_is_part_of_its_return():
    rollout = rollout_of([1.0, 1.0, 1.0, 1.0], lengths=(1, 3, 2, 2), kl=0.2)  # 0.1 a token: returns 0.9, 0.7, 0.8, 0.8
    found = first_token(advantages.group_mean(rollout, CONFIG))
    assert found[0].item() == pytest.approx(-found[1].item()) and found[0] > 0 and found[2:].abs().max() < 1e-3


def test_without_a_baseline_the_mean_stays_and_with_the_batch_s_it_goes():
    rollout = rollout_of([11.0, 13.0, 12.0, 9.0], lengths=(2, 2, 2, 2))
    plain, centred = (how(rollout, CONFIG)[0] for how in (advantages.no_baseline, advantages.batch_mean))
    assert (plain[rollout.mask] > 0.7).all() and centred[rollout.mask].mean() == pytest.approx(0, abs=1e-6)
    assert mean_square(plain, rollout.mask) == pytest.approx(1) == mean_square(centred, rollout.mask)


def test_groups_of_one_cannot_be_compared():
    with pytest.raises(ValueError, match="PPOConfig.num_generations is 1; expected at least 2"):
        advantages.leave_one_out(rollout_of([1.0] * 4), PPOConfig(batch_size=4, mini_batch_size=4))


def test_the_trainer_learns_without_a_critic_and_leaves_the_value_head_alone():
    plain = tiny.trainer(num_generations=2)
    trainer = PPOTrainer(config=plain.config, model=plain.model, tokenizer=plain.tokenizer, advantages=advantages.leave_one_out)
    head = trainer.model.v_head.summary.weight.clone()
    before = [p.clone() for p in trainer.parameters]
    queries, responses, scores = tiny.batch()
    stats = trainer.step([queries[i] for i in (0, 0, 1, 1)], responses, scores)
    assert stats["ppo/loss/value"] == 0 and torch.equal(trainer.model.v_head.summary.weight, head)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters))


def test_in_later_passes_the_value_loss_holds_the_head_unless_it_counts_nothing():
    queries, responses, scores = tiny.batch()
    for vf_coef, still in ((0.1, False), (0.0, True)):
        trainer = tiny.trainer(num_generations=2, ppo_epochs=2, vf_coef=vf_coef)
        trainer.advantages = advantages.leave_one_out
        head = trainer.model.v_head.summary.weight.clone()
        trainer.step([queries[i] for i in (0, 0, 1, 1)], responses, scores)
        assert torch.equal(trainer.model.v_head.summary.weight, head) == still


def test_the_responses_to_a_prompt_stand_together_and_prompts_are_met_as_often_as_each_other():
    trainer, rows = tiny.trainer(num_generations=2), []
    for trainer.steps_done in range(5):
        rows += trainer.next_rows(5)
    assert rows[::2] == rows[1::2] and sorted(rows) == sorted(list(range(5)) * 4)


def test_a_batch_is_made_of_whole_groups():
    with pytest.raises(ValueError, match="PPOConfig.batch_size is 4; expected a multiple of num_generations = 3"):
        PPOConfig(batch_size=4, mini_batch_size=4, num_generations=3)
