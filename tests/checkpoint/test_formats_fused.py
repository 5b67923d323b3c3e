"""Fused experts on disk: the same bytes as of experts one by one."""

import re

import ml_dtypes
import numpy as np
import pytest

from fp8x.checkpoint import Reader, Writer
from fp8x.errors import CheckpointError

E, WIDTH, H = 3, 6, 4
BLOCK = "model.layers.2.mlp.experts"


def reader_of(path, tensors: dict[str, np.ndarray], model_type: str = "qwen3_moe") -> Reader:
    with Writer(path) as writer:
        writer.add_json("config.json", {"model_type": model_type})
        for name, array in tensors.items():
            writer.add(name, array)
    return Reader(path)


def read(reader: Reader, name: str) -> np.ndarray:
    stored = reader.stored(name)
    return reader.read(name, shapes=[stored.shape], dtypes=[stored.dtype])


def test_weights_and_scales_of_every_expert(tmp_path):
    gate_up = np.arange(E * 2 * WIDTH * H, dtype=np.float32).reshape(E, 2 * WIDTH, H).astype(ml_dtypes.bfloat16)
    down = np.arange(E * H * WIDTH, dtype=np.uint8).reshape(E, H, WIDTH).view(ml_dtypes.float8_e4m3fn)
    grid = np.arange(E * 4 * 2, dtype=np.float32).reshape(E, 4, 2)
    one = np.arange(E, dtype=np.float32)
    reader = reader_of(
        tmp_path / "out",
        {
            f"{BLOCK}.gate_up_proj": gate_up,
            f"{BLOCK}.down_proj": down,
            f"{BLOCK}.gate_up_proj_scale_inv": grid,
            f"{BLOCK}.down_proj_scale_inv": grid,
            f"{BLOCK}.gate_up_proj_activation_scale": one,
            f"{BLOCK}.gate_up_proj_weight_scale": one[:, None, None],
            "model.layers.2.mlp.gate.weight": gate_up[0],
        },
    )
    assert len(list(reader)) == 1 + E * (2 + 1 + 2 + 1 + 2 + 2)
    for e in range(E):
        expected = {
            "gate_proj.weight": gate_up[e, :WIDTH],
            "up_proj.weight": gate_up[e, WIDTH:],
            "down_proj.weight": down[e],
            "gate_proj.weight_scale_inv": grid[e, :2],
            "up_proj.weight_scale_inv": grid[e, 2:],
            "down_proj.weight_scale_inv": grid[e],
            "gate_proj.activation_scale": one[e],
            "up_proj.activation_scale": one[e],
            "gate_proj.weight_scale": one[e].reshape(1, 1),
            "up_proj.weight_scale": one[e].reshape(1, 1),
        }
        for name, array in expected.items():
            found = read(reader, f"{BLOCK}.{e}.{name}")
            assert found.shape == array.shape and found.tobytes() == array.tobytes(), name


def test_mixtral_keeps_its_published_names(tmp_path):
    """transformers 5 saves `mlp` where it held `block_sparse_moe`, or keeps that and fuses the scales alone."""
    w2 = np.zeros((2, 3), np.float32)
    for index, block in enumerate(("mlp", "block_sparse_moe")):
        tensors = {
            f"model.layers.0.{block}.gate.weight": w2,
            f"model.layers.0.{block}.experts.gate_up_proj": np.zeros((1, 2, 3), np.float32),
            f"model.layers.0.{block}.experts.0.w2.weight": w2,
            f"model.layers.0.{block}.experts.down_proj_scale_inv": np.zeros((1, 2, 3), np.float32),
        }
        reader = reader_of(tmp_path / str(index), tensors, "mixtral")
        names = (
            "gate.weight",
            *(f"experts.0.{w}" for w in ("w1.weight", "w3.weight", "w2.weight", "w2.weight_scale_inv")),
        )
        assert set(reader) == {f"model.layers.0.block_sparse_moe.{name}" for name in names}


def test_what_can_not_be_taken_apart(tmp_path):
    """A grid of 3 rows: transformers writes one for I = 192 in blocks of 128, where a block is half gate, half up."""
    name = f"{BLOCK}.gate_up_proj_scale_inv"
    with pytest.raises(CheckpointError, match=f"{name} in .*model.safetensors: 3 rows do not divide .* straddles both"):
        reader_of(tmp_path / "grid", {name: np.ones((E, 3, 2), np.float32)})
    with pytest.raises(CheckpointError, match=r"experts.gate_up_proj in .*: 7 rows do not divide into gate and up$"):
        reader_of(tmp_path / "odd", {f"{BLOCK}.gate_up_proj": np.ones((E, 7, 2), np.float32)})
    tensors = {f"{BLOCK}.down_proj": np.ones((E, 2, 2), np.float32), f"{BLOCK}.1.down_proj.weight": np.ones(1)}
    with pytest.raises(
        CheckpointError, match=r"experts.1.down_proj.weight: .*model.safetensors holds it twice, by itself"
    ):
        reader_of(tmp_path / "twice", tensors)


