"""What somebody does to a model or a trainer on the way, or hands over by mistake: a sentence each, or a warning, and nothing moves."""

import dataclasses
import math
import warnings

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlhf_helpers import models
from rlhf_helpers.config import CPU
from rlhf_helpers.errors import InputError
from rlhf_helpers.rollout import gae_advantages
from tests import tiny


def reloaded(trainer, folder):
    """An adapter of before, loaded in the place of the one that the trainer knows."""
    lm = trainer.model.pretrained_model
    lm.save_pretrained(folder)
    lm.load_adapter(folder, "other", is_trainable=True)
    lm.set_adapter("other")
    lm.delete_adapter("default")
    lm.load_adapter(folder, "default", is_trainable=True)
    lm.set_adapter("default")


def all_frozen(trainer, folder):
    trainer.model.pretrained_model.requires_grad_(False)


def new_head(trainer, folder):
    trainer.model.v_head.summary = torch.nn.Linear(tiny.llama().config.hidden_size, 1)


def unloaded(trainer, folder):
    trainer.model.pretrained_model = trainer.model.pretrained_model.unload()


@pytest.mark.parametrize("change", [reloaded, all_frozen, new_head, unloaded])
def test_what_learns_must_be_what_the_optimizer_has(change, tmp_path):
    trainer = tiny.trainer()
    queries, responses, scores = tiny.batch()
    trainer.step(queries, responses, scores)
    change(trainer, tmp_path / "adapters")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    words = "step: (weights that the trainer's optimizer moves are not|nothing of the policy learns)"
    with pytest.raises(InputError, match=words):
        trainer.step(queries, responses, scores)
    assert tiny.same(before, dict(trainer.model.named_parameters())) and trainer.steps_done == 1
    if change is all_frozen:
        return trainer.save(tmp_path / "kept")
    for call in (lambda: trainer.generate(queries), lambda: trainer.save(tmp_path / "kept")):
        with pytest.raises(InputError, match="(generate|save): weights that the trainer's optimizer moves"):
            call()
    assert not (tmp_path / "kept").exists()


def test_a_value_head_may_be_frozen_on_the_way():
    trainer = tiny.trainer()
    trainer.model.v_head.requires_grad_(False)
    head = trainer.model.v_head.summary.weight.clone()
    trainer.step(*tiny.batch())
    assert torch.equal(trainer.model.v_head.summary.weight, head) and any(p.any() for p in tiny.adapters(trainer).values())


@pytest.mark.parametrize("begun", ["OLoRA", "pissa"])
def test_adapters_that_rewrite_what_is_under_them_are_refused_in_any_spelling_and_as_the_second(begun):
    lm = tiny.with_lora(tiny.llama())
    lm.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=begun))
    lm.base_model.set_adapter([["default", "second"], ["second", "default"]][begun == "pissa"])
    with pytest.raises(InputError, match=f"init_lora_weights='{begun}' rewrites"):
        tiny.trainer(lm)


def test_rows_of_a_padded_tensor_of_queries_are_told():
    trainer = tiny.trainer()
    queries, responses, scores = tiny.batch()
    rows = [torch.nn.functional.pad(query, (9 - len(query), 0), value=tiny.PAD) for query in queries]
    for call in (lambda: trainer.generate(rows), lambda: trainer.step(rows, responses, scores)):
        with pytest.warns(UserWarning, match=r"query \d looks like a row of a padded tensor: [2-9] times the pad") as told:
            call()
        assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.generate([torch.cat([torch.tensor([tiny.PAD]), query[:3]]) for query in queries])  # a BOS of that id


def test_a_family_that_places_its_tokens_in_a_way_of_its_own_is_told():
    lm = tiny.gpt2()
    forward = lm.forward

    def from_7(input_ids, position_ids=None, **options):  # RoBERTa's begin behind its pad's id
        places = torch.arange(input_ids.shape[1])[None] + 7 if position_ids is None else position_ids
        return forward(input_ids=input_ids, position_ids=places, **options)

    lm.forward = from_7
    with pytest.warns(UserWarning, match=r"GPT2LMHeadModel reads a prompt behind pads otherwise .* [0-9.]+ nats apart") as told:
        tiny.trainer(lm)
    assert told[-1].filename == tiny.__file__
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*reads a prompt behind pads")
        tiny.trainer(tiny.gpt2()), tiny.trainer(tiny.with_lora(tiny.llama().to(torch.bfloat16)))


