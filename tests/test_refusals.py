"""What a curious user hands over and must not: one sentence each, and a trainer that is as it was, random numbers included."""

import dataclasses
import functools
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from rlhf_helpers import advantages, models
from rlhf_helpers.config import PPOConfig
from rlhf_helpers.data import load_prompts, turns
from rlhf_helpers.errors import InputError
from rlhf_helpers.evaluation import evaluate
from rlhf_helpers.models import PolicyWithValueHead
from rlhf_helpers.rollout import gae_advantages
from rlhf_helpers.trainer import PPOTrainer
from tests import tiny
from tests.tiny import llama, same, state, with_lora

PROMPTS = [f"t{i} t{i + 1}" for i in range(10, 20)]
lengths = lambda prompts, texts: [float(len(text.split())) for text in texts]


def frozen(folder):
    with_lora(llama(), b_scale=0.3).save_pretrained(folder)
    return PeftModel.from_pretrained(llama(), folder)  # is_trainable is forgotten


def with_its_base(folder):
    base = llama()
    return tiny.trainer(with_lora(base), ref_model=base)  # PEFT has put the adapters into it


def pad_of_its_own(folder):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tiny.trainer(tokenizer=tokenizer)


def with_biases():
    return get_peft_model(tiny.gpt2(), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, bias="all"))


def with_norms():
    lm = with_lora(llama())
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("norm.weight"))
    return lm


PARTS = {
    "adapters loaded to be read": (lambda folder: tiny.trainer(frozen(folder)), "is_trainable=True"),
    "a frozen model": (lambda folder: tiny.trainer(llama().requires_grad_(False)), "all are frozen"),
    "the adapters' own base": (with_its_base, "shares weights with it that learn"),
    "a pad that the model lacks": (pad_of_its_own, "its pad token has id 128; expected 0 to 127"),
    "a reference of fewer words": (
        lambda folder: tiny.trainer(with_lora(llama()), ref_model=llama(vocab_size=64)),
        "at least 128",
    ),
    "a reference of more words, for KL over all of them": (
        lambda folder: tiny.trainer(with_lora(llama()), ref_model=llama(vocab_size=160), kl_penalty="full"),
        "ref_model has 160 token ids and the policy 128; expected as many",
    ),
    "virtual tokens": (
        lambda folder: tiny.trainer(get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))),
        "virtual tokens",
    ),
    "advantages by name": (
        lambda folder: PPOTrainer(
            PPOConfig(), models.PolicyWithValueHead(llama()), None, tiny.tokenizer(), advantages="leave_one_out"
        ),
        "advantages is 'leave_one_out'; expected a function",
    ),
    "TRL's dataset in the fifth place": (
        lambda folder: PPOTrainer(PPOConfig(), models.PolicyWithValueHead(llama()), None, tiny.tokenizer(), [{"query": "t5"}]),
        r"expected a function, such as advantages.leave_one_out \(if this is TRL's dataset: train\(prompts, reward_fn\)",
    ),
    "biases that learn beside the adapters": (lambda folder: tiny.trainer(with_biases()), "would learn and is no adapter"),
    "norms that learn beside the adapters": (
        lambda folder: tiny.trainer(with_norms()),
        "norm.weight would learn and is no adapter",
    ),
    "adapters that rewrite what is under them": (
        lambda folder: tiny.trainer(
            get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
        ),
        "init_lora_weights='pissa' rewrites",
    ),
    "a reference of fewer places": (
        lambda folder: tiny.trainer(with_lora(tiny.gpt2(), ["c_attn"]), ref_model=tiny.gpt2(n_positions=64)),
        "ref_model has 64 positions and the policy 128",
    ),
    "a price that would turn negative": (lambda folder: PPOConfig(horizon=10.0), "expected above 0.2 x batch_size = 25.6"),
}


@pytest.mark.parametrize("make, words", PARTS.values(), ids=PARTS)
def test_parts_that_could_not_learn_or_would_learn_another_thing(make, words, tmp_path):
    with pytest.raises(InputError, match=words):
        make(tmp_path)


@pytest.mark.parametrize("make, reference", ((with_biases, tiny.gpt2), (with_norms, llama)))
def test_with_a_reference_of_its_own_more_than_adapters_may_learn(make, reference):
    trainer = tiny.trainer(make(), ref_model=reference())
    assert trainer.step(*tiny.batch())["objective/kl"] == 0 and trainer.step(*tiny.batch())["objective/kl"] != 0


