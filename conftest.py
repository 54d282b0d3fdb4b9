"""How tests run: on the CPU, whose numbers they know, and on a CUDA card just those that are asked for with `-m cuda`.
Notebooks make fewer steps with shorter answers (RLHF_FAST=1), and stop at their first crash. `make test` runs two files at a
time, long ones first; each has its share of the cores."""

import os
from collections import Counter
from pathlib import Path

import pytest

try:
    import fcntl
except ImportError:  # Windows: one file at a time
    fcntl = None

REWARD_MODEL = Path(__file__).resolve().parent / "output" / "reward_model_pairwise"
# The longest first, so that no core waits at the end.
FIRST = ("06_", "05_", "08_", "02_", "test_processes", "04_", "09_", "07_", "test_script", "0", "test_browser", "test_shard")


def pytest_configure(config):
    sanitize = getattr(config.option, "nbval_sanitize_with", None)
    if sanitize:  # nbval looks from the working directory
        config.option.nbval_sanitize_with = str(config.rootpath / sanitize)
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first looks for a card, which is later
    os.environ["RLHF_FAST"] = "0"  # the package's own tests see the profiles as they are
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // workers)))


def pytest_collection_modifyitems(config, items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = lambda item: next((i for i, name in enumerate(FIRST) if item.path.name.startswith(name)), len(FIRST))
        items.sort(key=place)  # within a file the order stays


# ---------------------------------------------------------------- notebooks


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Notebooks are short: their kernel, which starts with the first cell, inherits RLHF_FAST. Where the course's reward model is
    missing (`make test` makes it first), one notebook makes it, and others wait for it."""
    cell = type(item).__name__ == "IPyNbCell"
    os.environ["RLHF_FAST"] = str(int(cell))
    reads = cell or item.get_closest_marker("browser")
    if fcntl is None or REWARD_MODEL.exists() or not reads:
        return (yield)
    with open(__file__) as file:  # any file will do
        fcntl.flock(file, fcntl.LOCK_EX)
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    crashed = report.failed and call.when == "call" and type(item).__name__ == "IPyNbCell"
    if crashed and "outputs differ" not in str(call.excinfo.value):
        item.parent.crashed_at = item.name
    return report


def pytest_runtest_setup(item):
    crashed_at = getattr(item.parent, "crashed_at", None)
    if crashed_at:
        pytest.skip(f"{crashed_at} of this notebook crashed")


# ---------------------------------------------------------------- where the time goes


def pytest_terminal_summary(terminalreporter, config):
    """With `--durations`, the seconds of each file."""
    if not config.option.durations:
        return
    seconds = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if hasattr(report, "duration"):
            seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section("seconds by file")
    for file, total in seconds.most_common(20):
        terminalreporter.line(f"{total:7.1f}  {file}")
