"""Where each parameter of a decoder lies in a Hugging Face checkpoint, known from the configuration alone."""

import collections
from collections.abc import Iterator, Mapping, Sequence

from fp8x.models.config import DecoderConfig
from fp8x.models.families import FAMILIES

Names = str | list["Names"]

_DENSE_MLP = ("gate_proj", "up_proj", "down_proj")


def linear_names(config: DecoderConfig) -> dict[str, Names]:
    """The tensors of every matrix that a linear layer holds.

    Returns module path -> tensor name without `.weight`. A Linear (the routers and `lm_head` among them) has one
    tensor; `mlp.w13` a list over experts of `[gate, up]`; `mlp.w2` a list over experts. Checkpoints hold `[out, in]`.
    """
    names: dict[str, Names] = {}
    for index in range(config.num_hidden_layers):
        layer, hf_layer = f"layers.{index}", f"model.layers.{index}"
        for name in _projections(config):
            names[f"{layer}.self_attn.{name}"] = f"{hf_layer}.self_attn.{name}"
        if index in config.dense_layers:
            names |= {f"{layer}.mlp.{name}": f"{hf_layer}.mlp.{name}" for name in _DENSE_MLP}
        else:
            names |= _moe_names(config, layer, hf_layer)
    if not config.tie_word_embeddings:
        names["lm_head"] = "lm_head"
    return names


