"""Every family against transformers, and through all that can be done with a model."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from golden import GOLDENS, Golden, read_golden
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from metric import as_bits
from safetensors import safe_open
from safetensors.numpy import load_file

import fp8x
from fp8x.checkpoint import Reader, Writer
from fp8x.errors import CheckpointError, RuleError, ShapeError
from fp8x.models import Decoder, DecoderConfig, generate
from fp8x.models.families import FAMILIES
from fp8x.models.latent import LatentAttention
from fp8x.models.loading import get
from fp8x.nn.walk import get_module, named_layers

# Mixtral and Qwen3-MoE are those of the other tests.
NAMES = [
    "llama",
    "llama_bf16",
    "mistral",
    "qwen2_bf16",
    "qwen3",
    "qwen2_moe",
    "glm4_moe",
    "deepseek_v2",
    "deepseek_v2_groups",
    "deepseek_v3",
    "deepseek_v3_direct",
    "gpt_oss",
    "gpt_oss_bf16",
]
BLOCKS = "fp8_e4m3fn_bf16_block_scale"


def some_of_them(*fast: str):
    """The families, of which all but some are slow."""
    cases = [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in NAMES]
    return pytest.mark.parametrize("family", cases, indirect=True)


@pytest.fixture(params=NAMES)
def family(request) -> Golden:
    return read_golden(request.param)


def bits_of(model: nnx.Module) -> dict[str, np.ndarray]:
    return {str(path): as_bits(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_same(actual: nnx.Module, expected: nnx.Module) -> None:
    actual, expected = bits_of(actual), bits_of(expected)
    assert actual.keys() == expected.keys()
    for path, bits in expected.items():
        np.testing.assert_array_equal(actual[path], bits, err_msg=path)


def test_there_is_a_golden_of_each():
    read = {read_golden(name).hf["model_type"] for name in NAMES}
    assert read | {"mixtral", "qwen3_moe"} == set(FAMILIES)


@pytest.mark.sample
@pytest.mark.parametrize("name", [*NAMES, "mixtral_bf16_sharded", "qwen3_moe_bf16"])
@pytest.mark.filterwarnings("ignore:rules. .* is one layer with other matrices")
def test_rules_take_the_names_of_the_checkpoint(name):
    """With and without `model.` and `.weight`, in a plan, in load, and for a decoder that is there."""
    path, code = GOLDENS / name, "e4m3_bf16"
    hf, reader = json.loads((path / "config.json").read_text()), Reader(path)
    last = f"model.layers.{hf['num_hidden_layers'] - 1}."
    shapes = {tensor: reader.stored(tensor).shape for tensor in reader}
    matrices = {tensor for tensor, shape in shapes.items() if len(shape) == 2 and tensor.startswith((last, "lm_head"))}
    forms = [lambda each: each, lambda each: each.removesuffix(".weight"), lambda each: each.removeprefix("model.")]
    kinds = sorted({re.sub(r"experts\.\d+", "experts.1", tensor) for tensor in matrices})
    rules = {forms[i % 3](tensor).replace(".", r"\."): code for i, tensor in enumerate(kinds)}

    plan = fp8x.plan(path, "e4m3_e4m3_bf16_dynamic", rules=rules)
    assert {f"{prefix}.weight" for prefix, each in plan.targets.items() if each.recipe == fp8x.recipe(code)} == matrices
    modules = {path for path, prefixes in plan.modules.items() if f"{prefixes[0]}.weight" in matrices}
    assert set(named_layers(fp8x.load(path, rules=rules))) == modules
    model = nnx.eval_shape(
        lambda: fp8x.quantize_model(Decoder(DecoderConfig.from_hf(hf), rngs=nnx.Rngs(0)), None, rules)
    )
    assert set(named_layers(model)) == modules


@pytest.mark.parametrize(
    "rule", ["model.norm", r"layers\.0\.input_layernorm", r"model\.embed_tokens", r"model\.layers\.0"]
)
def test_rules_for_what_holds_no_matrix(rule):
    path = GOLDENS / "mixtral_bf16_sharded"
    for take in (fp8x.load, fp8x.plan):
        with pytest.raises(RuleError, match=r"rules: .* matches .* alone, .*(norm|vector|embedding|lookup|it holds)"):
            take(path, "e4m3_bf16", rules={rule: None})


def test_logits_and_texts_are_those_of_transformers(family, run):
    ids, expected = family.tensors["ids"], family.tensors["logits_f32"]
    assert np.abs(run(family.model_f32, ids) - expected).max() < 1e-5 * expected.std()
    rounding = np.sqrt(np.mean((family.tensors["logits"] - expected) ** 2))
    if rounding:  # a checkpoint in bf16, where transformers rounds, too
        distance = np.sqrt(np.mean((run(family.model, ids) - family.tensors["logits"]) ** 2))
        assert distance < 1.5 * rounding
    texts = generate(family.model, ids, max_new_tokens=16)  # by a cache
    np.testing.assert_array_equal(texts, np.concatenate([ids, family.tensors["generated"]], axis=1))


@pytest.mark.sample
def test_loaded_saved_and_converted_it_is_the_same(family, tmp_path):
    model = fp8x.load(family.path, BLOCKS)
    assert_same(model, fp8x.quantize_model(fp8x.load(family.path), BLOCKS))
    assert not any(name in path for path in named_layers(model) for name in ("router", "lm_head", "expert_gate"))
    fp8x.save(model, tmp_path / "saved", "fp8")
    fp8x.convert(family.path, tmp_path / "converted", BLOCKS, "fp8")
    for name in ("saved", "converted"):
        assert_same(fp8x.load(tmp_path / name), model)


@pytest.mark.slow
@some_of_them("deepseek_v3", "qwen2_moe")
def test_scales_are_calibrated_and_come_back(family, tmp_path):
    model = fp8x.load(family.path, "e4m3_e4m3_bf16")
    report = fp8x.calibrate(model, [jnp.asarray(family.tensors["ids"])])
    assert set(report.layers) == set(named_layers(model))
    fp8x.save(model, tmp_path / "saved")
    again = fp8x.load(tmp_path / "saved")
    assert_same(again, model)
    logits, exact = (np.asarray(m(family.tensors["ids"])) for m in (again, family.model))
    error = np.linalg.norm(logits - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert np.median(error) < 0.3  # of random weights; a token whose experts fall aside is off by more


def assert_tokens_agree(actual: np.ndarray, expected: np.ndarray, code: str | None) -> None:
    """Sums in another order, which differs by the processor too, may move a code of a quantized input: of one token."""
    error = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    moved = 0 if code is None or fp8x.recipe(code).activation is None else 1
    assert np.sum(error > 1e-5) <= moved, error


@pytest.mark.slow
@some_of_them("llama_bf16", "deepseek_v3", "qwen2_moe")
@pytest.mark.parametrize("code", [None, "e4m3_e4m3_bf16_dynamic"])
def test_on_a_mesh_it_is_one_devices(family, code, tmp_path):
    """Loaded onto it and laid out on it; heads and experts are split, latents are not."""
    config, ids = family.model.config, family.tensors["ids"]
    mesh = mesh_of(tensor=2, **({"expert": 2} if config.mixture else {}))
    recipe = code and dataclasses.replace(fp8x.recipe(code), out_dtype=jnp.float32)
    path = tmp_path / "float32"
    fp8x.save(family.model_f32, path)
    model = fp8x.load(path, recipe)
    placed = fp8x.load(path, recipe, mesh)
    laid = fp8x.sharding.shard(fp8x.load(path, recipe), mesh)
    assert_same(placed, laid)
    assert_tokens_agree(np.asarray(placed(ids)), np.asarray(model(ids)), code)
    np.testing.assert_array_equal(generate(placed, ids, max_new_tokens=4), generate(model, ids, max_new_tokens=4))


@pytest.mark.sample
@pytest.mark.parametrize("name", ["deepseek_v3", "llama"])
def test_no_texts_and_no_tokens_have_no_logits(name):
    model = read_golden(name).model
    assert model(jnp.zeros((0, 4), jnp.int32)).shape == (0, 4, 64)
    assert model(jnp.zeros((2, 0), jnp.int32)).shape == (2, 0, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe", "gpt_oss"])
def test_gradients_reach_every_parameter(name):
    for path, leaf in nnx.to_flat_state(read_golden(name).gradient()):
        assert jnp.all(jnp.isfinite(leaf[...])), path
        # A correction bias chooses, and enters no weight; keys' biases move all scores alike but for the rotation.
        assert jnp.any(leaf[...] != 0) or path[-1] == "correction_bias", path


def with_layer_behind(source: Path, destination: Path, count: int) -> tuple[Path, int]:
    """The checkpoint with a copy of its last layer, of `count`, behind that, and how many tensors are there."""
    with contextlib.closing(Reader(source)) as reader, Writer(destination) as writer:
        writer.add_json("config.json", reader.config)
        stored = {name: reader.stored(name) for name in reader}
        tensors = {name: np.array(reader.read(name, shapes=[s.shape], dtypes=[s.dtype])) for name, s in stored.items()}
        last = f"model.layers.{count - 1}."
        behind = {name.replace(last, f"model.layers.{count}."): v for name, v in tensors.items() if last in name}
        behind[f"model.layers.{count}.eh_proj.weight"] = np.zeros((32, 64), np.float32)
        for name, array in (tensors | behind).items():
            writer.add(name, array)
    return destination, len(behind)


class TestDeepSeek:
    """What its published checkpoints have that ours of transformers have not."""

    @pytest.fixture
    def native(self, tmp_path):
        """In its own dialect, blocks with `weight_scale_inv`, with a layer for multi-token prediction behind."""
        golden = read_golden("deepseek_v3")
        fp8x.save(fp8x.load(golden.path, BLOCKS), tmp_path / "without", "fp8")
        return with_layer_behind(tmp_path / "without", tmp_path / "native", golden.model.config.num_hidden_layers)

    def test_the_native_dialect_is_loaded_bit_for_bit(self, native, tmp_path, run):
        path, behind = native
        with pytest.warns(
            UserWarning, match=rf"{behind} tensors of 1 layers for multi-token prediction are not loaded"
        ):
            model = fp8x.load(path)
        assert_same(model, fp8x.load(read_golden("deepseek_v3").path, BLOCKS))
        dequantized = tmp_path / "dequantized"
        fp8x.convert(path, dequantized, "f32")
        with pytest.warns(UserWarning, match="multi-token prediction"):
            plain = fp8x.load(dequantized)
        kernels = named_layers(model)
        assert len(kernels) == 3 * 5 + 3 + 2 * (2 + 3)  # attention; the dense layer; experts and the shared one
        for path, layer in kernels.items():
            other = get_module(plain, path)
            other = other.kernel[...].T if isinstance(other, nnx.Linear) else other.weight[...]
            np.testing.assert_array_equal(layer.quantized_weight.dequantize(), other, err_msg=path)
        ids = read_golden("deepseek_v3").tensors["ids"]
        exact = np.asarray(run(plain, ids))
        assert np.linalg.norm(run(model, ids) - exact) < 0.4 * np.linalg.norm(exact)  # activations in 8 bits, too
        for layer in kernels.values():
            layer.recipe = fp8x.Recipe(layer.recipe.weight, out_dtype=jnp.float32)
        assert np.linalg.norm(run(model, ids) - exact) < 1e-5 * np.linalg.norm(exact)

    def test_576_rows_are_four_blocks_and_a_half(self, tmp_path):
        """`kv_a_proj_with_mqa` of the published sizes: latents of 512 and 64 dims with positions."""
        sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 1, "num_nextn_predict_layers": 0}
        config = DecoderConfig.from_hf(read_golden("deepseek_v3").hf | sizes)
        fp8x.save(Decoder(config, rngs=nnx.Rngs(0)), tmp_path / "source")
        fp8x.convert(tmp_path / "source", tmp_path / "native", BLOCKS, "fp8")
        name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
        with contextlib.closing(Reader(tmp_path / "native")) as reader:
            assert [reader.stored(name + suffix).shape for suffix in ("", "_scale_inv")] == [(576, 32), (5, 1)]
        layer = fp8x.load(tmp_path / "native").layers[0].self_attn.kv_a_proj_with_mqa
        weight = np.asarray(fp8x.load(tmp_path / "source").layers[0].self_attn.kv_a_proj_with_mqa.kernel[...]).T
        amax = np.array([np.abs(weight[row : row + 128]).max() for row in range(0, 576, 128)], np.float32)
        scale = (amax * np.float32(1 / 448))[:, None]
        np.testing.assert_array_equal(layer.weight_scale[...], scale)
        rows = np.repeat(1 / scale, 128, axis=0)[:576]
        codes = np.clip(weight * rows, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(np.asarray(layer.weight[...]), codes)

    def test_the_correction_bias_stays_in_float32(self):
        model = fp8x.load(read_golden("deepseek_v3").path)
        bias = model.layers[1].mlp.correction_bias
        assert bias.dtype == jnp.float32 and np.ptp(np.asarray(bias[...])) > 0.1

    def test_a_cache_holds_latents(self):
        model = read_golden("deepseek_v3").model
        cache = model.init_cache(2, 7)
        assert [leaf.shape for leaf in cache.layers[0]] == [(2, 7, 1, 20), (2, 7, 1, 8)]

    @pytest.mark.slow
    def test_tokens_read_one_by_one_are_those_read_at_once(self):
        golden = read_golden("deepseek_v3")
        np.testing.assert_allclose(golden.logits_in_pieces(), golden.tensors["logits_f32"], atol=1e-4)

    @pytest.mark.sample
    @pytest.mark.parametrize("code", [None, "e4m3_bf16", BLOCKS, "e4m3_e4m3_bf16"])
    def test_folded_into_queries_and_output_it_is_the_same(self, code, monkeypatch):
        """What `kv_b_proj` makes of the latents, also where it quantizes them."""
        golden = read_golden("deepseek_v3")
        model, ids = nnx.clone(golden.model_f32), golden.tensors["ids"]
        if code is not None:
            fp8x.quantize_model(model, dataclasses.replace(fp8x.recipe(code), out_dtype=jnp.float32))
        if code == "e4m3_e4m3_bf16":
            fp8x.calibrate(model, [ids])
        logits = []
        for is_folded in (True, False):
            monkeypatch.setattr(LatentAttention, "_is_folded", lambda *_, is_folded=is_folded: is_folded)
            logits.append(np.asarray(nnx.jit(lambda model, ids: model(ids))(model, ids)))
        assert_tokens_agree(*logits, code)

    def test_it_is_folded_where_that_is_less_work(self):
        """By the sizes of DeepSeek-V3: 512 · 256 products make a head's key and value; each read costs 768 more."""
        sizes = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
        config = DecoderConfig.from_hf(read_golden("deepseek_v3").hf | sizes)
        layer = nnx.eval_shape(lambda: LatentAttention(config, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))
        assert [layer._is_folded(tokens, 4096) for tokens in (1, 163, 164, 4096)] == [True, True, False, False]
        assert [layer._is_folded(tokens, tokens) for tokens in (1, 2, 64)] == [False] * 3

    def test_a_width_that_no_block_fits_is_named(self, tmp_path):
        """A latent of 24 dims is no multiple of MX's 32."""
        with pytest.raises(ShapeError, match="q_b_proj"):
            fp8x.load(read_golden("deepseek_v3").path, "mxfp8_bf16")

    def test_a_layer_behind_the_skipped_one_is_unknown(self, native, tmp_path):
        path, _ = native
        two, _ = with_layer_behind(path, tmp_path / "two", 4)
        with pytest.raises(CheckpointError, match=r"model.layers.4.* not part of what config.json describes"):
            fp8x.load(two)


