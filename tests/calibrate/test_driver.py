import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8x
from fp8x.calibrate import driver
from fp8x.errors import CalibrationError, DataError
from fp8x.nn.walk import named_layers


class Mlp(nnx.Module):
    """Two linears around a mixture of experts."""

    def __init__(self, rngs):
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.moe = fp8x.nn.MoE(64, 32, 4, 1, rngs=rngs)
        self.down = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, x):
        return self.down(self.moe(self.up(x)))


def batches(count=3, rows=8, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(rows, 32)), jnp.float32) for _ in range(count)]


def model(code="e4m3_e4m3_bf16"):
    return fp8x.quantize_model(Mlp(nnx.Rngs(0)), code)


def test_first_layer_amax_is_numpys_over_all_batches():
    data = batches()
    report = fp8x.calibrate(model(), data)
    amax = np.abs(np.concatenate(data)).max()
    assert report.batches == 3
    np.testing.assert_array_equal(report.layers["up"].amax, [[amax]])
    np.testing.assert_array_equal(report.layers["up"].scale, [[amax * np.float32(1 / 448)]])
    assert report.layers["up"].tokens == 24


def test_per_group_amax_is_numpys():
    code = "fp8_e4m3fn_bf16_block_scale_static_activation"
    layer = fp8x.nn.Linear(300, 8, recipe=code, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(5, 300)).astype(np.float32)
    report = fp8x.calibrate(layer, [jnp.asarray(x)])
    expected = [[np.abs(x[:, :128]).max(), np.abs(x[:, 128:256]).max(), np.abs(x[:, 256:]).max()]]
    np.testing.assert_array_equal(report.layers[""].amax, expected)


def test_scales_land_in_the_layers_and_calibration_ends():
    calibrated = model()
    report = fp8x.calibrate(calibrated, batches())
    for path, layer in named_layers(calibrated).items():
        np.testing.assert_array_equal(layer.input_scale[...], report.layers[path].scale)
        assert not layer.is_calibrating
    assert np.isfinite(calibrated(batches()[0]).astype(jnp.float32)).all()


def test_max_calibrate_code_is_the_same_recipe_in_calibration():
    observed = model("e4m3_e4m3_bf16_max_calibrate")
    assert all(layer.is_calibrating for layer in named_layers(observed).values())
    fp8x.calibrate(observed, batches())
    plain = model()
    fp8x.calibrate(plain, batches())
    for one, other in zip(named_layers(observed).values(), named_layers(plain).values()):
        assert one.recipe == other.recipe == fp8x.recipe("e4m3_e4m3_bf16")
        np.testing.assert_array_equal(one.input_scale[...], other.input_scale[...])


def test_calibration_forward_is_the_inference_forward_with_the_running_scale():
    x = batches(1)[0]
    layer = fp8x.nn.Linear(32, 16, recipe="e4m3_e4m3_bf16", rngs=nnx.Rngs(0))
    layer.start_calibration()
    observed = layer(x)
    layer.finish_calibration()
    np.testing.assert_array_equal(observed, layer(x))


def test_calibrating_again_forgets_the_scales_before():
    calibrated = model()
    fp8x.calibrate(calibrated, [100 * x for x in batches()])
    again = fp8x.calibrate(calibrated, batches()).layers
    first = fp8x.calibrate(model(), batches()).layers
    for path in first:
        np.testing.assert_array_equal(again[path].amax, first[path].amax)


def test_batches_of_one_shape_compile_once():
    before = driver._step._cache_size()
    fp8x.calibrate(model(), batches(5, rows=7))
    assert driver._step._cache_size() == before + 1


