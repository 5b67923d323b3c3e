"""Results as one JSON document, written after each of them: a killed run leaves what it had, and goes on from there."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Results:
    """`{"facts": …, "results": […]}` in a file, which may be there from a run before."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self._running = path, path.with_suffix(".running")
        self.document = json.loads(path.read_text()) if path.exists() else {"facts": facts, "results": []}
        if self._running.exists():
            self.add(**json.loads(self._running.read_text()), failure="the process did not survive it, or was killed")
            self._running.unlink()

    def add(self, **result: Any) -> None:
        self.document["results"].append(result)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.document, indent=1, ensure_ascii=False) + "\n")
        os.replace(partial, self.path)

    def attempt(self, key: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
        """Adds `key | run()`, unless a result with this key is there.

        What `run` raises is a result too, as "failure"; so is, to the next process, that this one did not survive it.

        Raises:
            RuntimeError: what failed leaves this process without its GPU; another one can go on.
        """
        if self.has(**key):
            return
        self._running.write_text(json.dumps(key))
        try:
            found = run()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            found = {"failure": text[:1000]}
            if "CUDA_ERROR" in text:
                self.add(**key, **found)
                self._running.unlink()
                raise RuntimeError(text) from error
        self.add(**key, **found)
        self._running.unlink()

    def has(self, **key: Any) -> bool:
        """Whether a result with these fields is there."""
        return any(all(result.get(name) == value for name, value in key.items()) for result in self)

    def __iter__(self):
        return iter(self.document["results"])
