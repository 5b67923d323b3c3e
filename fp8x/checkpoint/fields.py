"""Typed access to the fields of a `quantization_config`, or of other JSON, with the field's path in every error."""

from typing import Any

from fp8x.errors import CheckpointError

_MISSING = object()
_MAX_BLOCK = 2**20  # activations are filled up to whole blocks: a larger one takes all memory


class Fields:
    """An object inside a file. `where` is its path there, for errors."""

    def __init__(self, value: Any, where: str, file: str = "config.json"):
        if not isinstance(value, dict):
            raise CheckpointError(f"{file}: {where} is {value!r}, expected an object")
        self.value = value
        self.where = where
        self.file = file

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """A field; without `default`, it has to be there."""
        value = self.value.get(name, default)
        if value is _MISSING:
            raise CheckpointError(f"{self.file}: {self.where} has no {name}")
        return value

    def peek(self, name: str, default: Any = None) -> Any:
        """A field that is looked at, but means something that fp8x has not: `Noted` still names it as unread."""
        return dict.get(self.value, name, default)

    def one_of(self, name: str, *fits: Any, default: Any = _MISSING) -> Any:
        """A field that has to be one of `fits`."""
        value = self.get(name, default)
        # 1 == True in Python, not in JSON.
        if not any(value == fit and isinstance(value, bool) == isinstance(fit, bool) for fit in fits):
            raise CheckpointError(
                f"{self.file}: {self.where}.{name} is {value!r}; fp8x reads {' or '.join(map(repr, fits))}"
            )
        return value

    def object(self, name: str, default: Any = _MISSING) -> "Fields":
        """A field that is an object."""
        return Fields(self.get(name, default), f"{self.where}.{name}", self.file)

    def strings(self, name: str, default: Any = _MISSING) -> list[str]:
        """A field that is a list of strings, or null, which means none."""
        value = self.get(name, default) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, "a list of strings")
        return value

    def size(self, name: str) -> int:
        """A field that is a block's size: a positive integer."""
        value = self.get(name)
        if not _is_block(value):
            raise self.error(name, f"a positive integer up to {_MAX_BLOCK}")
        return value

    def block(self, name: str) -> tuple[int, int]:
        """A field that is a list of two such sizes."""
        value = self.get(name)
        if not isinstance(value, list) or len(value) != 2 or not all(map(_is_block, value)):
            raise self.error(name, f"a list of two positive integers up to {_MAX_BLOCK}, like [128, 128]")
        return value[0], value[1]

    def error(self, name: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {self.where}.{name} is {self.value.get(name)!r}, expected {expected}")


def _is_block(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MAX_BLOCK
