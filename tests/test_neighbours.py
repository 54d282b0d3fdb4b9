"""What else lives in the process, on the model or in a caller's hands must not reach a trainer, nor it them."""

import contextlib

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from transformers import OPTConfig, OPTForCausalLM

from rlhf_helpers import trainer
from rlhf_helpers.advantages import leave_one_out
from rlhf_helpers.config import PPOConfig
from rlhf_helpers.errors import InputError
from rlhf_helpers.evaluation import evaluate
from rlhf_helpers.models import PolicyWithValueHead
from rlhf_helpers.trainer import PPOTrainer
from tests import tiny
from tests.tiny import batch, same, state

PROMPTS = [f"t{i} t{i + 1} t{i + 2}" for i in range(10, 18)]


@pytest.fixture
def foreign():
    """Accelerate's state as another trainer leaves it that was stopped between two of four passes."""
    accelerator = Accelerator(cpu=True)
    state, before = accelerator.gradient_state, accelerator.gradient_accumulation_steps

    def stopped(ours):
        ours.accelerator.gradient_accumulation_steps = 4
        ours.accelerator.gradient_state._set_sync_gradients(False)

    yield stopped
    accelerator.gradient_accumulation_steps = before
    state._set_sync_gradients(True)


def test_another_trainer_s_accumulation_does_not_reach_ours(foreign):
    alone, beside = tiny.trainer(), tiny.trainer()
    expected = alone.step(*batch())
    foreign(beside)
    found = beside.step(*batch())
    assert found["ppo/grad_norm"] == expected["ppo/grad_norm"] and same(state(beside), state(alone))
    assert beside.accelerator.gradient_accumulation_steps == 4  # and the other goes on as it was
    assert not beside.accelerator.gradient_state.sync_gradients


def test_another_trainer_s_accumulation_reaches_ours_without_protection(foreign, monkeypatch):
    """Can fail with a newer Accelerate: then `quirks.accumulating_alone` can go."""
    monkeypatch.setattr(trainer, "accumulating_alone", lambda accelerator: contextlib.nullcontext())
    alone, beside = tiny.trainer(), tiny.trainer()
    before, expected = state(beside), alone.step(*batch())
    foreign(beside)
    found = beside.step(*batch())
    assert found["ppo/grad_norm"] == pytest.approx(expected["ppo/grad_norm"] / 4)
    moved = [name for name, value in state(beside).items() if name in before and not torch.equal(value, before[name])]
    assert moved == ["kl_coef", "steps"]  # no weight at all


def test_a_query_that_is_changed_after_the_drawing_is_no_longer_the_one_that_was_answered():
    ours = tiny.trainer(tiny.with_lora(tiny.llama(), b_scale=0.2))
    queries = [torch.tensor([10 + row, 20, 30]) for row in range(4)]
    responses = ours.generate(queries)
    assert ours.inspect(queries, responses).sampler_logprobs is not None
    for query in queries:
        query[0] += 1  # a buffer that is filled anew for every batch
    assert ours.inspect(queries, responses).sampler_logprobs is None


def test_a_reference_that_another_trainer_trains_goes_on_learning():
    first = tiny.trainer(tiny.llama())
    PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=4), PolicyWithValueHead(tiny.llama(1)), first.model, tiny.tokenizer())
    before = state(first)
    first.step(*batch())
    moved = [name for name, value in state(first).items() if name in before and not torch.equal(value, before[name])]
    assert any(name.startswith("pretrained_model") for name in moved)


def test_what_is_frozen_of_the_adapters_stays_so_after_a_pass_of_the_reference():
    lm = tiny.with_lora(tiny.llama())
    for name, parameter in lm.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    learns = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    ours = tiny.trainer(lm)
    ours.inspect(*batch()[:2])
    with contextlib.suppress(KeyboardInterrupt), ours.model.adapters_off():
        raise KeyboardInterrupt
    assert {name for name, parameter in lm.named_parameters() if parameter.requires_grad} == learns


