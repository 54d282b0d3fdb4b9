"""A pretended CUDA card, for machines without one: tensors that say they are on `cuda` and, as on a card, refuse to meet tensors
that are not, or to become numpy arrays. The numbers themselves are computed on the CPU, so it shows whether every tensor is put
where it must be, and nothing about speed, memory or a card's kernels.

    python -m tests.pretend_cuda notebooks/04_ppo_step_by_step.ipynb      the cells of a notebook, in its short form
    python -m tests.pretend_cuda --profile FOLDER notebooks/04*.ipynb     the same with the GPU profile and the model of a folder
    python -m tests.pretend_cuda rlhf_helpers --steps 1                   a module, with its arguments
    python -m tests.pretend_cuda --old pytest -m cuda                     on a card without bf16, like a T4

A tensor pretends if its storage is listed in `on_card`. What an operation makes of such tensors is listed as well; copies to
the CPU are not. Only what the course and its libraries use is imitated."""

import functools
import os
import re
import runpy
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import rlhf_helpers  # noqa: F401, isort: skip  (first: it silences a sentence of bitsandbytes)
import bitsandbytes  # noqa: F401  (before torch seems to have a card: it would look for a CUDA library)
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CARD = torch.device("cuda", 0)
COPIES = {"copy_", "_to_copy"}
INDEXING = {
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
}  # a card takes an index from the CPU; not the other way round
FACTORIES = (
    "tensor as_tensor zeros ones empty full arange linspace rand randn randint randperm eye scalar_tensor empty_strided "
    "zeros_like ones_like empty_like full_like rand_like randn_like"
)
NEW = "new_zeros new_ones new_empty new_full new_tensor"
TO_NUMPY = "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
on_card = {}  # weak references to storages, by address: while one is kept, its address is not used again


def address(tensor):
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # of tensors without storage
        return None


def pretends(tensor):
    reference = on_card.get(address(tensor))
    return reference is not None and not reference.expired()


def put(tensor):
    """List the tensor as on the card."""
    on_card[address(tensor)] = StorageWeakRef(tensor.untyped_storage())
    if len(on_card) > 20_000:
        for key in [key for key, reference in on_card.items() if reference.expired()]:
            del on_card[key]
    return tensor


def take(tensor):
    """List it no more."""
    on_card.pop(address(tensor), None)
    return tensor


def means_card(device):
    if isinstance(device, (str, torch.device)):
        return torch.device(device).type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


class Arithmetic(TorchDispatchMode):
    """What is on the card does not meet what is not, unless that is a single number; and what comes of it is on the card."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        real = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and not t.is_meta]
        here, name = [pretends(t) for t in real], function._schema.name.partition("::")[2]
        fine = name in COPIES or (name in INDEXING and here[0])
        if any(here) and not fine and any(not p and t.dim() for p, t in zip(here, real)):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {function}")
        kwargs = kwargs or {}
        asked = means_card(kwargs.get("device"))  # of what makes tensors inside `with device:`
        result = function(*args, **kwargs | ({"device": "cpu"} if asked else {}))
        if asked or any(here[:1] if fine else here):
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and not tensor.is_meta and not pretends(tensor):
                    put(tensor)
        return result


# ---------------------------------------------------------------- what torch looks like with a card


def makes(function):
    """A function of torch that makes tensors, with `device="cuda"`."""

    @functools.wraps(function)
    def make(*args, **kwargs):
        kwargs.pop("pin_memory", None)
        if means_card(kwargs.get("device")):
            made = function(*args, **kwargs | {"device": "cpu"})
            return put(made.clone() if any(made is given for given in args) else made)
        made = function(*args, **kwargs)
        return take(made) if "cpu" == str(kwargs.get("device")) and not any(made is given for given in args) else made

    return make


def moves(move):
    """`Tensor.to`, to the card and back."""

    def to(self, *args, **kwargs):
        target = kwargs.get("device", args[0] if args else None)
        target = target.device if isinstance(target, torch.Tensor) else target
        wanted = means_card(target)
        if not wanted and str(target) != "cpu":
            return move(self, *args, **kwargs)
        if self.is_meta:
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        args, kwargs = (args, kwargs | {"device": "cpu"}) if "device" in kwargs else (("cpu", *args[1:]), kwargs)
        moved, was = move(self, *args, **kwargs), pretends(self)
        if was == wanted:
            return put(moved) if wanted else moved
        moved = moved.clone() if address(moved) == address(self) else moved
        return put(moved) if wanted else take(moved)

    return to


def to_numpy(convert):
    def numpy(self, *args, **kwargs):
        if pretends(self):
            raise TypeError(TO_NUMPY)
        return convert(self, *args, **kwargs)

    return numpy


def copies(deepcopy):
    def __deepcopy__(self, memo):
        copied = deepcopy(self, memo)
        return put(copied) if pretends(self) else copied

    return __deepcopy__


def tensor_methods():
    T, device = torch.Tensor, torch.Tensor.device
    to = moves(T.to)
    return dict(
        device=property(lambda self: CARD if pretends(self) else device.__get__(self)),
        is_cuda=property(pretends),
        to=to,
        cuda=lambda self, *_, **__: to(self, "cuda"),
        cpu=lambda self, *_, **__: to(self, "cpu"),
        pin_memory=lambda self, *_: self,
        numpy=to_numpy(T.numpy),
        __array__=to_numpy(T.__array__),
        __deepcopy__=copies(T.__deepcopy__),
        **{name: makes(getattr(T, name)) for name in NEW.split()},
    )


class Graph:
    """A pretended CUDA graph: the operations that were noted are computed again, on the same tensors, into the same results."""

    def __init__(self):
        self.notes, self.fresh = [], True

    def replay(self):
        if self.fresh:  # a card notes without computing; here it was computed, on these very inputs
            self.fresh = False
            return
        for function, args, kwargs, results in self.notes:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and address(old) != address(new):  # else a view, or changed in place
                    old.copy_(new)


class Capture(TorchDispatchMode):
    """`torch.cuda.graph(graph)`: a context that notes every operation inside."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.graph.notes.append((function, args, kwargs or {}, result))
        return result


