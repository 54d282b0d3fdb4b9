"""Repairs of other libraries, each with the version that was seen to need it and when it can go. Nothing here is PPO."""

import contextlib
import ctypes
import gc
import logging
import os
import warnings
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def silence():
    """Keep back what other packages say on import and nobody can act on. Called when this package is imported."""
    # bitsandbytes 0.50.2, on CPUs with AVX512-BF16: an optional kernel could not be fetched from a model hub. The course needs
    # no hub and turns that kernel off (`keep_gradients`). Can go when bitsandbytes asks before it fetches.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "gemm_4bit_forward from kernels-community" not in record.getMessage()
    )
    # tqdm 4.70, imported by another package inside a notebook without ipywidgets: it falls back to text by itself. Can go when it
    # says so no more.
    warnings.filterwarnings("ignore", "IProgress not found")
    # peft 0.21 asks transformers 5.23 for an attribute by its old name, whenever it wraps a model. Can go with peft 0.22.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def same_bits_for_any_rows():
    """Keep oneDNN (3.12, in torch 2.13) from its AMX kernels, on Xeons that have them and Linux, which says so: there a row's bf16
    product depends on how many rows stand beside it, so a token would be drawn with other bits than it is scored with (SmolLM2:
    sampler_kl 0.09 to 0.17 nats a response, single tokens 0.3 to 0.5). With AVX512 they are the same. It costs: a step takes 1.9 times
    as long (benchmarks/README.md). Called when this package is imported: oneDNN looks at the environment at its first product, and
    once for the whole process. Whoever has set ONEDNN_MAX_CPU_ISA keeps it (ALL: sooner, and close). Can go when
    tests/test_fast.py::test_with_amx_a_row_depends_on_its_neighbours fails."""
    if has_amx():
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


def has_amx():
    """Whether this CPU multiplies bf16 tiles (Linux says so; elsewhere the answer is no)."""
    with contextlib.suppress(OSError), CPUINFO.open(encoding="utf-8") as lines:
        return any("amx_bf16" in line.split() for line in lines if line.startswith("flags"))
    return False


def gguf_progress(track):
    """transformers 5.23 draws a bar of its own while it converts a GGUF file, which has no switch: `track(tensors)` takes its place.
    Can go when `disable_progress_bar` covers it."""
    from transformers import modeling_gguf_pytorch_utils as gguf

    gguf.tqdm = lambda tensors, **_: track(list(tensors))


def keep_gradients(module):
    """Keep bitsandbytes from breaking training on CPUs with AVX512-BF16, and mend it where it has (0.50.2; can go when
    test_models.py::test_without_protection_the_packed_model_has_no_true_gradient fails).

    There, the first forward in eval mode without gradients repacks every 4-bit layer in place for a kernel that has no
    backward. LoRA then gets no gradient, or a wrong one, with no error. So the packing is switched off, and what is packed
    already is unpacked."""
    for layer in module.modules():
        if is_4bit_layer(layer):
            layer.support_avx512bf16_for_cpu = False
            if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                from bitsandbytes.functional import (
                    _convert_weight_packed_for_cpu_inverse as unpack,  # private: only where it is needed
                )

                layer.weight.data, layer.weight.quant_state = unpack(layer.weight.data, layer.weight.quant_state)


def is_4bit_layer(layer):
    """Whether a module is one of bitsandbytes' 4-bit layers; false, too, where bitsandbytes cannot be imported."""
    try:
        from bitsandbytes.nn import Linear4bit
    except (ImportError, OSError):
        return False
    return isinstance(layer, Linear4bit)


@contextlib.contextmanager
def accumulating_alone(accelerator):
    """Accelerate 1.15 keeps for the whole process how many passes make an optimizer step, and whether one is due. Another trainer,
    begun or interrupted between two passes, would divide our gradients, or leave our steps out, in silence. Inside, each of our
    passes counts whole and each of our steps is made; after it, all is as it was. Can go when test_neighbours.py::
    test_another_trainer_s_accumulation_reaches_ours_without_protection fails."""
    state, passes = accelerator.gradient_state, accelerator.gradient_accumulation_steps
    due = state.sync_gradients
    accelerator.gradient_accumulation_steps = 1
    state._set_sync_gradients(True)
    try:
        yield
    finally:
        accelerator.gradient_accumulation_steps = passes
        state._set_sync_gradients(due)


def unmap(lm):
    """Copy what is not 4-bit out of the weights' file: safetensors 0.8 maps it, and one embedding would keep the whole bf16 file
    in memory. Can go when transformers copies what it keeps."""
    for parameter in lm.parameters():
        if not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.clone()


def give_back_large_blocks():
    """Ask glibc to hand freed blocks of 4 MB or more back to the system at once. By itself it keeps them (of up to 32 MB) for
    later, and the pieces fit less and less: without this a step's peak is 200 to 400 MB higher (mallopt(3), M_MMAP_THRESHOLD;
    from 1 MB on, an update takes a quarter longer). glibc 2.36; elsewhere it does nothing. Can go when tests/test_models.py::
    test_freed_blocks_of_megabytes_go_back_to_the_system_at_once passes without it."""
    with contextlib.suppress(OSError, AttributeError):  # another system, another allocator
        ctypes.CDLL("libc.so.6").mallopt(-3, 4 * 2**20)


def give_back_the_rest():
    """Ask glibc to hand back all that it keeps for later. Worth it after loading: what was left of that is 170 MB in pieces, which
    nothing fits into (malloc_trim(3); glibc 2.36). Can go when a loaded model's process is no larger without it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def leave_processes(trainer=None):
    """Close the process group, all processes together, and the trackers of `trainer`, which makes no step after this.

    DistributedDataParallel (torch 2.13) holds the group from within, past `destroy_process_group`, and with it gloo's threads. A
    process that ends while they run may abort ("terminate called without an active exception", 2 of 25 launches on a busy machine).
    So what holds it is let go first. (FSDP holds it as well, and nothing that we found lets it go: with `--shard` they stay.) Can go
    when tests/test_processes.py::test_a_trainer_keeps_the_threads_of_its_processes_until_they_are_left fails."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
    if trainer is not None:
        trainer.policy = trainer.model  # the same weights, not wrapped
        trainer.accelerator.free_memory()
    gc.collect()
    PartialState().destroy_process_group()
    for tracker in trainer.accelerator.trackers if trainer else ():
        tracker.finish()
