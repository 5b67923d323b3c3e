"""`Noted`: a JSON object that knows what of it was read, so that what nobody read can be named."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any


class Noted(dict):
    """A dict whose values are noted when they are asked for; objects in it, also in lists, are `Noted` too.

    `dict.get(noted, key)` looks without a note.
    """

    def __init__(self, value: Mapping[str, Any]):
        super().__init__({key: _noted(item) for key, item in value.items()})
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Dotted path and value of what was never asked for; null says nothing, and is left out."""
        for key, value in self.items():
            if key not in self._read:
                if value is not None:
                    yield key, value
            else:
                yield from _unread(key, value)


@contextlib.contextmanager
def noted_unless(value: Any, *errors: type[Exception]) -> Iterator[None]:
    """A block in which `value` is read: what it notes counts unless it ends with one of these exceptions."""
    before = [(each, set(each._read)) for each in _objects(value)]
    try:
        yield
    except errors:
        for each, read in before:
            each._read = read
        raise


def _noted(value: Any) -> Any:
    if isinstance(value, list):
        return [_noted(item) for item in value]
    return Noted(value) if isinstance(value, Mapping) else value


def _unread(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What of a value that was asked for nobody has looked into."""
    if isinstance(value, Noted):
        yield from ((f"{path}.{further}", item) for further, item in value.unread())
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unread(f"{path}[{index}]", item)


def _objects(value: Any) -> Iterator[Noted]:
    """Every object in a value."""
    if isinstance(value, Noted):
        yield value
    if isinstance(value, list | Noted):
        for item in value.values() if isinstance(value, Noted) else value:
            yield from _objects(item)
