"""`fp8x calibrate` and what takes its file."""

import json

import numpy as np
import pytest
from meshes import devices
from typer.testing import CliRunner

import fp8x
from fp8x.cli import app
from fp8x.nn.walk import named_layers

CODE = "e4m3_e4m3_bf16"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"Document {i} is about foxes and dogs."}) + "\n" for i in range(7)))
    return path


@pytest.mark.slow
def test_a_mesh_a_method_and_the_file_that_load_takes(tiny_checkpoint, data, tmp_path):
    devices(2)
    output = tmp_path / "calibration.json"
    options = ("--recipe", CODE, "--max-length", 16, "--mesh", "data=2", "--method", "percentile", "--percentile", 99)
    result = invoke(
        "calibrate", tiny_checkpoint, data, *options, "--batch-size", 6, "--output", output, "--min-tokens", 1000
    )
    assert result.exit_code == 0, result.output
    assert "fewer than 1000 tokens in layers.0.mlp.w13 expert 0" in result.stderr
    found = json.loads(output.read_text())
    assert (found["method"], found["percentile"], found["length"]) == ("percentile", 99, 16)
    model = fp8x.load(tiny_checkpoint, CODE, calibration=output)
    layers = named_layers(model)
    assert list(found["layers"]) == list(layers)
    for path, layer in found["layers"].items():
        np.testing.assert_array_equal(layers[path].input_scale[...], np.asarray(layer["scale"], np.float32))
        assert np.asarray(layer["tokens"]).sum() in (found["tokens"], 2 * found["tokens"])  # two experts a token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "entropy"), "method: 'entropy' is unknown"),
        (("--percentile", 0), "percentile: 0.0 does not fit"),
        (("--mesh", "data=99"), "--mesh data=99: needs 99 devices, but there are "),
        (
            ("--mesh", "tensor=8"),
            "mesh: axis 'tensor' has 8 devices, which do not divide the model's 4 attention heads",
        ),
    ],
)
def test_mistakes(tiny_checkpoint, data, options, message):
    devices(8 if "tensor=8" in options else 1)
    result = invoke("calibrate", tiny_checkpoint, data, "--recipe", CODE, *options)
    assert result.exit_code == 2 and message in result.stderr
