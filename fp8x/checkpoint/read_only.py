"""`ReadOnly`: a format that is read and not written, since one that is written holds the same."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fp8x.checkpoint.fields import Fields
from fp8x.checkpoint.format import Format, Recipes
from fp8x.errors import CheckpointError
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme


class ReadOnly(Format):
    """A format of other tools. It declares no KV cache in 8 bits unless it says how.

    Attributes:
        instead: the formats that hold the same, as the end of a sentence.
    """

    instead: str

    def objection(self, recipes: Iterable[Recipe]) -> str | None:
        return f"is read only; {self.instead}"

    def to_config(self, recipes: Recipes, out_dtype: np.dtype) -> dict[str, Any]:
        raise CheckpointError(f"format: {self.name!r} {self.objection(())}")

    def kv_fields(self, scheme: Scheme) -> dict[str, Any] | None:
        return None

    def kv_scheme(self, config: Mapping[str, Any]) -> Scheme | None:
        Fields(config, "quantization_config").one_of("kv_cache_scheme", None, default=None)
        return None
