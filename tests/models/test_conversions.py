"""Checkpoint to checkpoint: the same bytes as through a model, in every scheme and format."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import fp8x
from fp8x import RECIPES, Scheme, numerics
from fp8x.calibrate import CalibrationReport, LayerStatistics, Sidecar
from fp8x.calibrate.statistics import static_layers
from fp8x.checkpoint import Reader, Writer, format_of, rows
from fp8x.checkpoint.reader import DTYPES
from fp8x.errors import CalibrationError, CheckpointError, RecipeError, RuleError, ShapeError

PLAIN = [code for code, recipe in RECIPES.items() if recipe.out_dtype == jnp.bfloat16 and recipe.observer is None]
CODES = [code for code in PLAIN if not RECIPES[code].needs_calibration]
STATIC = [code for code in PLAIN if RECIPES[code].needs_calibration]


def contents(path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor: type, shape, bytes."""
    reader = Reader(path)
    return {name: (dtype, shape, values.tobytes()) for name in reader for dtype, shape, values in [read(reader, name)]}


def read(reader: Reader, name: str) -> tuple[str, tuple[int, ...], np.ndarray]:
    tensor = reader.stored(name)
    return tensor.dtype, tensor.shape, reader.read(name, shapes=[tensor.shape], dtypes=[tensor.dtype])


def matrix(path, prefix: str) -> fp8x.ScaledArray:
    """A quantized matrix of a checkpoint."""
    reader = Reader(path)
    format = format_of(reader.config)
    (recipe,) = format.from_config(reader.config["quantization_config"], [prefix], DTYPES["BF16"]).values()
    weight, _ = format.decode(prefix, recipe, reader.stored(f"{prefix}.weight").shape, reader)
    return fp8x.ScaledArray(jnp.asarray(weight.data), jnp.asarray(weight.scale), weight.scheme)


@pytest.fixture(params=[1 << 22, 1 << 12], ids=["whole", "chunks"])
def chunk_bytes(request, monkeypatch):
    """The usual size of chunks, in which these matrices are one, and one that cuts them."""
    monkeypatch.setattr(rows, "CHUNK_BYTES", request.param)


@pytest.mark.sample
@pytest.mark.parametrize("code", CODES)
def test_as_through_a_model(tiny_checkpoint, tmp_path, code, chunk_bytes):
    fp8x.save(fp8x.load(tiny_checkpoint, code), tmp_path / "saved")
    fp8x.convert(tiny_checkpoint, tmp_path / "converted", code)
    assert contents(tmp_path / "converted") == contents(tmp_path / "saved")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "converted")]
    assert configs[0] == configs[1]
    assert (tmp_path / "converted" / "tokenizer.json").read_bytes() == (tiny_checkpoint / "tokenizer.json").read_bytes()


@pytest.mark.sample
@pytest.mark.parametrize("code", STATIC)
def test_static_scales(tiny_checkpoint, tmp_path, code):
    scheme = RECIPES[code].activation
    model = fp8x.load(tiny_checkpoint, code)
    layers = {}
    for index, (path, layer) in enumerate(static_layers(model).items()):
        scale = np.full(scheme.scale_shape((1, layer.weight.shape[-1])), 0.01 * (index + 1), np.float32)
        layers[path] = LayerStatistics(str(scheme), np.ones_like(scale), scale, np.int32(1))
    found = Sidecar(code, CalibrationReport(layers, 1, "max", None))
    found.apply(model)
    found.write(tmp_path / "calibration.json")
    fp8x.save(model, tmp_path / "saved")
    fp8x.convert(tiny_checkpoint, tmp_path / "converted", code, calibration=tmp_path / "calibration.json")
    assert contents(tmp_path / "converted") == contents(tmp_path / "saved")
    # From there on the scales come along.
    fp8x.convert(tmp_path / "converted", tmp_path / "again", code)
    assert contents(tmp_path / "again") == contents(tmp_path / "saved")


def test_static_scales_have_to_come_from_somewhere(tiny_checkpoint, tmp_path):
    with pytest.raises(CalibrationError, match=r"layers.0.self_attn.q_proj.* found by calibration"):
        fp8x.convert(tiny_checkpoint, tmp_path / "out", "e4m3_e4m3_bf16")
    assert not list(tmp_path.iterdir())


