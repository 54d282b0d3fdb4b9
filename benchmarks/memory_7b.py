"""Memory by part and seconds of a PPO step of the full-size Mistral-7B on one CUDA card. Its weights are random, so nothing is
downloaded: what a step holds and takes does not depend on their values.

    python benchmarks/memory_7b.py [--cap 16] [--trl] [--json FILE]
    python benchmarks/memory_7b.py --computed                               the same table by arithmetic, without a card
    python benchmarks/memory_7b.py --device cpu --layers 2 --hidden 256     the same code, small, without a card

Two settings: batch 2 in minibatches of 1, and batch 16 in minibatches of 4, all accumulated; 50 new tokens, gradient
checkpointing as in the profile GPU. Checked on the way: KL 0 and ratio 1 before the first update, a gradient for every
adapter, every lora_B moved."""

import argparse
import contextlib
import gc
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bitsandbytes as bnb
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from rlhf_helpers import models as loading
from rlhf_helpers.config import GPU
from rlhf_helpers.machine import device_and_dtype
from rlhf_helpers.memory import memory_by_part, peak
from rlhf_helpers.quirks import keep_gradients
from rlhf_helpers.trainer import PPOTrainer

SETTINGS = {
    "batch 2": dict(batch_size=2, mini_batch_size=1, gradient_accumulation_steps=1),
    "batch 16": dict(batch_size=16, mini_batch_size=4, gradient_accumulation_steps=4),
}
GOALS = {"batch 2": 9, "batch 16": 14}  # GB at the peak
PHASES = {"generate": "sampling", "_collect": "scoring", "_optimize": "updating"}  # the trainer's methods, one after the other
MB, GB = 1e6, 1e9
CONTEXT = 0.5  # GB that CUDA takes for itself, which torch does not count


# ---------------------------------------------------------------- the model


def mistral(layers=32, hidden=4096, vocabulary=32000):
    """The architecture of Mistral-7B-v0.1, or one of its shape with fewer or narrower layers."""
    heads = max(4, hidden // 128)
    return MistralConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        head_dim=hidden // heads,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        sliding_window=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def random_nf4(config, device, dtype):
    """The model as `load_causal_lm` gives it: frozen, in NF4, all else in `dtype`. Made a layer at a time: at no moment is more
    than one matrix unpacked."""
    quantization = loading.quantization_config(dtype)
    config._attn_implementation = "eager" if device.type == "cpu" else "sdpa"
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    replace_with_bnb_linear(lm, ["lm_head"], quantization)
    for module in lm.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            full = torch.ones(empty.shape, dtype=dtype, device=device)
            if empty.dim() == 2:
                full.normal_(0, 0.02)
            if isinstance(module, bnb.nn.Linear4bit):
                full = bnb.nn.Params4bit(
                    full, requires_grad=False, compress_statistics=True, quant_type="nf4", module=module
                ).to(device)
            else:
                full = torch.nn.Parameter(full, requires_grad=False)
            setattr(module, name, full)
    with device:
        lm.model.rotary_emb = type(lm.model.rotary_emb)(config)  # its buffers are computed, not loaded
    lm.is_loaded_in_4bit, lm.config.quantization_config = True, quantization  # what PEFT and accelerate look at
    keep_gradients(lm)
    return lm.requires_grad_(False).eval()


def word_tokenizer(vocabulary):
    """One word for every token id: id n is the word wn, after pad, EOS and unknown."""
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, vocabulary))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def make_policy(options, dtype=None):
    """(policy, tokenizer): the random model under the adapters, value head and checkpointing of `load_policy(GPU)`."""
    device, native = device_and_dtype()
    dtype = dtype or (getattr(torch, options.dtype) if options.dtype else native)
    lm = random_nf4(mistral(options.layers, options.hidden), device, dtype)
    profile = replace(GPU, gradient_checkpointing=not options.no_checkpointing)
    return loading.with_adapters(lm, profile), word_tokenizer(lm.config.vocab_size)


# ---------------------------------------------------------------- the meter


class Meter:
    """Peak memory, allocated and reserved, and seconds of every phase, in `phases`; of a phase seen twice the last. Phases must
    not lie inside each other: each begins by forgetting the peak."""

    def __init__(self):
        self.phases = {}

    @contextlib.contextmanager
    def __call__(self, phase):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seen = dict(seconds=time.perf_counter() - began)
        if torch.cuda.is_available():
            seen |= dict(allocated=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved())
        self.phases[phase] = seen

    def watch(self, trainer):
        """Meter the trainer's own methods."""
        for method, phase in PHASES.items():
            setattr(trainer, method, self.metered(getattr(trainer, method), phase))

    def metered(self, function, phase):
        def run(*args, **kwargs):
            with self(phase):
                return function(*args, **kwargs)

        return run