@pytest.fixture(params=["fp32", "nf4"])
def two(request, nf4):
    """A trainer of the adapter "default" of a model that has another, "b", on other layers."""
    lm = nf4() if request.param == "nf4" else tiny.with_lora(tiny.llama())
    lm.add_adapter("b", LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in lm.named_parameters():
        if "lora_B.b" in name:
            parameter.data.normal_(0, 0.5)
    return tiny.trainer(lm)


def test_what_one_adapter_drew_is_no_sample_of_another(two):
    queries = batch()[0]
    responses = two.generate(queries)
    assert two.inspect(queries, responses).sampler_logprobs is not None
    two.model.pretrained_model.set_adapter("b")
    seen = two.inspect(queries, responses)
    assert seen.sampler_logprobs is None
    drawn = two.generate(queries)  # and what "b" draws is "b"'s, also by the fast way
    with torch.no_grad():
        rollout = two.inspect(queries, drawn)
    logprobs = [response.drawn.logprobs for response in drawn]
    apart = max((rollout.logprobs[row, : len(one)] - one).abs().max() for row, one in enumerate(logprobs))
    assert apart < 1e-4


def test_a_step_with_another_adapter_in_use_is_refused_and_nothing_changes(two):
    before, (queries, responses, scores) = state(two), batch()
    two.model.pretrained_model.set_adapter("b")
    with pytest.raises(InputError, match="step: the adapters that this trainer trains are off, merged, or not the active ones"):
        two.step(queries, responses, scores)
    two.model.pretrained_model.set_adapter("default")
    with two.model.adapters_off(), pytest.raises(InputError, match="off, merged, or not the active ones"):
        two.step(queries, responses, scores)
    assert same(state(two), before) and two.rollout is None
    two.step(queries, responses, scores)


def test_two_adapters_at_once_are_both_read_by_the_sampler(nf4):
    lm = nf4()
    lm.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    ours = tiny.trainer(lm)
    queries = batch()[0]
    ours.generate(queries)  # the fast way is made for one
    lm.base_model.set_adapter(["default", "b"])
    drawn = ours.generate(queries)
    rollout = ours.inspect(queries, drawn)
    apart = [(rollout.logprobs[row, : len(one)] - one.drawn.logprobs).abs().max() for row, one in enumerate(drawn)]
    assert max(apart) < 1e-4


def test_adapters_of_another_name_can_be_resumed(tmp_path):
    from peft import get_peft_model

    made = lambda: tiny.trainer(
        get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), adapter_name="policy")
    )
    first, second = made(), made()
    first.step(*batch())
    first.save(tmp_path / "run")
    second.resume(tmp_path / "run")
    assert same(state(first), state(second))


def note(ours):
    ours.history[-1]["note"] = "first try"


def field(ours):
    ours.config.note = "mine"


def length(ours):
    ours.config.max_new_tokens = 0


def numpy_number(ours):
    ours.history[-1]["mine"] = np.float32(1.0)


def no_row(ours):
    ours.history.append("a step")


def price(ours):
    ours.kl_coef = float("nan")


def moment(ours):
    next(iter(ours.optimizer.state.values()))["exp_avg"].fill_(float("inf"))


@pytest.mark.parametrize(
    "change, why",
    [(note, "history row 1: field 'note' is a str"), (field, "config has 'note'"), (length, "PPOConfig.max_new_tokens is 0"),
     (numpy_number, "history row 1: field 'mine' is a float32"), (no_row, "history row 2: a str"), (price, "kl_coef is nan"),
     (moment, "Adam's exp_avg of .* has numbers that are not finite")],
)  # fmt: skip
def test_what_resume_would_refuse_is_not_saved_and_the_last_checkpoint_stays(change, why, tmp_path):
    ours = tiny.trainer()
    ours.step(*batch())
    ours.save(tmp_path / "run")
    files = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    change(ours)
    with pytest.raises(InputError, match=f"not saved: {why}"):
        ours.save(tmp_path / "run")
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()} == files


def test_evaluation_takes_any_number_of_answers_whatever_the_trainer_compares():
    lm = tiny.with_lora(tiny.llama(), b_scale=0.2)
    ours = PPOTrainer(
        PPOConfig(batch_size=4, mini_batch_size=4, num_generations=4, max_new_tokens=8), PolicyWithValueHead(lm),
        tokenizer=tiny.tokenizer(), advantages=leave_one_out,
    )  # fmt: skip
    score = lambda prompts, texts: [float(len(text)) for text in texts]
    for samples, size in ((1, 40), (2, 40), (4, 10)):
        found = evaluate(ours, PROMPTS, score, samples=samples, batch_size=size)
        assert len(found.responses) == 8 * samples and np.abs(found.kl).max() > 0


