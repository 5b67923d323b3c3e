"""Matrices in e4m3fnuz: ml_dtypes says what they mean; fp8x has the same numbers in e4m3fn."""

import json
import shutil
import struct
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fp8x
from fp8x.checkpoint import FORMATS, Reader, Writer, fnuz, rows
from fp8x.checkpoint.inspect import inspect
from fp8x.errors import CheckpointError
from fp8x.models.loading import get
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme, mx, per_row, per_tensor

COMPRESSED = FORMATS["compressed-tensors"]
GOLDEN = Path(__file__).parents[1] / "goldens" / "fp8" / "compressed_tensors_channel"
E4M3FN, E4M3FNUZ = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz
LARGEST = (0x7F, 0xFF)
# Odd multiples of 2^-10 below 2^-6, by definition of the type.
BETWEEN = [byte for byte in range(256) if (byte & 0x7F) < 16 and byte % 2]


def write(path: Path, tensors: dict[str, np.ndarray], config: dict | None = None) -> Path:
    """A checkpoint whose uint8 matrices are e4m3fnuz, which safetensors' numpy has no word for."""
    with Writer(path) as writer:
        writer.add_json("config.json", config or {})
        for name, array in tensors.items():
            writer.add(name, array)
    is_fnuz = {name for name, array in tensors.items() if name.endswith(".weight") and array.dtype == np.uint8}
    content = (path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for name in is_fnuz:
        header[name]["dtype"] = "F8_E4M3FNUZ"
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return path


def read(path: Path) -> dict[str, np.ndarray]:
    reader = Reader(path)
    stored = {name: reader.stored(name) for name in reader}
    return {name: np.array(reader.read(name, shapes=[t.shape], dtypes=[t.dtype])) for name, t in stored.items()}


def decoded(path: Path, codes: np.ndarray, scale: np.ndarray, scheme: Scheme) -> np.ndarray:
    """What fp8x makes of a matrix, in float64, by ml_dtypes."""
    stored = scale.reshape(1) if scheme == per_tensor() else scale
    reader = Reader(write(path, {"a.weight": codes, "a.weight_scale": stored}))
    weight, _ = COMPRESSED.decode("a", Recipe(scheme), codes.shape, reader)
    assert weight.data.dtype == E4M3FN
    return np.asarray(weight.data).astype(np.float64) * spread(np.asarray(weight.scale), scheme, codes.shape)


def spread(scale: np.ndarray, scheme: Scheme, shape: tuple[int, int]) -> np.ndarray:
    block = scheme.block_of(shape)
    return scale.astype(np.float64).repeat(block[0], 0).repeat(block[1], 1)[: shape[0], : shape[1]]


def random_codes(shape: tuple[int, int], without: tuple[int, ...] = ()) -> np.ndarray:
    """All bytes but NaN and these."""
    fits = np.array([byte for byte in range(256) if byte not in (0x80, *without)], np.uint8)
    return np.random.default_rng(0).choice(fits, shape)


@pytest.mark.parametrize("chunk", [1, 1 << 22])
@pytest.mark.parametrize(
    "scheme", [per_tensor(), per_row(), Scheme("e4m3", block=(3, 8)), Scheme("e4m3", block=(1, 8)), mx()], ids=str
)
def test_values_survive_exactly_where_they_can(tmp_path, monkeypatch, scheme, chunk):
    """Blocks without ±240 keep every value; those with it keep all but the values between two of e4m3fn."""
    monkeypatch.setattr(fnuz, "CHUNK_BYTES", chunk)
    shape = (10, 64)
    codes = random_codes(shape, without=LARGEST)
    holders = np.zeros(scheme.scale_shape(shape), bool)
    holders[-1, -1] = holders[0, 0] = True
    wide = spread(holders, scheme, shape).astype(bool)
    codes[wide & np.isin(codes, BETWEEN)] = 0x7F
    scale = np.random.default_rng(1).uniform(1e-3, 2, holders.shape).astype(np.float32)
    if scheme.is_mx:
        scale = np.random.default_rng(1).integers(100, 140, holders.shape).astype(np.uint8)
    numbers = scale.view(ml_dtypes.float8_e8m0fnu) if scheme.is_mx else scale
    expected = codes.view(E4M3FNUZ).astype(np.float64) * spread(numbers, scheme, shape)
    np.testing.assert_array_equal(decoded(tmp_path / "a", codes, scale, scheme), expected)


def test_values_that_are_rounded(tmp_path):
    """2^-10 lies between 0 and 2^-9, 3·2^-10 between 2^-9 and 2^-8: to the even byte. Only beside 240."""
    codes = np.array([[0x7F, 0x01, 0x03, 0x83, 0x02], [0x01, 0x03, 0x83, 0x02, 0x7E]], np.uint8)
    with pytest.warns(UserWarning, match=r"a.weight in .*: 3 of 10 values in e4m3fnuz lie between two of e4m3fn"):
        found = decoded(tmp_path / "a", codes, np.ones((2, 1), np.float32), per_row())
    np.testing.assert_array_equal(found[0], [240, 0, 2**-8, -(2**-8), 2**-9])
    np.testing.assert_array_equal(found[1], [2**-10, 3 * 2**-10, -3 * 2**-10, 2**-9, 224])


def test_scales_that_can_not_be_halved(tmp_path):
    """Half of the smallest normal float32, or of byte 0, is none that kernels compute with: values move instead."""
    codes = np.array([[0x7E, 0x40], [0x7E, 0x40]], np.uint8)
    scale = np.array([[2.0**-126], [2.0**-125]], np.float32)
    np.testing.assert_array_equal(
        decoded(tmp_path / "f32", codes, scale, per_row()), codes.view(E4M3FNUZ).astype(np.float64) * scale
    )
    codes, scale = np.full((1, 64), 0x7E, np.uint8), np.array([[0, 1]], np.uint8)
    expected = np.repeat([224 * 2.0**-127, 224 * 2.0**-126], 32)[None]
    np.testing.assert_array_equal(decoded(tmp_path / "e8m0", codes, scale, mx()), expected)


def test_empty_matrices(tmp_path):
    for index, shape in enumerate([(0, 4), (4, 0)]):
        scale = np.ones(per_row().scale_shape(shape), np.float32)
        assert decoded(tmp_path / str(index), np.zeros(shape, np.uint8), scale, per_row()).shape == shape


def test_scales_of_zero(tmp_path):
    codes = np.array([[1]], np.uint8)
    with pytest.raises(CheckpointError, match=r"1 of 1 scales are 0, but their blocks of a.weight are not"):
        decoded(tmp_path / "lost", codes, np.zeros((1, 1), np.float32), per_row())


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, np.ndarray], dict]:
    """The tensors of a checkpoint with its matrices in e4m3fnuz: random bytes, some rows with 240."""
    tensors, generator = {}, np.random.default_rng(3)
    for name, array in read(GOLDEN).items():
        tensors[name] = array
        if array.dtype == E4M3FN:
            tensors[name] = random_codes(array.shape, without=(*LARGEST, *BETWEEN))
            tensors[name][generator.integers(0, 4) :: 4, 1] = 0xFF
    return tensors, json.loads((GOLDEN / "config.json").read_text())


