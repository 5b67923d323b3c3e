"""`kept_programs`: compiled programs outlive the process, so that a short command need not compile them again."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

VARIABLE = "FP8X_PROGRAMS"

_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_persistent_cache_enable_xla_caches": "none",
}


@contextlib.contextmanager
def kept_programs() -> Iterator[None]:
    """JAX's persistent compilation cache, for what is compiled inside, where the user has not set one up.

    Programs lie in `~/.cache/fp8x` (`$XDG_CACHE_HOME`), in a directory for each kind of processor, or where the
    environment variable FP8X_PROGRAMS says; empty, it keeps none. Nothing is kept where that can't be written.
    """
    is_wanted = jax.config.jax_compilation_cache_dir is None and jax.config.jax_enable_compilation_cache
    directory = _directory() if is_wanted else None
    if directory is None:
        yield
        return
    settings = _SETTINGS | {"jax_compilation_cache_dir": str(directory)}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it holds on to the first directory that it sees


def _directory() -> Path | None:
    named = os.environ.get(VARIABLE)
    if named == "":
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    directory = Path(named) if named else home / "fp8x" / "programs" / _processor()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return directory if os.access(directory, os.W_OK) else None


def _processor() -> str:
    """What tells processors apart that run each other's programs: XLA compiles for the one that it is on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "any"
    found = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()[:16]
