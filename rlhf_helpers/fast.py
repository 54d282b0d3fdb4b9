"""Sooner and in less memory, not otherwise. Nothing here teaches PPO: a reader may take `Reader` for `sampling.Plain` and
`token_logprobs` for `ppo.logprobs_from_logits` and `ppo.entropy_from_logits`, which they equal bit for bit (tests/test_fast.py);
`keeping_less` may be left out.

`Reader` samples from a 4-bit Llama on a CPU with its weights unpacked once. Every operation is the model's own, in its dtypes
and its order; the adapters are read where they are, beside the weights. It saves four things:

- unpacking 4-bit weights for every token: they are unpacked once per run;
- plain products of few rows: oneDNN multiplies by weights in a layout of its own (`torch.ops.mkldnn`);
- three products for q, k and v, and two for gate and up: they are stacked, and a product's columns do not know each other;
- a cache that grows by copying, and the modules' bookkeeping around 600 small operations a token.

What would cost bits is left out: int8 weights, attention or norms in another precision, adapters merged into the weights."""

import contextlib

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, StaticLayer
from transformers.models.llama.modeling_llama import LlamaMLP

from rlhf_helpers.models import at_the_last
from rlhf_helpers.ppo import LOWEST
from rlhf_helpers.quirks import is_4bit_layer
from rlhf_helpers.shard import is_sharded

STACKS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def can_unpack(lm):
    """Whether this is what the module knows: a 4-bit Llama in bf16 on a CPU with eager attention, no biases, no adapters or plain
    LoRA ones, and a oneDNN that multiplies in bf16. Not in shards: an unpacked copy is what they are there to avoid."""
    base = lm.get_base_model() if isinstance(lm, PeftModel) else lm
    if (
        is_sharded(lm)
        or type(base) is not LlamaForCausalLM
        or base.config._attn_implementation != "eager"
        or base.device.type != "cpu"
    ):
        return False
    ends = base.get_input_embeddings(), base.lm_head
    if [type(end) for end in ends] != [torch.nn.Embedding, torch.nn.Linear]:  # PEFT wraps them to train single tokens
        return False
    layers = [base_of(linear(layer, name)) for layer in base.model.layers for names in STACKS for name in names]
    known = lambda layer: is_4bit_layer(layer) and layer.compute_dtype == torch.bfloat16
    plain = all(known(layer) and layer.bias is None for layer in layers) and base.lm_head.bias is None
    silu = base.config.hidden_act == "silu" and all(layer.weight.dtype == torch.bfloat16 for layer in ends)
    if not (plain and silu and has_onednn()):
        return False
    if not isinstance(lm, PeftModel):
        return True
    if len(lm.active_adapters) != 1:
        return False
    config = lm.active_peft_config
    adapted = {id(linear(layer, name)) for layer in base.model.layers for names in STACKS for name in names}
    known = all(id(module) in adapted for module in base.modules() if hasattr(module, "lora_A"))
    simple = config.peft_type == "LORA" and not (config.use_dora or config.modules_to_save or config.lora_bias)
    return known and simple


def has_onednn():
    """Whether PyTorch has a oneDNN here that multiplies in bf16. On a Mac it has none."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(layer, name):
    """The module of that name in a Llama's layer."""
    return getattr(layer.self_attn if name in ("q_proj", "k_proj", "v_proj", "o_proj") else layer.mlp, name)


def base_of(module):
    """The layer under a LoRA layer, or the layer itself."""
    return getattr(module, "base_layer", module)


def unpacked(layer):
    """A 4-bit layer's weights in bf16, (out, in)."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.bfloat16)


class Unpacked:
    """The layers of a 4-bit Llama, ready to be read: for each the stacked weights in oneDNN's layout, and the LoRA modules
    beside them. Made once; the adapters may go on learning."""

    def __init__(self, lm):
        self.lm = lm.get_base_model() if isinstance(lm, PeftModel) else lm
        self.layers = [Layer(layer) for layer in self.lm.model.layers]
        self.head = in_layout(self.lm.lm_head.weight.detach())
        self.made_of = self.base_weights()

    def base_weights(self):
        return [base_of(linear(layer, name)).weight for layer in self.lm.model.layers for names in STACKS for name in names]

    def is_current(self):
        """Whether the model still has the weights that this was made of: PEFT puts others in their place to merge adapters."""
        return all(now is then for now, then in zip(self.base_weights(), self.made_of))


class Layer:
    """One layer: `weights[i]` belongs to STACKS[i], `modules[i]` are its parts, LoRA modules where there are adapters."""

    def __init__(self, layer):
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.modules = [[linear(layer, name) for name in names] for names in STACKS]
        self.weights = [in_layout(torch.cat([unpacked(base_of(module)) for module in modules])) for modules in self.modules]


def in_layout(weight):
    """A matrix (out, in) in the layout in which oneDNN multiplies a few rows by it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, 8)


