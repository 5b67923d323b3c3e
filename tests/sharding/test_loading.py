"""Checkpoints onto a mesh: the bytes of one device, and no others read."""

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from meshes import mesh_of
from synthetic import make_amax_better

import fp8x
from fp8x.checkpoint import Reader
from fp8x.checkpoint.reader import Slices
from fp8x.errors import CheckpointError, MeshError
from fp8x.nn.walk import named_layers
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme, per_row
from fp8x.sharding import shard

GOLDENS = Path(__file__).parents[1] / "goldens"


def assert_same(model, other):
    assert nnx.graphdef(model) == nnx.graphdef(other)
    for (path, a), (_, b) in zip(nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(other)), strict=True):
        a, b = a[...], b[...]
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.sample
@pytest.mark.parametrize(
    ("name", "code", "axes"),
    [
        ("qwen3_moe_bf16", "e4m3_e4m3_bf16", {"expert": 2, "tensor": 4}),
        pytest.param(
            *("qwen3_moe_bf16", "fp8_e4m3fn_bf16_block_scale_static_activation", {"tensor": 2, "data": 2}),
            marks=pytest.mark.slow,
        ),
        ("mixtral_bf16_sharded", "mxfp8_bf16", {"expert": 4}),
        ("mixtral", None, {"tensor": 2}),
        ("compressed_tensors", None, {"expert": 2}),
    ],
)
def test_loading_equals_sharding_and_saving_equals_the_unsharded_model(name, code, axes, tmp_path):
    mesh, model = mesh_of(**axes), fp8x.load(GOLDENS / name, code)
    loaded = fp8x.load(GOLDENS / name, code, mesh)
    if not (code and fp8x.recipe(code).needs_calibration):
        fp8x.save(model, tmp_path / "one")
        fp8x.save(loaded, tmp_path / "mesh")
        for file in (tmp_path / "one").iterdir():
            assert file.read_bytes() == (tmp_path / "mesh" / file.name).read_bytes(), file.name
    assert_same(loaded, shard(model, mesh))


