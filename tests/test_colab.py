"""The first cell of every notebook, which makes a Colab session ready: what it does, and the proof of it without Colab."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

from rlhf_helpers.config import DATA_FILE, REPOSITORY

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FOLDER = "/content/" + REPOSITORY.rpartition("/")[2]  # where the cell clones to
PINS = ROOT / "tests" / "colab_2026_08.txt"
INSTALLED = dict(line.split("==") for line in PINS.read_text().splitlines() if not line.startswith("#"))
KEPT = ("torch", "numpy", "transformers")


def first_code(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "".join(next(cell["source"] for cell in cells if cell["cell_type"] == "code"))


CELL = first_code(NOTEBOOKS[0])
WITH_TRL = CELL.replace('"rlhf_helpers", ""', '"trl", "[trl]"')  # notebooks 06 and 08 alone need TRL


# ---------------------------------------------------------------- what the cell is


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_has_the_badge_and_the_same_first_cell(notebook):
    page = json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]
    link = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"({link}/blob/main/notebooks/{notebook.name})" in "".join(page["source"])
    assert first_code(notebook) == (WITH_TRL if notebook.name.startswith(("06", "08")) else CELL)


def test_the_cell_fetches_this_repository():
    assert f'"{REPOSITORY}"' in CELL and f'"{FOLDER}"' in CELL


def run_cell(monkeypatch, tmp_path, names, installed=False, moves=None, cell=CELL, reachable=True):
    """Run the cell in `names` as if on Colab; its commands are returned and not run. pip `moves` some versions."""
    versions, commands = {"torch": "2.11.0+cu128", "numpy": "2.1.3", "transformers": "5.15.0"}, []
    if installed:
        versions |= moves or {}

    def run(command, check=False, env=None, stderr=None):
        commands.append(command)
        asks = "clone" in command and (env["GIT_TERMINAL_PROMPT"] != "0" or stderr != subprocess.DEVNULL)
        assert not asks, "git would ask for a password, or speak beside the one sentence"
        if "clone" not in command:
            assert check is True
            versions.update(moves or {})
        elif reachable:
            Path(command[-1], "notebooks").mkdir(parents=True)
        return types.SimpleNamespace(returncode=0 if reachable else 128)

    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    monkeypatch.chdir(tmp_path)
    exec(cell.replace("/content", str(tmp_path)), names)
    return commands


def test_at_home_the_cell_does_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(CELL, names)
    assert Path.cwd() == tmp_path and capsys.readouterr().out == ""
    assert names.keys() <= {"sys", "__builtins__"}


def test_on_colab_it_clones_installs_and_is_silent(monkeypatch, tmp_path, capsys):
    clone, install = run_cell(monkeypatch, tmp_path, {})
    folder = str(tmp_path / Path(FOLDER).name)
    assert clone[:2] == ["git", "clone"] and clone[-2:] == [REPOSITORY, folder]
    assert install[:4] == [sys.executable, "-m", "pip", "install"] and install[-1] == folder
    assert not {"-e", "--editable", "-U", "--upgrade"} & set(install)
    assert Path.cwd() == Path(folder) / "notebooks" and capsys.readouterr().out == ""


def test_notebooks_06_and_08_install_trl_as_well(monkeypatch, tmp_path):
    assert run_cell(monkeypatch, tmp_path, {}, cell=WITH_TRL)[1][-1] == str(tmp_path / Path(FOLDER).name) + "[trl]"


def test_an_address_that_cannot_be_fetched_is_one_sentence_and_a_folder_that_is_there_is_taken(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="cannot be fetched: upload the course as .+, or set its address"):
        run_cell(monkeypatch, tmp_path, {}, reachable=False)
    (tmp_path / Path(FOLDER).name / "notebooks").mkdir(parents=True)  # uploaded
    (install,) = run_cell(monkeypatch, tmp_path, {}, reachable=False)
    assert "pip" in install and Path.cwd().name == "notebooks"


def test_a_second_run_fetches_nothing(monkeypatch, tmp_path, capsys):
    names = {}
    run_cell(monkeypatch, tmp_path, names)
    assert run_cell(monkeypatch, tmp_path, names, installed=True) == []
    assert Path.cwd().name == "notebooks" and capsys.readouterr().out == ""


def test_it_asks_for_a_restart_only_when_something_moved_and_until_it_happened(monkeypatch, tmp_path, capsys):
    session, moves = {}, {"numpy": "2.4.0"}
    run_cell(monkeypatch, tmp_path, session, moves=moves)
    said = capsys.readouterr().out
    assert "Restart session" in said and "numpy 2.1.3 -> 2.4.0" in said and "torch" not in said
    run_cell(monkeypatch, tmp_path, session, installed=True, moves=moves)
    assert "Restart session" in capsys.readouterr().out
    run_cell(monkeypatch, tmp_path, {}, installed=True, moves=moves)  # after the restart
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- the proof, without Colab


def resolve(tmp_path, extra=None, pins=PINS):
    """How uv ends that asks what a Colab session (Python 3.13, Linux) would install for this project beside what it has."""
    env = dict(os.environ)
    if importlib.util.find_spec("uv") is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", str(tmp_path / "uv"), "uv"], check=True)
        env["PYTHONPATH"] = str(tmp_path / "uv")
    command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--no-header", "--no-annotate", str(ROOT / "pyproject.toml")]
    command += ["-c", str(pins), "--python-version", "3.13", "--python-platform", "x86_64-manylinux_2_35"]
    return subprocess.run([*command, *(["--extra", extra] if extra else [])], env=env, capture_output=True, text=True)


def versions(done):
    """{package: version} that was resolved."""
    assert done.returncode == 0, done.stderr
    return {plain(name): found for name, found in re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", done.stdout, re.MULTILINE)}


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


THERE = {plain(name): found for name, found in INSTALLED.items()}


@pytest.mark.slow
def test_the_dependencies_leave_every_version_of_colab_as_it_is(tmp_path):
    needed = versions(resolve(tmp_path))
    assert [name for name in needed if name in THERE and needed[name] != THERE[name]] == [] and set(KEPT) <= needed.keys()
    new = {name for name in needed.keys() - THERE.keys() if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert new == {"bitsandbytes", "gguf"}


@pytest.mark.slow
def test_trl_moves_datasets_and_its_pyarrow_so_only_notebooks_06_and_08_install_it(tmp_path):
    done = resolve(tmp_path, "trl")
    assert done.returncode != 0 and "datasets" in done.stderr and "trl" in done.stderr
    moved, without = {"datasets", "pyarrow"}, tmp_path / "without.txt"
    without.write_text("".join(f"{name}=={found}\n" for name, found in INSTALLED.items() if name not in moved))
    needed = versions(resolve(tmp_path, "trl", without))
    assert {name for name in needed if name in THERE and needed[name] != THERE[name]} == moved
    assert needed["trl"] == "1.12.0"


def colab_python():
    """A Python of Colab's version, 3.13 or (until July 2026) 3.12, if this machine has one."""
    for minor in (13, 12):
        candidates = [shutil.which(f"python3.{minor}"), *sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))]
        for candidate in filter(None, candidates):
            works = subprocess.run([candidate, "-c", "import venv, ensurepip"], capture_output=True)
            if works.returncode == 0:
                return str(candidate)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """(kernel client, folder that stands for /content) of a session like Colab's: its Python, its IPython and kernel, its
    versions of all that the course needs. Two things are not real: `google.colab` is an empty module, and of torch there is
    only what pip knows a package by (the index has no CPU build for this Python)."""
    python = colab_python()
    if python is None:
        pytest.skip("no Python 3.12 or 3.13 on this machine")
    home = tmp_path_factory.mktemp("colab")
    subprocess.run([python, "-m", "venv", str(home / "venv")], check=True)
    python = home / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], check=True, capture_output=True, text=True
    )
    site = Path(site.stdout.strip())
    (site / "google" / "colab").mkdir(parents=True)
    (site / "google" / "colab" / "__init__.py").touch()
    info = site / "torch-2.11.0+cu128.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0+cu128\n")
    (info / "RECORD").write_text("")
    others = [f"{name}=={version}" for name, version in INSTALLED.items() if name != "torch"]
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, *others], check=True, env={**os.environ, "PYTHONPATH": ""})  # what the tests see is not there

    startup = home / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00-colab.py").write_text("import google.colab\n")
    spec = home / "kernels" / "colab"
    spec.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    env = {  # the address on GitHub stands for this clone
        "IPYTHONDIR": str(home / "ipython"),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{ROOT.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": REPOSITORY,
        "RLHF_HOME": "",
        "PYTHONPATH": "",
    }
    (spec / "kernel.json").write_text(json.dumps(dict(argv=argv, env=env, display_name="colab", language="python")))
    content = home / "content"
    content.mkdir()
    manager = KernelManager(kernel_name="colab", kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(home / "kernels")]))
    manager.start_kernel(cwd=str(content))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        yield client, content
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def execute(client, code):
    """What `code` prints in the kernel; fails with its traceback if it raises."""
    printed, plain_text = [], re.compile(r"\x1b\[[0-9;]*m")

    def hook(message):
        content = message["content"]
        assert message["msg_type"] != "error", plain_text.sub("", "\n".join(content.get("traceback", [])))
        if message["msg_type"] == "stream":
            printed.append(content["text"])

    client.execute_interactive(code, timeout=600, output_hook=hook)
    return "".join(printed)