CALLS = {
    "a file's name for prompts": (
        lambda t: t.train("data/prompts.jsonl", lengths, steps=1),
        "prompts is 'data/prompts.jsonl'; expected a list",
    ),
    "a prompt without words": (
        lambda t: t.train([*PROMPTS[:9], ""], lengths, steps=1),
        r"prompts\[9\] is '', which has no tokens",
    ),
    "a prompt that is none": (lambda t: t.train([*PROMPTS[:3], {"prompt": "t5"}], lengths), r"prompts\[3\] is"),
    "half a character": (lambda t: t.train([*PROMPTS[:3], "\ud800"], lengths), r"prompts\[3\] is"),
    "half a step": (lambda t: t.train(PROMPTS, lengths, steps=2.5), "steps is 2.5; expected a whole number from 0"),
    "no reward": (lambda t: t.train(PROMPTS, None), "reward_fn is None"),
    "on_step that is none": (lambda t: t.train(PROMPTS, lengths, on_step=5), "on_step is 5"),
    "a reward that is no number": (
        lambda t: t.train(PROMPTS, lambda p, r: ["good"] * len(r), steps=1),
        r"scores\[0\] is 'good'",
    ),
    "a reward that is NaN": (lambda t: t.train(PROMPTS, lambda p, r: [float("nan")] * len(r), steps=1), r"scores\[0\] is nan"),
    "texts for ids": (lambda t: t.generate(["t5 t6"]), "query 0 is 't5 t6'; expected a 1-D LongTensor"),
    "one query, and no list of them": (
        lambda t: t.generate(tiny.batch()[0][0]),
        r"query: one sequence of 2 token ids; expected a list of such, \[query\]",
    ),
    "one response of plain numbers": (lambda t: t.step([tiny.batch()[0][0]] * 4, [4, 5, 6, 7], [0.0] * 4), "one sequence of 4"),
    "no queries": (lambda t: t.generate([]), "no query"),
    "no tokens": (lambda t: t.generate(tiny.batch()[0], max_new_tokens=0), "max_new_tokens is 0"),
    "a batch of none": (lambda t: t.generate(tiny.batch()[0], batch_size=-1), "batch_size is -1"),
    "a score that is missing": (lambda t: t.step(*tiny.batch()[:2], [1.0, 2.0, 3.0, None]), r"scores\[3\] is None"),
    "a complex score": (lambda t: t.step(*tiny.batch()[:2], [1 + 2j] * 4), "a complex number"),
    "no scores": (lambda t: t.step(*tiny.batch()[:2], None), "scores is None; expected a list"),
    "scores by row": (lambda t: t.step(*tiny.batch()[:2], dict.fromkeys(range(4), 1.0)), "scores is {0: 1.0"),
    "an evaluation with one reward": (lambda t: evaluate(t, PROMPTS[:3], lambda p, r: [1.0]), r"gave \[1.0\] for 6 answers"),
    "no pad token": (lambda t: t.generate(tiny.batch()[0], pad_token_id=None), "pad_token_id is None"),
    "a pad token that is text": (lambda t: t.generate(tiny.batch()[0], pad_token_id="x"), "pad_token_id is 'x'"),
    "a pad token that the model lacks": (
        lambda t: t.generate(tiny.batch()[0], pad_token_id=9999),
        f"pad_token_id is 9999; expected 0 to {tiny.V - 1}",
    ),
    "queries that are none": (lambda t: t.generate(None), "query: None; expected a list"),
    "one number for queries": (lambda t: t.generate(5), "query: 5; expected a list"),
    "queries that cannot be counted": (lambda t: t.generate(q for q in tiny.batch()[0]), "query: .*; expected a list"),
    "a temperature that is text": (
        lambda t: t.generate(tiny.batch()[0], greedy=True, temperature="x"),
        "temperature is 'x'; expected a number above 0",
    ),
    "a temperature of 0": (lambda t: t.generate(tiny.batch()[0], greedy=True, temperature=0), "temperature is 0; expected"),
    "several top_k": (lambda t: t.generate(tiny.batch()[0], top_k=np.array([1, 2])), "top_k=.* would sample"),
    "nothing to inspect": (lambda t: t.inspect([], []), "no responses; expected at least one"),
    "prompts that are none": (lambda t: t.train(None, lengths), "prompts is None; expected a list"),
    "a prompt for four responses": (lambda t: t.step(*tiny.batch(), prompts=["a"]), "step: 1 prompts; expected"),
    "TRL's masks, where prompts are": (lambda t: t.step(*tiny.batch(), torch.ones(4, 8)), r"step: prompts\[0\] is tensor"),
    "prompts that are nothing": (lambda t: t.step(*tiny.batch(), prompts=[None] * 4), r"step: prompts\[0\] is None"),
    "a set of prompts": (lambda t: t.train({*PROMPTS}, lengths), "prompts is {.*; expected a list"),
    "a prompt to be judged twice": (
        lambda t: evaluate(t, [*PROMPTS[:3], PROMPTS[0]], lengths),
        r"prompts\[3\] is 't10 t11' again",
    ),
    "a number that is no list of queries": (lambda t: t.generate(torch.tensor(5)), "query: .*; expected a list"),
    "nothing to inspect at all": (lambda t: t.inspect(None, None), "no responses; expected at least one"),
    "a reward beyond numbers": (
        lambda t: evaluate(t, PROMPTS[:3], lambda p, r: [10**400] * len(r)),
        r"evaluate: scores\[0\] is 1000",
    ),
    "one text to judge by": (lambda t: evaluate(t, "t5", lengths), "prompts is 't5'; expected a list"),
    "no samples": (lambda t: evaluate(t, PROMPTS[:3], lengths, samples=0), "samples is 0; expected a whole number from 1"),
    "an evaluation with no reward": (lambda t: evaluate(t, PROMPTS[:3], lambda p, r: None), "gave None for 6 answers"),
    "an evaluation in words": (
        lambda t: evaluate(t, PROMPTS[:3], lambda p, r: ["good"] * len(r)),
        r"evaluate: scores\[0\] is 'good'",
    ),
    "samples, perhaps": (lambda t: t.generate(tiny.batch()[0], do_sample=0), "do_sample is 0; expected True or False"),
    "greedy in words": (lambda t: t.generate(tiny.batch()[0], greedy="no"), "greedy is 'no'; expected True or False"),
    "no folder": (lambda t: t.save(None), "save: folder is None; expected the path of a folder"),
    "a folder of no name": (lambda t: t.resume("x\0y"), "checkpoint is 'x.*y'; expected the path of a folder"),
    "something nested too deeply for JSON": (
        lambda t: t.save("never", extra={"a": functools.reduce(lambda inner, _: [inner], range(100_000))}),
        "save: extra has something that JSON cannot keep",
    ),
    "something that JSON cannot keep": (
        lambda t: t.save("never", extra={"a": object()}),
        "save: extra has something that JSON cannot keep",
    ),
}


