"""The package as a wheel: what is in it, and what it does far from a clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import rlhf_helpers
from rlhf_helpers.config import REPOSITORY
from rlhf_helpers.data import save_jsonl

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rlhf_helpers").rglob("*.py")}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of what a build needs."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("rlhf_helpers", "tests", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(made), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = made.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs the installed package in a folder. Its dependencies are this environment's; the package is the wheel's."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    env = {**os.environ, "PYTHONPATH": str(site), "RLHF_HOME": "", "OMP_NUM_THREADS": "1"}

    def run(folder, *arguments, command=("-m", "rlhf_helpers")):
        command = [sys.executable, *command, *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)

    found = run(site.parent, command=("-c", "import rlhf_helpers; print(rlhf_helpers.__file__)")).stdout.strip()
    assert Path(found).is_relative_to(site)
    return run


def test_the_wheel_holds_the_whole_package_its_licence_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"rlhf_ppo_notebooks-{rlhf_helpers.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == PACKAGE and "rlhf_helpers/course/plots.py" in PACKAGE
    assert info + "licenses/LICENSE" in names


def test_an_empty_environment_gets_from_the_wheel_all_that_it_needs(wheel, tmp_path):
    """With nothing else in it, and at the tested versions."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True, capture_output=True)
    (tmp_path / "elsewhere").mkdir()
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RLHF_HOME")}
    for argument, said in (
        ("--help", "--kl_budget"),
        ("--version", rlhf_helpers.__version__),
        ("--check", "run here on data of"),
    ):
        run = [python, "-m", "rlhf_helpers", argument]
        done = subprocess.run(run, cwd=tmp_path / "elsewhere", env=env, capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_and_version_work_anywhere(arguments, installed, tmp_path):
    done = installed(tmp_path, *arguments)
    assert done.returncode == 0 and done.stderr == "" and list(tmp_path.iterdir()) == []
    assert ("--kl_budget" if arguments == ["--help"] else rlhf_helpers.__version__) in done.stdout


def test_the_check_works_anywhere_and_says_where_the_course_s_data_is(installed, tmp_path):
    done = installed(tmp_path, "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"run here on data of your own; the course's is in a clone of {REPOSITORY}.\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["--prepare"], ["--heldout", "own.jsonl"]])
def test_without_the_course_s_data_a_plain_run_is_one_sentence_and_nothing_is_made(arguments, installed, tmp_path):
    save_jsonl(tmp_path / "own.jsonl", [{"prompt": "a"}])
    done = installed(tmp_path, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"error: {tmp_path}/data/pairwise_prefs_part_1.jsonl: no such file; expected the course's data: work in a clone of "
        f"{REPOSITORY}, or name files of your own (--prompts, --heldout, --reward-model)\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"]


def test_a_run_on_files_of_ones_own_writes_into_the_working_directory(installed, tmp_path, llama_folder, reward_folders):
    save_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"t{i}"} for i in range(10, 20)])
    save_jsonl(tmp_path / "heldout.jsonl", [{"prompt": "t30"}])
    own = [
        "--prompts",
        "prompts.jsonl",
        "--heldout",
        "heldout.jsonl",
        "--model",
        llama_folder,
        "--reward-model",
        reward_folders[2],
    ]
    short = ["--max_new_tokens", 6, "--batch_size", 4, "--mini_batch_size", 2, "--steps", 1, "--kl_budget", "none"]
    done = installed(tmp_path, *own, *short)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output" / "run" / "summary.json").is_file()