@pytest.mark.sample
@pytest.mark.parametrize(
    "source, target",
    [
        ("fp8_e4m3fn_bf16_block_scale", "mxfp8_bf16"),
        ("mxfp8_bf16", "fp8_e4m3fn_bf16_block_scale"),
        ("e5m2_e5m2_bf16", "e4m3_bf16"),
    ],
)
def test_from_8_bits_to_8_bits(tiny_checkpoint, tmp_path, source, target, chunk_bytes):
    fp8x.convert(tiny_checkpoint, tmp_path / "a", source)
    fp8x.convert(tmp_path / "a", tmp_path / "b", target)
    for prefix in ("model.layers.0.self_attn.k_proj", "model.layers.1.block_sparse_moe.experts.3.w2"):
        expected = numerics.requantize(matrix(tmp_path / "a", prefix), RECIPES[target].weight)
        found = matrix(tmp_path / "b", prefix)
        assert np.array_equal(np.asarray(found.data).view(np.uint8), np.asarray(expected.data).view(np.uint8))
        assert np.array_equal(np.asarray(found.scale).view(np.uint8), np.asarray(expected.scale).view(np.uint8))


def test_to_16_bits(tiny_checkpoint, tmp_path, chunk_bytes):
    fp8x.convert(tiny_checkpoint, tmp_path / "a", "mxfp8_bf16")
    fp8x.convert(tmp_path / "a", tmp_path / "b", "bf16")
    reader = Reader(tmp_path / "b")
    assert "quantization_config" not in reader.config and not any("scale" in name for name in reader)
    prefix = "model.layers.0.block_sparse_moe.experts.0.w1"
    dtype, _, values = read(reader, f"{prefix}.weight")
    assert dtype == "BF16"
    expected = np.asarray(matrix(tmp_path / "a", prefix).dequantize(jnp.bfloat16))
    assert values.tobytes() == expected.tobytes()
    assert set(reader) == set(Reader(tiny_checkpoint))


def test_another_format_keeps_the_bytes(tiny_checkpoint, tmp_path):
    code = "fp8_e4m3fn_bf16_block_scale"
    fp8x.convert(tiny_checkpoint, tmp_path / "a", code, "compressed-tensors")
    fp8x.convert(tmp_path / "a", tmp_path / "b", format="fp8")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    fp8x.convert(tmp_path / "b", tmp_path / "c", format="compressed-tensors")
    assert contents(tmp_path / "c") == contents(tmp_path / "a")


def test_another_recipe_with_the_same_weights_keeps_the_bytes(tiny_checkpoint, tmp_path):
    fp8x.convert(tiny_checkpoint, tmp_path / "a", "e4m3_bf16")
    fp8x.convert(tmp_path / "a", tmp_path / "b", "e4m3_e4m3_bf16_dynamic")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    assert fp8x.load(tmp_path / "b").layers[0].self_attn.q_proj.recipe == RECIPES["e4m3_e4m3_bf16_dynamic"]


def test_rules_name_modules_as_load_does(tiny_checkpoint, tmp_path):
    rules = {r"layers\.0\.mlp\.w13": None, r"layers\.1\.self_attn\..*": "mxfp8_bf16"}
    fp8x.save(fp8x.load(tiny_checkpoint, "e4m3_bf16", rules=rules), tmp_path / "saved")
    fp8x.convert(tiny_checkpoint, tmp_path / "converted", "e4m3_bf16", rules=rules)
    assert contents(tmp_path / "converted") == contents(tmp_path / "saved")


def other_model(path, tensors: dict[str, np.ndarray], **config) -> None:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "other", "torch_dtype": "float16"} | config))


@pytest.mark.slow
def test_any_architecture(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in {
        "decoder.embed_tokens.weight": (32, 64), "decoder.fc1.weight": (100, 64), "decoder.fc1.bias": (100,),
        "decoder.layer_norm.weight": (64,), "conv.weight": (4, 4, 3, 3), "lm_head.weight": (32, 64),
        "router.gate.weight": (4, 64),
    }.items()}  # fmt: skip
    tensors |= {"steps": np.array(7, np.int64), "none": np.zeros((0, 3), np.float32)}
    other_model(tmp_path / "a", tensors)
    fp8x.convert(tmp_path / "a", tmp_path / "b", "e4m3_f16")
    before, after = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert after.keys() - before.keys() == {"decoder.fc1.weight_scale"}
    assert {name for name in before if after[name] != before[name]} == {"decoder.fc1.weight"}
    expected = fp8x.quantize(jnp.asarray(tensors["decoder.fc1.weight"]), RECIPES["e4m3_f16"].weight)
    assert after["decoder.fc1.weight"][2] == np.asarray(expected.data).tobytes()


