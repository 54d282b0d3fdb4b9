"""The policy: tokenizer, 4-bit loading, the forward pass, the value head, adapters off, and gradients through 4-bit layers."""

import json
import shutil
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing

from rlhf_helpers import models
from rlhf_helpers.config import Profile
from rlhf_helpers.errors import InputError
from rlhf_helpers.models import (
    PolicyWithValueHead,
    encode_prompt,
    is_4bit,
    load_causal_lm,
    load_policy,
    load_tokenizer,
    resolve,
    response_logits,
)
from rlhf_helpers.quirks import keep_gradients
from rlhf_helpers.sampling import pad_left
from tests import tiny

PROFILE = dict(name="tiny", lora_r=4, lora_alpha=8)
FAMILIES = pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])


def inputs(n=4):
    """(input_ids, attention_mask, T) of a batch with pads on both sides, and the sequences it was made from."""
    queries, responses, _ = tiny.batch(n)
    ids, mask = pad_left(queries, tiny.PAD)
    width = max(len(r) for r in responses)
    right = torch.nn.utils.rnn.pad_sequence(responses, batch_first=True, padding_value=tiny.PAD)
    real = torch.arange(width) < torch.tensor([len(r) for r in responses])[:, None]
    return (torch.cat([ids, right], 1), torch.cat([mask, real.long()], 1), width), queries, responses


# ---------------------------------------------------------------- names, tokenizer, loading


def test_a_folder_and_a_hub_name_are_what_they_are_and_anything_else_is_refused(llama_folder, tmp_path):
    assert resolve(llama_folder) == str(llama_folder)
    assert resolve("org/model") == "org/model"
    for wrong in ("no-such-name", str(tmp_path), "./a/b", "a/b/c"):
        with pytest.raises(ValueError, match="unknown model .*; expected one of smollm2-135m-instruct"):
            resolve(wrong)


@pytest.mark.parametrize("beside", [[], ["config.json"], ["tokenizer.json"]], ids=["alone", "with a model", "with a tokenizer"])
def test_adapters_are_no_model_whatever_lies_beside_them(beside, tmp_path):
    """transformers would put them onto their base, and new ones would take their place."""
    for name in ["adapter_config.json", *beside]:
        (tmp_path / name).write_text("{}")
    for use in (resolve, load_tokenizer, load_causal_lm):
        with pytest.raises(ValueError, match="a folder of adapters, which new ones would silently replace; expected the model"):
            use(tmp_path)