@pytest.mark.parametrize("call, words", CALLS.values(), ids=CALLS)
def test_calls_that_cannot_be_meant_change_nothing(call, words):
    trainer = tiny.trainer(with_lora(llama(), b_scale=0.1))
    trainer.step(*tiny.batch())
    before = {name: thing.clone() if isinstance(thing, torch.Tensor) else thing for name, thing in state(trainer).items()}
    drawn = trainer.generator.get_state()
    with pytest.raises(InputError, match=words):
        call(trainer)
    assert same(state(trainer), before) and torch.equal(trainer.generator.get_state(), drawn) and len(trainer.history) == 1


def test_numbers_of_numpy_are_numbers():
    trainer = tiny.trainer()
    assert len(trainer.train((p for p in PROMPTS), lambda p, r: np.float32(lengths(p, r)), steps=np.int64(1))) == 1
    assert len(trainer.generate(tiny.batch()[0], max_new_tokens=np.int64(2))) == 4


def test_log_probs_of_the_same_words_after_another_query_are_not_taken():
    """`generate` notes how a response was drawn, and a step that trusts the sampler takes its log-probs from there."""
    trainer = tiny.trainer(with_lora(llama(), b_scale=0.2))
    queries, _, scores = tiny.batch()
    longer = [torch.cat([torch.tensor([40, 41, 42, 43]), query]) for query in queries]
    responses = trainer.generate(longer)
    trainer.sampler_is_exact = True
    assert trainer.inspect(queries, responses).sampler_logprobs is None
    assert trainer.inspect(longer, responses).sampler_logprobs is not None


