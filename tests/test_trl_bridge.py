"""The bridge to TRL 1.12: what our parts say through it is what they say by themselves, and NF4 with LoRA really trains."""

import importlib
import importlib.metadata
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_helpers import advantages, dpo, trl_bridge
from rlhf_helpers.config import CPU, PPOConfig
from rlhf_helpers.errors import InputError
from rlhf_helpers.models import PolicyWithValueHead
from rlhf_helpers.reward import RewardModel, pair_accuracy
from rlhf_helpers.sampling import pad_left
from rlhf_helpers.trl_bridge import (
    RewardOnText,
    ValueOnPolicy,
    ppo_trainer,
    train_reward_model_with_trl,
    train_with_trl,
    trl_arguments,
)
from tests import tiny
from tests.tiny import EOS, PAD, WORDS, llama, with_lora

WHY = trl_bridge.missing()
needs_trl = pytest.mark.skipif(bool(WHY), reason=WHY or "")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

PROMPTS = [f"t{i} t{i + 1}" for i in range(4, 12)]
CONFIG = dict(batch_size=4, mini_batch_size=4, ppo_epochs=1, learning_rate=1e-2, adap_kl_ctrl=False, max_new_tokens=8)
LENGTHS = lambda prompts, texts: [float(len(text.split()) % 5) for text in texts]


def tokenizer_of_words():
    """A policy's tokenizer that knows the words of the tiny reward model, under other numbers."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *reversed(WORDS[5:])])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


# ---------------------------------------------------------------- without TRL's PPO


def without(monkeypatch, module, version):
    """Make `module` unknown to importlib, and `version` the one that is installed."""

    def import_module(name, *rest):
        if name == module:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)


def test_a_trl_without_ppo_gives_one_sentence(monkeypatch):
    without(monkeypatch, "trl.experimental.ppo", "1.13.0")
    sentence = "TRL 1.13.0 has no PPOTrainer (removed in 1.13); expected trl==1.12.0: pip install trl==1.12.0"
    assert trl_bridge.missing() == sentence
    policy = PolicyWithValueHead(with_lora(llama()))
    with pytest.raises(ImportError) as error:
        train_with_trl(policy, tiny.tokenizer(), PROMPTS, LENGTHS, PPOConfig(**CONFIG), steps=1)
    assert str(error.value) == sentence


def test_no_trl_at_all_gives_one_sentence(monkeypatch):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert trl_bridge.missing() == "TRL is not installed; expected trl==1.12.0: pip install trl==1.12.0"


@needs_trl
def test_nothing_is_missing_where_trl_has_ppo():
    assert {name: trl_bridge.missing(name) for name in trl_bridge.MODULES} == dict.fromkeys(trl_bridge.MODULES)


# ---------------------------------------------------------------- the reward


def rows(tokenizer, prompts, responses):
    """(ids as TRL's rollout holds them, width of the prompts): prompts padded on the left, responses on the right."""
    queries = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    queries, _ = pad_left(queries, tokenizer.pad_token_id)
    answers = [torch.tensor(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]) for text in responses]
    answers = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=tokenizer.pad_token_id)
    return torch.cat([queries, answers], 1), queries.shape[1]


@needs_trl
def test_through_trl_the_scores_are_the_reward_models_on_the_decoded_texts(reward_folders):
    get_reward = importlib.import_module("trl.experimental.utils").get_reward
    rm, tokenizer = RewardModel(tiny.bert(), tiny.bert_tokenizer(), mean=0.3, std=2.0), tokenizer_of_words()
    prompts = ["write about the sun", "a cat", "the dog likes rain", "warm"]
    responses = ["the sun is lovely", "bad", "a lovely good dog and very warm rain", "is cold"]
    ids, width = rows(tokenizer, prompts, responses)
    bridge = RewardOnText(rm, tokenizer, [*prompts, "cold"])
    _, scores, _ = get_reward(bridge, ids, tokenizer.pad_token_id, width)
    torch.testing.assert_close(scores, rm(prompts, responses))
    assert scores.std() > 0.1
    _, scores, _ = get_reward(bridge, ids[:2, :-3], tokenizer.pad_token_id, width)  # other widths, other neighbours
    torch.testing.assert_close(scores, rm(prompts[:2], responses[:2]))


