"""What every command shares: errors in one line, progress, tables, JSON. Results go to stdout, the rest to stderr.

rich is imported when something is shown: it takes as long as the rest of a command that only says what it can do.
"""

import contextlib
import functools
import json
import math
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from fp8x import interrupt
from fp8x.errors import DataError, Fp8xError

if TYPE_CHECKING:
    from rich.table import Table

PATIENCE = 2.0  # seconds before a progress bar shows
PIPE_WIDTH = 240  # columns where no terminal says how many there are; tables take what they need

# A file system's word on a path that the user gave; any other OSError keeps its traceback.
_PATH_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


def command(function: Callable) -> Callable:
    """A command in which a user's mistake ends in one red line and exit code 2, and a warning is one yellow line."""

    @functools.wraps(function)
    def guarded(*args, **kwargs):
        try:
            with _warnings_as_lines():
                return function(*args, **kwargs)
        except (Fp8xError, *_PATH_ERRORS) as error:
            is_lost = isinstance(error, FileNotFoundError) and error.filename is None  # what os.getcwd raises
            _say("error", "the working directory is gone; change to one that is there" if is_lost else error, "red")
            raise typer.Exit(2) from None

    return guarded


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    shown = set()

    def show(message: Warning | str, category: type[Warning], *where, **options) -> None:
        if not issubclass(category, UserWarning):
            return default(message, category, *where, **options)
        if str(message) not in shown:
            shown.add(str(message))
            warn(message)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        default, warnings.showwarning = warnings.showwarning, show
        yield


def warn(message: object) -> None:
    """A line on stderr for what the user should know."""
    _say("warning", message, "yellow")


def _say(kind: str, message: object, style: str) -> None:
    from rich.console import Console

    line = " ".join(str(message).splitlines())
    Console(stderr=True).print(f"{kind}: {line}", style=style, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress(what: str, unit: Literal["steps", "bytes"] = "steps") -> Iterator[Callable[[int, int | None], None]]:
    """A bar on stderr that shows once the work has taken two seconds, and goes when it is done.

    Gives a function that takes what is done and the total (None: unknown), both in `unit`.
    """
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    counts = (bars.DownloadColumn(), bars.TransferSpeedColumn()) if unit == "bytes" else (bars.MofNCompleteColumn(),)
    what_and_bar = (bars.SpinnerColumn(), bars.TextColumn("{task.description}"), bars.BarColumn())
    columns = (*what_and_bar, *counts, bars.TimeRemainingColumn())
    bar = bars.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=None)
    timer = threading.Timer(PATIENCE, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda done, total: bar.update(task, completed=done, total=total)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def table(*columns: str, left: tuple[str, ...] = ()) -> "Table":
    """An empty table; the first column and those in `left` hold words, the others numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        is_words = index == 0 or name in left
        made.add_column(name, justify="left" if is_words else "right", overflow="fold", no_wrap=not is_words)
    return made


def show(*what: object) -> None:
    """Prints tables and lines on stdout."""
    from rich.console import Console

    options = {"markup": False, "highlight": False}
    console = Console(**options)
    console = console if console.is_terminal else Console(**options, width=PIPE_WIDTH)
    for each in what:
        console.print(each)


def show_json(value: Any) -> None:
    """Prints one JSON document on stdout."""
    typer.echo(to_json(value))


def to_json(value: Any) -> str:
    """Indented JSON; NaN and Inf, which JSON does not know, become null."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """What JSON can hold: arrays as lists, paths as text, NaN and Inf as null."""
    match value:
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case Path():
            return str(value)
    # An array, or a number of numpy's: not imported for help's sake.
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def check_file(option: str, path: Path) -> None:
    """Raises DataError, before any work, where a file to be written can't be."""
    if path.is_dir():
        raise DataError(f"{option} {path}: is a directory; name a file in it")
    if path.exists() and not path.is_file():
        raise DataError(f"{option} {path}: is no file, and would be replaced by one; name another")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise DataError(f"{option} {path}: its directory does not exist")
    try:
        with interrupt.shielded(), tempfile.NamedTemporaryFile(dir=parent, prefix=f".{path.name}.tmp-"):
            pass
    except OSError as error:
        raise DataError(f"{option} {path}: can't be written: {error.strerror}; write elsewhere") from None


def size(count: int) -> str:
    """Bytes for people: 1,234 B, 12.3 kB, 4.56 MB."""
    if count < 1000:
        return f"{count} B"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.5 or unit == "TB":
            return f"{count:.3g} {unit}"


def decibels(snr: float | None) -> str:
    """An SNR for people; -Inf where nothing is left of the original."""
    if snr in (math.inf, -math.inf):
        return "exact" if snr > 0 else "lost"
    return "–" if snr is None else f"{snr:.1f} dB"
