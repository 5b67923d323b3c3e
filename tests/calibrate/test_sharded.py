"""Calibration over many devices: bit for bit what one device finds in the same portions."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from meshes import devices, mesh_of

import fp8x
from fp8x.calibrate import all_reduce, observe, sharded, start, static_layers
from fp8x.errors import MeshError
from fp8x.nn.observer import BINS
from fp8x.nn.walk import named_layers

CODE = "fp8_e4m3fn_bf16_block_scale_static_activation"
PORTION = 3  # rows


class Mlp(nnx.Module):
    """A linear and a mixture of experts."""

    def __init__(self, rngs):
        self.up = nnx.Linear(32, 160, rngs=rngs)
        self.moe = fp8x.nn.MoE(160, 32, 4, 2, rngs=rngs)

    def __call__(self, x):
        return self.moe(self.up(x))


def model():
    return fp8x.quantize_model(Mlp(nnx.Rngs(0)), CODE)


def rows(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 32)).astype(np.float32)


def split(x, size):
    return [x[start : start + size] for start in range(0, len(x), size)]


def assert_same(report, expected):
    assert list(report.layers) == list(expected.layers)
    for path, layer in report.layers.items():
        for name in ("amax", "scale", "tokens"):
            actual, wanted = getattr(layer, name), getattr(expected.layers[path], name)
            assert actual.dtype == wanted.dtype
            np.testing.assert_array_equal(actual, wanted, err_msg=f"{path}.{name}")


METHOD = {"method": "percentile", "percentile": 99}  # gathers all there is


@pytest.fixture(scope="module")
def one_device():
    """What one device finds in 24 rows, portion by portion."""
    return fp8x.calibrate(model(), split(rows(24), PORTION), **METHOD)


_EVENTS = []
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **tags: _EVENTS.append((event, tags)))


@pytest.fixture
def compiled():
    """How often the sharded step has been compiled in this test."""
    _EVENTS.clear()
    step = ("/jax/core/compile/backend_compile_duration", {"fun_name": f"jit({sharded._step.__name__})"})
    return lambda: _EVENTS.count(step)


@pytest.mark.sample
@pytest.mark.parametrize(
    "axes", [{"data": 1}, {"data": 2}, {"data": 4}, {"data": 8}, {"expert": 2, "data": 2, "tensor": 2}], ids=str
)
def test_equals_one_device_bit_for_bit_and_compiles_once(axes, one_device, compiled):
    mesh, calibrated = mesh_of(**axes), model()
    batches = split(rows(24), PORTION * axes["data"])
    done = []
    report = fp8x.calibrate(calibrated, batches, mesh, progress=done.append, **METHOD)
    assert done == [*range(1, len(batches) + 1)]
    assert compiled() <= 1 and report.batches == len(batches)  # 0 where another test had the mesh
    assert_same(report, one_device)
    for path, layer in named_layers(calibrated).items():
        np.testing.assert_array_equal(layer.input_scale[...], one_device.layers[path].scale)


@pytest.mark.slow
@pytest.mark.parametrize("is_set", [False, True])
def test_explicit_axes(is_set, one_device):
    mesh = mesh_of(AxisType.Explicit, data=4)
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        report = fp8x.calibrate(model(), split(rows(24), 12), mesh, **METHOD)
    assert_same(report, one_device)


@pytest.mark.slow
def test_without_a_data_axis_every_device_sees_all(one_device):
    assert_same(fp8x.calibrate(model(), split(rows(24), PORTION), mesh_of(tensor=2), **METHOD), one_device)


def test_in_pmap(one_device):
    """The idiom of docs/calibration.md."""
    devices(4)
    calibrated = model()
    graphdef, statistics, rest = start(calibrated)
    step = jax.pmap(
        lambda statistics, rest, x: observe(graphdef, rest, statistics, (x,)), axis_name="data", in_axes=(0, None, 0)
    )
    found = jax.tree.map(lambda s: jnp.zeros((4, *s.shape), s.dtype), statistics)
    for x in split(rows(24), 4 * PORTION):
        found = step(found, rest, x.reshape(4, PORTION, 32))
    found = jax.pmap(lambda s: all_reduce(s, "data"), axis_name="data")(found)
    nnx.update(calibrated, jax.tree.map(lambda s: s[0], found))
    for path, layer in static_layers(calibrated).items():
        np.testing.assert_array_equal(layer.amax[...], one_device.layers[path].amax)
        np.testing.assert_array_equal(layer.tokens[...], one_device.layers[path].tokens)
        layer.finish_calibration()
    assert np.isfinite(calibrated(rows(2)).astype(jnp.float32)).all()


def test_another_split_moves_an_amax_by_a_last_bit_of_bf16_at_most(one_device):
    whole = fp8x.calibrate(model(), [rows(24)], **METHOD)
    for path, layer in whole.layers.items():
        np.testing.assert_allclose(layer.amax, one_device.layers[path].amax, rtol=2.0**-7)
        np.testing.assert_array_equal(layer.tokens.sum(), one_device.layers[path].tokens.sum())
    np.testing.assert_array_equal(whole.layers["up"].amax, one_device.layers["up"].amax)


def test_a_last_batch_that_leaves_devices_idle_compiles_nothing_and_a_rest_once(one_device, compiled):
    mesh, portions = mesh_of(data=4), split(rows(23), PORTION)
    fp8x.calibrate(model(), [rows(12)], mesh, **METHOD)
    before = compiled()
    report = fp8x.calibrate(model(), [rows(24)[:12], rows(24)[12:21]], mesh, **METHOD)
    assert compiled() == before
    assert_same(report, fp8x.calibrate(model(), split(rows(24)[:21], PORTION), **METHOD))
    report = fp8x.calibrate(model(), [rows(24)[:12], rows(24)[12:23]], mesh, **METHOD)
    assert compiled() == before + 1 and len(portions[-1]) == 2
    assert_same(report, fp8x.calibrate(model(), portions, **METHOD))


def collectives(text):
    """Kind and bytes of each collective of a compiled program."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    found = re.findall(rf"= \(?(\w+)\[([\d,]*)\][^=\n]*? ({names})(?:-start)?\(", text)
    sizes = {"f32": 4, "u32": 4, "s32": 4, "bf16": 2, "f8e4m3fn": 1}
    return [
        (kind, sizes[dtype] * int(np.prod([int(n) for n in shape.split(",") if n]))) for dtype, shape, kind in found
    ]


def test_devices_meet_once_in_two_all_reduces():
    for histogram in (True, False):
        observer = sharded.ShardedObserver(*start(model(), histogram=histogram), mesh_of(data=2, tensor=2))
        reduce = sharded._reduce.lower(observer.mesh, observer.statistics).compile().as_text()
        groups = 1 + 2 + 1  # of up, w13, w2
        maxima = 4 * (groups + 3)  # and how many rows with NaN each saw
        sums = 4 * (1 + 2 * 4) + (4 * groups * 2 * BINS if histogram else 0)  # tokens of the linear and of experts
        assert collectives(reduce) == [("all-reduce", maxima), ("all-reduce", sums)]
    batch, is_real = (np.zeros((2 * PORTION, 32), np.float32),), np.ones(2, bool)
    step = sharded._step.lower(observer.graphdef, observer.local, observer.statistics, observer.rest, batch, is_real)
    assert collectives(step.compile().as_text()) == []


@pytest.mark.parametrize(
    ("mesh", "batches", "message"),
    [
        ({"data": 4}, [rows(6)], "the first has 6 rows, which 4 devices along mesh axis 'data' do not divide; give "
         "batches of 4 or 8 rows"),
        ({"data": 4}, [rows(3)], "give batches of 4 rows"),
        ({"data": 2}, [(rows(4), 3.0)], "shapes [(4, 32), ()] do not fit a mesh; every array needs the same rows"),
        ({"data": 2}, [(rows(4), rows(2))], "shapes [(4, 32), (2, 32)] do not fit a mesh"),
        ({"model": 2}, [rows(4)], "axis 'model' is unknown; use data, tensor, expert"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_mesh(mesh, batches, message):
    m = model()
    with pytest.raises(MeshError) as error:
        fp8x.calibrate(m, batches, mesh_of(**mesh))
    assert message in str(error.value)
    assert not m.up.is_calibrating


def test_a_mesh_that_is_none():
    with pytest.raises(MeshError, match=r"mesh: 'data=2' is no Mesh; make one with jax\.make_mesh"):
        fp8x.calibrate(model(), [rows(4)], mesh="data=2")
