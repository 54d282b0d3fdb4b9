"""What each of two processes of tests/test_shard.py runs: `accelerate launch ... -m tests.shard_worker FOLDER LLAMA`. Everything in one
go, since starting takes longer than all of it; what each process saw is written to FOLDER/0.json and 1.json."""

import faulthandler
import gc
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from rlhf_helpers import fast
from rlhf_helpers.errors import InputError
from rlhf_helpers.evaluation import evaluate
from rlhf_helpers.models import PolicyWithValueHead
from rlhf_helpers.quirks import leave_processes
from rlhf_helpers.shard import STORAGE, bytes_held, shard
from tests import tiny
from tests.worker import stepped

PROMPTS = [f"t{i} t{i + 1}" for i in range(4, 12)]
reward = lambda prompts, texts: [len(text.split()) % 5 for text in texts]


def untied(storage=None):
    """The course's tiny Llama with a head of its own, in fp32: embeddings and head are units, too."""
    return tiny.with_lora(tiny.llama(tie_word_embeddings=False))


def nf4_of(llama):
    """A function that makes the Llama of a folder in NF4, with checkpointing; `storage` is the dtype of its codes."""

    def make(storage=torch.uint8):
        lm = tiny.with_lora(tiny.nf4_llama(llama, storage))
        PolicyWithValueHead(lm).enable_gradient_checkpointing()
        return lm

    return make


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def update(make, folder, name):
    """Two PPO steps in shards, and as two whole copies. The weights that learnt go to FOLDER/NAME."""
    sharded, copies = stepped(lm=make(STORAGE), sharded=True), stepped(lm=make(torch.uint8))
    if sharded.accelerator.is_main_process:
        save_file(trained(sharded), folder / name)
    stats = {key: value for key, value in sharded.history[-1].items() if not key.startswith("time/")}
    fresh = tiny.trainer(make(STORAGE), sharded=True, batch_size=2, mini_batch_size=2)
    kl = fresh.inspect(*tiny.batch(2, seed=fresh.accelerator.process_index)).kl
    return {
        "as copies": tiny.same(trained(sharded), trained(copies)),
        "stats": stats,
        "first kl": kl.abs().max().item(),
        "held": bytes_held(fresh.model.pretrained_model),
        "fast": fast.can_unpack(sharded.model.pretrained_model) or fast.can_graph(sharded.model.pretrained_model),
    }


def reference():
    """Adapters that have moved, switched off: the logits are the base's."""
    ids = torch.randint(4, tiny.V, (2, 9), generator=torch.Generator().manual_seed(3))
    policy = tiny.trainer(tiny.with_lora(tiny.llama(), b_scale=0.5), sharded=True).model
    base = tiny.llama()
    with torch.no_grad(), policy.adapters_off():
        off = policy.pretrained_model(ids).logits
    with torch.no_grad():
        on = policy.pretrained_model(ids).logits
    return {"off is base": torch.equal(off, base(ids).logits), "on is base": torch.equal(on, base(ids).logits)}


def lengths(rank):
    """Responses that end at once on one process, and never on the other."""
    trainer = tiny.trainer(sharded=True, max_new_tokens=12)
    ends = list(range(tiny.V)) if rank == 0 else [-1]  # every token, and none
    responses = trainer.generate([torch.tensor([5, 6]), torch.tensor([7, 8, 9])], eos_token_id=ends)
    return [len(response) for response in responses]


def judged():
    """Held-out prompts that cannot be dealt evenly: as copies, all of them, once and in order."""
    trainer = tiny.trainer(sharded=True)
    return [evaluate(trainer, PROMPTS[:n], reward, samples=1).prompts for n in (1, 3)]


def resume(folder):
    """Four steps; two, a save, and two more in shards; and two more as whole copies from the same save."""
    make = lambda sharded: tiny.trainer(sharded=sharded, batch_size=2, mini_batch_size=2)
    whole, first = make(True), make(True)
    whole.train(PROMPTS, reward, steps=4)
    first.train(PROMPTS, reward, steps=2)
    first.generate(
        [torch.tensor([5, 6])], generator=torch.Generator().manual_seed(0)
    )  # a save may follow a pass without gradients
    first.save(folder / "checkpoint")
    if first.accelerator.is_main_process:
        save_file(trained(first), folder / "at the save")
    first.train(PROMPTS, reward, steps=1)  # goes on after a save that one process made alone
    ends = {}
    for name, sharded in (("in shards", True), ("as copies", False)):
        second = make(sharded)
        second.resume(folder / "checkpoint")
        second.train(PROMPTS, reward, steps=2)
        ends[name] = tiny.same(trained(whole), trained(second))
    return ends


def put_together(vocabulary, tied=False):
    """Bytes at the worst moment of a pass there and back, beyond what was there before: what is put together, and little else."""
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=vocabulary, tie_word_embeddings=tied)
    lm = tiny.llama(**sizes).to(torch.bfloat16).requires_grad_(False)
    policy = shard(PolicyWithValueHead(tiny.with_lora(lm)))
    moments = []

    def note(*_):
        moments.append(sum(storages().values()))

    def note_on_the_way_back(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda _: moments.append(sum(storages().values())))

    for name, module in policy.named_modules():
        if name.endswith(("down_proj", "embed_tokens", "lm_head")):
            module.register_forward_pre_hook(note)
            module.register_forward_hook(note_on_the_way_back)
    ids = torch.full((1, 2), 5)
    gc.collect()
    gc.freeze()  # what is there before is not looked at
    for _ in range(2):
        logits, values = policy(ids, torch.ones_like(ids), 1)
        (logits.float().sum() + values.sum()).backward()
    gc.unfreeze()
    return max(moments)


def storages():
    """Bytes of every storage that a tensor made since gc.freeze() holds, by address."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and not isinstance(thing, DTensor)]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}


def refusals(folder, llama):
    """What is refused, in words, on two processes."""
    said = {}
    for name, lm in (
        ("uint8", tiny.with_lora(tiny.nf4_llama(llama))),
        ("no adapters", tiny.llama()),
        ("no layers", tiny.with_lora(tiny.llama())),
        ("twice", tiny.with_lora(tiny.llama())),
    ):
        policy = PolicyWithValueHead(lm)
        if name == "no layers":
            lm.get_base_model()._no_split_modules = set()
        if name == "twice":
            shard(policy)
        try:
            shard(policy)
        except InputError as error:
            said[name] = str(error)
    return said


def main(folder, llama):
    rank = PartialState(cpu=True).process_index
    seen = {
        "fp32": update(untied, folder, "fp32"),
        "nf4": update(nf4_of(llama), folder, "nf4"),
        "reference": reference(),
        "lengths": lengths(rank),
        "judged": judged(),
        "resume": resume(folder),
        "refused": refusals(folder, llama),
        "put together": [put_together(128), put_together(12800), put_together(12800, tied=True)],
    }
    (folder / f"{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(200, exit=True)  # processes that wait for each other say where
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
    leave_processes()
