import dataclasses
import math

import pytest

from fp8x.errors import ConfigError
from fp8x.models import DecoderConfig

MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


# As published with openai/gpt-oss-20b; its experts are in MXFP4, which config.json says beside this.
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}


def without(hf, name):
    return {key: value for key, value in hf.items() if key != name}


def test_missing_fields_take_the_defaults_of_transformers():
    config = DecoderConfig.from_hf(MIXTRAL)
    assert (config.head_dim, config.rope.theta, config.rms_norm_eps) == (8, 1e6, 1e-5)
    assert (config.mixture.normalize, config.tie_word_embeddings, config.attention_bias) == (True, False, False)
    assert (config.sliding_window, config.eos_token_id, config.dtype, config.qk_norm) == (None, (2,), "float32", False)
    config = DecoderConfig.from_hf(QWEN)
    assert (config.head_dim, config.rope.theta, config.rms_norm_eps) == (8, 1e4, 1e-6)
    assert (config.mixture.normalize, config.tie_word_embeddings, config.attention_bias) == (False, False, False)
    assert (config.sliding_window, config.eos_token_id, config.dtype, config.qk_norm) == (None, (), "float32", True)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "torch_dtype": "bfloat16"},
        {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16", "head_dim": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "bfloat16"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 5e5, "dtype": "bfloat16"},
        {"rope_scaling": {"type": "default"}, "rope_theta": 500000, "dtype": "torch.bfloat16"},
    ],
)
def test_both_styles_of_transformers_are_read(fields):
    config = DecoderConfig.from_hf(MIXTRAL | fields)
    assert (config.rope.theta, config.dtype, config.head_dim) == (5e5, "bfloat16", 8)


def test_the_number_of_experts_goes_by_both_names():
    renamed = without(QWEN, "num_experts") | {"num_local_experts": 8}
    assert DecoderConfig.from_hf(renamed) == DecoderConfig.from_hf(QWEN)


@pytest.mark.parametrize(
    ("fields", "dense"),
    [
        ({}, ()),
        ({"mlp_only_layers": [2, 0, 9]}, (0, 2)),
        ({"decoder_sparse_step": 2}, (0, 2)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, (0, 1, 2, 3)),
        ({"mlp_only_layers": None}, ()),
    ],
)
def test_dense_layers(fields, dense):
    assert DecoderConfig.from_hf(QWEN | {"intermediate_size": 48} | fields).dense_layers == dense


@pytest.mark.parametrize(
    ("hf", "window"),
    [
        (MIXTRAL | {"sliding_window": 7}, 7),
        (QWEN | {"sliding_window": 7}, None),
        (QWEN | {"sliding_window": 7, "use_sliding_window": True}, 7),
        (QWEN | {"use_sliding_window": True}, 4096),
        (QWEN | {"sliding_window": None, "use_sliding_window": True}, None),
    ],
)
def test_sliding_window(hf, window):
    assert DecoderConfig.from_hf(hf).sliding_window == window


def test_the_published_gpt_oss_is_read():
    config = DecoderConfig.from_hf(GPT_OSS)
    assert (config.head_dim, config.sliding_window, config.full_layers) == (64, 128, tuple(range(1, 24, 2)))
    assert (config.attention_bias, config.output_bias, config.attention_sinks) == (True, True, True)
    assert (config.context, config.dtype, config.norm_in_float32) == (131072, "bfloat16", True)
    mixture = config.mixture
    assert (mixture.num_experts, mixture.top_k, mixture.intermediate) == (32, 4, 2880)
    assert (mixture.scores, mixture.normalize, mixture.use_bias, mixture.router_bias) == ("softmax", True, True, True)
    assert mixture.clamped_swiglu == (1.702, 7.0)
    rope = config.rope
    assert (rope.kind, rope.theta, rope.factor, rope.original, rope.truncate) == ("yarn", 150000, 32, 4096, False)
    assert (rope.low, rope.high, rope.amplitude) == (1, 32, 0.1 * math.log(32) + 1)