def test_a_head_that_is_narrower_than_the_body_gives_its_values_too():
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=tiny.V, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4
    )
    lm = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, pad_token_id=tiny.PAD, eos_token_id=tiny.EOS)).float()
    ours = tiny.trainer(lm)
    assert ours.model.v_head.summary.in_features == 16  # OPT-350m is made so: 512 of 1,024
    assert ours.step(*batch())["ppo/policy/first_ratio_error"] == 0


@pytest.mark.parametrize(
    "given", [{row: float(row) for row in range(4)}, {1.0, 2.0, 3.0, 4.0}, torch.tensor(1.0), np.array(1.0)]
)
def test_scores_that_are_no_list_are_refused_by_every_call(given):
    ours, (queries, responses, _) = tiny.trainer(), batch()
    reward = lambda prompts, texts: given
    calls = (
        lambda: ours.step(queries, responses, given),
        lambda: ours.inspect(queries, responses, given),
        lambda: ours.train(PROMPTS, reward, steps=1),
        lambda: evaluate(ours, PROMPTS[:2], reward, samples=2),
    )
    for call in calls:
        with pytest.raises(InputError, match="expected a (list|number)"):
            call()
    assert ours.steps_done == 0


def test_scores_of_one_column_are_taken_by_evaluation_as_by_a_step():
    ours, (queries, responses, scores) = tiny.trainer(), batch()
    ours.step(queries, responses, np.array(scores)[:, None])
    columns = (lambda n: np.arange(n)[:, None] / 3, lambda n: torch.arange(n)[:, None].double() / 3, lambda n: [[row / 3] for row in range(n)])  # fmt: skip
    for column in columns:
        found = evaluate(ours, PROMPTS[:2], lambda prompts, texts: column(len(texts)), samples=2)
        assert found.rewards.tolist() == [0, 1 / 3, 2 / 3, 1]


def test_a_reward_function_that_changes_its_lists_changes_nothing_else():
    def reward(prompts, texts):
        scores = [float(len(text)) for text in texts]
        prompts.sort(), texts.clear()
        return scores

    ours = tiny.trainer()
    ours.train(PROMPTS, reward, steps=1)
    rollout = ours.rollout
    assert [ours.tokenizer.decode(query) for query in rollout.queries] == rollout.prompts and all(rollout.texts)
    assert evaluate(ours, PROMPTS, reward, samples=1).prompts == PROMPTS


def test_a_tracker_that_fails_after_a_step_does_not_take_its_random_numbers_back(monkeypatch):
    ours, score = tiny.trainer(), lambda prompts, texts: [float(len(text)) for text in texts]
    ours.config.log_with = "all"
    monkeypatch.setattr(ours.accelerator, "log", lambda *args, **options: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError):
        ours.train(PROMPTS[:4], score, steps=1)
    assert ours.steps_done == 1
    first, ours.config.log_with = ours.generator.get_state(), None
    untroubled = tiny.trainer()
    untroubled.train(PROMPTS[:4], score, steps=1)
    assert torch.equal(first, untroubled.generator.get_state())


def test_the_learning_rate_in_the_stats_is_adam_s():
    ours = tiny.trainer()
    ours.optimizer.param_groups[0]["lr"] = 0.5
    assert ours.step(*batch())["ppo/learning_rate"] == 0.5


def test_a_horizon_that_is_too_short_for_all_processes_is_refused(monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(InputError, match="horizon is 1; expected above 0.2 x batch_size x 2 processes = 1.6"):
        tiny.trainer(adap_kl_ctrl=True, horizon=1.0)


def test_no_prompts_and_no_room_are_told_apart():
    with pytest.raises(InputError, match="prompts: none; expected at least one"):
        tiny.trainer().train([], lambda prompts, texts: [0.0] * len(texts))
    with pytest.raises(InputError, match="max_new_tokens leaves -72 places for a prompt"):
        tiny.trainer(tiny.gpt2(), max_new_tokens=200).encode(PROMPTS)
