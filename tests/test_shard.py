"""A base in shards, on two processes of the CPU (gloo): what `tests/shard_worker.py` saw there, beside one whole model here."""

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rlhf_helpers import models, shard
from rlhf_helpers.errors import InputError
from tests import tiny
from tests.shard_worker import PROMPTS, nf4_of, untied
from tests.test_processes import launch
from tests.worker import stepped


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama_folder):
    folder = tmp_path_factory.mktemp("shards")
    launch(2, "tests.shard_worker", str(folder), str(llama_folder))
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    """What each of the two processes saw."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_two_shards_make_the_update_of_one_process(kind, folder, seen, llama_folder):
    one = stepped(lm=untied() if kind == "fp32" else nf4_of(llama_folder)())
    two, parameters = load_file(folder / kind), dict(one.model.named_parameters())
    assert two.keys() == {name for name, p in parameters.items() if p.requires_grad}
    for name in two:
        torch.testing.assert_close(two[name], parameters[name].detach(), atol=1e-5, rtol=0)
    for process in seen:
        for name, number in process[kind]["stats"].items():
            assert number == pytest.approx(one.history[-1][name], abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_shards_give_the_bits_of_whole_copies(kind, seen):
    assert all(process[kind]["as copies"] for process in seen)


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_the_kl_is_exactly_0_at_first(kind, seen):
    assert [process[kind]["first kl"] for process in seen] == [0, 0]


def test_with_the_adapters_off_shards_are_the_base_bit_for_bit(seen):
    assert [process["reference"] for process in seen] == 2 * [{"off is base": True, "on is base": False}]


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_each_process_holds_half_of_the_base_and_no_unpacked_copy(kind, seen, llama_folder):
    lm = untied() if kind == "fp32" else nf4_of(llama_folder)()
    whole = sum(p.nbytes for name, p in lm.named_parameters() if "lora_" not in name)
    assert [process[kind]["held"] for process in seen] == 2 * [[whole / 2, whole]]
    assert not any(process[kind]["fast"] for process in seen)


def test_responses_may_end_at_once_on_one_process_and_never_on_the_other(seen):
    assert [process["lengths"] for process in seen] == [[1, 1], [12, 12]]


def test_held_out_prompts_that_cannot_be_dealt_evenly_are_judged_once_each(seen):
    assert [process["judged"] for process in seen] == 2 * [[PROMPTS[:1], PROMPTS[:3]]]


def test_a_saved_run_goes_on_bit_for_bit_in_shards_or_as_copies(seen):
    assert [process["resume"] for process in seen] == 2 * [{"in shards": True, "as copies": True}]


def test_adapters_and_value_head_are_saved_whole_and_plain_peft_loads_them_on_one_process(folder):
    trained = load_file(folder / "at the save")
    lm = PeftModel.from_pretrained(tiny.llama(), folder / "checkpoint")
    adapters = {f"pretrained_model.{name}": p for name, p in lm.named_parameters() if "lora_" in name}
    head = load_file(folder / "checkpoint" / "model.safetensors")
    assert tiny.same(adapters | head, trained)
    assert any(p.any() for name, p in adapters.items() if "lora_B" in name)


def test_a_checkpoint_of_two_processes_is_refused_by_one(folder):
    with pytest.raises(InputError, match="written by 2 processes, resumed by 1"):
        tiny.trainer(batch_size=2, mini_batch_size=2).resume(folder / "checkpoint")


def test_what_cannot_be_sliced_is_refused_in_words(seen):
    for process in seen:
        said = process["refused"]
        assert "stored as uint8" in said["uint8"] and "bnb_4bit_quant_storage=torch.bfloat16" in said["uint8"]
        assert "no adapters" in said["no adapters"] and "PEFT model" in said["no adapters"]
        assert "no layers are known of a LlamaForCausalLM" in said["no layers"]
        assert "in shards already" in said["twice"]


def test_one_process_has_nothing_to_share(tmp_path):
    policy = models.PolicyWithValueHead(tiny.with_lora(tiny.llama()))
    with pytest.raises(InputError, match="one process holds the whole model; expected several"):
        shard.shard(policy)
    assert not shard.is_sharded(policy.pretrained_model)


def test_without_torch_distributed_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(InputError, match="no torch.distributed"):
        shard.shard(models.PolicyWithValueHead(tiny.with_lora(tiny.llama())))


def test_accelerate_s_own_sharding_is_refused_with_and_without_ours(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for make in (lambda: tiny.trainer(), lambda: shard.shard(models.PolicyWithValueHead(tiny.with_lora(tiny.llama())))):
        with pytest.raises(InputError, match="without --use_fsdp"):
            make()


def test_other_storage_changes_no_number_and_packed_weights_are_unpacked_before_they_are_sliced(llama_folder):
    """On CPUs with AVX512-BF16, where a forward pass in eval mode packs them."""
    ids = torch.randint(4, tiny.V, (2, 9), generator=torch.Generator().manual_seed(3))
    usual, other = (tiny.with_lora(tiny.nf4_llama(llama_folder, storage)) for storage in (torch.uint8, shard.STORAGE))
    weights = [p for name, p in other.named_parameters() if "base_layer" in name]
    assert weights and all(p.dtype == torch.bfloat16 for p in weights)
    shard.check_storage(other)
    codes = [p.view(torch.uint8).clone() for p in weights]
    with torch.no_grad():
        other(ids)  # packs
    other = models.PolicyWithValueHead(other).pretrained_model
    assert all(torch.equal(p.view(torch.uint8).view(-1), c.view(-1)) for p, c in zip(weights, codes))
    shard.check_storage(other)
    usual = models.PolicyWithValueHead(usual).pretrained_model
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, usual(ids).logits, atol=0.1, rtol=0)
    assert math.isfinite(usual(ids).logits.sum().item())
