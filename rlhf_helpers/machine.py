"""This machine: which device computes in which dtype, how much memory a process took, and `python -m rlhf_helpers --check`."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from pathlib import Path

from rlhf_helpers.config import DATA_FILE, REPOSITORY, project_root


def device_and_dtype():
    """(device, compute dtype) for this machine: bf16, except on CUDA cards without native bf16 (compute capability below
    8.0, where torch only emulates it), which get fp16. Of several processes each has the card of its LOCAL_RANK."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.bfloat16
    card = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())) % torch.cuda.device_count()
    native_bf16 = torch.cuda.get_device_capability(card)[0] >= 8
    return torch.device("cuda", card), torch.bfloat16 if native_bf16 else torch.float16


def no_four_bit():
    """None where bitsandbytes can be imported, else one sentence on what is done without it."""
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError):  # not installed, or without a library for this system
        return "no bitsandbytes here, so the CPU profile takes bf16 weights, unquantized (notebook 01 and a cell of 06 need it)"


def has_fast_bf16():
    """Whether this is a CPU that multiplies bf16 numbers itself (AVX512-BF16), about twice as fast as fp32."""
    import torch

    return not torch.cuda.is_available() and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def processor():
    """What computes here, in words: the card's name, or the CPU's with the number of threads."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.is_file() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def peak_megabytes():
    """The most RAM that this process has held, in MB; nan where the system does not say. A child's ru_maxrss begins at what its
    parent held, so on Linux the kernel is asked for this process alone."""
    status = Path("/proc/self/status")
    if status.is_file():
        if found := re.search(r"VmHWM:\s*(\d+)", status.read_text(encoding="utf-8")):  # some sandboxes leave it out
            return int(found[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return getattr(psutil.Process().memory_info(), "peak_wset", float("nan")) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------- --check


def check(say=print):
    """Look at Python, packages, devices, 4-bit training, memory and disk; one line each. Returns 0 if the course will run."""
    results = [python(), packages(), devices(), four_bit(), memory(), disk(), models()]
    for ok, line in results:
        say(f"{'ok ' if ok else 'NO '} {line}")
    good = all(ok for ok, _ in results)
    own = "" if (project_root() / DATA_FILE).is_file() else f" on data of your own; the course's is in a clone of {REPOSITORY}"
    say(f"\nThe CPU profile will run here{own}." if good else "\nMend the lines marked NO first.")
    return 0 if good else 1


def python():
    return (
        (3, 11) <= sys.version_info[:2] <= (3, 13),
        f"Python {platform.python_version()} (expected 3.11 to 3.13), {platform.system()} {platform.machine()}",
    )


def packages():
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "jupyterlab")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    needed = all(found[name] != "not installed" for name in names[:5] if name != "bitsandbytes")  # `four_bit` speaks of it
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    return needed, f"packages: {listed} (trl: notebooks 06 and 08)"


def devices():
    import torch

    if not torch.cuda.is_available():
        kernels = ", ONEDNN_MAX_CPU_ISA=" + os.environ["ONEDNN_MAX_CPU_ISA"] if "ONEDNN_MAX_CPU_ISA" in os.environ else ""
        return (
            True,
            f"no CUDA card: CPU profile, {os.cpu_count()} cores, {torch.get_num_threads()} threads, bf16 compute{kernels}",
        )
    properties = torch.cuda.get_device_properties(0)
    native = properties.major >= 8
    return (
        True,
        f"CUDA: {properties.name}, {properties.total_memory / 2**30:.0f} GB, compute in {'bf16' if native else 'fp16 (no native bf16)'}",
    )


def four_bit():
    """A real 4-bit layer with an adapter beside it: forward in eval mode first, which breaks gradients on some CPUs, then
    backward."""
    if lacking := no_four_bit():
        return device_and_dtype()[0].type == "cpu", f"4-bit NF4: {lacking}"
    import bitsandbytes as bnb
    import torch

    from rlhf_helpers.quirks import keep_gradients

    device, dtype = device_and_dtype()
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=dtype, quant_type="nf4").to(device)
    keep_gradients(layer)
    x = torch.randn(4, 64, device=device, dtype=dtype)
    with torch.no_grad():
        layer.eval()(x)
    x.requires_grad_(True)
    try:
        layer.train()(x).sum().backward()
    except RuntimeError:  # no gradient at all: the packed kernel has no backward
        pass
    works = x.grad is not None and bool(torch.isfinite(x.grad).all())
    return works, f"4-bit NF4 with {str(dtype).removeprefix('torch.')} compute on {device}: gradients pass through it" + (
        "" if works else ": no"
    )


def memory():
    import psutil

    free = psutil.virtual_memory().available / 2**30
    return free > 3.5, f"memory: {free:.1f} GB free (the course takes about 3, notebook 06 5.3)"


def disk():
    root = project_root().absolute()  # which may not be made yet
    free = shutil.disk_usage(next(place for place in (root, *root.parents) if os.path.isdir(place))).free / 2**30
    return free > 2, f"disk: {free:.0f} GB free (models and runs take about 1)"


def models():
    folder = project_root() / "output"
    there = [
        name
        for name in ("models/smollm2-135m-instruct", "models/minilm-l6-v2", "reward_model_pairwise")
        if (folder / name).is_dir()
    ]
    return (
        True,
        f"ready in output/: {', '.join(there) or 'nothing yet; the first run fetches 180 MB and trains the reward model'}",
    )
