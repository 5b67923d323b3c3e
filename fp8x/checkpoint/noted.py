"""`Noted`: a JSON object that knows what of it was read, so that what nobody read can be named."""

from collections.abc import Iterator, Mapping
from typing import Any


class Noted(dict):
    """A dict whose values are noted when they are asked for; objects in it are `Noted` too."""

    def __init__(self, value: Mapping[str, Any]):
        super().__init__({key: Noted(item) if isinstance(item, Mapping) else item for key, item in value.items()})
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
            elif isinstance(value, Noted):
                yield from ((f"{key}.{path}", item) for path, item in value.unread())
