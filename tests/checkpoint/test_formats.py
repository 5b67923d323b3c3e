"""The formats: what each can hold, the config it writes and reads, and the tensors of one matrix."""

import contextlib
import dataclasses
import fnmatch
import json
import re
import tempfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fp8x
from fp8x.array import ScaledArray
from fp8x.checkpoint import FORMATS, Reader, Writer, choose_format, format_of
from fp8x.checkpoint.names import listed, patterns, shell_wildcards, wildcards
from fp8x.errors import CheckpointError
from fp8x.recipe import Recipe
from fp8x.scheme import E8M0, Scheme, mx, per_row, per_tensor

FLOAT32, BFLOAT16 = np.dtype("float32"), np.dtype(jnp.bfloat16)
COMPRESSED, FP8, MODELOPT, MXFP8 = (FORMATS[name] for name in ("compressed-tensors", "fp8", "modelopt", "mxfp8"))
MX_BOTH = fp8x.RECIPES["mxfp8_mxfp8_bf16"]
BLOCK, GROUP = Scheme("e4m3", block=(128, 128)), Scheme("e4m3", block=(1, 128))

# Recipes beyond those with a code.
OTHERS = {
    "pow2": Recipe(
        Scheme("e4m3", block=(128, 128), scale_rule="pow2"),
        Scheme("e4m3", block=(1, 128), scale_rule="pow2"),
        "dynamic",
    ),
    "pow2 weights": Recipe(Scheme("e4m3", block=(64, 32), scale_rule="pow2"), Scheme("e4m3", block=(1, 32)), "dynamic"),
    "floor": Recipe(Scheme("e4m3", block=(1, 32), scale_dtype=E8M0, scale_rule="floor"), mx(), "dynamic"),
    "dynamic per tensor": Recipe(per_tensor(), per_tensor(), "dynamic"),
    "per token": Recipe(per_tensor(), per_row(), "dynamic"),
    "e5m2": Recipe(per_tensor("e5m2"), per_tensor("e5m2"), "static"),
    "mixed elements": Recipe(per_tensor("e4m3"), per_tensor("e5m2"), "static"),
    "one scale beside blocks": Recipe(Scheme("e4m3", block=(128, 128)), per_tensor(), "static"),
    "across experts": Recipe(Scheme("e4m3", block=(None, None, None)), per_tensor(), "static"),
    "float32 out": Recipe(per_row(), out_dtype=FLOAT32),
}
RECIPES = dict(fp8x.RECIPES) | OTHERS
HOLDS = {  # OUT: any output type
    "compressed-tensors": r"e4m3_e4m3_OUT(_dynamic)?|e4m3_OUT|fp8_e4m3fn_OUT_block_scale|mxfp8_(mxfp8_)?OUT"
    r"|pow2.*|floor|dynamic per tensor|per token|float32 out|one scale beside blocks",
    "fp8": r"e[45]m[32]_e[45]m[32]_OUT|fp8_.*|pow2.*|per token|e5m2|one scale beside blocks",
    "modelopt": r"e4m3_e4m3_OUT(_dynamic)?|mxfp8_mxfp8_OUT|floor",
    "mxfp4": "mxfp8_OUT",
    "mxfp4-pack-quantized": "mxfp8_(mxfp8_)?OUT|floor",
    "mxfp8": "",
    "fbgemm_fp8": "",
    "quark": "",
    "torchao": "",
}


@pytest.mark.parametrize("activation", [GROUP, per_row(), mx()], ids=str)
@pytest.mark.parametrize("format", ["compressed-tensors", "mxfp4-pack-quantized"])
def test_mx_weights_have_activations_of_any_kind(format, activation):
    """The library's preset MXFP4XFP8 has a float32 scale for 128 of them."""
    recipes = {"a": Recipe(mx(), activation, "dynamic")}
    config = json.loads(json.dumps(choose_format(recipes.values(), format).to_config(recipes, BFLOAT16)))
    assert COMPRESSED.from_config(config, recipes, BFLOAT16) == recipes and "fp8x" not in config


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_every_recipe_survives_in_the_formats_that_hold_it(format, name):
    recipe = RECIPES[name]
    objection = format.objection([recipe])
    code = name.removesuffix("_max_calibrate")
    assert (objection is None) == (
        re.fullmatch(HOLDS[format.name].replace("OUT", "(bf16|f16|f32)"), code) is not None
    ), objection
    if objection is None:
        recipe = dataclasses.replace(recipe, observer=None)
        recipes = {"model.layers.0.mlp.up_proj": recipe, "model.layers.0.mlp.down_proj": recipe, "lm_head": None}
        config = json.loads(json.dumps(format.to_config(recipes, BFLOAT16)))
        assert config["quant_method"] == format.quant_method
        assert format.from_config(config, recipes, BFLOAT16) == recipes


def test_every_code_has_a_format():
    for recipe in fp8x.RECIPES.values():
        assert choose_format([recipe]).objection([recipe]) is None


