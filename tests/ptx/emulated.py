"""Pallas kernels, emulated wherever they are called."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from ptx.launch import launches_sm90
from ptx.machine import run

# Outputs and what nobody has written hold this byte.
_UNWRITTEN = 0xA5


@contextlib.contextmanager
def emulated(seed: int = 0) -> Iterator[None]:
    """A context in which `plgpu.kernel` compiles for sm_90a and then runs the PTX, traced or not."""
    real = plgpu.kernel

    def kernel(*args, **options):
        compiled = real(*args, **options)

        def call(*arguments):
            out_type = jax.eval_shape(compiled, *arguments)
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
            (launch,) = launches_sm90(compiled, *shapes)

            def execute(*arguments):
                arrays = [np.array(x, order="C") for x in jax.tree.leaves(arguments)]
                outputs = [
                    np.frombuffer(bytearray([_UNWRITTEN]) * (x.size * x.dtype.itemsize), x.dtype).reshape(x.shape)
                    for x in jax.tree.leaves(out_type)
                ]
                run(launch, [*arrays, *outputs], seed=seed)
                return jax.tree.unflatten(jax.tree.structure(out_type), outputs)

            return jax.pure_callback(execute, out_type, *arguments)

        return call

    plgpu.kernel = kernel
    try:
        yield
    finally:
        plgpu.kernel = real