@pytest.mark.parametrize(
    "name",
    [
        "attention_bias",
        "experts_per_token",
        "head_dim",
        "hidden_act",
        "layer_types",
        "max_position_embeddings",
        "num_experts_per_tok",
        "rms_norm_eps",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "swiglu_limit",
    ],
)
def test_gpt_oss_without_a_field_takes_the_default_of_transformers(name):
    assert DecoderConfig.from_hf(without(GPT_OSS, name)) == DecoderConfig.from_hf(GPT_OSS)


def test_gpt_oss_by_fields_of_its_own():
    fields = {"swiglu_alpha": 1.5, "swiglu_limit": 2, "attention_bias": False, "sliding_window": None}
    config = DecoderConfig.from_hf(GPT_OSS | fields)
    assert config.mixture.clamped_swiglu == (1.5, 2.0)
    assert (config.attention_bias, config.output_bias, config.sliding_window) == (False, False, None)
    plain = DecoderConfig.from_hf(without(GPT_OSS, "rope_scaling") | {"rope_parameters": {"rope_theta": 10.0}})
    assert (plain.rope.kind, plain.rope.theta) == ("default", 10)


def test_the_raw_config_is_kept_and_takes_no_part_in_comparison():
    config = DecoderConfig.from_hf(MIXTRAL | {"bos_token_id": 1})
    assert config.hf["bos_token_id"] == 1
    assert config == DecoderConfig.from_hf(MIXTRAL)
    assert hash(config) == hash(DecoderConfig.from_hf(MIXTRAL))


