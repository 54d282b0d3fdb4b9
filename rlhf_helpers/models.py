"""The policy: a causal language model in 4-bit NF4 with LoRA adapters and a value head, and its tokenizer.

The reference of the KL penalty is the same model with its adapters switched off: no second copy exists."""

import contextlib
import gc
import os
from pathlib import Path

import torch
from jinja2 import TemplateError
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from rlhf_helpers.assets import ASSETS, ensure_model
from rlhf_helpers.classic import MODEL_NAMES, instead
from rlhf_helpers.data import turns
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import reason, shown
from rlhf_helpers.machine import device_and_dtype, no_four_bit
from rlhf_helpers.quirks import give_back_large_blocks, give_back_the_rest, is_4bit_layer, keep_gradients, unmap
from rlhf_helpers.shard import STORAGE, several_processes, shard

transformers_logging.disable_progress_bar()  # "Loading weights: 100%" on stderr, once per load


# ---------------------------------------------------------------- tokenizer, 4-bit model


def resolve(model):
    """What `from_pretrained` can load for `model`: a name of ASSETS (fetched if missing), a folder, or org/model on a hub.
    Raises InputError for anything else, adapters among it."""
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(f"model is {shown(model)}; expected a name, a folder, or org/model")
    if str(model) in ASSETS:
        return str(ensure_model(str(model)))
    if (Path(model) / "adapter_config.json").is_file():
        refuse_adapters(model)
    if (Path(model) / "config.json").is_file():
        return str(model)
    if str(model).count("/") == 1 and not Path(model).exists() and not str(model).startswith((".", "/")):
        return str(model)
    raise InputError(
        f"unknown model {str(model)!r}; expected one of {', '.join(ASSETS)}, a folder with config.json, or org/model"
    )


def refuse_adapters(model):
    raise InputError(
        f"{model}: a folder of adapters, which new ones would silently replace; expected the model under them (to go on from "
        "adapters: PolicyWithValueHead(PeftModel.from_pretrained(base, folder, is_trainable=True)))"
    )


@contextlib.contextmanager
def usable(model):
    """Inside, whatever transformers finds wrong with a model's files is an InputError: it reads folders that others wrote."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        way = " Accept its terms on the hub, and set HF_TOKEN." if "gated repo" in str(error) else ""
        raise InputError(
            f"{model}: cannot be used as a model ({reason(error)}{way}); expected one that transformers can load"
        ) from error


def quantization_config(compute_dtype=torch.bfloat16, storage=torch.uint8):
    """4-bit NF4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314). `storage` is the dtype whose bits hold the codes:
    another one changes no number."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=storage,
    )


def load_tokenizer(model):
    """The model's tokenizer, padding on the left and with a pad token: its own, else an unused reserved token, else EOS
    (harmless here, where masks come from lengths). The vocabulary is never resized."""
    folder = resolve(model)
    with usable(model):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token_id is None:
        spare = [t for t in ("<|endoftext|>", "<pad>", "<unk>") if t in tokenizer.get_vocab() and t != tokenizer.eos_token]
        tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    return tokenizer


def eos_ids(lm, tokenizer):
    """The token ids that end a response: the tokenizer's EOS, and those of the model's generation_config. (Gemma and Phi end a
    turn with another token than EOS.)"""
    named = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    named = [] if named is None else named if isinstance(named, (list, tuple)) else [named]
    return tuple(dict.fromkeys(i for i in [tokenizer.eos_token_id, *named] if i is not None))


def as_chat(tokenizer, prompt, system=None):
    """The turns of a prompt as the tokenizer's chat template takes them: [{"role", "content"}, ...]. `system` is the system's turn, for
    a prompt that has none of its own; where the template has no such turn (Mistral's first), it goes before the first question."""
    chat = turns(prompt)
    if system is not None and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": system}, *chat]
    if chat[0]["role"] == "system" and len(chat) > 1 and not _has_system_turn(tokenizer, chat):
        head, *rest = chat
        if rest[0]["role"] == "user":
            return [{"role": "user", "content": f"{head['content']}\n\n{rest[0]['content']}"}, *rest[1:]]
        return [{"role": "user", "content": head["content"]}, *rest]
    return chat


def _has_system_turn(tokenizer, chat):
    """Whether the template writes what the first turn, the system's, says: some refuse it, and some (Phi-3-mini's of 2024) drop it."""
    probe = "xq7wz"  # a word that no template has, in letters that none escapes
    try:
        return probe in tokenizer.apply_chat_template([chat[0] | {"content": probe}, *chat[1:]], tokenize=False)
    except TemplateError:
        return False


