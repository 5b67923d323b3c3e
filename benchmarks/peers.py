"""Other libraries' products of the same arrays: each gives a function that checks and times itself, or says why not.

Times are of products alone: activations are quantized before, as PyTorch's operators want them.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import deepgemm
import jax
import jax.numpy as jnp
import numpy as np

import fp8x
from fp8x.array import ScaledArray
from fp8x.benchmark import H200, Floor, time_calls, time_queue
from fp8x.benchmark.grouped import Operands, Shape, checked
from fp8x.recipe import Recipe
from fp8x.scheme import per_row, per_tensor

LIMIT = 2.0**-6  # of a peer's relative error: they accumulate and round as they please
GROUP, BLOCK = fp8x.Scheme("e4m3", block=(1, 128)), fp8x.Scheme("e4m3", block=(128, 128))

Run = Callable[[list[Operands]], dict[str, Any]]


def peers(shape: Shape, recipe: Recipe) -> Iterator[tuple[str, Run]]:
    """Name and run of each peer that can multiply this; `run` takes operands whose x is quantized, if it is at all."""
    pair = (recipe.weight, recipe.activation)
    dense = shape.experts == 1
    if dense and pair in ((per_tensor(), per_tensor()), (per_row(), per_row()), (BLOCK, GROUP), (GROUP, GROUP)):
        for fast in (True, False) if pair[1].block[-1] is None else (False,):
            name = f"torch.nn.functional.scaled_mm, {'fast' if fast else 'full'} accumulation"
            yield name, functools.partial(_torch, recipe, functools.partial(_scaled_mm, fast=fast))
    if not dense and pair in ((per_tensor(), per_tensor()), (per_row(), per_row())):
        for fast in (True, False):
            name = f"torch._scaled_grouped_mm, {'fast' if fast else 'full'} accumulation"
            yield name, functools.partial(_torch, recipe, functools.partial(_scaled_grouped_mm, fast=fast))
    if pair == (BLOCK, GROUP) and deepgemm.is_there() and shape.top_k is None:  # groups of whole tiles of 128 rows
        yield "DeepGEMM", functools.partial(_torch, recipe, deepgemm.product)
    if dense and pair in ((per_tensor(), per_tensor()), (per_row(), per_row())):
        yield "XLA's dot, fp8", functools.partial(_jax, recipe, _xla_fp8, lambda given: (given.x, given.w))


def peers_in_16_bits(shape: Shape, recipe: Recipe) -> Iterator[tuple[str, Run]]:
    """The same for a product of bfloat16 arrays; `run` takes operands of a weight-only recipe."""
    if shape.experts == 1:
        yield "torch.mm, bf16", functools.partial(_torch, recipe, _mm)
        yield "XLA's dot, bf16", functools.partial(_jax, recipe, _xla_16_bits, _in_16_bits)
        return
    yield "torch._grouped_mm, bf16", functools.partial(_torch, recipe, _grouped_mm)
    yield "jax.lax.ragged_dot, bf16", functools.partial(_jax, recipe, jax.lax.ragged_dot, _ragged)
    yield "tokamax.ragged_dot, bf16", functools.partial(_tokamax, recipe)


def floor_in_16_bits(shape: Shape, group_sizes) -> Floor:
    """The least that a product of bfloat16 arrays is."""
    m, n, k = shape.m, shape.n, shape.k
    nbytes = 2 * (m * k + np.count_nonzero(group_sizes) * n * k + m * n)
    return Floor(int(nbytes), 2 * m * n * k, H200.bf16)


def _jax(recipe: Recipe, fn: Callable, prepare: Callable, sets: list[Operands]) -> dict[str, Any]:
    timing, results = time_calls(fn, [prepare(given) for given in sets])
    return checked(results, sets, recipe, LIMIT, lambda: timing)


def _xla_fp8(x: ScaledArray, w: ScaledArray):
    """XLA fuses the scales into the product, and chooses between cuBLASLt and Triton by time."""
    y = jax.lax.dot_general(x.data, w.data, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return (y * (x.scale * w.scale.T)).astype(jnp.bfloat16)


def _xla_16_bits(x, w):
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))


_dequantize = jax.jit(lambda w: w.dequantize(jnp.bfloat16))
_dequantize_transposed = jax.jit(lambda w: w.dequantize(jnp.bfloat16).swapaxes(1, 2))


def _in_16_bits(given: Operands) -> tuple:
    return given.x, _dequantize(given.w)


def _ragged(given: Operands) -> tuple:
    return given.x, _dequantize_transposed(given.w), given.group_sizes


def _tokamax(recipe: Recipe, sets: list[Operands]) -> dict[str, Any]:
    return _jax(recipe, importlib.import_module("tokamax").ragged_dot, _ragged, sets)


def _torch(recipe: Recipe, prepare: Callable, sets: list[Operands]) -> dict[str, Any]:
    """Calls as a CUDA graph, which spares PyTorch its launches' cost on the host."""
    torch = importlib.import_module("torch")
    calls = [prepare(torch, given) for given in sets]
    results = [call() for call in calls]  # also what a graph's capture wants to have been done before
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    arrays = [jnp.from_dlpack(y) for y in results]
    time = functools.partial(time_queue, graph.replay, lambda _: torch.cuda.synchronize(), len(sets))
    return checked(arrays, sets, recipe, LIMIT, time)


