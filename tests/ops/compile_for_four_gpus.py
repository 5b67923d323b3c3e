"""Compiles ops by kernels for four described H200s, and looks what became of their weights.

python compile_for_four_gpus.py Auto      # or Explicit; in `fp8x.benchmark.program.environment`
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import compiler
from jax._src.lib import xla_client
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fp8x
from fp8x import ops
from fp8x.array import ScaledArray
from fp8x.benchmark.program import _H200
from fp8x.scheme import Scheme, mx

GROUP, BLOCK = Scheme("e4m3", block=(1, 128)), Scheme("e4m3", block=(128, 128))
N, K = 2048, 1024


def main(kind: str) -> None:
    # How four GPUs are connected is written in another order from one version of XLA to the next.
    for shape in ("1x1x4", "1x4x1", "4x1x1"):
        topology = topologies.get_topology_desc(shape, platform="cuda", topology=shape, target_config=_H200)
        if len({device.process_index for device in topology.devices}) == 1:
            break
    mesh = jax.make_mesh((4,), ("tensor",), (AxisType[kind],), devices=jax.devices("cpu")[:4])

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def weight(scheme, shape, *spec):
        scale = array(scheme.scale_shape(shape), scheme.scale_dtype, *spec)
        return ScaledArray(array(shape, scheme.dtype, *spec), scale, scheme)

    x, sizes = array((64, K), jnp.bfloat16), array((4,), jnp.int32)
    columns, depth = ("tensor", None), (None, "tensor")

    def quantized(x, w, *groups):
        return (ops.grouped_matmul if groups else ops.matmul)(x, w, *groups, activation=GROUP)

    forms = {
        "columns of blocks": (quantized, x, weight(BLOCK, (N, K), *columns)),
        "K of blocks": (quantized, x, weight(BLOCK, (N, K), *depth)),
        "columns of groups": (quantized, x, weight(BLOCK, (4, N, K), None, *columns), sizes),
        "experts": (quantized, x, weight(BLOCK, (4, N, K), "tensor"), sizes),
        "columns of MX": (lambda x, w: ops.matmul(x, w), x, weight(mx(), (N, K), *columns)),
    }
    options = compiler.get_compile_options(
        num_replicas=1, num_partitions=4, device_assignment=np.arange(4).reshape(1, 4)
    )
    for name, (function, *arguments) in forms.items():
        with fp8x.backend("mosaic_gpu"):
            lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
        compiled = topology.devices[0].client.compile(
            lowered.compiler_ir("stablehlo"),
            executable_devices=xla_client.DeviceList(tuple(topology.devices)),
            compile_options=options,
        )
        text = compiled.hlo_modules()[0].to_string()
        whole = re.findall(rf"f8e4m3fn\[{N},{K}\]" if len(arguments) == 2 else rf"f8e4m3fn\[4,{N},{K}\]", text)
        assert not whole, f"{name}: the weight is gathered"
        assert "mosaic_gpu" in text, f"{name}: no kernel runs"
        assert bool(re.search("all-reduce", text)) == (name in ("K of blocks", "experts")), f"{name}: sums"


if __name__ == "__main__":
    main(sys.argv[1])