class TestGptOss:
    """Its sinks, its experts in one tensor, and these in MXFP4, by transformers, which dequantizes them."""

    @staticmethod
    def assert_stored_alike(saved: Path, expected: Path) -> None:
        saved, expected = (load_file(folder / "model.safetensors") for folder in (saved, expected))
        assert saved.keys() == expected.keys()
        for name, array in expected.items():
            assert (saved[name].dtype, saved[name].shape) == (array.dtype, array.shape), name
            assert saved[name].tobytes() == array.tobytes(), name

    @pytest.mark.parametrize(
        ("name", "format"), [("gpt_oss", None), ("gpt_oss_bf16", None), ("gpt_oss_mxfp4", "mxfp4")]
    )
    @pytest.mark.parametrize("axes", [{}, pytest.param({"tensor": 2, "expert": 2}, marks=pytest.mark.slow)], ids=str)
    def test_it_is_saved_as_transformers_saves_it(self, name, format, axes, tmp_path):
        golden, done = read_golden(name), []
        model = fp8x.load(golden.path, mesh=mesh_of(**axes) if axes else None)
        fp8x.save(model, tmp_path / "saved", format, progress=lambda *counts: done.append(counts))
        self.assert_stored_alike(tmp_path / "saved", golden.path)
        assert done[-1][0] == done[-1][1]
        if format is not None:
            written = json.loads((tmp_path / "saved" / "config.json").read_text())
            assert written["quantization_config"] == golden.hf["quantization_config"]

    def test_experts_in_mxfp4_are_those_of_transformers(self, run, tmp_path):
        golden = read_golden("gpt_oss_mxfp4")
        ids, expected = golden.tensors["ids"], golden.tensors["logits_f32"]
        assert set(named_layers(golden.model)) == {f"layers.{i}.mlp.{name}" for i in range(2) for name in ("w13", "w2")}
        assert {layer.recipe for layer in named_layers(golden.model).values()} == {fp8x.recipe("mxfp8_bf16")}
        dequantized = fp8x.load(golden.path, "f32")
        assert not named_layers(dequantized)
        assert np.abs(run(dequantized, ids) - expected).max() < 1e-5 * expected.std()
        rounding = np.sqrt(np.mean((golden.tensors["logits"] - expected) ** 2))
        for model in (golden.model, fp8x.load(golden.path, "bf16")):
            distance = np.sqrt(np.mean((np.asarray(run(model, ids)) - golden.tensors["logits"]) ** 2))
            assert distance < 1.5 * rounding
            texts = generate(model, ids, max_new_tokens=16)
            np.testing.assert_array_equal(texts, np.concatenate([ids, golden.tensors["generated"]], axis=1))

    @pytest.mark.parametrize(
        ("dtypes", "expected"),
        [
            ("BF16", "bfloat16"),
            ("F16", "float16"),
            ("F32", "float32"),
            ("BF16 F32", "float32"),
        ],
    )
    def test_without_a_word_no_parameter_is_rounded(self, dtypes, expected, tmp_path):
        """config.json names no type, as the published ones; parameters may be in another than theirs."""
        golden = read_golden("gpt_oss_mxfp4")
        hf = {name: value for name, value in golden.hf.items() if name != "torch_dtype"}
        types = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
        with Writer(tmp_path / "in") as writer:
            for name, array in load_file(golden.path / "model.safetensors").items():
                floats = types[dtypes.split()[-1 if name.endswith("bias") else 0]]
                writer.add(name, array if array.dtype == np.uint8 else array.astype(floats))
            writer.add_json("config.json", hf)
        model = fp8x.load(tmp_path / "in")
        assert model.config.dtype == expected
        fp8x.save(model, tmp_path / "saved", "mxfp4")
        assert_same(fp8x.load(tmp_path / "saved"), model)
        assert json.loads((tmp_path / "saved" / "config.json").read_text()).get("dtype", "bfloat16") == expected
        fp8x.convert(tmp_path / "in", tmp_path / "mxfp8")
        assert_same(fp8x.load(tmp_path / "mxfp8"), model)
        fp8x.convert(tmp_path / "in", tmp_path / "bf16", "bf16")
        assert_same(fp8x.load(tmp_path / "bf16"), fp8x.load(tmp_path / "in", "bf16"))

    @pytest.mark.sample
    @pytest.mark.parametrize(
        ("recipe", "format"),
        [(None, "compressed-tensors"), ("f32", None), (None, "mxfp4"), (None, "mxfp4-pack-quantized")],
    )
    def test_experts_in_mxfp4_come_back(self, recipe, format, tmp_path):
        """Saved and converted: in 8 bits, out of them, and in 4."""
        golden = read_golden("gpt_oss_mxfp4")
        model = fp8x.load(golden.path, recipe)
        fp8x.save(model, tmp_path / "saved", format)
        fp8x.convert(golden.path, tmp_path / "converted", recipe, format)
        for name in ("saved", "converted"):
            assert_same(fp8x.load(tmp_path / name), model)

    def test_experts_in_mxfp4_are_requantized(self, tmp_path):
        golden = read_golden("gpt_oss_mxfp4")
        model = fp8x.load(golden.path, requantize=BLOCKS)
        fp8x.convert(golden.path, tmp_path / "converted", format="fp8", requantize=BLOCKS)
        assert_same(fp8x.load(tmp_path / "converted"), model)
        placed = fp8x.load(golden.path, mesh=mesh_of(tensor=2, expert=2), requantize=BLOCKS)
        assert_same(placed, fp8x.sharding.shard(model, mesh_of(tensor=2, expert=2)))

    def test_one_scale_across_experts_leaves_each_its_bias(self):
        path, recipe = read_golden("gpt_oss_bf16").path, fp8x.Recipe(fp8x.Scheme("e4m3", block=(None, None, None)))
        rules = {r"layers\.\d\.mlp\.w(13|2)": recipe}
        assert_same(fp8x.load(path, rules=rules), fp8x.quantize_model(fp8x.load(path), None, rules))

    @pytest.mark.slow
    @pytest.mark.parametrize("axes", [{"tensor": 2}, {"expert": 2}, {"tensor": 2, "expert": 2}], ids=str)
    def test_experts_in_mxfp4_on_a_mesh(self, axes, run):
        golden, mesh = read_golden("gpt_oss_mxfp4"), mesh_of(**axes)
        placed, ids = fp8x.load(golden.path, mesh=mesh), golden.tensors["ids"]
        assert_same(placed, fp8x.sharding.shard(fp8x.load(golden.path), mesh))
        rounding = np.sqrt(np.mean((golden.tensors["logits"] - golden.tensors["logits_f32"]) ** 2))
        assert np.sqrt(np.mean((np.asarray(placed(ids)) - golden.tensors["logits"]) ** 2)) < 1.5 * rounding

    def test_quantized_experts_are_saved_one_by_one(self, tmp_path):
        """Each with its bias; those of the layer that stays in 16 bits together."""
        golden = read_golden("gpt_oss_bf16")
        model = fp8x.load(golden.path, "e4m3_bf16", rules={r"layers\.1\.mlp\.w(13|2)": None})
        fp8x.save(model, tmp_path / "saved")
        with safe_open(tmp_path / "saved" / "model.safetensors", "np") as file:
            names = {name for name in file.keys() if "experts" in name}  # noqa: SIM118
        parts = [
            f"{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "weight_scale", "bias")
        ]
        together = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        assert names == {f"model.layers.0.mlp.experts.{e}.{part}" for e in range(4) for part in parts} | {
            f"model.layers.1.mlp.experts.{name}" for name in together
        }
        assert_same(fp8x.load(tmp_path / "saved"), model)

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ("mxfp8_bf16", r"'mxfp4' holds the experts of gpt-oss alone; layers.0.self_attn.q_proj.* not; use 'mxfp4-"),
            ("e4m3_bf16", r"'mxfp4': weights .* are not in MX blocks"),
        ],
    )
    def test_what_mxfp4_does_not_hold(self, code, message, tmp_path):
        model = fp8x.load(read_golden("gpt_oss_bf16").path, code)
        with pytest.raises(CheckpointError, match=message):
            fp8x.save(model, tmp_path / "saved", "mxfp4")
        assert not (tmp_path / "saved").exists()

    def test_codes_that_e2m1_has_not(self, tmp_path):
        rules = {r"layers\.\d\.mlp\.w(13|2)": "mxfp8_bf16"}
        model = fp8x.load(read_golden("gpt_oss_bf16").path, rules=rules)
        with pytest.raises(CheckpointError, match=r"mlp.experts.gate_up_proj: \d+ of \d+ codes are none of e2m1's"):
            fp8x.save(model, tmp_path / "saved", "mxfp4")
        assert not (tmp_path / "saved").exists()

    @pytest.mark.parametrize(("code", "heads"), [(None, 4), (BLOCKS, 64)])
    def test_sinks_lie_where_their_heads_do(self, code, heads, run):
        """Blocks of 128 rows hold 32 heads of 12 dims on the first device: of the four that there are it has all."""
        golden, recipe = read_golden("gpt_oss"), code and dataclasses.replace(fp8x.recipe(code), out_dtype=jnp.float32)
        placed, ids = fp8x.load(golden.path, recipe, mesh_of(tensor=2)), golden.tensors["ids"]
        sinks = placed.layers[0].self_attn.sinks
        assert sinks.get_metadata("spec") == P("tensor") and sinks.shape == (heads,)
        expected = np.zeros(heads, np.float32)
        expected[:4] = golden.model.layers[0].self_attn.sinks[...]
        np.testing.assert_array_equal(np.asarray(sinks[...]), expected)
        assert_tokens_agree(np.asarray(placed(ids)), np.asarray(run(fp8x.load(golden.path, recipe), ids)), code)

    def test_a_rule_for_sinks_is_refused(self):
        for take in (fp8x.load, fp8x.plan):
            with pytest.raises(RuleError, match=r"rules: .*sinks.* vector"):
                take(read_golden("gpt_oss_bf16").path, "e4m3_bf16", rules={r"model\.layers\.0\.self_attn\.sinks": None})

    def test_a_plan_says_why_router_and_sinks_stay(self):
        plan = fp8x.plan(read_golden("gpt_oss_bf16").path, "e4m3_bf16")
        reasons = {row.name: row.reason for row in plan.groups}
        assert reasons["model.layers.*.mlp.router.weight"] == "a router"
        assert reasons["model.layers.*.self_attn.sinks"] == "a vector or a number"

    def test_a_sink_matters_and_so_does_a_bias(self, run):
        """The goldens show it: without, logits are others."""
        golden = read_golden("gpt_oss")
        layer = "layers.1."
        for path in ("self_attn.sinks", "self_attn.o_proj.bias", "mlp.router.bias", "mlp.w13.bias", "mlp.w2.bias"):
            model = nnx.clone(golden.model)
            variable = get(model, layer + path)
            variable.set_value(jnp.zeros_like(variable[...]))
            moved = np.abs(np.asarray(run(model, golden.tensors["ids"])) - golden.tensors["logits"]).max()
            assert moved > 0.1 * golden.tensors["logits"].std(), path
