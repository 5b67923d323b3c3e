"""Models in 16 or 32 bits from checkpoints in 8: `fp8x.load(path, "bf16")`."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from meshes import mesh_of
from small import assert_same

import fp8x
from fp8x.errors import CheckpointError, RecipeError
from fp8x.nn.walk import named_layers
from fp8x.sharding import shard

GOLDENS = Path(__file__).parents[1] / "goldens"
TYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@pytest.mark.sample
@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("fp8/compressed_tensors_channel", "bf16"),
        ("fp8/compressed_tensors_mxfp8", "f16"),
        ("fp8/fp8_block_ragged", "f32"),
        ("fp8/hf_tensor_fused_static", "bf16"),
        ("fp8/modelopt_mixed", "f32"),
        ("fp8/torchao_mixed", "bf16"),
        ("mixtral_bf16_sharded", "f32"),
        ("mixtral", "f16"),
    ],
)
def test_loading_is_converting_and_loading(name, word, tmp_path):
    fp8x.convert(GOLDENS / name, tmp_path / "out", word)
    model = fp8x.load(GOLDENS / name, word)
    assert_same(model, fp8x.load(tmp_path / "out"))
    assert {str(variable[...].dtype) for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))} == {TYPES[word]}
    assert not [path for path, layer in named_layers(model).items() if getattr(layer, "recipe", None)]


def test_a_matrix_by_hand():
    """Codes and scales from the file's bytes, multiplied in float64 and rounded once."""
    path = GOLDENS / "fp8" / "compressed_tensors_channel"
    content, prefix = (path / "model.safetensors").read_bytes(), "model.layers.0.self_attn.q_proj"
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])

    def stored(name: str, dtype) -> np.ndarray:
        start, stop = header[name]["data_offsets"]
        return np.frombuffer(content[8 + size :][start:stop], dtype).reshape(header[name]["shape"]).astype(np.float64)

    codes = stored(f"{prefix}.weight", ml_dtypes.float8_e4m3fn)
    assert header[f"{prefix}.weight_scale"]["dtype"] == "F32"
    scale = stored(f"{prefix}.weight_scale", np.float32)
    expected = (codes * scale).astype(ml_dtypes.bfloat16)
    kernel = np.asarray(fp8x.load(path, "bf16").layers[0].self_attn.q_proj.kernel[...])
    # Rounded to float32 first, which moves no more than a tie.
    assert np.mean(expected == kernel.T) > 0.999
    np.testing.assert_allclose(kernel.T.astype(np.float64), expected.astype(np.float64), rtol=2**-8)


@pytest.mark.parametrize("name", ["fp8/hf_block", "fp8/compressed_tensors_mxfp8", "mixtral_bf16_sharded"])
def test_on_a_mesh(name):
    model = fp8x.load(GOLDENS / name, "f32")
    mesh = mesh_of(tensor=2)
    assert_same(fp8x.load(GOLDENS / name, "f32", mesh), shard(model, mesh))


def test_rules_are_exceptions():
    path = GOLDENS / "fp8" / "compressed_tensors_channel"
    model = fp8x.load(path, "bf16", rules={r"layers\.0\.self_attn\..*": "mxfp8_bf16"})
    recipes = {path: layer.recipe for path, layer in named_layers(model).items() if getattr(layer, "recipe", None)}
    assert recipes and {name.split(".")[2] for name in recipes} == {"self_attn"}
    assert set(recipes.values()) == {fp8x.recipe("mxfp8_bf16")}


def test_keys_and_values_leave_8_bits_too():
    with pytest.warns(
        UserWarning, match="the scales of its KV cache are not used: recipe 'bf16' leaves keys and values"
    ):
        model = fp8x.load(GOLDENS / "fp8" / "quark_fp8_kv", "bf16")
    assert model.kv_cache is None
    assert fp8x.load(GOLDENS / "fp8" / "quark_fp8_kv").kv_cache is not None


@pytest.mark.parametrize("word", ["bfloat16", "fp16", "float32", "BF16", ""])
def test_other_words(word):
    for name in ("fp8/compressed_tensors_channel", "mixtral"):
        with pytest.raises((RecipeError, CheckpointError), match="bf16"):
            fp8x.load(GOLDENS / name, word)
    with pytest.raises(RecipeError, match="loaded or converted bf16, f16, f32 dequantize it"):
        fp8x.load(GOLDENS / "mixtral", word)


def test_what_else_does_not_go_with_it():
    path = GOLDENS / "fp8" / "mxfp8"
    with pytest.raises(RecipeError, match="requantize"):
        fp8x.load(path, "bf16", requantize="hopper")
    with pytest.raises(
        CheckpointError, match=r"is quantized already \(mxfp8\); load it without a recipe, with 'bf16' to"
    ):
        fp8x.load(path, "e4m3_bf16")