class IsGenerator(type(torch.Generator)):
    def __instancecheck__(cls, thing):
        return isinstance(thing, cls.__base__)


class Generator(torch.Generator, metaclass=IsGenerator):
    """`torch.Generator`, which on a card would be another kind of one."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu" if means_card(device) else device)


def card_functions(capability, gigabytes=16):
    """What is asked of `torch.cuda`. Memory is what the listed storages hold now: no peak is known."""
    held = lambda *_: sum(
        torch.UntypedStorage._new_with_weak_ptr(r.cdata).nbytes() for r in list(on_card.values()) if not r.expired()
    )
    about = dict(
        name="a pretended card",
        total_memory=gigabytes * 2**30,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=40,
    )
    constant = lambda value=None: lambda *_, **__: value
    nothing = (
        "set_device set_per_process_memory_fraction synchronize empty_cache reset_peak_memory_stats ipc_collect _lazy_init "
        "manual_seed manual_seed_all set_rng_state set_rng_state_all"
    )
    return {name: constant() for name in nothing.split()} | dict(
        is_available=constant(True),
        is_initialized=constant(True),
        device_count=constant(1),
        current_device=constant(0),
        get_device_capability=constant(capability),
        is_bf16_supported=constant(capability >= (8, 0)),
        get_device_name=constant(about["name"]),
        get_device_properties=constant(SimpleNamespace(**about)),
        get_rng_state=lambda *_: torch.Generator().get_state(),
        get_rng_state_all=lambda: [torch.Generator().get_state()],
        CUDAGraph=Graph,
        graph=Capture,
        mem_get_info=constant((gigabytes * 2**30, gigabytes * 2**30)),
        memory_allocated=held,
        memory_reserved=held,
        max_memory_allocated=held,
        max_memory_reserved=held,
    )


class PretendedCard:
    """A context in which torch seems to have one card of the given compute capability. One for the life of a process: libraries
    remember the devices they have seen."""

    def __init__(self, capability=(8, 0)):
        _device_constructors()  # torch keeps a list of the functions that are about to be replaced
        self.contexts = (
            mock.patch.multiple(torch.Tensor, **tensor_methods()),
            mock.patch.multiple(
                torch, **{name: makes(getattr(torch, name)) for name in FACTORIES.split()}, Generator=Generator
            ),
            mock.patch.multiple(torch.cuda, **card_functions(capability)),
            # a build with CUDA would ask the driver; one without knows of no accelerator
            mock.patch.object(torch.accelerator, "current_accelerator", lambda check_available=False: None),
            Arithmetic(),
        )

    def __enter__(self):
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error):
        for context in reversed(self.contexts):
            context.__exit__(*error)


def with_gpu_profile(sources, folder):
    """A notebook's cells with the word at its top changed: the GPU profile, and the model of a folder."""
    word, ours = r"^profile = CPU\b", f"profile = __import__('dataclasses').replace(GPU, model={str(folder)!r})"
    if sum(len(re.findall(word, source, re.MULTILINE)) for source in sources) != 1:
        raise SystemExit("expected one line 'profile = CPU' in the notebook's cells")
    return [re.sub(word, lambda _: ours, source, flags=re.MULTILINE) for source in sources]


def counted(load, alive, most):
    """`from_pretrained`, which notes how many of the models that it has made are in memory at once."""

    def from_pretrained(*args, **kwargs):
        made = load(*args, **kwargs)
        alive.add(made[0] if isinstance(made, tuple) else made)  # with output_loading_info two come back
        most.append(max(most[-1], len(alive)))
        return made

    return from_pretrained


def run_notebook(path, folder=None):
    """Run a notebook's cells in its folder, with the GPU profile if the folder of a model is given; the number of those cells that
    failed and should not have. It prints how many language models were in memory at once."""
    import nbformat
    from IPython.core.interactiveshell import InteractiveShell
    from transformers import AutoModelForCausalLM

    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    sources = [cell.source for cell in cells]
    sources = with_gpu_profile(sources, folder) if folder else sources
    failed, most, shell = 0, [0], InteractiveShell.instance()
    load = counted(AutoModelForCausalLM.from_pretrained, weakref.WeakSet(), most)
    os.chdir(path.parent)
    sys.path.insert(0, "")
    with mock.patch.object(AutoModelForCausalLM, "from_pretrained", load):
        for number, (cell, source) in enumerate(zip(cells, sources), 1):
            if not shell.run_cell(source).success and "raises-exception" not in cell.metadata.get("tags", []):
                failed += 1
                print(f"{path.name}: code cell {number} failed on the pretended card")
    print(f"language models at once: {most[-1]}")
    return failed


def main(*arguments):
    old = arguments[0] == "--old"
    arguments = arguments[old:]
    _, folder, *arguments = arguments if arguments[0] == "--profile" else (None, None, *arguments)
    name, *arguments = arguments
    with PretendedCard(capability=(7, 5) if old else (8, 0)):
        if name.endswith(".ipynb"):
            return run_notebook(Path(name).resolve(), folder and Path(folder).resolve())
        sys.argv = [name, *arguments]
        runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
