"""What each process of notebook 06's proofs runs: two PPO steps of a tiny model in fp32, on its share of fixed responses.

`python -m rlhf_helpers.course.two_processes FILE`, by itself or under `accelerate launch`, writes the trained weights to FILE.
With `--shard` behind it each process holds a slice of the base instead of a copy."""

import sys

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_helpers.config import CPU, PPOConfig
from rlhf_helpers.models import load_tokenizer, with_adapters
from rlhf_helpers.quirks import leave_processes
from rlhf_helpers.shard import shard
from rlhf_helpers.trainer import PPOTrainer

WORDS, BATCH = 128, 4
SIZES = dict(vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def tiny_policy():
    """A Llama of two layers with the course's adapters. No B is zero, so that every weight learns from the first step on."""
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2)).requires_grad_(False).eval()
    policy = with_adapters(lm, CPU)
    for name, weight in policy.named_parameters():
        if "lora_B" in name or "v_head" in name:
            torch.nn.init.normal_(weight.data, std=0.1)
    return policy


def batch(seed):
    """(queries, responses, scores) of one step; the responses are of unequal lengths."""
    numbers = torch.Generator().manual_seed(seed)
    ids = lambda *lengths: [torch.randint(4, WORDS, (n,), generator=numbers) for n in lengths]
    return ids(2, 5, 3, 4), ids(6, 3, 8, 5), [1.0, -1.0, 0.5, -0.2]


def trained(steps=2, sharded=False):
    """The trainer after some steps of two epochs, with accumulation and clipping, each on this process's rows of the batch."""
    processes = PartialState(cpu=True)
    size, first = BATCH // processes.num_processes, processes.process_index * BATCH // processes.num_processes
    config = PPOConfig(
        batch_size=size,
        mini_batch_size=size // 2,
        gradient_accumulation_steps=2,
        ppo_epochs=2,
        learning_rate=1e-3,
        max_grad_norm=0.5,
    )
    policy = shard(tiny_policy()) if sharded else tiny_policy()
    trainer = PPOTrainer(config, policy, tokenizer=load_tokenizer(CPU.model))
    for step in range(steps):
        trainer.step(*(part[first : first + size] for part in batch(step)))
    return trainer


def main(file, *options):
    torch.set_num_threads(1)
    trainer = trained(sharded="--shard" in options)
    if trainer.accelerator.is_main_process:
        save_file({name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}, file)
    leave_processes(trainer)


if __name__ == "__main__":
    main(*sys.argv[1:])
