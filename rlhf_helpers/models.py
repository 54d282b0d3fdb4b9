"""The policy: a causal language model in 4-bit NF4 with LoRA adapters and a value head, and its tokenizer.

The reference of the KL penalty is the same model with its adapters switched off: no second copy exists."""

import contextlib
import ctypes
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack_for_cpu
from jinja2 import TemplateError
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from rlhf_helpers.assets import ASSETS, ensure_model
from rlhf_helpers.data import turns

transformers_logging.disable_progress_bar()  # "Loading weights: 100%" on stderr, once per load


# ---------------------------------------------------------------- device, tokenizer, 4-bit model


def device_and_dtype():
    """(device, compute dtype) for this machine: bf16, except on CUDA cards without native bf16 (compute capability below
    8.0, where torch only emulates it), which get fp16."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.bfloat16
    native_bf16 = torch.cuda.get_device_capability()[0] >= 8
    return torch.device("cuda", torch.cuda.current_device()), torch.bfloat16 if native_bf16 else torch.float16


def give_back_large_blocks():
    """Ask glibc to hand freed blocks of 4 MB or more back to the system at once. By itself it keeps them (of up to 32 MB) for
    later, and the pieces fit less and less: without this a step's peak is 200 to 400 MB higher (mallopt(3), M_MMAP_THRESHOLD)."""
    with contextlib.suppress(OSError, AttributeError):  # another system, another allocator
        ctypes.CDLL("libc.so.6").mallopt(-3, 4 * 2**20)


def resolve(model):
    """What `from_pretrained` can load for `model`: a name of ASSETS (fetched if missing), a folder, or org/model on a hub.
    Raises ValueError for anything else."""
    if str(model) in ASSETS:
        return str(ensure_model(str(model)))
    if (Path(model) / "config.json").is_file() or (Path(model) / "adapter_config.json").is_file():
        return str(model)
    if str(model).count("/") == 1 and not Path(model).exists() and not str(model).startswith((".", "/")):
        return str(model)
    raise ValueError(f"unknown model {str(model)!r}; expected one of {', '.join(ASSETS)}, a folder with config.json, or org/model")


def quantization_config(compute_dtype=torch.bfloat16):
    """4-bit NF4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_tokenizer(model):
    """The model's tokenizer, padding on the left and with a pad token: its own, else an unused reserved token, else EOS
    (harmless here, where masks come from lengths). The vocabulary is never resized."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(model), padding_side="left")
    if tokenizer.pad_token_id is None:
        spare = [t for t in ("<|endoftext|>", "<pad>", "<unk>") if t in tokenizer.get_vocab() and t != tokenizer.eos_token]
        tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    return tokenizer


