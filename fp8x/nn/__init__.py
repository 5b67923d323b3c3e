"""Flax NNX layers."""

from fp8x.nn.convert import quantize_model, register
from fp8x.nn.grouped import GroupedLinear
from fp8x.nn.linear import Linear
from fp8x.nn.moe import MoE
from fp8x.nn.quantized import Float8Weight, InputScale, WeightScale
from fp8x.nn.unquantized import GatedMLP, UnquantizedGroupedLinear

__all__ = [
    "Float8Weight",
    "GatedMLP",
    "GroupedLinear",
    "InputScale",
    "Linear",
    "MoE",
    "UnquantizedGroupedLinear",
    "WeightScale",
    "quantize_model",
    "register",
]
