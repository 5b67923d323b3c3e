"""From e8m0 scales to float32 ones: blocks that a power of two keeps exactly, and what is said of them, by float64
numpy and ml_dtypes alone."""

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
            power = next(2.0**e for e in range(-126, 128) if 448 * 2.0**e >= amax)
            is_exact[i, j] = np.array_equal((part / power).astype(E4M3).astype(np.float64) * power, part)
            scales[i, j] = power if is_exact[i, j] else np.float32(amax) * np.float32(1 / 448)
        inverse = np.float32(1) / scales[i, j]
        codes = np.clip(part.astype(np.float32) * inverse, -448, 448).astype(E4M3)
        found[at] = codes.astype(np.float32) * scales[i, j]
    return scales, found, is_exact


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
def test_each_block_that_a_power_of_two_keeps_is_exact(kind, block):
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