def tensor(torch, x: jax.Array):
    """The same memory as a tensor; DLPack has no 8-bit floats, so they go as bytes."""
    if x.dtype.itemsize > 1:
        return torch.from_dlpack(x)
    names = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
    return torch.from_dlpack(jax.lax.bitcast_convert_type(x, jnp.uint8)).view(names[x.dtype.name])


def _scaled_mm(torch, given: Operands, *, fast: bool) -> Callable:
    scaled_mm, kinds = torch.nn.functional.scaled_mm, torch.nn.functional.ScalingType
    x, w = tensor(torch, given.x.data), tensor(torch, given.w.data).t()
    x_scale, w_scale = tensor(torch, given.x.scale), tensor(torch, given.w.scale)

    def kind_and_scale(scheme, scale, of_weight: bool):
        match scheme.block:
            case (None, None):
                return kinds.TensorWise, scale.reshape(())
            case (1, None):
                return kinds.RowWise, scale.reshape(1, -1) if of_weight else scale.reshape(-1, 1)
            case (1, 128):  # the rows lie next to each other
                return kinds.BlockWise1x128, scale.t().contiguous().t()
        return kinds.BlockWise128x128, scale.t()  # cuBLAS wants K / 128 in multiples of 4

    kind_x, x_scale = kind_and_scale(given.x.scheme, x_scale, False)
    kind_w, w_scale = kind_and_scale(given.w.scheme, w_scale, True)
    return lambda: scaled_mm(x, w, x_scale, kind_x, w_scale, kind_w, output_dtype=torch.bfloat16, use_fast_accum=fast)


def _scaled_grouped_mm(torch, given: Operands, *, fast: bool) -> Callable:
    x, w = tensor(torch, given.x.data), tensor(torch, given.w.data).transpose(1, 2)
    # It takes a scale for each row and column alone.
    x_scale = tensor(torch, jnp.broadcast_to(given.x.scale[:, 0], given.x.shape[:1]))
    w_scale = tensor(torch, jnp.broadcast_to(given.w.scale[:, :, 0], given.w.shape[:2]))
    ends = tensor(torch, jnp.cumsum(given.group_sizes))
    options = dict(offs=ends, out_dtype=torch.bfloat16, use_fast_accum=fast)
    return lambda: torch._scaled_grouped_mm(x, w, x_scale, w_scale, **options)


def _mm(torch, given: Operands) -> Callable:
    x, w = tensor(torch, given.x), tensor(torch, _dequantize(given.w)).t()
    return lambda: torch.mm(x, w)


def _grouped_mm(torch, given: Operands) -> Callable:
    x, w = tensor(torch, given.x), tensor(torch, _dequantize(given.w)).transpose(1, 2)
    ends = tensor(torch, jnp.cumsum(given.group_sizes))
    return lambda: torch._grouped_mm(x, w, offs=ends)
