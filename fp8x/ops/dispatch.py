"""Which kernel a call takes: the first in `KERNELS` that supports it, unless a backend is asked for by name."""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from fp8x import meshes
from fp8x.array import ScaledArray
from fp8x.errors import BackendError
from fp8x.meshes import Axes
from fp8x.ops import gated, mosaic, mosaic_swapped, quantize, xla
from fp8x.ops.gated import GatedCall
from fp8x.ops.partition import is_left_to_xla, whole_or_nothing
from fp8x.ops.quantize import QuantizeCall
from fp8x.ops.split import Split, split_rows
from fp8x.scheme import Scheme

BACKENDS = ("xla", "mosaic_gpu")

logger = logging.getLogger("fp8x.ops")


@dataclasses.dataclass(frozen=True)
class Call:
    """What a kernel needs to know to say whether it supports a call."""

    op: str
    m: int
    n: int
    k: int
    groups: int
    x: Scheme | np.dtype
    w: Scheme
    bias: bool
    out_dtype: np.dtype

    @classmethod
    def of(cls, op: str, x: Array | ScaledArray, w: ScaledArray, bias: Array | None, out_dtype) -> "Call":
        """The call of a product of operands as they are, `w` a matrix or one an expert."""
        kind = x.scheme if isinstance(x, ScaledArray) else x.dtype
        groups = w.shape[0] if w.ndim == 3 else 1
        return cls(op, x.shape[0], *w.shape[-2:], groups, kind, w.scheme, bias is not None, np.dtype(out_dtype))

    def __str__(self) -> str:
        groups = f" x {self.groups} groups" if self.groups > 1 else ""
        return (
            f"{self.op} [{self.m}, {self.k}] x [{self.n}, {self.k}]{groups}: {self.x} by {self.w} -> {self.out_dtype}"
        )


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    Attributes:
        op: `"matmul"`, `"grouped_matmul"`, `"expert_matmul"`, `"gated_matmul"`, or `"quantize"`, what all do with
            their input first.
        backend: one of `BACKENDS`; None is taken under each.
        unsupported: the reason why the kernel can't do a call, or None if it can.
        run: takes what the op's reference takes.
        on_request: of a kernel for CUDA devices alone: why a call that it supports has to ask for it by its backend;
            None if it need not.
    """

    op: str
    name: str
    backend: str | None
    unsupported: Callable[[Call], str | None] | Callable[[GatedCall], str | None] | Callable[[QuantizeCall], str | None]
    run: Callable
    on_request: Callable[[Call], str | None] | Callable[[GatedCall], str | None] | None = None


_hopper = functools.partial(Kernel, backend="mosaic_gpu", on_request=mosaic.on_request)


def _sm90(name: str, unsupported: Callable[[Call], str | None], grouped: Callable) -> tuple[Kernel, Kernel]:
    return (
        _hopper("matmul", name, unsupported=unsupported, run=mosaic.dense(grouped)),
        _hopper("grouped_matmul", name, unsupported=unsupported, run=grouped),
    )


def _swapped(name: str, unsupported: Callable[[Call], str | None]) -> tuple[Kernel, Kernel, Kernel]:
    by_expert = _hopper("expert_matmul", name, unsupported=unsupported, run=mosaic_swapped.expert_matmul)
    return (*_sm90(name, unsupported, mosaic_swapped.grouped_matmul), by_expert)


# In order of preference; XLA, last, supports every call.
KERNELS: tuple[Kernel, ...] = (
    *_swapped("sm90_fp8_decode", mosaic_swapped.unsupported_few_rows),
    *_sm90("sm90_fp8", mosaic.unsupported_by_factors, mosaic.grouped_matmul_by_factors),
    *_sm90("sm90_fp8_block", mosaic.unsupported_by_blocks, mosaic.grouped_matmul_by_blocks),
    *_swapped("sm90_w8a16", mosaic_swapped.unsupported_16_bit),
    *_swapped("sm90_mx", mosaic_swapped.unsupported_mx),
    Kernel("matmul", "xla_matmul", "xla", lambda call: None, xla.matmul),
    Kernel("grouped_matmul", "xla_grouped_matmul", "xla", lambda call: None, xla.grouped_matmul),
    Kernel("expert_matmul", "xla_expert_matmul", "xla", lambda call: None, xla.expert_matmul),
    _hopper("gated_matmul", "sm90_fp8_gated", unsupported=gated.unsupported_by_factors, run=gated.by_factors),
    _hopper("gated_matmul", "sm90_fp8_block_gated", unsupported=gated.unsupported_by_blocks, run=gated.by_blocks),
    Kernel("gated_matmul", "in_two_steps", None, lambda call: None, gated.in_two_steps),
    _hopper("quantize", "sm90_quantize", unsupported=quantize.unsupported, run=quantize.by_kernel),
    Kernel("quantize", "xla_quantize", None, lambda call: None, quantize.by_xla),
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The kernel that a call takes, and the reasons why those before it do not; and what quantizes its input.

    Attributes:
        call: on an Explicit mesh, that of one device.
        mesh: how the whole call is split over a mesh, and what has to move for it.
    """

    call: Call | GatedCall | QuantizeCall
    kernel: str
    rejected: tuple[tuple[str, str], ...]
    quantize: "Choice | None" = None
    mesh: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.call}: {self.kernel}", *(f"  not {name}: {reason}" for name, reason in self.rejected)]
        if self.mesh is not None:
            lines.append(f"  {self.mesh}")
        if self.quantize is not None:
            lines += [f"  {line}" for line in str(self.quantize).splitlines()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, eq=False)