def test_a_row_is_split_where_the_prompt_ends_and_an_unknown_prompt_is_an_error():
    bridge = RewardOnText(LENGTHS, tiny.tokenizer(), PROMPTS)
    assert bridge.split([4, 5, 6, EOS]) == ("t4 t5", [6, EOS])
    assert bridge.split([5, 6]) == ("t5 t6", [])
    with pytest.raises(ValueError, match="begins with none of the 8 prompts: 't90 t91'"):
        bridge.split([90, 91])


def test_prompts_that_begin_with_one_another_are_refused():
    with pytest.raises(ValueError, match="prompt 't4 t5 t6' begins with prompt 't4 t5'"):
        RewardOnText(LENGTHS, tiny.tokenizer(), ["t4 t5", "t4 t5 t6"])


# ---------------------------------------------------------------- the value model


def value_inputs(batch=3, width=10):
    ids = torch.randint(4, tiny.V, (batch, width), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :4] = False
    return dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))


def test_the_value_model_owns_nothing_but_the_policys_value_head(nf4):
    policy = PolicyWithValueHead(nf4())
    value = ValueOnPolicy(policy)
    assert [id(p) for p in value.parameters()] == [id(p) for p in policy.v_head.parameters()]
    assert sum(p.nbytes for p in value.parameters()) == 4 * (64 + 1) and not list(value.buffers())


def test_a_pass_through_the_value_model_keeps_its_last_hidden_state_and_nothing_of_the_body(nf4):
    value, kept = ValueOnPolicy(PolicyWithValueHead(nf4())), []
    own = {p.data_ptr() for p in value.parameters()}
    pack = lambda tensor: kept.append(tensor) or tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value.score(value.backbone(**value_inputs()).hidden_states[-1])
    assert sum(t.nbytes for t in kept if t.data_ptr() not in own) == 3 * 10 * 64 * 4


def test_the_values_are_the_heads_on_the_reference_whatever_the_adapters_say():
    values = []
    for b_scale in (0.0, 0.5):
        policy = PolicyWithValueHead(with_lora(llama(), b_scale=b_scale))
        policy.v_head.summary.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        value, inputs = ValueOnPolicy(policy), value_inputs()
        values.append(value.score(value.backbone(**inputs).hidden_states[-1])[..., 0])
        with policy.adapters_off(), torch.no_grad():
            torch.testing.assert_close(values[-1][:, 3:-1], policy(inputs["input_ids"], inputs["attention_mask"].long(), 6)[1])
        assert all(p.requires_grad for name, p in policy.named_parameters() if "lora_" in name)
    torch.testing.assert_close(*values)


# ---------------------------------------------------------------- PPO


@needs_trl
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_real_update_in_nf4_moves_every_adapter_and_the_head_and_no_base_weight(checkpointing, nf4):
    policy = PolicyWithValueHead(nf4())
    if checkpointing:
        policy.enable_gradient_checkpointing()
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():  # the pass that makes bitsandbytes pack 4-bit layers on some CPUs
        policy.eval()(ids, torch.ones_like(ids), 2)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    history = train_with_trl(policy, tiny.tokenizer(), PROMPTS, LENGTHS, PPOConfig(**CONFIG, seed=1), steps=1)
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if "lora_B" in name} < moved
    assert all("lora_" in name or "v_head" in name for name in moved) and "v_head.summary.weight" in moved
    assert [row["step"] for row in history] == [1] and trl_bridge.KEYS.keys() < history[0].keys()