def held(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def resident(policy, trainer=None):
    """Bytes of what is always there, by part, counted tensor by tensor."""
    parts = dict.fromkeys(("linear layers", "embeddings, head, norms", "LoRA", "value head", "gradients and Adam"), 0)
    packed = [module for module in policy.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in packed:
        state = layer.weight.quant_state
        tensors = [layer.weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        parts["linear layers"] += held(tensors)
    done = {id(layer.weight) for layer in packed}
    for name, parameter in policy.named_parameters():
        part = "LoRA" if "lora_" in name else "value head" if "v_head" in name else "embeddings, head, norms"
        parts[part] += 0 if id(parameter) in done else held([parameter])
    if trainer:
        moments = [tensor for state in trainer.optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)]
        parts["gradients and Adam"] = held(moments) + held(trainer.parameters)  # a gradient is as large as its parameter
    return parts


# ---------------------------------------------------------------- one setting


def random_prompts(count, tokens, vocabulary):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, vocabulary, (count, tokens), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in row) for row in rows]


def reward_fn(prompts, responses):
    """Anything that differs from response to response and needs no model."""
    return [(sum(map(ord, response)) % 1000) / 500 - 1 for response in responses]


def fresh(policy):
    """The policy as a run begins: lora_B and the value head are zero."""
    for name, parameter in policy.named_parameters():
        if "lora_B" in name or "v_head" in name:
            torch.nn.init.zeros_(parameter)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(policy, tokenizer, settings, options):
    """A dict of one setting: bytes by part, peaks and seconds by phase (of the last step), what was checked."""
    fresh(policy)
    config = GPU.ppo_config(max_new_tokens=options.new_tokens, **settings)
    trainer, meter, with_gradient = PPOTrainer(config, policy, None, tokenizer), Meter(), set()
    adapters = {name: parameter for name, parameter in policy.named_parameters() if "lora_" in name}
    hooks = [p.register_post_accumulate_grad_hook(lambda p, name=name: with_gradient.add(name)) for name, p in adapters.items()]
    meter.watch(trainer)
    prompts = random_prompts(config.batch_size, options.prompt_tokens, len(tokenizer))
    trainer.train(prompts, reward_fn, steps=1)
    first = trainer.history[0]
    unmoved = [name for name, parameter in adapters.items() if "lora_B" in name and not parameter.any()]
    trainer.train(prompts, reward_fn, steps=options.steps - 1)
    for hook in hooks:
        hook.remove()
    phases = meter.phases
    for method in PHASES:
        delattr(trainer, method)  # the meter holds on to the trainer
    parts, seconds = resident(policy, trainer), sum(phases[phase]["seconds"] for phase in PHASES.values())
    ratio_error, skipped = first["ppo/policy/first_ratio_error"], sum(row["ppo/skipped_updates"] for row in trainer.history)
    checks = {
        f"KL before the first update is {first['objective/kl']:.3g}, expected 0": first["objective/kl"] == 0,
        f"the first ratio is off 1 by {ratio_error:.3g}, expected 0 (1e-2 will do)": ratio_error < 1e-2,
        f"{len(with_gradient)} of {len(adapters)} adapter matrices got a gradient": with_gradient == adapters.keys(),
        f"{len(unmoved)} lora_B did not move": not unmoved,
        f"{skipped:.0f} updates were skipped": not skipped,
    }
    if torch.cuda.is_available():
        above = max(seen["allocated"] for seen in phases.values()) - sum(parts.values())
        checks[f"the peak is {above / GB:.2f} GB above what is always held, less than a second base model"] = (
            above < parts["linear layers"]
        )
    computed = peak(memory_by_part(policy.config, config.batch_size, config.mini_batch_size, **sizes_of(options)))
    sampling = dict(token=phases["sampling"]["seconds"] / options.new_tokens, reading=reading_seconds(policy, parts))
    return dict(parts=parts, phases=phases, seconds=seconds, computed_peak=computed, checks=checks, sampling=sampling)


def reading_seconds(policy, parts):
    """What reading the weights that a token meets takes on this card, at the rate at which it copies: all but the embeddings, of
    which a token needs a row. None without a card."""
    if not torch.cuda.is_available():
        return None
    embeddings = held([policy.pretrained_model.get_input_embeddings().weight])
    weights = parts["linear layers"] + parts["embeddings, head, norms"] - embeddings
    source = torch.empty(10**9, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)  # reads and writes
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return weights / (2 * len(source) / min(seconds))