def encode_prompt(tokenizer, prompt, system=None):
    """The query: token ids of the prompt as the model was trained to read it, in its chat template and ready for its answer
    (or as plain text, where the tokenizer has no template). A transcript's turns become the template's. `system` is the
    system's turn, for a prompt that has none of its own. A 1-D LongTensor."""
    if tokenizer.chat_template is None:
        text = prompt if system is None else f"{system}\n\n{prompt}"
        ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
        closed = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
        return ids[:-1] if closed else ids  # some tokenizers end every text, and this one goes on
    chat = as_chat(tokenizer, prompt, system)
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise InputError(
            f"prompt {shown(prompt)}: the chat template refuses it ({reason(error)}); expected turns that it takes"
        ) from None
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]


def load_causal_lm(model, quantize=True, dtype=None, to_shard=False):
    """The frozen base model in 4-bit NF4 (or in the compute dtype, with `quantize=False`, and, with a sentence, on a CPU
    without bitsandbytes), in eval mode. `dtype` is that of the computation, by default the machine's. `to_shard` leaves it in the
    computer's memory, whole, as `shard.shard` wants it."""
    device, native = device_and_dtype()
    dtype = dtype or native
    if quantize and (lacking := no_four_bit()):
        if device.type != "cpu":
            raise InputError("bitsandbytes cannot be imported; expected it for 4-bit weights: pip install bitsandbytes")
        print(lacking, flush=True)
        quantize = False
    folder = resolve(model)
    gc.collect()  # a trainer holds itself in a ring: one that was deleted keeps its model in memory until somebody looks
    with usable(model):
        lm, info = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=dtype,
            quantization_config=quantization_config(dtype, STORAGE if to_shard else torch.uint8) if quantize else None,
            device_map={"": "cpu" if to_shard else device},
            attn_implementation="eager" if device.type == "cpu" else "sdpa",  # measured: eager trains faster on two cores
        )
        if info["missing_keys"]:  # transformers would fill them with random numbers
            raise ValueError(f"no weights for {sorted(info['missing_keys'])[0]}")
    if getattr(lm, "_hf_peft_config_loaded", False):  # transformers has put the adapters of a hub onto their base
        refuse_adapters(model)
    keep_gradients(lm)
    if device.type == "cpu" and quantize:
        unmap(lm)
    return lm.requires_grad_(False).eval()


def is_4bit(module):
    """Whether a model has 4-bit layers."""
    return any(map(is_4bit_layer, module.modules()))


def load_policy(profile, seed=0, quantize=True, dtype=None, sharded=False):
    """(policy, tokenizer) of a profile: 4-bit base, new LoRA adapters (fp32, B zero, so KL starts at 0), value head. `sharded`: the
    base in slices, one for each process (see `shard`)."""
    if sharded:
        several_processes()
    give_back_large_blocks()
    tokenizer = load_tokenizer(profile.model)
    lm = load_causal_lm(profile.model, quantize, dtype, sharded)
    try:
        policy = with_adapters(lm, profile, seed)
    except ValueError as error:
        if "target_modules" not in str(error):  # else a family of which PEFT knows no layers
            raise
        expected = f"expected layers named {', '.join(profile.lora_targets)}"
        raise InputError(f"{profile.model}: {type(lm).__name__} gets no adapters ({reason(error)}); {expected}") from error
    if sharded:
        shard(policy)
    give_back_the_rest()
    return policy, tokenizer


def with_adapters(lm, profile, seed=0):
    """The PolicyWithValueHead of a frozen base model under new LoRA adapters, as the profile says."""
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
    return policy


# ---------------------------------------------------------------- the forward pass


