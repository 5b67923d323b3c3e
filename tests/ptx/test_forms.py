"""Every form of a kernel that ops can dispatch to is one that is emulated; and a few are emulated here."""

import contextlib
import dataclasses
import functools
import itertools
import random
from collections.abc import Iterable

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
QUICK = 0.06  # of the calls, for every run
of = jax.ShapeDtypeStruct


def dispatch(op: str, weight: Scheme, activation: Scheme | None, is_static: bool, rng: random.Random) -> None:
    """Traces a call by kernels; `rng` decides what kernels don't differ for."""
    m = rng.choice((48, 300, 8193)) if op != "expert_matmul" else 6
    k, n, e = rng.choice((160, 192, 256, 2048)), rng.choice((160, 256)), 4
    dtype, out = (rng.choice((jnp.bfloat16, jnp.float16, jnp.float32)) for _ in range(2))
    gate = rng.choice((None, *forms.GATES.values())) if op in ("grouped_matmul", "expert_matmul") else None
    w_shape = {"matmul": (n, k), "gated_matmul": (e, 2, n, k)}.get(op, (e, n, k))
    w = jax.eval_shape(functools.partial(fp8x.quantize, scheme=weight), of(w_shape, jnp.float32))
    x = of((m, k) if gate is None else (m, 2, k), dtype)
    scale = of(activation.scale_shape((m, k)), jnp.float32) if is_static else None
    bias = of(w_shape[:-1], jnp.float32) if rng.random() < 0.5 else None
    rows = {"matmul": (), "expert_matmul": (of((m,), jnp.int32),)}.get(op, (of((e,), jnp.int32),))
    options = {} if gate is None else {"gate": gate}
    if op == "gated_matmul":
        h = rng.choice([*DYNAMIC, *STATIC, *STATIC, *STATIC])
        options = {"gate": rng.choice(list(forms.GATES.values())), "out_activation": h}
        options |= {"out_activation_scale": jnp.ones(h.scale_shape((m, n)))} if h in STATIC else {}

    def call(x, w, scale, bias, *rows):
        return getattr(ops, op)(
            x, w, *rows, activation=activation, activation_scale=scale, bias=bias, out_dtype=out, **options
        )

    jax.eval_shape(call, x, w, scale, bias, *rows)


@functools.cache
def dispatched(share: float) -> frozenset[forms.Form]:
    """By a part of all calls, drawn at random."""
    calls = itertools.product(("matmul", "grouped_matmul", "expert_matmul", "gated_matmul"), WEIGHTS, ACTIVATIONS)
    rng = random.Random(0)
    with forms.recorded() as found, fp8x.backend("mosaic_gpu"):
        for op, weight, (activation, is_static) in calls:
            # A block that names three dims is none of a matrix's.
            if rng.random() < share and not (op == "matmul" and len(weight.block) > 2):
                with contextlib.suppress(BackendError):
                    dispatch(op, weight, activation, is_static, rng)
    return frozenset(found)


def emulated_nowhere(found: Iterable[forms.Form], emulated: list[forms.Form]) -> list[str]:
    """What there is of forms of a kernel that a list lacks: keys, and pairs of properties."""
    keys, pairs = {form.key for form in emulated}, set().union(*(form.pairs for form in emulated))
    lacking = [str(form) for form in found if form.key not in keys]
    return lacking + [f"{sorted(form.pairs - pairs)} of {form}" for form in found if form.pairs - pairs]


def of_kernel(name: str | None, share: float) -> list[forms.Form]:
    return [form for form in dispatched(share) if getattr(form, "kernel", None) == name]


@pytest.mark.sample
@pytest.mark.parametrize("share", [QUICK, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kernel", "emulated"),
    [(None, forms.QUANTIZE), ("fp8", forms.FP8), ("gated", forms.GATED), ("swapped", forms.SWAPPED)],
    ids=["quantize", "fp8", "gated", "swapped"],
)
def test_what_ops_dispatch_to_is_emulated(kernel, emulated, share):
    found = of_kernel(kernel, share)
    assert found and not emulated_nowhere(found, emulated)


def test_a_form_that_is_not_emulated_is_found():
    """By its key, and by two properties that no form has together."""
    found = of_kernel(None, QUICK)
    no_gate = [form for form in forms.QUANTIZE if form.gate != "silu"]
    assert any("gate=silu" in message for message in emulated_nowhere(found, no_gate))
    not_both = [form for form in forms.QUANTIZE if not (form.used and form.element == "float8_e5m2")]
    assert any("('used', True)" in message for message in emulated_nowhere(found, not_both))


# A share of the forms for every run: those whose code has most in it.
FEW = [
    forms.QuantizeForm("bfloat16", "float8_e4m3fn", "rceil", "silu", False, "few", "several whole"),
    forms.QuantizeForm("float16", "float8_e5m2", "amax", "gelu_pytorch_tanh", True, "all", "several whole"),
    forms.QuantizeForm("float32", "float8_e4m3fn", "given", "", True, "few", "overlapping ragged"),
    *(forms.GATED[4], forms.SWAPPED[30], forms.SWAPPED[90]),
]


@pytest.mark.sample
@needs_compiler
@pytest.mark.parametrize("form", FEW, ids=str)
def test_a_few(form):
    examples.check(form)
