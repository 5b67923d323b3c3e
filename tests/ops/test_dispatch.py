"""Which kernel a call takes: by support, by name, inside jit; and what `explain` says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from shapes import quantized_zeros

import fp8x
from fp8x import ops
from fp8x.errors import BackendError
from fp8x.ops import dispatch, xla
from fp8x.scheme import Scheme, mx, per_row, per_tensor

X = np.ones((4, 64), jnp.bfloat16)
TOKEN = per_row()
W = fp8x.ScaledArray(np.full((8, 64), 448, jnp.float8_e4m3fn), np.full((8, 1), 1 / 448, np.float32), per_row())


@pytest.fixture
def doubling(monkeypatch):
    """A kernel before XLA's that takes per-token activations only, and gives itself away by a factor of two."""

    def unsupported(call: dispatch.Call) -> str | None:
        return None if call.x == per_row() else f"takes per-token activations, not {call.x}"

    def run(*arguments):
        return 2 * xla.matmul(*arguments)

    kernel = dispatch.Kernel("matmul", "sm90_doubling", "mosaic_gpu", unsupported, run)
    monkeypatch.setattr(dispatch, "KERNELS", (kernel, *dispatch.KERNELS))


def call(x=X, activation=TOKEN):
    return ops.matmul(x, W, activation=activation)


def test_the_first_kernel_that_supports_a_call(doubling):
    np.testing.assert_array_equal(call(), np.full((4, 8), 128))
    np.testing.assert_array_equal(call(activation=None), np.full((4, 8), 64))


def test_a_backend_asked_for(doubling):
    with fp8x.backend("xla"):
        np.testing.assert_array_equal(call(), np.full((4, 8), 64))
        with fp8x.backend("mosaic_gpu"):
            np.testing.assert_array_equal(call(), np.full((4, 8), 128))
        np.testing.assert_array_equal(call(), np.full((4, 8), 64))
    np.testing.assert_array_equal(call(), np.full((4, 8), 128))


def test_compiled_functions_follow_the_context(doubling):
    compiled = jax.jit(lambda x: call(x))  # a function of its own: JAX would find another test's trace of `call`
    results = [compiled(X)]
    with fp8x.backend("xla"):
        results.append(compiled(X))
    results.append(compiled(X))
    assert [int(y[0, 0]) for y in results] == [128, 64, 128]
    assert compiled._cache_size() <= 2


def test_a_backend_that_cannot_run_the_call_says_why(doubling):
    with (
        fp8x.backend("mosaic_gpu"),
        pytest.raises(BackendError, match="sm90_doubling: takes per-token activations, not float32; sm90_fp8"),
    ):
        call(X.astype(np.float32), activation=None)


@pytest.mark.parametrize(
    ("weight", "activation", "reasons"),
    [
        (
            Scheme("e4m3", block=(1, 64)),
            None,
            "sm90_fp8_decode: multiplies 8-bit activations, not bfloat16; sm90_fp8: multiplies 8-bit.*"
            "sm90_w8a16: reads blocks of 128, or multiples, along K; w is e4m3 1×64 f32; "
            "sm90_mx: reads e8m0 scales of 32 along K; w is e4m3 1×64 f32",
        ),
        (
            mx(),
            per_row(),
            "sm90_fp8_decode: reads float32 scales; those of w are e8m0.*sm90_fp8: reads float32 scales; those of w.*"
            "sm90_mx: multiplies activations in 16 bits, or in MX, which 16 bits hold, not e4m3 1×· f32",
        ),
        (
            Scheme("e4m3", block=(1, 64)),
            per_row(),
            "sm90_fp8: reads one scale for all of K; w is e4m3 1×64 f32; "
            "sm90_fp8_block: reads blocks of 128, or multiples, along K; w is e4m3 1×64 f32",
        ),
        (
            per_row(),
            Scheme("e4m3", block=(1, 64)),
            "sm90_fp8_decode: reads blocks of 128.*; x is .*sm90_fp8_block: reads blocks of 128.*; x is e4m3 1×64 f32",
        ),
    ],
    ids=str,
)
def test_hopper_kernels_say_what_they_do_not_support(weight, activation, reasons):
    w = quantized_zeros((8, 64), weight)
    with fp8x.backend("mosaic_gpu"), pytest.raises(BackendError, match=f"no kernel of backend 'mosaic_gpu'.*{reasons}"):
        ops.matmul(X, w, activation=activation)


