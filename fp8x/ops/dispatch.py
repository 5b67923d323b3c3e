"""Which kernel a call takes: the first in `KERNELS` that supports it, unless a backend is asked for by name."""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator

import jax
import numpy as np

from fp8x.errors import BackendError
from fp8x.ops import gated, mosaic, mosaic_swapped, quantize, xla
from fp8x.ops.gated import GatedCall
from fp8x.ops.quantize import QuantizeCall
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
        measured: whether it ever ran on the hardware it is for; one that did not has to be asked for by its backend.
    """

    op: str
    name: str
    backend: str | None
    unsupported: Callable[[Call], str | None] | Callable[[GatedCall], str | None] | Callable[[QuantizeCall], str | None]
    run: Callable
    measured: bool = True


def _sm90(name: str, unsupported: Callable[[Call], str | None], grouped: Callable) -> tuple[Kernel, Kernel]:
    return (
        Kernel("matmul", name, "mosaic_gpu", unsupported, mosaic.dense(grouped), measured=False),
        Kernel("grouped_matmul", name, "mosaic_gpu", unsupported, grouped, measured=False),
    )


def _swapped(name: str, unsupported: Callable[[Call], str | None]) -> tuple[Kernel, Kernel, Kernel]:
    by_expert = Kernel("expert_matmul", name, "mosaic_gpu", unsupported, mosaic_swapped.expert_matmul, measured=False)
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
    Kernel(
        "gated_matmul", "sm90_fp8_gated", "mosaic_gpu", gated.unsupported_by_factors, gated.by_factors, measured=False
    ),
    Kernel(
        "gated_matmul",
        "sm90_fp8_block_gated",
        "mosaic_gpu",
        gated.unsupported_by_blocks,
        gated.by_blocks,
        measured=False,
    ),
    Kernel("gated_matmul", "in_two_steps", None, lambda call: None, gated.in_two_steps),
    Kernel("quantize", "sm90_quantize", "mosaic_gpu", quantize.unsupported, quantize.by_kernel, measured=False),
    Kernel("quantize", "xla_quantize", None, lambda call: None, quantize.by_xla),
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The kernel that a call takes, and the reasons why those before it do not; and what quantizes its input."""

    call: Call | GatedCall | QuantizeCall
    kernel: str
    rejected: tuple[tuple[str, str], ...]
    quantize: "Choice | None" = None

    def __str__(self) -> str:
        lines = [f"{self.call}: {self.kernel}", *(f"  not {name}: {reason}" for name, reason in self.rejected)]
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
    call: Call | GatedCall | QuantizeCall, quantization: QuantizeCall | None = None
) -> tuple[Kernel, Kernel | None]:
    """The first kernel that supports `call`, and the first that quantizes its input, where that is to be done.

    Raises:
        BackendError: a backend was asked for and none of its kernels supports the call; the message says why.
    """
    kernel, choice = _first(call)
    quantizer = None
    if quantization is not None:
        quantizer, how = _first(quantization)
        choice = dataclasses.replace(choice, quantize=how)
    if _record.value is not None:
        _record.value.choices.append(choice)
    elif logger.isEnabledFor(logging.INFO):
        _log(choice)
    return kernel, quantizer


def _first(call: Call | GatedCall | QuantizeCall) -> tuple[Kernel, Choice]:
    wanted = _backend.value
    if wanted is None and (variable := os.environ.get("FP8X_BACKEND")):
        wanted = _check_backend(variable, "FP8X_BACKEND")
    rejected = []
    for kernel in (kernel for kernel in KERNELS if kernel.op == call.op):
        is_wanted = wanted is None or kernel.backend in (None, wanted)
        reason = kernel.unsupported(call) if is_wanted else f"backend {wanted!r} was asked for"
        if reason is None and wanted is None and not kernel.measured:
            reason = f"never measured on a GPU; taken where backend {kernel.backend!r} is asked for"
        if reason is None:
            return kernel, Choice(call, kernel.name, tuple(rejected))
        rejected.append((kernel.name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
    raise BackendError(f"no kernel of backend {wanted!r} runs {call} ({reasons})")


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