@pytest.mark.sample
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 32), (129, 96), (300, 160)])
def test_ragged_blocks_and_every_type(tmp_path, dtype, shape, chunk_bytes):
    values = np.asarray(jnp.asarray(np.random.default_rng(1).standard_normal(shape)).astype(dtype))
    other_model(tmp_path / "a", {"fc.weight": values})
    for name, scheme in {"block": Scheme("e4m3", block=(128, 128)), "columns": Scheme("e4m3", block=(64, 32))}.items():
        recipe = fp8x.Recipe(scheme)
        # A rule: matrices of a few rows stay in 16 bits without one.
        fp8x.convert(tmp_path / "a", tmp_path / name, recipe, rules={"fc": recipe})
        expected, found = fp8x.quantize(jnp.asarray(values), scheme), matrix(tmp_path / name, "fc")
        assert np.array_equal(np.asarray(found.data).view(np.uint8), np.asarray(expected.data).view(np.uint8))
        assert np.array_equal(np.asarray(found.scale), np.asarray(expected.scale))


@pytest.mark.sample
@pytest.mark.parametrize("code", ["e4m3_bf16", "e5m2_e5m2_bf16", "mxfp8_bf16"])
def test_nonfinite_values(tmp_path, code, chunk_bytes):
    values = np.asarray(jnp.asarray(np.random.default_rng(2).standard_normal((200, 64))).astype(jnp.bfloat16)).copy()
    values[150, 3], values[7, 60] = np.nan, -np.inf
    other_model(tmp_path / "a", {"fc.weight": values})
    with pytest.raises(CheckpointError, match=r"fc.weight in .*model.safetensors: holds 2 NaN or Inf of 12800 values"):
        fp8x.convert(tmp_path / "a", tmp_path / "b", code)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    fp8x.convert(tmp_path / "a", tmp_path / "b", code, allow_nonfinite=True)
    expected = fp8x.quantize(jnp.asarray(values), RECIPES[code].weight)
    assert contents(tmp_path / "b")["fc.weight"][2] == np.asarray(expected.data).tobytes()


def test_another_source_of_the_same_name_size_and_time_is_another(tmp_path):
    for index, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        other_model(tmp_path / name / "m", {f"fc{i}.weight": np.full((64, 64), index, np.float16) for i in range(8)})
        os.utime(tmp_path / name / "m" / "model.safetensors", (1, 1))

    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fp8x.convert(tmp_path / "a" / "m", tmp_path / "out", "e4m3_f16", max_shard_bytes=5000, progress=interrupt)
    with pytest.warns(UserWarning, match="removed what a run with other arguments had left"):
        done = fp8x.convert(tmp_path / "b" / "m", tmp_path / "out", "e4m3_f16", max_shard_bytes=5000)
    assert done.bytes_resumed == 0
    assert all(value[2] != bytes(4096) for name, value in contents(tmp_path / "out").items() if name.endswith("weight"))


@pytest.mark.parametrize("code", [code for code in CODES if "e5m2" in code or "e4m3" in code])
@pytest.mark.parametrize("shape", [(0, 128), (3, 0)])
def test_empty_matrices(tmp_path, code, shape):
    other_model(tmp_path / "a", {"fc.weight": np.zeros(shape, np.float16)})
    fp8x.convert(tmp_path / "a", tmp_path / "b", code)
    assert contents(tmp_path / "b")["fc.weight"][1] == shape


def test_types_that_numpy_lacks_are_copied(tmp_path):
    other_model(tmp_path / "a", {"fc.weight": np.zeros((16, 64), np.float16), "packed": np.arange(12, dtype=np.uint8)})
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"dtype":"U8","shape":[12]', b'"dtype":"F4","shape":[24]'))
    fp8x.convert(tmp_path / "a", tmp_path / "b", "e4m3_f16")
    stored = Reader(tmp_path / "b").stored("packed")
    assert (stored.dtype, stored.shape) == ("F4", (24,))
    assert bytes(range(12)) in (tmp_path / "b" / "model.safetensors").read_bytes()