def test_an_eos_that_the_model_does_not_have_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    lm = tiny.with_lora(tiny.llama())
    lm.generation_config.eos_token_id = None
    trainer = tiny.trainer(lm, tokenizer=tokenizer)
    with pytest.raises(
        InputError, match=f"EOS of id {tiny.V}, which the model does not have.*; expected -1 .never. to {tiny.V - 1}"
    ):
        trainer.generate([torch.tensor([5, 6])])
    assert trainer.generate([torch.tensor([5, 6])], eos_token_id=7)


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1], ids=["advantages", "returns"])
def test_advantages_that_are_no_numbers_are_told(number, which):
    trainer = tiny.trainer()

    def broken(rollout, config, total):
        made = gae_advantages(rollout, config, total)
        made[which][0, 0] = number
        return made

    trainer.advantages = broken
    with pytest.warns(UserWarning, match="advantages have numbers that are not finite"):
        assert trainer.step(*tiny.batch())["ppo/skipped_updates"] == 1
    trainer.advantages = lambda rollout, config, total: (rollout.mask, rollout.values)
    with pytest.raises(InputError, match="expected two float tensors"):
        trainer.step(*tiny.batch())


def test_a_step_without_gradients_is_refused():
    trainer = tiny.trainer()
    with torch.no_grad(), pytest.raises(InputError, match="gradients are switched off"):
        trainer.step(*tiny.batch())
    assert trainer.steps_done == 0


def test_another_optimizer_is_named_when_it_cannot_be_kept(tmp_path):
    trainer = tiny.trainer()
    trainer.optimizer = torch.optim.SGD(trainer.parameters, lr=1e-3, momentum=0.9)
    trainer.step(*tiny.batch())
    with pytest.raises(InputError, match="trainer.optimizer keeps momentum_buffer; expected Adam's"):
        trainer.save(tmp_path / "kept")


def test_adapters_of_another_strength_by_pattern_are_refused(tmp_path):
    tiny.trainer().save(tmp_path / "kept")
    config = tiny.with_lora(tiny.llama()).active_peft_config
    plain = dict(r=config.r, lora_alpha=config.lora_alpha, target_modules=["q_proj", "v_proj"])
    for pattern in "alpha_pattern", "rank_pattern":
        other = get_peft_model(tiny.llama(), LoraConfig(**plain, **{pattern: {"q_proj": 64}}))
        with pytest.raises(InputError, match=f"adapters with {pattern}"):
            tiny.trainer(other).resume(tmp_path / "kept")


def test_a_head_inside_a_wrapper_of_peft_s_has_its_true_width():
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    policy = models.PolicyWithValueHead(get_peft_model(tiny.llama(tie_word_embeddings=True), config))
    assert policy.v_head.summary.in_features == tiny.llama().config.hidden_size


def test_a_head_in_4_bits_that_are_stored_as_bf16_has_its_true_width_too():
    lm = tiny.llama(hidden_size=64)
    lm.lm_head = bitsandbytes.nn.Linear4bit(64, tiny.V, bias=False, quant_type="nf4", quant_storage=torch.bfloat16).to("cpu")
    assert lm.lm_head.weight.shape[-1] == 1 and models.PolicyWithValueHead(lm).v_head.summary.in_features == 64


def test_an_optimizer_may_leave_the_value_head_out_and_move_further_weights():
    trainer = tiny.trainer()
    trainer.optimizer = torch.optim.Adam([p for p in trainer.model.pretrained_model.parameters() if p.requires_grad], lr=1e-2)
    trainer.step(*tiny.batch())
    trainer.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    trainer.step(*tiny.batch())
    assert any(p.any() for p in tiny.adapters(trainer).values())


def test_a_family_that_gets_no_adapters_is_named(llama_folder):
    profile = dataclasses.replace(CPU, model=str(llama_folder), lora_targets=("nowhere",))
    with pytest.raises(InputError, match="LlamaForCausalLM gets no adapters .*; expected layers named nowhere"):
        with pytest.MonkeyPatch.context() as peft:
            peft.setattr(models, "get_peft_model", refused)
            models.load_policy(profile, quantize=False)


def refused(lm, config):
    raise ValueError("Please specify `target_modules` or `target_parameters` in `peft_config`")