@needs_trl
def test_trls_first_kl_is_zero_and_on_step_is_called_as_by_our_trainer():
    policy, seen = PolicyWithValueHead(with_lora(llama())), []
    on_step = lambda trainer, stats: seen.append((len(trainer.history), stats["step"]))
    history = train_with_trl(policy, tiny.tokenizer(), PROMPTS, LENGTHS, PPOConfig(**CONFIG), steps=3, on_step=on_step)
    assert abs(history[0]["objective/kl"]) < 1e-4 and history[2]["objective/kl"] != 0
    assert seen == [(1, 1), (2, 2), (3, 3)]
    assert [row["ppo/learning_rate"] for row in history] == [1e-2] * 3


@needs_trl
def test_pad_must_not_be_eos_because_trl_masks_by_id(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="pad is EOS"):
        ppo_trainer(PolicyWithValueHead(with_lora(llama())), tokenizer, PROMPTS, LENGTHS, PPOConfig(**CONFIG), 1, tmp_path)
    assert tiny.tokenizer().pad_token_id == PAD != EOS


@needs_trl
def test_the_settings_correspond(tmp_path):
    config = CPU.ppo_config(gradient_accumulation_steps=2, missing_eos_penalty=1.0)
    args = trl_arguments(config, 7, tmp_path)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.num_mini_batches) == (8, 2, 1)
    assert (args.total_episodes, args.response_length, args.kl_coef, args.temperature) == (7 * 16, 64, 0.05, 0.7)
    for name in ("gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "learning_rate", "seed", "missing_eos_penalty"):
        assert getattr(args, name) == getattr(config, name)
    args = trl_arguments(CPU.ppo_config(mini_batch_size=4, gradient_accumulation_steps=1), 7, tmp_path)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.num_mini_batches) == (16, 1, 4)


@pytest.mark.parametrize("setting, words", [
    (dict(adap_kl_ctrl=True), "adap_kl_ctrl = True; expected False"),
    (dict(kl_penalty="full"), "kl_penalty = 'full'; expected 'kl'"),
    (dict(score_clip=2.0), "score_clip = 2.0; expected None"),
    (dict(mini_batch_size=4, gradient_accumulation_steps=2), "one optimizer step an epoch"),
])  # fmt: skip
def test_what_trl_cannot_do_is_refused_in_a_sentence(setting, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        trl_arguments(CPU.ppo_config(**setting), 1, tmp_path)


# ---------------------------------------------------------------- the reward model


@needs_trl
def test_trls_reward_trainer_learns_pairs_and_its_model_scores_as_it_was_trained(reward_folders, tmp_path):
    subjects = ("cat", "dog", "sun", "rain")
    pairs = [dict(prompt=f"write about the {x}", chosen=f"{x} is good", rejected=f"{x} is bad") for x in subjects]
    rm, log = train_reward_model_with_trl(pairs * 8, encoder=str(reward_folders[1]), batch_size=8, epochs=4, learning_rate=1e-2)
    assert pair_accuracy(rm, pairs)[0] == 1.0 and log[-1]["loss"] < 0.3 and not rm.model.training
    rm.save(tmp_path / "rm")
    loaded = RewardModel.load(tmp_path / "rm")
    assert set(loaded.encode(["a cat"], ["good"])) == {"input_ids", "attention_mask"}
    assert loaded(["a cat"], ["good"]) == rm(["a cat"], ["good"])


def test_products_are_bf16_while_it_lasts_and_the_logits_fp32(reward_folders, monkeypatch):
    monkeypatch.setattr(trl_bridge, "has_fast_bf16", lambda: True)
    rm, seen = RewardModel.load(reward_folders[1]), []
    rm.model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with pytest.raises(ValueError), trl_bridge.bf16_products(rm.model):
        assert rm.model(**rm.encode(["a cat"], ["good"])).logits.dtype == torch.float32
        raise ValueError
    rm.model(**rm.encode(["a cat"], ["good"]))
    assert seen == [torch.bfloat16, torch.float32]


@needs_trl
def test_dpo_moves_the_adapters_in_fp32_and_prefers_the_chosen(nf4):
    policy, tokenizer = PolicyWithValueHead(nf4()), tiny.tokenizer()
    pairs = [dict(prompt=f"t{i} t{i + 1}", chosen="t20 t21 t22", rejected="t40 t41") for i in range(4, 20)]
    rows = dpo.dpo_rows(pairs, tokenizer, ended=lambda text: text.endswith("t22"))
    assert rows[0] == dict(prompt_ids=[4, 5], chosen_ids=[20, 21, 22, EOS], rejected_ids=[40, 41])
    history = dpo.train_with_dpo(
        policy, tokenizer, rows, beta=0.1, learning_rate=1e-2, epochs=4, batch_size=8, mini_batch_size=4
    )
    assert [row["step"] for row in history] == list(range(1, 9))
    assert history[0]["loss"] == pytest.approx(0.6931, abs=3e-3)  # log 2, in bf16
    assert history[-1]["loss"] < 0.5 and history[-1]["accuracy"] == 1
    lm = policy.pretrained_model
    assert lm.active_adapters == ["default"] and list(lm.peft_config) == ["default"]
    adapters = {name: p for name, p in lm.named_parameters() if "lora_" in name}
    assert all(p.dtype == torch.float32 for p in adapters.values())
    assert all(p.any() for name, p in adapters.items() if "lora_B" in name)


@pytest.mark.parametrize("batch_size, mini_batch_size", [(4, 8), (6, 4), (32, 16), (0, 1), (8, 2.0)])
def test_dpo_refuses_sizes_that_do_not_fit(nf4, batch_size, mini_batch_size):
    policy = PolicyWithValueHead(nf4())
    before = {name: p.clone() for name, p in policy.named_parameters() if p.requires_grad}
    with pytest.raises(InputError, match="train_with_dpo: .*batch_size .*expected a (batch of whole|whole number)"):
        dpo.train_with_dpo(policy, tiny.tokenizer(), [{}] * 8, 0.1, batch_size=batch_size, mini_batch_size=mini_batch_size)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters() if p.requires_grad)