@pytest.mark.slow
def test_the_cell_makes_a_session_like_colab_s_ready_twice_in_one_kernel(session):
    client, content = session
    cell = CELL.replace("/content", str(content))
    look = (
        "import json, os, sys, IPython\nfrom importlib.metadata import version\n"
        f"print(json.dumps([sys.version_info[:2], IPython.__version__, os.getcwd(), [version(n) for n in {list(INSTALLED)!r}]]))"
    )
    python, ipython, _, before = json.loads(execute(client, look))
    assert python in ([3, 13], [3, 12]) and ipython == INSTALLED["ipython"]
    for _ in range(2):
        assert "estart" not in execute(client, cell)
        *_, folder, after = json.loads(execute(client, look))
        assert after == before and folder == str(content / Path(FOLDER).name / "notebooks")
    use = (
        "import rlhf_helpers; from rlhf_helpers.config import project_root; from rlhf_helpers.data import load_prompts; "
        f"prompts = load_prompts(project_root() / {DATA_FILE!r}); "
        "print(json.dumps([rlhf_helpers.__file__, str(project_root()), len(prompts), version('bitsandbytes'), version('gguf')]))"
    )
    module, root, prompts, *_ = json.loads(execute(client, use))
    assert "site-packages" in module and root == str(content / Path(FOLDER).name) and prompts > 100
