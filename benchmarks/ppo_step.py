"""Seconds and memory of one PPO update: ours against TRL 1.12's PPOTrainer on the same work, and both against the machine.

    python benchmarks/ppo_step.py [--updates 4] [--rounds 3] [--epochs 1 4] [--before FOLDER] [--json FILE]

Every run is a process of its own, ours and TRL's in turn, so that memory is each one's own and a noisy minute hits both.
`--before` times another checkout of this project in the same run."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BATCH, NEW_TOKENS = 8, 50
PROMPT_TOKENS = range(37, 41)
KL_COEF, LEARNING_RATE = 0.05, 1e-4
PARTS = ("generate", "reward", "forward", "update", "optimizer", "total")


# ---------------------------------------------------------------- in a process of its own: one trainer


def now():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds per update by part. "update" is what the others leave of the total: forward and backward passes, and stats."""

    def __init__(self):
        self.updates, self.began = [], None

    def wrap(self, part, function):
        """`function`, whose seconds count for `part` (or for what `part` says of its arguments; None: do not count)."""

        def timed(*args, **kwargs):
            start, name = now(), part(*args) if callable(part) else part
            result = function(*args, **kwargs)
            if name:
                self.updates[-1][name] += now() - start
            return result

        return timed

    def begin(self):
        """An update begins, the last one ends."""
        self.end()
        self.updates.append(dict.fromkeys(PARTS, 0.0))
        self.began = now()

    def end(self):
        if self.began is not None:
            update = self.updates[-1]
            update["total"] = now() - self.began
            update["update"] = update["total"] - sum(update[part] for part in PARTS if part not in ("update", "total"))
            self.began = None


def shared_work(updates):
    """(prompts, their token ids, tokenizer, reward model): BATCH prompts of about the same length for every update."""
    from rlhf_helpers.config import CPU, DATA_FILE, project_root
    from rlhf_helpers.data import load_prompts
    from rlhf_helpers.models import encode_prompt, load_tokenizer
    from rlhf_helpers.reward import ensure_reward_model

    tokenizer = load_tokenizer(CPU.model)
    encoded = [(prompt, encode_prompt(tokenizer, prompt)) for prompt in load_prompts(project_root() / DATA_FILE)]
    encoded = [(prompt, ids) for prompt, ids in encoded if len(ids) in PROMPT_TOKENS]
    prompts, queries = zip(*(encoded[i % len(encoded)] for i in range(BATCH * updates)))
    return prompts, queries, tokenizer, ensure_reward_model(say=lambda text: print(text, file=sys.stderr))


def ours(epochs, updates, options):
    """(Clock, policy, passes) after `updates` updates with our trainer."""
    from rlhf_helpers.config import CPU, PPOConfig
    from rlhf_helpers.models import load_policy
    from rlhf_helpers.trainer import PPOTrainer

    prompts, queries, tokenizer, reward_model = shared_work(updates)
    config = PPOConfig(
        batch_size=BATCH, mini_batch_size=BATCH, ppo_epochs=epochs, max_new_tokens=NEW_TOKENS, adap_kl_ctrl=False,
        init_kl_coef=KL_COEF, learning_rate=LEARNING_RATE, temperature=1.0,
    )  # fmt: skip
    trainer = PPOTrainer(config, load_policy(CPU)[0], tokenizer=tokenizer)
    clock = Clock()
    generate, reward = clock.wrap("generate", trainer.generate), clock.wrap("reward", reward_model)
    trainer._score_tokens = clock.wrap("forward", trainer._score_tokens)
    trainer.optimizer.step = clock.wrap("optimizer", trainer.optimizer.step)
    for first in range(0, len(prompts), BATCH):
        rows = slice(first, first + BATCH)
        clock.begin()
        responses = generate(queries[rows], eos_token_id=-1)  # never ends early
        scores = reward(prompts[rows], trainer.decode(responses))
        stats = trainer.step(queries[rows], responses, scores)
        clock.end()
        if apart := stats.get("objective/sampler_max_diff", 0):  # as may be on another machine; before it was counted, none
            print(f"sampler and trainer differ by up to {apart:g} nats on a token", file=sys.stderr)
        assert all(len(response) == NEW_TOKENS for response in responses)
    scoring = 1 if trainer.sampler_is_exact else 2  # the reference, and the policy where its samples do not say it all
    return clock, trainer.model, scoring + 2 * epochs


