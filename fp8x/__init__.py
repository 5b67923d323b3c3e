"""FP8 for JAX and Flax: quantized layers, calibration, checkpoints."""

from typing import TYPE_CHECKING

from fp8x.lazy import lazily
from fp8x.version import __version__

if TYPE_CHECKING:
    from fp8x import linen, nn, ops
    from fp8x.array import ScaledArray
    from fp8x.calibrate import calibrate
    from fp8x.models.convert import choose_recipes, convert
    from fp8x.models.hub import load, save
    from fp8x.models.modules import load_into
    from fp8x.models.plan import plan
    from fp8x.nn import quantize_model, report
    from fp8x.numerics import quantize
    from fp8x.ops import backend
    from fp8x.recipe import HOPPER, RECIPES, Recipe, recipe
    from fp8x.scheme import Scheme

__all__ = [
    "HOPPER",
    "RECIPES",
    "Recipe",
    "ScaledArray",
    "Scheme",
    "__version__",
    "backend",
    "calibrate",
    "choose_recipes",
    "convert",
    "linen",
    "load",
    "load_into",
    "nn",
    "ops",
    "plan",
    "quantize",
    "quantize_model",
    "recipe",
    "report",
    "save",
]

__getattr__ = lazily(
    __name__,
    {
        "HOPPER": "fp8x.recipe",
        "RECIPES": "fp8x.recipe",
        "Recipe": "fp8x.recipe",
        "ScaledArray": "fp8x.array",
        "Scheme": "fp8x.scheme",
        "backend": "fp8x.ops",
        "calibrate": "fp8x.calibrate",
        "choose_recipes": "fp8x.models.convert",
        "convert": "fp8x.models.convert",
        "load": "fp8x.models.hub",
        "load_into": "fp8x.models.modules",
        "plan": "fp8x.models.plan",
        "quantize": "fp8x.numerics",
        "quantize_model": "fp8x.nn",
        "recipe": "fp8x.recipe",
        "report": "fp8x.nn",
        "save": "fp8x.models.hub",
    },
    submodules=("linen", "nn", "ops"),
)


def __dir__() -> list[str]:
    return __all__