def truth(tensors: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    codes, scale = tensors[f"{prefix}.weight"], tensors[f"{prefix}.weight_scale"]
    return codes.view(E4M3FNUZ).astype(np.float32) * scale.astype(np.float32)


Q_PROJ, W1 = "model.layers.0.self_attn.q_proj", "model.layers.0.block_sparse_moe.experts.1.w1"


def test_loaded_and_inspected(tmp_path, golden):
    tensors, config = golden
    path = write(tmp_path / "fnuz", tensors, config)
    model = fp8x.load(path)
    for module, prefix, index in (("self_attn.q_proj", Q_PROJ, ()), ("mlp.w13", W1, (1, 0))):
        weight = np.asarray(get(model, f"layers.0.{module}").quantized_weight.dequantize())[index]
        np.testing.assert_array_equal(weight, truth(tensors, prefix))
    (row,) = [row for row in inspect(path).rows if row.name == f"{Q_PROJ}.weight"]
    assert row.scheme == per_row() and row.amax == np.abs(truth(tensors, Q_PROJ)).max() and row.nonfinite == 0


@pytest.mark.parametrize("chunk", [64, rows.CHUNK_BYTES])
def test_converted(tmp_path, golden, monkeypatch, chunk):
    """By streaming: to float32, to other 8 bits, and with the scheme kept; `fp8x.load` comes to the same bytes."""
    monkeypatch.setattr(rows, "CHUNK_BYTES", chunk)
    tensors, config = golden
    path = write(tmp_path / "fnuz", tensors, config)
    fp8x.convert(path, tmp_path / "f32", "f32")
    plain = read(tmp_path / "f32")
    for prefix in (Q_PROJ, W1):
        np.testing.assert_array_equal(plain[f"{prefix}.weight"], truth(tensors, prefix))
    fp8x.convert(path, tmp_path / "kept", format="modelopt")
    assert Reader(tmp_path / "kept").stored(f"{Q_PROJ}.weight").dtype == "F8_E4M3"
    kept, direct = fp8x.load(tmp_path / "kept"), fp8x.load(path)
    for module in ("self_attn.q_proj", "mlp.w13"):
        a, b = (get(model, f"layers.0.{module}").quantized_weight for model in (kept, direct))
        assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
        assert np.asarray(a.scale).tobytes() == np.asarray(b.scale).tobytes()
    shutil.rmtree(tmp_path / "kept")
    fp8x.convert(path, tmp_path / "kept", "mxfp8_bf16")
    other = read(tmp_path / "kept")
    expected = fp8x.quantize(jnp.asarray(truth(tensors, Q_PROJ)), mx())
    assert other[f"{Q_PROJ}.weight"].tobytes() == np.asarray(expected.data).tobytes()


def test_nan_is_an_error(tmp_path, golden):
    tensors, config = golden
    broken = tensors[f"{W1}.weight"].copy()
    broken[3, 2] = 0x80
    path = write(tmp_path / "fnuz", tensors | {f"{W1}.weight": broken}, config)
    message = f"{W1}.weight in .*: holds 1 NaN or Inf"
    with pytest.raises(CheckpointError, match=message):
        fp8x.load(path)
    with pytest.raises(CheckpointError, match=message):
        fp8x.convert(path, tmp_path / "out", "mxfp8_bf16")
    assert not (tmp_path / "out").exists()
    (row,) = [row for row in inspect(path).rows if row.name == f"{W1}.weight"]
    assert row.nonfinite == 1
