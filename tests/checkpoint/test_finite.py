"""NaN and Inf in stored bytes, and in tensors that are only copied."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import fp8x
from fp8x.checkpoint import Reader
from fp8x.checkpoint.finite import CHUNK_BYTES, count_nonfinite, is_finite
from fp8x.checkpoint.header import DTYPES
from fp8x.errors import CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3", "F8_E8M0")


def every_code(dtype: str) -> np.ndarray:
    """Every code of a type in 8 or 16 bits; of larger ones each sign and exponent, with and without mantissa bits."""
    size = DTYPES[dtype].itemsize
    codes = np.arange(2 ** min(8 * size, 16), dtype=np.uint64) << max(8 * size - 16, 0)
    codes = codes if size <= 2 else np.concatenate([codes, codes | 1])
    return codes.astype(f"u{size}").view(DTYPES[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_code(dtype):
    codes = every_code(dtype)
    with np.errstate(invalid="ignore"):  # signaling NaN
        truth = np.isfinite(codes.astype(np.float64))  # as ml_dtypes has it
    assert 0 < (~truth).sum() < truth.sum()
    assert count_nonfinite(codes, dtype) == (~truth).sum()
    assert is_finite(codes[truth], dtype)
    strided = np.repeat(codes[truth], 2)[::2]
    assert not strided.flags.c_contiguous and is_finite(strided, dtype)
    some = np.flatnonzero(~truth)
    for code in codes[some[:: max(len(some) // 50, 1)]]:
        values = np.zeros(7, codes.dtype)
        values[5] = code
        assert not is_finite(values, dtype) and not is_finite(values.view(np.uint8), dtype)
        assert not is_finite(np.repeat(values, 2)[::2], dtype)
        assert count_nonfinite(values.view(np.uint8), dtype) == 1


def test_the_last_of_many_and_none_at_all():
    values = np.zeros(3 * CHUNK_BYTES + 1, np.uint8)
    assert is_finite(values, "F8_E4M3") and is_finite(values[:0], "F8_E4M3")
    values[-1] = 0xFF
    assert not is_finite(values, "F8_E4M3")
    assert is_finite(values, "U8") and count_nonfinite(values, "U8") == 0, "no floats"


def spoiled(source: Path, path: Path, name: str, code: int, count: int) -> Path:
    """A copy of a checkpoint, the last codes of a tensor replaced."""
    shutil.copytree(source, path)
    tensor = Reader(path).stored(name)
    size = DTYPES[tensor.dtype].itemsize
    with tensor.file.open("r+b") as file:
        file.seek(tensor.stop - size * count)
        file.write(code.to_bytes(size, "little") * count)
    return path


KEPT = "model.layers.1.block_sparse_moe.experts.2.w3"
PLAIN = "model.layers.0.input_layernorm.weight"

SPOILED = [
    ("e4m3_bf16", f"{KEPT}.weight", 0x7F, "NaN or Inf of 6144 values"),
    ("e4m3_bf16", f"{KEPT}.weight", 0xFF, "NaN or Inf of 6144 values"),
    ("e5m2_e5m2_bf16", f"{KEPT}.weight", 0xFC, "NaN or Inf of 6144 values"),
    ("e5m2_e5m2_bf16", f"{KEPT}.weight", 0x7E, "NaN or Inf of 6144 values"),
    ("mxfp8_bf16", f"{KEPT}.weight", 0xFF, "NaN or Inf of 6144 values"),
    ("mxfp8_bf16", f"{KEPT}.weight_scale", 255, "of 192 scales are NaN"),
    ("e4m3_bf16", f"{KEPT}.weight_scale", 0x7FC00000, "of 96 scales are NaN"),
    ("e4m3_bf16", PLAIN, 0xFF80, "NaN or Inf of 64 values"),
]


@pytest.mark.sample
@pytest.mark.parametrize(("code", "name", "value", "message"), SPOILED)
def test_what_is_only_copied(tiny_checkpoint, tmp_path, code, name, value, message):
    fp8x.convert(tiny_checkpoint, tmp_path / "good", code)
    bad = spoiled(tmp_path / "good", tmp_path / "bad", name, value, 3)
    match = rf"{name} in .*model.safetensors: (holds )?3 .*{message}"
    with pytest.raises(CheckpointError, match=match):
        fp8x.convert(bad, tmp_path / "out")
    with pytest.raises(CheckpointError, match=match):
        fp8x.convert(bad, tmp_path / "out", "bf16")
    with pytest.raises(CheckpointError, match=match):
        fp8x.load(bad)
    assert {path.name for path in tmp_path.iterdir()} == {"good", "bad"}
    fp8x.convert(bad, tmp_path / "out", allow_nonfinite=True)
    reader, copy = Reader(bad), Reader(tmp_path / "out")
    stored = copy.stored(name)
    found = [each.read(name, shapes=[stored.shape], dtypes=[stored.dtype]).tobytes() for each in (reader, copy)]
    assert found[0] == found[1]
    fp8x.load(bad, allow_nonfinite=True)


def test_a_negative_scale_is_none_whatever_is_allowed(tiny_checkpoint, tmp_path):
    fp8x.convert(tiny_checkpoint, tmp_path / "good", "e4m3_bf16")
    bad = spoiled(tmp_path / "good", tmp_path / "bad", f"{KEPT}.weight_scale", 0xBF800000, 2)
    with pytest.raises(CheckpointError, match=r"weight_scale in .*: 2 of 96 scales are negative"):
        fp8x.load(bad, allow_nonfinite=True)


def test_tensors_that_no_layer_holds(tmp_path):
    """Copied as they are, where the model is unknown and nothing is to change."""
    (tmp_path / "a").mkdir()
    rows = np.zeros((3, 4), ml_dtypes.float8_e5m2)
    rows.view(np.uint8)[2, 3] = 0x7C
    save_file({"fc.weight": np.ones((16, 64), np.float16), "conv": rows}, tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "config.json").write_text(json.dumps({"model_type": "other"}))
    with pytest.raises(CheckpointError, match=r"conv in .*: holds 1 NaN or Inf of 12 values"):
        fp8x.convert(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
