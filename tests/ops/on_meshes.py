"""Ops on a mesh of 2 × 2 devices, whose operands lie in several ways: what the tests of meshes share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import devices

import fp8x
from fp8x import ops
from fp8x.array import ScaledArray
from fp8x.scheme import Scheme, mx, per_row, per_tensor
from fp8x.sharding import scale_spec

GROUP, BLOCK = Scheme("e4m3", block=(1, 128)), Scheme("e4m3", block=(128, 128))
# A weight scheme and an activation scheme; None leaves activations in 16 bits.
PAIRS = {
    "blocks": (BLOCK, GROUP),
    "rows": (per_row(), per_row()),
    "tensor": (per_tensor(), per_tensor()),
    "mx": (mx(), mx()),
    "w8a16": (per_row(), None),
}
# How x [M, K] and w [E, N, K] lie. N is 384: over two devices or four, boundaries cut blocks of 128.
LAYOUTS = {
    "rows and columns": (("data", None), (None, "tensor", None)),
    "K of both": (("data", "tensor"), (None, None, "tensor")),
    "K of w": ((None, None), (None, None, "tensor")),
    "experts": ((None, None), ("tensor", None, None)),
    "experts where rows are": (("data", None), ("data", None, None)),
    "columns where rows are": (("data", None), (None, "data", None)),
    "columns by four": ((None, None), (None, ("data", "tensor"), None)),
    "experts and K": ((None, None), ("tensor", None, "data")),
}
M, N, K, E = 64, 384, 512, 4


def mesh_of(kind: AxisType) -> Mesh:
    return jax.make_mesh((2, 2), ("data", "tensor"), (kind,) * 2, devices=devices(4))


@dataclasses.dataclass(frozen=True)
class Form:
    """An op and its operands, on one device or on a mesh."""

    op: str
    pair: str
    layout: str

    def operands(self) -> list:
        rng, (weight, _) = np.random.default_rng(0), PAIRS[self.pair]
        shape = {"matmul": (N, K), "gated_matmul": (E, 2, N, K)}.get(self.op, (E, N, K))
        x = jnp.asarray(rng.normal(size=(M, K)), jnp.bfloat16)
        w = jax.jit(fp8x.quantize, static_argnums=1)(jnp.asarray(rng.normal(size=shape) / 16, jnp.float32), weight)
        groups = jnp.asarray([10, 0, 31, 15] if self.op != "expert_matmul" else rng.integers(0, 6, M), jnp.int32)
        return [x, w, jnp.asarray(rng.normal(size=shape[:-1]), jnp.bfloat16), groups]

    def place(self, operands: list, mesh: Mesh) -> list:
        x, w, bias, groups = operands
        of_x, of_w = LAYOUTS[self.layout]
        of_w = {"matmul": of_w[1:], "gated_matmul": (of_w[0], None, *of_w[1:])}.get(self.op, of_w)

        def put(array, *spec):
            return jax.device_put(array, NamedSharding(mesh, P(*spec)))

        scale = put(w.scale, *scale_spec(P(*of_w), w.scheme, mesh, w.shape))
        return [put(x, *of_x), ScaledArray(put(w.data, *of_w), scale, w.scheme), put(bias, *of_w[:-1]), groups]

    def __call__(self, x, w, bias, groups):
        activation = PAIRS[self.pair][1]
        options = dict(activation=activation, bias=bias, out_dtype=jnp.float32)
        if self.op == "matmul":
            return ops.matmul(x, w, **options)
        if self.op == "gated_matmul":
            h = ops.gated_matmul(x, w, groups, gate="silu", out_activation=activation, **options)
            return h.dequantize(jnp.float32)
        return getattr(ops, self.op)(x, w, groups, **options)
