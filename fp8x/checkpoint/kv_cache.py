"""The scales of a KV cache in 8 bits, which checkpoints hold beside their matrices.

    tensor of an attention                           whose                    shape
    k_scale, v_scale                                 compressed-tensors       [1], [] or, a scale a head, [heads, 1, 1]
    k_proj.k_scale, v_proj.v_scale                   ModelOpt                 []
    k_proj.output_scale, v_proj.output_scale         AutoFP8, Quark           [1] or []
    kv_scale                                         older: of both           [1] or []

Each is the number that a code is multiplied by. Where there is only one it serves for both, as in vLLM
(`quantization/kv_cache.py`). Fields of the config that declare them are in each format's file.
"""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float32

from fp8x.checkpoint.format import SCALE_DTYPES, Format, as_scale
from fp8x.checkpoint.noted import noted_unless
from fp8x.checkpoint.reader import Reader
from fp8x.errors import CheckpointError, some
from fp8x.scheme import FLOAT32, KV_HEAD, KV_SCHEMES, Scheme, is_kv_static

# Of keys, of values, or of both.
_NAME = re.compile(
    r"(?P<attention>.*?)\.(?:attn\.)?(?:(?P<k>(?:k_proj\.)?k|k_proj\.output)|(?P<v>(?:v_proj\.)?v|v_proj\.output)|kv)_scale"
)
QUERIES = re.compile(r".*\.(self_attn\.(q|attn|prob|prob_output)_scale|q_proj\.(q|output)_scale)")


@dataclasses.dataclass(frozen=True)
class KVScales:
    """How a checkpoint has the keys and values of its attentions stored.

    Attributes:
        scheme: over `[B, S, heads, dim]`: one scale, or one a head; None for 16 bits, where the config declares
            something that fp8x has not.
        scales: of keys and of values, float32 `[1]` or `[heads]`, by the attention's prefix. Empty where the config
            declares them and they are missing: they are 1 then.
        names: the tensors that hold them.
    """

    scheme: Scheme | None
    scales: Mapping[str, tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]]
    names: tuple[str, ...] = ()

    def of(self, attentions: Iterable[str]) -> list[tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]]:
        """The scales of these attentions.

        Raises:
            CheckpointError: some of them have none.
        """
        attentions, one = list(attentions), np.ones(1, np.float32)
        if not self.scales:
            return [(one, one)] * len(attentions)
        if missing := [f"{name}.k_scale" for name in attentions if name not in self.scales]:
            raise CheckpointError(f"{some(missing)} missing, while other layers have scales of a KV cache")
        return [self.scales[name] for name in attentions]

    def warn_of_missing(self, reader: Reader) -> None:
        """Warns of declared scales that are missing."""
        if not self.scales and self.scheme is not None and is_kv_static(self.scheme):
            warnings.warn(
                f"{reader.path}: config.json declares a KV cache in FP8, but there are no scales for it; they are "
                "taken as 1, as vLLM does",
                stacklevel=4,
            )


def read_kv_scales(reader: Reader, format: Format | None) -> KVScales | None:
    """The scales that a checkpoint holds or declares; None without any. Warns of a declaration that is not supported.

    Raises:
        CheckpointError: scales that are no scales; named.
    """
    declared, is_unknown = None, False
    try:
        if format is not None:
            config = reader.config["quantization_config"]
            with noted_unless(config, CheckpointError):
                declared = format.kv_scheme(config)
    except CheckpointError as error:
        is_unknown = True
        warnings.warn(f"{error}; keys and values stay in the model's type", stacklevel=4)
    found: dict[str, dict[str, str]] = {}
    for name in reader:
        if match := _NAME.fullmatch(name):
            kind = "k" if match["k"] else "v" if match["v"] else "kv"
            found.setdefault(match["attention"], {})[kind] = name
    names = tuple(name for each in found.values() for name in each.values())
    if is_unknown:
        return KVScales(None, {}, names)
    if not found:
        return None if declared is None else KVScales(declared, {})
    scales = {}
    for attention, kinds in found.items():
        keys = kinds.get("k") or kinds.get("kv")
        if keys is None:
            raise CheckpointError(f"{attention}.k_scale is missing in {reader.path}, which has {kinds['v']}")
        values = kinds.get("v") or kinds.get("kv") or keys
        scales[attention] = (_read(reader, keys), _read(reader, values))
    is_of_heads = any(scale.size > 1 for pair in scales.values() for scale in pair)
    is_of_heads |= declared is not None and declared.block == KV_HEAD
    return KVScales(KV_SCHEMES["head" if is_of_heads else "tensor"], scales, names)


def kv_tensors(scales: KVScales, format: Format) -> dict[str, Float32[np.ndarray, "..."]]:
    """What a format stores of these scales, name -> array."""
    shape = (-1, 1, 1) if scales.scheme.block == KV_HEAD else format.kv_shape
    return {
        f"{attention}.{name}": scale.reshape(shape)
        for attention, pair in scales.scales.items()
        for name, scale in zip(format.kv_names, pair, strict=True)
    }


def _read(reader: Reader, name: str) -> Float32[np.ndarray, " n"]:
    stored = reader.stored(name)
    scale = as_scale(reader.read(name, shapes=[stored.shape], dtypes=SCALE_DTYPES), FLOAT32).reshape(-1)
    if not scale.size or scale.size != max(stored.shape, default=1):
        raise CheckpointError(
            f"{name} in {stored.file}: shape is {list(stored.shape)}, expected one scale, or one a head"
        )
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise CheckpointError(f"{name} in {stored.file}: {scale.tolist()} are not all finite and positive")
    return np.array(scale)
