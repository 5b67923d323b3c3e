"""The formats: what each can hold, the config it writes and reads, and the tensors of one matrix."""

import contextlib
import json
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fp8x
from fp8x.checkpoint import FORMATS, Reader, Writer, choose_format, format_of
from fp8x.checkpoint.names import listed, patterns
from fp8x.errors import CheckpointError
from fp8x.recipe import Recipe
from fp8x.scheme import E8M0, Scheme, mx, per_row, per_tensor

FLOAT32, BFLOAT16 = np.dtype("float32"), np.dtype(jnp.bfloat16)
COMPRESSED, FP8, MODELOPT, MXFP8 = (FORMATS[name] for name in ("compressed-tensors", "fp8", "modelopt", "mxfp8"))
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
RECIPES = {code: recipe for code, recipe in fp8x.RECIPES.items() if recipe.observer is None} | OTHERS
HOLDS = {
    "compressed-tensors": r"e4m3_e4m3_b?f16(_dynamic)?|e4m3_b?f16|fp8_e4m3fn_b?f16_block_scale|mxfp8_(mxfp8_)?b?f16"
    r"|pow2.*|floor|dynamic per tensor|per token|float32 out|one scale beside blocks",
    "fp8": r"e[45]m[32]_e[45]m[32]_b?f16|fp8_.*|pow2.*|per token|e5m2|one scale beside blocks",
    "modelopt": r"e4m3_e4m3_b?f16(_dynamic)?|mxfp8_mxfp8_b?f16|floor",
    "mxfp8": "",
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_every_recipe_survives_in_the_formats_that_hold_it(format, name):
    recipe = RECIPES[name]
    objection = format.objection([recipe])
    assert (objection is None) == (re.fullmatch(HOLDS[format.name], name) is not None), objection
    if objection is None:
        recipes = {"model.layers.0.mlp.up_proj": recipe, "model.layers.0.mlp.down_proj": recipe, "lm_head": None}
        config = json.loads(json.dumps(format.to_config(recipes, BFLOAT16)))
        assert config["quant_method"] == format.quant_method
        assert format.from_config(config, recipes, BFLOAT16) == recipes


def test_every_code_has_a_format():
    for recipe in fp8x.RECIPES.values():
        assert choose_format([recipe]).objection([recipe]) is None


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
    assert targets == [["Linear"], ["layers.0.q_proj"], ["layers.1.q_proj"]]
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
        (compressed(WEIGHTS | {"num_bits": 4}), "g.weights.num_bits is 4; fp8x reads 8"),
        (compressed(WEIGHTS | {"type": "int"}), "g.weights.type is 'int'; fp8x reads 'float'"),
        (compressed(WEIGHTS | {"symmetric": False}), "symmetric is False; fp8x reads True"),
        (compressed(WEIGHTS | {"dynamic": True}), "dynamic is True; fp8x reads False"),
        (compressed(WEIGHTS | {"strategy": "attn_head"}), "strategy is 'attn_head'; fp8x reads 'tensor' or"),
        (compressed(WEIGHTS | {"strategy": "group"}), "g.weights has no group_size"),
        (compressed(WEIGHTS | {"strategy": "block"}), "g.weights has no block_structure"),
        (compressed(WEIGHTS | {"strategy": "block", "block_structure": [0, 1]}), "expected a list of two positive"),
        (compressed(inputs=TOKEN | {"dynamic": "local"}), "g.input_activations.dynamic is 'local'; fp8x reads True"),
        (compressed(inputs=TOKEN | {"dynamic": False}), "g.input_activations.dynamic is False; fp8x reads True"),
        (compressed(format="mxfp8-quantized"), "strategy is 'channel', expected 'group' with group_size 32"),
        (compressed(fp8x={"g": {"weight_scale_rule": "up"}}), "fp8x.g.weight_scale_rule is 'up'; fp8x reads 'amax'"),
        ({"quant_method": "fp8"}, "quantization_config has no activation_scheme"),
        ({"quant_method": "fp8", "activation_scheme": "local"}, "activation_scheme is 'local'; fp8x reads 'static'"),
        ({"quant_method": "fp8", "activation_scheme": "static", "fmt": "e3m4"}, "fmt is 'e3m4'; fp8x reads 'e4m3'"),
        ({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128]}, "two positive integers"),
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
    assert read(compressed(inputs=TOKEN, kv_cache_scheme=TOKEN, ignore=["lm_head"])).activation == per_row()
    assert read(compressed(ignore=["re:.*q_proj"])) is None and read(compressed(ignore=None)) is not None
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    assert read(fp8) == Recipe(per_tensor(), per_row(), "dynamic")
    assert read(fp8 | {"fmt": "e4m3", "weight_block_size": [128, 128]}) == Recipe(BLOCK, GROUP, "dynamic")
    assert read(fp8 | {"ignored_layers": ["q_proj"]}) is None


NONSENSE = [None, 0, -1, 1.5, "x", "", True, [], {}, [1], ["re:("], {"a": 1}, [128, 0], [[]]]


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
}


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


def test_names_of_modules_that_stay():
    name = "model.layers.1.mlp.gate"
    for entry in ("gate", "mlp.gate", "model.layers.1", name, "mlp", r"model\.layers\.\d+\.mlp\.gate", "re:.*gate"):
        assert listed([entry])(name), entry
    for entry in ("gat", "layers.11", "gate_proj", "up", "", "(", "lm_head"):
        assert not listed([entry])(name), entry
    assert not listed(["mlp.gate"])("model.layers.1.mlp.gate_proj")


def test_patterns_match_their_names_alone():
    names = [f"layers.{i}.experts.{e}.w1" for i in range(2) for e in range(3)]
    assert patterns(names, ["layers.0.router"]) == [r"re:layers\.\d+\.experts\.\d+\.w1$"]
    assert patterns(names[:3], names[3:]) == [r"re:layers\.0\.experts\.\d+\.w1$"]
    assert patterns(names[:2], names[2:]) == names[:2]
    assert patterns(["lm_head"], []) == ["lm_head"]


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
]


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