def test_a_format_that_groups_alone_name():
    config = COMPRESSED.to_config({"a": fp8x.RECIPES["mxfp8_bf16"], "b": fp8x.RECIPES["e4m3_bf16"]}, BFLOAT16)
    expected = COMPRESSED.from_config(config, ["a", "b"], BFLOAT16)
    assert [recipe.weight.is_mx for recipe in expected.values()] == [True, False]
    del config["format"]
    assert COMPRESSED.from_config(config, ["a", "b"], BFLOAT16) == expected
    del config["config_groups"]["group_0"]["format"]
    with pytest.raises(CheckpointError, match="quantization_config has no format"):
        COMPRESSED.from_config(config, ["a", "b"], BFLOAT16)


def test_what_others_read():
    """The fields that vLLM and transformers look at, for the recipes that they know."""
    recipes = {"a.0.b": fp8x.RECIPES["e4m3_e4m3_bf16_dynamic"], "lm_head": None, "a.0.gate": None, "a.1.gate": None}
    config = COMPRESSED.to_config(recipes, BFLOAT16)
    assert config["format"] == "float-quantized" and config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head", r"re:a\.\d+\.gate$"] and "fp8x" not in config
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"] and "format" not in group
    assert (group["weights"]["strategy"], group["input_activations"]["strategy"]) == ("channel", "token")
    config = COMPRESSED.to_config({"a": fp8x.RECIPES["mxfp8_bf16"]}, BFLOAT16)
    assert config["format"] == "mxfp8-quantized" and config["config_groups"]["group_0"]["input_activations"] is None
    assert config["config_groups"]["group_0"]["weights"]["scale_dtype"] == "torch.uint8"
    assert FP8.to_config({"a": OTHERS["pow2"], "lm_head": None}, BFLOAT16) == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
        "scale_fmt": "ue8m0",
    }


def test_several_recipes_become_groups():
    by_name = {"q_proj": "e4m3_e4m3_bf16", "up": "mxfp8_bf16", "gate": None}
    recipes = {
        f"layers.{i}.{name}": code and fp8x.RECIPES[code] for i in range(3) for name, code in by_name.items()
    } | {"layers.2.q_proj": None, "layers.1.q_proj": fp8x.RECIPES["e4m3_bf16"]}
    config = COMPRESSED.to_config(recipes, BFLOAT16)
    assert config["format"] == "mixed-precision"
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets == [["layers.1.q_proj"], ["layers.0.q_proj"], ["Linear"]]
    assert COMPRESSED.from_config(config, recipes, BFLOAT16) == recipes
    with pytest.raises(CheckpointError, match=r"'fp8': one recipe for all layers; this model has e4m3 ·×· f32"):
        choose_format([r for r in recipes.values() if r], "fp8")


def test_choice_of_format():
    with pytest.raises(CheckpointError, match="format: 'gguf' is unknown; use one of 'compressed-tensors', 'fp8'"):
        choose_format([], "gguf")
    with pytest.raises(
        CheckpointError, match=r"'compressed-tensors': no e5m2.*'fp8': static activations beside weights"
    ):
        choose_format([OTHERS["mixed elements"]])
    assert format_of({}) is None
    with pytest.raises(CheckpointError, match="quant_method is 'gptq'; fp8x reads 'compressed-tensors', 'fp8'"):
        format_of({"quantization_config": {"quant_method": "gptq"}})
    assert format_of({"quantization_config": {"quant_method": "compressed_tensors"}}) is COMPRESSED
    assert format_of({"quantization_config": {"producer": {"name": "modelopt"}, "quantization": {}}}) is MODELOPT
    with pytest.raises(CheckpointError, match="quant_method is None"):
        format_of({"quantization_config": {}})


WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
TOKEN = WEIGHTS | {"strategy": "token", "dynamic": True}


