"""Dialects that are read only, FBGEMM's, Quark's and torchao's: their configs, and what does not fit them."""

import copy
import json
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest

import fp8x
from fp8x.checkpoint import FORMATS, Reader, choose_format, format_of
from fp8x.checkpoint.inspect import inspect
from fp8x.checkpoint.names import whole_names
from fp8x.errors import CheckpointError
from fp8x.models.loading import get
from fp8x.recipe import Recipe
from fp8x.scheme import KV_SCHEMES, mx, per_row, per_tensor

GOLDENS = Path(__file__).parents[1] / "goldens" / "fp8"
BFLOAT16 = np.dtype("bfloat16")
CHANNEL = Recipe(per_row(), per_row(), "dynamic")
BOUND = pytest.mark.filterwarnings("ignore:.*activation_scale_ub is:UserWarning")


def read(config: dict, prefix: str = "model.layers.1.mlp.down_proj") -> Recipe | None:
    return format_of({"quantization_config": config}).from_config(config, [prefix], BFLOAT16)[prefix]


def golden_config(name: str) -> dict:
    return json.loads((GOLDENS / name / "config.json").read_text())["quantization_config"]


def changed(config: dict, path: str, value) -> dict:
    """A config with another value at a dotted path."""
    config = copy.deepcopy(config)
    *parents, last = path.split("/")
    at = config
    for name in parents:
        at = at[name]
    at[last] = value
    return config


@pytest.mark.parametrize("name", ["fbgemm_fp8", "quark", "torchao"])
def test_they_are_read_only(name):
    with pytest.raises(CheckpointError, match=f"'{name}': is read only; 'compressed-tensors'"):
        choose_format([CHANNEL], name)
    with pytest.raises(CheckpointError, match=f"{name}.* is read only"):
        FORMATS[name].to_config({"a": CHANNEL}, BFLOAT16)
    assert FORMATS[name].kv_fields(KV_SCHEMES["tensor"]) is None


# FBGEMM


def test_the_bound_of_activations_is_warned_of():
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 800, "modules_to_not_convert": ["lm_head"]}
    with pytest.warns(UserWarning, match=r"activation_scale_ub is 800: it bounds the amax .* fp8x has no such bound"):
        assert read(config) == CHANNEL
    with pytest.warns(UserWarning, match=r"activation_scale_ub is 1200.0"):
        assert read({"quant_method": "fbgemm_fp8"}) == CHANNEL
    with pytest.warns(UserWarning, match=r"activation_scale_ub is 1200.0"):
        fp8x.load(GOLDENS / "fbgemm_fp8")


@BOUND
@pytest.mark.parametrize("bound", [None, True, 0, -1.0, "1200", float("nan")])
def test_bounds_that_are_none(bound):
    with pytest.raises(CheckpointError, match=r"activation_scale_ub is .*, expected a positive number"):
        read({"quant_method": "fbgemm_fp8", "activation_scale_ub": bound})


# Quark


def test_quark_takes_the_first_layer_that_matches_then_the_class_then_all():
    config = golden_config("quark_per_channel")
    assert read(config) == Recipe(per_row()) and read(config, "model.layers.1.mlp.up_proj") == CHANNEL
    assert read(config, "lm_head") is None
    layer = config["layer_quant_config"]["*.mlp.down_proj"]
    assert read(config | {"layer_type_quant_config": {"Linear": layer}}, "a") == Recipe(per_row())
    both = {"*.layers.1.*": config["global_quant_config"], "*.mlp.down_proj": layer}
    assert read(config | {"layer_quant_config": both}) == CHANNEL
    assert read(config | {"layer_quant_config": None, "exclude": None}) == CHANNEL
    whole = changed(golden_config("quark_fp8_kv"), "global_quant_config/input_tensors/is_dynamic", True)
    assert read(whole) == Recipe(per_tensor(), per_tensor(), "dynamic")


def test_quark_excludes_whole_names():
    for entry in ("lm_head", "lm_*", "re:lm"):
        assert whole_names([entry])("lm_head") and not whole_names([entry])("a.lm_head"), entry
    assert not whole_names(["*.mlp.gate"])("a.mlp.gate.up") and not whole_names(["a.mlp"])("a.mlp.up")


