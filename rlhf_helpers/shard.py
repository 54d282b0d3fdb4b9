"""A base model larger than one card: PyTorch's FSDP2 gives each process a slice of every frozen weight, and puts one layer together
at a time, just when it computes (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, arXiv:2304.11277).

The base alone is sliced. It never learns, so it has no gradients to share, and what is put together can be thrown away. Adapters
and value head, less than a hundredth of it, stay whole on every process, and the trainer treats them as without shards: gradients
are averaged by the same code, clipped, saved and resumed the same way. The numbers are those of as many whole copies, bit for bit.

What shards ask for: every process makes as many forward passes as its fellows, since each pass is a meeting of all."""

import os

import torch
from accelerate import PartialState
from torch.nn.parallel import DistributedDataParallel

from rlhf_helpers.errors import InputError
from rlhf_helpers.machine import device_and_dtype
from rlhf_helpers.quirks import is_4bit_layer, keep_gradients

if torch.distributed.is_available():  # some builds have none of it
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor

STORAGE = torch.bfloat16  # in which 4-bit weights are kept for shards, four to a number: PyTorch slices floating numbers alone
LAUNCH = "accelerate launch --num_processes 2 -m rlhf_helpers --shard"


def shard(policy):
    """Slices the base of `policy`, a PolicyWithValueHead with adapters, over all processes, in place, and returns it. Afterwards this
    process holds its slices on its own device. Raises InputError, changing nothing, where it cannot work."""
    processes = several_processes()
    lm = policy.pretrained_model
    if is_sharded(lm):
        raise InputError("shards: the model is in shards already; expected a whole one")
    if not policy.has_adapters:
        raise InputError(
            "shards: the policy has no adapters, and all of it would train; expected a PEFT model: the frozen base is sliced"
        )
    keep_gradients(policy)  # what bitsandbytes packed for a CPU's kernel is unpacked: a slice of it would be a slice of nothing
    replicated = {parameter for parameter in policy.parameters() if parameter.requires_grad}
    check_storage(lm)
    units = units_of(lm.get_base_model())

    device = device_and_dtype()[0]
    mesh = init_device_mesh(device.type, (processes,))
    for parameter in replicated:
        parameter.data = parameter.data.to(device)
    for layer in filter(is_4bit_layer, lm.modules()):
        layer.quant_state = layer.weight.quant_state  # the scales, which stay whole, are found here once the weight is a slice
        layer.quant_state.to(device)
    # The root, too, is sliced again after each pass: else a process that saves, alone, would do so and no longer meet the others.
    for unit in (*units, lm):
        fully_shard(unit, mesh=mesh, ignored_params=replicated, reshard_after_forward=True)
    # What is in slices differs between processes, and is not for DDP, which averages the gradients of the rest.
    slices = [name for name, parameter in policy.named_parameters() if parameter not in replicated]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(policy, slices)
    return policy


def several_processes():
    """How many processes there are. Raises InputError, with what to do, where shards could not work with them."""
    if not torch.distributed.is_available():
        raise InputError("--shard: this build of PyTorch has no torch.distributed; expected one that has it")
    refuse_accelerate_engines()
    processes = PartialState(cpu=device_and_dtype()[0].type == "cpu").num_processes
    if processes < 2:
        raise InputError(
            f"--shard: one process holds the whole model; expected several ({LAUNCH}; without a card add --multi_gpu)"
        )
    return processes


def refuse_accelerate_engines():
    """Raises InputError if `accelerate launch` was told to shard by itself. FSDP would do nothing on a CPU, silently, and its first
    version would hide PEFT's model, so that the reference kept its adapters; DeepSpeed and Megatron take optimizer steps of their own."""
    for engine, option in dict(FSDP="fsdp", DEEPSPEED="deepspeed", MEGATRON_LM="megatron_lm").items():
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() in ("true", "1", "yes"):
            raise InputError(
                f"accelerate is set up to use {engine} by itself; expected --shard without it (accelerate launch without --use_{option})"
            )


def check_storage(lm):
    """Raises InputError for a weight that PyTorch cannot slice."""
    for name, parameter in lm.named_parameters():
        if not parameter.is_floating_point():
            raise InputError(
                f"shards: {name} is stored as {str(parameter.dtype)[6:]}, and only floating numbers can be sliced; expected 4-bit weights "
                "loaded with bnb_4bit_quant_storage=torch.bfloat16 (load_causal_lm(..., to_shard=True))"
            )


def units_of(base):
    """The modules that are put together one at a time: the layers, as the model names those that must not be split, and embeddings
    and head, unless they are one weight. Raises InputError if there are no layers."""
    layers = [module for module in base.modules() if type(module).__name__ in (base._no_split_modules or ())]
    if not layers:
        raise InputError(
            f"shards: no layers are known of a {type(base).__name__}; expected a model that names them in _no_split_modules"
        )
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    return [*layers, *(ends if ends[0].weight is not ends[1].weight else ())]


def is_sharded(lm):
    """Whether a model is in slices."""
    return torch.distributed.is_available() and isinstance(lm, FSDPModule)


def everywhere(here, lm):
    """Whether the bool `here` is true on all processes that share the slices of `lm`; the bool itself for a whole model."""
    if not is_sharded(lm):
        return bool(here)
    number = torch.tensor(int(here), device=lm.get_input_embeddings().weight.device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MIN)
    return bool(number)


def bytes_held(lm):
    """(bytes, bytes) of a model's frozen weights, without the scales of 4-bit ones: what this process holds, and what all of it is."""
    frozen = [parameter for parameter in lm.parameters() if not parameter.requires_grad]
    here = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in frozen]
    return sum(tensor.untyped_storage().nbytes() for tensor in here), sum(parameter.nbytes for parameter in frozen)