def test_a_gpu_that_is_no_hopper(monkeypatch):
    class Blackwell:
        platform, compute_capability, device_kind = "gpu", "10.0", "NVIDIA B200"

    monkeypatch.setattr(jax, "devices", lambda: [Blackwell()])
    reason = r"sm90_fp8: needs compute capability 9.0 \(Hopper\); NVIDIA B200 has 10.0"
    with fp8x.backend("mosaic_gpu"), pytest.raises(BackendError, match=reason):
        call()


class TestHopper:
    """What a process takes whose GPU is a Hopper, without asking."""

    @pytest.fixture(autouse=True)
    def hopper(self, monkeypatch):
        class Hopper:
            platform, compute_capability, device_kind = "gpu", "9.0", "NVIDIA H200"

        monkeypatch.setattr(jax, "devices", lambda: [Hopper()])

    @pytest.mark.parametrize(
        ("m", "weight", "activation", "kernel"),
        [
            (16, per_row(), per_row(), "sm90_fp8_decode"),
            (512, per_row(), per_row(), "sm90_fp8"),
            (4096, per_row(), per_row(), "xla_matmul"),
            (4096, per_tensor("e5m2"), per_tensor("e5m2"), "sm90_fp8"),
            (4096, Scheme("e4m3", block=(128, 128)), Scheme("e4m3", block=(1, 128)), "sm90_fp8_block"),
            (4096, per_row(), None, "sm90_w8a16"),
            (4096, mx(), mx(), "sm90_mx"),
            (4096, Scheme("e4m3", block=(1, 64)), None, "xla_matmul"),
        ],
        ids=str,
    )
    def test_takes_kernels(self, m, weight, activation, kernel):
        w = jax.eval_shape(lambda: fp8x.quantize(jnp.ones((256, 256)), weight))
        x = jax.ShapeDtypeStruct((m, 256), jnp.bfloat16)
        (choice,) = ops.explain(lambda x, w: ops.matmul(x, w, activation=activation), x, w)
        assert choice.kernel == kernel
        if m == 4096 and activation == per_row():
            assert dict(choice.rejected)["sm90_fp8"].endswith("with a scale a row or a matrix (measured)")

    def test_layers(self):
        moe = fp8x.nn.MoE(256, 128, 4, 2, recipe="fp8_e4m3fn_bf16_block_scale", rngs=nnx.Rngs(0))
        (w13_w2, w2) = ops.explain(moe, jnp.ones((512, 256), jnp.bfloat16))
        assert (w13_w2.kernel, w13_w2.quantize.kernel) == ("sm90_fp8_block_gated", "sm90_quantize")
        assert w2.kernel == "sm90_fp8_block"

    def test_arrays_on_its_cpu_are_multiplied_by_xla(self):
        """The one device that is really here."""
        np.testing.assert_array_equal(call(), np.full((4, 8), 64))
        np.testing.assert_array_equal(jax.grad(lambda x: call(x).sum().astype(jnp.float32))(X), np.full((4, 64), 8))

    def test_another_gpu_beside_it_has_no_kernels(self, monkeypatch):
        class Ampere:
            platform, compute_capability, device_kind = "gpu", "8.0", "NVIDIA A100"

        one = jax.devices()
        monkeypatch.setattr(jax, "devices", lambda: [*one, Ampere()])
        (choice,) = ops.explain(call, X)
        assert choice.kernel == "xla_matmul"


