"""Rows of a checkpoint: schemes, bytes, SNR."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from resident import measure
from safetensors.numpy import save_file
from synthetic import write_mixtral

import fp8x
from fp8x.checkpoint import rows, threads
from fp8x.checkpoint.inspect import TensorRow, inspect, merge_experts
from fp8x.errors import CheckpointError
from fp8x.models.hub import load, save


def write(path, tensors, **config):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def weights(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "quantized"
    save(load(tiny_checkpoint, "fp8_e4m3fn_bf16_block_scale"), path)
    return path


def test_any_model_by_name_and_layer(tmp_path):
    tensors = {
        "model.layers.10.w.weight": weights(8, 40),
        "model.layers.9.w.weight": weights(8, 40),
        "model.norm.weight": weights(40),
        "steps": np.arange(3, dtype=np.int64),
    }
    found = inspect(write(tmp_path / "c", tensors))
    assert [row.name for row in found.rows] == [
        "model.layers.9.w.weight",
        "model.layers.10.w.weight",
        "model.norm.weight",
        "steps",
    ]
    assert found.format is None and found.mean_snr is None
    assert [(row.scheme, row.bytes) for row in found.rows[-2:]] == [("bf16", 80), ("i64", 24)]
    assert found.rows[0].amax == np.abs(tensors["model.layers.9.w.weight"].astype(np.float32)).max()
    assert found.rows[-1].amax is None


def test_snr_is_that_of_the_dequantized_weights(tmp_path):
    w = weights(100, 200)
    path = write(tmp_path / "c", {"a.proj.weight": w, "a.gate.weight": weights(4, 200)})
    row, gate = sorted(
        inspect(path, recipe="fp8_e4m3fn_bf16_block_scale").rows, key=lambda row: row.name != "a.proj.weight"
    )
    truth = w.astype(np.float64)
    q = fp8x.quantize(jnp.asarray(w), fp8x.Scheme("e4m3", block=(128, 128)))
    error = np.asarray(q.dequantize(), np.float64) - truth
    assert row.snr == pytest.approx(10 * math.log10((truth**2).sum() / (error**2).sum()), rel=1e-5)
    assert row.bytes == 100 * 200 + 2 * 4 and row.is_quantized
    assert gate.snr is None and gate.scheme == "bf16"


def test_a_written_checkpoint_is_what_the_recipe_promised(tiny_checkpoint, quantized):
    promised = inspect(tiny_checkpoint, recipe="fp8_e4m3fn_bf16_block_scale").rows
    done = []
    found = inspect(quantized, reference=tiny_checkpoint, progress=lambda *p: done.append(p))
    assert found.rows == promised
    read = sum(row.bytes for row in promised) - sum(row.bytes - row.size for row in promised if row.is_quantized)
    assert done[-1] == (read, read) and len(done) == len(promised)


def test_experts_in_one_row(quantized, tiny_checkpoint):
    rows = inspect(quantized, reference=tiny_checkpoint).rows
    merged = {row.name: row for row in merge_experts(rows)}
    row = merged["model.layers.0.block_sparse_moe.experts.*.w2.weight"]
    experts = [r for r in rows if ".0.block" in r.name and ".w2." in r.name]
    assert len(experts) == 4 and row.shape == (4, 64, 96)
    assert row.bytes == sum(e.bytes for e in experts) and row.amax == max(e.amax for e in experts)
    assert min(e.snr for e in experts) < row.snr < max(e.snr for e in experts)
    assert sum(r.bytes for r in merged.values()) == sum(r.bytes for r in rows)


def test_experts_in_several_schemes():
    scheme = fp8x.Scheme("e4m3", block=(None, None))
    rows = [
        TensorRow("x.experts.0.w.weight", scheme, (2, 2), 8, 1.0, 0, 4.0, 1.0),
        TensorRow("x.experts.1.w.weight", "bf16", (2, 2), 8, 2.0, 1),
    ]
    (row,) = merge_experts(rows)
    assert (row.scheme, row.amax, row.nonfinite, row.snr) == ("e4m3 ·×· f32 | bf16", 2.0, 1, None)


def test_snr_without_error_is_infinite():
    assert TensorRow("x", "bf16", (1,), 2, signal=1.0, noise=0.0).snr == math.inf


@pytest.mark.parametrize("recipe", ["mxfp8_bf16", "bf16"])
def test_a_quantized_reference_counts_as_what_it_stands_for(tiny_checkpoint, tmp_path, recipe):
    fp8x.convert(tiny_checkpoint, tmp_path / "a", "fp8_e4m3fn_bf16_block_scale")
    fp8x.convert(tmp_path / "a", tmp_path / "b", recipe)
    rows = {row.name: row for row in inspect(tmp_path / "b", reference=tmp_path / "a").rows}
    first, second = fp8x.load(tmp_path / "a"), fp8x.load(tmp_path / "b")
    truth = np.asarray(first.layers[0].self_attn.q_proj.quantized_weight.dequantize(), np.float64)
    layer = second.layers[0].self_attn.q_proj
    found = layer.kernel[...].T if recipe == "bf16" else layer.quantized_weight.dequantize()
    noise = np.square(np.asarray(found, np.float64) - truth).sum()
    row = rows["model.layers.0.self_attn.q_proj.weight"]
    assert row.snr == pytest.approx(10 * np.log10(np.square(truth).sum() / noise), abs=1e-3)
    assert rows["model.norm.weight"].snr is None


def test_a_reference_that_does_not_fit(tiny_checkpoint, quantized, tmp_path):
    other = write(tmp_path / "other", {"a.weight": weights(2, 2)})
    with pytest.raises(CheckpointError, match=r"\.weight: missing from .*other"):
        inspect(quantized, reference=other)
    with pytest.raises(CheckpointError, match="leave the recipe out"):
        inspect(quantized, recipe="e4m3_bf16")


@pytest.mark.parametrize("code", ["e4m3_bf16", "e4m3_e4m3_bf16", "e5m2_e5m2_bf16", "mxfp8_bf16"])
def test_numbers_by_hand(tmp_path, code):
    """In float64, by ml_dtypes and numpy alone; with NaN and Inf, which count for themselves and in no amax."""
    w = weights(96, 128)
    w[3, 5], w[90, 1] = np.nan, -np.inf
    path = write(tmp_path / "c", {"a.weight": w, "b.bias": w[3:4].reshape(8, 4, 4)})
    recipe = code if "e5m2" in code else fp8x.Recipe(fp8x.recipe(code).weight)  # no scales to calibrate
    fp8x.convert(path, tmp_path / "q", recipe, allow_nonfinite=True)
    (row, bias), plain = inspect(tmp_path / "q").rows, inspect(path).rows
    reader = fp8x.checkpoint.Reader(tmp_path / "q")
    name = next(name for name in reader if "a.weight_" in name)
    codes, scale = (
        reader.read(each, shapes=[reader.stored(each).shape], dtypes=[reader.stored(each).dtype])
        for each in ("a.weight", name)
    )
    scale = 2.0 ** (scale.astype(np.float64) - 127) if scale.dtype == np.uint8 else scale.astype(np.float64)
    scale = np.broadcast_to(
        scale.reshape(-1, 1) if scale.ndim < 2 else np.repeat(scale, 128 // scale.shape[1], 1), w.shape
    )
    values = codes.astype(np.float64) * scale
    assert row.nonfinite == 1 == np.isnan(values).sum(), "Inf became the largest finite value"
    assert row.amax == pytest.approx(np.nanmax(np.abs(values)), rel=1e-7)
    finite = np.abs(w.astype(np.float64)[np.isfinite(w.astype(np.float64))])
    assert (plain[0].amax, plain[0].nonfinite) == (finite.max(), 2)
    assert (bias.amax, bias.nonfinite, bias.shape) == (plain[1].amax, 1, (8, 4, 4))


def test_any_number_of_threads_gives_the_same_numbers(tiny_checkpoint, quantized, monkeypatch):
    found = []
    for number in (1, 2, 7):
        monkeypatch.setattr(threads, "MAX_THREADS", number)
        monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: range(8))
        found.append(inspect(quantized, reference=tiny_checkpoint).rows)
    assert found[0] == found[1] == found[2]


def test_no_flax_is_imported():
    """Nor is it by what stands between: the package itself is replaced by an empty one."""
    program = f"""
