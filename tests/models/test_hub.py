"""Whole checkpoints: loaded, quantized on the way, saved, loaded again; and what is said of broken ones."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import fp8x
from fp8x.checkpoint import FORMATS, Reader, Writer
from fp8x.checkpoint.reader import DTYPES, SINGLE
from fp8x.errors import CalibrationError, CheckpointError, ConfigError, Fp8xError, MeshError, RuleError, ShapeError
from fp8x.models import Decoder, DecoderConfig, hub
from fp8x.nn.walk import named_layers
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme, per_tensor

GOLDENS = Path(__file__).parents[1] / "goldens"
MIXTRAL, SHARDED, QWEN = GOLDENS / "mixtral", GOLDENS / "mixtral_bf16_sharded", GOLDENS / "qwen3_moe_bf16"
OFFICIAL = GOLDENS / "compressed_tensors"
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w2"
E4M3 = ml_dtypes.float8_e4m3fn
IDS = np.array([[1, 5, 9, 2]])


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    reader = Reader(path)
    return {name: reader.read(name, shapes=[reader.stored(name).shape], dtypes=DTYPES) for name in reader}


def edited(source: Path, target: Path, tensors: dict | None = None, remove=(), **config) -> Path:
    """A copy of a checkpoint with some tensors replaced, added or removed, and some fields of its config."""
    merged = {name: array for name, array in (tensors_of(source) | (tensors or {})).items() if name not in remove}
    target.mkdir()
    save_file(merged, target / SINGLE)
    (target / "config.json").write_text(json.dumps(Reader(source).config | config))
    return target


def calibrated(model: Decoder) -> Decoder:
    """With a static scale everywhere, another in each layer."""
    for i, layer in enumerate(named_layers(model).values()):
        if layer.is_calibrating:
            layer.amax[...] = jnp.full(layer.amax.shape, i + 3.0)
            layer.finish_calibration()
        elif layer.recipe.is_static:
            shape = layer.input_scale.shape
            layer.input_scale[...] = jnp.full(shape, 0.1 * (i + 1)) + jnp.arange(shape[-1], dtype=jnp.float32)
    return model


def assert_same(a: Decoder, b: Decoder) -> None:
    """The same recipes, and the same bytes everywhere."""
    layers, others = named_layers(a), named_layers(b)
    assert {path: layer.recipe for path, layer in layers.items()} == {
        path: layer.recipe for path, layer in others.items()
    }
    states = dict(nnx.to_flat_state(nnx.state(a))), dict(nnx.to_flat_state(nnx.state(b)))
    assert states[0].keys() == states[1].keys()
    for path, variable in states[0].items():
        x, y = np.asarray(variable[...]), np.asarray(states[1][path][...])
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), path


@pytest.fixture(scope="module")
def static(tmp_path_factory) -> Path:
    """A checkpoint with static activation scales, in compressed-tensors."""
    path = tmp_path_factory.mktemp("hub") / "static"
    hub.save(calibrated(hub.load(MIXTRAL, "e4m3_e4m3_bf16")), path)
    return path


@pytest.mark.sample
@pytest.mark.parametrize("code", [code for code in fp8x.RECIPES if "_f32" not in code])
def test_round_trip_of_every_recipe(tmp_path, code):
    model = hub.load(MIXTRAL, code)
    recipe = fp8x.RECIPES[code]
    if recipe.observer:
        with pytest.raises(CalibrationError, match=r"layers.0.mlp.w13, .* more are in calibration"):
            hub.save(model, tmp_path / "calibrating")
    calibrated(model)
    held = [name for name, format in FORMATS.items() if format.objection([recipe]) is None]
    assert held
    for name in held:
        hub.save(model, tmp_path / name, name)
        assert_same(model, hub.load(tmp_path / name))
    for name in FORMATS.keys() - held:
        with pytest.raises(CheckpointError, match=f"format: can't hold this model: '{name}': "):
            hub.save(model, tmp_path / name, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(held)


@pytest.mark.parametrize("source", [MIXTRAL, SHARDED, QWEN], ids=lambda path: path.name)
def test_unquantized_round_trip(tmp_path, source):
    model = hub.load(source)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(model)))
    hub.save(model, tmp_path / "out")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert (array.dtype, array.tobytes()) == (after[name].dtype, after[name].tobytes()), name
    assert Reader(tmp_path / "out").config == Reader(source).config


@pytest.mark.slow
def test_logits_survive_shards_and_companions(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(QWEN, source)
    (source / "tokenizer.json").write_text("{}")
    model = hub.load(source, "e4m3_e4m3_bf16_dynamic")
    hub.save(model, tmp_path / "out", max_shard_bytes=20_000)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors.index.json", "tokenizer.json", "config.json"} <= names and len(names) > 6
    assert "_name_or_path" not in Reader(tmp_path / "out").config
    again = hub.load(tmp_path / "out")
    assert_same(model, again)
    run = nnx.jit(lambda model: model(IDS))
    assert np.array_equal(run(model), run(again))


@pytest.mark.sample
@pytest.mark.parametrize("code", ["e4m3_bf16", "fp8_e4m3fn_bf16_block_scale", "e4m3_e4m3_bf16_max_calibrate"])
def test_loading_quantizes_as_quantize_model(code):
    assert_same(hub.load(QWEN, code), fp8x.quantize_model(hub.load(QWEN), code))


def test_one_scale_across_experts():
    recipe = Recipe(Scheme("e4m3", block=(None, None, None)))
    rules = {r"layers\.\d+\.mlp\.w\d+": recipe}
    model = hub.load(QWEN, rules=rules)
    assert model.layers[1].mlp.w2.weight_scale.shape == (1, 1, 1)
    assert_same(model, fp8x.quantize_model(hub.load(QWEN), None, rules))


def test_rules_and_several_recipes(tmp_path):
    rules = {r"layers\.1\..*": None, r".*\.o_proj": "mxfp8_bf16", "lm_head": "e4m3_bf16"}
    model = hub.load(MIXTRAL, "e4m3_e4m3_bf16_dynamic", rules=rules)
    assert set(named_layers(model)) >= {"lm_head", "layers.0.mlp.w13"} and isinstance(
        model.layers[1].self_attn.o_proj, nnx.Linear
    )
    hub.save(model, tmp_path / "out")
    config = Reader(tmp_path / "out").config["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 3
    assert_same(model, hub.load(tmp_path / "out"))
    with pytest.raises(RuleError, match="'lmhead' matches no module"):
        hub.load(MIXTRAL, "e4m3_bf16", rules={"lmhead": None})


def test_official_compressed_tensors():
    """Quantized and dequantized by the library itself (make_compressed_tensors.py)."""
    model = hub.load(OFFICIAL)
    golden = load_file(OFFICIAL / "golden.safetensors")
    layers = named_layers(model)
    assert golden.keys() == {f"model.{path}.weight" for path in layers}
    for path, layer in layers.items():
        weight = np.asarray(layer.quantized_weight.dequantize())
        assert np.array_equal(np.concatenate([weight[:2], weight[-2:]]), golden[f"model.{path}.weight"]), path
    schemes = {path.rsplit(".", 1)[1]: str(layer.recipe.weight) for path, layer in layers.items()}
    assert schemes["q_proj"] == "e4m3 ·×· f32" and layers["layers.0.self_attn.q_proj"].input_scale[...] == 0.37109375
    assert schemes["k_proj"] == "e4m3 1×· f32" and schemes["o_proj"] == "e4m3 128×128 f32"
    assert schemes["up_proj"] == "e4m3 1×32 e8m0"
    # To transformers 5 experts are no Linear, so "ignore" does not name them.
    assert model.layers[1].mlp.w13.weight.dtype == jnp.bfloat16


def test_experts_share_the_largest_input_scale(static, tmp_path):
    path = edited(static, tmp_path / "out", {f"{EXPERT}.input_scale": np.full(1, 7, np.float32)})
    assert hub.load(path).layers[0].mlp.w2.input_scale[...].tolist() == [[7.0]]
    path = edited(static, tmp_path / "low", {f"{EXPERT}.input_scale": np.full(1, 1e-5, np.float32)})
    assert_same(hub.load(path), hub.load(static))


@pytest.mark.parametrize("code", [None, "e4m3_e4m3_bf16_dynamic"])
def test_progress_counts_the_bytes_of_tensors(tmp_path, code):
    reports = []
    model = hub.load(MIXTRAL, code, progress=lambda *report: reports.append(report))
    size = sum(array.nbytes for array in tensors_of(MIXTRAL).values())
    assert reports[-1] == (size, size) and len(reports) == len(list(Reader(MIXTRAL)))
    assert reports == sorted(set(reports))
    reports.clear()
    hub.save(model, tmp_path / "out", max_shard_bytes=20_000, progress=lambda *report: reports.append(report))
    stored = tensors_of(tmp_path / "out")
    size = sum(array.nbytes for array in stored.values())
    assert reports[-1] == (size, size) and len(reports) == len(stored)
    reports.clear()
    hub.load(tmp_path / "out", progress=lambda *report: reports.append(report))
    assert reports[-1] == (size, size)


def test_harmless_tensors_and_tied_head(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert_same(hub.load(edited(MIXTRAL, tmp_path / "out", extra)), hub.load(MIXTRAL))
    tied = hub.load(edited(MIXTRAL, tmp_path / "tied", tie_word_embeddings=True), "e4m3_bf16")
    assert tied.lm_head is None
    hub.save(tied, tmp_path / "again")
    assert Reader(tmp_path / "again").config["quantization_config"]["ignore"][0] == "lm_head"
    assert_same(tied, hub.load(tmp_path / "again"))


def test_parameters_in_another_type_than_config(tmp_path):
    model = hub.load(MIXTRAL)
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model)))
    hub.save(model, tmp_path / "out")
    assert hub.load(tmp_path / "out").config.dtype == "bfloat16"
    assert_same(model, hub.load(tmp_path / "out"))


@pytest.mark.parametrize(
    ("tensors", "remove", "config", "message"),
    [
        ({}, [f"{EXPERT}.weight"], {}, f"{EXPERT}.weight is missing, which config.json calls for"),
        ({}, ["model.norm.weight", "lm_head.weight"], {}, "model.norm.weight, lm_head.weight are missing"),
        ({"a.b": np.ones(1)}, [], {}, "a.b is not part of what config.json describes"),
        ({f"{EXPERT}.weight_scale": np.ones(1)}, [], {}, "is the quantization_config lost?"),
        ({"model.norm.weight": np.ones(7, np.float32)}, [], {}, r"shape is \[7\], expected \[32\]"),
        ({f"{EXPERT}.weight": np.ones((32, 64), np.float32)}, [], {}, rf"{EXPERT}.weight in .*: shape is \[32, 64\]"),
        ({"lm_head.weight": np.ones((64, 32), np.int32)}, [], {}, "dtype is I32, expected BF16 or F32 or F16"),
        ({}, [], {"num_hidden_layers": 1}, "model.layers.1.*not part of what config.json describes"),
        ({}, [], {"intermediate_size": 2**31 - 1}, r"shape is \[\d+, 32\], expected \[2147483647, 32\]"),
        ({}, [], {"num_hidden_layers": 9999}, r"has 9999 layers and 4 experts, which \d+ tensors can't be"),
        ({}, [], {"num_local_experts": 2**31 - 1}, r"has 2 layers and 2147483647 experts, which \d+ tensors can't be"),
        ({}, [], {"num_hidden_layers": 3}, r"model.layers.2.*and \d+ more are missing"),
        (
            {"model.norm.weight": np.full(32, np.nan, np.float32)},
            [],
            {},
            "model.norm.weight in .*: holds 32 NaN or Inf",
        ),
        ({}, [], {"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
    ],
)
def test_broken_checkpoints(tmp_path, tensors, remove, config, message):
    path = edited(MIXTRAL, tmp_path / "out", tensors, remove, **config)
    with pytest.raises(CheckpointError, match=message):
        hub.load(path)


def test_config_without_a_needed_field(tmp_path):
    config = {key: value for key, value in Reader(MIXTRAL).config.items() if key != "hidden_size"}
    path = edited(MIXTRAL, tmp_path / "out")
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="hidden_size"):
        hub.load(path)


@pytest.mark.parametrize(
    ("tensors", "remove", "message"),
    [
        ({}, [f"{EXPERT}.weight_scale"], f"{EXPERT}.weight_scale is missing"),
        ({}, [f"{EXPERT}.input_scale"], f"{EXPERT}.input_scale is missing"),
        ({f"{EXPERT}.weight_scale": np.ones(2, np.float32)}, [], r"shape is \[2\], expected \[1\]"),
        ({f"{EXPERT}.weight_scale": np.full(1, np.inf, np.float32)}, [], "1 of 1 scales are NaN, infinite"),
        ({f"{EXPERT}.weight": np.ones((32, 32), np.float32)}, [f"{EXPERT}.weight_scale", f"{EXPERT}.input_scale"],
         r"experts.1.w2 is quantized unlike .*experts.0.w2"),
        ({f"{EXPERT}.weight": np.full((32, 32), np.nan, E4M3)}, [], "holds 1024 NaN or Inf of 1024"),
        ({"model.layers.0.self_attn.q_proj.input_scale": np.zeros(1, np.float32)}, [], "activation scale in .* is 0"),
        ({"lm_head.weight": np.ones((64, 32), E4M3)}, [], "dtype is F8_E4M3, expected BF16"),
    ],
)  # fmt: skip
def test_broken_quantized_checkpoints(static, tmp_path, tensors, remove, message):
    with pytest.raises(CheckpointError, match=message):
        hub.load(edited(static, tmp_path / "out", tensors, remove))


def test_nonfinite_weights(tmp_path):
    weight = np.zeros((32, 32), np.float32)
    weight[0, :3] = np.nan, np.inf, -np.inf
    path = edited(MIXTRAL, tmp_path / "out", {f"{EXPERT}.weight": weight})
    for recipe in (None, "e4m3_bf16"):
        with pytest.raises(CheckpointError, match=rf"{EXPERT}.weight in .*{SINGLE}: holds 3 NaN or Inf of 1024"):
            hub.load(path, recipe)
    model = hub.load(path, "e4m3_bf16", allow_nonfinite=True)
    assert np.isnan(model.layers[0].mlp.w2.weight[1, 0, 0])


def test_arguments_of_load(static):
    with pytest.raises(CheckpointError, match=r"is quantized already \(compressed-tensors\); load it without a recipe"):
        hub.load(static, "e4m3_bf16")
    with pytest.raises(CheckpointError, match="is quantized already"):
        hub.load(static, rules={"lm_head": "e4m3_bf16"})
    with pytest.raises(MeshError, match="mesh: axis 'x' is unknown"):
        hub.load(MIXTRAL, mesh=jax.make_mesh((1,), ("x",)))
    with pytest.raises(Fp8xError, match="'fp7' is unknown"):
        hub.load(MIXTRAL, "fp7")
    with pytest.raises(CheckpointError, match="nowhere: does not exist"):
        hub.load(GOLDENS / "nowhere")
    with pytest.raises(ShapeError, match=r"model.layers.0.self_attn.o_proj.weight: dim 1 .* 32 does not divide"):
        hub.load(QWEN, "mxfp8_bf16")


def test_arguments_of_save(static, tmp_path):
    model = hub.load(static)
    with pytest.raises(CheckpointError, match="format: 'gguf' is unknown"):
        hub.save(model, tmp_path / "out", "gguf")
    with pytest.raises(CheckpointError, match=r"static: is the source, .*static, which would be changed"):
        hub.save(model, static)
    with pytest.raises(CheckpointError, match="format: 'fp8' does not fit: the model is not quantized"):
        hub.save(hub.load(MIXTRAL), tmp_path / "out", "fp8")
    config = dataclasses.replace(DecoderConfig.from_hf(Reader(MIXTRAL).config), hf={})
    with pytest.raises(CheckpointError, match=r"model.config.hf: is empty; build .* DecoderConfig.from_hf"):
        hub.save(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), tmp_path / "out")
    uncalibrated = hub.load(MIXTRAL, rules={"layers.0.self_attn.q_proj": Recipe(per_tensor(), per_tensor(), "static")})
    with pytest.raises(CalibrationError, match=r"layers.0.self_attn.q_proj is not calibrated; run fp8x.calibrate"):
        hub.save(uncalibrated, tmp_path / "out")
    with pytest.raises(CheckpointError, match="format: 'fp8' does not fit: the model is a MoE, and Hugging Face's"):
        hub.save(model.layers[0].mlp, tmp_path / "out", "fp8")
    assert list(tmp_path.iterdir()) == []


def test_failure_in_the_middle_of_saving_leaves_nothing(tmp_path, monkeypatch):
    model, add = hub.load(MIXTRAL, "e4m3_bf16"), Writer.add

    def fail(writer, name, array):
        if name == f"{EXPERT}.weight_scale":
            raise RuntimeError("power cut")
        add(writer, name, array)

    monkeypatch.setattr(Writer, "add", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        hub.save(model, tmp_path / "out", max_shard_bytes=1000)
    assert list(tmp_path.iterdir()) == []
