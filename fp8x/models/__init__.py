"""Decoders that load Hugging Face weights: for evaluation, calibration and generation."""

from typing import TYPE_CHECKING

from fp8x.lazy import lazily

if TYPE_CHECKING:
    from fp8x.models import hf_names
    from fp8x.models.chat import apply_chat_template
    from fp8x.models.config import DecoderConfig
    from fp8x.models.decoder import Decoder
    from fp8x.models.generate import generate, stream
    from fp8x.models.kv_cache import Cache

__all__ = ["Cache", "Decoder", "DecoderConfig", "apply_chat_template", "generate", "hf_names", "stream"]

__getattr__ = lazily(
    __name__,
    {
        "Cache": "fp8x.models.kv_cache",
        "Decoder": "fp8x.models.decoder",
        "DecoderConfig": "fp8x.models.config",
        "apply_chat_template": "fp8x.models.chat",
        "generate": "fp8x.models.generate",
        "stream": "fp8x.models.generate",
    },
    submodules=("hf_names",),
)