import sys, types
package = types.ModuleType("fp8x")
package.__path__ = [{str(Path(fp8x.__file__).parent)!r}]
sys.modules["fp8x"] = package
import fp8x.checkpoint.inspect, fp8x.checkpoint.convert
print(sorted(name for name in sys.modules if name.split(".")[0] == "flax"))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


INSPECT = """
import jax, numpy as np
from fp8x.checkpoint import Reader
from fp8x.checkpoint.inspect import inspect
size = inspect(path{options}).bytes
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "",
        ', recipe="e4m3_e4m3_bf16"',
        ', recipe="mxfp8_bf16"',
        ", reference=…",
    ],
)
def test_memory_is_that_of_some_rows(tmp_path, tiny_checkpoint, options):
    """Of 200 MB in matrices, and in one vector. Once done for a few matrices as wide, so that its programs are there:
    compiling them takes up to 100 MB more."""
    big, small = tmp_path / "model", tmp_path / "few"
    if options:
        assert write_mixtral(big, 1024, 2048) > 200 * 2**20
        write_mixtral(small, 1024, 2048, layers=1, experts=2)
    else:
        write(big, {"v": np.ones(100 * 2**20, ml_dtypes.bfloat16), "c": weights(2, 3, 4)})
        small = tiny_checkpoint
    if "reference" in options:
        options = f', reference={str(big)!r} if "big" in str(path) else {str(small)!r}'
        for name, path in {"big": big, "small": small}.items():
            fp8x.convert(path, tmp_path / name, "mxfp8_bf16")
        big, small = tmp_path / "big", tmp_path / "small"
    _, growth = measure(INSPECT.replace("{options}", options), big, small)
    assert growth < 96 * 2**20  # 16 to 51 MB were seen


def test_rows_are_measured_in_parts(tmp_path, monkeypatch):
    """Schemes whose blocks span all rows, whole chunks, and parts of them."""
    path = write(tmp_path / "c", {"a.weight": weights(100, 96), "b": weights(3, 5, 7), "c": weights(11)})
    for scheme in ((None, 32), (32, 32)):
        recipe = fp8x.Recipe(fp8x.Scheme("e4m3", block=scheme))
        whole = inspect(path, recipe=recipe).rows
        with monkeypatch.context() as patch:
            patch.setattr(rows, "CHUNK_BYTES", 4000)
            parts = inspect(path, recipe=recipe).rows
        assert [(row.name, row.scheme, row.amax, row.bytes) for row in parts] == [
            (row.name, row.scheme, row.amax, row.bytes) for row in whole
        ]
        assert parts[0].noise == pytest.approx(whole[0].noise, rel=1e-5)


def test_what_there_is_to_say_of_a_damaged_directory(tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: does not exist"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config.json: is missing"):
        inspect(tmp_path)
    with pytest.raises(CheckpointError, match=r"quant_method is 'awq'; fp8x reads 'compressed-tensors'"):
        inspect(write(tmp_path / "awq", {"a.weight": weights(2, 2)}, quantization_config={"quant_method": "awq"}))