@pytest.mark.sample
@pytest.mark.parametrize(
    ("name", "requantize", "axes"),
    [
        ("mxfp8", "hopper", {"expert": 3, "tensor": 2}),
        ("fp8_block_ragged", "hopper", {"tensor": 2}),  # boundaries cut the blocks of 48×40 that the source has
        ("hf_block_static", "e4m3_e4m3_bf16", {"tensor": 2, "data": 2}),
        ("mxfp8", "e5m2_e5m2_bf16", {"tensor": 2}),
        ("compressed_tensors_channel", ["mxfp8_bf16", "e4m3_e4m3_bf16_dynamic"], {"expert": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_requantizing_on_a_mesh_equals_sharding(name, requantize, axes):
    mesh, path = mesh_of(**axes), GOLDENS / "fp8" / name
    model = fp8x.load(path, requantize=requantize)
    assert_same(fp8x.load(path, mesh=mesh, requantize=requantize), shard(model, mesh))


@pytest.mark.sample
@pytest.mark.parametrize("axes", [{"tensor": 2}, {"expert": 3, "tensor": 2}], ids=str)
@pytest.mark.parametrize("block", [(128, 128), (48, 48), (1, None), (None, None)], ids=str)
def test_the_better_scale_of_each_block_on_a_mesh(tmp_path, block, axes):
    """Some are exact by a power of two; others are not for 32 small values, which lie on one device, and of these some
    are better by amax / 448."""
    path = shutil.copytree(GOLDENS / "fp8" / "mxfp8", tmp_path / "mx")
    reader = Reader(path)
    changed = tuple(f"{name}_proj.weight_scale_inv" for name in ("k", "up", "down"))
    for name in (name for name in reader if name.endswith(changed)):
        with (path / "model.safetensors").open("r+b") as file:
            file.seek(reader.stored(name).start + reader.stored(name).nbytes - 1)
            file.write(bytes([90]))
    make_amax_better(path, "q_proj", "v_proj", "o_proj", "0.mlp.down_proj", "experts.1.gate_proj")
    recipe = Recipe(Scheme("e4m3", block=block), per_row(), "dynamic")
    found = fp8x.choose_recipes(path, recipe)
    amax = [
        next(each for each in (choice.chosen, *choice.others) if each.recipe.weight == recipe.weight)
        for choice in found.choices
    ]
    choices = zip(found.choices, amax, strict=True)
    found = dataclasses.replace(found, choices=tuple(dataclasses.replace(each, chosen=its) for each, its in choices))
    mesh, model = mesh_of(**axes), fp8x.load(path, requantize=found)
    scales = [np.asarray(layer.weight_scale[...]).ravel() for layer in named_layers(model).values()]
    is_power = np.frexp(np.concatenate(scales))[0] == 0.5
    assert 0 < is_power.sum() < is_power.size
    assert_same(fp8x.load(path, mesh=mesh, requantize=found), shard(model, mesh))


def test_a_process_reads_what_its_devices_hold(monkeypatch):
    """Half of the devices stand for a process: experts 0 and 1, and half of all else that is split."""
    mesh = mesh_of(expert=2, tensor=2)
    mine, make, taken = set(mesh.devices[0].flat), jax.make_array_from_callback, Counter()

    def counted(self, index, getitem=Slices.__getitem__):
        part = getitem(self, index)
        taken[self.name] += part.nbytes
        return part

    def of_this_process(shape, sharding, part):
        indices = sharding.devices_indices_map(shape)
        parts = {str(index): part(index) for device, index in indices.items() if device in mine}
        nothing = np.zeros_like(next(iter(parts.values())))
        return make(shape, sharding, lambda index: parts.get(str(index), nothing))

    monkeypatch.setattr(Slices, "__getitem__", counted)
    monkeypatch.setattr(jax, "make_array_from_callback", of_this_process)
    fp8x.load(GOLDENS / "mixtral", "e4m3_e4m3_bf16_dynamic", mesh)
    reader = Reader(GOLDENS / "mixtral")
    for tensor in reader:
        if ".experts." in tensor:
            share = 1 if int(tensor.split(".experts.")[1][0]) < 2 else 0
        else:
            share = 0.5 if any(name in tensor for name in ("q_proj", "o_proj", "embed_tokens", "lm_head")) else 1
        assert taken[tensor] == share * reader.stored(tensor).nbytes, tensor


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(Reader, "read_into", None)
    with pytest.raises(MeshError, match="axis 'expert' has 3 devices, which do not divide the model's 4 experts"):
        fp8x.load(GOLDENS / "mixtral", mesh=mesh_of(expert=3))
    with pytest.raises(MeshError, match="mesh: 'tensor=2' is no Mesh"):
        fp8x.load(GOLDENS / "mixtral", mesh="tensor=2")


def test_nonfinite_weights_are_named(tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(GOLDENS / "mixtral" / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][0, -1] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDENS / "mixtral" / "config.json").read_text())
    with pytest.raises(CheckpointError, match=rf"{name} in .*: holds 1 NaN or Inf"):
        fp8x.load(tmp_path, "mxfp8_bf16", mesh_of(expert=2))


@pytest.mark.parametrize("mesh", [None, {"expert": 2}])
def test_values_beyond_the_model_s_type_are_named(tmp_path, mesh):
    stored = Reader(GOLDENS / "gpt_oss_mxfp4").stored("model.layers.0.mlp.experts.3.up_proj.weight_scale")
    shutil.copytree(GOLDENS / "gpt_oss_mxfp4", tmp_path / "model")
    with (tmp_path / "model" / "model.safetensors").open("r+b") as file:
        file.seek(stored.start + 2 * 7)  # up's fourth row: gate and up alternate, with two scales each
        file.write(bytes([200]))
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight in .*: \d+ values or more are beyond"):
        fp8x.load(tmp_path / "model", "f16", mesh and mesh_of(**mesh))