def test_mxfp8_as_vllm_reads_it():
    config = golden_config("quark_mxfp8")
    for part in ("weight", "input_tensors"):
        for name, value in {"qscheme": "per_block", "block_size": [1, 32], "scale_calculation_mode": None}.items():
            config = changed(config, f"global_quant_config/{part}/{name}", value)
    assert read(config) == Recipe(mx(), mx(), "dynamic")
    with pytest.raises(CheckpointError, match=r"weight.block_size is \[32, 32\]; fp8x reads \[1, 32\]"):
        read(changed(config, "global_quant_config/weight/block_size", [32, 32]))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("export", None, "quantization_config.export is None, expected an object"),
        ("export/weight_format", "fake_quantized", "weight_format is 'fake_quantized'; fp8x reads 'real_quantized'"),
        ("export/pack_method", "x", "pack_method is 'x'; fp8x reads 'reorder' or 'order'"),
        ("global_quant_config/weight/dtype", "int8", "weight.dtype is 'int8'; fp8x reads 'fp8_e4m3' or"),
        ("global_quant_config/weight/is_dynamic", True, "weight.is_dynamic is True; fp8x reads False"),
        ("global_quant_config/weight/symmetric", False, "weight.symmetric is False; fp8x reads True"),
        ("global_quant_config/weight/ch_axis", 1, "weight.ch_axis is 1; fp8x reads 0"),
        ("global_quant_config/weight/qscheme", "per_group", "weight.ch_axis is 0; fp8x reads -1 or 1"),
        ("global_quant_config/weight", [], r"weight is \[\], expected an object"),
        ("global_quant_config/weight", None, "input_tensors is {.*; fp8x reads None"),
        ("global_quant_config/input_tensors/is_dynamic", False, "input_tensors.is_dynamic is False; fp8x reads True"),
        ("global_quant_config/input_tensors/scale_type", "pof2", "scale_type is 'pof2'; fp8x reads 'float' or"),
        ("global_quant_config/output_tensors", {"dtype": "fp8_e4m3"}, "output_tensors is {.*; fp8x reads None"),
        ("global_quant_config/bias", {"dtype": "fp8_e4m3"}, "bias is {.*; fp8x reads None"),
        ("algo_config", [{"name": "rotation", "r4": True}], "algo_config.r4 is True; fp8x reads False or None"),
        (
            "algo_config",
            [{"name": "rotation", "online_config": {"online_rotation_layers": ["a"]}}],
            r"online_config.online_rotation_layers is \['a'\]; fp8x reads None",
        ),
        ("exclude", ["re:("], "'re:\\(' is no pattern"),
        ("export/kv_cache_group", ["*k_proj"], "layer_quant_config is .*, expected an entry for what export.kv_cache_"),
    ],
)
def test_quark_configs_that_do_not_fit(path, value, message):
    config = changed(golden_config("quark_per_channel"), "layer_quant_config", {})
    with pytest.raises(CheckpointError, match=message):
        read(changed(config, path, value))


def test_quark_declares_a_kv_cache():
    config, format = golden_config("quark_fp8_kv"), FORMATS["quark"]
    assert format.kv_scheme(config) == KV_SCHEMES["tensor"]
    older = {key: value for key, value in config.items() if not key.startswith("kv_")}
    newer = changed(config, "export/kv_cache_group", [])
    assert format.kv_scheme(older) == format.kv_scheme(newer) == KV_SCHEMES["tensor"]
    assert format.kv_scheme(golden_config("quark_mxfp8")) is None
    for path, value in (("dtype", "int8"), ("qscheme", "per_channel"), ("is_dynamic", True)):
        with pytest.raises(CheckpointError, match=f"output_tensors.{path} is {value!r}; fp8x reads"):
            format.kv_scheme(changed(config, f"layer_quant_config/*k_proj/output_tensors/{path}", value))
    with pytest.raises(CheckpointError, match="kv_cache_post_rope is True"):
        format.kv_scheme(config | {"kv_cache_post_rope": True})


def test_quark_quantizes_attention_weights():
    config = golden_config("quark_per_channel") | {"softmax_quant_spec": {"dtype": "fp8_e4m3"}}
    with pytest.warns(UserWarning, match="softmax_quant_spec: attention weights are quantized there"):
        read(config)


def test_scales_of_a_kv_cache_come_along(tmp_path):
    """`k_proj.output_scale` and `v_proj.output_scale`; by streaming, under the other format's names."""
    reader = Reader(GOLDENS / "quark_fp8_kv")
    model = fp8x.load(GOLDENS / "quark_fp8_kv")
    fp8x.convert(GOLDENS / "quark_fp8_kv", tmp_path / "out", format="compressed-tensors")
    assert model.kv_cache == fp8x.load(tmp_path / "out").kv_cache == KV_SCHEMES["tensor"]
    for path in (GOLDENS / "quark_fp8_kv", tmp_path / "out"):
        for index, pair in enumerate(fp8x.load(path).kv_scales()):
            for part, scale in zip("kv", pair, strict=True):
                name = f"model.layers.{index}.self_attn.{part}_proj.output_scale"
                stored = reader.read(name, shapes=[()], dtypes=["BF16"])
                assert float(np.asarray(scale).reshape(())) == float(stored)
    # Quark's bfloat16 scales, exactly.
    scale = get(model, "layers.0.self_attn.q_proj").input_scale[...]
    assert float(scale[0, 0]) == float(
        reader.read("model.layers.0.self_attn.q_proj.input_scale", shapes=[()], dtypes=["BF16"])
    )


