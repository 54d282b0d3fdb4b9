"""What a trainer is made of, checked and prepared: the policy, its reference, Adam, processes; and which prompts a step takes."""

import contextlib
import copy
import functools
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from rlhf_helpers.classic import PROMPTS
from rlhf_helpers.config import PPOConfig, project_root
from rlhf_helpers.data import checked_list
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import is_whole_unicode, shown
from rlhf_helpers.machine import device_and_dtype
from rlhf_helpers.models import PolicyWithValueHead, encode_prompt, is_4bit, response_logits
from rlhf_helpers.quirks import give_back_large_blocks, keep_gradients
from rlhf_helpers.sampling import check_whole, digest, learnt_positions
from rlhf_helpers.shard import refuse_accelerate_engines


def check_parts(config, model, ref_model, tokenizer, advantages=None):
    """Raises TypeError or InputError for parts that do not make a trainer."""
    if not isinstance(config, PPOConfig):
        raise InputError(f"config is {shown(config)}; expected a PPOConfig")
    if not isinstance(model, PolicyWithValueHead):
        raise TypeError(f"model is a {type(model).__name__}; expected PolicyWithValueHead(your_causal_lm)")
    if ref_model is not None and not isinstance(ref_model, torch.nn.Module):
        raise InputError(f"ref_model is {shown(ref_model)}; expected a causal language model, a PolicyWithValueHead, or None")
    for name, given in dict(model=model, ref_model=ref_model).items():
        if given is not None and getattr(getattr(bare(given), "config", None), "is_encoder_decoder", False):
            found = type(bare(given)).__name__
            raise InputError(
                f"{name} has an encoder and a decoder ({found}); expected a decoder alone, a causal language model"
            )
    if advantages is not None and not callable(advantages):
        of_trl = not isinstance(advantages, str) and hasattr(advantages, "__len__")  # the fifth of its arguments in a row
        instead = f" (if this is TRL's dataset: {PROMPTS})" if of_trl else ""
        raise InputError(f"advantages is {shown(advantages)}; expected a function, such as advantages.leave_one_out{instead}")
    check_tokenizer(tokenizer, model)
    check_policy(model)
    if ref_model is None:
        check_stays_as_reference(model)
    else:
        check_reference(config, model, ref_model)
    warn_of_positions(model, tokenizer.pad_token_id)


def check_tokenizer(tokenizer, model):
    """Raises InputError for a tokenizer without a pad that the model has."""
    if tokenizer is not None and not hasattr(tokenizer, "pad_token_id"):
        raise InputError(f"tokenizer is {shown(tokenizer)}; expected a tokenizer (models.load_tokenizer gives one)")
    if tokenizer is None or tokenizer.pad_token_id is None:
        raise InputError("tokenizer: expected one with a pad token (models.load_tokenizer gives one)")
    last = model.config.get_text_config().vocab_size - 1
    if tokenizer.pad_token_id > last:
        raise InputError(
            f"tokenizer: its pad token has id {tokenizer.pad_token_id}; expected 0 to {last}, an id that the model has"
        )


