"""Flax NNX layers."""

from fp8x.nn.calibrated import InputScale
from fp8x.nn.contraction import Einsum, LinearGeneral
from fp8x.nn.convert import quantize_model
from fp8x.nn.embed import Embed
from fp8x.nn.grouped import GroupedLinear
from fp8x.nn.linear import Linear, LoRALinear
from fp8x.nn.moe import MoE
from fp8x.nn.quantized import Float8Weight, WeightScale
from fp8x.nn.registry import register
from fp8x.nn.report import Report, report
from fp8x.nn.training import QuantizationAware, finish_training
from fp8x.nn.unquantized import GatedMLP, UnquantizedGroupedLinear
from fp8x.nn.walk import check_calibrated

__all__ = [
    "Einsum",
    "Embed",
    "Float8Weight",
    "GatedMLP",
    "GroupedLinear",
    "InputScale",
    "Linear",
    "LinearGeneral",
    "LoRALinear",
    "MoE",
    "QuantizationAware",
    "Report",
    "UnquantizedGroupedLinear",
    "WeightScale",
    "check_calibrated",
    "finish_training",
    "quantize_model",
    "register",
    "report",
]
