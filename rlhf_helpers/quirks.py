"""Repairs of other libraries, each with the version that was seen to need it and when it can go. Nothing here is PPO."""

import contextlib
import ctypes
import logging
import warnings


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