def check_policy(model):
    """Raises InputError for a policy that could not learn."""
    if getattr(getattr(model.pretrained_model, "active_peft_config", None), "is_prompt_learning", False):
        raise InputError(
            "the policy has virtual tokens in front of its prompts; expected adapters inside its layers, e.g. LoRA"
        )
    if is_4bit(model) and not model.has_adapters:
        raise InputError(
            "the policy has 4-bit weights and no adapters: 4-bit weights get no gradient, so only scraps of it would train; "
            "expected a PEFT model, e.g. peft.get_peft_model(model, LoraConfig(task_type='CAUSAL_LM'))"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            raise InputError(
                f"parameter {name} is {str(parameter.dtype)[6:]} and would learn: an update far smaller than a weight is lost in its "
                "rounding; expected fp32 (model.float()), or a frozen model with LoRA adapters"
            )
    if not any(p.requires_grad for p in model.pretrained_model.parameters()):
        raise InputError(
            "no weight of the policy would learn: all are frozen; expected adapters with gradients (PeftModel.from_pretrained "
            "needs is_trainable=True)"
        )


def check_reference(config, model, ref_model):
    """Raises InputError for a reference that would move with the policy, or cannot read what that writes."""
    learns = {id(p) for p in model.pretrained_model.parameters() if p.requires_grad}
    vocabulary = model.config.get_text_config().vocab_size
    if bare(ref_model) is model.pretrained_model or learns & {id(p) for p in bare(ref_model).parameters()}:
        raise InputError(
            "ref_model is the policy itself, or shares weights with it that learn (PEFT puts adapters into the model that it is "
            "given); expected None (its adapters switched off) or another model"
        )
    ids = bare(ref_model).config.get_text_config().vocab_size
    if ids < vocabulary:
        raise InputError(f"ref_model has fewer token ids than the policy; expected at least {vocabulary}")
    if ids > vocabulary and config.kl_penalty == "full":
        raise InputError(
            f"ref_model has {ids} token ids and the policy {vocabulary}; expected as many, since kl_penalty 'full' compares all of them"
        )
    places, needed = (learnt_positions(bare(some).config.get_text_config()) for some in (ref_model, model))
    if places < needed:
        raise InputError(f"ref_model has {places} positions and the policy {needed}; expected at least as many")


def check_stays_as_reference(model):
    """Raises InputError for a policy that cannot be its own reference: with its adapters off it is not the base model, or will not
    stay it."""
    if not model.has_adapters:
        return
    lm = model.pretrained_model
    for name in lm.active_adapters:
        begun = str(getattr(lm.peft_config[name], "init_lora_weights", ""))
        if begun.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
            raise InputError(
                f"init_lora_weights={begun!r} rewrites the weights under the adapters, so with the adapters off it is not the "
                "model that it was made of; expected another beginning, or a ref_model"
            )
    own = (getattr(lm.base_model, "prefix", "lora_"), "modules_to_save", "trainable_tokens")
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad and not any(part in name for part in own):
            raise InputError(
                f"{name} would learn and is no adapter: with the adapters off the reference would move with it; expected it "
                "frozen (in LoRA: bias='none'), or a ref_model"
            )


def warn_of_positions(model, pad_id):
    """Warns of a model that reads a row padded on the left otherwise than the row alone: some families count positions in a way of
    their own (RoBERTa's begin behind the pad's id, BART's decoder counts pads)."""
    lm, last = model.pretrained_model, model.config.get_text_config().vocab_size - 1
    device = lm.get_input_embeddings().weight.device
    ids = torch.tensor([[id for id in range(last, last - 7, -1) if id != pad_id][:6]], device=device).clamp(min=0)
    padded, mask = F.pad(ids, (3, 0), value=pad_id), F.pad(torch.ones_like(ids), (3, 0))
    with torch.no_grad(), model.without_dropout():
        alone, ours = lm(input_ids=ids).logits[:, -2], response_logits(lm, padded, mask, 1)[:, 0]
    apart = (alone.float().log_softmax(-1).max() - ours.float().log_softmax(-1)[0, alone[0].argmax()]).abs().item()
    if apart > 0.3:  # rounding alone, of bf16 products, made up to 0.17
        warnings.warn(
            f"{type(bare(model)).__name__} reads a prompt behind pads otherwise than the prompt alone: the likeliest next token is "
            f"{apart:.2f} nats apart; expected a model that takes position_ids from 0, such as Llama, Mistral, Qwen or GPT-2",
            stacklevel=4,
        )


def check_still_there(call, model, parameters):
    """Raises InputError where parameters of the optimizer are in the model no more: what stands in their place would never train."""
    here = set(map(id, model.parameters()))
    if any(id(p) not in here for p in parameters):
        raise InputError(
            f"{call}: weights that the trainer's optimizer moves are not in the model any more (adapters unloaded or loaded anew, "
            "another head?); expected a new PPOTrainer after such a change"
        )


def check_still_learns(model, parameters, optimizer, in_use):
    """Raises InputError where a step would teach the policy nothing."""
    check_still_there("step", model, parameters)
    if not in_use:
        raise InputError(
            "step: the adapters that this trainer trains are off, merged, or not the active ones; expected them in use"
        )
    if not torch.is_grad_enabled():
        raise InputError("step: gradients are switched off here, as inside torch.no_grad; expected them on")
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(p.requires_grad and id(p) in moved for p in model.pretrained_model.parameters()):
        raise InputError(
            "step: nothing of the policy learns any more (frozen since the trainer was made, or another optimizer?); expected "
            "weights with requires_grad that the optimizer has, if at a rate of 0"
        )


def check_loop(steps, reward_fn, on_step):
    """Raises InputError for what `PPOTrainer.train` cannot go on with."""
    if steps is not None:
        check_whole("train", 0, steps=steps)
    for name, function in (("reward_fn", reward_fn), ("on_step", on_step)):
        if not callable(function) and (name == "reward_fn" or function is not None):
            raise InputError(f"train: {name} is {shown(function)}; expected a function")


def bare(model):
    """A model without its value head."""
    return model.pretrained_model if isinstance(model, PolicyWithValueHead) else model


def processes(config):
    """Accelerate's view of this process and its fellows. No autocast, whatever `accelerate config` says: it would reach scoring,
    and not sampling; and no compiling, which would rename the weights of checkpoints."""
    refuse_accelerate_engines()
    on_cpu = device_and_dtype()[0].type == "cpu"  # said aloud, else Accelerate would not join several processes on a CPU
    if on_cpu:
        give_back_large_blocks()
    folder = project_root() / "output" / "tracking"
    here = [str(tracker) for tracker in get_available_trackers()]
    if config.log_with not in (None, "all", *here):  # Accelerate would pass over one that it knows and that is not installed
        installed = ", ".join(here) or "none is installed (pip install -e .[tracking])"
        raise InputError(f"PPOConfig.log_with is {shown(config.log_with)}; expected a tracker that is installed: {installed}")
    accelerator = Accelerator(
        cpu=on_cpu, mixed_precision="no", dynamo_backend="no", log_with=config.log_with, project_dir=folder
    )
    batch = config.batch_size * accelerator.num_processes
    if config.adap_kl_ctrl and config.horizon <= 0.2 * batch:  # PPOConfig knows one process alone
        raise InputError(
            f"PPOConfig.horizon is {config.horizon:g}; expected above 0.2 x batch_size x {accelerator.num_processes} processes = "
            f"{0.2 * batch:g}: a step far below the target would turn the coefficient negative"
        )
    if config.log_with:
        accelerator.init_trackers("rlhf-ppo", config={k: v for k, v in vars(config).items() if v is not None})
    return accelerator


def reference_of(model, ref_model, device):
    """The reference, without dropout: what is given (moved to the device and asked without gradients, but not frozen: another trainer may train it), or a
    frozen copy of a policy without adapters, or None: then it is the policy with its adapters switched off."""
    if ref_model is None and model.has_adapters:
        return None
    lm = bare(ref_model) if ref_model is not None else copy.deepcopy(model.pretrained_model).requires_grad_(False)
    keep_gradients(lm)  # of 4-bit layers also the numbers: repacked, they round otherwise than the policy's
    return (lm if is_4bit(lm) else lm.to(device)).eval()


def adam(model, config):
    """Adam on all that trains, the value head at a rate of its own."""
    policy = [p for p in model.pretrained_model.parameters() if p.requires_grad]
    value_lr = config.value_learning_rate or config.learning_rate
    return torch.optim.Adam(
        [dict(params=policy, lr=config.learning_rate), dict(params=list(model.v_head.parameters()), lr=value_lr)]
    )


def encode_prompts(tokenizer, prompts, room, system=None):
    """(prompts, queries): those of at most `room` tokens, and their token ids. The others are counted in a warning."""
    prompts = checked_list("prompts", prompts)
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not is_whole_unicode(prompt):
            raise InputError(f"prompts[{row}] is {shown(prompt)}; expected some text")
    queries = [encode_prompt(tokenizer, prompt, system) for prompt in prompts]
    for row, query in enumerate(queries):
        if len(query) == 0:
            raise InputError(f"prompts[{row}] is {shown(prompts[row])}, which has no tokens; expected some text")
    if not prompts:
        raise InputError("prompts: none; expected at least one")
    if room < 1:
        raise InputError(
            f"max_new_tokens leaves {room} places for a prompt; expected a smaller one, or a model with more positions"
        )
    kept = [(prompt, query) for prompt, query in zip(prompts, queries) if len(query) <= room]
    if not kept:
        raise InputError(
            f"prompts: none of {len(prompts)} fits into {room} tokens; expected shorter ones, or a smaller max_new_tokens"
        )
    if len(kept) < len(prompts):
        warnings.warn(f"skipped {len(prompts) - len(kept)} of {len(prompts)} prompts: longer than {room} tokens", stacklevel=3)
    return [prompt for prompt, _ in kept], [query for _, query in kept]


def checked_order(order, n):
    """The order in which an epoch takes the n rows of a rollout, as a LongTensor. Raises InputError unless each is there once."""
    try:
        rows = torch.as_tensor(np.asarray(order))
        fits = rows.dtype in (torch.int64, torch.int32) and sorted(rows.tolist()) == list(range(n))
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise InputError(f"permutation gave {shown(order)}; expected each of 0 to {n - 1} once")
    return rows.long()


def rows_of(batch, size, n, seed, repeats=1):
    """Which of n prompts batch number `batch` uses: `size` numbers from an endless row of shuffled passes over them, each of
    them `repeats` times in a row."""
    if repeats > 1:
        return [row for row in rows_of(batch, size // repeats, n, seed) for _ in range(repeats)]
    generator = lambda turn: torch.Generator().manual_seed(1_000_003 * (seed + 1) + turn)
    shuffled = functools.cache(lambda turn: torch.randperm(n, generator=generator(turn)))  # each pass once
    return [shuffled(place // n)[place % n].item() for place in range(batch * size, (batch + 1) * size)]


@contextlib.contextmanager
def told_if_half(parameters, before, step):
    """Where what is inside ends with an error after weights have moved, a note on that error: half a step cannot be taken back.
    `before` is the `digest` of the parameters."""
    try:
        yield
    except BaseException as error:
        if digest(parameters) != before:
            error.add_note(
                f"Step {step} ended inside, and a part of it is in the weights: begin anew, or go on from a saved checkpoint."
            )
        raise
