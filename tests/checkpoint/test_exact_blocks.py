"""From e8m0 scales to float32 ones: of two scales each block's better one, blocks that a power of two keeps exactly,
and what is said of them, by float64 numpy and ml_dtypes alone."""

import dataclasses
import json
import math
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import fp8x
from fp8x import numerics
from fp8x.array import ScaledArray
from fp8x.checkpoint import Reader, rows
from fp8x.checkpoint.exact import products
from fp8x.checkpoint.inspect import inspect
from fp8x.errors import CheckpointError
from fp8x.recipe import Recipe
from fp8x.scheme import E8M0, Scheme, mx, per_row, per_tensor

E4M3 = ml_dtypes.float8_e4m3fn
BLOCK = fp8x.recipe("fp8_e4m3fn_bf16_block_scale")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)
E4M3_VALUES = E4M3_VALUES[np.isfinite(E4M3_VALUES)]


def write_mx(path, **matrices: tuple[np.ndarray, np.ndarray]):
    """A checkpoint of `quant_method: mxfp8`: of each matrix what its codes `[N, K]` say, and bytes `[N, K / 32]`."""
    tensors = {}
    for name, (values, bytes_) in matrices.items():
        tensors[f"{name}.weight"] = np.asarray(values, np.float64).astype(E4M3)
        tensors[f"{name}.weight_scale_inv"] = np.asarray(bytes_, np.uint8)
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    quantization = {"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32]}
    config = {"model_type": "other", "dtype": "bfloat16", "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    return path


def truth_of(values: np.ndarray, bytes_: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float64) * np.repeat(2.0 ** (np.asarray(bytes_, np.float64) - 127), 32, axis=1)


def by_hand(truth: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales, what the codes stand for in float64, and which blocks are exact."""
    (n, k), shape = block, [-(-size // extent) for size, extent in zip(truth.shape, block)]
    scales, is_exact, found = np.ones(shape, np.float32), np.ones(shape, bool), np.zeros_like(truth)
    for i, j in np.ndindex(*shape):
        at = (slice(i * n, (i + 1) * n), slice(j * k, (j + 1) * k))
        part, amax = truth[at], np.abs(truth[at]).max(initial=0)
        if amax:
            power = np.float32(next(2.0**e for e in range(-126, 128) if 448 * 2.0**e >= amax))
            own = np.float32(amax) * np.float32(1 / 448)
            of_power, of_own = (np.abs(codes_of(part, scale) * float(scale) - part).max() for scale in (power, own))
            is_exact[i, j] = of_power == 0
            scales[i, j] = own if of_own < 0.71 * of_power else power
        found[at] = codes_of(part, scales[i, j]).astype(np.float32) * scales[i, j]
    return scales, found, is_exact


def codes_of(part: np.ndarray, scale: np.float32) -> np.ndarray:
    return np.clip(part.astype(np.float32) * (np.float32(1) / scale), -448, 448).astype(E4M3).astype(np.float64)


def random_mx(shape, values, binades: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random codes, and bytes that lie up to so many binades apart: a number of their own in each 128 rows, so that
    some blocks are exact and others not. With zero blocks, a lone outlier, and zeros of both signs."""
    rng, (n, k) = np.random.default_rng(seed), shape
    codes = rng.choice(values, shape)
    spread = np.repeat([[0], *rng.integers(0, binades + 1, (-(-n // 128), 1))], 128, axis=0)[:n]
    bytes_ = 120 + np.rint(rng.random((n, k // 32)) * spread).astype(int)
    codes[:, 128:256] = np.where(np.arange(128) % 2, 0.0, -0.0)
    bytes_[-1, -1], codes[-1, -32:] = 150, values.max()
    return codes, bytes_


KINDS = {"e2m1": E2M1, "e4m3": E4M3_VALUES, "no subnormals": E4M3_VALUES[np.abs(E4M3_VALUES) >= 1]}


@pytest.mark.parametrize("block", [(128, 128), (1, 128), (1, None), (None, None), (None, 32), (48, 40)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_block_has_the_better_scale(kind, block):
    codes, bytes_ = random_mx((300, 352), KINDS[kind], 20)
    truth = truth_of(codes, bytes_)
    scheme = Scheme("e4m3", block=block)
    scales, values, is_exact = by_hand(truth, scheme.block_of(truth.shape))
    assert block[0] is None or 0 < is_exact.sum() < is_exact.size  # (128:256 holds zeros, the last block an outlier)
    source = ScaledArray(jnp.asarray(codes.astype(E4M3)), jnp.asarray(bytes_, jnp.uint8).view(E8M0), mx())
    for requantize in (numerics.requantize, jax.jit(numerics.requantize, static_argnames="scheme")):
        found = requantize(source, scheme=scheme)
        assert found.scheme == scheme and np.array_equal(np.asarray(found.scale), scales)
        back = np.asarray(found.dequantize(), np.float64)
        assert np.array_equal(back, values) and np.array_equal(np.signbit(back), np.signbit(truth))
    same = np.repeat(np.repeat(is_exact, scheme.block_of(truth.shape)[0], 0), scheme.block_of(truth.shape)[1], 1)
    same = same[: truth.shape[0], : truth.shape[1]]
    assert np.array_equal(back[same], truth[same])


@pytest.mark.parametrize(("values", "reach"), [((6.0, 0.5), 14), ((6.0, 1.5), 14), ((4.0, 4.0), 17), ((448.0, 9.0), 9)])
def test_how_far_apart_bytes_may_be(values, reach):
    """6 · 2^b needs the scale 2^(b - 6), whose smallest step is 2^(b - 15): multiples of 1/2 are kept 14 binades below.
    4 · 2^b has the same, and 4 is kept 17 binades below. Of 448 · 2^b the scale is 2^b, and 9 is kept 9 below."""
    for binades, expected in ((reach, True), (reach + 1, False)):
        row = np.zeros((1, 64))
        row[0, 0], row[0, 32] = values
        scale = jnp.asarray([[100 + binades, 100]], jnp.uint8).view(E8M0)
        found = numerics.requantize(ScaledArray(jnp.asarray(row.astype(E4M3)), scale, mx()), per_row())
        is_exact = np.array_equal(np.asarray(found.dequantize(), np.float64), truth_of(row, [[100 + binades, 100]]))
        assert is_exact == expected, binades


def snr(found: np.ndarray, truth: np.ndarray) -> float:
    return 10 * math.log10(np.square(truth).sum() / np.square(found - truth).sum())


@pytest.mark.parametrize("block", [(128, 128), (1, None), (None, None)], ids=str)
def test_one_small_code_costs_its_block_nothing_else(block):
    """Of 16,384 codes one is odd and subnormal, and its byte 4 below the others'. All but it stay what they were."""
    codes = np.random.default_rng(0).choice(E4M3_VALUES[np.abs(E4M3_VALUES) >= 1], (128, 128))
    bytes_ = np.full((128, 4), 127)
    codes[5, 32:64], bytes_[5, 1], codes[:, 127] = 0, 123, 448
    codes[5, 40] = 3 * 2.0**-9
    truth = truth_of(codes, bytes_)
    source = ScaledArray(jnp.asarray(codes.astype(E4M3)), jnp.asarray(bytes_, jnp.uint8).view(E8M0), mx())
    scheme = Scheme("e4m3", block=block)
    found = np.asarray(numerics.requantize(source, scheme).dequantize(), np.float64)
    assert [tuple(at) for at in np.argwhere(found != truth)] == [(5, 40)] and snr(found, truth) > 100
    codes[:, 127] = 416  # amax / 448 is no power of two here, and rounds all codes that are not 416 times one
    truth = truth_of(codes.clip(-416, 416), bytes_)
    source = dataclasses.replace(source, data=jnp.asarray(codes.clip(-416, 416).astype(E4M3)))
    found = np.asarray(numerics.requantize(source, scheme).dequantize(), np.float64)
    assert np.count_nonzero(found != truth) == 1 and snr(found, truth) > 100
    assert snr(np.asarray(numerics.quantize(source.dequantize(), scheme).dequantize(), np.float64), truth) < 40


@pytest.mark.parametrize(("small", "is_better"), [(20.0, True), (24.0, False), (1.125, False)])
def test_amax_where_it_is_clearly_better(small, is_better):
    """256 · 2^12 and powers of two below are exact by 2^20 / 448 = 2340.6, too, whose smallest step is 4.571. That of
    4096 is 8: of 20 it leaves 16, and 4.571 · 4 = 18.286. 24 is three of these, and 1.125 is lost by either: of equals
    the power of two."""
    row = np.zeros((1, 64))
    row[0, :4], row[0, 32:34] = [256, 128, -64, 1], [small, -small]
    bytes_ = [[139, 127]]
    source = ScaledArray(jnp.asarray(row.astype(E4M3)), jnp.asarray(bytes_, jnp.uint8).view(E8M0), mx())
    found = numerics.requantize(source, per_row())
    own = np.float32(2**20) * np.float32(1 / 448)
    assert np.asarray(found.scale).tolist() == [[own if is_better else 4096.0]]
    expected = {20.0: 128 / 7, 24.0: 24.0, 1.125: 0.0}[small]
    values = np.asarray(found.dequantize())[0]
    assert values[[0, 1, 2, 3, 32, 33]] == pytest.approx([2**20, 2**19, -(2**18), 2**12, expected, -expected], rel=1e-6)
    # Where products with a scale may be subnormal, it is not chosen.
    for down, chosen in ((98, is_better), (99, False)):
        source = dataclasses.replace(source, scale=(jnp.asarray(bytes_, jnp.uint8) - down).view(E8M0))
        scale = np.asarray(numerics.requantize(source, per_row()).scale)
        assert scale.tolist() == [[np.ldexp(own if chosen else np.float32(4096.0), -down)]]


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@pytest.mark.parametrize("axis", [0, 1])
def test_errors_are_those_of_float64_however_they_are_computed(element, axis):
    """Eager and compiled, of whole blocks and of their parts: two of float32's bits are all that may be missing."""
    scheme = Scheme(element, block=(None, None))
    codes, bytes_ = random_mx((512, 256), E4M3_VALUES, 12)
    x = jnp.asarray(truth_of(codes, bytes_), jnp.float32).reshape(64, 8, 256)
    amax = numerics.block_amax(x, scheme)

    def of_both(x):
        return [numerics.largest_error(x, scale, scheme) for scale in numerics.candidate_scales(amax, scheme)]

    eager = np.stack(of_both(x))
    halves = [np.stack(jax.jit(of_both)(part)) for part in jnp.split(x, 2, axis + 1)]
    assert np.array_equal(eager, np.maximum(*halves)) and np.array_equal(eager, np.stack(jax.jit(of_both)(x)))
    for error, scale in zip(eager, numerics.candidate_scales(amax, scheme)):
        scale, truth = np.asarray(scale), np.asarray(x)
        limit, dtype = scheme.max, scheme.dtype
        codes = np.clip(truth * (np.float32(1) / scale), -limit, limit).astype(dtype).astype(np.float64)
        expected = np.abs(codes * scale - truth.astype(np.float64)).max((1, 2))
        assert np.asarray(error).ravel() == pytest.approx(expected, rel=2.0**-22)


@pytest.mark.parametrize("rule", ["pow2", "unit"])
def test_float32_scales_that_are_powers_of_two_are_a_source_as_good(rule):
    """Here each code is kept, by a scale that 448 and the largest code need: 1.5 · 2^-5 becomes 1.5 · 2^8, say."""
    values = np.random.default_rng(0).choice(E2M1, (64, 64)) * 2.0**-7
    source = numerics.quantize(jnp.asarray(values, jnp.float32), Scheme("e4m3", block=(32, 32), scale_rule=rule))
    found = numerics.requantize(source, per_row())
    assert np.array_equal(np.asarray(found.dequantize(), np.float64), values)
    assert set(np.unique(np.asarray(found.scale))) <= {2.0**power for power in (-15, -14, -13, -12, -11)}


def test_other_rules_and_sources_are_as_they_were():
    codes, bytes_ = random_mx((64, 64 * 4), E2M1, 3)
    source = ScaledArray(jnp.asarray(codes.astype(E4M3)), jnp.asarray(bytes_, jnp.uint8).view(E8M0), mx())
    channels = numerics.quantize(source.dequantize(), per_row())
    for q, scheme in (
        (source, Scheme("e4m3", block=(128, 128), scale_rule="pow2")),
        (source, Scheme("e5m2", block=(None, None), scale_rule="unit")),
        (source, mx()),
        (channels, Scheme("e4m3", block=(128, 128))),
    ):
        found, expected = numerics.requantize(q, scheme), numerics.quantize(q.dequantize(), scheme)
        assert np.array_equal(np.asarray(found.scale), np.asarray(expected.scale))
        assert np.asarray(found.data).tobytes() == np.asarray(expected.data).tobytes()


@pytest.mark.parametrize("chunk", [1 << 14, 1 << 21])
@pytest.mark.parametrize(
    ("format", "recipe"),
    [
        ("fp8", BLOCK),
        ("fp8", Recipe(Scheme("e4m3", block=(48, 40)), Scheme("e4m3", block=(1, 40)), "dynamic")),
        ("compressed-tensors", BLOCK),
        ("compressed-tensors", "e4m3_e4m3_bf16_dynamic"),
        ("compressed-tensors", Recipe(per_tensor(), per_row(), "dynamic")),
    ],
)
def test_a_conversion_counts_exact_blocks(tmp_path, monkeypatch, format, recipe, chunk):
    """2880 = 22.5 · 128 columns, and ragged rows."""
    monkeypatch.setattr(rows, "CHUNK_BYTES", chunk)
    matrices = {"a": random_mx((300, 2880), E2M1, 20), "b": random_mx((200, 320), E4M3_VALUES, 1, seed=1)}
    path = write_mx(tmp_path / "mx", **matrices)
    fp8x.convert(path, tmp_path / "out", recipe, format)
    found = inspect(tmp_path / "out", reference=path)
    block, totals = fp8x.recipe(recipe).weight if isinstance(recipe, str) else recipe.weight, np.zeros(6)
    for row, (name, (codes, bytes_)) in zip(found.rows, matrices.items(), strict=True):
        truth = truth_of(codes, bytes_)
        extents = block.block_of(truth.shape)
        scales, values, is_exact = by_hand(truth, extents)
        reader = Reader(tmp_path / "out")
        (scale,) = (each for each in reader if each.startswith(f"{name}.weight_scale"))
        stored = reader.read(scale, shapes=[reader.stored(scale).shape], dtypes=["F32"])
        assert row.name == f"{name}.weight" and np.array_equal(stored.reshape(scales.shape), scales)
        same = np.repeat(np.repeat(is_exact, extents[0], 0), extents[1], 1)[: truth.shape[0], : truth.shape[1]]
        # A block that no power of two keeps may still be right to float32's last bit, by chance.
        lossy = np.add.reduceat(values != truth, np.arange(0, truth.shape[0], extents[0]), 0)
        lossy = np.add.reduceat(lossy, np.arange(0, truth.shape[1], extents[1]), 1) > 0
        assert (row.blocks, row.exact_blocks) == (is_exact.size, np.count_nonzero(~lossy)) and not lossy[is_exact].any()
        wide = np.repeat(np.repeat(lossy, extents[0], 0), extents[1], 1)[: truth.shape[0], : truth.shape[1]]
        assert np.array_equal(values[same], truth[same])
        signal, noise = np.square(truth[wide]).sum(), np.square(values - truth).sum()
        assert row.differing == np.count_nonzero(values != truth)
        assert row.inexact_signal == pytest.approx(signal, rel=1e-6) and row.noise == pytest.approx(noise, rel=1e-5)
        totals += [truth.size, row.differing, row.blocks, row.exact_blocks, signal, noise]
    exactness = found.exactness
    assert [exactness.values, exactness.differing, exactness.blocks, exactness.exact_blocks] == totals[:4].tolist()
    assert exactness.snr == pytest.approx(10 * math.log10(totals[4] / totals[5]), abs=1e-4)
    assert f"{int(totals[3]):,} of {int(totals[2]):,} blocks are exact; {int(totals[1]):,} of " in str(exactness)


def test_a_resumed_conversion_reports_the_same(tmp_path):
    matrices = {name: random_mx((256, 2880), E2M1, 20, seed) for seed, name in enumerate("abcd")}
    path = write_mx(tmp_path / "mx", **matrices)
    fp8x.convert(path, tmp_path / "once", BLOCK)

    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fp8x.convert(path, tmp_path / "out", BLOCK, max_shard_bytes=800_000, progress=interrupt)
    assert fp8x.convert(path, tmp_path / "out", BLOCK, max_shard_bytes=800_000).bytes_resumed > 0
    once, resumed = (inspect(tmp_path / name, reference=path) for name in ("once", "out"))
    assert once.rows == resumed.rows and once.exactness == resumed.exactness
    assert 0 < once.exactness.exact_blocks < once.exactness.blocks


def test_nothing_is_lost_between_dialects(tmp_path):
    matrix = random_mx((64, 320), E4M3_VALUES, 100)
    path = write_mx(tmp_path / "mx", a=matrix)
    fp8x.convert(path, tmp_path / "out", format="compressed-tensors")
    found = inspect(tmp_path / "out", reference=path).exactness
    assert (found.values, found.differing, found.blocks, found.exact_blocks, found.snr) == (20480, 0, 640, 640, None)
    assert str(found) == "nothing was lost: every one of 20,480 values is the source's, bit for bit"
    # The sentence is what a comparison found: one sign of a zero more, and it is not said.
    file, start = tmp_path / "out" / "model.safetensors", Reader(tmp_path / "out").stored("a.weight").start
    with file.open("r+b") as opened:
        opened.seek(start + 128)
        assert opened.read(1) == b"\x80"
        opened.seek(start + 128)
        opened.write(b"\x00")
    found = inspect(tmp_path / "out", reference=path).exactness
    assert (found.differing, found.exact_blocks, found.noise) == (1, 639, 0.0)
    assert str(found).startswith("639 of 640 blocks are exact; 1 of 20,480 values differ")


def test_dequantized_matrices_are_compared_by_value(tmp_path):
    path = write_mx(tmp_path / "mx", a=random_mx((64, 320), E4M3_VALUES, 20))
    fp8x.convert(path, tmp_path / "out", "bf16")
    (row,) = inspect(tmp_path / "out", reference=path).rows
    assert (row.differing, row.blocks, row.exact_blocks, row.inexact_signal) == (0, None, None, 0.0)
    found = inspect(path, reference=tmp_path / "out").exactness
    assert (found.differing, found.blocks, found.exact_blocks) == (0, 640, 640)
    # Three mantissa bits fit float16, but not this range: 2^-9 · 2^-20 is zero there.
    codes = np.full((16, 32), 2.0**-9)
    fp8x.convert(write_mx(tmp_path / "low", a=(codes, np.full((16, 1), 107))), tmp_path / "half", "f16")
    found = inspect(tmp_path / "half", reference=tmp_path / "low").exactness
    assert (found.differing, found.blocks, found.snr) == (512, 0, 0.0)
    assert str(found) == "512 of 512 values differ from the source's, at 0.0 dB"


class TestBeyondFloat32:
    def matrix(self, byte: int) -> tuple[np.ndarray, np.ndarray]:
        """One group of 32 of this byte in each of two rows, of sixteen."""
        codes = np.zeros((16, 64))
        codes[:, :6] = [448, 1.125, 2.0**-6, 2.0**-9, -3 * 2.0**-9, -0.0]
        codes[1, 32:38] = codes[1, :6]
        return codes, np.array([[byte, 127], [127, byte]] + [[127, 127]] * 14)

    @pytest.mark.parametrize("byte", [0, 1, 2])
    def test_small_values_become_zero_and_a_warning(self, tmp_path, byte):
        codes, bytes_ = self.matrix(byte)
        truth = truth_of(codes, bytes_)
        is_small = (truth != 0) & (np.abs(truth) < 2.0**-126)
        path = write_mx(tmp_path / "mx", a=(codes, bytes_))
        message = rf"a.weight: {is_small.sum()} of 1024 values lie below 2\^-126, .*become zero on a CPU"
        with pytest.warns(UserWarning, match=message):
            fp8x.convert(path, tmp_path / "out", "e4m3_e4m3_bf16_dynamic")
        found = np.asarray(numerics.dequantize(_stored(tmp_path / "out", per_row())), np.float64)
        assert not found[is_small].any()
        # The first row alone is small: 448 · 2^(byte - 127) has the scale 2^-126, or what it needs.
        assert np.array_equal(found[0], np.where(is_small[0], 0, truth[0]))
        (row,) = inspect(tmp_path / "out", reference=path).rows
        stored = products(_stored(tmp_path / "out", per_row()))
        assert row.differing == np.count_nonzero((stored != truth) | (np.signbit(stored) != np.signbit(truth)))
        assert row.differing >= is_small.sum() and row.noise == np.square(stored - truth).sum() > 0
        assert row.signal == np.square(truth).sum() and (row.blocks, row.exact_blocks) == (16, 14)

    @pytest.mark.parametrize("byte", [0, 1, 2, 253, 254])
    def test_another_dialect_keeps_all_of_them(self, tmp_path, byte):
        codes, bytes_ = self.matrix(byte)
        path = write_mx(tmp_path / "mx", a=(codes, bytes_))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fp8x.convert(path, tmp_path / "out", format="compressed-tensors")
        (row,) = inspect(tmp_path / "out", reference=path).rows
        assert (row.differing, row.exact_blocks, row.noise) == (0, 32, 0.0)
        assert row.signal == np.square(truth_of(codes, bytes_)).sum()
        assert np.array_equal(products(_stored(tmp_path / "out", mx())), truth_of(codes, bytes_))

    @pytest.mark.parametrize(("byte", "count"), [(253, 0), (254, 0), (254, 2)])
    def test_large_values_are_refused_where_float32_has_none(self, tmp_path, byte, count):
        codes, bytes_ = self.matrix(byte)
        codes[0, 0] = codes[1, 32] = 1.0 if not count else 448.0
        path = write_mx(tmp_path / "mx", a=(codes, bytes_))
        if not count:
            fp8x.convert(path, tmp_path / "out", "e4m3_e4m3_bf16_dynamic")
            found = np.asarray(numerics.dequantize(_stored(tmp_path / "out", per_row())), np.float64)
            assert np.array_equal(found[0], truth_of(codes, bytes_)[0])  # all are kept: 2^-9 · 2^127 of 1.125 · 2^127
            return
        with pytest.raises(CheckpointError, match=r"a.weight in .*: holds 2 NaN or Inf of 1024 values"):
            fp8x.convert(path, tmp_path / "out", "e4m3_e4m3_bf16_dynamic")


def _stored(path, scheme: Scheme) -> ScaledArray:
    reader = Reader(path)
    tensors = {}
    for name in ("a.weight", "a.weight_scale"):
        tensor = reader.stored(name)
        tensors[name] = reader.read(name, shapes=[tensor.shape], dtypes=[tensor.dtype])
    return ScaledArray(tensors["a.weight"], tensors["a.weight_scale"].view(scheme.scale_dtype), scheme)
