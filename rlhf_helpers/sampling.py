"""Sampling responses. The loop is ours for one reason: what is sampled must be exactly what is scored afterwards, softmax
(logits / temperature) over the whole vocabulary. `model.generate` would add what the checkpoint's generation_config says
(top_k is 50 unless told otherwise), and the log-probs of such samples belong to another distribution."""

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from torch import nn


def pad_left(sequences, pad_id):
    """Lists of 1-D LongTensors to (input_ids, attention_mask), both (B, P), padded on the left: a response must follow its
    prompt without a gap."""
    width = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = sequence
        mask[row, width - len(sequence) :] = 1
    return ids, mask


def draw(logits, generator):
    """One token id per row of `logits` (B, V), by inverting the cumulative distribution: (B, 1). The random numbers come from
    a CPU generator, so a seed means the same on every device. (torch.multinomial is 30 times slower on a CPU.)"""
    cumulative = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    u = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).clamp(max=logits.shape[1] - 1)


@torch.no_grad()
def sample(lm, queries, max_new_tokens, eos_id, pad_id, temperature=1.0, generator=None, greedy=False):
    """Responses to `queries`, both lists of 1-D LongTensors: up to `max_new_tokens` each, cut after the first EOS, which stays."""
    device = lm.get_input_embeddings().weight.device
    tokens, attention = (x.to(device) for x in pad_left(queries, pad_id))
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    cache, written = None, []
    ended = torch.zeros(len(queries), 1, dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        out = lm(
            input_ids=tokens,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor([tokens.shape[1] - 1], device=device),  # the number 1 would copy the head B times
        )
        cache, logits = out.past_key_values, out.logits[:, -1].float() / temperature  # fp32, as log-probs are taken
        tokens = logits.argmax(-1, keepdim=True) if greedy else draw(logits, generator)
        tokens = torch.where(ended, pad_id, tokens)
        written.append(torch.where(ended, -1, tokens))  # -1: after the end
        ended |= tokens == eos_id
        if ended.all():
            break
        positions = positions[:, -1:] + 1
        attention = torch.cat([attention, torch.ones_like(tokens)], 1)
    rows = torch.cat(written, 1).cpu()
    return [row[row >= 0] for row in rows]


def can_merge(lm):
    """Whether MergedCopy knows how: plain LoRA with one active adapter, and no module that is trained in full."""
    if not isinstance(lm, PeftModel):
        return True
    config = lm.active_peft_config
    if any(name.endswith(".base_layer") and not hasattr(layer, "in_features") for name, layer in lm.named_modules()):
        return False  # LoRA on an embedding
    return config.peft_type == "LORA" and len(lm.active_adapters) == 1 and not (config.use_dora or config.modules_to_save)


class MergedCopy:
    """A plain copy of a 4-bit policy, its adapters merged in, in the dtype of its embeddings (bf16): for sampling on a CPU.

    Decoding through 4-bit layers spends most of its time unpacking them, once per token; the copy unpacks them once per
    step. Embeddings and norms are shared with the policy. It decides how fast samples come, never what is learnt: log-probs
    are always computed again by the policy itself."""

    def __init__(self, lm):
        base = lm.get_base_model() if isinstance(lm, PeftModel) else lm
        config = type(base.config).from_dict({k: v for k, v in base.config.to_dict().items() if k != "quantization_config"})
        config._attn_implementation = base.config._attn_implementation
        with torch.device("meta"):
            self.lm = type(base)(config).eval()
        modules = dict(self.lm.named_modules())
        self.dtype = base.get_input_embeddings().weight.dtype
        self.merged = []  # (LoRA layer, the copy's layer)
        for name, module in base.named_modules():
            adapted = name.endswith(".base_layer")
            if adapted or isinstance(module, bnb.nn.Linear4bit):
                copy = nn.Linear(module.in_features, module.out_features, bias=False, device="meta").eval()  # of Conv1D, too
                self.lm.set_submodule(name.removesuffix(".base_layer"), copy)
                copy.weight = nn.Parameter(self.unpacked(module), requires_grad=False)
                copy.bias = module.bias
                if adapted:
                    self.merged.append((base.get_submodule(name.removesuffix(".base_layer")), copy))
            elif name in modules:
                modules[name]._parameters.update(module._parameters)
                modules[name]._buffers.update(module._buffers)

    def unpacked(self, layer):
        if not isinstance(layer, bnb.nn.Linear4bit):
            return layer.weight.detach().clone()
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(self.dtype)

    @torch.no_grad()
    def refresh(self, adapters=True):
        """Bring the copy up to date with the adapters (or without them: the reference), and return it."""
        for lora, copy in self.merged:
            weight = self.unpacked(lora.base_layer).float()
            if adapters:
                weight += lora.get_delta_weight(lora.active_adapters[0])
            copy.weight.copy_(weight)
        return self.lm
