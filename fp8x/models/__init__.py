"""Decoders that load Hugging Face weights: for evaluation, calibration and generation."""

from fp8x.models import hf_names as hf_names
from fp8x.models.chat import apply_chat_template as apply_chat_template
from fp8x.models.config import DecoderConfig as DecoderConfig
from fp8x.models.decoder import Decoder as Decoder
from fp8x.models.generate import generate as generate
from fp8x.models.generate import stream as stream
from fp8x.models.kv_cache import Cache as Cache
