"""What practitioners keep in 16 bits, in checkpoints of any architecture, by the names and shapes of their tensors.

The lists follow what FP8 checkpoints of their makers leave out (`modules_to_not_convert` and `ignore` of DeepSeek-V3,
Qwen3-Next, Qwen3-VL, GLM-4.5, Llama 4, Granite) and the recipes of llm-compressor and ModelOpt: whatever sees an image
or a sound, whatever leads from there into the language model, heads, routers, and the seams of multi-token prediction.
Rules override all of it.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping

SMALLEST = 16  # rows and columns: below it readers' tensor cores take no 8 bits (torch._scaled_mm), and little is won

# By what a component of a module's name is, between dots. The first that matches says why.
_COMPONENTS = {
    "an adapter": r"lora_[ab](_.*)?|(.*_)?adapters?",
    "sees images": r"(.*_)?(vision|visual|image|img|video)(_.*)?|vit|vpm|siglip.*|clip.*|sam_model|d?vae",
    "hears or speaks": r"(.*_)?(audio|speech|sound)(_.*)?|apm|whisper.*|vocoder|(code|token)2wav|tts(_.*)?",
    "leads into the language model": r"(.*_)?(projector|connector|aligner|resampler|merger|abstractor|perceiver)(_.*)?"
    r"|(mm|multi_modal)_.*|mlp1|q_?former|(language|modality|hidden|text)_projection",
    "a router": r"(.*_)?(router|gating)|router_.*|gate|gates|(.*_)?expert_gate|wg",
    "a head": r"(.*_)?heads?|scores?|scorer|classifier|classification|pooler|qa_outputs|regressor|cls|proj_out",
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
_OUTPUT = re.compile(r"([^.\d][^.]*\.)*output")  # of all layers, not of one
_SEAM = re.compile(r"(.*\.)?(mtp|nextn)[^.]*\.(.*\.)?(fc|input_proj|embed_proj|proj)")
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\..*")
_CONV1D = re.compile(r"(.*)\.\d+\.(attn|crossattention|mlp)\.(c_attn|q_attn|c_fc|c_proj)")


def why_kept(matrices: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Why matrices stay in 16 bits where no rule says otherwise.

    Arguments:
        matrices: the shape `[N, K]` of every linear layer's matrix, by prefix: the tensor's name without `.weight`.

    Returns the reason of those that stay, by prefix.
    """
    experts = _count_experts(matrices)
    transposed = _conv1d_layers(matrices)
    found = {}
    for prefix, shape in matrices.items():
        if (match := _CONV1D.fullmatch(prefix)) and match[1] in transposed:
            found[prefix] = "lies as [K, N], of GPT-2's Conv1D, which readers count as no linear layer"
        elif reason := _why(prefix, shape, experts.get(prefix.rpartition(".")[0])):
            found[prefix] = reason
    return found


def _why(prefix: str, shape: tuple[int, ...], experts: int | None) -> str | None:
    kinds = [kind for part in prefix.split(".") if (kind := _kind(part)) is not None]
    if kinds:
        return _REASONS[min(kinds)]
    if _OUTPUT.fullmatch(prefix):
        return "a head"
    if _SEAM.fullmatch(prefix):
        return "joins layers for multi-token prediction"
    if experts is not None and shape[0] == experts:
        return f"a router: a row for each of {experts} experts"
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


def _count_experts(prefixes: Iterable[str]) -> dict[str, int]:
    """By the module that holds `experts`, how many there are."""
    found: dict[str, int] = {}
    for prefix in prefixes:
        if match := _EXPERT.fullmatch(prefix):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found
