"""A pytest plugin that collects once and runs every test in one of several forked processes.

    PYTHONPATH=benchmarks pytest -p forked_tests -p no:xdist -s --results tests.json --processes 15 tests/ops

Collecting imports JAX and every test, ten seconds that each process of its own would pay again; a fork has them for
nothing, as long as JAX has started no backend. What hangs, crashes or loses the GPU costs its own process: that is
noted, and the other tests go to a new one. Outcomes are written as they come, and a second run goes on from there.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import time
from collections import Counter
from pathlib import Path

import pytest
from jax._src import xla_bridge


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, required=True, help="a JSON file: what came of each test")
    parser.addoption("--processes", type=int, default=4)
    parser.addoption("--seconds", type=float, default=float("inf"), help="for all tests together")
    parser.addoption("--stall", type=float, default=90.0, help="seconds after which a test is taken to hang")


FAILED: dict[str, str] = {}  # to be collected, and why


class Outcomes:
    """What each test came to, in a file."""

    def __init__(self, path: Path):
        self._path = path
        self.of: dict[str, dict] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, test: str, outcome: str, **more) -> None:
        self.of[test] = {"outcome": outcome} | more
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.of, indent=1, ensure_ascii=False) + "\n")
        os.replace(partial, self._path)


class Worker:
    """A forked process that runs the tests that it is sent, and the one that it has."""

    def __init__(self, session):
        here, there = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(target=_run_tests, args=(session, here, there))
        self.process.start()
        there.close()
        self.connection, self.test, self.since = here, None, time.monotonic()

    def send(self, index: int, name: str) -> None:
        self.connection.send(index)
        self.test, self.since = name, time.monotonic()

    def kill(self) -> str:
        """Ends the process; gives the exit code that it had by itself."""
        self.process.join(0.1)
        code = self.process.exitcode
        self.process.kill()
        self.process.join()
        self.connection.close()
        return f"exit {code}"


def pytest_collectreport(report) -> None:
    """A file that can't be imported is an outcome too, and those beside it run."""
    if report.failed:
        FAILED[report.nodeid] = report.longreprtext[-2000:]


def pytest_runtestloop(session) -> bool | None:
    options = session.config.option
    if options.collectonly:
        return None
    if xla_bridge.backends_are_initialized():
        raise pytest.UsageError("collecting the tests started a backend of JAX, which no fork can use")
    outcomes, end = Outcomes(options.results), time.monotonic() + options.seconds
    for name, text in FAILED.items():
        outcomes.add(name, "not collected", text=text)
    names = [item.nodeid for item in session.items]
    waiting = [index for index, name in enumerate(names) if name not in outcomes.of]
    workers: list[Worker] = []
    try:
        while (waiting or any(worker.test for worker in workers)) and time.monotonic() < end:
            while len(workers) < min(options.processes, len(waiting)):
                workers.append(Worker(session))
            for worker in workers:
                if worker.test is None and waiting:
                    worker.send(waiting[0], names[waiting.pop(0)])
            multiprocessing.connection.wait([worker.connection for worker in workers], timeout=0.5)
            for worker in list(workers):
                if _has_ended(worker, outcomes, options.stall):
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.kill()
    count = Counter(outcomes.of[name]["outcome"] if name in outcomes.of else "not run" for name in [*FAILED, *names])
    print(f"\n{json.dumps(count)}", flush=True)
    session.testsfailed = sum(number for outcome, number in count.items() if outcome not in ("passed", "skipped"))
    return True


def _has_ended(worker: Worker, outcomes: Outcomes, stall: float) -> bool:
    """Whether the worker is no more; takes what came of its test."""
    try:
        if worker.connection.poll():
            outcome = worker.connection.recv()
            outcomes.add(worker.test, **outcome)
            worker.test = None
            # The context is lost, and with it every test that would follow in this process.
            if "CUDA_ERROR" in outcome["text"]:
                worker.kill()
                return True
        elif worker.test and time.monotonic() - worker.since > stall:
            worker.kill()
            outcomes.add(worker.test, "stalled")
            return True
    except (EOFError, ConnectionResetError):
        outcomes.add(worker.test, worker.kill())
        return True
    return False


def _run_tests(session, parents_end, connection) -> None:
    parents_end.close()
    reports = []

    class Listener:
        @staticmethod
        def pytest_runtest_logreport(report):
            reports.append(report)

    session.config.pluginmanager.register(Listener())
    while True:
        try:
            item = session.items[connection.recv()]
        except EOFError:
            return
        reports.clear()
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        connection.send(_outcome(reports))


def _outcome(reports: list) -> dict:
    """Of set-up, call and tear-down: the one that did not pass, or the call."""
    worst = next((report for report in reports if report.outcome != "passed"), reports[min(1, len(reports) - 1)])
    text = worst.longreprtext if worst.failed else str(worst.longrepr or "")
    seconds = sum(report.duration for report in reports)
    return {"outcome": worst.outcome, "seconds": round(seconds, 2), "text": text[-2000:]}
