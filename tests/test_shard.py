"""A base in shards, on two processes of the CPU (gloo): what `tests/shard_worker.py` saw there, beside one whole model here."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rlhf_helpers import memory, models, shard
from rlhf_helpers.__main__ import main
from rlhf_helpers.data import save_jsonl
from rlhf_helpers.errors import InputError
from rlhf_helpers.quirks import is_4bit_layer
from tests import tiny
from tests.shard_worker import PROMPTS, nf4_of, untied
from tests.test_memory import held
from tests.test_processes import launch
from tests.worker import stepped
from tools import larger

ROOT = Path(__file__).resolve().parent.parent


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


def test_the_computed_shards_are_those_that_a_process_holds(seen, nf4):
    lm = nf4(targets=None)
    scales = sum(held(layer) - layer.weight.nbytes for layer in lm.modules() if is_4bit_layer(layer))
    parts = memory.memory_by_part(lm.config, cards=2)
    here, _ = seen[0]["nf4"]["held"]
    assert parts["linear layers"] + parts["embeddings, head, norms"] == here + scales


def test_the_computed_bytes_that_are_put_together_are_those_of_the_worst_moment(seen):
    """Besides them there are a few activations."""
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    layer = sum(p.nbytes for p in tiny.llama(**sizes).to(torch.bfloat16).model.layers[0].parameters())
    for measured, more in zip(seen[0]["put together"], ({}, {"vocab_size": 12800}, {"vocab_size": 12800, "tied": True})):
        tied = more.pop("tied", False)
        config = tiny.llama(**sizes, **more, tie_word_embeddings=tied).config
        assert measured == pytest.approx(memory.together_bytes(config, layer), rel=0.1)


def test_the_page_has_the_table_that_its_command_prints():
    page = (ROOT / "docs" / "larger.md").read_text(encoding="utf-8")
    assert larger.MARKS.findall(page) == [larger.table()]


def test_shards_of_more_cards_fit_where_whole_copies_do_not():
    peaks = {cards: memory.peak(memory.memory_by_part(memory.LARGE["Llama-3.1-70B"], cards=cards)) for cards in (1, 2, 4, 8)}
    assert peaks[1] > 40e9 > peaks[2] > 24e9 > peaks[4] > 16e9 > peaks[8]


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
    for engine, option in (("FSDP", "fsdp"), ("DEEPSPEED", "deepspeed"), ("MEGATRON_LM", "megatron_lm")):
        with monkeypatch.context() as launched:
            launched.setenv(f"ACCELERATE_USE_{engine}", "true")
            for make in (lambda: tiny.trainer(), lambda: shard.shard(models.PolicyWithValueHead(tiny.with_lora(tiny.llama())))):
                with pytest.raises(InputError, match=f"without --use_{option}"):
                    make()


def test_4_bit_weights_stored_as_bf16_are_the_same_weights(llama_folder):
    ids = torch.randint(4, tiny.V, (2, 9), generator=torch.Generator().manual_seed(3))
    usual, other = (tiny.with_lora(tiny.nf4_llama(llama_folder, storage)) for storage in (torch.uint8, shard.STORAGE))
    for lm in (usual, other):
        models.keep_gradients(lm)
    assert {p.dtype for name, p in other.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    shard.check_storage(other)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, usual(ids).logits)


def test_weights_that_a_cpu_s_kernel_has_packed_are_unpacked_before_they_are_sliced(llama_folder):
    """Packed they are, where the CPU has AVX512-BF16, by a pass in eval mode before the policy is made."""
    lm = tiny.with_lora(tiny.nf4_llama(llama_folder, shard.STORAGE))
    layers = [layer for layer in lm.modules() if is_4bit_layer(layer)]
    codes = [layer.weight.view(torch.uint8).flatten().clone() for layer in layers]
    with torch.no_grad():
        lm(torch.full((1, 3), 5))
    models.PolicyWithValueHead(lm)
    shard.check_storage(lm)
    assert all(torch.equal(layer.weight.view(torch.uint8).flatten(), code) for layer, code in zip(layers, codes))
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)


def test_the_script_says_what_shards_need(capsys, monkeypatch):
    assert main(["--shard"]) == 2
    assert "error: --shard: one process holds the whole model; expected several" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["--shard"]) == 2 and "without --use_fsdp" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_runs_in_shards_and_goes_on_in_shards(tmp_path, llama_folder, reward_folders):
    save_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"t{i} t{i + 1}"} for i in range(10, 20)])
    save_jsonl(tmp_path / "heldout.jsonl", [{"prompt": f"t{i} t{i + 2}"} for i in range(20, 23)])
    sizes = "--batch_size 2 --mini_batch_size 2 --gradient_accumulation_steps 1 --max_new_tokens 8 --save_every 1"
    files = f"--prompts {tmp_path}/prompts.jsonl --heldout {tmp_path}/heldout.jsonl --reward-model {reward_folders[1]}"
    asked = f"rlhf_helpers --shard --model {llama_folder} {files} {sizes} --kl_budget none --output {tmp_path}/run"
    said = launch(2, *asked.split(), "--steps", "1")
    assert "shards: each process holds" in said and "on 2 processes" in said
    assert "going on from step 1" in launch(2, *asked.split(), "--steps", "2")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["processes"]) == (2, 2) and summary["sampler_max_diff"] < 0.1
    lm = PeftModel.from_pretrained(tiny.nf4_llama(llama_folder), tmp_path / "run" / "checkpoint")
    assert any(p.any() for name, p in lm.named_parameters() if "lora_B" in name)
