"""Running what may hang, crash or lose the GPU: in processes of their own, watched, and what they found kept."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STALL = 75.0  # seconds without news, after which a benchmark is taken to hang; compiling takes some


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
