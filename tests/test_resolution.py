"""All extras at the tested versions, as a resolver sees them from other Pythons and systems: from wheels alone, nothing compiled."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = {
    "Linux": "x86_64-manylinux_2_28",
    "Linux on ARM": "aarch64-manylinux_2_28",
    "macOS": "aarch64-apple-darwin",
    "Windows": "x86_64-pc-windows-msvc",
}
WITHOUT_TORCH = {"macOS on Intel": "x86_64-apple-darwin", "Windows on ARM": "aarch64-pc-windows-msvc"}
pytestmark = pytest.mark.slow


def resolve(python, platform):
    """How uv ends that asks which packages all extras need there."""
    pytest.importorskip("uv", reason="no uv: pip install -e .[authors]")
    command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--no-header", "--no-annotate", "--only-binary", ":all:"]
    command += ["--all-extras", "-c", "constraints.txt", "--python-version", python, "--python-platform", platform]
    env = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"}  # the oldest macOS that PyTorch has wheels for
    done = subprocess.run([*command, "pyproject.toml"], cwd=ROOT, env=env, capture_output=True, text=True, encoding="utf-8")
    if done.returncode and re.search("failed to fetch|error sending request|client error", done.stderr, re.IGNORECASE):
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    return done


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_all_extras_resolve_to_wheels(system, python):
    done = resolve(python, SYSTEMS[system])
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE))
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"torch", "bitsandbytes", "trl", "jupyterlab", "trackio"} <= found.keys()
    assert [(name, found[name], pin) for name, pin in pins if name in found and found[name] != pin] == []


@pytest.mark.parametrize("system", WITHOUT_TORCH)
def test_where_pytorch_has_no_wheel_the_course_cannot_be_installed(system):
    """So that docs/systems.md says so for as long as it is true."""
    done = resolve("3.12", WITHOUT_TORCH[system])
    assert done.returncode != 0 and re.search(r"torch==\S+ has no wheels with a matching platform", done.stderr)
    assert system in (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