def test_a_run_whose_reward_failed_goes_on_as_if_it_had_not():
    runs = []
    for fails in (False, True):
        trainer = tiny.trainer(with_lora(llama(), b_scale=0.1))
        if fails:
            with pytest.raises(RuntimeError):
                trainer.train(PROMPTS, lambda p, r: (_ for _ in ()).throw(RuntimeError("no network")), steps=1)
        trainer.train(PROMPTS, lengths, steps=2)
        runs.append(state(trainer))
    assert same(*runs)


def test_what_resume_would_refuse_does_not_take_the_place_of_what_it_takes(tmp_path):
    trainer = tiny.trainer(with_lora(llama(), b_scale=0.1))
    trainer.step(*tiny.batch())
    trainer.save(tmp_path / "run")
    with pytest.raises(InputError, match="extra is .*; expected a dict"):
        trainer.save(tmp_path / "run", extra=["best so far"])
    with torch.no_grad():
        trainer.parameters[0].view(-1)[0] = float("nan")
    with pytest.raises(InputError, match="not saved: .* not finite"):
        trainer.save(tmp_path / "run")
    tiny.trainer(with_lora(llama(), b_scale=0.1)).resume(tmp_path / "run")


def test_a_copy_that_somebody_made_of_a_checkpoint_stays(tmp_path):
    trainer = tiny.trainer()
    trainer.save(tmp_path / "run")
    for name in ("run.old", "run.bak"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    trainer.step(*tiny.batch())
    trainer.save(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.bak", "run.old"]
    assert (tmp_path / "run.old" / "trainer.json").read_text() != (tmp_path / "run" / "trainer.json").read_text()


def test_adapters_of_another_strength_are_not_resumed(tmp_path):
    with_alpha = lambda alpha: tiny.trainer(
        get_peft_model(llama(), LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    )
    with_alpha(8).save(tmp_path / "run")
    with pytest.raises(InputError, match="adapters with lora_alpha 8, the model's have 64"):
        with_alpha(64).resume(tmp_path / "run")


def test_groups_that_mix_prompts_are_no_groups():
    plain = tiny.trainer(num_generations=2)
    trainer = PPOTrainer(config=plain.config, model=plain.model, tokenizer=plain.tokenizer, advantages=advantages.group_mean)
    queries, responses, scores = tiny.batch()
    with pytest.raises(InputError, match="responses 0 to 1 are to different prompts"):
        trainer.step(queries, responses, scores)
    with pytest.raises(InputError, match="3 responses; expected a multiple of num_generations = 2"):
        trainer.inspect(queries[:3], responses[:3])


@pytest.mark.parametrize(
    "made",
    [None, torch.zeros(4), (torch.zeros(4), torch.zeros(4)), (np.zeros((4, 8)),) * 2],
    ids=["nothing", "one", "one each", "numpy"],
)
def test_advantages_of_another_shape_are_named(made):
    trainer = tiny.trainer(with_lora(llama()))
    trainer.advantages = lambda rollout, config, total: made
    with pytest.raises(
        InputError, match=r"function of advantages gave .*; expected two float tensors \(4, 8\), advantages and returns"
    ):
        trainer.step(*tiny.batch())
    assert trainer.steps_done == 0
    trainer.advantages = lambda *given: list(gae_advantages(*given))  # a list of two is two
    assert trainer.step(*tiny.batch()) and trainer.steps_done == 1


@pytest.mark.parametrize("model", ["gpt2", None, torch.nn.Linear(2, 2), llama().model, PolicyWithValueHead(llama())])
def test_what_is_no_language_model_gets_no_value_head(model):
    with pytest.raises(TypeError, match="causal_lm is .*; expected a causal language model"):
        PolicyWithValueHead(model)


def test_a_conversation_that_the_assistant_begins_keeps_its_turns_or_is_refused():
    chat = [{"role": "assistant", "content": "Hi! How can I help?"}, {"role": "user", "content": "Is tea good?"}]
    (prompt,) = load_prompts([{"prompt": chat}])
    assert turns(prompt) == chat
    with pytest.raises(InputError, match="the chat template refuses it"):
        models.encode_prompt(tiny.mistral_tokenizer(["a b"] * 5, 400), prompt)


@pytest.mark.parametrize(
    "parts, words",
    [
        (dict(config=None), "config is None; expected a PPOConfig"),
        (dict(config=dict(batch_size=4)), "config is .*; expected a PPOConfig"),
        (dict(ref_model="gpt2"), "ref_model is 'gpt2'; expected a causal language model"),
        (dict(ref_model=tiny.tokenizer()), "ref_model is TokenizersBackend.*; expected a causal language model"),
        (dict(tokenizer="gpt2"), "tokenizer is 'gpt2'; expected a tokenizer"),
    ],
)
def test_parts_that_make_no_trainer_get_a_sentence(parts, words):
    whole = dict(config=PPOConfig(), model=PolicyWithValueHead(with_lora(llama())), tokenizer=tiny.tokenizer())
    with pytest.raises(InputError, match=words):
        PPOTrainer(**whole | parts)


def test_what_lists_texts_is_a_list_of_texts():
    subset = torch.utils.data.Subset(PROMPTS, [0, 2])  # it has __getitem__ and no __iter__
    assert tiny.trainer().encode(subset)[0] == [PROMPTS[0], PROMPTS[2]]
    assert tiny.trainer().encode(np.array(PROMPTS[:2]))[0] == PROMPTS[:2]
    trainer = tiny.trainer()
    trainer.step(*tiny.batch(), prompts=(prompt for prompt in PROMPTS[:4]))  # it can be gone through once
    assert trainer.rollout.prompts == PROMPTS[:4]


def test_rotary_positions_have_no_end_and_learnt_ones_do():
    queries = [torch.full((150,), 5)] * 4
    long = tiny.trainer(llama(rope_scaling={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}))
    assert len(long.generate(queries, max_new_tokens=2)) == 4
    with pytest.raises(InputError, match="query 0 has 127 tokens and its response 5; expected at most 128 together"):
        tiny.trainer(tiny.gpt2(n_positions=128)).generate([torch.full((127,), 5)], max_new_tokens=5)
    with pytest.raises(InputError, match="query 0 has 100 tokens and its response 40; expected at most 128 together"):
        gpt2 = tiny.trainer(tiny.gpt2(n_positions=128))
        gpt2.step([torch.full((100,), 5)] * 4, [torch.full((40,), 5)] * 4, [0.0] * 4)


def test_a_config_with_a_field_more_is_a_config():
    @dataclasses.dataclass
    class Mine(PPOConfig):
        note: str = "mine"

    assert Mine(learning_rate=1).learning_rate == 1.0


@pytest.mark.parametrize(
    "name", ["learning_rate", "value_learning_rate", "cliprange", "init_kl_coef", "score_clip", "ratio_threshold"]
)
@pytest.mark.parametrize("value", [1e30, 10**30, 1e31, 10**300, -1e300])
def test_a_setting_is_refused_or_a_step_can_be_made_with_it(name, value):
    """In fp32 numbers end at 3.4e38: what is larger would fail inside a step, with Adam changed already."""
    try:
        trainer = tiny.trainer(with_lora(llama(), b_scale=0.1), **{name: value})
    except InputError as error:
        assert f"PPOConfig.{name} is " in str(error) and (abs(value) > 1e30 or value < 0)
    else:
        assert (abs(value) <= 1e30 or name == "ratio_threshold") and type(getattr(trainer.config, name)) is float
        trainer.step(*tiny.batch())


def test_rewards_of_an_evaluation_stay_as_precise_as_they_came():
    assert set(evaluate(tiny.trainer(), PROMPTS[:2], lambda p, r: [0.1] * len(r)).rewards.tolist()) == {0.1}


# ---------------------------------------------------------------- what TRL had, and what it did not look at


# TRL 0.11.4: what PPOTrainer, its step and its generate take, and its public methods and attributes (trainer/ppo_trainer.py).
TAKEN = "dataset optimizer data_collator num_shared_layers lr_scheduler training_data_collator".split()
HAD = """accelerator batched_forward_pass compare_step compute_advantages compute_rewards config create_model_card current_device
    current_step data_collator dataloader dataset gather_stats generate highest_reward is_distributed is_encoder_decoder
    is_peft_model is_using_text_environment kl_ctl log_stats loss lr_scheduler model model_params optimizer optional_peft_ctx
    prepare_dataloader prepare_model_inputs push_to_hub push_to_hub_kwargs record_step_stats ref_model running save_pretrained
    step tokenizer train_minibatch""".split()


def test_what_trl_s_trainer_took_and_had_is_here_or_a_sentence_that_says_what_to_use():
    trainer, missing = tiny.trainer(), []
    adam = torch.optim.Adam(trainer.parameters)  # its repr has many lines
    for name in TAKEN:
        with pytest.raises(InputError, match=f"^PPOTrainer does not take {name} .given as Adam .*: ") as error:
            PPOTrainer(trainer.config, trainer.model, None, trainer.tokenizer, **{name: adam})
        assert "\n" not in str(error.value)
    for name in HAD:
        if not hasattr(trainer, name):
            missing.append(name)
            with pytest.raises(AttributeError, match=f"^PPOTrainer has no {name}: "):
                getattr(trainer, name)
    assert set(missing) > {"dataloader", "kl_ctl", "log_stats", "save_pretrained"}
    with pytest.raises(InputError, match="^step does not take response_masks .*: every token of a response counts"):
        trainer.step(*tiny.batch(), response_masks=None)
    for name in ("length_sampler", "generate_ref_response"):
        with pytest.raises(InputError, match=f"^generate: unknown option {name}=1: "):
            trainer.generate(tiny.batch()[0], **{name: 1})
    assert trainer.steps_done == 0


def test_what_nobody_had_is_refused_by_its_name():
    trainer = tiny.trainer()
    with pytest.raises(InputError, match="^PPOTrainer does not take reference .given as None.$"):
        PPOTrainer(trainer.config, trainer.model, reference=None)
    with pytest.raises(AttributeError, match="'PPOTrainer' object has no attribute 'rollouts'"):
        _ = trainer.rollouts


def test_an_attribute_that_a_fault_inside_lacks_is_named_and_not_the_property(monkeypatch):
    def fault(lm):
        raise AttributeError("'OtherModel' object has no attribute 'layers'")

    monkeypatch.setattr("rlhf_helpers.fast.can_unpack", fault)
    with pytest.raises(AttributeError, match="'OtherModel' object has no attribute 'layers'"):
        tiny.trainer().generate(tiny.batch()[0])


@pytest.mark.parametrize("which", [0, 1], ids=["queries", "responses"])
def test_a_padded_tensor_is_no_list_of_sequences(which):
    """Its pads would be read, or learnt, as tokens."""
    trainer, given = tiny.trainer(), list(tiny.batch())
    given[which] = torch.nn.utils.rnn.pad_sequence(given[which], batch_first=True)
    words = "one tensor of 2 dimensions; expected a list of 1-D LongTensors, without padding"
    for call in (lambda: trainer.step(*given), lambda: trainer.inspect(*given[:2])):
        with pytest.raises(InputError, match=words):
            call()
    with pytest.raises(InputError, match=words):
        trainer.generate(given[which])
    assert trainer.steps_done == 0


def test_a_refusal_names_the_call():
    trainer, (queries, responses, scores) = tiny.trainer(), tiny.batch()
    with pytest.raises(InputError, match="^inspect: 3 queries; expected 2"):
        trainer.inspect(queries[:3], responses[:2])
    with pytest.raises(InputError, match="^step: 3 scores; expected "):
        trainer.step(queries, responses, scores[:3])


@pytest.mark.parametrize(
    "order", [[0, 0, 0, 0], [0, 1, 2], [], [0, 1, 2, 4], [0.0, 1.0, 2.0, 3.0], None, "0123", [[0, 1], [2, 3]]]
)
def test_an_order_of_minibatches_that_is_none_is_refused(order):
    trainer = tiny.trainer()
    before, trainer.permutation = tiny.state(trainer), lambda n: order
    with pytest.raises(InputError, match="^permutation gave .*; expected each of 0 to 3 once"):
        trainer.step(*tiny.batch())
    assert tiny.same(before, tiny.state(trainer))


def test_a_model_with_an_encoder_or_without_a_cache_is_refused():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(InputError, match="an encoder and a decoder .T5ForConditionalGeneration.; expected a decoder alone"):
        tiny.trainer(t5)
    with pytest.raises(InputError, match="^ref_model has an encoder and a decoder"):
        tiny.trainer(ref_model=t5)
    mamba = tiny.trainer(MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=16, num_hidden_layers=1, state_size=4)))
    with pytest.raises(
        InputError, match="MambaForCausalLM keeps no past_key_values; expected a decoder with a key-value cache"
    ):
        mamba.generate(tiny.batch()[0])