def compressed(weights: dict = WEIGHTS, inputs: dict | None = None, **fields) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": group}} | fields


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (compressed(config_groups=None), "quantization_config.config_groups is None, expected an object"),
        (compressed(config_groups={}), "config_groups is {}, expected an object of groups with targets"),
        (compressed(config_groups={"W4A16": ["Linear"]}), r"config_groups.W4A16 is \['Linear'\], expected an object"),
        (compressed(config_groups={"g": {"targets": ["Linear"]}}), "config_groups.g has no weights"),
        (compressed(config_groups={"g": {"weights": WEIGHTS}}), "config_groups.g has no targets"),
        (compressed(format="pack-quantized"), "format is 'pack-quantized'; fp8x reads 'float-quantized' or"),
        (compressed(quantization_status="frozen"), "quantization_status is 'frozen'; fp8x reads 'compressed'"),
        (compressed(transform_config={"a": 1}), "transform_config is {'a': 1}, expected none"),
        (compressed(ignore=["re:("]), "'re:\\(' is no pattern"),
        (compressed(ignore="lm_head"), "ignore is 'lm_head', expected a list of strings"),
        (compressed(WEIGHTS | {"num_bits": 6}), "g.weights.num_bits is 6; fp8x reads 8 or 4"),
        (compressed(WEIGHTS | {"num_bits": 4, "type": "int"}), "g.weights.type is 'int'; fp8x reads 'float'"),
        (compressed(WEIGHTS | {"num_bits": 4, "strategy": None}), "g.weights has no group_size"),
        (
            compressed(WEIGHTS | {"num_bits": 4, "strategy": "group", "group_size": 16}),
            "g.weights.group_size is 16; fp8x reads 32",
        ),
        (compressed(WEIGHTS | {"type": "int"}), "g.weights.type is 'int'; fp8x reads 'float'"),
        (compressed(WEIGHTS | {"symmetric": False}), "symmetric is False; fp8x reads True"),
        (compressed(WEIGHTS | {"dynamic": True}), "dynamic is True; fp8x reads False"),
        (compressed(WEIGHTS | {"strategy": "attn_head"}), "strategy is 'attn_head'; fp8x reads 'tensor' or"),
        (compressed(WEIGHTS | {"strategy": "group"}), "g.weights has no group_size"),
        (compressed(WEIGHTS | {"strategy": "block"}), "g.weights has no block_structure"),
        (compressed(WEIGHTS | {"strategy": "block", "block_structure": [0, 1]}), "expected a list of two positive"),
        (compressed(WEIGHTS | {"strategy": "block", "block_structure": "128"}), "expected a list of two positive"),
        (compressed(inputs=TOKEN | {"dynamic": "local"}), "g.input_activations.dynamic is 'local'; fp8x reads True"),
        (compressed(inputs=TOKEN | {"dynamic": False}), "g.input_activations.dynamic is False; fp8x reads True"),
        (compressed(format="mxfp8-quantized"), "strategy is 'channel', expected 'group' with group_size 32"),
        (compressed(fp8x={"g": {"weight_scale_rule": "up"}}), "fp8x.g.weight_scale_rule is 'up'; fp8x reads 'amax'"),
        ({"quant_method": "mxfp8", "weight_block_size": [128, 128]}, r"fp8x reads \[1, 32\] or None"),
        (
            {"quant_method": "mxfp8", "activation_scheme": "static"},
            "activation_scheme is 'static'; fp8x reads 'dynamic'",
        ),
        ({"quant_method": "modelopt"}, "quantization_config has no quant_algo"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo is 'NVFP4'; fp8x reads 'FP8' or 'FP8_PER"),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": None}}, "quantization.quant_algo is None"),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"a": {"quant_algo": "x"}},
            },
            "quantized_layers.a.quant_algo is 'X'; fp8x reads 'FP8'",
        ),
        ({"quant_method": "fp8"}, "quantization_config has no activation_scheme"),
        ({"quant_method": "fp8", "activation_scheme": "local"}, "activation_scheme is 'local'; fp8x reads 'static'"),
        ({"quant_method": "fp8", "activation_scheme": "static", "fmt": "e3m4"}, "fmt is 'e3m4'; fp8x reads 'e4m3'"),
        ({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128]}, "two positive integers"),
        (
            {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 2**21]},
            r"weight_block_size is \[128, 2097152\], expected a list of two positive integers up to 1048576",
        ),
        ({"quant_method": "fp8", "activation_scheme": "static", "modules_to_not_convert": "a"}, "a list of strings"),
    ],
)
def test_configs_that_do_not_fit(config, message):
    with pytest.raises(CheckpointError, match=message):
        format_of({"quantization_config": config}).from_config(config, ["a"], BFLOAT16)


def test_configs_as_others_write_them():
    def read(config, prefix="model.layers.0.q_proj"):
        return format_of({"quantization_config": config}).from_config(config, [prefix], BFLOAT16)[prefix]

    assert read(compressed()) == Recipe(per_row())
    inferred = {"num_bits": 8, "type": "float"}
    assert read(compressed(inferred)) == Recipe(per_tensor())
    assert read(compressed(inferred | {"group_size": -1})) == Recipe(per_row())
    assert read(compressed(inferred | {"group_size": 32}, format="mxfp8-quantized")) == Recipe(mx())
    group = WEIGHTS | {"strategy": "group", "group_size": 128}
    assert read(compressed(group)) == Recipe(GROUP)
    for structure in ([128, 128], "128x128"):
        assert read(compressed(WEIGHTS | {"strategy": "block", "block_structure": structure})) == Recipe(BLOCK)
    presets = {
        "FP8": "e4m3_e4m3_bf16",
        "fp8_dynamic": "e4m3_e4m3_bf16_dynamic",
        "FP8_BLOCK": "fp8_e4m3fn_bf16_block_scale",
        "MXFP8": "mxfp8_mxfp8_bf16",
        "MXFP8A16": "mxfp8_bf16",
    }
    for preset, code in presets.items():
        assert read(compressed(config_groups={preset: ["Linear"]})) == fp8x.RECIPES[code]
    packed = compressed(config_groups={"MXFP4XFP8": ["Linear"]}, format="mxfp4-pack-quantized")
    assert read(packed) == Recipe(mx(), GROUP, "dynamic")
    assert read(compressed(inputs=TOKEN, kv_cache_scheme=TOKEN, ignore=["lm_head"])).activation == per_row()
    assert read(compressed(ignore=["re:.*q_proj"])) is None and read(compressed(ignore=None)) is not None
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    assert read(fp8) == Recipe(per_tensor(), per_row(), "dynamic")
    assert read(fp8 | {"fmt": "e4m3", "weight_block_size": [128, 128]}) == Recipe(BLOCK, GROUP, "dynamic")
    assert read(fp8 | {"ignored_layers": ["q_proj"]}) is None
    static = fp8 | {"activation_scheme": "static", "weight_block_size": [128, 128]}
    assert read(static) == Recipe(BLOCK, per_tensor(), "static")  # transformers' one scale, not ours for each group
    mxfp8 = {"quant_method": "mxfp8"}
    assert read(mxfp8) == read(mxfp8 | {"weight_block_size": [1, 32], "scale_fmt": "ue8m0"}) == MX_BOTH
    assert read(mxfp8 | {"modules_to_not_convert": ["model.layers.0"]}) is None