@needs_trl
@pytest.mark.parametrize("kind, ours", [("GRPO", advantages.group_normalised), ("RLOO", advantages.leave_one_out)])
def test_trls_group_trainers_use_the_advantages_that_ours_make_and_learn_in_fp32(nf4, tmp_path, capsys, kind, ours):
    from datasets import Dataset

    lm, noted = nf4(), []

    def reward(prompts, completions, **_):
        noted[:] = [float(i * i % 7) for i in range(len(completions))]
        return noted

    arguments = trl_bridge.trl_part(f"{kind}Config")(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_completion_length=6, beta=0.05,
        learning_rate=1e-6, max_steps=1, logging_steps=1, bf16=False, gradient_checkpointing=False, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    with trl_bridge.own_adapters(lm):
        trainer = trl_bridge.trl_part(f"{kind}Trainer")(
            model=lm, reward_funcs=reward, args=arguments, processing_class=tiny.tokenizer(),
            train_dataset=Dataset.from_list([dict(prompt=prompt) for prompt in PROMPTS]),
        )  # fmt: skip
    adapters = {name: p for name, p in lm.named_parameters() if "lora_" in name and ".default." in name}
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    capsys.readouterr()
    trl_bridge.train_quietly(trainer)
    assert capsys.readouterr().out == ""
    assert all(p.any() for name, p in adapters.items() if "lora_B" in name)  # steps of 1e-6 count
    scores = torch.tensor(noted)[:, None]
    rollout = SimpleNamespace(rewards=scores, mask=torch.ones_like(scores, dtype=torch.bool), values=torch.zeros_like(scores))
    theirs = torch.tensor(list(trainer._logs["advantages"]))
    expected = ours(rollout, PPOConfig(num_generations=4))[0][:, 0]
    torch.testing.assert_close(theirs * theirs.square().mean().rsqrt(), expected, atol=1e-4, rtol=1e-4)