class _Record:
    choices: list[Choice] = dataclasses.field(default_factory=list)


# JAX keys its jit cache by these, so a function that is already compiled is traced again where they change.
_backend = jax.make_user_context(None)
_record = jax.make_user_context(None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within it, every op takes a kernel of this backend (`"xla"` or `"mosaic_gpu"`).

    The environment variable FP8X_BACKEND does the same for a whole process. It is read when a function is traced: set
    it before, since what is compiled already stays as it is.

    Raises:
        BackendError: an unknown name; and, from an op inside, no kernel of that backend supports the call.
    """
    with _backend(_check_backend(name, "backend")):
        yield


def _check_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{source}: {name!r} is unknown; use one of {', '.join(map(repr, BACKENDS))}")
    return name


def choose(
    call: Call | GatedCall | QuantizeCall,
    quantization: QuantizeCall | None = None,
    operands: Any = None,
    split: Split | None = None,
) -> tuple[Kernel, Kernel | None]:
    """The first kernel that supports `call`, and the first that quantizes its input, where that is to be done.

    Arguments:
        operands: a pytree of the arrays of the call, for the mesh that they lie on.
        split: how a product is split on an Explicit mesh.

    Raises:
        BackendError: a backend was asked for and none of its kernels supports the call; the message says why.
    """
    hindrance, how = whole_or_nothing(operands), None
    if call.op == "quantize":
        mesh = meshes.explicit_mesh(operands)
        kernel, choice = _quantizer(call, mesh, mesh and meshes.explicit_dims(operands), hindrance)
        return _recorded(choice, kernel, None)
    if is_left_to_xla(operands):
        how = "on Auto axes: a device runs it on its part, as XLA comes to lay operands out"
    in_one = hindrance
    if call.op == "gated_matmul":
        in_one = in_one or (
            split.unfused(call) if split else "is not split over Auto axes; two steps are" if how else None
        )
    if split is not None:
        call, how = split.local(call), str(split)
    kernel, choice = _first(call, in_one)
    choice = dataclasses.replace(choice, mesh=how if kernel.backend == "mosaic_gpu" or split is not None else None)
    quantizer = None
    if quantization is not None:
        x_dims, mesh = (None, None) if split is None else (split.x_dims, split.mesh)
        quantizer, of_input = _quantizer(quantization, mesh, x_dims, hindrance)
        choice = dataclasses.replace(choice, quantize=of_input)
    return _recorded(choice, kernel, quantizer)


def _recorded(choice: Choice, *kernels: Kernel | None) -> tuple[Kernel | None, ...]:
    if _record.value is not None:
        _record.value.choices.append(choice)
    elif logger.isEnabledFor(logging.INFO):
        _log(choice)
    return kernels


def _quantizer(call: QuantizeCall, mesh, dims: tuple[Axes, ...] | None, hindrance: str | None) -> tuple[Kernel, Choice]:
    """The first kernel that quantizes an input; on an Explicit mesh, of which each dim is split over `dims`."""
    if mesh is None:
        return _first(call, hindrance)
    split = split_rows(call, dims, mesh)
    if split.reaches:
        hindrance = f"finds a scale on one device; here it reaches over {', '.join(split.reaches)}"
    return _first(split.local(call), hindrance)


def _first(call: Call | GatedCall | QuantizeCall, hindrance: str | None) -> tuple[Kernel, Choice]:
    wanted = _backend.value
    if wanted is None and (variable := os.environ.get("FP8X_BACKEND")):
        wanted = _check_backend(variable, "FP8X_BACKEND")
    rejected = []
    for kernel in (kernel for kernel in KERNELS if kernel.op == call.op):
        by_default = wanted is None and kernel.on_request is not None
        if wanted is not None and kernel.backend not in (None, wanted):
            reason = f"backend {wanted!r} was asked for"
        else:
            reason = (kernel.backend == "mosaic_gpu" and hindrance) or kernel.unsupported(call)
        if reason is None and by_default:
            reason = kernel.on_request(call)
        if reason is None:
            chosen = _by_platform(kernel) if by_default else kernel
            return chosen, Choice(call, kernel.name, tuple(rejected))
        rejected.append((kernel.name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
    raise BackendError(f"no kernel of backend {wanted!r} runs {call} ({reasons})")


@functools.cache
def _by_platform(kernel: Kernel) -> Kernel:
    """`kernel`, and what XLA does where the arrays of a process with GPUs lie on its CPU."""
    *_, otherwise = (other for other in KERNELS if other.op == kernel.op)

    def run(*arguments):
        leaves, tree = jax.tree.flatten(arguments)
        is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]

        def of(run: Callable, *arrays):
            arrays = iter(arrays)
            return run(*tree.unflatten(next(arrays) if its else leaf for leaf, its in zip(leaves, is_array)))

        def by_xla(*arrays):
            with _record(None), _backend("xla"):
                return of(otherwise.run, *arrays)

        arrays = [leaf for leaf, its in zip(leaves, is_array) if its]
        return jax.lax.platform_dependent(*arrays, cuda=functools.partial(of, kernel.run), default=by_xla)

    return dataclasses.replace(kernel, run=run)


def on_one_device(kernel: Kernel, call: Call | GatedCall | QuantizeCall) -> Kernel:
    """`kernel` where it supports the `call` of a device, or else the first that does."""
    if kernel.unsupported(call) is None:
        return kernel
    return next(other for other in KERNELS if other.op == call.op and other.unsupported(call) is None)


@functools.cache  # once a process for each distinct call
def _log(choice: Choice) -> None:
    logger.info("%s", "; ".join(line.strip() for line in str(choice).splitlines()))


def explain(fn: Callable, *args) -> list[Choice]:
    """Which kernel each op inside `fn(*args)` takes, and why not the ones before it. Traces `fn`; runs nothing.

    A layer in calibration changes as it runs: give it as an argument, `explain(lambda layer, x: layer(x), layer, x)`.
    """
    record = _Record()
    with _record(record):  # a fresh one: inner jitted functions miss their cache and are traced too
        jax.eval_shape(fn, *args)
    return record.choices
