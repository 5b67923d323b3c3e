"""Options that several commands take."""

import jax
import pytest
from jax.sharding import AxisType

from fp8x.cli.options import parse_mesh
from fp8x.errors import MeshError


def test_mesh_of_the_first_devices():
    assert parse_mesh(None) is None
    mesh = parse_mesh("data=2, tensor=2")
    assert dict(mesh.shape) == {"data": 2, "tensor": 2} and mesh.axis_types == (AxisType.Auto,) * 2
    assert mesh.devices.ravel().tolist() == jax.devices()[:4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "axis '' is unknown; use data, tensor, expert"),
        ("model=2", "axis 'model' is unknown"),
        ("data=2,data=2", "axis 'data' comes twice"),
        ("data=0", "the size of axis 'data' is '0'"),
        ("data", "the size of axis 'data' is ''"),
        ("data=2,tensor=two", "the size of axis 'tensor' is 'two'"),
        ("data=16", "needs 16 devices, but there are 8 (on a machine without GPUs run with JAX_NUM_CPU_DEVICES=16"),
    ],
)
def test_a_mesh_that_can_not_be(text, message):
    with pytest.raises(MeshError) as error:
        parse_mesh(text)
    assert str(error.value).startswith(f"--mesh {text}: ") and message in str(error.value)
