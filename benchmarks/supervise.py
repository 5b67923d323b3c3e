"""Running what may hang, crash or lose the GPU: in processes of their own, watched, and what they found kept."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STALL = 75.0  # seconds without news, after which a benchmark is taken to hang; compiling takes some
TEST_STALL = 40.0  # the same for tests, which compile less: to start, JAX and its GPU take ten
PROCESSES = 4  # that run tests side by side: most of a test is compiling


def run(
    command: list,
    log: Path,
    deadline: float,
    news: Callable[[], Any],
    *,
    stall: float | None = None,
    **environment: str,
) -> str:
    """Runs a command, its output appended to `log`. Gives "exit N"; or "stalled" or "out of time", and it was killed.

    It stalls when what `news` returns stays the same for `stall` (STALL) seconds.
    """
    paths = {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "PYTHONUNBUFFERED": "1"}
    with log.open("a") as output:
        output.write(f"\n$ {' '.join(map(str, command))[:500]}\n")
        output.flush()
        streams = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        child = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=os.environ | paths | environment, start_new_session=True, **streams
        )
        known, since = news(), time.monotonic()
        try:
            while child.poll() is None:
                time.sleep(0.1)
                if (now := news()) != known:
                    known, since = now, time.monotonic()
                if time.monotonic() > deadline:
                    return "out of time"
                if time.monotonic() - since > (stall or STALL):
                    return "stalled"
            return f"exit {child.returncode}"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def run_again(command: list, results: Path, log: Path, deadline: float, **environment: str) -> str:
    """Runs a benchmark that takes --seconds, and again when it was killed or died: it goes on where it was."""
    while True:
        left = max(0, int(deadline - time.monotonic()) - 5)
        before = news_of(results)
        ended = run([*command, "--seconds", left], log, deadline, lambda: news_of(results), **environment)
        if ended == "out of time":
            results.with_suffix(".running").unlink(missing_ok=True)  # it is not to blame
        if ended in ("exit 0", "out of time") or news_of(results) == before:
            return ended


def news_of(path: Path) -> int:
    """Changes when a file does, or `Results` begins with something."""
    running = path.with_suffix(".running")
    return sum(file.stat().st_mtime_ns for file in (path, running) if file.exists())


class Outcomes:
    """What each test came to, in a file."""

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()
        self.of: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, test: str, outcome: str, **more: Any) -> None:
        with self._lock:
            self.of[test] = {"outcome": outcome} | more
            self._path.write_text(json.dumps(self.of, indent=1) + "\n")


def run_tests(targets: list[str], outcomes: Outcomes, log: Path, deadline: float, **environment: str) -> dict[str, int]:
    """Runs tests in PROCESSES processes; those that hang or crash are noted, and those behind them run all the same."""
    listed = log.with_suffix(".tests")
    run(_pytest("--collect-only", "-q", *targets), listed, deadline, lambda: None, **environment)
    text = listed.read_text()
    listed.unlink()
    names = [line for line in text.splitlines() if "::" in line and not line.startswith((" ", "$"))]
    if not names:
        outcomes.add(" ".join(targets), "not collected", text=text[-2000:])
    waiting = [name for name in names if name not in outcomes.of]
    parts = [(waiting[index::PROCESSES], log.with_suffix(f".{index}")) for index in range(PROCESSES)]
    threads = [
        threading.Thread(target=_run_part, args=(mine, outcomes, part, deadline, environment))
        for mine, part in parts
        if mine
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with log.open("a") as whole:
        for _, part in parts:
            if part.exists():
                whole.write(part.read_text())
                part.unlink()
    return dict(Counter(outcomes.of[name]["outcome"] if name in outcomes.of else "not run" for name in names))


def _run_part(names: list[str], outcomes: Outcomes, log: Path, deadline: float, environment: dict[str, str]) -> None:
    while names and time.monotonic() < deadline:
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
            progress = Path(file.name)
            ended = run(
                _pytest("-p", "pytest_progress", *names),
                log,
                deadline,
                lambda progress=progress: progress.stat().st_size,
                stall=TEST_STALL,
                FP8X_PROGRESS=file.name,
                XLA_PYTHON_CLIENT_PREALLOCATE="false",  # of one GPU's memory, for several processes
                **environment,
            )
            events = [json.loads(line) for line in progress.read_text().splitlines()]
        running = None
        for event in events:
            running = event["test"] if event["outcome"] is None else None
            if event["outcome"] is not None:
                outcomes.add(**event)
        if running is not None:
            outcomes.add(running, ended)
        elif not events and ended != "out of time":
            outcomes.add(names[0], ended, text=log.read_text()[-2000:])
        names = [name for name in names if name not in outcomes.of]


def _pytest(*arguments: str) -> list[str]:
    alone = ["-o", "addopts=", "-p", "no:xdist", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *alone, *arguments]
