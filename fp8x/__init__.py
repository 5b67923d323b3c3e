"""FP8 for JAX and Flax: quantized layers, calibration, checkpoints."""

from fp8x import linen, nn, ops
from fp8x.array import ScaledArray
from fp8x.calibrate import calibrate
from fp8x.models.convert import choose_recipes, convert
from fp8x.models.hub import load, save
from fp8x.models.modules import load_into
from fp8x.nn import quantize_model, report
from fp8x.numerics import quantize
from fp8x.ops import backend
from fp8x.recipe import HOPPER, RECIPES, Recipe, recipe
from fp8x.scheme import Scheme
from fp8x.version import __version__

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
    "quantize",
    "quantize_model",
    "recipe",
    "report",
    "save",
]
