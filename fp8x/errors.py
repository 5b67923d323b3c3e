"""What fp8x raises for a user's mistake: the message names the thing, what came, what fits and what to do."""

from collections.abc import Sequence


class Fp8xError(ValueError):
    """Base of every error below; a `ValueError`, since each is a value that does not fit."""


class ShapeError(Fp8xError):
    """A shape, dtype or block that does not fit an operation or a scheme."""


class RecipeError(Fp8xError):
    """An unknown recipe or element, or a combination that no layer can hold."""


class RuleError(Fp8xError):
    """A rule that matches no module, or is not a regular expression."""


class ConfigError(Fp8xError):
    """A model configuration without a needed field, or with a value that is not supported."""


class CheckpointError(Fp8xError):
    """A checkpoint that is missing, truncated, inconsistent, or would be overwritten."""


class CalibrationError(Fp8xError):
    """A static activation scale that is missing, or statistics from which none can be made."""


class DataError(Fp8xError):
    """A data file of which nothing can be used."""


class MeshError(Fp8xError):
    """A mesh that cannot be made, or that a model or its data does not fit."""


class BackendError(Fp8xError):
    """A backend that was asked for by name and cannot run the call."""


def some(names: list[str]) -> str:
    """A few of many names, and a verb."""
    return f"{few(names)} {'is' if len(names) == 1 else 'are'}"


def few(names: Sequence[str], most: int = 4) -> str:
    """The first of many names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{rest}"
