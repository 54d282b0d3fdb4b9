"""A plugin for one test of test_setup.py: prints which CUDA cards the tests of this run may see."""

import os


def pytest_collection_finish(session):
    print(f"cards to be seen: {os.environ.get('CUDA_VISIBLE_DEVICES')!r}")
