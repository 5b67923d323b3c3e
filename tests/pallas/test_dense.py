"""A dense product takes the kernel that a group of its own takes, and in the same form."""

import jax
import jax.numpy as jnp
import pytest

import fp8x
from fp8x import Scheme, ops
from fp8x.array import ScaledArray
from fp8x.ops import mosaic_swapped
from fp8x.pallas import sm90_grouped_fp8, sm90_grouped_swapped, tuning
from fp8x.scheme import mx, per_row, per_tensor

BLOCK, GROUP = Scheme("e4m3", block=(128, 128)), Scheme("e4m3", block=(1, 128))
BY_32 = Scheme("e4m3", block=(32, 256))
PAIRS = [
    *[(w, None) for w in (per_row(), per_tensor(), Scheme("e5m2", block=(None,)), BLOCK, GROUP, BY_32, mx())],
    *[(w, x) for w in (per_row(), per_tensor(), BLOCK, GROUP, BY_32) for x in (per_row(), per_tensor(), GROUP)],
    (mx(), mx()),
]


@pytest.mark.sample
@pytest.mark.parametrize("m", [8, 512])
@pytest.mark.parametrize(("weight", "activation"), PAIRS, ids=str)
def test_same_kernel_form_and_tilings(weight, activation, m, monkeypatch):
    monkeypatch.setattr(mosaic_swapped, "FEW_ROWS", 32)
    of, (n, k) = jax.ShapeDtypeStruct, (384, 1024)

    def weights(*shape):
        return ScaledArray(of(shape, weight.dtype), of(weight.scale_shape(shape), weight.scale_dtype), weight)

    scales = []

    def recorded(run):
        def kernel(*arguments, **options):
            scales.append([None if scale is None else scale.shape for scale in arguments[2:4]])
            return run(*arguments, **options)

        return kernel

    for module, name in ((sm90_grouped_fp8, "grouped_fp8"), (sm90_grouped_swapped, "grouped_swapped")):
        monkeypatch.setattr(module, name, recorded(getattr(module, name)))

    def choice(fn, *arguments):
        with fp8x.backend("mosaic_gpu"), tuning.recorded() as choices:
            (kernel,) = ops.explain(lambda *arguments: fn(*arguments, activation=activation), *arguments)
        return kernel.kernel, choices[-1].problem, choices[-1].estimates, scales[-1]

    x = of((m, k), jnp.bfloat16)
    dense = choice(ops.matmul, x, weights(n, k))
    assert dense == choice(ops.grouped_matmul, x, weights(1, n, k), of((1,), jnp.int32))
