"""Whole quantized models through orbax, as docs/checkpoints.md shows it."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from synthetic import write_mixtral

import fp8x
from fp8x.models import Decoder, DecoderConfig
from fp8x.sharding import shard

# orbax leaves what a refused restore was doing to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

QWEN = Path(__file__).parents[1] / "goldens" / "qwen3_moe_bf16"
RULES = {r".*\.o_proj": None}  # its columns are no multiple of 32


def describe(path: Path, recipe: str, rules: dict | None = None) -> Decoder:
    """The quantized model without its weights."""
    config = DecoderConfig.from_hf(json.loads((path / "config.json").read_text()))
    return nnx.eval_shape(lambda: fp8x.quantize_model(Decoder(config, rngs=nnx.Rngs(0)), recipe, rules))


def as_bytes(state: nnx.State) -> dict:
    return {path: (v.dtype, v.shape, np.asarray(v[...]).tobytes()) for path, v in nnx.to_flat_state(state)}


def save_and_restore(path: Path, state: nnx.State, abstract: nnx.State) -> nnx.State:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, abstract)


@pytest.mark.sample
@pytest.mark.parametrize(
    ("recipe", "dtypes"),
    [
        ("mxfp8_mxfp8_bf16", {"bfloat16", "float8_e4m3fn", "float8_e8m0fnu"}),
        ("e5m2_e5m2_bf16", {"bfloat16", "float8_e5m2", "float32"}),
    ],
)
def test_a_model_comes_back_bit_for_bit(tmp_path, recipe, dtypes):
    _, state = nnx.split(fp8x.load(QWEN, recipe, rules=RULES))
    graphdef, abstract = nnx.split(describe(QWEN, recipe, RULES))
    restored = save_and_restore(tmp_path / "state", state, abstract)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(restored)} == dtypes
    assert as_bytes(restored) == as_bytes(state)
    nnx.merge(graphdef, restored)


def mesh_of(**axes: int) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes))


@pytest.fixture(scope="module")
def even(tmp_path_factory) -> Path:
    """A checkpoint that every mesh divides evenly, so that all hold arrays of the same shapes."""
    path = tmp_path_factory.mktemp("orbax") / "even"
    write_mixtral(path, 128, 128, layers=1, experts=4, heads=4, vocab=32)
    return path


@pytest.mark.sample
@pytest.mark.parametrize("target", [{"tensor": 2, "expert": 2}, {"tensor": 4}, {"expert": 4, "data": 2}])
def test_a_sharded_model_is_restored_onto_a_mesh(even, tmp_path, target):
    """Onto the one that it was on, and onto others."""
    recipe = "mxfp8_mxfp8_bf16"
    model = shard(fp8x.load(even, recipe), mesh_of(tensor=2, expert=2))
    graphdef, abstract = nnx.split(shard(describe(even, recipe), mesh_of(**target)))
    restored = save_and_restore(tmp_path / "state", nnx.state(model), abstract)
    expected = shard(fp8x.load(even, recipe), mesh_of(**target))
    assert as_bytes(restored) == as_bytes(nnx.state(expected))
    assert shardings(restored) == shardings(nnx.state(expected))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(restored)} >= {"float8_e4m3fn", "float8_e8m0fnu"}
    assert nnx.merge(graphdef, restored).placement == expected.placement


@pytest.mark.slow
def test_a_layout_with_padding_is_of_one_mesh(tmp_path):
    recipe = "fp8_e4m3fn_bf16_block_scale"
    model = shard(fp8x.load(QWEN, recipe), mesh_of(tensor=2, expert=2))
    _, same = nnx.split(shard(describe(QWEN, recipe), mesh_of(tensor=2, expert=2)))
    _, other = nnx.split(shard(describe(QWEN, recipe), mesh_of(tensor=4)))
    assert as_bytes(save_and_restore(tmp_path / "state", nnx.state(model), same)) == as_bytes(nnx.state(model))
    with pytest.raises(ValueError, match=r"shape"):
        save_and_restore(tmp_path / "again", nnx.state(model), other)


def shardings(state: nnx.State) -> list:
    return [leaf.sharding for leaf in jax.tree.leaves(state)]
