"""Every form of a kernel that ops can dispatch to is one that is emulated; and a few are emulated here."""

import contextlib
import dataclasses
import functools
import itertools
import random

import jax
import jax.numpy as jnp
import pytest

import fp8x
from fp8x import ops
from fp8x.errors import BackendError
from fp8x.pallas import aot
from fp8x.scheme import Scheme, mx, per_row, per_tensor
from ptx import examples, forms

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
WEIGHTS = [
    per_tensor(),
    Scheme("e5m2", block=(None, None, None)),
    per_row("e5m2"),
    Scheme("e4m3", block=(128, 128)),
    Scheme("e4m3", block=(1, 128)),
    Scheme("e5m2", block=(32, 256)),
    Scheme("e4m3", block=(None, 128)),
    mx(),
    mx("e5m2"),
]
STATIC = [per_tensor(), Scheme("e5m2", block=(None, None), scale_rule="unit"), Scheme("e4m3", block=(None, 128))]
DYNAMIC = [
    Scheme(element, block=block, scale_rule=rule)
    for element in ("e4m3", "e5m2")
    for block in ((1, None), (1, 128))
    for rule in ("amax", "pow2", "unit")
]
DYNAMIC += [dataclasses.replace(mx(element), scale_rule=rule) for element in ("e4m3", "e5m2") for rule in
            ("rceil", "floor", "ceil", "even")]  # fmt: skip
ACTIVATIONS = [(None, False), *((scheme, False) for scheme in DYNAMIC), *((scheme, True) for scheme in STATIC)]
GATES = (None, "silu", "gelu_pytorch_tanh")
of = jax.ShapeDtypeStruct


def dispatch(op: str, weight: Scheme, activation: Scheme | None, is_static: bool, rng: random.Random) -> None:
    """Traces a call by kernels; `rng` decides what kernels don't differ for."""
    m = rng.choice((48, 300, 8193)) if op != "expert_matmul" else 6
    k, n, e = rng.choice((160, 192, 256, 2048)), rng.choice((160, 256)), 4
    dtype, out = (rng.choice((jnp.bfloat16, jnp.float16, jnp.float32)) for _ in range(2))
    gate = rng.choice(GATES) if op in ("grouped_matmul", "expert_matmul") else None
    w_shape = {"matmul": (n, k), "gated_matmul": (e, 2, n, k)}.get(op, (e, n, k))
    w = jax.eval_shape(functools.partial(fp8x.quantize, scheme=weight), of(w_shape, jnp.float32))
    x = of((m, k) if gate is None else (m, 2, k), dtype)
    scale = of(activation.scale_shape((m, k)), jnp.float32) if is_static else None
    bias = of(w_shape[:-1], jnp.float32) if rng.random() < 0.5 else None
    rows = {"matmul": (), "expert_matmul": (of((m,), jnp.int32),)}.get(op, (of((e,), jnp.int32),))
    options = {} if gate is None else {"gate": gate}
    if op == "gated_matmul":
        h = rng.choice([*DYNAMIC, *STATIC, *STATIC, *STATIC])
        options = {"gate": rng.choice(GATES[1:]), "out_activation": h}
        options |= {"out_activation_scale": jnp.ones(h.scale_shape((m, n)))} if h in STATIC else {}

    def call(x, w, scale, bias, *rows):
        return getattr(ops, op)(
            x, w, *rows, activation=activation, activation_scale=scale, bias=bias, out_dtype=out, **options
        )

    jax.eval_shape(call, x, w, scale, bias, *rows)


def dispatched(share: float) -> set[forms.Form]:
    """By a part of all calls, drawn at random."""
    calls = itertools.product(("matmul", "grouped_matmul", "expert_matmul", "gated_matmul"), WEIGHTS, ACTIVATIONS)
    rng = random.Random(0)
    with forms.recorded() as found, fp8x.backend("mosaic_gpu"):
        for op, weight, (activation, is_static) in calls:
            # A block that names three dims is none of a matrix's.
            if rng.random() < share and not (op == "matmul" and len(weight.block) > 2):
                with contextlib.suppress(BackendError):
                    dispatch(op, weight, activation, is_static, rng)
    return set(found)


@pytest.mark.parametrize("share", [0.08, pytest.param(1, marks=pytest.mark.slow)])
def test_what_ops_dispatch_to_is_emulated(share):
    found, missing = dispatched(share), []
    for emulated in (forms.QUANTIZE, forms.FP8, forms.GATED, forms.SWAPPED):
        kernel = getattr(emulated[0], "kernel", None)
        of_kernel = [form for form in found if getattr(form, "kernel", None) == kernel]
        assert of_kernel
        keys, pairs = {form.key for form in emulated}, set().union(*(form.pairs for form in emulated))
        missing += [f"{form}" for form in of_kernel if form.key not in keys]
        missing += [f"{sorted(form.pairs - pairs)} of {form}" for form in of_kernel if form.pairs - pairs]
    assert not missing, "emulated nowhere:\n" + "\n".join(missing)


# A share of the forms for every run: those whose code has most in it.
FEW = [
    forms.QuantizeForm("bfloat16", "float8_e4m3fn", "rceil", "silu", False, "few", "several whole"),
    forms.QuantizeForm("float16", "float8_e5m2", "amax", "gelu_pytorch_tanh", True, "all", "several whole"),
    forms.QuantizeForm("float32", "float8_e4m3fn", "given", "", True, "few", "overlapping ragged"),
    *(forms.FP8[7], forms.GATED[4], forms.SWAPPED[30], forms.SWAPPED[90]),
]


@needs_compiler
@pytest.mark.parametrize("form", FEW, ids=str)
def test_a_few(form):
    examples.check(form)
