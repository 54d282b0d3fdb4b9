"""How notebooks run as tests: fewer PPO steps (RLHF_FAST=1), and a notebook stops at its first crash."""

import os

import pytest


def pytest_configure(config):
    sanitize = getattr(config.option, "nbval_sanitize_with", None)
    if sanitize:  # nbval looks from the working directory
        config.option.nbval_sanitize_with = str(config.rootpath / sanitize)
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