@pytest.mark.parametrize(
    ("weight", "activation", "kernel"),
    [
        (per_row(), per_row("e5m2"), "sm90_fp8"),
        (per_tensor("e5m2"), per_tensor(), "sm90_fp8"),
        (Scheme("e4m3", block=(128, 128)), Scheme("e4m3", block=(1, 128)), "sm90_fp8_block"),
        (Scheme("e4m3", block=(128, 128)), Scheme("e4m3", block=(None, 128)), "sm90_fp8_block"),
        (Scheme("e4m3", block=(128,)), per_row(), "sm90_fp8_block"),
        (Scheme("e4m3", block=(8, 256)), Scheme("e4m3", block=(1, 128)), "sm90_fp8_block"),
        (per_tensor(), Scheme("e4m3", block=(1, 128)), "sm90_fp8_block"),
        (Scheme("e4m3", block=(128, 128)), per_row(), "sm90_fp8_block"),
        (per_row("e5m2"), None, "sm90_w8a16"),
        (Scheme("e4m3", block=(128, 128)), None, "sm90_w8a16"),
        (per_row(), mx(), "sm90_w8a16"),
        (mx("e5m2"), None, "sm90_mx"),
        (mx(), mx(), "sm90_mx"),
    ],
    ids=str,
)
def test_hopper_kernels_where_they_are_asked_for(no_gpu, weight, activation, kernel):
    w = jax.eval_shape(lambda: fp8x.quantize(jnp.ones((256, 256)), weight))
    x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)

    def product(x, w):
        return ops.matmul(x, w, activation=activation)

    with fp8x.backend("mosaic_gpu"):
        (choice,) = ops.explain(product, x, w)
    assert choice.kernel == kernel
    (choice,) = ops.explain(product, x, w)
    assert choice.kernel == "xla_matmul"
    assert (kernel, "there is no GPU here; taken where backend 'mosaic_gpu' is asked for") in choice.rejected


@pytest.mark.parametrize(
    ("m", "groups", "kernel"),
    [(32, 1, "decode"), (33, 1, "fp8"), (8 * 32, 8, "decode"), (8 * 32 + 1, 8, "fp8"), (2, 128, "decode")],
)
def test_kernel_for_few_rows_a_group(m, groups, kernel):
    w = jax.eval_shape(lambda: fp8x.quantize(jnp.ones((groups, 256, 256)), per_row()))
    x, sizes = jax.ShapeDtypeStruct((m, 256), jnp.bfloat16), jax.ShapeDtypeStruct((groups,), jnp.int32)
    with fp8x.backend("mosaic_gpu"):
        (choice,) = ops.explain(lambda *arguments: ops.grouped_matmul(*arguments, activation=TOKEN), x, w, sizes)
    assert choice.kernel.endswith(kernel)
    if kernel == "fp8":
        reason = f"is for 32 rows a group on average, or fewer; here are {-(-m // groups)}"
        assert choice.rejected == (("sm90_fp8_decode", reason),)


def test_unknown_names(monkeypatch):
    with pytest.raises(BackendError, match="backend: 'triton' is unknown; use one of 'xla', 'mosaic_gpu'"):
        fp8x.backend("triton").__enter__()
    monkeypatch.setenv("FP8X_BACKEND", "cuda")
    with pytest.raises(BackendError, match="FP8X_BACKEND: 'cuda' is unknown; use one of 'xla', 'mosaic_gpu'"):
        call()


def test_environment_variable(doubling, monkeypatch):
    monkeypatch.setenv("FP8X_BACKEND", "xla")
    np.testing.assert_array_equal(call(), np.full((4, 8), 64))
    with fp8x.backend("mosaic_gpu"):  # the context is nearer
        np.testing.assert_array_equal(call(), np.full((4, 8), 128))
    monkeypatch.setenv("FP8X_BACKEND", "")
    np.testing.assert_array_equal(call(), np.full((4, 8), 128))


def test_the_context_ends_with_an_error(doubling):
    with pytest.raises(RuntimeError), fp8x.backend("xla"):
        raise RuntimeError
    np.testing.assert_array_equal(call(), np.full((4, 8), 128))


