"""Tensor-, expert- and data-parallel inference: which parameter lies where, and what moves. See docs/sharding.md."""

from fp8x.meshes import scale_spec
from fp8x.sharding.model import shard
from fp8x.sharding.run import specs

__all__ = ["scale_spec", "shard", "specs"]