def test_another_scale_rule_makes_other_scales(tiny_checkpoint, tmp_path):
    code = "fp8_e4m3fn_bf16_block_scale"
    fp8x.convert(tiny_checkpoint, tmp_path / "a", code)
    weight, activation = RECIPES[code].weight, RECIPES[code].activation
    pow2 = [dataclasses.replace(scheme, scale_rule="pow2") for scheme in (weight, activation)]
    fp8x.convert(tmp_path / "a", tmp_path / "b", fp8x.Recipe(*pow2, "dynamic"), "fp8")
    scale = np.asarray(matrix(tmp_path / "b", "model.layers.0.self_attn.q_proj").scale)
    assert np.all(np.frexp(scale)[0] == 0.5)


def test_the_processor_does_the_work_wherever_arrays_go(tiny_checkpoint, tmp_path):
    with jax.default_device(jax.devices()[-1]):
        fp8x.convert(tiny_checkpoint, tmp_path / "a", "e4m3_bf16")
    fp8x.convert(tiny_checkpoint, tmp_path / "b", "e4m3_bf16")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_progress_counts_bytes(tiny_checkpoint, tmp_path, chunk_bytes):
    seen = []
    done = fp8x.convert(tiny_checkpoint, tmp_path / "out", "e4m3_bf16", progress=lambda *pair: seen.append(pair))
    total = sum(len(tensor[2]) for tensor in contents(tiny_checkpoint).values())
    assert {pair[1] for pair in seen} == {total} == {done.bytes_read}
    assert [pair[0] for pair in seen] == sorted(pair[0] for pair in seen) and seen[-1][0] == total
    assert done.bytes_written == sum(len(tensor[2]) for tensor in contents(tmp_path / "out").values())
    assert done.format == "compressed-tensors" and done.bytes_resumed == 0


def test_what_does_not_fit(tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="near it: e4m3_bf16"):
        fp8x.convert(tiny_checkpoint, out, "e4m3_bf61")
    with pytest.raises(RuleError, match="exceptions to a recipe"):
        fp8x.convert(tiny_checkpoint, out, rules={".*": None})
    with pytest.raises(CheckpointError, match="nothing is quantized"):
        fp8x.convert(tiny_checkpoint, out, "bf16", "fp8")
    with pytest.raises(CheckpointError, match="no weight-only form"):
        fp8x.convert(tiny_checkpoint, out, "e4m3_bf16", "fp8")
    with pytest.raises(CheckpointError, match="does not exist"):
        fp8x.convert(tmp_path / "absent", out, "e4m3_bf16")
    other_model(tmp_path / "odd", {"fc.weight": np.zeros((16, 33), np.float16)})
    with pytest.raises(ShapeError, match=r"fc.weight: .*33, which 32 does not divide"):
        fp8x.convert(tmp_path / "odd", out, "mxfp8_f16")
    assert not out.exists()


def test_missing_tensors_are_named(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "a")
    reader = Reader(tiny_checkpoint)
    tensors = {name: read(reader, name)[2] for name in reader}
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    del tensors[name]
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is missing, which config.json calls for"):
        fp8x.convert(tmp_path / "a", tmp_path / "b", "e4m3_bf16")


def test_a_scale_without_its_matrix(tmp_path):
    other_model(tmp_path / "a", {f"fc{i}.weight": np.ones((128, 128), np.float16) for i in range(2)})
    fp8x.convert(tmp_path / "a", tmp_path / "b", "fp8_e4m3fn_bf16_block_scale", "fp8")
    reader = Reader(tmp_path / "b")
    tensors = {name: read(reader, name)[2] for name in reader if name != "fc1.weight"}
    with Writer(tmp_path / "c") as writer:
        writer.add_json("config.json", reader.config)
        for name, value in tensors.items():
            writer.add(name, value)
    with pytest.raises(CheckpointError, match=r"fc1.weight_scale_inv in .*: the matrix that it scales is missing"):
        fp8x.convert(tmp_path / "c", tmp_path / "d", "bf16")


def test_the_recipe_is_its_out_dtype_too(tiny_checkpoint, tmp_path):
    recipe = dataclasses.replace(RECIPES["e4m3_bf16"], out_dtype="float32")
    fp8x.convert(tiny_checkpoint, tmp_path / "out", recipe)
    layer = fp8x.load(tmp_path / "out").layers[0].self_attn.q_proj
    assert layer.recipe == recipe