def positions_of(attention_mask):
    """Position ids (B, L) from a mask (B, L): a pad on the left must not shift the text."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def response_logits(lm, input_ids, attention_mask, response_length):
    """Logits (B, T, V) that predict the last T = `response_length` tokens of `input_ids` (B, P + T).

    The prompt is padded on the left and the response on the right, so position P - 1 predicts the first response token in
    every row. The language-model head runs on these T positions only."""
    width = input_ids.shape[1]
    predicting = torch.arange(width - response_length - 1, width - 1, device=input_ids.device)
    return lm(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions_of(attention_mask),
        logits_to_keep=predicting,
        use_cache=False,
    ).logits


@contextlib.contextmanager
def last_hidden(lm):
    """Gives a list to which every forward pass inside adds its last hidden states: what enters the language-model head, at just
    the positions that are asked for."""
    caught = []
    hook = lm.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        yield caught
    finally:
        hook.remove()


def at_the_last(lm, tokens, attention, positions, cache, last):
    """(logits (B, V), last hidden states (B, H), the cache) after reading `tokens` (B, n); `last`, the tensor [n - 1], is the one
    place that the head runs on (the number 1 would copy the head B times)."""
    with last_hidden(lm) as hidden:
        out = lm(
            input_ids=tokens,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last,
        )
    if getattr(out, "past_key_values", None) is None:
        raise InputError(f"{type(lm).__name__} keeps no past_key_values; expected a decoder with a key-value cache")
    return out.logits[:, -1], hidden[-1][:, -1], out.past_key_values


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
        head = isinstance(causal_lm, nn.Module) and getattr(causal_lm, "get_output_embeddings", lambda: None)()
        if not head:
            found = type(causal_lm).__name__ if isinstance(causal_lm, nn.Module) else shown(causal_lm)
            raise TypeError(
                f"causal_lm is {found}; expected a causal language model (models.load_causal_lm, AutoModelForCausalLM)"
            )
        keep_gradients(causal_lm)
        self.pretrained_model = causal_lm
        # What is hooked, where a model narrows it (OPT-350m). A wrapper of PEFT's may turn `in_features` round, 4 bits have no shape.
        plain = head.weight.is_floating_point() and not is_4bit_layer(getattr(head, "base_layer", head))
        self.v_head = ValueHead(head.weight.shape[-1] if plain else head.in_features)
        self.v_head.to(head.weight.device)

    def __getattr__(self, name):
        if name in MODEL_NAMES:
            raise AttributeError(f"PolicyWithValueHead has no {name}{instead(name, MODEL_NAMES)}")
        return super().__getattr__(name)

    @property
    def config(self):
        return self.pretrained_model.config

    @property
    def has_adapters(self):
        return isinstance(self.pretrained_model, PeftModel)

    def forward(self, input_ids, attention_mask, response_length):
        """(logits (B, T, V) in the model's dtype, values (B, T) in fp32) that belong to the T response tokens."""
        with last_hidden(self.pretrained_model) as hidden:
            logits = response_logits(self.pretrained_model, input_ids, attention_mask, response_length)
        return logits, self.v_head(hidden[-1])

    @contextlib.contextmanager
    def adapters_off(self):
        """A context in which the model is its own reference. The adapters come back after an exception, too, and what is frozen
        of them stays so. Raises InputError for merged ones, which PEFT would take out of the weights for good."""
        if self.has_adapters and self.adapters_merged():
            raise InputError("the adapters are merged into the weights; expected them apart (unmerge_adapter)")
        learns = [(parameter, parameter.requires_grad) for parameter in self.pretrained_model.parameters()]
        try:
            with self.pretrained_model.disable_adapter() if self.has_adapters else contextlib.nullcontext():
                yield
        finally:
            for parameter, asked in learns:
                if parameter.requires_grad != asked:  # PEFT has every active adapter learn when it comes back
                    parameter.requires_grad_(asked)

    def active_adapters(self):
        """The names of the adapters that are read, a tuple."""
        return tuple(self.pretrained_model.active_adapters) if self.has_adapters else ()

    def adapters_are_off(self):
        """Whether some adapters are switched off now, as inside `adapters_off`."""
        return any(getattr(module, "disable_adapters", False) is True for module in self.pretrained_model.modules())

    def adapters_merged(self):
        """Whether some adapters are part of the weights now, as after PEFT's `merge_adapter`."""
        return any(getattr(module, "merged", False) is True for module in self.pretrained_model.modules())

    def enable_gradient_checkpointing(self):
        """Trade time for memory: keep one activation per layer and compute the others again in backward."""
        lm = self.pretrained_model
        enable = getattr(
            lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable
        )  # its name since transformers 5.23
        enable({"use_reentrant": False})
        self.pretrained_model.enable_input_require_grads()

    def require_gradients(self):
        """Raises RuntimeError, leaving no gradient behind, unless every adapter that learns has got one."""
        prefix = getattr(self.pretrained_model.base_model, "prefix", "lora_") if self.has_adapters else "lora_"
        for name, parameter in self.pretrained_model.named_parameters():
            if parameter.requires_grad and prefix in name and parameter.grad is None:
                self.zero_grad()
                raise RuntimeError(
                    f"adapter {name} got no gradient: it would never train. Was the 4-bit model run outside PolicyWithValueHead "
                    "and repacked by bitsandbytes? See quirks.keep_gradients"
                )

    @contextlib.contextmanager
    def without_dropout(self, checkpointing=False):
        """Eval mode inside, the former mode of every module after. PPO compares log-probs of several passes, so none of them
        may have dropout. transformers checkpoints layers in train mode only: with `checkpointing`, just their own flag is set."""
        before, rates = {module: module.training for module in self.modules()}, []
        self.eval()
        if checkpointing:
            for module in self.modules():
                module.training = bool(getattr(module, "gradient_checkpointing", False))
                if module.training:  # OPT's layers have dropout that is no module, and may be left out whole
                    rates += [
                        (module, name, rate)
                        for name, rate in vars(module).items()
                        if ("dropout" in name or name == "layerdrop") and isinstance(rate, float)
                    ]
        try:
            for module, name, _ in rates:
                setattr(module, name, 0.0)
            yield
        finally:
            for module, name, rate in rates:
                setattr(module, name, rate)
            for module, training in before.items():
                module.training = training
