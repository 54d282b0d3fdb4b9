"""The repository's address: set by one command wherever it stands, and taken back by the same."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_helpers.config import REPOSITORY
from tests.test_colab import first_code, run_cell
from tools import address

ROOT = Path(__file__).resolve().parent.parent
NAME = "their-copy"
FORK = f"https://github.com/someone/{NAME}"  # which stands nowhere else


@pytest.fixture
def copy(tmp_path):
    """What names the address, in a copy of the repository."""
    root = tmp_path / "copy"
    shutil.copytree(
        ROOT,
        root,
        ignore=shutil.ignore_patterns(".git", ".venv", "output", "build", ".whl", ".w?", "runs", "*.png", "*.egg-info"),
    )
    return root


def texts(root):
    return {
        path.relative_to(root): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_a_fork_has_its_own_address_everywhere_and_the_old_one_comes_back(copy, monkeypatch, tmp_path):
    near, old = copy / "near.txt", REPOSITORY.encode()
    near.write_bytes(b"caf\xe9 " + old + b"-other")  # another encoding, and a longer name
    before = texts(copy)
    changed = address.rewrite(copy, FORK)
    assert near.relative_to(copy) not in changed
    assert Path("rlhf_helpers/config.py") in changed and len([path for path in changed if path.suffix == ".ipynb"]) >= 8
    after = texts(copy)
    owner_and_name = "/".join(REPOSITORY.split("/")[-2:]).encode()
    assert [path for path, text in after.items() if owner_and_name in text] == [Path("near.txt")]
    assert {path for path in before if before[path] != after[path]} == set(changed)
    for notebook in sorted((copy / "notebooks").glob("*.ipynb")):
        text = notebook.read_text(encoding="utf-8")
        assert f"colab.research.google.com/github/someone/{NAME}/blob/main/notebooks/{notebook.name}" in text
    cell = first_code(copy / "notebooks" / "00_ppo_in_twenty_minutes.ipynb")
    clone, install = run_cell(monkeypatch, tmp_path, {}, cell=cell)
    assert clone[-2:] == [FORK, str(tmp_path / NAME)] and install[-1] == str(tmp_path / NAME)
    address.rewrite(copy, REPOSITORY)
    assert texts(copy) == before


@pytest.mark.parametrize(
    "given", [FORK, FORK + "/", FORK + ".git", f"git@github.com:someone/{NAME}.git", f"ssh://git@github.com/someone/{NAME}.git",
              f"https://someone:s3cret@github.com/someone/{NAME}.git"]
)  # fmt: skip
def test_an_address_may_be_written_as_git_writes_it(given):
    assert address.checked(given) == FORK


def test_a_password_in_an_address_is_not_printed():
    with pytest.raises(ValueError, match="expected https") as error:
        address.checked("https://me:s3cret@gitlab.com/me/my-fork")
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize("given", ["me/my-fork", "https://gitlab.com/me/my-fork", "https://github.com/me", "", "file:///x/y"])
def test_what_is_no_address_is_one_sentence(given):
    with pytest.raises(ValueError, match="expected https://github.com/OWNER/NAME"):
        address.checked(given)


def test_without_a_remote_and_without_an_address_the_command_says_what_it_needs(copy):
    shutil.rmtree(copy / ".git", ignore_errors=True)
    subprocess.run(["git", "init", "-q", str(copy)], check=True)
    done = subprocess.run([sys.executable, str(copy / "tools" / "address.py")], capture_output=True, text=True)
    assert done.returncode == 2 and "git knows no remote `origin`" in done.stderr and "Traceback" not in done.stderr
    subprocess.run(["git", "-C", str(copy), "remote", "add", "origin", f"git@github.com:someone/{NAME}.git"], check=True)
    done = subprocess.run([sys.executable, str(copy / "tools" / "address.py")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"{FORK}: ") and address.current(copy) == FORK


def test_a_checkout_that_has_a_home_knows_its_address():
    """`make address` sets it."""
    done = subprocess.run(["git", "-C", str(ROOT), "remote", "-v"], capture_output=True, text=True)
    hosted = re.search(r"\bgithub\.com\b", done.stdout)  # Colab opens notebooks from there alone
    assert not (hosted and "/OWNER/" in REPOSITORY), "run `make address`"
