"""Facts about which nothing else complains: each fails under a fault that slipped through all other fast tests when it was
tried, as `tools/mutations.py` tries its own."""

import bitsandbytes as bnb
import pytest
import torch
from tokenizers import processors
from torch.distributions import Categorical, kl_divergence

from rlhf_helpers.config import Profile
from rlhf_helpers.models import PolicyWithValueHead, encode_prompt, load_causal_lm, load_policy, response_logits
from rlhf_helpers.sampling import draw, sample
from tests import tiny
from tests.tiny import BOS, EOS, PAD, batch, with_lora

# ---------------------------------------------------------------- the policy


@pytest.fixture
def packing_cpu(monkeypatch):
    """Lets bitsandbytes believe that this CPU has AVX512-BF16, where it packs 4-bit layers. See models.keep_gradients."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


def packs(lm):
    return {layer.support_avx512bf16_for_cpu for layer in lm.modules() if isinstance(layer, bnb.nn.Linear4bit)}


def test_a_wrapped_model_is_kept_from_packing_on_any_cpu(packing_cpu, nf4):
    lm = nf4()
    assert packs(lm) == {True}
    PolicyWithValueHead(lm)
    assert packs(lm) == {False}


def test_a_loaded_base_is_kept_from_packing_before_it_is_wrapped(packing_cpu, llama_folder):
    assert packs(load_causal_lm(llama_folder)) == {False}


def test_the_chat_template_s_bos_is_the_only_one_though_the_tokenizer_adds_one_by_itself():
    tokenizer = tiny.tokenizer()
    bos_first = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.backend_tokenizer.post_processor = bos_first
    assert encode_prompt(tokenizer, "t10").tolist() == [BOS, 10]
    tokenizer.chat_template = "{{ bos_token }} {{ messages[0]['content'] }}"
    assert encode_prompt(tokenizer, "t10").tolist() == [BOS, 10]


def test_adapters_and_checkpointing_are_as_the_profile_says(llama_folder):
    for checkpointing in (False, True):
        profile = Profile("tiny", str(llama_folder), lora_r=4, lora_alpha=24, gradient_checkpointing=checkpointing)
        policy, _ = load_policy(profile)
        lora = policy.pretrained_model.peft_config["default"]
        assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (4, 24, 0.0, {"q_proj", "v_proj"})
        assert any(getattr(module, "gradient_checkpointing", False) for module in policy.modules()) == checkpointing


# ---------------------------------------------------------------- generate


def test_the_policy_is_sampled_and_another_reference_only_where_it_is_asked_for():
    policy, reference, queries = tiny.llama(), tiny.llama(seed=1), batch()[0]
    trainer = tiny.trainer(policy, ref_model=reference)
    for lm, asked in ((policy, False), (reference, True)):
        expected = sample(lm, queries, 8, EOS, PAD, greedy=True).responses
        assert all(torch.equal(*pair) for pair in zip(trainer.generate(queries, greedy=True, reference=asked), expected))


def test_generate_heeds_the_length_and_the_eos_that_it_is_given():
    trainer, queries = tiny.trainer(), batch()[0]
    first = trainer.generate(queries, greedy=True)[0].tolist()
    shorter = trainer.generate(queries, greedy=True, max_new_tokens=3)[0].tolist()
    assert len(first) > 3 and shorter == first[:3]
    ended = trainer.generate(queries, greedy=True, eos_token_id=first[2])[0].tolist()
    assert ended == first[: first.index(first[2]) + 1]


def test_the_seed_decides_on_both_the_samples_and_the_prompts():
    trainers = [tiny.trainer(seed=seed, batch_size=16, mini_batch_size=16) for seed in (3, 3, 4)]
    samples = [torch.cat(trainer.generate(batch()[0])).tolist() for trainer in trainers]
    rows = [trainer.next_rows(20) for trainer in trainers]
    for first, again, other in (samples, rows):
        assert first == again != other


def test_a_prompt_that_just_leaves_room_for_a_response_is_kept():
    prompts = [" ".join(["t5"] * 120)]  # 128 positions, 8 of them for the response
    assert tiny.trainer().encode(prompts)[0] == prompts


# ---------------------------------------------------------------- the rollout


@pytest.mark.parametrize("kind", ["kl", "full"])
def test_policy_reference_and_entropy_are_all_taken_at_the_temperature(kind):
    trainer = tiny.trainer(with_lora(tiny.llama(), b_scale=0.3), temperature=0.7, kl_penalty=kind)
    rollout, lm = trainer.inspect(*batch()), trainer.model.pretrained_model
    with torch.no_grad():
        policy = Categorical(logits=response_logits(lm, *rollout.inputs(slice(None))) / 0.7)
        with trainer.model.adapters_off():
            reference = Categorical(logits=response_logits(lm, *rollout.inputs(slice(None))) / 0.7)
    k1 = policy.log_prob(rollout.response_ids) - reference.log_prob(rollout.response_ids)
    expected = kl_divergence(policy, reference) if kind == "full" else k1
    torch.testing.assert_close(rollout.kl[rollout.mask], expected[rollout.mask], atol=1e-5, rtol=1e-5)
    entropy = policy.entropy()[rollout.mask].mean().item()
    assert trainer.step(*batch())["ppo/policy/entropy"] == pytest.approx(entropy, rel=1e-5)


def test_a_reference_that_comes_in_train_mode_has_no_dropout():
    reference = tiny.llama(attention_dropout=0.5).train()
    assert tiny.trainer(with_lora(tiny.llama()), ref_model=reference).step(*batch())["objective/kl"] == 0


def test_a_random_number_of_exactly_0_draws_no_token_without_probability(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.zeros(*shape, dtype=torch.float64))
    assert draw(torch.tensor([[float("-inf"), 0.0, 0.0]]), None).tolist() == [[1]]


# ---------------------------------------------------------------- the update


def test_every_epoch_meets_each_response_once_in_a_new_order():
    trainer, orders = tiny.trainer(batch_size=8, mini_batch_size=2, ppo_epochs=4), []
    minibatch = trainer._minibatch
    trainer._minibatch = lambda rollout, rows: orders.extend(rows.tolist()) or minibatch(rollout, rows)
    trainer.step(*batch(8))
    epochs = [orders[i : i + 8] for i in range(0, 32, 8)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_early_stopping_waits_for_one_and_a_half_times_the_target():
    def policykl(**stopping):
        """policykl after each pass; the first is 0."""
        trainer, passes = tiny.trainer(ppo_epochs=3, learning_rate=0.1, **stopping), []
        update = trainer._update
        trainer._update = lambda *args: passes.extend(update(*args)) or passes[-1:]
        trainer.step(*batch())
        return [stats["policy/policykl"] for stats in passes]

    first, second, third = policykl()
    assert first == 0 < second < third
    assert policykl(early_stopping=True, target_kl=second / 1.49) == [first, second, third]
    assert policykl(early_stopping=True, target_kl=second / 1.51) == [first, second]


def test_an_adapter_without_gradient_leaves_no_gradient_behind():
    trainer = tiny.trainer()
    layer = trainer.model.pretrained_model.get_base_model().model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(RuntimeError, match="got no gradient"):
        trainer.step(*batch())
    assert all(parameter.grad is None for parameter in trainer.parameters)


def test_the_first_ratio_error_is_that_of_the_first_minibatch():
    stats = tiny.trainer(ppo_epochs=2).step(*batch())
    assert stats["ppo/policy/first_ratio_error"] == 0 and (stats["ppo/policy/ratio"] != 1).any()
