"""The scales of a KV cache on disk: read from every dialect, kept, declared, and never lost without a word."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from golden import GOLDENS, read_golden
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fp8x
from fp8x import Scheme
from fp8x.calibrate import Sidecar
from fp8x.checkpoint import FORMATS, Reader
from fp8x.errors import CalibrationError, CheckpointError
from fp8x.scheme import KV_HEAD, KV_TENSOR, per_row

TENSOR, HEAD = Scheme("e4m3", block=KV_TENSOR), Scheme("e4m3", block=KV_HEAD)
ARGS = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
KEYS, VALUES = np.float32([0.013, 0.021]), np.float32([0.034, 0.055])  # of two layers


def with_tensors(path, tensors, name="llama", **config):
    """A tiny Llama in float32 with two layers and two heads of keys, and further tensors and fields of config.json."""
    path.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDENS / name / file, path / file)
    save_file(load_file(path / "model.safetensors") | tensors, path / "model.safetensors")
    hf = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(hf))
    return path


def of_layers(**scales):
    """Tensors of the attention in each of the layers."""
    return {f"model.layers.{i}.self_attn.{name}": each[i] for name, each in scales.items() for i in range(len(each))}


def quantization(**fields):
    return {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"} | fields}


def scales_of(model) -> list[np.ndarray]:
    """Of keys and values, layer by layer."""
    attentions = [layer.self_attn for layer in model.layers]
    return [np.asarray(q.input_scale[...]).reshape(-1) for a in attentions for q in (a.k_cache, a.v_cache)]


def stored_scales(path) -> dict[str, np.ndarray]:
    with safe_open(path / "model.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.endswith(("k_scale", "v_scale"))}  # noqa: SIM118


def quantization_config(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (of_layers(k_scale=KEYS[:, None], v_scale=VALUES[:, None]), (KEYS, VALUES)),
        (of_layers(k_scale=KEYS.reshape(2, 1, 1, 1), v_scale=VALUES.reshape(2, 1, 1, 1)), (KEYS, VALUES)),
        (
            of_layers(**{"k_proj.k_scale": [*map(np.array, KEYS)], "v_proj.v_scale": [*map(np.array, VALUES)]}),
            (KEYS, VALUES),
        ),
        (of_layers(**{"k_proj.output_scale": KEYS[:, None], "v_proj.output_scale": VALUES[:, None]}), (KEYS, VALUES)),
        (of_layers(kv_scale=KEYS[:, None]), (KEYS, KEYS)),
        (of_layers(k_scale=KEYS[:, None]), (KEYS, KEYS)),
        (of_layers(k_scale=KEYS[:, None].astype(ml_dtypes.bfloat16), v_scale=VALUES[:, None].astype(np.float16)), None),
    ],
    ids=["compressed-tensors", "of higher rank", "modelopt", "autofp8", "one for both", "keys alone", "16 bits"],
)
def test_every_dialect(tmp_path, tensors, expected):
    if expected is None:
        expected = KEYS.astype(ml_dtypes.bfloat16).astype(np.float32), VALUES.astype(np.float16).astype(np.float32)
    model = fp8x.load(with_tensors(tmp_path / "m", tensors))
    assert model.kv_cache == TENSOR
    np.testing.assert_array_equal(np.concatenate(scales_of(model)), np.stack(expected, axis=1).reshape(-1))


def test_a_scale_a_head(tmp_path):
    pairs = {
        name: np.stack([each, 2 * each], axis=1).reshape(2, 2, 1, 1) for name, each in (("k", KEYS), ("v", VALUES))
    }
    source = with_tensors(
        tmp_path / "m",
        of_layers(k_scale=pairs["k"], v_scale=pairs["v"]),
        **quantization(config_groups={}, kv_cache_scheme=ARGS | {"strategy": "attn_head"}),
    )
    model = fp8x.load(source)
    assert model.kv_cache == HEAD
    np.testing.assert_array_equal(scales_of(model)[3], pairs["v"][1].reshape(-1))
    fp8x.save(model, tmp_path / "again")
    for name, array in stored_scales(source).items():
        np.testing.assert_array_equal(stored_scales(tmp_path / "again")[name], array)


@pytest.mark.parametrize(
    ("format", "config", "scheme"),
    [
        ("compressed-tensors", {"kv_cache_scheme": ARGS}, TENSOR),
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, TENSOR),
        ("compressed-tensors", {"kv_cache_scheme": ARGS | {"strategy": "attn_head"}}, HEAD),
        ("compressed-tensors", {"kv_cache_scheme": ARGS | {"dynamic": True}}, per_row()),
        ("compressed-tensors", {"kv_cache_scheme": None}, None),
        ("modelopt", {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}, TENSOR),
        ("modelopt", {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}, None),
        (
            "modelopt",
            {"quant_algo": "FP8", "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}},
            TENSOR,
        ),
        ("fp8", {"kv_cache_scheme": "static"}, TENSOR),
        ("fp8", {}, None),
    ],
)
def test_declarations(format, config, scheme):
    assert FORMATS[format].kv_scheme(config) == scheme


@pytest.mark.parametrize(
    ("format", "config", "message"),
    [
        (
            "compressed-tensors",
            {"kv_cache_scheme": ARGS | {"num_bits": 4}},
            r"kv_cache_scheme\.num_bits is 4; fp8x reads 8",
        ),
        (
            "compressed-tensors",
            {"kv_cache_scheme": ARGS | {"strategy": "channel"}},
            r"strategy is 'channel'; fp8x reads",
        ),
        ("modelopt", {"kv_cache_quant_algo": "NVFP4"}, r"kv_cache_quant_algo is 'NVFP4'; fp8x reads None or 'FP8'"),
        ("fp8", {"kv_cache_scheme": "dynamic"}, r"kv_cache_scheme is 'dynamic'; fp8x reads None or 'static'"),
        ("mxfp8", {"kv_cache_scheme": "static"}, r"kv_cache_scheme is 'static'; fp8x reads None"),
    ],
)
def test_declarations_that_are_not_read(format, config, message):
    with pytest.raises(CheckpointError, match=message):
        FORMATS[format].kv_scheme(config)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            of_layers(k_scale=KEYS[:1, None]),
            r"model\.layers\.1\.self_attn\.k_scale is missing, while other layers have",
        ),
        (
            of_layers(v_scale=VALUES[:, None]),
            r"model\.layers\.0\.self_attn\.k_scale is missing in .*, which has .*v_scale",
        ),
        (
            of_layers(k_scale=np.float32([[0.0], [1.0]])),
            r"layers\.0\.self_attn\.k_scale in .*: \[0\.0\] are not all finite",
        ),
        (of_layers(k_scale=np.float32([[np.nan], [1.0]])), r"self_attn\.k_scale in .*: \[nan\] are not all finite"),
        (
            of_layers(k_scale=np.ones((2, 2, 3), np.float32)),
            r"k_scale in .*: shape is \[2, 3\], expected one scale, or one",
        ),
        (
            of_layers(k_scale=np.ones((2, 3), np.float32)),
            r"scales of its KV cache do not fit: .*k_scale: shape is \[3\]",
        ),
        (
            of_layers(k_scale=[np.ones(1, np.float32), np.ones(2, np.float32)]),
            r"do not fit: .*k_scale: shape is \[1\], but",
        ),
        (of_layers(k_scale=np.ones((2, 1), np.int32)), r"k_scale in .*: dtype is I32, expected F32 or BF16 or F16"),
    ],
)
def test_damaged_scales_are_named(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        fp8x.load(with_tensors(tmp_path / "m", tensors))


def test_declared_without_scales(tmp_path):
    """They are 1 in vLLM, too."""
    source = with_tensors(tmp_path / "m", {}, **quantization(config_groups={}, kv_cache_scheme=ARGS))
    with pytest.warns(
        UserWarning, match="declares a KV cache in FP8, but there are no scales for it; they are taken as 1"
    ):
        model = fp8x.load(source)
    assert model.kv_cache == TENSOR and all((scale == 1).all() for scale in scales_of(model))


def test_declared_dynamic(tmp_path):
    args = ARGS | {"dynamic": True}
    source = with_tensors(tmp_path / "m", {}, **quantization(config_groups={}, kv_cache_scheme=args))
    model = fp8x.load(source)
    assert model.kv_cache == per_row()
    fp8x.convert(source, tmp_path / "c", "e4m3_bf16")
    assert quantization_config(tmp_path / "c")["kv_cache_scheme"] == args


def test_another_kind_leaves_16_bits(tmp_path):
    tensors = of_layers(k_scale=KEYS[:, None])
    source = with_tensors(
        tmp_path / "m", tensors, **quantization(config_groups={}, kv_cache_scheme=ARGS | {"num_bits": 4})
    )
    for read in (fp8x.load, lambda path: fp8x.convert(path, tmp_path / "c", "e4m3_bf16")):
        with pytest.warns(UserWarning, match=r"num_bits is 4; fp8x reads 8; keys and values stay in the"):
            read(source)
    assert fp8x.load(tmp_path / "c").kv_cache is None and not stored_scales(tmp_path / "c")


def test_a_dynamic_one_is_saved(tmp_path):
    model = fp8x.load(GOLDENS / "llama", "e4m3_bf16")
    model.set_kv_cache("e4m3")
    fp8x.save(model, tmp_path / "m")
    assert fp8x.load(tmp_path / "m").kv_cache == per_row()


def test_scales_of_queries_are_named(tmp_path):
    tensors = of_layers(k_scale=KEYS[:, None], q_scale=KEYS[:, None], prob_scale=KEYS[:, None])
    with pytest.warns(
        UserWarning, match=r"self_attn\.prob_scale, .*q_scale.* are not used: fp8x multiplies queries and"
    ):
        fp8x.load(with_tensors(tmp_path / "m", tensors))


@pytest.mark.sample
@pytest.mark.parametrize(
    ("format", "code"),
    [
        ("compressed-tensors", None),
        ("compressed-tensors", "e4m3_e4m3_bf16_dynamic"),
        ("modelopt", "e4m3_e4m3_bf16_dynamic"),
        ("fp8", "fp8_e4m3fn_bf16_block_scale"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_saved_and_loaded(tmp_path, format, code, name, run):
    golden = read_golden(name)
    model = fp8x.load(golden.path, code)
    fp8x.calibrate(model, [golden.tensors["ids"]], kv_cache=True)
    fp8x.save(model, tmp_path / "m", format)
    declared, first = quantization_config(tmp_path / "m")["kv_cache_scheme"], "model.layers.0.self_attn"
    assert declared == {"compressed-tensors": ARGS, "fp8": "static"}.get(
        format, {"dynamic": False, "num_bits": 8, "type": "float"}
    )
    scale = stored_scales(tmp_path / "m")[f"{first}.k_proj.k_scale" if format == "modelopt" else f"{first}.k_scale"]
    assert scale.dtype == np.float32 and scale.shape == (() if format == "modelopt" else (1,))
    if format == "modelopt":
        legacy = json.loads((tmp_path / "m/hf_quant_config.json").read_text())["quantization"]
        assert legacy["kv_cache_quant_algo"] == "FP8"
    loaded = fp8x.load(tmp_path / "m")
    np.testing.assert_array_equal(scales_of(loaded), scales_of(model))
    np.testing.assert_array_equal(run(loaded, golden.tensors["ids"]), run(model, golden.tensors["ids"]))


def test_from_format_to_format(tmp_path):
    tensors = of_layers(k_scale=KEYS[:, None], v_scale=VALUES[:, None])
    source = with_tensors(tmp_path / "bf16", tensors)
    fp8x.convert(source, tmp_path / "a", "e4m3_e4m3_bf16_dynamic", "modelopt")
    fp8x.convert(tmp_path / "a", tmp_path / "b", format="compressed-tensors")
    fp8x.convert(tmp_path / "b", tmp_path / "c", "fp8_e4m3fn_bf16_block_scale", "fp8")
    for path, names in (
        ("a", ("k_proj.k_scale", "v_proj.v_scale")),
        ("b", ("k_scale", "v_scale")),
        ("c", ("k_scale", "v_scale")),
    ):
        found = stored_scales(tmp_path / path)
        assert set(found) == {f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in names}
        for index in range(2):
            pair = [found[f"model.layers.{index}.self_attn.{name}"] for name in names]
            np.testing.assert_array_equal(
                np.concatenate([each.reshape(-1) for each in pair]), [KEYS[index], VALUES[index]]
            )
        assert quantization_config(tmp_path / path)["kv_cache_scheme"]
    with pytest.raises(CheckpointError, match=r"'fp8': no KV cache in e4m3 ·×·×1×· f32"):
        heads = np.float32([[0.1, 0.2]] * 2)
        fp8x.convert(
            with_tensors(tmp_path / "h", of_layers(k_scale=heads)), tmp_path / "d", "fp8_e4m3fn_bf16_block_scale", "fp8"
        )


def test_a_declaration_stays_in_its_own_words(tmp_path):
    args = ARGS | {"observer": "minmax", "group_size": None}
    tensors = of_layers(k_scale=KEYS[:, None], v_scale=VALUES[:, None])
    source = with_tensors(tmp_path / "m", tensors, **quantization(config_groups={}, kv_cache_scheme=args))
    fp8x.convert(source, tmp_path / "c", "e4m3_bf16")
    assert quantization_config(tmp_path / "c")["kv_cache_scheme"] == args


def test_what_no_format_declares_is_named(tmp_path):
    tensors = of_layers(k_scale=KEYS[:, None], v_scale=VALUES[:, None], q_scale=KEYS[:, None])
    source = with_tensors(tmp_path / "m", tensors, **quantization(config_groups={}, kv_cache_scheme=ARGS))
    with pytest.warns(
        UserWarning, match="the scales of its KV cache are left out: a checkpoint in bfloat16 declares none"
    ):
        fp8x.convert(source, tmp_path / "bf16", "bf16")
    assert not any("scale" in name for name in Reader(tmp_path / "bf16"))
    fp8x.convert(source, tmp_path / "kept", "bf16", "compressed-tensors")
    assert (
        quantization_config(tmp_path / "kept")["kv_cache_scheme"] == ARGS and len(stored_scales(tmp_path / "kept")) == 4
    )
    # What this library does not use is kept for those that do.
    assert "model.layers.0.self_attn.q_scale" in Reader(tmp_path / "kept")
    model = fp8x.load(GOLDENS / "llama")
    model.set_kv_cache("e4m3")
    with pytest.warns(UserWarning, match=r"keys and values in e4m3 1×· f32 need nothing that is stored"):
        fp8x.save(model, tmp_path / "saved")


def test_a_config_that_describes_no_model_is_converted(tmp_path):
    source = with_tensors(tmp_path / "m", {}, num_hidden_layers=None)
    with pytest.warns(
        UserWarning, match=r"fp8x\.load could not build this model \(.*num_hidden_layers.*\); its matrices go"
    ):
        fp8x.convert(source, tmp_path / "c", "e4m3_bf16")
    assert Reader(tmp_path / "c").stored("model.layers.0.mlp.up_proj.weight").dtype == "F8_E4M3"


@pytest.mark.sample
@pytest.mark.parametrize(("name", "code", "kind"), [("llama", "e4m3_e4m3_bf16", "head"), ("deepseek_v3", None, True)])
def test_a_calibration_file_holds_them(tmp_path, name, code, kind):
    golden = read_golden(name)
    model = fp8x.load(golden.path, code)
    report = fp8x.calibrate(model, [golden.tensors["ids"]], kv_cache=kind)
    Sidecar(code or "none", report).write(tmp_path / "scales.json")
    fp8x.save(model, tmp_path / "saved")
    fp8x.convert(golden.path, tmp_path / "converted", code, "compressed-tensors", calibration=tmp_path / "scales.json")
    for path in (tmp_path / "converted", tmp_path / "saved"):
        np.testing.assert_array_equal(scales_of(fp8x.load(path)), scales_of(model))
    loaded = fp8x.load(golden.path, code, calibration=tmp_path / "scales.json")
    assert loaded.kv_cache == model.kv_cache
    np.testing.assert_array_equal(scales_of(loaded), scales_of(model))
    applied = nnx.clone(fp8x.load(golden.path, code))
    Sidecar(code or "none", report).apply(applied)
    np.testing.assert_array_equal(scales_of(applied), scales_of(model))
    other = read_golden("deepseek_v3" if name == "llama" else "llama").path
    for read in (fp8x.load, lambda path, code, **options: fp8x.convert(path, tmp_path / "no", code, **options)):
        with pytest.raises(CalibrationError, match=r"calibration: .* is it another model's|use the recipe"):
            read(other, code, calibration=tmp_path / "scales.json")
