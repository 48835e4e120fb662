# SPDX-License-Identifier: MIT
"""Where the tests begin: with the longest, which goes on beside all others."""


def pytest_collection_modifyitems(items):
    """The main job's result is looked at last; test_experiments.py starts it first."""
    items.sort(key=lambda item: item.name == "test_main_job")
