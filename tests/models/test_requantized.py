"""Models from 8 bits to other 8 bits: loaded so, and converted and then loaded, bit for bit."""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from metric import float64
from safetensors.numpy import load_file, save_file
from small import assert_same
from synthetic import make_amax_better

import fp8x
from fp8x import numerics
from fp8x.checkpoint import Reader
from fp8x.checkpoint.inspect import inspect
from fp8x.errors import CalibrationError, CheckpointError, RecipeError, RuleError
from fp8x.nn.walk import named_layers
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme, per_row, per_tensor

GOLDENS = Path(__file__).parents[1] / "goldens" / "fp8"
CHANNEL = fp8x.recipe("e4m3_e4m3_bf16_dynamic")
SMALL_BLOCK = Recipe(Scheme("e4m3", block=(32, 32)), Scheme("e4m3", block=(1, 32)), "dynamic")
STATIC_BLOCK = dataclasses.replace(SMALL_BLOCK, activation=per_tensor(), activation_scale="static")


@functools.partial(jax.jit, static_argnums=1)
def requantize(q, scheme):
    """There and back."""
    return numerics.requantize(q, scheme).dequantize()


@pytest.fixture(scope="module")
def mx(tiny_checkpoint, tmp_path_factory) -> Path:
    """A Mixtral in MXFP8 of which magnitudes are far apart: in even experts and in attention from row to row, in odd
    ones from one 32 of K to the next."""
    path = tmp_path_factory.mktemp("requantized")
    shutil.copytree(tiny_checkpoint, path / "plain")
    tensors, rng = load_file(path / "plain" / "model.safetensors"), np.random.default_rng(0)
    for name, array in tensors.items():
        if "_proj" in name or ".experts." in name:
            n, k = array.shape
            is_odd = ".experts." in name and int(name.split(".experts.")[1][0]) % 2
            powers = np.repeat(rng.integers(-8, 9, (1, k // 32)), 32, axis=1) if is_odd else rng.integers(-8, 9, (n, 1))
            tensors[name] = (array.astype(np.float32) * 2.0**powers).astype(ml_dtypes.bfloat16)
    save_file(tensors, path / "plain" / "model.safetensors")
    fp8x.convert(path / "plain", path / "mx", "mxfp8_mxfp8_bf16")
    return path / "mx"


@pytest.mark.sample
@pytest.mark.parametrize(
    ("name", "requantize"),
    [
        ("mxfp8", "hopper"),
        ("compressed_tensors_mxfp8", (CHANNEL, SMALL_BLOCK)),
        ("modelopt_mixed", "hopper"),
        ("compressed_tensors_channel", SMALL_BLOCK),
        ("fp8_block_ragged", "hopper"),
        ("hf_block_fused_ue8m0", ["mxfp8_bf16", "e4m3_bf16"]),
        ("hf_tensor_fused_static", "hopper"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_loading_is_converting_and_loading(name, requantize, tmp_path):
    done = fp8x.convert(GOLDENS / name, tmp_path / "out", requantize=requantize)
    loaded, before = fp8x.load(GOLDENS / name, requantize=requantize), named_layers(fp8x.load(GOLDENS / name))
    assert_same(loaded, fp8x.load(tmp_path / "out"))
    assert {path: layer.recipe for path, layer in named_layers(loaded).items()} == done.requantization.recipes
    assert done.requantization.recipes.keys() == before.keys()  # what was in 16 bits stays so
    fp8x.save(loaded, tmp_path / "again")
    assert_same(fp8x.load(tmp_path / "again"), loaded)


def test_experts_choose_together(mx, tmp_path):
    """Of the even ones each would take channels, of the odd ones blocks."""
    found, wishes = fp8x.choose_recipes(mx, (CHANNEL, SMALL_BLOCK)), set()
    layers = named_layers(fp8x.load(mx))
    for choice in found.choices:
        if ".mlp." not in choice.module:
            continue
        truth, noises = float64(layers[choice.module].quantized_weight), {}
        for candidate in (choice.chosen, *choice.others):
            back = requantize(layers[choice.module].quantized_weight, candidate.recipe.weight)
            by_expert = np.square(np.asarray(back, np.float64) - truth).reshape(len(truth), -1).sum(1)
            noises[candidate.recipe] = by_expert
            assert candidate.noise == pytest.approx(by_expert.sum(), rel=1e-12) and candidate.noise > 0
            assert candidate.signal == pytest.approx(np.square(truth).sum(), rel=1e-14)
        assert choice.chosen.recipe == min(noises, key=lambda recipe: noises[recipe].sum())
        for expert in range(len(truth)):
            wish = min(noises, key=lambda recipe, expert=expert: noises[recipe][expert])
            wishes.add((choice.module, wish.weight.block))
    assert {("layers.0.mlp.w13", (1, None)), ("layers.0.mlp.w13", (32, 32))} <= wishes
    fp8x.convert(mx, tmp_path / "out", requantize=found)
    assert_same(fp8x.load(mx, requantize=found), fp8x.load(tmp_path / "out"))


@pytest.mark.parametrize("recipe", [SMALL_BLOCK, CHANNEL], ids=["block", "channel"])
def test_the_better_scale_of_each_block_is_that_of_a_conversion(recipe, mx, tmp_path):
    """By the rule amax, of which no choice is left."""
    mx = shutil.copytree(mx, tmp_path / "mx")
    make_amax_better(mx, "q_proj", "v_proj", "experts.1.w1")
    found = fp8x.choose_recipes(mx, recipe)
    amax = [next(each for each in (choice.chosen, *choice.others) if each.recipe == recipe) for choice in found.choices]
    choices = zip(found.choices, amax, strict=True)
    found = dataclasses.replace(found, choices=tuple(dataclasses.replace(each, chosen=its) for each, its in choices))
    loaded = fp8x.load(mx, requantize=found)
    fp8x.convert(mx, tmp_path / "out", recipe)
    assert_same(loaded, fp8x.load(tmp_path / "out"))
    scales = [np.asarray(layer.weight_scale[...]).ravel() for layer in named_layers(loaded).values()]
    is_power = np.frexp(np.concatenate(scales))[0] == 0.5
    assert 0 < is_power.sum() < is_power.size
    exactness = inspect(tmp_path / "out", reference=mx).exactness
    assert 0 < exactness.exact_blocks < exactness.blocks and exactness.snr > 100


def test_mxfp8_becomes_what_hopper_runs_nearly_unchanged(mx):
    """Weights that powers of two keep, where amax / 448 would round each of them."""
    before, after = named_layers(fp8x.load(mx)), named_layers(fp8x.load(mx, requantize="hopper"))
    for path, layer in after.items():
        assert np.mean(float64(layer.quantized_weight) == float64(before[path].quantized_weight)) > 0.9, path
        assert layer.recipe.weight.scale_rule == "pow2"
        rows = Scheme("e4m3", block=(1, 128)) if layer.recipe.weight.block == (128, 128) else per_row()
        assert (layer.recipe.activation, layer.recipe.activation_scale) == (rows, "dynamic")


def test_layers_go_on_returning_the_type_of_the_checkpoint(tiny_checkpoint, tmp_path):
    tensors = {
        name: array.astype(np.float16) for name, array in load_file(tiny_checkpoint / "model.safetensors").items()
    }
    shutil.copytree(tiny_checkpoint, tmp_path / "half")
    save_file(tensors, tmp_path / "half" / "model.safetensors")
    text = (tmp_path / "half" / "config.json").read_text().replace('"bfloat16"', '"float16"')
    (tmp_path / "half" / "config.json").write_text(text)
    fp8x.convert(tmp_path / "half", tmp_path / "mx", "mxfp8_f16")
    recipes = {
        layer.recipe.out_dtype for layer in named_layers(fp8x.load(tmp_path / "mx", requantize="hopper")).values()
    }
    assert recipes == {np.dtype(np.float16)}


@pytest.mark.slow
def test_static_scales_are_those_of_the_source(tmp_path):
    source = GOLDENS / "hf_block_static"  # 32×32, and a scale of activations
    tensor = fp8x.recipe("e4m3_e4m3_bf16")
    done = fp8x.convert(source, tmp_path / "out", requantize=tensor)
    loaded, before = fp8x.load(source, requantize=tensor), named_layers(fp8x.load(source))
    assert_same(loaded, fp8x.load(tmp_path / "out"))
    assert all(choice.chosen.noise > 0 for choice in done.requantization.choices)
    for path, layer in named_layers(loaded).items():
        assert layer.recipe.is_static and layer.weight_scheme.block == (None, None)
        assert np.asarray(layer.input_scale[...]).tobytes() == np.asarray(before[path].input_scale[...]).tobytes()
    dynamic = fp8x.load(source, requantize="hopper")
    assert all(layer.input_scale is None for layer in named_layers(dynamic).values())
    bare = fp8x.load(source, requantize="e5m2_e5m2_bf16")
    assert all(np.asarray(layer.input_scale[...]) == 1 for layer in named_layers(bare).values())


def test_static_scales_that_nobody_knows(mx, tmp_path):
    message = (
        r"requantize: model.layers.0.self_attn.q_proj is in .*mx without the static activation scales of the recipe "
    )
    with pytest.raises(CalibrationError, match=message + "e4m3_e4m3_bf16, pow2 weights; name recipes with dynamic"):
        fp8x.load(mx, requantize=("hopper", "e4m3_e4m3_bf16"))
    with pytest.raises(CalibrationError, match=message + "e4m3_e4m3_bf16"):
        fp8x.convert(mx, tmp_path / "out", requantize="e4m3_e4m3_bf16")
    with pytest.raises(CalibrationError, match=message + "e4m3 32×32 f32 pow2 by e4m3 ·×· f32 -> bfloat16;"):
        fp8x.load(mx, requantize=STATIC_BLOCK)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_scales_of_a_kv_cache_come_along(mx, tmp_path):
    model = fp8x.load(mx)
    fp8x.calibrate(model, [np.arange(16).reshape(2, 8)], kv_cache=True)
    fp8x.save(model, tmp_path / "kv")
    loaded = fp8x.load(tmp_path / "kv", requantize="hopper")
    fp8x.convert(tmp_path / "kv", tmp_path / "out", requantize="hopper")
    assert loaded.kv_cache is not None
    assert_same(loaded, fp8x.load(tmp_path / "out"))


def test_progress(mx):
    seen = []
    fp8x.load(mx, requantize="hopper", progress=lambda *pair: seen.append(pair))
    reader = Reader(mx)
    measured = sum(reader.stored(name).nbytes for name in reader if reader.stored(name).dtype == "F8_E4M3")
    assert (measured, measured) in seen and seen[-1][0] == seen[-1][1] > measured


def test_what_does_not_fit(mx, tiny_checkpoint):
    with pytest.raises(RecipeError, match="requantize: stands beside recipe"):
        fp8x.load(mx, "mxfp8_bf16", requantize="hopper")
    with pytest.raises(RuleError, match="requantize chooses recipes"):
        fp8x.load(mx, rules={".*": None}, requantize="hopper")
    with pytest.raises(CheckpointError, match=r"requantize: nothing in .*tiny is in 8 bits; give a recipe"):
        fp8x.load(tiny_checkpoint, requantize="hopper")
    with pytest.raises(CheckpointError, match="or requantize in the place of recipe"):
        fp8x.load(mx, "mxfp8_bf16")
    other = fp8x.choose_recipes(GOLDENS / "fp8_block_ragged")
    with pytest.raises(CheckpointError, match=r"requantize: layers.0.self_attn.q_proj, .* not among the choices"):
        fp8x.load(mx, requantize=other)


def test_a_finite_code_whose_value_is_not(mx, tmp_path):
    fp8x.convert(mx, tmp_path / "a", "e4m3_bf16")
    name, file = "model.layers.0.self_attn.q_proj", tmp_path / "a" / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(Reader(tmp_path / "a").stored(f"{name}.weight_scale").start)
        opened.write(np.float32(3e38).tobytes())
    other = fp8x.choose_recipes(mx, "fp8_e4m3fn_bf16_block_scale")
    for requantize in ("fp8_e4m3fn_bf16_block_scale", other):
        with pytest.raises(CheckpointError, match=rf"{name}.weight in .*: holds \d+ NaN or Inf of 4096 values"):
            fp8x.load(tmp_path / "a", requantize=requantize)
        with pytest.raises(CheckpointError, match=rf"{name}.weight in .*: holds \d+ NaN or Inf of 4096 values"):
            fp8x.convert(tmp_path / "a", tmp_path / "b", requantize=requantize)
    assert jax.tree.leaves(nnx.state(fp8x.load(tmp_path / "a", requantize=other, allow_nonfinite=True)))