def test_configs_of_modelopt():
    name = "model.layers.0.mlp.experts.3.up_proj"

    def read(fields, prefix=name):
        config = {"quant_method": "modelopt"} | fields
        return format_of({"quantization_config": config}).from_config(config, [prefix], BFLOAT16)[prefix]

    flat = {
        "config_groups": {"group_0": {}},
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
        "ignore": ["lm_head"],
    }
    algorithms = {
        "FP8": fp8x.RECIPES["e4m3_e4m3_bf16"],
        "FP8_PER_CHANNEL_PER_TOKEN": fp8x.RECIPES["e4m3_e4m3_bf16_dynamic"],
        "MXFP8": MX_BOTH,
        "fp8_pb_wo": Recipe(BLOCK),
    }
    for algorithm, recipe in algorithms.items():
        assert read(flat | {"quant_algo": algorithm}) == recipe
        legacy = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
        assert read({"producer": {"name": "modelopt"}, "quantization": legacy}) == recipe
    for pattern in ("*up_proj", "model.layers.0.*", "model.layers.0*", "*.experts.[0-4].*", "model.layers.0.mlp"):
        assert read({"quant_algo": "FP8", "ignore": [pattern]}) is None, pattern
    # vLLM takes the last, any part of a name, too.
    for pattern in ("*up", "layers.0*", "model.layers.1*", "experts.[0-2].*", "odel.layers.0"):
        assert read({"quant_algo": "FP8", "ignore": [pattern]}) is not None, pattern
    layers = {"model.layers.0.mlp.experts": {"quant_algo": "MXFP8"}, "model.layers.1": {"quant_algo": "FP8"}}
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    assert read(mixed) == MX_BOTH and read(mixed, "model.layers.1.q_proj").is_static
    assert read(mixed, "model.layers.0.self_attn.q_proj") is None
    assert read(mixed | {"ignore": ["*experts*"]}) is None


def test_what_modelopt_readers_look_for():
    recipes = {"a": MX_BOTH, "lm_head": None}
    config = MODELOPT.to_config(recipes, BFLOAT16)
    producer = config.pop("producer")
    assert producer["name"] == "modelopt" and re.fullmatch(r"\d+\.\d+\.\d+\+fp8x\..+", producer["version"])
    assert config == {"quant_method": "modelopt", "quant_algo": "MXFP8", "ignore": ["lm_head"]}
    config["producer"] = producer
    (name, legacy), *others = MODELOPT.beside(config).items()
    assert name == "hf_quant_config.json" and not others
    assert legacy["producer"] == producer
    assert set(legacy["quantization"]) >= {"quant_algo", "kv_cache_quant_algo", "exclude_modules"}
    assert MODELOPT.from_config({"quant_method": "modelopt"} | legacy, recipes, BFLOAT16) == recipes
    assert COMPRESSED.beside(COMPRESSED.to_config(recipes, BFLOAT16)) == {}
    with pytest.raises(CheckpointError, match="'modelopt': one recipe for all layers"):
        choose_format([MX_BOTH, fp8x.RECIPES["e4m3_e4m3_bf16"]], "modelopt")
    with pytest.raises(
        CheckpointError, match="'modelopt': no algorithm with weights e4m3 1×32 e8m0 and activations in 16"
    ):
        choose_format([Recipe(mx())], "modelopt")
    with pytest.raises(CheckpointError, match="'mxfp8': is read only; 'modelopt' and"):
        choose_format([MX_BOTH], "mxfp8")


NONSENSE = [None, 0, -1, 1.5, "x", "", True, [], {}, [1], ["re:("], {"a": 1}, [128, 0], [[]]]


