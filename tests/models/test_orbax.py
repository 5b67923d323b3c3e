"""Whole quantized models through orbax, as docs/checkpoints.md shows it."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import fp8x
from fp8x.models import Decoder, DecoderConfig

QWEN = Path(__file__).parents[1] / "goldens" / "qwen3_moe_bf16"
RULES = {r".*\.o_proj": None}  # its columns are no multiple of 32


def describe(recipe: str) -> Decoder:
    """The quantized model without its weights."""
    config = DecoderConfig.from_hf(json.loads((QWEN / "config.json").read_text()))
    return nnx.eval_shape(lambda: fp8x.quantize_model(Decoder(config, rngs=nnx.Rngs(0)), recipe, RULES))


def as_bytes(state: nnx.State) -> dict:
    return {path: (v.dtype, v.shape, np.asarray(v[...]).tobytes()) for path, v in nnx.to_flat_state(state)}


@pytest.mark.parametrize(
    ("recipe", "dtypes"),
    [
        ("mxfp8_mxfp8_bf16", {"bfloat16", "float8_e4m3fn", "float8_e8m0fnu"}),
        ("e5m2_e5m2_bf16", {"bfloat16", "float8_e5m2", "float32"}),
    ],
)
def test_a_model_comes_back_bit_for_bit(tmp_path, recipe, dtypes):
    _, state = nnx.split(fp8x.load(QWEN, recipe, rules=RULES))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        graphdef, abstract = nnx.split(describe(recipe))
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(restored)} == dtypes
    assert as_bytes(restored) == as_bytes(state)
    nnx.merge(graphdef, restored)
