"""Scales that `fp8x quantize` has found are kept until they are written: the same command does not calibrate again."""

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8x import interrupt
from fp8x.calibrate import sidecar
from fp8x.checkpoint.destination import explained, real
from fp8x.checkpoint.leftovers import SCALES, lock, partial
from fp8x.checkpoint.reader import Reader
from fp8x.errors import CalibrationError
from fp8x.version import __version__

if TYPE_CHECKING:
    from fp8x.calibrate import Dataset, Sidecar
    from fp8x.recipe import Recipe


def scales_file(
    source: Path,
    destination: Path,
    recipe: "Recipe | str | None",
    rules: "Mapping[str, Recipe | None]",
    dataset: "Dataset",
    *options: Any,
) -> Path:
    """Where scales lie that follow from all of this: in the conversion's working directory, named by a hash of it."""
    reader = Reader(source)
    identity = [
        [__version__, version("jax"), version("jaxlib")],
        [reader.identity, reader.config],
        [repr(recipe), [(pattern, repr(rule)) for pattern, rule in rules.items()]],
        [dataset.to_json(), *options],
    ]
    digest = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()
    return partial(real(destination)) / f"{SCALES}{digest[:16]}.json"


def read(file: Path) -> "Sidecar | None":
    """What a run that was stopped has left there; None where nothing is, or nothing whole."""
    try:
        return sidecar.read(file) if file.exists() else None
    except CalibrationError:
        return None


def keep(found: "Sidecar", file: Path) -> None:
    """Writes scales there, unless they are, or another process is at the same destination.

    Raises:
        CheckpointError, CalibrationError: they can't be written.
    """
    if file.exists():
        return
    with interrupt.shielded(), explained(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = lock(file.parent)
        except BlockingIOError:
            return  # the conversion will say so
        except OSError:  # a file system without locks
            return found.write(file)
        try:
            found.write(file)
        finally:
            os.close(descriptor)
