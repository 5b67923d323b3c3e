"""What XLA launches for an H200, counted without one."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import fp8x
from fp8x import ops
from fp8x.benchmark.program import Launch, launches, thunks
from fp8x.pallas import aot
from fp8x.scheme import Scheme

X = jax.ShapeDtypeStruct((4096, 256), jnp.float32)
needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


@needs_compiler
def test_fused_and_not():
    # A sort reads memory, and gives its operand's indices too.
    product, sort, softmax = launches(
        lambda tree: jax.nn.softmax(tree["x"] - jnp.argsort(tree["x"] * 2, axis=1)), {"x": X}
    )
    assert (product.shape, sort.shape, softmax.shape) == (
        "f32[4096,256]",
        "(f32[4096,256], s32[4096,256])",
        "f32[4096,256]",
    )
    assert sort.bytes == 2 * product.bytes == 2 * 4096 * 256 * 4
    assert product == Launch("fusion", product.name, "f32[4096,256]", 4096 * 256 * 4)
    assert str(product) == f"fusion {product.name}: f32[4096,256]"


@pytest.mark.slow
@needs_compiler
def test_loops_and_kernels():
    def steps(x):
        return jax.lax.fori_loop(0, x[0, 0].astype(int), lambda _, x: 2 * x, x)

    assert "while" in [launch.kind for launch in launches(steps, X)]
    block = Scheme("e4m3", block=(128, 128))
    w = jax.eval_shape(lambda: fp8x.quantize(jnp.zeros((512, 256)), block))
    with fp8x.backend("mosaic_gpu"):
        found = launches(lambda x, w: ops.matmul(x, w, activation=Scheme("e4m3", block=(1, 128))), X, w)
    quantized, product = [launch.shape for launch in found if "mosaic" in launch.kind]
    assert quantized.startswith("(f8e4m3fn[") and product == "f32[4096,512]"


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "kernels"), [(1, 3), (4, 4)])
def test_a_decoding_step_is_one_graph(tokens, kernels):
    """Mosaic kernels too; and nothing of the size of weights is written. XLA quantizes a single row: its two blocks are
    too few for the kernel."""
    moe = nnx.eval_shape(lambda: fp8x.nn.MoE(256, 128, 16, 8, recipe="fp8_e4m3fn_bf16_block_scale", rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(moe)
    x = jax.ShapeDtypeStruct((tokens, 256), jnp.bfloat16)

    def step(state, x):
        return nnx.merge(graphdef, state)(x)

    with fp8x.backend("mosaic_gpu"):
        assert thunks(step, state, x) == ["kCommandBuffer"]
        found = launches(step, state, x)
    assert sum("mosaic" in launch.kind for launch in found) == kernels and len(found) < 30
    assert max(launch.bytes for launch in found) <= moe.w13.weight.size / 16


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("fp8x.benchmark.program.missing", lambda: "not installed: ptxas")
    with pytest.raises(aot.CompileError, match="not installed: ptxas"):
        launches(jnp.sin, X)