def trl(epochs, updates, options):
    """The same with TRL, set as fast as it still learns: 4-bit critic (with adapters, or just its last layer trained), no gradient
    checkpointing, no autocast, no sample tables, and a pad token that is not EOS, which its masks need."""
    import tempfile
    from types import SimpleNamespace

    import torch
    import trl.experimental.ppo.ppo_trainer as module
    from datasets import Dataset
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForSequenceClassification

    from rlhf_helpers.config import CPU
    from rlhf_helpers.machine import device_and_dtype
    from rlhf_helpers.models import load_causal_lm, quantization_config, resolve
    from rlhf_helpers.quirks import keep_gradients

    prompts, queries, tokenizer, reward_model = shared_work(updates)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    text_of = {tuple(ids.tolist()): prompt for prompt, ids in zip(prompts, queries)}

    class Reward(torch.nn.Module):
        """Our reward model, which reads text, in the shape that TRL takes: a backbone on the policy's token ids."""

        base_model_prefix, score = "backbone", torch.nn.Identity()

        def backbone(self, input_ids, attention_mask, **_):
            real = attention_mask.bool()
            split = lambda part: [ids[keep].tolist() for ids, keep in zip(input_ids[:, part], real[:, part])]
            known = [text_of[tuple(ids)] for ids in split(slice(-NEW_TOKENS))]
            texts = tokenizer.batch_decode(split(slice(-NEW_TOKENS, None)), skip_special_tokens=True)
            scores = reward_model(known, texts).to(input_ids.device)
            return SimpleNamespace(hidden_states=[scores[:, None, None].expand(*input_ids.shape, 1)])

    device, dtype = device_and_dtype()
    lora = dict(r=CPU.lora_r, lora_alpha=CPU.lora_alpha, target_modules=list(CPU.lora_targets), lora_dropout=0.0)
    policy = load_causal_lm(CPU.model)
    policy.set_attn_implementation(options.trl_attention)
    critic = AutoModelForSequenceClassification.from_pretrained(
        resolve(CPU.model), num_labels=1, dtype=dtype, quantization_config=quantization_config(dtype),
        device_map={"": device}, attn_implementation=options.trl_attention,
    ).requires_grad_(False)  # fmt: skip
    keep_gradients(critic)
    critic.score.float().requires_grad_(True).register_forward_pre_hook(lambda layer, inputs: inputs[0].float())
    if options.trl_critic == "lora":
        inject_adapter_in_model(LoraConfig(**lora), critic)

    with tempfile.TemporaryDirectory() as folder:
        args = module.PPOConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, num_ppo_epochs=epochs, total_episodes=BATCH * updates,
            response_length=NEW_TOKENS, kl_coef=KL_COEF, learning_rate=LEARNING_RATE, temperature=1.0, bf16=False,
            gradient_checkpointing=False, num_sample_generations=0, use_cpu=device.type == "cpu", save_strategy="no",
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        rows = Dataset.from_dict({"input_ids": [ids.tolist() for ids in queries]})
        adapters = LoraConfig(**lora, task_type="CAUSAL_LM")
        trainer = module.PPOTrainer(args, tokenizer, policy, None, Reward(), rows, critic, peft_config=adapters)
        trainer.log = lambda metrics: None
        clock = Clock()
        generate = clock.wrap("generate", module.batch_generation)

        def batch_generation(*args):
            clock.begin()
            whole, logits = generate(*args)
            assert logits.shape[:2] == (BATCH, NEW_TOKENS)
            return whole, logits

        module.batch_generation = batch_generation
        module.get_reward = clock.wrap(lambda m, *_: "reward" if isinstance(m, Reward) else "forward", module.get_reward)
        module.forward = clock.wrap(lambda *_: None if torch.is_grad_enabled() else "forward", module.forward)
        trainer.optimizer.step = clock.wrap("optimizer", trainer.optimizer.step)
        trainer.train()
        clock.end()
    return clock, trainer.model.policy, 2 + (4 if options.trl_critic == "lora" else 3) * epochs  # the critic is a second body