def test_experts_that_saw_little_are_named():
    m = model()
    m.up.bias[...] = jnp.zeros_like(m.up.bias[...])
    report = fp8x.calibrate(m, batches(1))
    counts = report.layers["moe.w13"].tokens
    assert counts.sum() == 8 and counts.shape == (4,)
    expected = [f"moe.{w} expert {e}" for w in ("w13", "w2") for e in range(4) if counts[e] < 3]
    assert sorted(report.undersampled(3)) == sorted(expected)
    assert set(report.undersampled(9)) >= {"up", "down"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_activations_are_an_error_that_names_the_layers(value):
    m = model()
    with pytest.raises(CalibrationError, match=r"up, moe.w13, moe.w2, down are fed NaN or Inf \(up in 1 rows\)"):
        fp8x.calibrate(m, [batches(1)[0], batches(1)[0].at[2, 3].set(value)])
    m.up.weight_scale[...] = m.up.weight_scale[...] * np.nan
    with pytest.raises(CalibrationError, match=r"model: moe.w13, moe.w2, down are fed NaN or Inf \(moe.w13 in 8 rows"):
        fp8x.calibrate(m, batches(1))
    assert not m.up.is_calibrating


def test_no_batches():
    m = model()
    with pytest.raises(DataError, match="batches: there are none"):
        fp8x.calibrate(m, [])
    assert not any(layer.is_calibrating for layer in named_layers(m).values())


def test_no_static_layer():
    with pytest.raises(CalibrationError, match="no layer has a static activation scale"):
        fp8x.calibrate(model("mxfp8_bf16"), batches())


def test_a_layer_that_sees_zeros_is_named_and_the_old_scales_stay():
    m = model()
    fp8x.calibrate(m, batches())
    before = m.up.input_scale[...]
    with pytest.raises(CalibrationError, match=r"up, moe.w13, moe.w2, down are fed nothing but zeros"):
        fp8x.calibrate(m, [jnp.zeros((4, 32))])
    np.testing.assert_array_equal(m.up.input_scale[...], before)
    assert not m.up.is_calibrating


def test_order_and_company_of_batches_change_no_bit():
    data = batches(4)
    first, again = fp8x.calibrate(model(), data).layers, fp8x.calibrate(model(), data[::-1]).layers
    alone = [fp8x.calibrate(model(), [batch]).layers for batch in data]
    for path in first:
        np.testing.assert_array_equal(first[path].amax, again[path].amax)
        np.testing.assert_array_equal(first[path].amax, np.max([one[path].amax for one in alone], axis=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "entropy"}, "method: 'entropy' is unknown; use one of 'max', 'percentile', 'mse'"),
        (
            {"method": "percentile", "percentile": 0.9999},
            "percentile: 0.9999 does not fit; of a hundred, use one up to",
        ),
        ({"method": "percentile", "percentile": 101.0}, "percentile: 101.0 does not fit"),
        ({"percentile": float("nan")}, "percentile: nan does not fit"),
    ],
)
def test_bad_methods(options, message):
    with pytest.raises(CalibrationError, match=message):
        fp8x.calibrate(model(), batches(), **options)


class Device:
    """Observes nothing; a batch is done once it has been waited for."""

    def __init__(self):
        self.given, self.done = [], []

    def add(self, batch):
        assert len(self.given) - len(self.done) < driver.IN_FLIGHT
        self.given.append(batch)
        return Result(self, batch)


class Result:
    def __init__(self, device, batch):
        self.device, self.batch = device, batch

    def block_until_ready(self):
        self.device.done.append(self.batch)


@pytest.mark.parametrize("count", [1, 2, driver.IN_FLIGHT, 12])
def test_few_batches_are_in_flight_and_progress_is_of_those_done(count):
    device, reports = Device(), []

    def progress(done):
        assert done == len(device.done)
        reports.append(done)

    assert driver._observe_all(device, map(np.int32, range(count)), None, progress) == count
    assert device.done == device.given == [(index,) for index in range(count)]
    assert reports == [*range(1, count + 1)]


def test_progress_of_a_model():
    reports = []
    fp8x.calibrate(model(), batches(), progress=reports.append)
    assert reports == [1, 2, 3]
