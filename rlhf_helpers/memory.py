"""Memory of a PPO run by part, computed from a model's config alone: no weights, no download, no card.

Weights, adapters and the cache are counted and exact. Activations and logits are what autograd keeps in a layer of the Llama
family, in bf16 with torch's own attention (`sdpa`); tests compare both with what a real model holds. On top come CUDA itself,
about half a gigabyte, and what its allocator leaves unused."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

BF16, FP32 = 2, 4  # bytes
BLOCK, NESTED_BLOCK = 64, 256  # NF4 weights per scale, and 8-bit scales per scale of their own

# The sizes of published models, so that nobody has to fetch them.
SIZES = {
    "Llama-3.2-1B": LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                                num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True),
    "Mistral-7B": MistralConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                                num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False),
    "Llama-2-13B": LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
                               num_key_value_heads=40, vocab_size=32000, tie_word_embeddings=False),
}  # fmt: skip
# What shards are for.
LARGE = {
    "Llama-2-13B": SIZES["Llama-2-13B"],
    "Llama-3.1-70B": LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                                 num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
}  # fmt: skip


def linears(config):
    """({name: layer} of the layers that become NF4, number of all other parameters), without any memory for weights."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    head = lm.get_output_embeddings()
    layers = {name: layer for name, layer in lm.named_modules() if isinstance(layer, nn.Linear) and layer is not head}
    return layers, sum(p.numel() for p in lm.parameters()) - sum(layer.weight.numel() for layer in layers.values())


def share(size, cards):
    """Bytes of a tensor of `size` bytes that each of so many cards holds, when it is sliced."""
    return -(-size // cards)


def nf4_bytes(layer, cards=1):
    """A layer in NF4 with double quantization: 4 bits a weight, 8 a block, 32 a block of blocks (Dettmers et al. 2023,
    section 3); and per layer the two tables of levels and the scales' mean. Shards slice the weights alone."""
    blocks = -(-layer.weight.numel() // BLOCK)
    weights = share(layer.weight.numel() // 2, cards)
    return weights + blocks + FP32 * (-(-blocks // NESTED_BLOCK)) + FP32 * (16 + 256 + 1)


def together_bytes(config, layer):
    """What shards put together at the worst moment, for a layer of `layer` bytes: a unit as it arrives, and again as it is used.
    Embeddings and head are units, too; where they are one weight, it stays whole through a pass."""
    end = BF16 * config.vocab_size * config.hidden_size
    return end + max(end, 2 * layer) if config.tie_word_embeddings else 2 * max(end, layer)


def activation_bytes(config, lora_inputs):
    """(kept, worked on) for one token in one layer: all that backward needs, and with checkpointing just the layer's input.
    Frozen weights need no inputs; norms and LoRA keep theirs in fp32."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    norms, attention, mlp = 2 * FP32 * hidden, 4 * BF16 * heads, 3 * BF16 * config.intermediate_size
    return norms + FP32 * lora_inputs + attention + mlp, BF16 * hidden


def memory_by_part(config, batch_size=16, mini_batch_size=4, prompt_tokens=50, new_tokens=50, lora_r=8,
                   lora_targets=("q_proj", "v_proj"), quantize=True, checkpointing=True, cards=1):  # fmt: skip
    """Bytes of each part of a PPO step on one card, a dict. Cache and update never live at the same time: see `peak`. With more
    `cards` the base is in shards (`shard.shard`), and this is what each of them holds for a batch of its own."""
    layers, others = linears(config)
    width, n_layers = prompt_tokens + new_tokens, config.num_hidden_layers
    adapted = [layer for name, layer in layers.items() if name.rpartition(".")[2] in lora_targets]
    trained = lora_r * sum(layer.in_features + layer.out_features for layer in adapted)
    whole, inputs = activation_bytes(config, sum(layer.in_features for layer in adapted) // n_layers)
    tokens = mini_batch_size * width
    kept = n_layers * inputs + whole if checkpointing else n_layers * whole
    weights = sum(layer.weight.numel() for layer in layers.values())
    codes = weights // 2 if quantize else BF16 * weights
    together = together_bytes(config, codes // n_layers + 2 * BF16 * config.hidden_size)
    return {
        "linear layers": sum(nf4_bytes(layer, cards) for layer in layers.values()) if quantize else share(codes, cards),
        "embeddings, head, norms": share(BF16 * others, cards),
        "LoRA and Adam": 4 * FP32 * trained,  # weight, gradient, two moments
        "value head": 4 * FP32 * (config.hidden_size + 1),
        "KV cache": batch_size * width * n_layers * 2 * BF16 * config.num_key_value_heads * config.head_dim,
        "activations": tokens * (kept + FP32 * config.hidden_size),  # and the last norm's input
        "logits": 14 * mini_batch_size * new_tokens * config.vocab_size,  # bf16, and three times fp32 on the way back
        "one layer unpacked": BF16 * max(layer.weight.numel() for layer in layers.values()) if quantize else 0,
    } | ({"put together": together} if cards > 1 else {})


WHILE_SAMPLING, WHILE_UPDATING = ("KV cache",), ("activations", "logits")


def peak(parts):
    """Bytes at the worst moment: what is always there, and the larger of sampling and updating."""
    always = sum(size for name, size in parts.items() if name not in WHILE_SAMPLING + WHILE_UPDATING)
    return always + max(sum(parts[name] for name in phase) for phase in (WHILE_SAMPLING, WHILE_UPDATING))
