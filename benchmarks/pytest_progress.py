"""A pytest plugin that writes what each test came to, as it happens, to the file that $FP8X_PROGRESS names.

    FP8X_PROGRESS=progress.jsonl PYTHONPATH=benchmarks pytest -p pytest_progress

A line a test that begins, and one for each that ends: a process that hangs or dies leaves the name of what did it.
"""

import json
import os

import pytest


def _write(**event) -> None:
    with open(os.environ["FP8X_PROGRESS"], "a") as file:
        file.write(json.dumps(event) + "\n")


def pytest_runtest_logstart(nodeid):
    _write(test=nodeid, outcome=None)


def pytest_runtest_logreport(report):
    if report.when != "call" and report.outcome == "passed":
        return
    text = report.longreprtext if report.failed else str(report.longrepr or "")
    _write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), text=text[-2000:])
    if report.failed and "CUDA_ERROR" in text:
        # The context is lost, and with it every test that would follow in this process.
        pytest.exit("the GPU is lost to this process", returncode=9)