@pytest.mark.parametrize("hf", [MIXTRAL, QWEN], ids=["mixtral", "qwen3_moe"])
def test_a_missing_size_is_named(hf):
    for name in without(hf, "model_type"):
        with pytest.raises(ConfigError, match=rf"config.json of a {hf['model_type']} model has no .*{name}.*positive"):
            DecoderConfig.from_hf(without(hf, name))


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({}, r"config.json has model_type None, of which fp8x builds no decoder; supported: 'llama', 'mistral'"),
        ({"model_type": "gpt2"}, r"model_type 'gpt2', of which .*; supported: 'llama', 'mistral'"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\], of which .*; supported: "),
        (MIXTRAL | {"hidden_size": "32"}, r"hidden_size must be a positive integer, got str '32'"),
        (MIXTRAL | {"hidden_size": 32.0}, r"hidden_size must be a positive integer, got float 32.0"),
        (MIXTRAL | {"vocab_size": True}, r"vocab_size must be a positive integer, got bool True"),
        (MIXTRAL | {"num_hidden_layers": 0}, r"num_hidden_layers must be a positive integer, got int 0"),
        (MIXTRAL | {"num_hidden_layers": 10**9}, r"num_hidden_layers must be at most 10000, got int 1000000000"),
        (QWEN | {"num_hidden_layers": 10**9}, r"num_hidden_layers must be at most 10000, got int 1000000000"),
        (MIXTRAL | {"vocab_size": 2**31}, r"vocab_size must be at most 2147483647, got int 2147483648"),
        (MIXTRAL | {"rope_theta": math.inf}, r"rope_theta must be at most 3.4e\+38, got float inf"),
        (MIXTRAL | {"rope_theta": 10**400}, r"rope_theta must be at most 3.4e\+38, got int 1000"),
        (MIXTRAL | {"rms_norm_eps": math.nan}, r"rms_norm_eps must be a positive number, got float nan"),
        (MIXTRAL | {"rms_norm_eps": "small"}, r"rms_norm_eps must be a positive number, got str 'small'"),
        (MIXTRAL | {"tie_word_embeddings": "no"}, r"tie_word_embeddings must be true or false, got str 'no'"),
        (MIXTRAL | {"sliding_window": 0}, r"sliding_window must be a positive integer, got int 0"),
        (MIXTRAL | {"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of .* \(3\)"),
        (MIXTRAL | {"num_attention_heads": 6}, r"hidden_size \(32\) must be a multiple of num_attention_heads \(6\)"),
        (MIXTRAL | {"head_dim": 7}, r"head_dim must be even for rotary embeddings, got 7"),
        (MIXTRAL | {"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) must be at most .* \(8\)"),
        (MIXTRAL | {"hidden_act": "tanh"}, r"hidden_act 'tanh' is not supported; supported: silu, gelu"),
        (MIXTRAL | {"hidden_act": ["silu"]}, r"hidden_act must be a name, got list"),
        (MIXTRAL | {"dtype": "int8"}, r"dtype 'int8' is not supported; supported: float32, bfloat16, float16"),
        (MIXTRAL | {"eos_token_id": "</s>"}, r"eos_token_id must be a non-negative integer or a list of them, got str"),
        (
            MIXTRAL | {"rope_scaling": {"type": "dynamic", "factor": 2}},
            r"rope_scaling has rope_type 'dynamic'; supported: 'default', 'linear', 'llama3', 'yarn'",
        ),
        (MIXTRAL | {"rope_parameters": {"rope_type": "yarn"}}, r"rope_type 'yarn' has no factor"),
        (MIXTRAL | {"rope_scaling": {"type": "llama3", "factor": 8}}, r"rope_type 'llama3' has no low_freq_factor"),
        (MIXTRAL | {"rope_scaling": {"type": "linear", "factor": 0}}, r"factor must be a positive number, got int 0"),
        (
            MIXTRAL | {"rope_scaling": {"type": "linear", "factor": 2, "twist": 1}},
            r"'linear' has twist, which fp8x does",
        ),
        (MIXTRAL | {"partial_rotary_factor": 0.5}, r"mixtral model has partial_rotary_factor 0.5, which fp8x does not"),
        (MIXTRAL | {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor must be 1, got float"),
        (MIXTRAL | {"qkv_bias": True}, r"mixtral model has qkv_bias True, which fp8x does not know there"),
        (QWEN | {"n_shared_experts": 1}, r"qwen3_moe model has n_shared_experts 1, which fp8x does not know there"),
        (QWEN | {"final_logit_softcapping": 30.0}, r"has final_logit_softcapping 30.0, which fp8x does not know"),
        (MIXTRAL | {"rope_parameters": {"full_attention": {}}}, r"rope_parameters per layer type \(full_attention\)"),
        (MIXTRAL | {"rope_parameters": "default"}, r"rope_parameters must be an object, got str 'default'"),
        (MIXTRAL | {"rope_theta": -1}, r"rope_theta must be a positive number, got int -1"),
        (QWEN | {"mlp_only_layers": [0]}, r"qwen3_moe model has no intermediate_size"),
        (GPT_OSS | {"experts_per_token": 2}, r"experts_per_token \(2\) and num_experts_per_tok \(4\) differ"),
        (GPT_OSS | {"hidden_act": "gelu"}, r"hidden_act must be 'silu', got str 'gelu'"),
        (GPT_OSS | {"swiglu_limit": 0}, r"swiglu_limit must be a positive number, got int 0"),
        (MIXTRAL | {"swiglu_limit": 7.0}, r"mixtral model has swiglu_limit 7.0, which fp8x does not know there"),
        (QWEN | {"mlp_only_layers": [0.5]}, r"mlp_only_layers must be a non-negative integer or a list of them"),
    ],
)
def test_what_is_wrong_is_named(hf, message):
    with pytest.raises(ConfigError, match=message):
        DecoderConfig.from_hf(hf)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 0}, r"num_key_value_heads must be positive, got 0"),
        ({"dense_layers": (0,)}, r"layers \[0\] are dense, which needs intermediate_size"),
    ],
)
def test_configs_made_by_hand_are_checked_too(fields, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(DecoderConfig.from_hf(MIXTRAL), **fields)


def test_a_field_that_nobody_knows_is_warned_of():
    with pytest.warns(
        UserWarning, match="mixtral model: twist is not read; if logits depend on it, they are wrong here"
    ):
        DecoderConfig.from_hf(MIXTRAL | {"twist": 1})