QUARK = {"dtype": "fp8_e4m3", "is_dynamic": False, "qscheme": "per_tensor", "ch_axis": None, "symmetric": True}
WELL_FORMED = {
    "compressed-tensors": COMPRESSED.to_config({"a": OTHERS["pow2 weights"], "lm_head": None}, BFLOAT16),
    "fp8": FP8.to_config({"a": OTHERS["pow2 weights"], "lm_head": None}, BFLOAT16),
    "fp8 static": FP8.to_config({"a": fp8x.RECIPES["fp8_e4m3fn_f16_block_scale_static_activation"]}, BFLOAT16),
    "modelopt": MODELOPT.to_config({"a": OTHERS["floor"], "lm_head": None}, BFLOAT16),
    "modelopt legacy": {
        "quant_method": "modelopt",
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
    },
    "modelopt mixed": {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "MXFP8", "group_size": 32}},
        "ignore": ["lm_head", "c*"],
    },
    "mxfp8": {"quant_method": "mxfp8", "weight_block_size": [1, 32], "ignored_layers": ["lm_head"]},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    "quark": {
        "quant_method": "quark",
        "export": {"kv_cache_group": ["b"], "pack_method": "reorder", "weight_format": "real_quantized"},
        "global_quant_config": {"weight": QUARK, "input_tensors": QUARK, "output_tensors": None, "bias": None},
        "layer_quant_config": {"b": {"weight": QUARK, "input_tensors": None, "output_tensors": QUARK}},
        "layer_type_quant_config": {"Linear": {"weight": QUARK, "input_tensors": QUARK}},
        "algo_config": [{"name": "rotation", "r4": False}],
        "exclude": ["lm_head", "re:x"],
    },
}


@pytest.mark.filterwarnings("ignore:.* it bounds the amax:UserWarning", "ignore:.*softmax_quant_spec:UserWarning")
@pytest.mark.parametrize("name", WELL_FORMED)
def test_any_field_may_be_nonsense(name):
    """It is read or refused, never a KeyError."""

    def spoiled(config):
        for key, value in config.items():
            yield {k: v for k, v in config.items() if k != key}
            yield from (config | {key: other} for other in NONSENSE)
            if isinstance(value, dict):
                yield from (config | {key: other} for other in spoiled(value))

    format = format_of({"quantization_config": WELL_FORMED[name]})
    assert None not in format.from_config(WELL_FORMED[name], ["a"], BFLOAT16).values()
    for config in spoiled(WELL_FORMED[name]):
        with contextlib.suppress(CheckpointError):
            format.from_config(config, ["a"], BFLOAT16)
        with contextlib.suppress(CheckpointError):
            format.kv_scheme(config)


def test_names_of_modules_that_stay():
    name = "model.layers.1.mlp.gate"
    for entry in ("gate", "mlp.gate", "model.layers.1", name, "mlp", r"model\.layers\.\d+\.mlp\.gate", "re:.*gate"):
        assert listed([entry])(name), entry
    for entry in ("gat", "layers.11", "gate_proj", "up", "", "(", "lm_head"):
        assert not listed([entry])(name), entry
    assert not listed(["mlp.gate"])("model.layers.1.mlp.gate_proj")


def test_patterns_and_wildcards_that_are_none():
    assert listed(["*.gate"])("layers.0.gate") and not listed(["("])("gate")
    assert wildcards(["lm_head", ".gate."])("layers.0.gate") and not wildcards([""])("gate")


def test_patterns_match_their_names_alone():
    names = [f"layers.{i}.experts.{e}.w1" for i in range(2) for e in range(3)]
    assert patterns(names, ["layers.0.router"]) == [r"re:layers\.\d+\.experts\.\d+\.w1$"]
    assert patterns(names[:3], names[3:]) == [r"re:layers\.0\.experts\.\d+\.w1$"]
    assert patterns(names[:2], names[2:]) == [r"re:layers\.0\.experts\.(?:0|1)\.w1$"]
    assert patterns(["lm_head", names[0]], names[1:]) == ["lm_head", names[0]]


def test_few_patterns_say_what_many_names_do():
    layers = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(12) for part in "qkvo"]
    chosen = [name for name in layers if name.split(".")[2] in ("1", "10", "11") and "o_proj" not in name]
    assert patterns(chosen, set(layers) - set(chosen)) == [
        r"re:model\.layers\.(?:1|10|11)\.self_attn\.(?:q_proj|k_proj|v_proj)$"
    ]


