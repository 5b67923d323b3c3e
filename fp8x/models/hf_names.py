"""Where each parameter of a decoder lies in a Hugging Face checkpoint, known from the configuration alone."""

from collections.abc import Iterator

from fp8x.models.config import DecoderConfig

Names = str | list["Names"]

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_DENSE_MLP = ("gate_proj", "up_proj", "down_proj")
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


def linear_names(config: DecoderConfig) -> dict[str, Names]:
    """The tensors of every matrix that a linear layer holds.

    Returns module path -> tensor name without `.weight`. A Linear (the routers and `lm_head` among them) has one
    tensor; `mlp.w13` a list over experts of `[gate, up]`; `mlp.w2` a list over experts. Checkpoints hold `[out, in]`.
    """
    names: dict[str, Names] = {}
    for index in range(config.num_hidden_layers):
        layer, hf_layer = f"layers.{index}", f"model.layers.{index}"
        for name in _ATTENTION:
            names[f"{layer}.self_attn.{name}"] = f"{hf_layer}.self_attn.{name}"
        if index in config.dense_layers:
            names |= {f"{layer}.mlp.{name}": f"{hf_layer}.mlp.{name}" for name in _DENSE_MLP}
        else:
            names |= _moe_names(config, layer, hf_layer)
    if not config.tie_word_embeddings:
        names["lm_head"] = "lm_head"
    return names


def _moe_names(config: DecoderConfig, layer: str, hf_layer: str) -> dict[str, Names]:
    if config.model_type == "mixtral":
        block, gate, up, down = f"{hf_layer}.block_sparse_moe", "w1", "w3", "w2"
    else:
        block, gate, up, down = f"{hf_layer}.mlp", *_DENSE_MLP
    experts = [f"{block}.experts.{expert}" for expert in range(config.num_experts)]
    return {
        f"{layer}.mlp.router": f"{block}.gate",
        f"{layer}.mlp.w13": [[f"{expert}.{gate}", f"{expert}.{up}"] for expert in experts],
        f"{layer}.mlp.w2": [f"{expert}.{down}" for expert in experts],
    }


def param_names(config: DecoderConfig) -> dict[str, str]:
    """Path of every parameter that is no linear layer's matrix -> tensor name; both have the same layout."""
    names = {"embed_tokens.embedding": "model.embed_tokens.weight", "norm.scale": "model.norm.weight"}
    for path, hf_path in _norms(config):
        names[f"{path}.scale"] = f"{hf_path}.weight"
    if config.attention_bias:
        for index in range(config.num_hidden_layers):
            for name in _ATTENTION:
                path = f"layers.{index}.self_attn.{name}.bias"
                names[path] = f"model.{path}"
    return names


def _norms(config: DecoderConfig) -> Iterator[tuple[str, str]]:
    in_layer = [*_LAYER_NORMS, *(("self_attn.q_norm", "self_attn.k_norm") if config.qk_norm else ())]
    for index in range(config.num_hidden_layers):
        for name in in_layer:
            yield f"layers.{index}.{name}", f"model.layers.{index}.{name}"
