"""Results as one JSON document, written after each of them: a killed run leaves what it had, and goes on from there."""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Results:
    """`{"facts": …, "results": […]}` in a file, which may be there from a run before.

    Several processes may share it: each attempts what no other has, or is at. What they are at is in a file beside it.
    `facts` is called where there is no document.
    """

    def __init__(self, path: Path, facts: Callable[[], dict[str, Any]]):
        self.path, self._running = path, path.with_suffix(".running")
        with self._locked():
            if not path.exists():
                self._write(path, {"facts": facts(), "results": []})
            running = self._begun()
            for key in (running.pop(process) for process in list(running) if not _lives(process)):
                self._append(key | {"failure": "the process did not survive it, or was killed"})
            self._write(self._running, running)

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())

    def add(self, **result: Any) -> None:
        with self._locked():
            self._append(result)

    def attempt(self, key: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
        """Adds `key | run()`, unless a result with this key is there, or another process is at it.

        What `run` raises is a result too, as "failure"; so is, to the next process, that this one did not survive it.

        Raises:
            RuntimeError: what failed leaves this process without its GPU; another one can go on.
        """
        with self._locked():
            begun = self._begun()
            if self.has(**key) or key in begun.values():
                return
            self._write(self._running, begun | {str(os.getpid()): key})
        try:
            found = run()
        except Exception as error:
            found = {"failure": f"{type(error).__name__}: {error}"[:1000]}
        with self._locked():
            self._append(key | found)
            begun = self._begun()
            del begun[str(os.getpid())]
            self._write(self._running, begun)
        if "CUDA_ERROR" in found.get("failure", ""):
            raise RuntimeError(found["failure"])

    def has(self, **key: Any) -> bool:
        """Whether a result with these fields is there."""
        return any(all(result.get(name) == value for name, value in key.items()) for result in self)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.document["results"])

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self.path.with_suffix(".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _append(self, result: dict[str, Any]) -> None:
        document = self.document
        document["results"].append(result)
        self._write(self.path, document)

    def _begun(self) -> dict[str, dict[str, Any]]:
        """The key that each process is at."""
        return json.loads(self._running.read_text()) if self._running.exists() else {}

    @staticmethod
    def _write(path: Path, content: dict[str, Any]) -> None:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        os.replace(partial, path)


def _lives(process: str) -> bool:
    """Whether another process has this number; this one is at nothing when it begins."""
    return process != str(os.getpid()) and Path(f"/proc/{process}").exists()