def test_adapters_of_a_hub_are_no_model_either(llama_folder, tmp_path, monkeypatch):
    """There only transformers sees what it is: here it is asked for a folder that `resolve` cannot look into."""
    tiny.with_lora(load_causal_lm(llama_folder, quantize=False)).save_pretrained(tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": str(llama_folder)}))
    monkeypatch.setattr(models, "resolve", lambda model: str(tmp_path))
    with pytest.raises(ValueError, match="org/adapters: a folder of adapters, which new ones would silently replace"):
        load_causal_lm("org/adapters", quantize=False)


@pytest.mark.parametrize("quantize", [True, False])
def test_a_model_without_some_of_its_weights_is_refused(llama_folder, tmp_path, quantize):
    """transformers would fill them with random numbers, and in 4 bits leave something that is no 4-bit weight."""
    shutil.copytree(llama_folder, tmp_path / "m")
    about = json.loads((tmp_path / "m" / "config.json").read_text())
    about = about | {"num_hidden_layers": about["num_hidden_layers"] + 1} | {"layer_types": None}
    (tmp_path / "m" / "config.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="m: cannot be used as a model .no weights for model.layers.2.input_layernorm.weight"):
        load_causal_lm(tmp_path / "m", quantize=quantize)


def test_the_tokenizer_pads_on_the_left(llama_folder):
    assert load_tokenizer(llama_folder).padding_side == "left"


@pytest.mark.parametrize("special, pad", [(("<pad>", "<eos>", "<bos>", "<unk>"), "<pad>"), (("P", "E", "B", "U"), "E")])
def test_a_missing_pad_token_is_an_unused_one_before_it_is_eos(special, pad, tmp_path):
    tokenizer = tiny.tokenizer(special=special)
    tokenizer.pad_token = None
    tiny.llama().config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == pad and len(load_tokenizer(tmp_path)) == tiny.V


def test_a_prompt_is_rendered_by_the_chat_template_with_one_bos():
    tokenizer = tiny.tokenizer()
    assert encode_prompt(tokenizer, "t10 t11").tolist() == [10, 11]
    closing = tiny.tokenizer()
    closing.backend_tokenizer.post_processor = TemplateProcessing("$A <eos>", special_tokens=[("<eos>", tiny.EOS)])
    assert closing("t10 t11")["input_ids"] == [10, 11, tiny.EOS]  # as some tokenizers are saved, and the answer comes after it
    assert encode_prompt(closing, "t10 t11").tolist() == [10, 11]
    tokenizer.chat_template = "{{ bos_token }} t5 {{ messages[0]['content'] }}{% if add_generation_prompt %} t6{% endif %}"
    ids = encode_prompt(tokenizer, "t10 t11")
    assert ids.tolist() == [tiny.BOS, 5, 10, 11, 6] and ids.dtype == torch.long


def test_the_base_is_nf4_with_double_quantization_frozen_and_in_eval_mode(llama_folder):
    lm = load_causal_lm(llama_folder)
    layers = [module for module in lm.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and is_4bit(lm)  # seven in each of two layers
    assert all(layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested for layer in layers)
    assert not lm.training and not any(p.requires_grad for p in lm.parameters())
    assert not is_4bit(load_causal_lm(llama_folder, quantize=False))


def test_exactly_the_adapters_and_the_value_head_train_and_they_are_fp32(llama_folder):
    policy, _ = load_policy(Profile(model=str(llama_folder), **PROFILE))
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3 if "lora" in name else 0] for name in trained} == {"lora_A", "lora_B", "v_head"}
    assert len(trained) == 2 * 2 * 2 + 2  # two layers, two targets, A and B; weight and bias
    assert all(p.dtype == torch.float32 for p in trained.values())


def test_the_seed_fixes_the_adapters(llama_folder):
    profile = Profile(model=str(llama_folder), **PROFILE)
    first, again, other = (dict(load_policy(profile, seed)[0].named_parameters()) for seed in (3, 3, 4))
    names = [name for name in first if "lora_A" in name]
    assert all(torch.equal(first[name], again[name]) for name in names)
    assert not any(torch.equal(first[name], other[name]) for name in names)


# ---------------------------------------------------------------- the forward pass


@FAMILIES
def test_padded_batch_logits_are_those_of_each_response_alone(make):
    lm = make()
    batch, queries, responses = inputs()
    together = response_logits(lm, *batch)
    for row, (query, response) in enumerate(zip(queries, responses)):
        alone = lm(input_ids=torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        torch.testing.assert_close(together[row, : len(response)], alone, atol=1e-5, rtol=1e-5)


def test_the_language_model_head_runs_on_response_positions_only():
    policy, seen = PolicyWithValueHead(tiny.llama()), []
    policy.pretrained_model.lm_head.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[:2]))
    batch, _, _ = inputs()
    policy(*batch)
    assert seen == [(4, batch[2])] and batch[0].shape[1] > batch[2]


@FAMILIES
def test_values_are_the_head_on_the_last_hidden_state_where_the_token_is_predicted(make):
    policy = PolicyWithValueHead(make())
    torch.nn.init.normal_(policy.v_head.summary.weight)
    batch, queries, responses = inputs()
    _, values = policy(*batch)
    for row, (query, response) in enumerate(zip(queries, responses)):
        alone = policy.pretrained_model(torch.cat([query, response])[None], output_hidden_states=True).hidden_states[-1][0]
        expected = alone[len(query) - 1 : -1] @ policy.v_head.summary.weight[0] + policy.v_head.summary.bias
        torch.testing.assert_close(values[row, : len(response)], expected, atol=1e-4, rtol=1e-4)