def test_every_target_of_a_mixed_model_is_the_first_to_match_something():
    """Else compressed-tensors, which stops at the first of all targets in their order, warns "Could not match"."""
    channel, mxfp8 = fp8x.recipe("e4m3_e4m3_bf16_dynamic"), fp8x.recipe("mxfp8_bf16")
    names = [
        f"model.layers.{i}.{part}" for i in range(4) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    recipes = {name: mxfp8 if "q_proj" in name and ".1." not in name else channel for name in names}
    recipes |= {"lm_head": None, "model.layers.1.mlp.up_proj": fp8x.recipe("e4m3_bf16")}
    config = COMPRESSED.to_config(recipes, np.dtype(np.float32))
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert len(targets) == 3 and targets[-1] == "Linear"

    def matches(name: str, target: str) -> bool:
        return target == "Linear" or (bool(re.match(target[3:], name)) if target[:3] == "re:" else target == name)

    assert {next(t for t in targets if matches(name, t)) for name in names} == set(targets)
    read = COMPRESSED.from_config(config, recipes, np.dtype(ml_dtypes.bfloat16))
    assert read == recipes


def _names(rng) -> list[str]:
    """Like those of models that nobody knows: numbers anywhere, parts that begin alike, dashes."""
    parts, ends = ["experts", "mlp", "mlp2", "a-b", *"0123", "10"], ["gate", "gate_proj", "up"]
    return sorted({".".join(["model", *rng.choice(parts, rng.integers(1, 5)), rng.choice(ends)]) for _ in range(80)})


@pytest.mark.parametrize("seed", range(20))
def test_patterns_and_shell_wildcards_match_their_names_and_no_other(seed):
    rng = np.random.default_rng(seed)
    names = _names(rng)
    kept = [name for name in names if rng.random() < 0.4]
    others = [name for name in names if name not in kept]
    targets = patterns(kept, others)
    # As compressed-tensors' `match_name` has it.
    matched = [n for n in names if any(re.match(t[3:], n) if t.startswith("re:") else t == n for t in targets)]
    assert matched == kept and len(targets) <= len(kept)
    excluded = shell_wildcards(kept, others)
    assert [n for n in names if any(fnmatch.fnmatchcase(n, entry) for entry in excluded)] == kept
    assert len(excluded) <= len(kept) and list(filter(wildcards(excluded), names)) == kept


def test_shell_wildcards_are_few():
    moved = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.experts.0.up_proj")]
    routers = [f"model.layers.{i}.mlp.gate" for i in range(12)]
    others = [name for name in moved if ".1." not in name]
    kept = ["lm_head", *routers, *(name for name in moved if ".1." in name), "visual.blocks.0.attn.q_proj"]
    assert shell_wildcards(kept, others) == ["lm_head", "model.layers.*.mlp.gate", "model.layers.1.*", "visual*"]
    # q, k and v are one matrix to others, who look for the names of its parts.
    assert shell_wildcards(moved[:1], moved[1:]) == ["model.layers.0.self_attn*"]
    k = [name.replace("q_proj", "k_proj") for name in moved]
    assert shell_wildcards(moved[:1], moved[1:] + k) == moved[:1]


SHAPE = (160, 192)  # ragged in both dims, and K a multiple of 32
CASES = [
    ("e4m3_e4m3_bf16", COMPRESSED, [1], [1]),
    ("e4m3_bf16", COMPRESSED, [160, 1], None),
    ("fp8_e4m3fn_bf16_block_scale", COMPRESSED, [2, 2], None),
    ("mxfp8_mxfp8_bf16", COMPRESSED, [160, 6], None),
    ("e4m3_e4m3_bf16", FP8, [], []),
    ("e5m2_e5m2_bf16", FP8, [], []),
    ("fp8_e4m3fn_bf16_block_scale", FP8, [2, 2], None),
    ("fp8_e4m3fn_bf16_block_scale_static_activation", FP8, [2, 2], [2]),
    ("e4m3_e4m3_bf16", MODELOPT, [], []),
    ("e4m3_e4m3_bf16_dynamic", MODELOPT, [160], None),
    ("mxfp8_mxfp8_bf16", MODELOPT, [160, 6], None),
]


@pytest.mark.sample
@pytest.mark.parametrize(("code", "format", "scale_shape", "input_shape"), CASES)
def test_tensors_of_a_matrix(tmp_path, code, format, scale_shape, input_shape):
    recipe = fp8x.RECIPES[code]
    weight = fp8x.quantize(jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32), recipe.weight)
    groups = 0 if input_shape is None else int(np.prod(input_shape))
    input_scale = None if input_shape is None else np.linspace(0.1, 0.7, groups, dtype=np.float32)[None]
    tensors = format.encode("a", recipe, weight, input_scale)
    reader = written(tmp_path / "out", tensors)
    scale = "a.weight_scale_inv" if "block" in code and format is FP8 else "a.weight_scale"
    assert list(tensors) == ["a.weight", scale, *([] if input_shape is None else ["a.input_scale"])]
    assert reader.stored(scale).dtype == ("U8" if "mx" in code else "F32")
    assert list(reader.stored(scale).shape) == scale_shape
    assert input_shape is None or list(reader.stored("a.input_scale").shape) == input_shape
    read, read_input = format.decode("a", recipe, SHAPE, reader)
    assert read.data.tobytes() == np.asarray(weight.data).tobytes() and read.scheme == weight.scheme
    assert read.scale.tobytes() == np.asarray(weight.scale).tobytes()
    assert (input_scale is None and read_input is None) or np.array_equal(input_scale, read_input)


def written(path, tensors) -> Reader:
    with Writer(path) as writer:
        writer.add_json("config.json", {})
        for name, array in tensors.items():
            writer.add(name, array)
    return Reader(path)