def peak_mb():
    """Most memory that this process has held, or on a CUDA machine that it has held on the card."""
    import torch

    from rlhf_helpers.machine import peak_megabytes

    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else peak_megabytes() * 1.048576


def measure(options):
    """What a child process prints: the updates after the first, memory, and how many LoRA B matrices have left zero."""
    clock, policy, passes = {"ours": ours, "trl": trl}[options.child](options.epochs[0], options.updates + 1, options)
    moved = [bool(p.detach().any()) for name, p in policy.named_parameters() if "lora_B" in name]
    return dict(updates=clock.updates[1:], peak_mb=peak_mb(), moved=sum(moved), matrices=len(moved), passes=passes)


# ---------------------------------------------------------------- in a process of its own: the machine


def best_seconds(function, repeats=9):
    """The fastest of some runs, after two that warm up."""
    seconds = []
    for _ in range(repeats + 2):
        start = now()
        function()
        seconds.append(now() - start)
    return min(seconds[2:])


def roofline():
    """What this machine can do, bytes read and multiplications per second, and what the model's weights ask of it."""
    import bitsandbytes as bnb
    import torch

    from rlhf_helpers.config import CPU
    from rlhf_helpers.machine import device_and_dtype
    from rlhf_helpers.models import load_causal_lm

    device, _ = device_and_dtype()
    big = torch.ones(2**27, device=device)  # 512 MiB, beyond any cache
    rates = {"read GB/s": big.nbytes / best_seconds(big.sum) / 1e9}
    del big
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in "ab")
        rates[f"{str(dtype).removeprefix('torch.')} GFLOP/s"] = 2 * 2048**3 / best_seconds(lambda: a @ b) / 1e9

    lm = load_causal_lm(CPU.model)
    layers = [layer for layer in lm.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    states = [layer.weight.quant_state for layer in layers]
    scales = sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    packed = sum(layer.weight.nbytes for layer in layers) + scales
    head = lm.get_output_embeddings().weight
    width = max(PROMPT_TOKENS) + NEW_TOKENS
    attention = 4 * BATCH * width**2 * lm.config.hidden_size * lm.config.num_hidden_layers
    return dict(
        rates=rates,
        step_mb={"bf16": (2 * weights + head.nbytes) / 1e6, "NF4": (packed + head.nbytes) / 1e6},
        pass_gflop=(2 * weights * BATCH * width + 2 * head.numel() * BATCH * NEW_TOKENS + attention) / 1e9,
    )


# ---------------------------------------------------------------- the parent: takes turns and compares


def child(name, folder=ROOT, **options):
    """The JSON line that a child process prints last, run by the benchmark of the checkout in `folder`."""
    command = [sys.executable, "-W", "ignore", str(folder / "benchmarks" / "ppo_step.py"), "--child", name]
    for option, value in options.items():
        command += [f"--{option.replace('_', '-')}", str(value)]
    environment = os.environ | {"PYTHONPATH": str(folder), "RLHF_HOME": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs):
    """Median and minimum of every part over all updates of all rounds, and the peak."""
    updates = [update for run in runs for update in run["updates"]]
    parts = {part: [update[part] for update in updates] for part in PARTS}
    return {
        "median": {part: statistics.median(seconds) for part, seconds in parts.items()},
        "min": {part: min(seconds) for part, seconds in parts.items()},
        "peak_mb": max(run["peak_mb"] for run in runs),
        "passes": runs[0].get("passes"),
    }


def report(summaries, machine):
    """Print the tables."""
    print(f"\nseconds per update, median / minimum; batch {BATCH}, {NEW_TOKENS} new tokens")
    print(f"| trainer | epochs | {' | '.join(PARTS)} | peak MB |\n|{'---|' * (len(PARTS) + 3)}")
    for (name, epochs), s in summaries.items():
        cells = (f"{s['median'][part]:.2f} / {s['min'][part]:.2f}" for part in PARTS)
        print(f"| {name} | {epochs} | {' | '.join(cells)} | {s['peak_mb']:.0f} |")
    for epochs in sorted({epochs for _, epochs in summaries}):
        b = summaries["trl", epochs]
        for name in [name for name, e in summaries if e == epochs and name != "trl"]:
            a = summaries[name, epochs]
            times = [b[kind]["total"] / a[kind]["total"] for kind in ("min", "median")]
            print(f"epochs {epochs}: TRL / {name} {times[0]:.2f} by minima, {times[1]:.2f} by medians; ", end="")
            print(f"memory {name} / TRL {a['peak_mb'] / b['peak_mb']:.2f}")

    rates = machine["rates"]
    print("\nthis machine: " + ", ".join(f"{rate:.0f} {name}" for name, rate in rates.items()))
    for name, mb in machine["step_mb"].items():
        floor = NEW_TOKENS * mb / 1e3 / rates["read GB/s"]
        print(f"reading the weights {NEW_TOKENS} times, {name}, {mb:.0f} MB: {floor:.2f} s", end="")
        print("".join(f"; {who} {e} epochs: x{s['min']['generate'] / floor:.1f}" for (who, e), s in summaries.items()))
    for (who, epochs), s in summaries.items():
        # Reference (and policy) forward, then forward and backward per epoch; with frozen weights, backward costs one forward.
        passes = s["passes"] or 2 + 2 * epochs
        floor = passes * machine["pass_gflop"] / rates["bfloat16 GFLOP/s"]
        taken = s["min"]["forward"] + s["min"]["update"]
        print(f"{passes} passes of {machine['pass_gflop']:.0f} GFLOP: {floor:.2f} s; {who}: x{taken / floor:.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=4, help="counted updates per run; one more before them warms up")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each trainer")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--before", metavar="FOLDER", help="another checkout of this project, timed as well")
    parser.add_argument("--json", metavar="FILE", help="keep every number here")
    parser.add_argument("--trl-critic", choices=["head", "lora"], default="lora", help="what of TRL's critic is trained")
    parser.add_argument("--trl-attention", choices=["eager", "sdpa"], default="sdpa")
    parser.add_argument("--child", choices=["ours", "trl", "roofline"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(roofline() if options.child == "roofline" else measure(options)))
        return

    machine, runs = child("roofline"), {}
    contestants = {"ours": ROOT, "trl": ROOT} | ({"before": Path(options.before).resolve()} if options.before else {})
    for number in range(options.rounds):
        for epochs in options.epochs:
            for name, folder in contestants.items():
                given = dict(trl_critic=options.trl_critic, trl_attention=options.trl_attention)
                run = child("trl" if name == "trl" else "ours", folder, updates=options.updates, epochs=epochs, **given)
                if not run["moved"] == run["matrices"] > 0:
                    sys.exit(f"{name}: {run['moved']} of {run['matrices']} LoRA B matrices moved; expected all")
                runs.setdefault((name, epochs), []).append(run)
                seconds = ", ".join(f"{update['total']:.2f}" for update in run["updates"])
                print(f"round {number + 1}, {epochs} epochs, {name}: {seconds} s; {run['peak_mb']:.0f} MB", flush=True)
    summaries = {key: summary(of) for key, of in runs.items()}
    report(summaries, machine)
    if options.json:
        rows = [dict(trainer=name, epochs=epochs, runs=of) for (name, epochs), of in runs.items()]
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(dict(machine=machine, runs=rows), file, indent=1)


if __name__ == "__main__":
    main()