@pytest.mark.usefixtures("no_gpu")
class TestExplain:
    def test_names_kernels_in_order_and_reasons(self, doubling):
        def two(x):
            return call(x) + call(x, None)

        first, second = ops.explain(two, X)
        assert (first.kernel, first.rejected) == ("sm90_doubling", ())
        assert second.kernel == "xla_matmul"
        assert second.rejected[0] == ("sm90_doubling", "takes per-token activations, not bfloat16")
        assert str(second).splitlines()[:2] == [
            "matmul [4, 64] x [8, 64]: bfloat16 by e4m3 1×· f32 -> bfloat16: xla_matmul",
            "  not sm90_doubling: takes per-token activations, not bfloat16",
        ]

    def test_respects_a_backend(self, doubling):
        with fp8x.backend("xla"):
            (choice,) = ops.explain(call, X)
        assert set(choice.rejected) == {
            (name, "backend 'xla' was asked for")
            for name in ("sm90_doubling", "sm90_fp8_decode", "sm90_fp8", "sm90_fp8_block", "sm90_w8a16", "sm90_mx")
        }

    def test_sees_through_functions_that_are_compiled_already(self):
        compiled = jax.jit(lambda x: call(x))
        compiled(X)
        assert len(ops.explain(compiled, X)) == len(ops.explain(compiled, X)) == 1

    def test_runs_nothing(self, compilations):
        x = jax.ShapeDtypeStruct((7, 96), jnp.float16)
        w = jax.eval_shape(lambda: fp8x.quantize(jnp.ones((8, 96)), mx()))
        (choice,) = ops.explain(lambda x, w: ops.matmul(x, w, activation=per_tensor()), x, w)
        assert str(choice.call) == "matmul [7, 96] x [8, 96]: e4m3 ·×· f32 by e4m3 1×32 e8m0 -> float16"
        assert not compilations

    def test_layers(self):
        moe = fp8x.nn.MoE(64, 32, 4, 2, recipe="mxfp8_mxfp8_bf16", rngs=nnx.Rngs(0))
        names = [choice.kernel for choice in ops.explain(moe, X)]
        assert names == ["in_two_steps", "xla_grouped_matmul", "xla_quantize", "xla_grouped_matmul"]

    def test_a_layer_in_calibration_as_an_argument(self):
        layer = fp8x.nn.Linear(64, 8, recipe="e4m3_e4m3_bf16_max_calibrate", rngs=nnx.Rngs(0))
        assert len(ops.explain(lambda layer, x: layer(x), layer, X)) == 1
        assert not np.any(layer.amax[...])


@pytest.mark.usefixtures("no_gpu")
class TestLog:
    """One line for each distinct call of a process: which kernel, and why not those before it."""

    def lines(self, caplog, *calls):
        dispatch._log.cache_clear()
        with caplog.at_level("INFO", logger="fp8x.ops"):
            for run in calls:
                run()
        return [record.getMessage() for record in caplog.records if record.name == "fp8x.ops"]

    def test_once_a_shape(self, doubling, caplog):
        lines = self.lines(caplog, call, call, lambda: call(X[:2]), lambda: call(activation=None), call)
        assert lines[0].startswith(
            "matmul [4, 64] x [8, 64]: e4m3 1×· f32 by e4m3 1×· f32 -> bfloat16: sm90_doubling; "
            "quantize bfloat16[4, 64] in e4m3 1×· f32: xla_quantize; not sm90_quantize: "
        )
        assert lines[1].startswith("matmul [2, 64] x [8, 64]: ")
        assert lines[2].startswith(
            "matmul [4, 64] x [8, 64]: bfloat16 by e4m3 1×· f32 -> bfloat16: xla_matmul; "
            "not sm90_doubling: takes per-token activations, not bfloat16; not sm90_fp8_decode: "
        )
        assert len(lines) == 3

    def test_another_backend_is_another_line(self, doubling, caplog):
        def with_xla():
            with fp8x.backend("xla"):
                call()

        first, second = self.lines(caplog, call, with_xla)
        assert ": sm90_doubling; quantize" in first and "not sm90_doubling: backend 'xla' was asked for" in second

    def test_explaining_is_not_calling(self, caplog):
        assert not self.lines(caplog, lambda: ops.explain(call, X))
