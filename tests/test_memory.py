"""The computed memory table beside what real, small models hold."""

import inspect
import subprocess
import sys

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from rlhf_helpers import machine, memory
from rlhf_helpers.models import PolicyWithValueHead
from tests import tiny


def held(layer):
    """Bytes of a 4-bit layer: its codes, their scales, the scales' scales, and the tables."""
    state = layer.weight.quant_state
    tensors = [layer.weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum(t.nbytes for t in tensors)


def test_nf4_layers_take_as_many_bytes_as_bitsandbytes_holds(nf4):
    layers = [layer for layer in nf4(targets=None).modules() if isinstance(layer, Linear4bit)]
    config = tiny.llama(hidden_size=64).config
    counted, _ = memory.linears(config)
    assert sum(map(held, layers)) == sum(map(memory.nf4_bytes, counted.values()))
    assert sum(map(held, layers)) == memory.memory_by_part(config)["linear layers"]


def test_other_weights_adapters_and_head_are_counted_exactly(nf4):
    policy = PolicyWithValueHead(nf4())
    parts = memory.memory_by_part(tiny.llama(hidden_size=64).config, lora_r=4)
    small = [(name, p) for name, p in policy.pretrained_model.named_parameters() if p.dtype != torch.uint8]
    assert parts["LoRA and Adam"] == 4 * sum(p.nbytes for name, p in small if "lora_" in name)
    assert parts["embeddings, head, norms"] == sum(p.nbytes for name, p in small if "lora_" not in name)
    assert parts["value head"] == 4 * sum(p.nbytes for p in policy.v_head.parameters())


def test_the_cache_is_counted_exactly():
    lm = tiny.llama().to(torch.bfloat16)
    cache = lm(torch.full((3, 9), 5), use_cache=True).past_key_values
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory.memory_by_part(lm.config, batch_size=3, prompt_tokens=4, new_tokens=5)["KV cache"] == size


def kept_by_autograd(policy, tokens):
    """Bytes that a forward pass with gradients keeps in layers, apart from the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*policy.parameters(), *policy.buffers())}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        alive.append(tensor)  # else its address may be used again
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with policy.without_dropout(checkpointing=True), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy(torch.full(tokens, 5), torch.ones(tokens, dtype=torch.long), 1)
    return sum(kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_activations_are_near_what_autograd_keeps(checkpointing):
    lm = tiny.llama(hidden_size=128, intermediate_size=352, num_hidden_layers=4, attn_implementation="sdpa").to(torch.bfloat16)
    policy = PolicyWithValueHead(tiny.with_lora(lm.requires_grad_(False)))
    config, tokens = lm.config, (4, 100)
    if checkpointing:
        policy.enable_gradient_checkpointing()
    sizes = dict(mini_batch_size=4, prompt_tokens=99, new_tokens=1, lora_r=4, checkpointing=checkpointing)
    computed = memory.memory_by_part(config, **sizes)["activations"]
    if checkpointing:  # one layer is worked on again in backward, when its neighbours' inputs are all that is kept
        computed -= 4 * 100 * memory.activation_bytes(config, 2 * 128)[0]
    assert kept_by_autograd(policy, tokens) == pytest.approx(computed, rel=0.1)  # the first layer keeps a little less


@pytest.mark.parametrize(
    "name, billions", [("Llama-3.2-1B", 1.236), ("Mistral-7B", 7.242), ("Llama-2-13B", 13.016), ("Llama-3.1-70B", 70.554)]
)
def test_the_sizes_are_the_published_ones(name, billions):
    layers, others = memory.linears((memory.SIZES | memory.LARGE)[name])
    assert (sum(layer.weight.numel() for layer in layers.values()) + others) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_a_7b_run_fits_where_the_course_says_it_does():
    mistral = memory.SIZES["Mistral-7B"]
    seed = memory.memory_by_part(mistral, batch_size=2, mini_batch_size=1)
    assert memory.peak(seed) < 5e9 and memory.peak(memory.memory_by_part(mistral)) < 5e9
    assert memory.peak(memory.memory_by_part(mistral, quantize=False)) > 14e9
    assert memory.peak(memory.memory_by_part(mistral, checkpointing=False)) > memory.peak(memory.memory_by_part(mistral)) + 2e9


def test_the_peak_counts_the_larger_of_sampling_and_updating():
    always = {"linear layers": 100, "value head": 1}
    assert memory.peak({**always, "KV cache": 50, "activations": 30, "logits": 10}) == 151
    assert memory.peak({**always, "KV cache": 5, "activations": 30, "logits": 10}) == 141


def test_the_peak_of_a_process_is_not_its_parents():
    ballast = torch.ones(10**8)  # 400 MB
    function = inspect.getsource(machine.peak_megabytes)
    script = f"import re, resource, sys\nfrom pathlib import Path\n{function}\nprint(peak_megabytes())"
    child = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert machine.peak_megabytes() > ballast.nbytes / 2**20 > 100 > child > 1
