"""The floors of the package: imports point down only, and heavy libraries stay in their rooms."""

import ast
from pathlib import Path

import pytest

import rlhf_helpers

FLOORS = {
    0: (
        "config",
        "errors",
        "data",
        "ppo",
        "assets",
        "quirks",
        "interrupts",
        "progress",
        "classic",
        "files",
        "intervals",
        "course.gold",
        "course.recall",
    ),
    1: ("machine", "models", "sampling", "fast", "shard"),
    2: ("reward", "rollout", "stats", "checkpoint", "memory", "course.grading", "course.experiments", "parts", "pairwise"),
    3: (
        "loop",
        "trainer",
        "evaluation",
        "run",
        "doctor",
        "advantages",
        "course.plots",
        "course.exercises",
        "course.runs",
        "course.inspector",
        "course.capstone_exercises",
        "course.first_exercises",
        "course.more_exercises",
        "course.loop_exercises",
        "course.guesses",
        "course.part_exercises",
    ),
    4: (
        "course.run_figures",
        "__main__",
        "keeper",
        "trl_bridge",
        "course.two_processes",
        "course.variants",
        "course.compare",
        "course.judges",
        "course.capstone",
        "dpo",
    ),
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules}
ROOT = Path(rlhf_helpers.__file__).parent
NAME = lambda path: ".".join(path.relative_to(ROOT).with_suffix("").parts)
MODULES = {NAME(path): path for path in ROOT.rglob("*.py") if path.stem != "__init__"}
# What may be imported on one's own floor.
SAME_FLOOR = {("pairwise", "reward"), ("reward", "pairwise"), ("data", "errors"), ("config", "errors"), ("config", "classic"), ("classic", "errors"), ("classic", "files"), ("config", "files"), ("assets", "config"), ("assets", "files"), ("data", "files"), ("assets", "errors"),
              ("assets", "quirks"), ("files", "errors"), ("models", "machine"), ("sampling", "models"), ("sampling", "fast"), ("shard", "machine"),
              ("fast", "models"), ("models", "shard"), ("fast", "shard"), ("sampling", "shard"), ("assets", "progress"), ("dpo", "trl_bridge"), ("trainer", "loop"), ("__main__", "keeper"),
              ("course.exercises", "course.first_exercises"),
              ("course.exercises", "course.more_exercises"), ("course.exercises", "course.part_exercises"),
              ("course.exercises", "course.loop_exercises"), ("course.exercises", "course.capstone_exercises"),
              ("course.variants", "course.capstone"), ("course.capstone", "course.compare"), ("course.judges", "course.compare")}  # fmt: skip


def imports(path):
    """The names of all modules that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            package = node.module in ("rlhf_helpers", "rlhf_helpers.course")
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if package else {node.module}
    return names


def own(path):
    return {name.removeprefix("rlhf_helpers.") for name in imports(path) if name.startswith("rlhf_helpers.")}


def test_every_module_has_a_floor():
    assert MODULES.keys() <= FLOOR.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_only(module):
    for other in own(MODULES[module]):
        assert FLOOR[other] < FLOOR[module] or (module, other) in SAME_FLOOR, f"{module} imports {other}"


def test_the_mathematics_and_the_annotator_stand_by_themselves():
    assert {module: own(MODULES[module]) for module in ("ppo", "errors", "quirks", "course.gold")} == {
        "ppo": set(), "errors": set(), "quirks": set(), "course.gold": set(),
    }  # fmt: skip


def test_the_trainer_does_not_know_the_reward_model():
    assert "reward" not in own(MODULES["trainer"])


def test_no_module_imports_trl():
    assert not {module for module, path in MODULES.items() for name in imports(path) if name.split(".")[0] == "trl"}


def test_only_plots_imports_matplotlib_and_pandas():
    users = {
        module for module, path in MODULES.items() for name in imports(path) if name.split(".")[0] in ("matplotlib", "pandas")
    }
    assert users == {"course.plots"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short_enough_to_read(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) < 400


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_it_is(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))
