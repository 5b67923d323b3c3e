"""Ctrl-C and SIGTERM end the command line within a second, whatever it is doing.

Python runs a signal's handler on the main thread, between two of its instructions: not while XLA compiles or computes,
which takes seconds. There it would raise KeyboardInterrupt, in the middle of imports, callbacks and destructors that
are not made for it, and wait for threads. Instead a thread waits for signals and ends the process. Nothing is unwound:
what a killed conversion leaves is taken over by the next, and files that are written in one go are `shielded`.
"""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
PATIENCE = 0.5  # seconds that what is shielded may take

_SHOW_CURSOR = "\N{ESCAPE}[?25h"  # which a progress bar hides

_shield = threading.RLock()
_advice: list[str] = []


def install() -> None:
    """From now on SIGINT and SIGTERM end this process, with the exit status that a shell gives: 130 or 143.

    A signal that is ignored, as `nohup` and a script's `&` have it, stays ignored.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # To this the interpreter writes a signal's number before it runs a handler. First, so that no signal is lost.
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    threading.Thread(target=_wait, args=(reading,), daemon=True).start()


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """For the writing of a small file: it is not interrupted, unless it takes longer than half a second."""
    with _shield:
        yield


@contextlib.contextmanager
def advice(words: str) -> Iterator[None]:
    """What an interruption also says while this lasts: what is there already, and what to do."""
    _advice.append(words)
    try:
        yield
    finally:
        _advice.pop()


def _wait(reading: int) -> None:
    while (number := os.read(reading, 1)[0]) not in WORDS:
        pass
    _shield.acquire(timeout=PATIENCE)
    line = "; ".join([WORDS[number], *_advice[-1:]]) + "\n"
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed
        line = f"\n{_SHOW_CURSOR}{line}" if os.isatty(2) else line
        if select.select([], [2], [], PATIENCE)[1]:  # nor wait for who does not read
            os.write(2, line.encode())
    os._exit(128 + number)
