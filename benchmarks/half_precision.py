"""Would PPO in fp16 need loss scaling? The gradients of one minibatch, computed in bf16, in fp16, and in fp16 with the loss
multiplied by 1,024 first, beside those computed in fp32 from the same 4-bit weights.

    python benchmarks/half_precision.py            SmolLM2 in NF4, 8 prompts, 50 sampled tokens each
    python benchmarks/half_precision.py --wide     2 layers of width 2048, random weights, in the shape of Mistral

fp16 holds nothing below 6e-8: gradients that are smaller on their way through the layers would be lost, and the adapters
below would learn less, or nothing. A tensor's error is the norm of its difference from fp32's, by the norm of fp32's."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import memory_7b
from rlhf_helpers.config import CPU, project_root
from rlhf_helpers.data import load_prompts
from rlhf_helpers.machine import device_and_dtype
from rlhf_helpers.models import load_policy
from rlhf_helpers.trainer import PPOTrainer

CASES = [("bf16", torch.bfloat16, 1), ("fp16", torch.float16, 1), ("fp16, loss x 1024", torch.float16, 1024)]
SCORES = [0.5, -1.0, 1.2, -0.3, 0.8, -0.9, 0.1, -0.4]
SHARE = 1 / 2  # of the update: the profile's batch is two such minibatches


def as_after_some_training(policy, deviation):
    """Fill the adapters' B and the value head, which begin at zero, so that every trained tensor gets a gradient."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name or "summary.weight" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * deviation)


def make_trainer(dtype, wide):
    """A trainer on SmolLM2, or on the wide model, with arithmetic in `dtype`."""
    options = memory_7b.parse(["--device", device_and_dtype()[0].type, "--layers", "2", "--hidden", "2048"])
    torch.manual_seed(0)
    policy, tokenizer = memory_7b.make_policy(options, dtype) if wide else load_policy(CPU, dtype=dtype)
    as_after_some_training(policy, 0.01)
    config = CPU.ppo_config(batch_size=8, mini_batch_size=8, gradient_accumulation_steps=1)
    return PPOTrainer(config, policy, None, tokenizer)


def texts(trainer, wide):
    """(queries, responses): prompts of the course and samples, or random ids for random weights."""
    if wide:
        generator = torch.Generator().manual_seed(1)
        ids = lambda length: torch.randint(3, 32000, (length,), generator=generator)
        return [ids(10 + i) for i in range(8)], [ids(20 + i) for i in range(8)]
    _, queries = trainer.encode(load_prompts(project_root() / "data" / "prompts_train.jsonl")[:8])
    return queries, trainer.generate(queries)


def gradients(trainer, queries, responses, scale=1):
    """The gradient of every trained tensor, by name, of one minibatch."""
    rollout = trainer.inspect(queries, responses, SCORES)
    with trainer.model.without_dropout(checkpointing=True):
        loss, _ = trainer._minibatch(rollout, torch.arange(len(queries), device=trainer.device))
        (loss * SHARE * scale).backward()
    trained = ((name, p) for name, p in trainer.model.named_parameters() if p.requires_grad)
    return {name: p.grad.float().cpu() / scale for name, p in trained}


def compare(found, exact):
    """(error of all together, median and largest error of a tensor, share of zeros, whether all are finite)."""
    errors = torch.stack([(found[name] - exact[name]).norm() / exact[name].norm() for name in exact])
    all_found, all_exact = (torch.cat([g.flatten() for g in some.values()]) for some in (found, exact))
    total = (all_found - all_exact).norm() / all_exact.norm()
    return (
        total.item(),
        errors.median().item(),
        errors.max().item(),
        (all_found == 0).float().mean().item(),
        bool(all_found.isfinite().all()),
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wide", action="store_true", help="two layers of width 2048 with random weights")
    options = parser.parse_args(arguments)
    trainer = make_trainer(torch.float32, options.wide)
    batch = texts(trainer, options.wide)
    exact = gradients(trainer, *batch)
    print(
        "| computed in | error of the gradient | median tensor | worst tensor | zeros | all finite |\n|---|---|---|---|---|---|"
    )
    for name, dtype, scale in CASES:
        total, median, worst, zeros, finite = compare(gradients(make_trainer(dtype, options.wide), *batch, scale), exact)
        print(f"| {name} | {total:.2%} | {median:.2%} | {worst:.2%} | {zeros:.3%} | {'yes' if finite else 'no'} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