def test_values_start_at_zero_and_are_fp32_for_a_bf16_model():
    policy = PolicyWithValueHead(tiny.llama().bfloat16())
    logits, values = policy(*inputs()[0])
    assert logits.dtype == torch.bfloat16 and values.dtype == torch.float32
    assert torch.equal(values, torch.zeros_like(values))


def test_the_model_is_used_in_place_and_named_as_in_trl():
    lm = tiny.llama()
    policy = PolicyWithValueHead(lm)
    assert policy.pretrained_model is lm
    assert {name for name, _ in policy.named_parameters() if "v_head" in name} == {
        "v_head.summary.weight",
        "v_head.summary.bias",
    }


# ---------------------------------------------------------------- adapters, modes


def test_with_the_adapters_off_the_policy_is_its_base_bit_for_bit(nf4):
    batch, _, _ = inputs()
    with torch.no_grad():
        base = PolicyWithValueHead(nf4(targets=None))(*batch)[0]
        policy = PolicyWithValueHead(nf4(b_scale=0.3))
        with policy.adapters_off():
            assert torch.equal(policy(*batch)[0], base)
        assert not torch.equal(policy(*batch)[0], base)


def test_the_adapters_come_back_after_an_exception():
    policy = PolicyWithValueHead(tiny.with_lora(tiny.llama(), b_scale=0.3))
    batch, _, _ = inputs()
    before = policy(*batch)[0]
    with pytest.raises(KeyError), policy.adapters_off():
        raise KeyError
    assert torch.equal(policy(*batch)[0], before)


