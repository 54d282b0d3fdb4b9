"""PPOTrainer: what a step changes and what it must leave alone, in fp32 and on a 4-bit model."""

import copy
import math
import signal
import warnings

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from rlhf_helpers.config import PPOConfig
from rlhf_helpers.errors import InputError
from rlhf_helpers.models import PolicyWithValueHead
from rlhf_helpers.ppo import next_kl_coef
from rlhf_helpers.trainer import PPOTrainer
from tests import tiny
from tests.tiny import EOS, PAD, adapters, batch, same, state, with_lora

KINDS = pytest.mark.parametrize("quantized", [False, True], ids=["fp32", "nf4"])


@pytest.fixture
def policy(nf4):
    """A function that makes a policy's language model by kind."""
    return lambda quantized, **lora: nf4(**lora) if quantized else with_lora(tiny.llama(), **lora)


def gradients_at_each_step(trainer):
    """A list that collects the gradients by name at every call of the optimizer, after clipping."""
    names, collected, step = {id(p): n for n, p in trainer.model.named_parameters()}, [], trainer.optimizer.step
    gradients = lambda: {names[id(p)]: p.grad.clone() for p in trainer.parameters if p.grad is not None}
    trainer.optimizer.step = lambda *args, **kwargs: collected.append(gradients()) or step(*args, **kwargs)
    return collected


# ---------------------------------------------------------------- what it takes


def test_a_bare_model_is_refused():
    with pytest.raises(TypeError, match="model is a LlamaForCausalLM; expected PolicyWithValueHead"):
        PPOTrainer(PPOConfig(), tiny.llama(), None, tiny.tokenizer())


def test_a_tokenizer_without_pad_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    for wrong in (tokenizer, None):
        with pytest.raises(ValueError, match="pad token"):
            PPOTrainer(PPOConfig(), PolicyWithValueHead(tiny.llama()), None, wrong)


