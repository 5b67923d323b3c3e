"""The sidecar: written, read, applied, and refused where it does not fit."""

import dataclasses
import json
import os

import numpy as np
import pytest
from flax import nnx

import fp8x
from fp8x.calibrate import CalibrationReport, Dataset, LayerStatistics, Sidecar
from fp8x.calibrate.sidecar import read
from fp8x.errors import CalibrationError
from fp8x.nn.walk import named_layers

CODE = "fp8_e4m3fn_bf16_block_scale_static_activation"


def statistics(k=256, activation="e4m3 ·×128 f32", seed=0, tokens=9):
    scale = np.random.default_rng(seed).random((1, -(-k // 128)), np.float32) / 3
    return LayerStatistics(activation, scale * 448, scale, np.asarray(tokens, np.int32))


def sidecar(**layers):
    report = CalibrationReport(layers or {"0": statistics(seed=1), "1": statistics(seed=2)}, 3, "percentile", 99.9)
    return Sidecar(CODE, report, Dataset("texts.jsonl", "ab12", 5, 2, 64, 128, 3, "cd34"))


def model(code=CODE):
    return fp8x.quantize_model(nnx.List([nnx.Linear(256, 32, rngs=nnx.Rngs(0)) for _ in range(2)]), code)


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    written = sidecar(one=statistics(300), two=statistics(tokens=[1, 2]))
    written.write(tmp_path / "calibration.json")
    assert os.listdir(tmp_path) == ["calibration.json"]
    found = read(tmp_path / "calibration.json")
    assert (found.recipe, found.dataset) == (CODE, written.dataset)
    assert dataclasses.replace(found.report, layers={}) == dataclasses.replace(written.report, layers={})
    for path, layer in written.report.layers.items():
        for field in dataclasses.fields(layer):
            actual, expected = getattr(found.report.layers[path], field.name), getattr(layer, field.name)
            np.testing.assert_array_equal(actual, expected)
            assert getattr(actual, "dtype", None) == getattr(expected, "dtype", None)


def test_the_file(tmp_path):
    sidecar().write(tmp_path / "calibration.json")
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert found["method"] == "percentile" and found["percentile"] == 99.9 and found["version"] == 2
    assert found["dataset"] == {"file": "texts.jsonl", "sha256": "ab12"}
    expected = {"seed": 5, "samples": 2, "length": 64, "tokens": 128, "document_rows": 3, "rows_sha256": "cd34"}
    assert {key: found[key] for key in expected} == expected
    assert set(found["layers"]["1"]) == {"activation", "amax", "scale", "tokens"}


def test_dataset_of_a_file(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"abc")
    found = Dataset.of(tmp_path / "d.jsonl", np.frombuffer(b"abcdefgh", "<i4")[None], 7, 4)
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    of_rows = "9c56cc51b374c3ba189210d5b6d4bf57790d351c96c47c02190ecf1e430635ab"  # printf abcdefgh | sha256sum
    assert found == Dataset("d.jsonl", sha256, 7, 1, 2, 2, 4, of_rows)


def test_apply_sets_what_calibrate_sets():
    calibrated, other = model(), model()
    x = np.random.default_rng(0).normal(size=(8, 256)).astype(np.float32)
    reports = {path: fp8x.calibrate(layer, [x]) for path, layer in named_layers(calibrated).items()}
    layers = {path: report.layers[""] for path, report in reports.items()}
    Sidecar(CODE, CalibrationReport(layers, 1, "max", None)).apply(other)
    for one, two in zip(calibrated, other):
        np.testing.assert_array_equal(one.input_scale[...], two.input_scale[...])
        np.testing.assert_array_equal(np.asarray(one(x), np.float32), np.asarray(two(x), np.float32))


@pytest.mark.parametrize(
    ("code", "layers", "message"),
    [
        (CODE, {"0": statistics()}, "calibration: 1 is without a scale in it; is it another model's?"),
        (CODE, {"0": statistics(), "1": statistics(), "2.q": statistics()}, "2.q is in it, but not calibrated in this"),
        (CODE, {"0": statistics(384), "1": statistics()}, "scale of 0 is [1, 3], but its input of 256 features takes"),
        ("e4m3_e4m3_bf16", None, "0 was calibrated for e4m3 ·×128 f32, but its activations are in e4m3 ·×· f32; use"),
        ("mxfp8_bf16", None, "no layer has a static activation scale"),
    ],
)
def test_what_does_not_fit_is_named(code, layers, message):
    m = model(code)
    with pytest.raises(CalibrationError) as error:
        sidecar(**(layers or {})).apply(m)
    assert message in str(error.value)
    assert all(layer.input_scale is None or np.isnan(layer.input_scale[...]).all() for layer in m)


BROKEN = {
    "no such file": (None, "No such file"),
    "no json": ("{", "is no JSON"),
    "a list": ("[]", "is of version None, not 2"),
    "of the future": ('{"version": 3}', "is of version 3, not 2"),
    "cut": ('{"version": 2, "recipe": "x"}', "is damaged: KeyError('layers')"),
    "zero": (
        '{"version": 2, "recipe": "x", "batches": 1, "method": "max", "layers": {"a.b": {"activation": "e4m3", '
        '"amax": [[1]], "scale": [[0.0]], "tokens": 1}}}',
        "a.b has a scale that is not finite and positive",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file(tmp_path, case):
    content, message = BROKEN[case]
    if content is not None:
        (tmp_path / "c.json").write_text(content)
    with pytest.raises(CalibrationError) as error:
        read(tmp_path / "c.json")
    assert message in str(error.value) and "c.json" in str(error.value)


def test_load_applies_it_and_names_what_does_not_fit(tiny_checkpoint, tmp_path):
    path = tmp_path / "calibration.json"
    loaded = fp8x.load(tiny_checkpoint, "e4m3_e4m3_bf16")
    scheme = "e4m3 ·×· f32"
    layers = {p: statistics(64, scheme, seed) for seed, p in enumerate(named_layers(loaded))}
    Sidecar("e4m3_e4m3_bf16", CalibrationReport(layers, 1, "max", None)).write(path)
    found = fp8x.load(tiny_checkpoint, "e4m3_e4m3_bf16", calibration=path)
    for name, layer in named_layers(found).items():
        np.testing.assert_array_equal(layer.input_scale[...], layers[name].scale)
    with pytest.raises(CalibrationError, match=r"layers\.0\.mlp\.w13, .* not calibrated in this model; use"):
        fp8x.load(tiny_checkpoint, "mxfp8_bf16", calibration=path)
    with pytest.raises(CalibrationError, match=r"layers\.0\.mlp\.w13 is in it, but not calibrated"):
        fp8x.load(tiny_checkpoint, "e4m3_e4m3_bf16", rules={r"layers\.0\.mlp\.w13": None}, calibration=path)