def times(x, weight):
    """x (..., in) by a matrix in that layout: (..., out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def adapters_of(modules):
    """LoRA beside a stack, read when a reader is made: ([A, ...], B, scaling), or None without. B has all B matrices on its
    diagonal, and nothing but zeros for parts of the stack without an adapter; scaling is one number for each column."""
    downs, ups, scalings = [], [], []
    for module in modules:
        name = next((name for name in getattr(module, "active_adapters", ()) if name in module.lora_A), None)
        if name is not None:
            downs.append(module.lora_A[name].weight)
            ups.append(module.lora_B[name].weight)
            scalings += [module.scaling[name]] * len(ups[-1])
        else:
            ups.append(torch.zeros(module.out_features, 0, dtype=torch.float32))
            scalings += [1.0] * len(ups[-1])
    return (downs, torch.block_diag(*ups), torch.tensor(scalings)) if downs else None


def product(x, weight, adapters):
    """x (B, n, in) through stacked weights, bf16, and LoRA beside them in fp32, as PEFT computes it."""
    out = times(x, weight)
    if adapters:
        downs, up, scaling = adapters
        wide, rows = x.float(), x.shape[0] * x.shape[1]
        if rows < enough_rows():
            wide = F.pad(wide, (0, 0, 0, 0, 0, -(-enough_rows() // x.shape[1]) - x.shape[0]))
        narrow = torch.cat([F.linear(wide, down) for down in downs], -1)
        out += (F.linear(narrow, up) * scaling)[: len(x)].to(out.dtype)
    return out


def enough_rows():
    """Rows from which an fp32 product gives each row the bits that it has among hundreds. Measured: 4 for each thread are too few
    where they do not divide evenly, 6 are enough."""
    return min(64, 8 * torch.get_num_threads())


def rms(x, norm):
    """LlamaRMSNorm: in fp32, rounded, then the weight."""
    return norm.weight * F.rms_norm(x, x.shape[-1:], None, norm.variance_epsilon)


def causal_bias(attention, width, most, dtype):
    """What is added to the attention's scores of the last `width` tokens, (B, 1, n, most): 0 where a token may look, else the least
    number. The cache is looked at whole, also where nothing is written yet: those places get weight 0 exactly, and no shape ever
    changes."""
    seen = F.pad(attention.bool(), (0, most - attention.shape[1]))[:, None, None]
    if width > 1:
        seen = seen & torch.ones(width, most, dtype=torch.bool, device=seen.device).tril(attention.shape[1] - width)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


class Reader:
    """Reads tokens as `sampling.Plain` does, with a cache that is made once, for `most` tokens."""

    least_rows = 2  # a single row would meet another kernel in bf16, too

    def __init__(self, unpacked, adapters, most):
        self.unpacked, self.most, self.length = unpacked, most, 0
        self.adapters = [[adapters_of(modules) if adapters else None for modules in layer.modules] for layer in unpacked.layers]
        config = unpacked.lm.config
        self.heads, self.groups, self.dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            unpacked.lm.model.layers[0].self_attn.head_dim,
        )

    @torch.inference_mode()  # no operation is noted for a gradient, or for a change in place
    def read(self, tokens, attention, positions):
        """(logits (B, V), last hidden states (B, H)) at the last place; see `sampling.Plain`."""
        lm, width = self.unpacked.lm, tokens.shape[1]
        x = F.embedding(tokens, lm.model.embed_tokens.weight)
        cos, sin = (part[:, :, None] for part in lm.model.rotary_emb(x, positions))
        rotation = cos, torch.cat([-sin[..., : self.dim // 2], sin[..., self.dim // 2 :]], -1)
        if not self.length:
            self.make_cache(len(tokens), x)
        bias = causal_bias(attention, width, self.most, x.dtype)
        for number, (layer, lora) in enumerate(zip(self.unpacked.layers, self.adapters)):
            qkv = product(rms(x, layer.norms[0]), layer.weights[0], lora[0])
            x = x + product(self.attend(number, qkv, rotation, bias), layer.weights[1], lora[1])
            gate, up = product(rms(x, layer.norms[1]), layer.weights[2], lora[2]).chunk(2, -1)
            x = x + product(F.silu(gate) * up, layer.weights[3], lora[3])
        self.length += width
        hidden = rms(x[:, -1:], lm.model.norm)
        return times(hidden, self.unpacked.head)[:, 0], hidden[:, 0]

    def make_cache(self, rows, like):
        shape = (len(self.unpacked.layers), rows, self.groups, self.most, self.dim)
        self.keys, self.values = (like.new_zeros(shape) for _ in "kv")

    def attend(self, number, qkv, rotation, bias):
        """Eager attention of one layer with its cache: (B, n, heads * dim), from q, k and v side by side."""
        rows, width, _ = qkv.shape
        qkv = qkv.view(rows, width, -1, self.dim)
        turned = qkv[:, :, : -self.groups]
        swapped = torch.cat([turned[..., self.dim // 2 :], turned[..., : self.dim // 2]], -1)
        turned = (turned * rotation[0] + swapped * rotation[1]).transpose(1, 2)
        keys, values, now = self.keys[number], self.values[number], slice(self.length, self.length + width)
        keys[:, :, now] = turned[:, self.heads :]
        values[:, :, now] = qkv[:, :, -self.groups :].transpose(1, 2)
        query, shared = turned[:, : self.heads], self.heads // self.groups
        if width == 1:  # the heads that share their keys, as rows of one product
            query = query.reshape(rows, self.groups, shared, self.dim)
        else:
            keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
        scores = torch.matmul(query, keys.transpose(2, 3)) * self.dim**-0.5 + bias
        out = torch.matmul(F.softmax(scores, -1, dtype=torch.float32).to(qkv.dtype), values)
        return out.view(rows, 1, -1) if width == 1 else out.transpose(1, 2).reshape(rows, width, -1)


def can_graph(lm):
    """Whether `Graphed` knows this model: a Llama, Mistral or Qwen on one CUDA card. (Others make masks or positions in ways that
    do not fit; shards meet other processes, which no graph can note.)"""
    base = lm.get_base_model() if isinstance(lm, PeftModel) else lm
    cards = set(map(str, getattr(base, "hf_device_map", {}).values()))
    known = base.config.model_type in ("llama", "mistral", "qwen2", "qwen3")
    known &= base.config._attn_implementation in ("eager", "sdpa")
    rope = (getattr(base.config, "rope_parameters", None) or {}).get("rope_type", "default")
    fixed = "dynamic" not in str(rope) and not getattr(base, "is_loaded_in_8bit", False)  # nothing that looks at the numbers
    return known and fixed and base.device.type == "cuda" and len(cards) < 2 and not is_sharded(lm)


class Graphed:
    """Reads tokens as `sampling.Plain` does, through the model itself, on a CUDA card. With transformers' static cache every token
    after the prompt is the same work at the same addresses. So it is noted once, as a CUDA graph, and launched as one piece: for
    a few rows the launches, more than a thousand a token, cost more than the work."""

    least_rows = 1

    def __init__(self, lm, most):
        self.lm, self.most, self.graph, self.calls = lm, most, None, 0
        self.cache = Cache(layers=[StaticLayer(most) for _ in range(lm.config.get_text_config().num_hidden_layers)])

    def read(self, tokens, attention, positions):
        """(logits (B, V), last hidden states (B, H)) at the last place; see `sampling.Plain`."""
        last = torch.tensor([tokens.shape[1] - 1], device=tokens.device)
        given = tokens, causal_bias(attention, tokens.shape[1], self.most, self.lm.dtype), positions, last
        self.calls += 1
        if self.calls <= 2:  # the prompt, and the first token as a rehearsal of the others
            return self.forward(*given)
        if self.graph is None:
            self.inputs, self.graph = [tensor.clone() for tensor in given], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.forward(*self.inputs)
        for ours, theirs in zip(self.inputs, given):
            ours.copy_(theirs)
        self.graph.replay()
        return [output.clone() for output in self.outputs]

    def forward(self, tokens, bias, positions, last):
        return at_the_last(self.lm, tokens, bias, positions, self.cache, last)[:2]


class Gated(torch.autograd.Function):
    """silu(gate) * up. For backward it keeps the two and takes the silu again: two blocks of numbers a layer, and not three."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)  # autograd's own, to the bit