def test_a_4_bit_model_without_adapters_is_refused(nf4):
    with pytest.raises(ValueError, match="4-bit weights and no adapters"):
        tiny.trainer(nf4(targets=None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_would_learn_in_half_precision_are_refused(dtype):
    lm = tiny.llama().to(dtype)
    with pytest.raises(ValueError, match=f"{str(dtype)[6:]} and would learn: .*; expected fp32"):
        tiny.trainer(lm)
    assert tiny.trainer(tiny.with_lora(lm.requires_grad_(False)))  # under adapters in fp32 it may stay as it is


def test_what_accelerate_config_says_of_autocast_is_not_heard(monkeypatch):
    """It would reach the passes of the trainer, and not those of the sampler."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=False)
    trainer = tiny.trainer(tiny.with_lora(tiny.llama(), b_scale=0.2))
    assert trainer.accelerator.mixed_precision == "no"
    queries, responses, scores = batch()
    assert trainer.step(queries, responses, scores)["ppo/policy/first_ratio_error"] == 0
    assert {row.dtype for row in trainer.model(*trainer.rollout.inputs(torch.arange(4)))} == {torch.float32}


def test_what_accelerate_config_says_of_compiling_is_not_heard(monkeypatch):
    """It would rename the weights, and no other trainer could read the checkpoint."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    AcceleratorState._reset_state(reset_partial_state=False)
    assert type(tiny.trainer().model) is PolicyWithValueHead


def test_a_default_dtype_of_torch_changes_no_step():
    usual, other, given = tiny.trainer(), tiny.trainer(), batch()
    usual.step(*given)
    try:
        torch.set_default_dtype(torch.bfloat16)
        other.step(*given)
    finally:
        torch.set_default_dtype(torch.float32)
    assert tiny.same(tiny.state(usual), tiny.state(other))


def test_rows_of_a_padded_tensor_are_told():
    queries, responses, scores = batch()
    padded = [torch.cat([ids, torch.tensor([tiny.EOS, tiny.PAD, tiny.PAD])]) for ids in responses]
    with pytest.warns(UserWarning, match="response 0 has 2 pads behind its EOS, which count as tokens"):
        tiny.trainer().step(queries, padded, scores)


def test_responses_with_their_queries_in_front_are_told():
    trainer = tiny.trainer()
    queries, _, scores = batch()
    with pytest.warns(UserWarning, match="every response begins with its query"):
        trainer.step(queries, trainer.generate(queries, return_prompt=True), scores)


def test_nothing_is_told_of_what_generate_gave_even_where_pads_were_drawn():
    trainer = tiny.trainer()
    queries, _, scores = batch()
    responses = trainer.generate(queries, eos_token_id=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.step(queries, responses, scores)


def test_a_4_bit_reference_computes_as_a_4_bit_policy_does(llama_folder):
    """Loaded by transformers alone it would be repacked at its first pass, on CPUs with AVX512-BF16."""
    policy, reference = tiny.with_lora(tiny.nf4_llama(llama_folder)), tiny.nf4_llama(llama_folder)
    trainer = tiny.trainer(policy, ref_model=reference)
    assert trainer.step(*batch())["objective/kl"] == 0


@pytest.mark.parametrize("name", ("save_pretrained", "generate", "gradient_checkpointing_enable", "is_peft_model"))
def test_what_trl_s_model_had_is_one_sentence(name):
    policy = tiny.trainer().model
    with pytest.raises(AttributeError, match=f"PolicyWithValueHead has no {name}: "):
        getattr(policy, name)
    assert not hasattr(policy, name) and getattr(policy, name, None) is None


def test_a_response_ends_at_any_token_that_the_model_s_generation_config_names():
    lm = tiny.with_lora(tiny.llama())
    lm.generation_config.eos_token_id = [9, tiny.EOS]
    trainer = tiny.trainer(lm, max_new_tokens=40)
    assert set(trainer.eos_ids) == {9, tiny.EOS}
    responses = trainer.generate(QUERIES * 8)
    ends = [response[-1].item() for response in responses]
    assert 9 in ends and tiny.EOS in ends
    assert not any((response[:-1] == 9).any() or (response[:-1] == tiny.EOS).any() for response in responses)


QUERIES, RESPONSES, SCORES = batch()
BAD = {
    "step: 3 queries; expected PPOConfig.batch_size = 4": (QUERIES[:3], RESPONSES, SCORES),
    "step: 5 responses; expected PPOConfig.batch_size = 4": (QUERIES, [*RESPONSES, RESPONSES[0]], SCORES),
    "step: 3 scores; expected PPOConfig.batch_size = 4": (QUERIES, RESPONSES, SCORES[:3]),
    "response 3 is empty; expected": (QUERIES, [*RESPONSES[:3], torch.tensor([], dtype=torch.long)], SCORES),
    "query 3 is empty; expected": ([*QUERIES[:3], torch.tensor([], dtype=torch.long)], RESPONSES, SCORES),
    f"response 3 has token id {tiny.V}; expected 0 to {tiny.V - 1}": (
        QUERIES,
        [*RESPONSES[:3], torch.tensor([5, tiny.V])],
        SCORES,
    ),
    "query 3 has token id -1; expected 0": ([*QUERIES[:3], torch.tensor([-1])], RESPONSES, SCORES),
    r"response 3 is \(1,\) torch.float32; expected": (QUERIES, [*RESPONSES[:3], torch.tensor([5.0])], SCORES),
    r"response 3 is \(1, 1\) torch.int64; expected": (QUERIES, [*RESPONSES[:3], torch.tensor([[5]])], SCORES),
    r"scores\[3\] is nan; expected a finite number": (QUERIES, RESPONSES, [*SCORES[:3], math.nan]),
    r"scores\[3\] is inf; expected a finite number": (QUERIES, RESPONSES, [*SCORES[:3], torch.tensor(math.inf)]),
    r"scores\[0\] is a score with 2 values; expected one number": (QUERIES, RESPONSES, torch.zeros(4, 2)),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_raises_before_anything_changes(words):
    trainer = tiny.trainer()
    trainer.step(*batch())
    before, random = state(trainer), trainer.generator.get_state()
    with pytest.raises(InputError, match=words):
        trainer.step(*BAD[words])
    assert same(state(trainer), before) and torch.equal(trainer.generator.get_state(), random)
    assert len(trainer.history) == 1


@pytest.mark.parametrize(
    "scores", [SCORES, torch.tensor(SCORES), [torch.tensor(s) for s in SCORES], [torch.tensor([s]) for s in SCORES]]
)
def test_scores_may_be_floats_or_tensors(scores):
    trainer = tiny.trainer()
    stats = trainer.step(QUERIES, RESPONSES, scores)
    assert stats["ppo/mean_scores"] == pytest.approx(sum(SCORES) / 4)
    assert torch.equal(trainer.rollout.scores, torch.tensor(SCORES))


# ---------------------------------------------------------------- generate


@pytest.mark.parametrize(
    "option",
    [
        dict(top_k=50),
        dict(top_p=0.9),
        dict(temperature=0.5),
        dict(repetition_penalty=1.2),
        dict(min_new_tokens=5),
        dict(num_beams=2),
    ],
)
def test_an_option_that_changes_what_is_sampled_is_refused(option):
    with pytest.raises(ValueError, match="generate: "):
        tiny.trainer().generate(batch()[0], **option)


def test_an_unknown_option_is_refused():
    with pytest.raises(ValueError, match="unknown option top_kk=3"):
        tiny.trainer().generate(batch()[0], top_kk=3)


def test_a_call_as_written_for_trl_samples_the_same():
    queries = batch()[0]
    neutral = dict(
        do_sample=True, top_k=0, top_p=1.0, min_length=-1, pad_token_id=PAD, eos_token_id=EOS, repetition_penalty=1.0
    )
    plain, trl = tiny.trainer().generate(queries), tiny.trainer().generate(queries, **neutral)
    assert all(torch.equal(a, b) for a, b in zip(plain, trl, strict=True))


def test_return_prompt_gives_the_whole_prompt_though_eos_is_in_it():
    queries = [torch.tensor([5, EOS, 6, 7]), torch.tensor([8, 9])]
    whole = tiny.trainer().generate(queries, return_prompt=True)
    assert [ids[: len(q)].tolist() for q, ids in zip(queries, whole)] == [q.tolist() for q in queries]
    assert all(len(q) < len(ids) <= len(q) + 8 for q, ids in zip(queries, whole))


def test_chunks_of_the_batch_give_the_same_greedy_responses():
    trainer = tiny.trainer(with_lora(tiny.llama(), b_scale=0.2))
    queries = batch(5)[0]
    whole, chunks = trainer.generate(queries, greedy=True), trainer.generate(queries, do_sample=False, batch_size=2)
    assert all(torch.equal(a, b) for a, b in zip(whole, chunks, strict=True))


@KINDS
def test_the_reference_samples_without_adapters_and_they_come_back(policy, quantized):
    queries = batch()[0]
    trained, untrained = (tiny.trainer(policy(quantized, b_scale=scale)) for scale in (1.0, 0.0))
    own = trained.generate(queries, greedy=True)
    reference = trained.generate(queries, greedy=True, reference=True)
    assert [r.tolist() for r in reference] == [r.tolist() for r in untrained.generate(queries, greedy=True)]
    assert [r.tolist() for r in own] != [r.tolist() for r in reference]
    assert [r.tolist() for r in trained.generate(queries, greedy=True)] == [r.tolist() for r in own]


@KINDS
def test_samples_follow_the_policy_as_it_is_now(policy, quantized):
    """Greedy responses after a large change of the adapters are those of a new trainer with these adapters."""
    trainer, queries = tiny.trainer(policy(quantized)), batch()[0]
    first = trainer.generate(queries, greedy=True)
    torch.manual_seed(3)
    for parameter in adapters(trainer).values():
        parameter.data.normal_()
    other = tiny.trainer(policy(quantized))
    for parameter, source in zip(adapters(other).values(), adapters(trainer).values()):
        parameter.data.copy_(source)
    now, expected = ([r.tolist() for r in t.generate(queries, greedy=True)] for t in (trainer, other))
    assert now == expected != [r.tolist() for r in first]


# ---------------------------------------------------------------- before the first update


@KINDS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_minibatch_has_ratio_exactly_1(policy, quantized, temperature):
    trainer = tiny.trainer(policy(quantized, b_scale=0.2), mini_batch_size=2, temperature=temperature)
    first = []
    minibatch = trainer._minibatch
    trainer._minibatch = lambda *args: first.append(minibatch(*args)) or first[-1]
    trainer.permutation = lambda n: [0, 1, 2, 3]
    trainer.step(*batch())
    ratio = first[0][1]["policy/ratio"]
    assert len(ratio) == 6 + 3 and (ratio == 1).all()
    assert (first[1][1]["policy/ratio"] != 1).any()  # the second minibatch meets a changed policy


@KINDS
def test_kl_is_bitwise_0_before_the_adapters_have_moved(policy, quantized):
    trainer = tiny.trainer(policy(quantized), mini_batch_size=2)
    stats = trainer.step(*batch())
    assert torch.equal(trainer.rollout.logprobs, trainer.rollout.ref_logprobs)
    assert stats["objective/kl"] == 0 and (trainer.rollout.non_score_rewards == 0).all()
    assert trainer.step(*batch())["objective/kl"] != 0


def test_kl_is_0_at_first_for_a_run_that_starts_from_a_trained_adapter_with_its_copy_as_reference():
    lm = with_lora(tiny.llama(), b_scale=0.3)
    trainer = tiny.trainer(lm, ref_model=copy.deepcopy(lm))
    assert trainer.step(*batch())["objective/kl"] == 0
    assert trainer.step(*batch())["objective/kl"] != 0


def test_a_reference_that_somebody_trains_meanwhile_is_read_without_dropout():
    lm = tiny.gpt2(resid_pdrop=0.3)
    trainer = tiny.trainer(lm, ref_model=copy.deepcopy(lm))
    trainer.ref_model.train()
    assert trainer.step(*batch())["objective/kl"] == 0
    trainer.ref_model.train()
    first, second = (trainer.generate(batch()[0], reference=True, greedy=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second))


def test_without_adapters_the_reference_is_a_frozen_copy():
    trainer = tiny.trainer(tiny.llama())
    before = {name: p.clone() for name, p in trainer.ref_model.named_parameters()}
    assert trainer.step(*batch())["objective/kl"] == 0
    assert trainer.step(*batch())["objective/kl"] != 0
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in trainer.ref_model.named_parameters())


def test_logprobs_and_values_are_those_of_each_response_alone():
    trainer = tiny.trainer(with_lora(tiny.llama(), b_scale=0.2))
    together = trainer.inspect(*batch())
    for row, (query, response) in enumerate(zip(*batch()[:2])):
        alone = trainer.inspect([query], [response])
        for name in ("logprobs", "ref_logprobs", "values"):
            torch.testing.assert_close(
                getattr(together, name)[row, : len(response)], getattr(alone, name)[0], atol=1e-5, rtol=1e-5
            )


def test_inspect_changes_nothing():
    trainer = tiny.trainer()
    trainer.step(*batch())
    before, rollout = state(trainer), trainer.rollout
    trainer.inspect(*batch(6))
    assert same(state(trainer), before) and trainer.rollout is rollout and len(trainer.history) == 1


# ---------------------------------------------------------------- what a step moves


@KINDS
def test_every_adapter_gets_a_gradient_and_moves_after_a_rollout(policy, quantized):
    trainer = tiny.trainer(policy(quantized), max_new_tokens=4)
    before = state(trainer)
    queries = batch()[0]
    responses = trainer.generate(queries)  # an eval-mode forward, which breaks 4-bit layers on some CPUs
    gradients = gradients_at_each_step(trainer)
    trainer.step(queries, responses, SCORES)
    assert len(adapters(trainer)) == 4
    for name, parameter in adapters(trainer).items():
        assert gradients[0][name].abs().max() > 0, name
        assert not torch.equal(parameter, before[name]), name


def test_a_model_that_ran_before_it_was_wrapped_trains_all_the_same(nf4):
    lm = nf4()
    with torch.no_grad():
        lm(input_ids=torch.tensor([[5, 6, 7]]))  # packs 4-bit layers on CPUs with AVX512-BF16
    trainer = tiny.trainer(lm)
    before = state(trainer)
    trainer.step(*batch())
    assert all(not torch.equal(parameter, before[name]) for name, parameter in adapters(trainer).items())


@KINDS
def test_the_base_never_moves(policy, quantized):
    trainer = tiny.trainer(policy(quantized))
    before, reference = state(trainer), trainer.inspect(*batch()).ref_logprobs
    for _ in range(3):
        trainer.step(batch()[0], trainer.generate(batch()[0]), SCORES)
    moved = {name for name, tensor in state(trainer).items() if name in before and not torch.equal(tensor, before[name])}
    assert all("lora_" in name or "v_head" in name or name in ("kl_coef", "steps") for name in moved)
    assert torch.equal(trainer.inspect(*batch()).ref_logprobs, reference)


def test_an_adapter_without_gradient_raises_and_no_weight_moves():
    trainer = tiny.trainer()
    first = trainer.model.pretrained_model.get_base_model().model.layers[0].self_attn.q_proj
    first.register_forward_hook(lambda module, args, out: out.detach())  # as a kernel without backward does
    before = state(trainer)
    with pytest.raises(RuntimeError, match="adapter .*q_proj.lora_A.* got no gradient"):
        trainer.step(*batch())
    assert same(state(trainer), before)


@pytest.mark.parametrize("m, g, steps", [(8, 1, 3), (2, 2, 6), (1, 8, 3), (1, 1, 24)])
def test_the_number_of_optimizer_steps_is_epochs_times_batch_over_group(m, g, steps):
    trainer = tiny.trainer(batch_size=8, mini_batch_size=m, gradient_accumulation_steps=g, ppo_epochs=3)
    gradients = gradients_at_each_step(trainer)
    trainer.step(*batch(8))
    trainer.step(*batch(8, seed=1))
    assert len(gradients) == 2 * steps


def test_accumulation_gives_the_gradient_of_the_whole_batch_on_unequal_lengths():
    """TRL 0.11 averages the means of minibatches, in which a token of a short response counts more."""
    collected = []
    for m, g in ((8, 1), (1, 8), (2, 4)):
        trainer = tiny.trainer(
            with_lora(tiny.llama(), b_scale=0.2), batch_size=8, mini_batch_size=m, gradient_accumulation_steps=g
        )
        collected.append(gradients_at_each_step(trainer))
        trainer.step(*batch(8))
    whole = collected[0][0]
    for (other,) in collected[1:]:
        for name in whole:
            torch.testing.assert_close(other[name], whole[name], atol=1e-6, rtol=1e-4)


def test_the_gradient_norm_is_kept_at_every_optimizer_step():
    trainer = tiny.trainer(with_lora(tiny.llama(), b_scale=0.2), max_grad_norm=0.05, ppo_epochs=3, mini_batch_size=2)
    gradients = gradients_at_each_step(trainer)
    stats = trainer.step(*batch())
    norms = [math.sqrt(sum(float(g.double().pow(2).sum()) for g in each.values())) for each in gradients]
    assert norms == [pytest.approx(0.05, rel=1e-4)] * 6
    assert stats["ppo/grad_norm"] > 0.05  # the norm before clipping


def test_the_value_head_may_have_its_own_learning_rate():
    trainer = tiny.trainer(learning_rate=1e-3, value_learning_rate=1e-1)
    before = state(trainer)
    trainer.step(*batch())
    largest = lambda part: max((p - before[n]).abs().max().item() for n, p in trainer.model.named_parameters() if part in n)
    assert (largest("lora_B"), largest("v_head")) == (
        pytest.approx(1e-3, rel=1e-2),
        pytest.approx(1e-1, rel=1e-2),
    )  # Adam's first step


# ---------------------------------------------------------------- dropout, modes, checkpointing


def test_dropout_is_off_in_rollout_scoring_and_update_and_modes_come_back():
    trainer = tiny.trainer(with_lora(tiny.llama(), b_scale=0.5, dropout=0.5))
    trainer.model.train()
    generate = lambda: [r.tolist() for r in trainer.generate(batch()[0], generator=torch.Generator().manual_seed(0))]
    assert generate() == generate()
    first, second = trainer.inspect(*batch()), trainer.inspect(*batch())
    assert torch.equal(first.logprobs, second.logprobs) and torch.equal(first.values, second.values)
    stats = trainer.step(*batch())
    assert (stats["ppo/policy/ratio"] == 1).all()
    assert all(module.training for module in trainer.model.modules())


def test_a_model_in_eval_mode_stays_in_eval_mode():
    trainer = tiny.trainer()
    trainer.model.eval()
    trainer.generate(batch()[0])
    trainer.step(*batch())
    assert not any(module.training for module in trainer.model.modules())


@KINDS
def test_gradient_checkpointing_computes_layers_again_and_steps_the_same(policy, quantized):
    passes, trainers = [], [tiny.trainer(policy(quantized, b_scale=0.2), mini_batch_size=2) for _ in range(2)]
    saving = trainers[1]
    saving.model.enable_gradient_checkpointing()
    layer = saving.model.pretrained_model.get_base_model().model.layers[0]
    layer.self_attn.register_forward_pre_hook(lambda *args: passes.append(torch.is_grad_enabled()))
    for trainer in trainers:
        trainer.step(*batch())
    assert passes.count(True) == 2 * 2  # two minibatches, each forward and again in backward
    for (name, a), b in zip(trainers[0].model.named_parameters(), saving.model.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=name)


def test_generation_keeps_its_cache_under_gradient_checkpointing():
    trainer, widths = tiny.trainer(max_new_tokens=3), []
    trainer.model.enable_gradient_checkpointing()
    trainer.model.train()
    trainer.model.pretrained_model.get_input_embeddings().register_forward_hook(
        lambda m, args, out: widths.append(args[0].shape[1])
    )
    trainer.generate([torch.tensor([5, 6, 7, 8])])
    assert widths[0] == 4 and set(widths[1:]) == {1}


# ---------------------------------------------------------------- accidents


HUGE = (QUERIES, RESPONSES, [1e30, 0.0, 0.0, 0.0])  # a finite score whose square is not


def test_a_loss_that_is_not_finite_leaves_weights_and_adam_alone_and_is_counted():
    trainer = tiny.trainer()
    trainer.step(*batch())
    before = state(trainer)
    stats = trainer.step(*HUGE)
    after = state(trainer)
    assert math.isinf(stats["ppo/loss/value"]) and stats["ppo/skipped_updates"] == 1
    assert before.keys() == after.keys() and "adam.0.exp_avg" in after
    assert all(torch.equal(after[name], before[name]) for name in after if name not in ("steps", "kl_coef"))


def test_a_good_minibatch_after_a_bad_one_still_trains():
    trainer = tiny.trainer(mini_batch_size=1)
    before = state(trainer)
    trainer.permutation = lambda n: [0, 1, 2, 3]
    stats = trainer.step(*HUGE)
    after = state(trainer)
    assert stats["ppo/skipped_updates"] == 1 and all(torch.isfinite(tensor).all() for tensor in after.values())
    assert all(not torch.equal(after[name], before[name]) for name in adapters(trainer))
    assert int(after["adam.0.step"]) == 3


def test_a_minibatch_whose_ratio_is_above_the_threshold_is_left_out():
    trainer = tiny.trainer(ppo_epochs=2, ratio_threshold=0.5)  # the ratio of the first pass is 1
    before = state(trainer)
    assert trainer.step(*batch())["ppo/skipped_updates"] == 2
    after = state(trainer)
    assert all(torch.equal(after[name], before[name]) for name, _ in trainer.model.named_parameters())


def test_one_such_minibatch_leaves_out_its_whole_update_and_adam_does_not_step():
    """TRL 0.11.4 multiplies that minibatch's loss by 0, and Adam goes on by its moments."""
    trainer = tiny.trainer(mini_batch_size=2, gradient_accumulation_steps=2, ratio_threshold=10.0)
    trainer.step(*batch())  # moments that are not 0
    minibatch, far, before = trainer._minibatch, [11.0, 1.0], state(trainer)

    def one_is_far(rollout, rows):
        loss, stats = minibatch(rollout, rows)
        return loss, stats | {"policy/ratio_mean": far.pop(0)}

    trainer._minibatch = one_is_far
    stats = trainer.step(*batch())
    after = state(trainer)
    assert stats["ppo/skipped_updates"] == 1 and math.isfinite(stats["ppo/loss/total"]) and far == []
    assert int(before["adam.0.step"]) == 1
    assert all(torch.equal(after[name], before[name]) for name in after if name not in ("steps", "kl_coef"))


def test_nan_in_what_belongs_to_pads_changes_no_gradient():
    def gradients(poison):
        trainer = tiny.trainer(with_lora(tiny.llama(), b_scale=0.2))
        collected, forward = gradients_at_each_step(trainer), trainer.model.forward

        def poisoned(*inputs):
            logits, values = forward(*inputs)
            poison = torch.where(inputs[1][:, -inputs[2] :] == 0, math.nan, 0.0)
            return logits + poison[..., None], values + poison

        if poison:
            trainer.model.forward = poisoned
        stats = trainer.step(*batch())
        return collected[0], stats["ppo/loss/total"]

    (clean, loss), (dirty, dirty_loss) = gradients(False), gradients(True)
    assert loss == dirty_loss
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


# ---------------------------------------------------------------- options


def test_the_kl_coefficient_follows_the_controller_from_step_to_step():
    trainer = tiny.trainer(with_lora(tiny.llama(), b_scale=0.5), target=1.0, horizon=50.0, init_kl_coef=0.3)
    expected = 0.3
    for seed in range(3):
        stats = trainer.step(*batch(seed=seed))
        assert stats["objective/kl_coef"] == pytest.approx(expected)  # the one that was used
        expected = next_kl_coef(expected, stats["objective/kl"], 1.0, 50.0, 4)
    assert trainer.kl_coef == pytest.approx(expected) != 0.3


def test_a_kl_that_is_no_number_leaves_the_kl_coefficient_alone():
    trainer = tiny.trainer(tiny.with_lora(tiny.llama(), b_scale=0.2), adap_kl_ctrl=True, target=1.0, horizon=50.0)
    collect = trainer._collect

    def poisoned(*args, **kwargs):
        rollout = collect(*args, **kwargs)
        rollout.kl[0, 0] = math.nan
        return rollout

    trainer._collect = poisoned
    before = trainer.kl_coef
    assert math.isnan(trainer.step(*batch())["objective/kl"]) and trainer.kl_coef == before


def test_a_fixed_kl_coefficient_stays():
    trainer = tiny.trainer(with_lora(tiny.llama(), b_scale=0.5), adap_kl_ctrl=False, init_kl_coef=0.3)
    trainer.step(*batch())
    assert trainer.kl_coef == 0.3


def test_full_kl_is_never_negative_and_k1_is_at_times():
    make = lambda kind: tiny.trainer(with_lora(tiny.llama(), b_scale=0.5), kl_penalty=kind).inspect(*batch())
    full, k1 = make("full"), make("kl")
    assert (full.kl[full.mask] > 0).all() and (k1.kl < 0).any()
    assert torch.equal(full.logprobs, k1.logprobs)


def test_scores_are_clipped_to_the_range():
    trainer = tiny.trainer(score_clip=0.5)
    trainer.step(QUERIES, RESPONSES, [2.0, -3.0, 0.25, 0.5])
    assert trainer.rollout.scores.tolist() == [0.5, -0.5, 0.25, 0.5]


def test_early_stopping_ends_the_epochs_of_a_step():
    count = {}
    for stop in (False, True):
        trainer = tiny.trainer(ppo_epochs=4, learning_rate=0.1, early_stopping=stop, target_kl=1e-6)
        gradients = gradients_at_each_step(trainer)
        trainer.step(*batch())
        count[stop] = len(gradients)
    assert count[False] == 4 and count[True] < 4


# ---------------------------------------------------------------- stats and history


def test_stats_have_trl_s_keys_and_history_their_scalars():
    trainer = tiny.trainer()
    stats = trainer.step(*batch())
    for key in (
        "objective/kl",
        "objective/entropy",
        "ppo/mean_scores",
        "ppo/std_scores",
        "ppo/loss/policy",
        "ppo/val/var_explained",
        "ppo/policy/clipfrac",
        "ppo/returns/mean",
        "tokens/responses_len_mean",
        "time/ppo/total",
        "ppo/learning_rate",
    ):
        assert isinstance(stats[key], float) and trainer.history[0][key] == stats[key], key
    assert trainer.history[0]["step"] == trainer.steps_done == 1
    assert len(stats["ppo/policy/ratio"]) == 6 + 3 + 8 + 5
    assert stats["tokens/responses_len_mean"] == 5.5


def test_the_share_of_responses_that_ended_is_counted():
    responses = [torch.tensor([5, EOS]), torch.tensor([5, 6]), torch.tensor([EOS]), torch.tensor([7, 8, EOS])]
    assert tiny.trainer().step(QUERIES, responses, SCORES)["tokens/responses_eos_frac"] == 0.75


def test_everything_learnt_from_is_fp32_on_a_4_bit_model(nf4):
    trainer = tiny.trainer(nf4(b_scale=0.2))
    trainer.step(*batch())
    for name in ("scores", "logprobs", "ref_logprobs", "values", "kl", "rewards", "returns", "advantages"):
        assert getattr(trainer.rollout, name).dtype == torch.float32, name
    assert all(p.dtype == torch.float32 for p in trainer.parameters)


# ---------------------------------------------------------------- train


PROMPTS = [f"t{i} t{i + 1}" for i in range(10, 20)]


def test_train_gives_the_reward_function_prompts_and_texts_and_calls_back():
    calls, steps = [], []

    def reward(prompts, responses):
        calls.append((prompts, responses))
        return [len(r.split()) for r in responses]

    trainer = tiny.trainer()
    history = trainer.train(
        PROMPTS, reward, steps=3, on_step=lambda t, stats: steps.append((t.steps_done, stats["ppo/mean_scores"]))
    )
    assert [len(prompts) for prompts, _ in calls] == [4, 4, 4] and all(p in PROMPTS for prompts, _ in calls for p in prompts)
    assert [step for step, _ in steps] == [1, 2, 3] == [row["step"] for row in history]
    assert all("time/generate" in row and "time/reward" in row for row in history)
    texts = trainer.decode(trainer.rollout.responses)
    assert texts == calls[-1][1] and not any("<" in text for text in texts)  # no special tokens


def test_train_may_be_interrupted_and_called_again_and_comes_to_the_same_end():
    """As a notebook's stop button does it: the step that is under way is finished."""
    prompts, reward = [f"t{i} t{i + 1}" for i in range(10, 22)], lambda _, texts: [len(text) / 10 for text in texts]
    whole, halted = (tiny.trainer(tiny.with_lora(tiny.llama(), b_scale=0.2), max_new_tokens=6) for _ in range(2))
    whole.train(prompts, reward, steps=4)
    stop = lambda trainer, stats: signal.raise_signal(signal.SIGINT) if trainer.steps_done == 2 else None
    with pytest.raises(KeyboardInterrupt):
        halted.train(prompts, reward, steps=4, on_step=stop)
    assert halted.steps_done == 2
    halted.train(prompts, reward, steps=2)
    assert tiny.same(tiny.state(halted), tiny.state(whole))


def test_by_default_train_is_one_pass_over_the_prompts():
    assert len(tiny.trainer().train(PROMPTS, lambda p, r: [0.0, 1.0, 2.0, 3.0])) == 2  # of ten prompts, four a step


def test_a_reward_function_with_too_few_scores_is_reported():
    with pytest.raises(ValueError, match="3 scores; expected PPOConfig.batch_size = 4"):
        tiny.trainer().train(PROMPTS, lambda p, r: [0.0] * 3)


@pytest.mark.parametrize("n", [10, 3])
def test_every_pass_over_the_prompts_uses_each_once_in_another_order(n):
    trainer, rows = tiny.trainer(), []
    for trainer.steps_done in range(15):
        rows += trainer.next_rows(n)
    passes = [rows[i : i + n] for i in range(0, len(rows), n)]
    assert all(sorted(each) == list(range(n)) for each in passes)
    assert len({tuple(each) for each in passes}) > 1


def test_prompts_without_room_for_a_response_are_left_out_with_a_warning():
    trainer = tiny.trainer()
    long = " ".join(["t5"] * 121)  # 128 positions, 8 of them for the response
    with pytest.warns(UserWarning, match="skipped 1 of 2 prompts: longer than 120 tokens"):
        prompts, queries = trainer.encode([long, "t5 t6"])
    assert prompts == ["t5 t6"] and queries[0].tolist() == [5, 6]
    with pytest.raises(InputError, match="none of 1 fits into 120 tokens; expected shorter ones"):
        trainer.encode([long])


def test_the_same_seed_gives_the_same_run():
    def run(seed):
        trainer = tiny.trainer(seed=seed)
        trainer.train(PROMPTS, lambda prompts, responses: [float(len(r)) for r in responses], steps=2)
        return state(trainer)

    assert same(run(3), run(3)) and not same(run(3), run(4))


def test_a_one_token_bandit_reaches_the_optimum_in_closed_form():
    """The best policy against a KL penalty is known: pi* is proportional to pi_ref exp(reward / beta)."""
    lm = tiny.llama(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    query, beta = torch.tensor([5, 6]), 0.5
    rewards = torch.tensor([0.0, 0.5, -0.5, 1.0, 0.2, -1.0, 0.7, -0.2])
    reference = lm(query[None]).logits[0, -1].detach().log_softmax(-1)
    best = (reference + rewards / beta).log_softmax(-1)
    trainer = tiny.trainer(lm, batch_size=256, mini_batch_size=256, init_kl_coef=beta, adap_kl_ctrl=False, max_new_tokens=1)
    distance = lambda: torch.nn.functional.kl_div(
        lm(query[None]).logits[0, -1].log_softmax(-1), best, log_target=True, reduction="sum"
    ).item()
    assert distance() > 0.3
    for step in range(100):
        for group in trainer.optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 100)
        responses = trainer.generate([query] * 256)
        trainer.step([query] * 256, responses, rewards[torch.cat(responses)])
    assert distance() < 0.01


def test_the_policy_cannot_be_its_own_reference_in_training():
    lm = with_lora(tiny.llama())
    with pytest.raises(ValueError, match="ref_model is the policy itself"):
        tiny.trainer(lm, ref_model=lm)
    assert any(parameter.requires_grad for parameter in lm.parameters())


# ---------------------------------------------------------------- where a response ends


ENDS = [torch.tensor([5, EOS]), torch.tensor([5, 6]), torch.tensor([EOS]), torch.tensor([EOS, 8])]  # the last one has it inside


def test_the_penalty_is_taken_from_the_score_of_a_response_without_eos_and_from_no_other():
    trainer = tiny.trainer(missing_eos_penalty=0.75)
    stats = trainer.step(QUERIES, ENDS, [1.0, 1.0, -2.0, 0.5])
    assert trainer.rollout.scores.tolist() == [1.0, 0.25, -2.0, 0.5]
    assert trainer.rollout.rewards[1, :2].sum() == 0.25  # KL is 0 so far
    assert stats["ppo/mean_scores"] == pytest.approx(-0.0625)
    plain = tiny.trainer()
    plain.step(QUERIES, ENDS, [1.0, 1.0, -2.0, 0.5])
    assert plain.rollout.scores.tolist() == [1.0, 1.0, -2.0, 0.5]


def test_an_end_that_generate_was_given_is_an_end_for_the_penalty_and_the_stats():
    trainer = tiny.trainer(missing_eos_penalty=1.0, max_new_tokens=40)
    responses = trainer.generate(QUERIES, eos_token_id=list(range(60, 128)))
    assert all(60 <= response[-1] < 128 for response in responses) and EOS not in torch.cat(responses)
    assert trainer.step(QUERIES, responses, [0.0] * 4)["tokens/responses_eos_frac"] == 1.0
    assert trainer.rollout.scores.tolist() == [0.0] * 4
    responses = trainer.generate(QUERIES, eos_token_id=-1)  # as scripts for TRL say "never"
    assert trainer.step(QUERIES, responses, [0.0] * 4)["tokens/responses_eos_frac"] == 0.0


def test_responses_that_were_not_drawn_from_the_distribution_have_no_sampler_s_kl():
    trainer = tiny.trainer()
    for how in (dict(greedy=True), dict(do_sample=False)):
        assert math.isnan(trainer.step(QUERIES, trainer.generate(QUERIES, **how), [0.0] * 4)["objective/sampler_kl"])
    assert trainer.step(QUERIES, trainer.generate(QUERIES), [0.0] * 4)["objective/sampler_kl"] < 1e-9


def test_the_penalty_comes_after_the_clipping_of_scores():
    rollout = tiny.trainer(missing_eos_penalty=1.0, score_clip=0.5).inspect(QUERIES, ENDS, [9.0, 9.0, -9.0, 0.0])
    assert rollout.scores.tolist() == [0.5, -0.5, -0.5, 0.0]


def test_the_reward_function_reads_the_text_of_the_very_response_that_is_learnt_from():
    """Cut behind the first EOS for both: what the policy is paid for is what it wrote."""
    texts, lm = [], with_lora(tiny.llama(vocab_size=32))
    trainer = tiny.trainer(lm, missing_eos_penalty=1.0, batch_size=16, mini_batch_size=16)
    trainer.train(PROMPTS, lambda prompts, responses: texts.extend(responses) or [3.0] * 16, steps=1)
    responses = [response.tolist() for response in trainer.rollout.responses]
    ended = [EOS in response for response in responses]
    assert True in ended and False in ended
    assert all(response.index(EOS) == len(response) - 1 for response in responses if EOS in response)
    words = [[f"t{i}" for i in response if i >= 4] for response in responses]
    assert [text.split() for text in texts] == words
    assert trainer.rollout.scores.tolist() == [3.0 if end else 2.0 for end in ended]


def test_where_pad_is_eos_the_policy_still_learns_to_stop():
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    trainer, query = tiny.trainer(tokenizer=tokenizer), torch.tensor([5, 6])
    queries, responses = [query] * 4, [torch.tensor(ids) for ids in ([7, EOS], [7, 8, 9], [7, EOS], [7, 8, EOS, 9])]
    stop = lambda: trainer.inspect([query], [torch.tensor([7, EOS])]).logprobs[0, 1].item()
    before = stop()
    trainer.step(queries, responses, [1.0, -1.0, 1.0, -1.0])
    assert trainer.rollout.lengths.tolist() == [2, 3, 2, 4]
    assert stop() > before + 0.01


# ---------------------------------------------------------------- the KL budget


def spend(kl_budget, steps=12, **config):
    """A trainer after `steps` steps at most, with the KL of each."""
    trainer = tiny.trainer(with_lora(tiny.llama(), b_scale=0.3), kl_budget=kl_budget, learning_rate=1e-3, **config)
    trainer.train(PROMPTS, lambda prompts, responses: [float(len(r)) for r in responses], steps=steps)
    return trainer, [row["objective/kl"] for row in trainer.history]


def test_train_ends_once_the_mean_kl_of_four_steps_is_above_the_budget():
    _, free = spend(None)
    means = [sum(free[max(0, n - 4) : n]) / len(free[max(0, n - 4) : n]) for n in range(1, 13)]  # after n steps
    budget = sorted(means[4:])[4]
    expected = next(n for n, mean in enumerate(means, 1) if mean > budget)
    trainer, kl = spend(budget)
    assert kl == free[:expected] and 1 <= expected < 12 and trainer.kl_budget_spent()


def test_one_step_far_off_counts_for_a_quarter():
    """Adapters that are away from zero in step 6 alone, so that only this step has a KL."""

    def spent(kl_budget):
        trainer = tiny.trainer(kl_budget=kl_budget, learning_rate=0.0)
        torch.manual_seed(0)

        def disturb(trainer, stats):
            for parameter in adapters(trainer).values():
                parameter.data.normal_(0, 0.7) if trainer.steps_done == 5 else parameter.data.zero_()

        history = trainer.train(PROMPTS, lambda prompts, responses: [0.0, 1.0, 2.0, 3.0], steps=8, on_step=disturb)
        return [row["objective/kl"] for row in history]

    kl = spent(None)
    assert kl[5] > 1 and kl[:5] + kl[6:] == [0.0] * 7
    assert spent(kl[5] / 3.5) == kl and spent(kl[5] / 4.5) == kl[:6]


def test_an_infinite_budget_is_never_spent_and_none_is_no_budget():
    assert spend(math.inf)[1] == spend(None)[1]
    for wrong in (0, -1.0, math.nan, "7", 10**400):
        with pytest.raises(ValueError, match="PPOConfig.kl_budget is .*; expected None, inf or a number above 0"):
            PPOConfig(kl_budget=wrong)


def test_a_run_whose_budget_is_spent_does_not_go_on_after_it_is_resumed(tmp_path):
    trainer, kl = spend(1e-3)
    trainer.save(tmp_path / "checkpoint")
    resumed = tiny.trainer(with_lora(tiny.llama()), kl_budget=1e-3, learning_rate=1e-3)
    resumed.resume(tmp_path / "checkpoint")
    fail = lambda *args: pytest.fail("a response was paid for")
    assert len(resumed.train(PROMPTS, fail, steps=5)) == len(kl) == resumed.steps_done
    more = tiny.trainer(with_lora(tiny.llama()), kl_budget=math.inf, learning_rate=1e-3)
    more.resume(tmp_path / "checkpoint")  # a larger budget lets it
    assert len(more.train(PROMPTS, lambda prompts, responses: [0.0, 1.0, 2.0, 3.0], steps=2)) == len(kl) + 2


# ---------------------------------------------------------------- one distribution, one reference


def test_sampled_tokens_are_as_frequent_as_their_logprobs_say():
    """What generate draws and what inspect scores is one distribution, adapters and temperature included."""
    trainer = tiny.trainer(with_lora(tiny.llama(vocab_size=16), b_scale=0.3), temperature=0.7, max_new_tokens=1)
    query, n = torch.tensor([5, 6, 7]), 5000
    tokens = torch.cat(trainer.generate([query] * n))
    logprobs = trainer.inspect([query] * 16, [torch.tensor([i]) for i in range(16)]).logprobs[:, 0]
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-5)
    expected, counts = logprobs.exp() * n, torch.bincount(tokens, minlength=16)
    deviations = (counts - expected) / (expected * (1 - logprobs.exp())).sqrt()
    assert deviations[expected > 5].abs().max() < 4 and counts[expected <= 5].sum() < 5 * 16
    with trainer.model.adapters_off():
        other = trainer.model(torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long), 1)[0][0, 0]
    assert ((counts - (other / 0.7).softmax(-1) * n).abs() > 100).any()  # without adapters it is another one


def test_kl_is_0_at_first_for_a_run_on_a_base_with_the_trained_adapter_merged_in():
    sft = with_lora(tiny.llama(), b_scale=0.3)
    expected = tiny.trainer(copy.deepcopy(sft)).inspect(*batch()).logprobs
    trainer = tiny.trainer(with_lora(sft.merge_and_unload()))
    assert trainer.step(*batch())["objective/kl"] == 0
    torch.testing.assert_close(trainer.rollout.ref_logprobs, expected, atol=1e-5, rtol=1e-5)
    assert trainer.step(*batch())["objective/kl"] != 0


def test_a_gradient_that_is_not_finite_leaves_weights_and_adam_alone_though_the_loss_is():
    trainer = tiny.trainer()
    trainer.step(*batch())
    before, parameter = state(trainer), next(iter(adapters(trainer).values()))
    handle = parameter.register_hook(lambda gradient: gradient * math.nan)
    stats = trainer.step(*batch())
    after = state(trainer)
    assert math.isfinite(stats["ppo/loss/total"]) and stats["ppo/skipped_updates"] == 1
    assert all(torch.equal(after[name], before[name]) for name in after if name not in ("steps", "kl_coef"))
    handle.remove()
    assert trainer.step(*batch())["ppo/skipped_updates"] == 0 and not same(state(trainer), before)


# ---------------------------------------------------------------- a long run in 4 bits


@pytest.mark.slow
def test_200_steps_in_4_bits_leave_no_nan_in_weights_or_stats(nf4):
    trainer = tiny.trainer(nf4(), learning_rate=5e-3, max_grad_norm=1.0, temperature=0.7, ppo_epochs=2, mini_batch_size=2)
    before = state(trainer)
    trainer.train(PROMPTS, lambda prompts, responses: [len(set(text.split())) / 4 - 1 for text in responses], steps=200)
    after = state(trainer)
    assert [name for name, tensor in after.items() if not torch.isfinite(tensor).all()] == []
    assert all(not torch.equal(tensor, before[name]) for name, tensor in adapters(trainer).items())
    wrong = [(row["step"], key) for row in trainer.history for key, number in row.items() if not math.isfinite(number)]
    assert wrong == [] and len(trainer.history) == 200
    assert sum(row["ppo/skipped_updates"] for row in trainer.history) == 0


@pytest.mark.parametrize("where", ["rlhf_helpers.trainer.PPOTrainer._update", "rlhf_helpers.trainer.step_stats"])
def test_an_error_after_weights_have_moved_says_that_half_a_step_is_in_them(where, monkeypatch):
    trainer = tiny.trainer(tiny.with_lora(tiny.llama(), b_scale=0.2), ppo_epochs=2)
    update = PPOTrainer._update
    calls = []

    def stopped(*args):
        if "_update" in where and not calls:
            calls.append(update(*args))
            return calls[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(where, stopped)
    with pytest.raises(KeyboardInterrupt) as error:
        trainer.step(*tiny.batch())
    assert "Step 1 ended inside, and a part of it is in the weights" in error.value.__notes__[0] and trainer.steps_done == 0
    with pytest.raises(InputError) as error:
        trainer.step([], [], [])
    assert not hasattr(error.value, "__notes__")


def test_inspect_takes_any_number_of_responses_and_as_many_queries():
    trainer = tiny.trainer()
    with pytest.raises(InputError, match="inspect: 3 queries; expected 4, one for each response"):
        trainer.inspect(QUERIES[:3], RESPONSES)
    assert len(trainer.inspect(QUERIES[:3], RESPONSES[:3])) == 3


def test_merged_adapters_are_refused_and_stay_merged():
    """PEFT takes them out of the weights for good when they are switched off, as they are to read the reference."""
    trainer = tiny.trainer(with_lora(tiny.llama(), b_scale=0.3))
    trainer.model.pretrained_model.merge_adapter()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for call in (
        lambda: trainer.step(*batch()),
        lambda: trainer.inspect(QUERIES, RESPONSES),
        lambda: trainer.generate(QUERIES, reference=True),
    ):
        with pytest.raises(InputError, match="merged"):
            call()
        assert trainer.model.adapters_merged() and trainer.steps_done == 0
    assert same(dict(trainer.model.named_parameters()), before)


@pytest.mark.parametrize("at, done", [(2, 3), (5, 5)])
def test_a_signal_that_comes_while_processes_ask_each_other_counts(at, done):
    """The next step's end hears of it, and the end of the last one."""
    trainer, asked = tiny.trainer(), []
    largest = trainer._largest

    def slow(number):
        asked.append(number)
        if len(asked) == at:
            signal.raise_signal(signal.SIGINT)
        return largest(number)

    trainer._largest = slow
    with pytest.raises(KeyboardInterrupt):
        trainer.train([f"t{i} t{i + 1}" for i in range(4, 24)], lambda prompts, texts: [1.0] * len(texts), steps=5)
    assert trainer.steps_done == done


def test_an_update_that_breaks_off_leaves_nothing_of_its_gradient_to_the_next():
    """In the middle of accumulation."""
    half = dict(mini_batch_size=2, gradient_accumulation_steps=2)
    ends = []
    for breaks in (False, True):
        trainer = tiny.trainer(**half)
        trainer.permutation = lambda n: list(range(n))
        if breaks:
            minibatch, calls = trainer._minibatch, []

            def broken(*args, minibatch=minibatch, calls=calls):
                calls.append(1)
                if len(calls) == 2:
                    raise RuntimeError("out of memory")
                return minibatch(*args)

            trainer._minibatch = broken
            with pytest.raises(RuntimeError, match="out of memory"):
                trainer.step(*batch())
            trainer._minibatch = minibatch
        trainer.step(*batch())
        ends.append(state(trainer))
    assert same(*ends)


def test_the_rate_in_the_stats_is_the_policy_s():
    trainer = tiny.trainer(learning_rate=3e-3, value_learning_rate=7e-3)
    assert trainer.step(*batch())["ppo/learning_rate"] == 3e-3


def test_a_pass_over_many_prompts_is_shuffled_once(monkeypatch):
    trainer, shuffle, calls = tiny.trainer(batch_size=32, mini_batch_size=32), torch.randperm, []
    monkeypatch.setattr(torch, "randperm", lambda *args, **options: calls.append(args) or shuffle(*args, **options))
    trainer.steps_done = 6
    assert len(trainer.next_rows(200)) == 32 and len(calls) == 2, "places 192 to 223: the end of one pass, and another"


def test_adapters_of_another_kind_must_get_gradients_too():
    from peft import IA3Config, get_peft_model

    lm = get_peft_model(tiny.llama(), IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]))
    lm.base_model.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(RuntimeError, match="ia3.* got no gradient"):
        tiny.trainer(lm).step(*batch())


@pytest.mark.parametrize("ends, words", [((), "names an EOS; expected eos_token_id"), ([1.5], "expected one token id")])
def test_what_ends_no_response_is_named(ends, words):
    with pytest.raises(InputError, match=words):
        tiny.trainer().generate(QUERIES, eos_token_id=ends)
    assert tiny.trainer().generate(QUERIES, eos_token_id=np.int64(EOS))
