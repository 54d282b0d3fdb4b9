"""How tests run: on the CPU, whose numbers they know, and on a CUDA card just those that are asked for with `-m cuda`.
Notebooks make fewer PPO steps (RLHF_FAST=1), and stop at their first crash."""

import os

import pytest


def pytest_configure(config):
    sanitize = getattr(config.option, "nbval_sanitize_with", None)
    if sanitize:  # nbval looks from the working directory
        config.option.nbval_sanitize_with = str(config.rootpath / sanitize)
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first looks for a card, which is later
    os.environ.setdefault("RLHF_FAST", "1")  # kernels inherit it
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


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