def flat(names: Names, index: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    """Every tensor prefix with its index in the layer's leading dims."""
    if isinstance(names, str):
        yield index, names
        return
    for i, inner in enumerate(names):
        yield from flat(inner, (*index, i))


def rule_names(
    modules: Mapping[str, Sequence[str]], fused: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[list[str]]]:
    """How rules may call modules beside by their path: by the names of their matrices, without `model.` too, and by
    those of tensors that hold several experts.

    Arguments:
        modules: the prefixes of every module's matrices, by path.
        fused: by the name of such a tensor, those of the matrices in it.
    """
    tensors: dict[str, list[str]] = collections.defaultdict(list)
    for name, parts in (fused or {}).items():
        for part in parts:
            tensors[part.removesuffix(".weight")].append(name.removesuffix(".weight"))
    found = {}
    for path, prefixes in modules.items():
        of_experts = {name: None for prefix in prefixes for name in tensors[prefix]}
        each = [[f"model.{path}"], list(prefixes), list(of_experts)]
        found[path] = [*each, *([name.removeprefix("model.") for name in names] for names in each[1:])]
        found[path] = [names for names in found[path] if names]
    return found


def _projections(config: DecoderConfig) -> tuple[str, ...]:
    if config.latent is None:
        return ("q_proj", "k_proj", "v_proj", "o_proj")
    queries = ("q_proj",) if config.latent.q_rank is None else ("q_a_proj", "q_b_proj")
    return (*queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


def _moe_names(config: DecoderConfig, layer: str, hf_layer: str) -> dict[str, Names]:
    called, mixture = FAMILIES[config.model_type].mixture, config.mixture
    block = f"{hf_layer}.{called.block}"
    experts = [f"{block}.experts.{expert}" for expert in range(mixture.num_experts)]
    names: dict[str, Names] = {
        f"{layer}.mlp.router": f"{block}.{called.router}",
        f"{layer}.mlp.w13": [[f"{expert}.{called.gate}", f"{expert}.{called.up}"] for expert in experts],
        f"{layer}.mlp.w2": [f"{expert}.{called.down}" for expert in experts],
    }
    if mixture.shared_intermediate is not None:
        names |= {f"{layer}.mlp.shared.{name}": f"{block}.{called.shared}.{name}" for name in _DENSE_MLP}
    if mixture.shared_gate:
        names[f"{layer}.mlp.shared_expert_gate"] = f"{block}.{called.shared}_gate"
    return names


def param_names(config: DecoderConfig) -> dict[str, Names]:
    """Path of every parameter that is no linear layer's matrix -> tensor name; both have the same layout. Of experts'
    biases the names of all, nested as those of the matrices in `linear_names`."""
    names: dict[str, Names] = {"embed_tokens.embedding": "model.embed_tokens.weight", "norm.scale": "model.norm.weight"}
    for index in range(config.num_hidden_layers):
        layer, hf_layer = f"layers.{index}", f"model.layers.{index}"
        names |= {f"{layer}.{name}.scale": f"{hf_layer}.{name}.weight" for name in _norms(config)}
        names |= {f"{layer}.{name}.bias": f"{hf_layer}.{name}.bias" for name in _biased(config, index)}
        if config.attention_sinks:
            names[f"{layer}.self_attn.sinks"] = f"{hf_layer}.self_attn.sinks"
        if index not in config.dense_layers:
            names |= _moe_params(config, layer, hf_layer)
    return names


def _moe_params(config: DecoderConfig, layer: str, hf_layer: str) -> dict[str, Names]:
    matrices, mixture = _moe_names(config, layer, hf_layer), config.mixture
    router, names = matrices[f"{layer}.mlp.router"], {}
    if mixture.use_correction_bias:
        names[f"{layer}.mlp.correction_bias"] = f"{router}.e_score_correction_bias"
    if mixture.router_bias:
        names[f"{layer}.mlp.router.bias"] = f"{router}.bias"
    if mixture.use_bias:
        experts = (f"{layer}.mlp.w13", f"{layer}.mlp.w2")
        names |= {f"{path}.bias": with_suffix(matrices[path], ".bias") for path in experts}
    return names


def with_suffix(names: Names, suffix: str) -> Names:
    """The names, each with `suffix` behind it."""
    return names + suffix if isinstance(names, str) else [with_suffix(inner, suffix) for inner in names]


def interleaved_names(config: DecoderConfig) -> dict[str, str]:
    """Path of every layer of experts that a checkpoint in 16 or 32 bits holds in one tensor -> name of that tensor; see
    `MixtureNames.interleaved`."""
    if not (called := FAMILIES[config.model_type].mixture).interleaved:
        return {}
    layers = [index for index in range(config.num_hidden_layers) if index not in config.dense_layers]
    return {
        f"layers.{index}.mlp.{path}": f"model.layers.{index}.{called.block}.experts.{name}"
        for index in layers
        for path, name in (("w13", "gate_up_proj"), ("w2", "down_proj"))
    }


def unquantized_names(config: DecoderConfig) -> dict[str, str]:
    """Why rules can't name what `param_names` has, by tensor name without `.weight`."""
    reasons = {
        "embedding": "an embedding; fp8x.quantize_model takes a rule for it, once the model is loaded",
        "scale": "a norm's scale is a vector",
        "bias": "a bias, which stays as it is",
        "correction_bias": "a bias, which stays as it is",
        "sinks": "attention sinks are a vector",
    }
    return {
        name.removesuffix(".weight"): reasons[path.rpartition(".")[2]]
        for path, names in param_names(config).items()
        for _, name in flat(names)
    }


def _norms(config: DecoderConfig) -> Iterator[str]:
    yield from ("input_layernorm", "post_attention_layernorm")
    if config.qk_norm:
        yield from ("self_attn.q_norm", "self_attn.k_norm")
    if config.latent is not None:
        yield from () if config.latent.q_rank is None else ("self_attn.q_a_layernorm",)
        yield "self_attn.kv_a_layernorm"


def _biased(config: DecoderConfig, index: int) -> Iterator[str]:
    if config.attention_bias:
        yield from (f"self_attn.{name}_proj" for name in "qkv")
    if config.output_bias:
        yield "self_attn.o_proj"
    if config.mlp_bias and index in config.dense_layers:
        yield from (f"mlp.{name}" for name in _DENSE_MLP)


def skipped(config: DecoderConfig, name: str) -> bool:
    """Whether a tensor is of the layers for multi-token prediction, behind the last that is loaded."""
    prefix, _, rest = name.partition("model.layers.")
    number = rest.partition(".")[0]
    first = config.num_hidden_layers
    return not prefix and number.isdecimal() and first <= int(number) < first + config.skipped_layers
