"""Rotary positions (RoFormer, arXiv:2104.09864), and the ways to stretch them over a longer context."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from fp8x.errors import ConfigError
from fp8x.models.fields import Fields

Kind = Literal["default", "linear", "llama3", "yarn"]

_NEEDED: dict[Kind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL: dict[Kind, tuple[str, ...]] = {
    "default": (),
    "linear": (),
    "llama3": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}
_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "truncate")


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotation of one head, as transformers' `modeling_rope_utils.py` has it.

    Attributes:
        dim: how many of a head's dims turn, the first ones.
        theta: the base of the frequencies.
        kind: how they are stretched: not at all; all alike ("linear"); the slow ones ("llama3"); or by YaRN
            (arXiv:2309.00071).
        factor: by how much.
        original: the context that they were trained for, in tokens.
        low, high: the bounds between which a frequency is interpolated: in turns over the original context.
        truncate: whether YaRN's bounds are whole dims.
        amplitude: a factor on cosines and sines.
        score_factor: a factor on attention scores (DeepSeek's `mscale_all_dim`, squared).
        interleaved: whether dims 2i and 2i + 1 turn together, as DeepSeek stores them, instead of i and i + dim / 2.
    """

    dim: int
    theta: float = 1e4
    kind: Kind = "default"
    factor: float = 1.0
    original: float = 0.0
    low: float = 1.0
    high: float = 4.0
    truncate: bool = True
    amplitude: float = 1.0
    score_factor: float = 1.0
    interleaved: bool = False

    def frequencies(self) -> Float32[np.ndarray, " dim/2"]:
        """Radians a token, `theta^(-2i/dim)` before they are stretched."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        found, factor = np.float32(1) / np.float32(self.theta) ** exponents, np.float32(self.factor)
        if self.kind == "linear":
            return found / factor
        if self.kind == "llama3":
            turns = np.float32(self.original) / (np.float32(2 * math.pi) / found)
            smooth = np.clip((turns - np.float32(self.low)) / np.float32(self.high - self.low), 0, 1)
            return ((1 - smooth) * found / factor + smooth * found).astype(np.float32)
        if self.kind == "yarn":
            kept = 1 - self._ramp()
            return (found / factor * (1 - kept) + found * kept).astype(np.float32)
        return found

    def context(self, positions: int | None) -> int | None:
        """How many tokens a model reads whose `max_position_embeddings` are `positions`; None: no limit.

        As vLLM has it (`_get_and_verify_max_len`): "linear" stretches that number, "llama3" and no stretching leave it.
        YaRN stretches `original`; some configs state the result, others what was before, so the larger one holds.
        """
        if self.kind == "yarn":
            return max(positions or 0, int(self.original * self.factor))
        return int(positions * self.factor) if positions is not None and self.kind == "linear" else positions

    def _ramp(self) -> Float32[np.ndarray, " dim/2"]:
        """How far each frequency is interpolated: 0 for the quick ones, 1 for the slow ones."""
        bounds = [
            self.dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
            for turns in (self.high, self.low)
        ]
        first, last = (math.floor(bounds[0]), math.ceil(bounds[1])) if self.truncate else bounds
        first, last = max(first, 0), min(last, self.dim - 1)
        last += 0.001 * (first == last)
        return np.clip(
            (np.arange(self.dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(last - first), 0, 1
        )


def read_rope(fields: Fields, head_dim: int, *, partial: float | None = None, interleaved: bool = False) -> Rope:
    """The rotation that config.json states: in `rope_theta` and `rope_scaling` (transformers 4), or in
    `rope_parameters` (5); where neither is there, in the family's default of the latter.

    Arguments:
        head_dim: dims of a head that positions are for.
        partial: the share of them that turns, where config.json is silent; None for a family where all do.

    Raises:
        ConfigError: a rotation that is not one of the four, or lacks a number.
    """
    rope: dict[str, Any] = {}
    old, new = fields.raw("rope_scaling"), fields.raw("rope_parameters")
    if not old and new is None:
        new = fields.get("rope_parameters")
    for name, stated in (("rope_scaling", old or {}), ("rope_parameters", new or {})):
        if not isinstance(stated, Mapping):
            raise fields.error(name, stated, "an object")
        if nested := [key for key, value in stated.items() if isinstance(value, Mapping)]:
            raise ConfigError(f"config.json: {name} per layer type ({', '.join(nested)}) is not supported")
        rope |= {key: value for key, value in stated.items() if value is not None}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if not isinstance(kind, str) or kind not in _NEEDED:
            raise ConfigError(f"config.json: {name} has rope_type {kind!r}; supported: {', '.join(map(repr, _NEEDED))}")
    if unknown := sorted(set(rope) - {*_ALWAYS, *_NEEDED[kind], *_OPTIONAL[kind]}):
        raise ConfigError(f"config.json: rope_type {kind!r} has {unknown[0]}, which fp8x does not know there")
    longest = fields.optional_positive_int("max_position_embeddings")
    if kind == "yarn" and longest is not None:
        rope.setdefault("original_max_position_embeddings", longest)
        rope.setdefault("factor", longest / fields.positive_float("original", rope["original_max_position_embeddings"]))
    if absent := [name for name in _NEEDED[kind] if name not in rope]:
        raise ConfigError(f"config.json: rope_type {kind!r} has no {absent[0]} (a positive number)")
    theta = fields.get("rope_theta")  # beside what transformers 5 writes, for 4
    theta = fields.positive_float("rope_theta", rope.get("rope_theta", theta))
    share = rope.get("partial_rotary_factor", 1.0)
    if partial is not None:
        share = rope.get("partial_rotary_factor") or fields.raw("partial_rotary_factor") or partial
    elif share != 1:
        raise fields.error("partial_rotary_factor", share, "1")
    dim = int(head_dim * fields.positive_float("partial_rotary_factor", share))
    if dim % 2 or not 0 < dim <= head_dim:
        turning = "" if share == 1 else f", of which partial_rotary_factor ({share}) turns {dim}"
        raise ConfigError(f"head_dim must be even for rotary embeddings, got {head_dim}{turning}")
    number = lambda name, default: fields.positive_float(name, rope.get(name, default))  # noqa: E731
    found = Rope(
        dim,
        theta,
        kind,
        factor=number("factor", 1.0),
        original=number("original_max_position_embeddings", 1.0),
        low=number("low_freq_factor", 1.0),
        high=number("high_freq_factor", 4.0),
        interleaved=interleaved,
    )
    if kind != "yarn":
        return found
    scale, all_dims = (rope.get(name) for name in ("mscale", "mscale_all_dim"))
    is_both = scale and all_dims
    amplitude = _yarn_scale(found.factor, scale if is_both else 1.0)
    amplitude /= _yarn_scale(found.factor, all_dims) if is_both else 1.0
    return dataclasses.replace(
        found,
        low=number("beta_slow", 1.0),
        high=number("beta_fast", 32.0),
        truncate=rope.get("truncate", True),
        amplitude=number("attention_factor", amplitude),
        score_factor=_yarn_scale(found.factor, all_dims) ** 2 if all_dims else 1.0,
    )


def _yarn_scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
