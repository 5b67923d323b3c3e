"""Calibration of decoders that are split over a mesh: what the whole decoder gives, but for how sums are rounded."""

import json

import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from test_sharded import collectives, mesh_of

import fp8x
from fp8x.calibrate import CalibrationReport, Sidecar, sharded, start
from fp8x.errors import CalibrationError, MeshError
from fp8x.models.config import DecoderConfig
from fp8x.models.decoder import Decoder
from fp8x.nn.walk import named_layers

IDS = np.random.default_rng(0).integers(0, 256, (4, 8)).astype(np.int32)
GROUPS = "fp8_e4m3fn_bf16_block_scale_static_activation"


@pytest.fixture(scope="module")
def decoder(tiny_checkpoint):
    """Makes the decoder of the tiny checkpoint's sizes, with one layer."""
    hf = json.loads((tiny_checkpoint / "config.json").read_text()) | {"num_hidden_layers": 1}
    return lambda code: fp8x.quantize_model(Decoder(DecoderConfig.from_hf(hf), rngs=nnx.Rngs(0)), code)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "axes"),
    [
        (GROUPS, {"data": 2, "tensor": 2}),
        ("e4m3_e4m3_bf16", {"tensor": 2, "expert": 2, "axis_type": AxisType.Explicit}),
    ],
    ids=str,
)
def test_agrees_with_the_whole_decoder(code, axes, decoder):
    expected = fp8x.calibrate(decoder(code), [IDS[:2], IDS[2:]])
    model = fp8x.sharding.shard(decoder(code), mesh_of(**axes))
    report = fp8x.calibrate(model, [IDS])
    for path, layer in report.layers.items():
        assert layer.amax.shape == expected.layers[path].amax.shape
        np.testing.assert_allclose(layer.amax, expected.layers[path].amax, rtol=2.0**-6, err_msg=path)
        np.testing.assert_array_equal(layer.tokens.sum(), expected.layers[path].tokens.sum(), err_msg=path)
    for layer in named_layers(model).values():
        assert layer.input_scale[...].sharding.mesh.size == 4 and not layer.is_calibrating
        assert np.isfinite(np.asarray(layer.input_scale[...])).all()


def test_what_moves(decoder):
    model = fp8x.sharding.shard(decoder(GROUPS), mesh_of(data=2, tensor=2))
    observer = sharded.ShardedObserver(*start(model), model.placement.mesh, True)
    arguments = (observer.statistics, observer.rest, (IDS,), np.ones(2, bool))
    step = sharded._step.lower(observer.graphdef, observer.local, *arguments).compile().as_text()
    # Of the forward pass: the embedding and o_proj. No layer looks at what comes after.
    assert [kind for kind, _ in collectives(step)] == ["all-reduce"] * 2
    reduce = sharded._reduce.lower(observer.mesh, observer.statistics).compile().as_text()
    # Maxima of what is whole and of what is split, and counts.
    assert [kind for kind, _ in collectives(reduce)] == ["all-reduce"] * 3


def test_what_a_split_decoder_can_not_do(decoder):
    model = fp8x.sharding.shard(decoder(GROUPS), mesh_of(tensor=2))
    with pytest.raises(CalibrationError, match="method: 'mse' takes the whole model on every device, but this one is"):
        fp8x.calibrate(model, [IDS], method="mse")
    with pytest.raises(MeshError, match="mesh: it is not the one that the model is on; leave it out"):
        fp8x.calibrate(model, [IDS], mesh_of(data=2))
    with pytest.raises(CalibrationError, match=r"calibration: the model is on a mesh; give the file to fp8x\.load"):
        Sidecar(GROUPS, CalibrationReport({}, 1, "max", None)).apply(model)
