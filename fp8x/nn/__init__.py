"""Flax NNX layers."""

from fp8x.nn.moe import MoE
from fp8x.nn.unquantized import GatedMLP, UnquantizedGroupedLinear

__all__ = ["GatedMLP", "MoE", "UnquantizedGroupedLinear"]