# torchao


def rewritten(tmp_path: Path, change) -> Path:
    """A checkpoint of torchao's with another header: `change` gets the tensors and the metadata, parsed."""
    path = tmp_path / "changed"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(GOLDENS / "torchao_row", path)
    content = (path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = {name: json.loads(text) for name, text in header.pop("__metadata__").items() if text != "pt"}
    change(header, metadata)
    header["__metadata__"] = {name: json.dumps(value) for name, value in metadata.items()}
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return path


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def test_the_config_of_torchao_does_not_say_which_pattern_counts():
    """transformers sorts them; what the files say of every matrix counts."""
    patterns = golden_config("torchao_mixed")["quant_type"]["default"]["_data"]["fqn_to_config"]
    assert next(iter(patterns)) == r"re:.*\.layers\..*proj"
    schemes = {row.name: row.scheme for row in inspect(GOLDENS / "torchao_mixed").rows}
    assert schemes[Q_PROJ] == per_tensor() and schemes["model.layers.0.self_attn.o_proj.weight"] == per_row()


def test_descriptions_of_torchao():
    targets = fp8x.plan(GOLDENS / "torchao_mixed").targets
    recipes = {prefix: target.stored for prefix, target in targets.items()}
    assert recipes["model.layers.1.self_attn.o_proj"] == CHANNEL
    assert recipes["model.layers.1.mlp.up_proj"] == Recipe(per_row()) and recipes["lm_head"] is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("_type", "Int4Tensor", "_type is 'Int4Tensor'; fp8x reads 'Float8Tensor' or 'MXTensor'"),
        ("_tensor_data_names", ["qdata", "scale", "act_pre_scale"], "'Float8Tensor' has the parts .*'act_pre_scale'"),
        ("_data/block_size", None, "_data.block_size is None, expected a list of two positive integers"),
        ("_data/block_size", [1, 0], "expected a list of two positive integers"),
        ("_data/act_quant_kwargs/_data/float8_dtype/_data", "int8", "float8_dtype._data is 'int8'; fp8x reads"),
        ("_data/act_quant_kwargs/_data/granularity/_type", "PerAxis", "granularity._type is 'PerAxis'; fp8x reads"),
        ("_data/act_quant_kwargs/_data/granularity/_data/dim", 0, "_data.dim is 0; fp8x reads -1"),
        ("_data/block_size", [64, 64], r"q_proj.weight_scale in .*: shape is \[64, 1\], expected \[1, 1\]"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path, path, value, message):
    def change(header, metadata):
        metadata[Q_PROJ] = changed(metadata[Q_PROJ], path, value)

    with pytest.raises(CheckpointError, match=message):
        fp8x.load(rewritten(tmp_path, change))


def test_descriptions_that_are_missing(tmp_path):
    path = rewritten(tmp_path, lambda header, metadata: metadata.clear())
    with pytest.raises(CheckpointError, match=r"proj.weight in .*: no file's __metadata__ has a description"):
        Reader(path)

    def rename(header, metadata):
        header[Q_PROJ] = header.pop(Q_PROJ.replace("weight", "_weight_qdata"))

    with pytest.raises(CheckpointError, match=f"{Q_PROJ} in .*: is F8_E4M3, but not one of torchao's tensors"):
        fp8x.load(rewritten(tmp_path, rename))


def test_bounds_of_torchao_are_warned_of_once(tmp_path):
    def change(header, metadata):
        for described in metadata.values():
            if isinstance(described, dict) and described["_type"] == "Float8Tensor":
                described["_data"]["act_quant_kwargs"]["_data"]["hp_value_ub"] = 10.0

    path = rewritten(tmp_path, change)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fp8x.load(path)
    (message,) = [str(warning.message) for warning in caught]
    assert "act_quant_kwargs.hp_value_ub is 10.0: it bounds the amax" in message


def test_embeddings_in_8_bits_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="include_input_output_embeddings is True; fp8x reads False"):
        read(golden_config("torchao_row") | {"include_input_output_embeddings": True})

    def change(header, metadata):
        """The matrix of a layer under the embedding's name, as an FqnToConfig can have it."""
        for part in ("qdata", "scale"):
            name = f"model.layers.0.self_attn.q_proj._weight_{part}"
            header[f"model.embed_tokens._weight_{part}"] = header.pop(name)
        header[Q_PROJ] = header.pop("model.embed_tokens.weight")
        metadata["model.embed_tokens.weight"] = metadata.pop(Q_PROJ)

    path = rewritten(tmp_path, change)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "another"}))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight in .*: is quantized, but fp8x reads quantized"):
        fp8x.convert(path, tmp_path / "out", "bf16")


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": golden_config("torchao_row")}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found pytorch_model.bin; pickles are not read: .* save safetensors"):
        Reader(tmp_path)