def bf16(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(ml_dtypes.bfloat16)


def test_experts_that_lie_the_other_way(tmp_path):
    """Llama 4 and Qwen3-VL-MoE: `x @ gate_up_proj[e]`, of which the first half of the columns is the gate."""
    gate_up, down = bf16(E, H, 2 * WIDTH), bf16(E, WIDTH, H)
    reader = reader_of(tmp_path / "out", {f"{BLOCK}.gate_up_proj": gate_up, f"{BLOCK}.down_proj": down}, "some_vlm")
    for e in range(E):
        for name, array in {
            "gate_proj": gate_up[e, :, :WIDTH].T,
            "up_proj": gate_up[e, :, WIDTH:].T,
            "down_proj": down[e].T,
        }.items():
            name = f"{BLOCK}.{e}.{name}.weight"
            assert read(reader, name).tobytes() == array.tobytes()
            assert reader.stored(name).nbytes == array.nbytes
            rows = np.empty(2 * array.shape[1] * 2, np.uint8)
            reader.read_into(name, array.shape[1] * 2, rows)  # from the second row on
            assert rows.tobytes() == array[1:3].tobytes()
    reader.close()
    assert reader.fused[f"{BLOCK}.down_proj"] == [f"{BLOCK}.{e}.down_proj.weight" for e in range(E)]
    assert reader.stored(f"{BLOCK}.down_proj").shape == down.shape  # known, but not listed
    assert f"{BLOCK}.down_proj" not in list(reader)


def test_input_linear(tmp_path):
    """Granite: `input_linear` holds gate and up, as vLLM's loader splits it."""
    block = "model.layers.0.block_sparse_moe"
    fused, out = bf16(E, 2 * WIDTH, H), bf16(E, H, WIDTH)
    tensors = {f"{block}.input_linear.weight": fused, f"{block}.output_linear.weight": out}
    reader = reader_of(tmp_path / "out", tensors, "granitemoe")
    expected = {"w1": fused[2, :WIDTH], "w3": fused[2, WIDTH:], "w2": out[2]}
    for name, array in expected.items():
        assert read(reader, f"{block}.experts.2.{name}.weight").tobytes() == array.tobytes()
    assert len(list(reader)) == 3 * E


@pytest.mark.parametrize(
    "tensors, model_type, reason",
    [
        ({"gate_up_proj": (E, 4, 8), "gate_up_proj_bias": (E, 8)}, "other", "with biases; gate and up may alternate"),
        ({"gate_up_proj": (E, 4, 8)}, "llama4", "without down_proj beside it to tell its layout"),
        ({"gate_up_proj": (E, 4, 8), "down_proj": (E, 5, 4)}, "other", r"can't tell rows from columns \(\[3, 4, 8\]"),
    ],
)
def test_what_stays_whole(tmp_path, tensors, model_type, reason):
    arrays = {f"{BLOCK}.{name}": np.ones(shape, np.float32) for name, shape in tensors.items()}
    reader = reader_of(tmp_path / "out", arrays, model_type)
    assert set(reader) == set(arrays)
    assert re.search(reason, reader.whole[f"{BLOCK}.gate_up_proj"])


def test_scales_of_transposed_experts(tmp_path):
    arrays = {"gate_up_proj": (E, H, 2 * WIDTH), "down_proj": (E, WIDTH, H), "down_proj_scale_inv": (E, 1, 1)}
    with pytest.raises(CheckpointError, match=r"down_proj_scale_inv in .*: scales of experts that lie as \[E, K, N\]"):
        reader_of(tmp_path / "out", {f"{BLOCK}.{name}": np.ones(shape, np.float32) for name, shape in arrays.items()})


def test_what_only_looks_fused(tmp_path):
    tensors = {
        "model.layers.0.mlp.down_proj.weight": np.ones((2, 2), np.float32),
        f"{BLOCK}.gate_up_proj_bias": np.ones((E, 2), np.float32),
        f"{BLOCK}.down_proj_scale": np.ones((E, 2), np.float32),
    }
    assert set(reader_of(tmp_path / "out", tensors)) == set(tensors)
    empty = reader_of(tmp_path / "empty", {f"{BLOCK}.down_proj": np.ones((0, 2, 2), np.float32)})
    assert list(empty) == []