def test_scales_in_other_types(tmp_path):
    """bfloat16 and e8m0 scales, and transformers' own names, are read as float32."""
    tensors = {"a.weight": np.zeros((256, 128), ml_dtypes.float8_e4m3fn)}
    scale = np.array([[2.0**-127], [2.0**-3]])
    recipe = fp8x.RECIPES["fp8_e4m3fn_bf16_block_scale"]
    for dtype in (ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16):
        expected = scale if dtype == ml_dtypes.float8_e8m0fnu else np.array([[0.3], [7]]).astype(dtype)
        reader = written(tmp_path / dtype.__name__, tensors | {"a.weight_scale_inv": expected.astype(dtype)})
        read = FP8.decode("a", recipe, (256, 128), reader)[0].scale
        assert read.dtype == np.float32 and np.array_equal(read, expected.astype(np.float32))
    half, one = np.asarray(0.5, ml_dtypes.bfloat16), np.ones(1, np.float32)
    reader = written(tmp_path / "hf", tensors | {"a.weight_scale_inv": half, "a.activation_scale": one})
    weight, input_scale = FP8.decode("a", fp8x.RECIPES["e4m3_e4m3_bf16"], (256, 128), reader)
    assert weight.scale.tolist() == [[0.5]] and input_scale.tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight_scale": None}, "a.weight_scale: missing from"),
        ({"a.input_scale": None}, "a.input_scale: missing from"),
        (
            {"a.weight_scale": np.ones((2, 1), np.float32)},
            r"a.weight_scale in .*: shape is \[2, 1\], expected \[1\] or \[\]",
        ),
        ({"a.weight_scale": np.ones(1, np.uint8)}, "a.weight_scale in .*: dtype is U8, expected F32"),
        (
            {"a.weight": np.zeros((4, 2), ml_dtypes.float8_e4m3fn)},
            r"a.weight in .*: shape is \[4, 2\], expected \[2, 4\]",
        ),
        ({"a.weight": np.zeros((2, 4), ml_dtypes.float8_e5m2)}, "a.weight in .*: dtype is F8_E5M2, expected F8_E4M3"),
        ({"a.weight_scale": np.full(1, np.nan, np.float32)}, "a.weight_scale in .*: 1 of 1 scales are NaN, infinite"),
        (
            {"a.input_scale": np.full(1, -1, np.float32)},
            "a.input_scale in .*: 1 of 1 scales are NaN, infinite or negative",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    tensors = {
        "a.weight": np.zeros((2, 4), ml_dtypes.float8_e4m3fn),
        "a.weight_scale": np.ones(1, np.float32),
        "a.input_scale": np.ones(1, np.float32),
    } | change
    reader = written(tmp_path / "out", {name: array for name, array in tensors.items() if array is not None})
    with pytest.raises(CheckpointError, match=message):
        COMPRESSED.decode("a", fp8x.RECIPES["e4m3_e4m3_bf16"], (2, 4), reader)


def test_mx_scales_that_are_nan(tmp_path):
    tensors = {"a.weight": np.zeros((1, 64), ml_dtypes.float8_e4m3fn), "a.weight_scale": np.array([[0, 255]], np.uint8)}
    with pytest.raises(CheckpointError, match="1 of 2 scales are NaN"):
        COMPRESSED.decode("a", fp8x.RECIPES["mxfp8_bf16"], (1, 64), written(tmp_path / "out", tensors))


def test_shapes_that_others_give_scales(tmp_path):
    weight, one = np.zeros((256, 128), ml_dtypes.float8_e4m3fn), np.float32(0.5)
    cases = [
        (FP8, per_tensor(), ".weight_scale", [(), (1,), (1, 1)]),
        (FP8, per_tensor(), ".weight_scale_inv", [(), (1,), (1, 1)]),
        (COMPRESSED, per_tensor(), ".weight_scale", [(), (1,)]),
        (COMPRESSED, per_row(), ".weight_scale", [(256,), (256, 1)]),
        (MODELOPT, per_tensor(), ".weight_scale", [(), (1,), (1, 1)]),
        (MODELOPT, per_row(), ".weight_scale", [(256,), (256, 1)]),
        (MODELOPT, BLOCK, ".weight_scale", [(2, 1, 1, 1), (2, 1)]),
        (MODELOPT, Scheme("e4m3", block=(256, 128)), ".weight_scale", [(1, 1, 1, 1), ()]),
    ]
    for index, (format, scheme, suffix, shapes) in enumerate(cases):
        for shape in shapes:
            tensors = {"a.weight": weight, f"a{suffix}": np.full(shape, one)}
            reader = written(tmp_path / f"{index}-{shape}", tensors)
            scale = format.decode("a", Recipe(scheme), weight.shape, reader)[0].scale
            assert scale.shape == scheme.scale_shape(weight.shape) and (scale == one).all()


def test_zero_scales(tmp_path):
    """Legal over blocks of zeros (-0 among them), which real tools write; elsewhere the values are lost."""
    recipe, shape = Recipe(Scheme("e4m3", block=(2, 3))), (5, 7)
    data = np.arange(1, 36, dtype=np.uint8).reshape(shape)
    data[4:, 6:], data[:2, :3] = 0x80, 0
    scale = np.ones((3, 3), np.float32)
    scale[2, 2] = scale[0, 0] = 0
    tensors = {"a.weight": data.view(ml_dtypes.float8_e4m3fn), "a.weight_scale": scale}
    weight, _ = COMPRESSED.decode("a", recipe, shape, written(tmp_path / "legal", tensors))
    assert not np.asarray(weight.dequantize())[4:, 6:].any()
    scale[2, 1] = scale[1, 2] = 0
    with pytest.raises(
        CheckpointError, match=r"a.weight_scale in .*model.safetensors: 2 of 9 scales are 0, but .* a.weight are not"
    ):
        COMPRESSED.decode("a", recipe, shape, written(tmp_path / "lost", tensors))


def test_scales_of_every_type_are_exact(tmp_path):
    """Also where XLA would flush to zero: 2^-127, and bfloat16 below 2^-126."""
    recipe = OTHERS["pow2"]
    weight = np.zeros((256, 256), ml_dtypes.float8_e4m3fn)
    exponents = np.array([[-127.0, -130], [0, 127]])
    for dtype in (np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu, np.uint8):
        truth = np.exp2(np.maximum(exponents, -127) if dtype in (ml_dtypes.float8_e8m0fnu, np.uint8) else exponents)
        stored = (np.log2(truth) + 127).astype(np.uint8) if dtype == np.uint8 else truth.astype(dtype)
        path = tmp_path / np.dtype(dtype).name
        reader = written(path, {"a.weight": weight, "a.weight_scale_inv": stored})
        read, _ = FP8.decode("a", recipe, (256, 256), reader)
        assert read.scale.dtype == np.float32 and read.scale.tolist() == truth.tolist()
    # A byte is no float32 scale unless scale_fmt says so.
    with pytest.raises(CheckpointError, match="dtype is U8, expected F32"):
        FP8.decode("a", fp8x.RECIPES["fp8_e4m3fn_bf16_block_scale"], (256, 256), reader)


# The bytes of e4m3 with the values of e2m1's 16 codes, by ml_dtypes.
E2M1_AS_E4M3 = (
    np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
)


@st.composite
def stored_matrices(draw):
    """A format, a recipe that it holds, and a matrix `[N, K]` of any bits with legal scales."""
    held = [
        (format, recipe)
        for format in FORMATS.values()
        for recipe in RECIPES.values()
        if format.name != "mxfp4" and not format.objection([recipe])  # whose tensors hold several matrices
    ]
    format, recipe = draw(st.sampled_from(held))
    n, k = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    k = -(-k // 32) * 32 if recipe.weight.is_mx else k
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    data = rng.integers(0, 256, (n, k), np.uint8)
    if format.packs:
        data = E2M1_AS_E4M3[data % 16]
    data = data.view(recipe.weight.dtype)
    shape = recipe.weight.scale_shape((n, k))
    if recipe.weight.is_mx:
        scale = rng.integers(0, 255, shape, np.uint8).view(E8M0)
    else:
        # Any positive bits: subnormals and the largest too.
        scale = rng.integers(1, 0x7F800000, shape, np.uint32).view(np.float32)
    groups = recipe.activation.scale_shape((1, k)) if recipe.is_static else None
    inputs = None if groups is None else rng.integers(1, 0x7F800000, groups, np.uint32).view(np.float32)
    return format, recipe, ScaledArray(data, scale, recipe.weight), inputs


@given(stored_matrices())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_survive(tmp_path, case):
    format, recipe, weight, inputs = case
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        reader = written(f"{folder}/out", format.encode("a.b", recipe, weight, inputs))
        assert sorted(reader) == sorted(format.names("a.b", recipe, weight.shape, reader))
        read, read_inputs = format.decode("a.b", recipe, weight.shape, reader)
    assert read.scheme == recipe.weight
    assert read.data.tobytes() == weight.data.tobytes() and read.scale.tobytes() == weight.scale.tobytes()
    assert (inputs is None) == (read_inputs is None) and (inputs is None or inputs.tobytes() == read_inputs.tobytes())


def test_older_places_of_the_config(tmp_path):
    legacy = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": []}}
    older = compressed()

    def config_of(name, config, **files):
        with Writer(tmp_path / name) as writer:
            writer.add("a", np.zeros(1, np.float32))
            for file, value in ({"config": config} | files).items():
                writer.add_json(f"{file}.json", value)
        return Reader(tmp_path / name).config

    assert format_of(config_of("modelopt", {}, hf_quant_config=legacy)) is MODELOPT
    assert config_of("compressed", {"compression_config": older}) == {"quantization_config": older}
    # What everyone reads today wins.
    both = {"compression_config": older, "quantization_config": {"quant_method": "fp8"}}
    assert config_of("both", both, hf_quant_config=legacy) == {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "modelopt" / "hf_quant_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"hf_quant_config.json:? is not JSON"):
        Reader(tmp_path / "modelopt")


def test_targets_match_behind_the_prefixes_of_other_readers():
    tower = [f"visual.blocks.{i}.attn.qkv" for i in range(2)] + ["visual.merger.mlp.0"]
    text = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]

    def matches(targets: list[str], name: str) -> bool:  # as compressed-tensors and vLLM have it
        return any(t == name or (t.startswith("re:") and re.match(t[3:], name)) for t in targets)

    kept, first = patterns([*tower, "lm_head"], text), patterns(text[:1], [*tower, text[1]])
    for name in tower:
        assert matches(kept, name) and matches(kept, f"model.{name}") and not matches(first, f"model.{name}")
    for prefix in ("model.", "model.language_model.", "language_model.model."):
        inside = [name.replace("model.", prefix, 1) for name in text]
        assert [matches(first, name) for name in inside] == [True, False] and not any(matches(kept, n) for n in inside)
    # Not where that would reach what it should not.
    assert patterns(["a.layers.0.q", "a.layers.1.q"], ["b.a.layers.0.q"]) == [r"re:a\.layers\.\d+\.q$"]