def encode_prompt(tokenizer, prompt):
    """The query: token ids of the prompt as the model was trained to read it, in its chat template and ready for its answer
    (or as plain text, where the tokenizer has no template). A transcript's turns become the template's. A 1-D LongTensor."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")["input_ids"][0]
    chat = turns(prompt)
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except TemplateError:  # of a template without a system's turn, as Mistral's first: it goes before the first question
        if chat[0]["role"] != "system" or len(chat) < 2:
            raise
        chat = [{"role": "user", "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}, *chat[2:]]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]


def load_causal_lm(model, quantize=True):
    """The frozen base model in 4-bit NF4 (or in the compute dtype, with `quantize=False`), in eval mode."""
    device, dtype = device_and_dtype()
    lm = AutoModelForCausalLM.from_pretrained(
        resolve(model),
        dtype=dtype,
        quantization_config=quantization_config(dtype) if quantize else None,
        device_map={"": device},
        attn_implementation="eager" if device.type == "cpu" else "sdpa",  # measured: eager trains faster on two cores
    )
    keep_gradients(lm)
    if device.type == "cpu" and quantize:  # else one embedding would keep the whole bf16 file mapped into memory
        for parameter in lm.parameters():
            if not isinstance(parameter, bnb.nn.Params4bit):
                parameter.data = parameter.data.clone()
    return lm.requires_grad_(False).eval()


def keep_gradients(module):
    """Keep bitsandbytes from breaking training on CPUs with AVX512-BF16, and mend it where it has.

    There, the first forward in eval mode without gradients repacks every 4-bit layer in place for a kernel that has no
    backward. LoRA then gets no gradient, or a wrong one, with no error. So the packing is switched off, and what is packed
    already is unpacked."""
    for layer in module.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                layer.weight.data, layer.weight.quant_state = unpack_for_cpu(layer.weight.data, layer.weight.quant_state)


def is_4bit(module):
    """Whether a model has 4-bit layers."""
    return any(isinstance(layer, bnb.nn.Linear4bit) for layer in module.modules())


def load_policy(profile, seed=0, quantize=True):
    """(policy, tokenizer) of a profile: 4-bit base, new LoRA adapters (fp32, B zero, so KL starts at 0), value head."""
    tokenizer = load_tokenizer(profile.model)
    lm = load_causal_lm(profile.model, quantize)
    torch.manual_seed(seed)  # LoRA's A matrices are random
    layers = {name.rpartition(".")[2] for name, _ in lm.named_modules()}
    lora = LoraConfig(
        r=profile.lora_r,
        lora_alpha=profile.lora_alpha,
        target_modules=[name for name in profile.lora_targets if name in layers] or None,  # None: PEFT's choice for this family
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    policy = PolicyWithValueHead(get_peft_model(lm, lora))
    if profile.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    return policy, tokenizer


# ---------------------------------------------------------------- the forward pass


def response_logits(lm, input_ids, attention_mask, response_length):
    """Logits (B, T, V) that predict the last T = `response_length` tokens of `input_ids` (B, P + T).

    The prompt is padded on the left and the response on the right, so position P - 1 predicts the first response token in
    every row. The language-model head runs on these T positions only."""
    width = input_ids.shape[1]
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # a pad on the left must not shift the text
    predicting = torch.arange(width - response_length - 1, width - 1, device=input_ids.device)
    return lm(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        logits_to_keep=predicting,
        use_cache=False,
    ).logits


class ValueHead(nn.Module):
    """One number per token from the policy's last hidden state (B, T, H), in fp32; starts at zero everywhere."""

    def __init__(self, hidden_size):
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden):
        return self.summary(hidden.float()).squeeze(-1)


class PolicyWithValueHead(nn.Module):
    """A causal language model, or a PEFT model of one, with a value head on its last hidden state.

    `PolicyWithValueHead(causal_lm)` uses the model it is given, in place. `pretrained_model` and `v_head.summary` are
    named as in TRL's AutoModelForCausalLMWithValueHead."""

    def __init__(self, causal_lm):
        super().__init__()
        keep_gradients(causal_lm)
        self.pretrained_model = causal_lm
        self.v_head = ValueHead(causal_lm.config.get_text_config().hidden_size)
        head = causal_lm.get_output_embeddings()
        self.v_head.to(head.weight.device)
        # What enters the language-model head is the last hidden state, at just the positions that are asked for.
        head.register_forward_pre_hook(self._catch_hidden)

    def _catch_hidden(self, head, inputs):
        self._hidden = inputs[0]

    @property
    def config(self):
        return self.pretrained_model.config

    @property
    def has_adapters(self):
        return isinstance(self.pretrained_model, PeftModel)

    def forward(self, input_ids, attention_mask, response_length):
        """(logits (B, T, V) in the model's dtype, values (B, T) in fp32) that belong to the T response tokens."""
        logits = response_logits(self.pretrained_model, input_ids, attention_mask, response_length)
        hidden, self._hidden = self._hidden, None
        return logits, self.v_head(hidden)

    def adapters_off(self):
        """A context in which the model is its own reference. The adapters come back after an exception, too."""
        return self.pretrained_model.disable_adapter() if self.has_adapters else contextlib.nullcontext()

    def enable_gradient_checkpointing(self):
        """Trade time for memory: keep one activation per layer and compute the others again in backward."""
        lm = self.pretrained_model
        enable = getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)  # its name since transformers 5.23
        enable({"use_reentrant": False})
        self.pretrained_model.enable_input_require_grads()

    @contextlib.contextmanager
    def without_dropout(self, checkpointing=False):
        """Eval mode inside, the former mode of every module after. PPO compares log-probs of several passes, so none of them
        may have dropout. transformers checkpoints layers in train mode only: with `checkpointing`, just their own flag is set."""
        before = {module: module.training for module in self.modules()}
        self.eval()
        if checkpointing:
            for module in self.modules():
                module.training = bool(getattr(module, "gradient_checkpointing", False))
        try:
            yield
        finally:
            for module, training in before.items():
                module.training = training