def modes(module):
    return [m.training for m in module.modules()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_module_s_mode_comes_back_after_an_exception(checkpointing):
    policy = PolicyWithValueHead(tiny.with_lora(tiny.llama(), dropout=0.5))
    policy.enable_gradient_checkpointing()
    policy.train()
    policy.pretrained_model.get_base_model().model.layers[0].eval()
    before = modes(policy)
    with pytest.raises(KeyError), policy.without_dropout(checkpointing):
        assert not any(m.training for m in policy.modules() if isinstance(m, torch.nn.Dropout))
        raise KeyError
    assert modes(policy) == before and True in before and False in before


def test_dropout_that_is_no_module_is_off_under_checkpointing_too_and_its_rate_comes_back():
    """OPT's layers call F.dropout with a rate of their own, and transformers checkpoints in train mode only."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=tiny.V, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
    lm = OPTForCausalLM(
        OPTConfig(
            **sizes, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5, layerdrop=0.5, max_position_embeddings=64
        )
    )
    policy = PolicyWithValueHead(tiny.with_lora(lm, b_scale=0.2))
    policy.enable_gradient_checkpointing()
    policy.train()
    rates = [{name: rate for name, rate in vars(layer).items() if "dropout" in name} for layer in policy.modules()]
    with policy.without_dropout(), torch.no_grad():
        plain, _ = policy(*inputs()[0])
    with policy.without_dropout(checkpointing=True):
        checkpointed, _ = policy(*inputs()[0])
    assert torch.equal(plain, checkpointed)
    assert rates == [{name: rate for name, rate in vars(layer).items() if "dropout" in name} for layer in policy.modules()]


def gradients(policy, checkpointing):
    with policy.without_dropout(checkpointing):
        logits, values = policy(*inputs()[0])
        (logits.float().log_softmax(-1)[..., 5].sum() + values.sum()).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("quantized", [False, True])
def test_gradient_checkpointing_runs_every_layer_twice_and_gives_the_same_gradients(quantized, nf4):
    make = lambda: PolicyWithValueHead(
        nf4(b_scale=0.1) if quantized else tiny.with_lora(tiny.llama(), b_scale=0.1, dropout=0.5)
    )
    plain, saving = make(), make()
    saving.enable_gradient_checkpointing()
    passes = []
    for layer in saving.pretrained_model.get_base_model().model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *args: passes.append(1))
    expected, got = gradients(plain, False), gradients(saving, True)
    assert len(passes) == 4  # each of two layers forward, and again in backward
    assert expected.keys() == got.keys() and len(got) == 10
    for name in got:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- gradients through 4-bit layers


def packs_weights(lm):
    """Whether bitsandbytes repacked 4-bit layers at an eval forward, as it does on CPUs with AVX512-BF16."""
    with torch.no_grad():
        lm(input_ids=torch.tensor([[5, 6, 7]]))
    return any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in linear4bit(lm))


def linear4bit(lm):
    return [module for module in lm.modules() if isinstance(module, bnb.nn.Linear4bit)]


def test_gradients_are_the_same_before_and_after_an_eval_forward(nf4):
    policy = PolicyWithValueHead(nf4(b_scale=0.1))
    before = gradients(policy, False)
    policy.zero_grad()
    with torch.no_grad():
        policy.eval()(*inputs()[0])
    after = gradients(policy, False)
    assert before.keys() == after.keys() and sum("lora_B" in name for name in after) == 4
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_that_was_packed_before_it_was_wrapped_is_mended(nf4):
    packed = nf4(b_scale=0.1)
    packs_weights(packed)  # on CPUs that do not pack, this is an ordinary forward
    mended, fresh = gradients(PolicyWithValueHead(packed), False), gradients(PolicyWithValueHead(nf4(b_scale=0.1)), False)
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in linear4bit(packed))
    assert mended.keys() == fresh.keys()
    for name in fresh:  # packing rounds the scales of the blocks to bf16, and that does not come back
        assert torch.nn.functional.cosine_similarity(mended[name].flatten(), fresh[name].flatten(), dim=0) > 0.99, name


def test_without_protection_the_packed_model_has_no_true_gradient(nf4):
    """Why keep_gradients exists. If this fails, bitsandbytes was mended, and keep_gradients may go."""
    lm = nf4(b_scale=0.1)
    if not packs_weights(lm):
        pytest.skip("bitsandbytes packs 4-bit weights only on CPUs with AVX512-BF16")
    try:
        lm(input_ids=torch.tensor([[5, 6, 7]])).logits.float().log_softmax(-1)[..., 5].sum().backward()
    except RuntimeError:
        return
    assert any(p.grad is None for name, p in lm.named_parameters() if "lora_B" in name)


def test_a_protected_layer_is_never_packed(nf4):
    lm = nf4()
    keep_gradients(lm)
    assert not packs_weights(lm)


def test_the_adapters_are_peft_s(nf4):
    policy = PolicyWithValueHead(nf4())
    assert policy.has_adapters and isinstance(policy.pretrained_model, PeftModel)
    assert not PolicyWithValueHead(tiny.llama()).has_adapters


# ---------------------------------------------------------------- memory of the process


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what glibc keeps can be read on Linux only")
def test_freed_blocks_of_megabytes_go_back_to_the_system_at_once():
    script = """
import re, sys, torch
from rlhf_helpers.quirks import give_back_large_blocks
if sys.argv[1] == "yes":
    give_back_large_blocks()
held = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
torch.ones(7 * 2**20)  # 28 MB, freed: from here on glibc takes blocks up to this size from its heap
before, kept = held(), []
for _ in range(20):
    large, small = torch.ones(5 * 2**20), torch.ones(2**16)
    kept.append((large, small))
kept = [small for _, small in kept]  # the large ones are freed, the small ones lie between
del large
print(held() - before)
"""
    grown = {}
    for asked in ("yes", "no"):
        done = subprocess.run([sys.executable, "-c", script, asked], capture_output=True, text=True, check=True)
        grown[asked] = float(done.stdout)
    if grown["no"] < 50:
        pytest.skip("this allocator keeps nothing by itself")
    assert grown["yes"] < 20  # the small ones: 5 MB