class GatedMLP(LlamaMLP):
    def forward(self, x):
        return self.down_proj(Gated.apply(self.gate_proj(x), self.up_proj(x)))


def is_plain_mlp(module):
    """Whether this is a Llama's MLP as transformers makes it, and nobody listens to its activation."""
    if type(module) is not LlamaMLP or type(module.act_fn) is not type(ACT2FN["silu"]):
        return False
    silu = module.act_fn
    return not (silu._forward_hooks or silu._forward_pre_hooks or silu._backward_hooks or silu._backward_pre_hooks)


@contextlib.contextmanager
def keeping_less(lm):
    """Inside, a Llama on a CPU keeps fewer activations for backward: its MLPs are `GatedMLP`s. (A card is left alone: with the
    gpu profile layers are checkpointed, and one at a time may keep anything.)"""
    plain = [module for module in lm.modules() if lm.device.type == "cpu" and is_plain_mlp(module)]
    try:
        for module in plain:
            module.__class__ = GatedMLP
        yield
    finally:
        for module in plain:
            module.__class__ = LlamaMLP


class TokenLogprobs(torch.autograd.Function):
    """Log-probs of tokens and entropies, by one softmax in fp32 for both, some rows at a time. For backward it keeps the logits as
    they are and takes the softmax again: of (B, T, V) numbers in fp32, a hundred megabytes, none stays. The gradient then takes
    the place of the logits, which nobody needs any more (unless they are a leaf, whose numbers are somebody's own)."""

    @staticmethod
    def forward(ctx, logits, ids, mask, temperature, chunk):
        logprobs, entropy = (torch.zeros(ids.shape, dtype=torch.float32, device=logits.device) for _ in "le")
        scratch = Scratch(logits, chunk)
        for at in places(mask, chunk):
            log, other = scratch.log_softmax(logits, at, temperature)
            logprobs[at] = log.gather(1, ids[at][:, None])[:, 0]
            entropy[at] = -torch.exp(log, out=other).mul_(log.clamp_(min=LOWEST)).sum(-1)
        ctx.save_for_backward(logits, ids, mask)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, gradient, _):
        logits, ids, mask = ctx.saved_tensors
        out = logits.clone() if logits.is_leaf else logits.detach()
        out.masked_fill_(~mask[..., None], 0)
        scratch = Scratch(logits, ctx.chunk)
        for at in places(mask, ctx.chunk):
            log, slope = scratch.log_softmax(out, at, ctx.temperature)
            slope.zero_().scatter_(1, ids[at][:, None], gradient[at][:, None])
            torch.ops.aten._log_softmax_backward_data(slope, log, -1, torch.float32, out=slope)  # autograd's own, to the bit
            out[at] = slope.div_(ctx.temperature).to(out.dtype)
        return out, None, None, None, None


class Scratch:
    """Two blocks of fp32 numbers, (rows, V), that are used again and again: fresh ones would cost more than what is computed in them."""

    def __init__(self, logits, rows):
        rows = min(rows, logits.shape[:-1].numel())
        self.blocks = [torch.empty(rows, logits.shape[-1], dtype=torch.float32, device=logits.device) for _ in "ab"]

    def log_softmax(self, logits, at, temperature):
        """(log softmax(logits / temperature) at some places, (n, V), a block that is free)."""
        first, second = (block[: len(at[0])] for block in self.blocks)
        first.copy_(logits[at]).div_(temperature)
        return torch.log_softmax(first, -1, out=second), first


def places(mask, chunk):
    """The true positions of a mask (B, T), up to `chunk` at a time, as pairs of index tensors."""
    return zip(*(index.split(chunk) for index in mask.nonzero(as_tuple=True)))


def token_logprobs(logits, ids, mask, temperature=1.0, chunk=32):
    """(log-probs, entropies), both (B, T), fp32 and 0 outside the mask, `chunk` tokens at a time; the entropies have no gradient."""
    return TokenLogprobs.apply(logits, ids, mask, temperature, chunk)
