"""`Calibrated`: what has a static scale for what it is fed, and finds it in calibration."""

from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import MISSING
from jaxtyping import Array, Float, Int

from fp8x import meshes, numerics
from fp8x.errors import CalibrationError
from fp8x.nn.observer import BINS, Amax, Histogram, NonfiniteCount, TokenCount, add_counts, count_bins
from fp8x.ops.groups import row_mask
from fp8x.scheme import Scheme


class InputScale(nnx.Variable):
    """A static activation scale, float32 `[1, ceil(K / block_k)]`; NaN until it is calibrated.

    Its metadata has `is_missing` as long as it is known not to be finite. Metadata is static, so a compiled call knows
    it while it is traced, when it can't look at the value.
    """

    def __init__(self, value: Float[Array, "... groups"], **metadata: Any):
        super().__init__(value, **metadata)
        self._mark(value)

    def set_value(self, value: Any, *, index: Any = MISSING) -> None:
        super().set_value(value, index=index)
        self._mark(self.get_raw_value())

    # Flax's ways to put a value of nnx.jit, nnx.update or nnx.merge into a variable. A traced value changes nothing: it
    # is the same scale, seen from inside.

    def set_raw_value(self, value: Any, **options: bool) -> None:
        super().set_raw_value(value, **options)
        self._look_again()

    def update_from_state(self, variable_state: nnx.Variable) -> None:
        super().update_from_state(variable_state)
        self._look_again()

    @classmethod
    def from_metadata(cls, value: Any, attributes: dict[str, Any]) -> Self:
        variable = super().from_metadata(value, attributes)
        if not isinstance(value, jax.core.Tracer):
            variable._mark(value)  # a variable made inside of nnx.jit comes out by this way too
        return variable

    @property
    def is_missing(self) -> bool:
        """Whether it is not calibrated. False inside jit where what is traced can't tell."""
        return self.get_metadata("is_missing", False) or _is_unset(self.get_raw_value())

    def _look_again(self) -> None:
        if self.get_metadata("is_missing", False) and not isinstance(self.get_raw_value(), jax.core.Tracer):
            self._mark(self.get_raw_value())

    def _mark(self, value: Any) -> None:
        if _is_unset(value):
            self.set_metadata("is_missing", True)
        elif self.has_metadata("is_missing"):
            self.del_metadata("is_missing")


def _is_unset(value: Any) -> bool:
    """Of the values that are known: not while they are traced or abstract, nor those that other processes hold."""
    if isinstance(value, jax.core.Tracer) or not isinstance(value, jax.Array | np.ndarray):
        return False
    parts = [shard.data for shard in value.addressable_shards] if isinstance(value, jax.Array) else [value]
    return not all(np.isfinite(np.asarray(part)).all() for part in parts)


class Calibrated(nnx.Module):
    """Base of what may have a static scale: the layers in 8 bits, and what stores keys and values in 8 bits.

    Attributes:
        input_scale: `InputScale`, or None unless the scale is static.
        amax, tokens, nonfinite: statistics while it is in calibration, else None.
        histogram: one too, where calibration was started with it.
    """

    stack: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()

    @property
    def static_scheme(self) -> Scheme | None:
        """The scheme, over `[M, K]`, of what is quantized by the static scale; None without one."""
        raise NotImplementedError

    def describe(self) -> str:
        """What the scale is for, in reports and files."""
        return str(self.static_scheme)

    @property
    def is_calibrating(self) -> bool:
        return self.amax is not None

    def start_calibration(self, *, histogram: bool = False, fake_quantize: bool = True) -> None:
        """From now on a call gathers the running amax of its input.

        Arguments:
            histogram: gather one of the input's magnitudes as well.
            fake_quantize: go on with the input quantized by the scale that follows from the running amax; otherwise
                with the input as it is, so that no row's result depends on other rows or on calls before.

        Raises:
            CalibrationError: the scale is not static.
        """
        if self.static_scheme is None:
            raise CalibrationError(f"{type(self).__name__}: its scale is not static; only a static one is calibrated")
        self.fake_quantize = fake_quantize
        self.amax = nnx.data(Amax(jnp.zeros(self.input_scale.shape, jnp.float32)))
        self.tokens = nnx.data(TokenCount(jnp.zeros((*self.stack, *self.experts), jnp.int32)))
        self.nonfinite = nnx.data(NonfiniteCount(jnp.zeros(self.stack, jnp.int32)))
        shape = (*self.stack, 2, self.input_scale.shape[-1], BINS)
        self.histogram = nnx.data(Histogram(jnp.zeros(shape, jnp.uint32)) if histogram else None)

    def finish_calibration(self, scale: Float[Array, "1 groups"] | None = None) -> None:
        """Sets the static scale (by default the one that follows from the amax gathered), and ends calibration.

        Raises:
            CalibrationError: no calibration was started, or the amax of a layer is zero: it saw nothing.
        """
        if not self.is_calibrating:
            raise CalibrationError("layer: it is not in calibration; call start_calibration first")
        if not np.asarray(self.amax[...]).any((-2, -1)).all():
            raise CalibrationError(f"layer: it saw no activation other than zero in {np.sum(self.tokens[...])} tokens")
        if scale is None:
            scale = numerics.compute_scale(self.amax[...], self.static_scheme)
        self.input_scale[...] = jax.device_put(scale, self.input_scale[...].sharding)
        self.abandon_calibration()

    def abandon_calibration(self) -> None:
        """Ends calibration and keeps the static scale as it was before."""
        self.amax = self.tokens = self.nonfinite = self.histogram = nnx.data(None)

    def observe(self, x: Float[Array, "m k"], group_sizes: Int[Array, " e"] | None = None) -> None:
        """Joins `x` to the statistics; no gradient passes."""
        x = jax.lax.stop_gradient(x)
        scheme, has_histogram = self.static_scheme, self.histogram is not None

        def statistics(x, group_sizes):
            is_row = None if group_sizes is None else row_mask(group_sizes, x.shape[0])
            counts = count_bins(x, scheme, is_row) if has_histogram else None
            if is_row is not None:
                x = jnp.where(is_row[:, None], x, 0)
            nonfinite = jnp.sum(~jnp.all(jnp.isfinite(x), axis=1), dtype=jnp.int32)
            return [numerics.block_amax(x, scheme), nonfinite, counts]

        on_every_device = [((), ()), (), ((), (), ()) if has_histogram else None]
        amax, nonfinite, counts = meshes.by_xla(statistics, lambda: on_every_device, x, group_sizes)
        if has_histogram:
            self.histogram[...] = add_counts(self.histogram[...], counts)
        self.amax[...] = jnp.maximum(self.amax[...], amax)
        self.tokens[...] = self.tokens[...] + (x.shape[0] if group_sizes is None else group_sizes)
        self.nonfinite[...] = self.nonfinite[...] + nonfinite