def measure_trl(policy, tokenizer, settings, options):
    """Seconds of TRL's step on the same work, and its peak."""
    from rlhf_helpers.trl_bridge import train_with_trl

    fresh(policy)
    config, meter = GPU.ppo_config(max_new_tokens=options.new_tokens, **settings), Meter()
    prompts = random_prompts(config.batch_size, options.prompt_tokens, len(tokenizer))
    with meter("whole run"):
        history = train_with_trl(policy, tokenizer, prompts, reward_fn, config, options.steps)
    return dict(seconds=history[-1]["time/total"], phases=meter.phases)


# ---------------------------------------------------------------- the report


def show(title, result):
    """Print one setting; return whether its checks held."""
    print(f"\n{title}")
    for part, size in result["parts"].items():
        print(f"  {part:24s} {size / MB:9.1f} MB")
    for phase, seen in result["phases"].items():
        memory = (
            f"peak {seen['allocated'] / GB:5.2f} GB, reserved {seen['reserved'] / GB:5.2f} GB"
            if "allocated" in seen
            else "no card"
        )
        print(f"  {phase:24s} {memory}   {seen['seconds']:6.2f} s")
    print(f"  peak, computed           {result['computed_peak'] / GB:.2f} GB (goal for the full size: {GOALS[title]} GB)")
    print(f"  seconds a step           {result['seconds']:.2f}")
    if result["sampling"]["reading"]:
        token, reading = result["sampling"]["token"], result["sampling"]["reading"]
        print(f"  a token of all responses {token * 1e3:.1f} ms; reading the 4-bit weights alone takes {reading * 1e3:.1f} ms")
    for line, holds in result["checks"].items():
        print(f"  {'ok' if holds else 'NO'}  {line}")
    return all(result["checks"].values())


def sizes_of(options):
    return dict(
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        lora_r=GPU.lora_r,
        lora_targets=GPU.lora_targets,
        checkpointing=not options.no_checkpointing,
    )


def title_of(options):
    return f"Mistral of {options.layers} layers, width {options.hidden}; {options.prompt_tokens} + {options.new_tokens} tokens"


def show_computed(options):
    """The table by arithmetic alone."""
    print(f"computed, not measured: {title_of(options)}")
    config, tables = mistral(options.layers, options.hidden), {}
    for title, setting in SETTINGS.items():
        tables[title] = memory_by_part(config, setting["batch_size"], setting["mini_batch_size"], **sizes_of(options))
    print(f"{'MB':26s}" + "".join(f"{title:>12s}" for title in tables))
    for part in tables["batch 2"]:
        print(f"{part:26s}" + "".join(f"{parts[part] / MB:12.1f}" for parts in tables.values()))
    print(f"{'peak':26s}" + "".join(f"{peak(parts) / MB:12.1f}" for parts in tables.values()))


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the code, with few layers")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="width, a multiple of 32")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=50)
    parser.add_argument("--steps", type=int, default=3, help="PPO steps per setting; the last one is timed")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), help="computed in, by default what the card does natively")
    parser.add_argument("--cap", type=float, metavar="GB", help="use no more of the card than a card of this size has")
    parser.add_argument("--trl", action="store_true", help="TRL's PPOTrainer on the same work, too")
    parser.add_argument("--computed", action="store_true", help="the table by arithmetic, and nothing else")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse(arguments)
    if options.computed:
        show_computed(options)
        return 0
    if options.device == "cpu":
        torch.cuda.is_available = lambda: False
    elif not torch.cuda.is_available():
        print(
            "error: no CUDA card here; --computed gives the table by arithmetic, --device cpu --layers 2 tries the code",
            file=sys.stderr,
        )
        return 2
    card = "no card"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        card = f"{properties.name}, {properties.total_memory / GB:.0f} GB"
        if options.cap:
            torch.cuda.set_per_process_memory_fraction(min(1.0, (options.cap - CONTEXT) * GB / properties.total_memory))
            card += f", capped at {options.cap:g} GB, of which CUDA itself takes {CONTEXT:g}"
    torch.manual_seed(0)
    meter = Meter()
    with meter("making the model"):
        policy, tokenizer = make_policy(options)
    print(f"{card}; {title_of(options)}")
    made = meter.phases["making the model"]
    print(
        f"making the model: {made['seconds']:.0f} s"
        + (f", peak {made['allocated'] / GB:.2f} GB" if "allocated" in made else "")
    )
    results, good = {"card": card, "options": {name: str(value) for name, value in vars(options).items()}, "made": made}, True
    for title, settings in SETTINGS.items():
        try:
            results[title] = measure(policy, tokenizer, settings, options)
            good &= show(title, results[title])
            if options.trl:
                results[f"{title}, TRL"] = theirs = measure_trl(policy, tokenizer, settings, options)
                print(f"  seconds a step, TRL      {theirs['seconds']:.2f}")
        except torch.cuda.OutOfMemoryError as error:
            results[title], good = "out of memory", False
            print(f"\n{title}: NO  out of memory: {str(error).splitlines()[0]}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
