"""Keys and values in 8 bits: what attention makes of them, caches of every scheme, and calibration of their scales."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from golden import read_golden
from meshes import IDS, mesh_of, run, tiny
from metric import assert_close, float64

import fp8x
from fp8x import Scheme
from fp8x.errors import CalibrationError, RecipeError, ShapeError
from fp8x.models import Decoder
from fp8x.models.attention import attend
from fp8x.models.kv_cache import KeyValues
from fp8x.models.kv_quantizer import KVQuantizer
from fp8x.scheme import E8M0, KV_HEAD, KV_TENSOR, per_row
from fp8x.sharding import shard

TENSOR, HEAD, TOKEN = Scheme("e4m3", block=KV_TENSOR), Scheme("e4m3", block=KV_HEAD), per_row()
MX = Scheme("e4m3", block=(1, 4), scale_dtype=E8M0)
UNIT = Scheme("e5m2", block=KV_TENSOR, scale_rule="unit")
SCHEMES = [TENSOR, HEAD, TOKEN, MX, UNIT, per_row("e5m2")]

extend = nnx.jit(Decoder.extend)


def quantizer(scheme: Scheme, heads: int, dim: int) -> KVQuantizer:
    scale = {TENSOR: 0.02, HEAD: np.linspace(0.01, 0.03, heads)}.get(scheme)
    return KVQuantizer(scheme, (heads, dim), scale)


@pytest.mark.sample
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_attention_reads_8_bits(scheme, dtype):
    """The softmax of products with dequantized keys, in float64, by hand."""
    rng = np.random.default_rng(0)
    b, t, s, h, kv, d, v = 2, 3, 7, 6, 2, 8, 12
    query, key, value = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((b, t, h, d), (b, s, kv, d), (b, s, kv, v))
    )
    mask = rng.random((b, t, s)) < 0.7
    mask[..., 0] = True
    stored = KeyValues(quantizer(scheme, kv, d)(key), quantizer(scheme, kv, v)(value))
    assert {array.data.dtype for array in stored} == {scheme.dtype}
    keys, values = (np.repeat(float64(array), h // kv, axis=2) for array in stored)
    scores = np.einsum("bthd,bshd->bhts", float64(query), keys) * 0.3
    weights = np.where(mask[:, None], np.exp(scores), 0)
    expected = np.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdims=True), values)
    actual = jax.jit(attend, static_argnums=4)(query, *stored, mask, 0.3)
    assert actual.dtype == dtype
    # The weights are rounded once, and so is the result.
    assert_close(actual, expected, tolerance=2 * float(jnp.finfo(dtype).eps) + 2.0**-18)


@pytest.mark.parametrize("scheme", [None, HEAD, TOKEN], ids=str)
def test_a_sink_takes_weight_and_gives_no_value(scheme):
    """One logit more for each head of queries, in float64, by hand; without a key to see it takes all."""
    rng = np.random.default_rng(0)
    b, t, s, h, kv, d = 2, 3, 7, 6, 2, 8
    query, key, value = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((b, t, h, d), (b, s, kv, d), (b, s, kv, d))
    )
    sinks = np.array([-3, 0, 1, 2, 5, 90], np.float32)
    mask = rng.random((b, t, s)) < 0.7
    stored = (
        KeyValues(key, value) if scheme is None else KeyValues(*(quantizer(scheme, kv, d)(x) for x in (key, value)))
    )
    keys, values = (np.repeat(float64(array), h // kv, axis=2) for array in stored)
    scores = np.einsum("bthd,bshd->bhts", float64(query), keys) * 0.3
    weights = np.where(mask[:, None], np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True) + np.exp(float64(sinks))[:, None, None]
    actual = jax.jit(attend, static_argnums=4)(query, *stored, mask, 0.3, sinks)
    assert_close(actual, np.einsum("bhts,bshv->bthv", weights, values), tolerance=2.0**-18)
    nothing = attend(query, *stored, np.zeros_like(mask), 0.3, sinks)
    assert np.all(np.asarray(nothing) == 0)


def test_codes_are_those_of_ml_dtypes():
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 8)).astype(np.float32)
    scale = np.array([0.01, 0.03], np.float32)
    stored = KVQuantizer(HEAD, (2, 8), scale)(jnp.asarray(x))
    by_hand = np.clip(x * (1 / scale)[:, None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(stored.data), by_hand)


@pytest.mark.sample
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_cache_changes_nothing(name, scheme, run):
    """A text in pieces through a cache, and texts of other lengths beside it, as at once without one."""
    golden = read_golden(name)
    model, ids = nnx.clone(golden.model_f32), jnp.asarray(golden.tensors["ids"])
    layers = len(model.layers)
    heads = 1 if model.config.latent else model.config.num_key_value_heads
    scales = {TENSOR: [(0.02, 0.02)] * layers, HEAD: [(np.full(heads, 0.02),) * 2] * layers}.get(scheme)
    model.set_kv_cache(scheme, scales)
    expected = np.asarray(run(model, ids))
    hidden, cache = extend(model, ids[:, :7], model.init_cache(2, 12), jnp.array([7, 4]))
    more, cache = extend(model, jnp.stack([ids[0, 7:11], ids[1, 4:8]]), cache)
    np.testing.assert_array_equal(cache.length, [11, 8])
    logits = model.logits(jnp.concatenate([hidden, more], axis=1))
    close = {"rtol": 0, "atol": 1e-3 * expected.std()}
    np.testing.assert_allclose(logits[0], expected[0, :11], **close)
    np.testing.assert_allclose(logits[1, [0, 1, 2, 3, 7, 8, 9, 10]], expected[1, :8], **close)


def test_bytes_of_a_cache():
    """Half of bf16, and a scale a token and head of 16 dims."""
    model = tiny(None)
    size = lambda dtype: sum(leaf.nbytes for leaf in jax.tree.leaves(model.init_cache(4, 32, dtype).layers))  # noqa: E731
    elements = 2 * 4 * 32 * 2 * 16
    assert size("bf16") == 2 * elements
    assert size("e4m3") == elements + 4 * elements // 16
    model.set_kv_cache(TENSOR, [(0.02, 0.02)])
    assert size("e4m3") == size(None) == elements + 2 * 4 * 2 * 4  # one number, for each row's heads
    assert size("f32") == 4 * elements


def test_what_a_cache_holds_is_asked_for_or_declared():
    model = tiny(None)
    held = lambda dtype=None: model.init_cache(1, 4, dtype).layers[0].keys  # noqa: E731
    assert model.kv_cache is None and held().dtype == jnp.float32
    for kind in ("e4m3", jnp.float8_e4m3fn, TOKEN):
        assert held(kind).scheme == TOKEN
    assert held("e5m2").scheme == per_row("e5m2") and held(jnp.bfloat16).dtype == jnp.bfloat16
    model.set_kv_cache(HEAD, [([0.02, 0.03], [0.01, 0.04])])
    for kind in (None, "e4m3", HEAD):
        np.testing.assert_array_equal(held(kind).scale.reshape(-1), np.float32([0.02, 0.03]))
    assert held(TOKEN).scheme == TOKEN
    model.set_kv_cache(None)
    assert model.kv_cache is None and held().dtype == jnp.float32


@pytest.mark.parametrize(
    ("dtype", "scales", "error", "message"),
    [
        (TENSOR, None, CalibrationError, r"kv_cache: its scales are missing; run fp8x\.calibrate"),
        ("e4m4", None, RecipeError, r"dtype: 'e4m4' is no type for keys and values; use 'e4m3', 'e5m2', .*'bf16'"),
        ("bf16", None, RecipeError, r"dtype: 'bf16' is no 8-bit type"),
        (Scheme("e4m3", block=(128, 128)), None, RecipeError, r"scheme: e4m3 128×128 f32 does not fit keys and values"),
        (Scheme("e4m3", block=(1, 5), scale_dtype=E8M0), None, ShapeError, r"scheme: dim 3 .* is 16, which 5 does not"),
        (TENSOR, [(1.0, 1.0)] * 2, ShapeError, r"scales: are of 2 layers, but the model has 1"),
        ("e4m3", [(1.0, 1.0)], RecipeError, r"scales: 'e4m3' takes none; give them with Scheme\('e4m3', block=\(None,"),
        (TENSOR, [1.0], ShapeError, r"scales: those of layer 0 are 1\.0; give one of keys and one of values"),
        (TENSOR, [(1.0, None)], ShapeError, r"scales: those of layer 0 are \(1\.0, None\); give one of keys"),
        (
            TENSOR,
            [(1.0, [1.0, 2.0])],
            ShapeError,
            r"layers\.0\.self_attn\.v_scale: shape is \[2\], but e4m3 ·×·×·×· f32 takes 1 for 2 heads",
        ),
        (HEAD, [([1.0, 0.0], [1.0, 2.0])], ShapeError, r"k_scale: \[1\.0, 0\.0\] are not all finite and positive"),
    ],
)
def test_what_does_not_fit_is_named(dtype, scales, error, message):
    model = tiny(None)
    with pytest.raises(error, match=message):
        model.set_kv_cache(dtype, scales)
        model.init_cache(1, 4)


def test_latents_have_one_scale():
    model = nnx.clone(read_golden("deepseek_v3").model)
    with pytest.raises(ShapeError, match=r"layers\.0\.self_attn: 0\.1 and 0\.2 differ, but one is for the"):
        model.set_kv_cache(TENSOR, [(0.1, 0.2)] * len(model.layers))


@pytest.mark.sample
@pytest.mark.parametrize(("kind", "block"), [(True, KV_TENSOR), ("head", KV_HEAD)])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v2"])
def test_scales_follow_from_the_largest_keys_and_values(name, kind, block, run):
    """What a cache in float32 has seen says how large they are."""
    golden = read_golden(name)
    model, ids = nnx.clone(golden.model_f32), golden.tensors["ids"]
    _, seen = extend(model, ids, model.init_cache(*ids.shape))
    report = fp8x.calibrate(model, [ids[:1], ids[1:]], kv_cache=kind)
    is_latent = model.config.latent is not None
    assert model.kv_cache.block == (KV_TENSOR if is_latent else block)
    for index, layer in enumerate(seen.layers):
        axes = (0, 1, 2, 3) if model.kv_cache.block == KV_TENSOR else (0, 1, 3)
        keys, values = (np.abs(np.asarray(array)).max(axes).reshape(1, -1) for array in layer)
        if is_latent:
            keys = values = np.maximum(keys, values)
        attention = model.layers[index].self_attn
        for cache, amax in ((attention.k_cache, keys), (attention.v_cache, values)):
            np.testing.assert_allclose(cache.input_scale[...], amax * np.float32(1 / 448), rtol=1e-5)
        assert report.layers[f"layers.{index}.self_attn.k_cache"].tokens == ids.size
    exact = golden.tensors["logits_f32"]
    error = np.sqrt(np.mean((np.asarray(run(model, ids)) - exact) ** 2)) / exact.std()
    assert 0 < error < 0.2  # random weights: a code moves much


@pytest.mark.slow
def test_no_gradient_is_lost():
    """Codes have none: keys and values would never learn."""
    model = tiny(None)
    model.set_kv_cache("e4m3")
    gradient = nnx.grad(lambda model: model(IDS).sum())
    with pytest.raises(
        RecipeError, match=r"keys and values in 8 bits pass no gradient on; call model\.set_kv_cache\(None\)"
    ):
        gradient(model)
    model.set_kv_cache(None)
    assert jnp.any(gradient(model)["layers"][0]["self_attn"]["k_proj"]["kernel"][...] != 0)


def test_layers_keep_their_scales_if_asked():
    model = tiny("e4m3_e4m3_bf16")
    before = np.asarray(model.layers[0].mlp.w13.input_scale[...])
    report = fp8x.calibrate(model, [IDS], kv_cache=True, kv_cache_only=True)
    assert set(report.layers) == {f"layers.0.self_attn.{name}_cache" for name in "kv"}
    np.testing.assert_array_equal(model.layers[0].mlp.w13.input_scale[...], before)
    with pytest.raises(CalibrationError, match="kv_cache_only: the model's keys and values have no static scales"):
        fp8x.calibrate(tiny("e4m3_e4m3_bf16"), [IDS], kv_cache_only=True)


def test_a_cache_may_be_donated():
    model = tiny(None, num_hidden_layers=2)
    step = jax.jit(lambda cache: model.extend(IDS, cache)[1], donate_argnums=0)
    assert step(model.init_cache(4, 5, "e4m3")).length == 5


@pytest.mark.sample
@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_other_methods_find_scales_too(method):
    model = tiny(None)
    fp8x.calibrate(model, [IDS], kv_cache="head", method=method)
    whole = tiny(None)
    fp8x.calibrate(whole, [IDS], kv_cache="head")
    for one, other in zip(model.layers, whole.layers):
        ratio = one.self_attn.k_cache.input_scale[...] / other.self_attn.k_cache.input_scale[...]
        assert ((ratio > 0.1) & (ratio < 1.5)).all()


def test_a_calibration_that_fails_changes_nothing():
    model = tiny(None)
    model.set_kv_cache(HEAD, [([0.02, 0.03], [0.01, 0.04])])

    def batches():
        yield IDS
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        fp8x.calibrate(model, batches(), kv_cache="tensor")
    assert model.kv_cache == HEAD
    np.testing.assert_array_equal(model.layers[0].self_attn.k_cache.input_scale[...], np.float32([[0.02, 0.03]]))
    for kind in ("layer", TOKEN, 1.5):
        with pytest.raises(CalibrationError, match=r"kv_cache: .* does not fit; use True, 'tensor', 'head', or"):
            fp8x.calibrate(model, [IDS], kv_cache=kind)
    with pytest.raises(CalibrationError, match="kv_cache: a Linear has none that fp8x knows; give an fp8x Decoder"):
        fp8x.calibrate(fp8x.nn.Linear(8, 8, recipe="e4m3_e4m3_bf16", rngs=nnx.Rngs(0)), [IDS], kv_cache=True)


def test_a_model_without_its_scales_says_so():
    model = tiny(None)
    model.set_kv_cache(TENSOR)
    with pytest.raises(CalibrationError, match=r"kv_cache: its scales are missing"):
        model(IDS)
    with pytest.raises(CalibrationError, match=r"kv_cache: its scales are missing"):
        nnx.jit(lambda model, ids: model(ids))(model, IDS)
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.k_cache, .* are not calibrated"):
        fp8x.models.generate(model, IDS, max_new_tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"tensor": 4, "data": 2}], ids=str)
@pytest.mark.parametrize("kind", ["head", "tensor"])
def test_on_a_mesh(axes, kind, tmp_path):
    """Two heads of keys over two devices or, copied, over four: the same scales, logits, and files."""
    model, placed = tiny(None), shard(tiny(None), mesh_of(**axes))
    expected = fp8x.calibrate(model, [IDS], kv_cache=kind)
    report = fp8x.calibrate(placed, [IDS], kv_cache=kind)
    for path, layer in expected.layers.items():
        np.testing.assert_allclose(report.layers[path].scale, layer.scale, rtol=1e-5, err_msg=path)
    pairs = [
        [quantizer.input_scale[...] for quantizer in (layer.self_attn.k_cache, layer.self_attn.v_cache)]
        for layer in model.layers
    ]
    placed.set_kv_cache(model.kv_cache, pairs)  # to the last bit
    assert_close(placed(IDS), run(model, IDS), tolerance=2.0**-10)
    hidden, cache = placed.extend(IDS[:, :3], placed.init_cache(4, 5))
    more, cache = placed.extend(IDS[:, 3:], cache)
    assert_close(placed.logits(jnp.concatenate([hidden, more], axis=1)), run(model, IDS), tolerance=2.0**-10)
    for each, name in ((model, "one"), (placed, "many")):
        fp8x.save(each, tmp_path / name)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "many/model.safetensors").read_bytes()
    again = fp8x.load(tmp_path / "one", mesh=mesh_of(**axes))
    np.testing.assert_array_equal(again(IDS), placed(IDS))


@pytest.mark.slow
def test_a_model_on_a_mesh_keeps_the_scales_it_had():
    model = tiny(None)
    model.set_kv_cache(HEAD, [([0.02, 0.03], [0.01, 0.04])])
    expected = run(model, IDS)
    assert_close(shard(model, mesh_of(tensor=2))(IDS), expected, tolerance=2.0**-10)
