"""Which tiling a kernel takes: the one that was measured to be fastest on this device, or else its own best estimate.

Measured choices are data: a JSON file for each kind of device beside this one (`nvidia_h200.json`), and the file that
the environment variable FP8X_TUNING names, which comes first. `fp8x bench --tune` makes them.

    {"device": "NVIDIA H200", "entries": [{"kernel": "sm90_fp8", "m": 32768, "n": 4096, "k": 7168, "groups": 8,
     "tiling": {"block_m": 128, …}, "seconds": 0.0012, "jax": "0.11.2"}, …]}

An entry is for one kernel, N, K and number of groups, and for all M with the same next power of two, which is its "m".
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from fp8x.errors import BackendError


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a tiling is chosen for: a kernel, and the shape `[m, k] x [groups, n, k]`."""

    kernel: str
    m: int
    n: int
    k: int
    groups: int

    @property
    def key(self) -> tuple[str, int, int, int, int]:
        """Equal for problems that share an entry."""
        return self.kernel, 1 << (self.m - 1).bit_length(), self.n, self.k, self.groups


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel's tiling for a problem.

    Attributes:
        tiling: the chosen one.
        seconds: what it was measured at; None if it was not.
        estimates: the kernel's own estimate of each tiling that it could take, in seconds.
    """

    problem: Problem
    tiling: Any
    seconds: float | None
    estimates: Mapping[Any, float]


@dataclasses.dataclass(frozen=True, eq=False)
class _Record:
    choices: list[Choice] = dataclasses.field(default_factory=list)


# JAX keys its jit cache by these, so that a compiled function is traced again where they change.
_forced = jax.make_user_context(None)
_record = jax.make_user_context(None)


def choose[Tiling](problem: Problem, estimates: Mapping[Tiling, float]) -> Tiling:
    """The tiling that was measured to be fastest, or the one with the least of the `estimates`, the first of equals.

    Arguments:
        estimates: seconds for each tiling that the kernel could take. Tilings are frozen dataclasses, of one class.

    Raises:
        BackendError: a table that can't be read, or has a tiling that is none of the kernel's.
    """
    tiling, seconds = min(estimates, key=estimates.get), None
    if isinstance(_forced.value, type(tiling)):
        tiling = _forced.value
    elif entry := _entry(problem):
        try:
            tiling, seconds = type(tiling)(**entry["tiling"]), entry["seconds"]
        except TypeError:
            fields = ", ".join(field.name for field in dataclasses.fields(tiling))
            raise BackendError(
                f"tuning table: {problem.kernel} has the tiling {entry['tiling']}; its fields are {fields}"
            ) from None
    if _record.value is not None:
        _record.value.choices.append(Choice(problem, tiling, seconds, estimates))
    return tiling


@contextlib.contextmanager
def forced(tiling: Any) -> Iterator[None]:
    """Within it, kernels whose tilings are of this type take this one."""
    with _forced(tiling):
        yield


@contextlib.contextmanager
def recorded() -> Iterator[list[Choice]]:
    """The choices that are made within it, as functions are traced."""
    record = _Record()
    with _record(record):
        yield record.choices


def table_path(device_kind: str) -> Path:
    """Where the measured choices for a kind of device lie in this package."""
    return Path(__file__).with_name(re.sub(r"\W+", "_", device_kind.lower()) + ".json")


def write(path: Path, device_kind: str, entries: list[dict[str, Any]]) -> None:
    """Adds entries to a table, which may exist; a new one replaces an old one for the same problems."""
    table = read(path, device_kind) if path.exists() else {}
    table |= {_key(entry): entry for entry in entries}
    document = {"device": device_kind, "entries": [table[key] for key in sorted(table)]}
    path.write_text(json.dumps(document, indent=1) + "\n")
    _tables.cache_clear()


def read(path: Path, device_kind: str) -> dict[tuple, dict[str, Any]]:
    """The entries of a table, by the key of their problems.

    Raises:
        BackendError: it can't be read, or is another device's.
    """
    try:
        document = json.loads(path.read_text())
        device, table = document["device"], {_key(entry): entry for entry in document["entries"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendError(f"tuning table {path}: can't be read ({type(error).__name__}: {error})") from None
    if device != device_kind:
        raise BackendError(f"tuning table {path}: is for {device!r}, and this device is {device_kind!r}")
    return table


def _key(entry: Mapping[str, Any]) -> tuple:
    return Problem(*(entry[name] for name in ("kernel", "m", "n", "k", "groups"))).key


def _entry(problem: Problem) -> dict[str, Any] | None:
    tables = _tables(os.environ.get("FP8X_TUNING"), jax.devices()[0].device_kind)
    return next((table[problem.key] for table in tables if problem.key in table), None)


@functools.cache
def _tables(path: str | None, device_kind: str) -> list[dict[tuple, dict[str, Any]]]:
    shipped = table_path(device_kind)
    paths = [Path(path)] if path else []
    return [read(path, device_kind) for path in (*paths, *([shipped] if shipped.exists() else []))]
