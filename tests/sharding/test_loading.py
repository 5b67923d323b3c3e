"""Checkpoints onto a mesh: the bytes of one device, and no others read."""

import math
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from meshes import mesh_of

import fp8x
from fp8x.checkpoint import Reader
from fp8x.errors import CheckpointError, MeshError
from fp8x.sharding import shard

GOLDENS = Path(__file__).parents[1] / "goldens"


def assert_same(model, other):
    assert nnx.graphdef(model) == nnx.graphdef(other)
    for (path, a), (_, b) in zip(nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(other)), strict=True):
        a, b = a[...], b[...]
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.parametrize(
    ("name", "code", "axes"),
    [
        ("qwen3_moe_bf16", "e4m3_e4m3_bf16", {"expert": 2, "tensor": 4}),
        ("qwen3_moe_bf16", "fp8_e4m3fn_bf16_block_scale_static_activation", {"tensor": 2, "data": 2}),
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


class Counting(np.ndarray):
    """A view that counts the bytes of what is taken from it."""

    taken = Counter()

    def __getitem__(self, index):
        part = np.asarray(self)[index]
        self.taken[self.name] += part.nbytes
        return part


@pytest.mark.parametrize(("code", "name"), [("fp8_e4m3fn_bf16_block_scale", "mixtral"), (None, "mixtral")])
def test_a_process_reads_what_its_devices_hold(code, name, monkeypatch):
    """Half of the devices of a mesh stand for a process."""
    real = Reader.read

    def read(self, tensor, **options):
        view = real(self, tensor, **options).view(Counting)
        view.name = tensor
        return view

    monkeypatch.setattr(Reader, "read", read)
    mesh = mesh_of(expert=2, tensor=2)
    mine = set(mesh.devices[0].flat)  # the first half of the experts; all of the rest
    make = jax.make_array_from_callback

    def of_this_process(shape, sharding, part):
        indices = sharding.devices_indices_map(shape)
        held = {str(indices[device]) for device in mine}
        return make(
            shape, sharding, lambda index: part(index) if str(index) in held else _nothing(part, shape, sharding)
        )

    def _nothing(part, shape, sharding):
        some = part(sharding.devices_indices_map(shape)[next(iter(mine))])
        return np.zeros_like(some)

    monkeypatch.setattr(jax, "make_array_from_callback", of_this_process)
    Counting.taken.clear()
    fp8x.load(GOLDENS / name, code, mesh)
    reader = Reader(GOLDENS / name)
    for tensor in reader:
        share = 1.0
        if ".experts." in tensor:
            share = float(int(tensor.split(".experts.")[1].split(".")[0]) < 2)
        assert Counting.taken[tensor] <= share * reader.stored(tensor).nbytes, tensor
    assert math.isclose(
        sum(Counting.taken.values()),
        sum(reader.stored(tensor).nbytes * (0.5 if ".experts." in tensor else 1) for tensor in reader),
        rel_tol=0.6,
    )


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(Reader, "release", None)  # called after every tensor
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
