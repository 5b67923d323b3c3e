"""Ops under jit on a mesh, without a shard_map around them: one device's numbers, however operands lie."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import devices
from metric import as_bits, assert_close
from on_meshes import GROUP, LAYOUTS, PAIRS, Form, mesh_of

import fp8x
from fp8x import ops
from fp8x.benchmark.program import environment
from fp8x.errors import BackendError
from fp8x.ops import dispatch
from fp8x.pallas import aot
from fp8x.scheme import Scheme, mx, per_row, per_tensor

OPS = ("matmul", "grouped_matmul", "expert_matmul", "gated_matmul")
# K that is split is added up in another order. A 16-bit number of gate or up may round the other way, and its code.
FLOAT32, GATED = 2.0**-20, 2.0**-8
QUICK = [
    ("matmul", "blocks", "K of both"),
    ("matmul", "mx", "columns by four"),
    ("grouped_matmul", "blocks", "rows and columns"),
    ("grouped_matmul", "rows", "experts where rows are"),
    ("expert_matmul", "w8a16", "experts and K"),
    ("gated_matmul", "blocks", "rows and columns"),
    ("gated_matmul", "mx", "experts"),
]
kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)


@pytest.fixture
def opaque(monkeypatch):
    """Kernels that XLA can't split, by what XLA's own ones compute."""
    kernels = [
        dataclasses.replace(kernel, name=kernel.name.replace("xla", "sm90"), backend="mosaic_gpu")
        for kernel in dispatch.KERNELS
        if kernel.name.startswith("xla") and kernel.op != "quantize"
    ]

    def one_row(call):
        return None if call.has_scale or call.scheme.block[-2:][0] == 1 else "finds the amax of a row"

    quantize = next(kernel for kernel in dispatch.KERNELS if kernel.name == "xla_quantize")
    kernels.append(dataclasses.replace(quantize, name="sm90_quantize", backend="mosaic_gpu", unsupported=one_row))
    others = (kernel for kernel in dispatch.KERNELS if kernel.backend != "mosaic_gpu")
    monkeypatch.setattr(dispatch, "KERNELS", (*kernels, *others))


def check(form: Form, kind: AxisType, backend: str) -> None:
    operands = form.operands()
    with fp8x.backend("xla"):
        expected = jax.jit(form)(*operands)
    with fp8x.backend(backend):
        y = jax.jit(form)(*form.place(operands, mesh_of(kind)))
    assert_close(np.asarray(y), expected, tolerance=GATED if form.op == "gated_matmul" else FLOAT32)


@pytest.mark.sample
@kinds
@pytest.mark.parametrize("form", QUICK, ids=str)
def test_one_devices_numbers_by_kernels(opaque, kind, form):
    check(Form(*form), kind, "mosaic_gpu")


@pytest.mark.sample
@pytest.mark.parametrize("form", QUICK[::3], ids=str)
def test_one_devices_numbers_by_xla(form):
    check(Form(*form), AxisType.Explicit, "xla")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("op", "pair"),
    # A gate's result is quantized.
    [(op, pair) for op in OPS for pair in PAIRS if op != "gated_matmul" or PAIRS[pair][1] is not None],
)
@pytest.mark.parametrize("backend", ["mosaic_gpu", "xla"])
@kinds
def test_every_form(opaque, kind, backend, op, pair, layout):
    check(Form(op, pair, layout), kind, backend)


@pytest.mark.sample
@kinds
def test_gradients(opaque, kind):
    form = Form("grouped_matmul", "rows", "rows and columns")
    operands = form.operands()

    def loss(x, w, bias, groups):
        return jnp.sum(form(x, w, bias, groups) ** 2)

    expected = jax.jit(jax.grad(loss, argnums=(0, 2)))(*operands)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh), fp8x.backend("mosaic_gpu"):
        found = jax.jit(jax.grad(loss, argnums=(0, 2)))(*form.place(operands, mesh))
    for one, other in zip(found, expected):
        assert_close(np.asarray(one), other)


@kinds
def test_mapped(opaque, kind):
    form = Form("matmul", "blocks", "rows and columns")
    x, w, bias, _ = form.operands()
    expected = jax.jit(form)(x, w, bias, None)
    mesh = mesh_of(kind)
    _, w, bias, _ = form.place([x, w, bias, None], mesh)
    x = jax.device_put(x.reshape(2, -1, x.shape[-1]), NamedSharding(mesh, P(None, "data")))
    with fp8x.backend("mosaic_gpu"):
        y = jax.jit(jax.vmap(form, (0, None, None, None)))(x, w, bias, None)
    assert_close(np.asarray(y).reshape(expected.shape), expected, tolerance=FLOAT32)


@pytest.mark.sample
@pytest.mark.parametrize("spec", [("data", "tensor"), (None, ("tensor", "data")), (("data", "tensor"), None)], ids=str)
@pytest.mark.parametrize("scheme", [per_tensor(), per_row(), GROUP, Scheme("e4m3", block=(128, 96)), mx()], ids=str)
def test_quantize_and_dequantize_on_an_explicit_mesh(scheme, spec):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(256, 768)), jnp.bfloat16)
    placed = jax.device_put(x, NamedSharding(mesh_of(AxisType.Explicit), P(*spec)))

    def both(x):
        q = fp8x.quantize(x, scheme)
        return q.data, q.scale, q.dequantize(jnp.bfloat16)

    found = jax.jit(both)(placed)
    for one, other in zip(found, jax.jit(both)(x)):
        np.testing.assert_array_equal(as_bits(one), as_bits(other))
    assert found[0].sharding.spec == found[2].sharding.spec == P(*spec)


class TestExplain:
    def choice(self, layout, op="matmul", kind=AxisType.Explicit):
        form = Form(op, "blocks", layout)
        with fp8x.backend("mosaic_gpu"):
            return ops.explain(form, *form.place(form.operands(), mesh_of(kind)))[0]

    def test_a_devices_part(self):
        choice = self.choice("rows and columns")
        assert str(choice.call).startswith("matmul [32, 512] x [192, 512]")
        assert choice.mesh == "a device's part: rows over data, columns over tensor"
        assert str(choice).splitlines()[-2].strip() == choice.mesh

    def test_what_moves(self):
        assert self.choice("columns where rows are").mesh == (
            "a device's part: rows over data; w is gathered over data: rows of x lie there, or it does not divide them"
        )

    def test_why_a_gate_takes_two_steps(self):
        rejected = dict(self.choice("K of both", "gated_matmul").rejected)
        assert rejected["sm90_fp8_block_gated"] == "quantizes a whole sum, of which a device has a part here"

    def test_auto_axes(self):
        assert self.choice("rows and columns", kind=AxisType.Auto).mesh.startswith("on Auto axes: a device runs it")

    def test_axes_of_two_kinds(self):
        mesh = jax.make_mesh((2, 2), ("data", "tensor"), (AxisType.Explicit, AxisType.Auto), devices=devices(4))
        form = Form("matmul", "blocks", "rows and columns")
        with (
            fp8x.backend("mosaic_gpu"),
            pytest.raises(BackendError, match="can't be split over Auto axes where others"),
        ):
            ops.explain(form, *form.place(form.operands(), mesh))


@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)], ids=lambda kind: kind.name
)
def test_programs_for_four_gpus_gather_no_weight(kind):
    """XLA asks how operands came to lie as it compiles, so the process that traces compiles too."""
    script = Path(__file__).with_name("compile_for_four_gpus.py")
    flags = "--xla_force_host_platform_device_count=4"
    child = subprocess.run(
        [sys.executable, script, kind.name], env=environment(flags), capture_output=True, text=True, cwd=Path.cwd()
    )
    assert child.returncode == 0, child.stderr[-3000:]
