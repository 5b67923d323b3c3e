"""What practitioners keep in 16 bits, in checkpoints of any architecture, by the names and shapes of their tensors.

The lists follow what FP8 checkpoints of their makers leave out (`modules_to_not_convert` and `ignore` of DeepSeek-V3,
Qwen3-Next, Qwen3-VL, GLM-4.5, Llama 4, Granite) and the recipes of llm-compressor and ModelOpt: whatever sees an image
or a sound, whatever leads from there into the language model, heads and routers (`fp8x.roles`), and the seams of
multi-token prediction. Rules override all of it.
"""

import functools
import math
import re
from collections.abc import Mapping

from fp8x import roles
from fp8x.roles import Product

SMALLEST = 16  # rows and columns: below it readers' tensor cores take no 8 bits (torch._scaled_mm), and little is won

# By what a component of a module's name is, between dots. The first that matches says why; of what is a head or a
# router, too, the first four do.
_FIRST = 4
_COMPONENTS = {
    "an adapter": r"lora_[ab](_.*)?|(.*_)?adapters?",
    "sees images": r"(.*_)?(vision|visual|image|img|video)(_.*)?|vit|vpm|siglip.*|clip.*|sam_model|d?vae",
    "hears or speaks": r"(.*_)?(audio|speech|sound)(_.*)?|apm|whisper.*|vocoder|(code|token)2wav|tts(_.*)?",
    "leads into the language model": r"(.*_)?(projector|connector|aligner|resampler|merger|abstractor|perceiver)(_.*)?"
    r"|(mm|multi_modal)_.*|mlp1|q_?former|(language|modality|hidden|text)_projection",
    "joins layers for multi-token prediction": r"eh_proj",
    "a recurrence's gates and steps": r"dt_proj|x_proj|in_proj_(ba|a|b)|ba_proj|[ab]_proj|f_[ab]_proj",
    "weighs what an indexer finds": r"weights_proj",
    "a narrow path beside the layers": r"altup|laurel|per_layer_.*",
}
_REASONS = list(_COMPONENTS)
_PATTERNS = [re.compile(pattern, re.IGNORECASE) for pattern in _COMPONENTS.values()]

# By the whole name. The first are no linear layers at all, though they have two dims.
LOOKUPS = re.compile(
    r"(.*\.)?((?![^.]*proj)[^.]*embed[^.]*(\.\d+)?|wte|wpe|shared|relative_attention_bias|[^.]*norm)",
    re.IGNORECASE,
)
_SEAM = re.compile(r"(.*\.)?(mtp|nextn)[^.]*\.(.*\.)?(fc|input_proj|embed_proj|proj)")
_CONV1D = re.compile(r"(.*)\.\d+\.(attn|crossattention|mlp)\.(c_attn|q_attn|c_fc|c_proj)")


def why_kept(matrices: Mapping[str, tuple[int, ...]], tables: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Why matrices stay in 16 bits where no rule says otherwise.

    Arguments:
        matrices: the shape `[N, K]` of every linear layer's matrix, by prefix: the tensor's name without `.weight`.
        tables: the shapes `[V, D]` of embeddings, by prefix.

    Returns the reason of those that stay, by prefix.
    """
    kept = roles.find({prefix: Product(*shape) for prefix, shape in matrices.items() if len(shape) == 2}, tables).kept
    transposed = _conv1d_layers(matrices)
    found = {}
    for prefix, shape in matrices.items():
        if (match := _CONV1D.fullmatch(prefix)) and match[1] in transposed:
            found[prefix] = "lies as [K, N], of GPT-2's Conv1D, which readers count as no linear layer"
        elif reason := _why(prefix, shape, kept.get(prefix)):
            found[prefix] = reason
    return found


def _why(prefix: str, shape: tuple[int, ...], role: str | None) -> str | None:
    kind = min((kind for part in prefix.split(".") if (kind := _kind(part)) is not None), default=None)
    if role is not None and (kind is None or kind >= _FIRST):
        return role
    if kind is not None:
        return _REASONS[kind]
    if _SEAM.fullmatch(prefix):
        return "joins layers for multi-token prediction"
    if shape[0] < SMALLEST and math.prod(shape):
        return f"fewer than {SMALLEST} rows"
    if shape[1] < SMALLEST and math.prod(shape):
        return f"fewer than {SMALLEST} columns"
    return None


@functools.lru_cache(10_000)  # models have many layers and experts, and few words
def _kind(part: str) -> int | None:
    """Which of the reasons a component of a name is, if any."""
    return next((index for index, pattern in enumerate(_PATTERNS) if pattern.fullmatch(part)), None)


def _conv1d_layers(matrices: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The lists of layers whose matrices lie as `[K, N]`: their `c_attn` is `[K, 3K]`."""
    matches = ((_CONV1D.fullmatch(prefix), shape) for prefix, shape in matrices.items())
    return {match[1] for match, (n, k) in matches if match and match[3] == "c_attn" and k == 3 * n}
