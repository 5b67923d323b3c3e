"""`calibrate`: runs batches through a model and sets its static activation scales."""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from fp8x.calibrate.batches import arguments_of, check_batches
from fp8x.calibrate.methods import DEFAULT_PERCENTILE, check_method, find_scale
from fp8x.calibrate.report import CalibrationReport, LayerStatistics, Method
from fp8x.calibrate.sharded import ShardedObserver
from fp8x.calibrate.statistics import any_value, observe, start, static_layers
from fp8x.errors import CalibrationError, DataError, MeshError, some
from fp8x.nn.calibrated import Calibrated
from fp8x.nn.observer import total_counts
from fp8x.nn.quantized import QuantizedLayer
from fp8x.scheme import KV_HEAD, KV_SCHEMES, KV_TENSOR, Scheme, is_kv_static
from fp8x.sharding.model import plan_of, static_dims
from fp8x.sharding.place import whole
from fp8x.sharding.plan import Placement

KVGranularity = Literal["tensor", "head"]

# Batches that JAX has been given and has not done: one that runs and two that wait, so that no device ever waits for
# Python. More would only hold memory, and hide how far the work is.
IN_FLIGHT = 3


def calibrate(
    model: nnx.Module,
    batches: Iterable,
    mesh: Mesh | None = None,
    *,
    method: Method = "max",
    percentile: float = DEFAULT_PERCENTILE,
    kv_cache: bool | KVGranularity | Scheme = False,
    kv_cache_only: bool = False,
    progress: Callable[[int], None] | None = None,
) -> CalibrationReport:
    """Sets the static activation scales of a model from what its layers see.

    The model that infers is the one that calibrates: a layer in calibration gathers statistics of its input and passes
    it on in 16 bits. What a row gives depends on no other row, and statistics join by maxima and integer sums, so
    neither the order of batches nor the number of devices changes a bit of the scales.

    Arguments:
        model: a quantized model; every layer with a static activation scale is calibrated (anew).
        batches: what the model is called with, one after another; a tuple is several arguments. Batches of one shape
            compile once. On a mesh: arrays whose rows are split over the axis `data`; the first batch sets how many
            rows a device takes, and what the last one leaves over compiles once more. With several processes, each
            gives its own batches, of any number, for its own devices.
        mesh: axes among `data`, `tensor` and `expert`; the model is copied to every device, unless it is on this mesh
            already, by `fp8x.sharding.shard` or `fp8x.load`. None: where the model is.
        method: `"max"`: scales from the largest magnitudes. `"percentile"`: from the magnitude that `percentile` of a
            hundred values do not exceed. `"mse"`: those of the least squared error. The last two gather histograms.
        percentile: above 0, up to 100; for its method only.
        kv_cache: also store the keys and values of an `fp8x.models.Decoder` in e4m3 from now on, and find scales for
            them: `True` or "tensor", one of keys and one of values a layer; "head", one a head; or a `Scheme`, as
            `Decoder.set_kv_cache` takes it. A model whose cache has such scales already gets them anew in any case.
        kv_cache_only: leave the layers' static activation scales as they are, and quantize activations by them.
        progress: called with the number of batches that are done, as each is.

    Raises:
        CalibrationError: the model has no static layer, an unknown method, or layers (named) that saw NaN or Inf, or
            nothing but zeros.
        DataError: no batches, one that is not in an iterable, or one that is no array, or that a decoder can't read
            (`Decoder.check_ids`).
        MeshError: a mesh that the batches do not fit, or that is not the one the model is on.
    """
    check_method(method, percentile)
    check_batches(batches)
    placement = getattr(model, "placement", None)
    if placement is not None:
        mesh = _check_placement(placement, mesh, method)
    with _kv_cache(model, kv_cache):
        layers = static_layers(model)
        if kv_cache_only:
            layers = {path: layer for path, layer in layers.items() if not isinstance(layer, QuantizedLayer)}
            if not layers:
                raise CalibrationError(
                    "kv_cache_only: the model's keys and values have no static scales; pass kv_cache"
                )
        return _calibrate(model, layers, batches, mesh, method, percentile, progress)


@contextlib.contextmanager
def _kv_cache(model: nnx.Module, kind: bool | KVGranularity | Scheme) -> Iterator[None]:
    """Has a decoder store keys and values by scales that are to be found; after an error as before."""
    if kind is False:
        yield
        return
    if not hasattr(model, "set_kv_cache"):
        raise CalibrationError(f"kv_cache: a {type(model).__name__} has none that fp8x knows; give an fp8x Decoder")
    scheme = kind if isinstance(kind, Scheme) else KV_SCHEMES.get("tensor" if kind is True else str(kind))
    if scheme is None or not is_kv_static(scheme) or scheme.scale_rule == "unit":
        raise CalibrationError(
            f"kv_cache: {kind!r} does not fit; use True, 'tensor', 'head', or a Scheme with block {KV_TENSOR} or "
            f"{KV_HEAD}"
        )
    before = model.kv_quantizers
    model.set_kv_cache(scheme)
    try:
        yield
    except BaseException:
        model.hold_kv_quantizers(before)
        raise


def _calibrate(
    model: nnx.Module,
    layers: dict[str, Calibrated],
    batches: Iterable,
    mesh: Mesh | None,
    method: Method,
    percentile: float,
    progress: Callable[[int], None] | None,
) -> CalibrationReport:
    placement = getattr(model, "placement", None)
    parts = start(model, histogram=method != "max", layers=layers)
    try:
        observer = _Observer(*parts) if mesh is None else ShardedObserver(*parts, mesh, placement is not None)
        count = _observe_all(observer, batches, getattr(model, "check_ids", None), progress)
        nnx.update(model, observer.result())
        _check_inputs(layers)
        found = {path: _statistics(layer, method, percentile) for path, layer in layers.items()}
        for path, layer in layers.items():
            layer.finish_calibration(found[path].scale)
    except BaseException:
        for layer in layers.values():
            layer.abandon_calibration()
        raise
    if placement is not None:
        found = _as_on_one_device(model, layers, found)
    return CalibrationReport(found, count, method, percentile if method == "percentile" else None)


class _Observer:
    """Observes batches where the model is."""

    def __init__(self, graphdef: nnx.GraphDef, statistics: nnx.State, rest: nnx.State):
        self.graphdef, self.statistics, self.rest = graphdef, statistics, rest

    def add(self, batch: tuple[Any, ...]) -> jax.Array:
        """Observes a batch; what it gives is ready when the batch is done."""
        self.statistics, done = _step(self.graphdef, self.statistics, self.rest, batch)
        return done

    def result(self) -> nnx.State:
        return self.statistics


def _observe_all(
    observer: "_Observer | ShardedObserver",
    batches: Iterable,
    check: Callable[[Any, str], None] | None,
    progress: Callable[[int], None] | None,
) -> int:
    """How many batches there were; `check` is of what a decoder is called with, which a compiled step can't look at."""
    count, in_flight = 0, collections.deque()

    def wait() -> None:
        in_flight.popleft().block_until_ready()
        if progress is not None:
            progress(count - len(in_flight))

    for batch in batches:
        arguments = arguments_of(batch, f"batches[{count}]", check)
        count += 1
        in_flight.append(observer.add(arguments))
        if len(in_flight) == IN_FLIGHT:
            wait()
    if count == 0:
        raise DataError("batches: there are none; calibration needs at least one")
    while in_flight:
        wait()
    return count


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(
    graphdef: nnx.GraphDef, statistics: nnx.State, rest: nnx.State, batch: tuple[Any, ...]
) -> tuple[nnx.State, jax.Array]:
    found = observe(graphdef, rest, statistics, batch)
    return found, any_value(found)


def _check_placement(placement: Placement, mesh: Mesh | None, method: Method) -> Mesh:
    if mesh is not None and mesh != placement.mesh:
        raise MeshError("mesh: it is not the one that the model is on; leave it out")
    if method != "max" and placement.vocab:
        raise CalibrationError(
            f"method: {method!r} takes the whole model on every device, but this one is split over mesh axes "
            f"{', '.join(placement.vocab)}; use 'max', or calibrate before the model is placed"
        )
    return placement.mesh


def _as_on_one_device(
    model: nnx.Module, layers: dict[str, Calibrated], found: dict[str, LayerStatistics]
) -> dict[str, LayerStatistics]:
    """Statistics of the groups of K that the whole layer has, without what fills up devices and copies of heads."""
    plan = plan_of(model, model.placement.mesh)

    def cut(path: str, layer: LayerStatistics) -> LayerStatistics:
        dims = static_dims(path, layers[path], plan)
        return dataclasses.replace(layer, amax=whole(layer.amax, dims), scale=whole(layer.scale, dims))

    return {path: cut(path, layer) for path, layer in found.items()}


def _check_inputs(layers: dict[str, Calibrated]) -> None:
    if broken := [path for path, layer in layers.items() if layer.nonfinite[...].any()]:
        rows = int(layers[broken[0]].nonfinite[...].sum())
        raise CalibrationError(
            f"model: {some(broken)} fed NaN or Inf ({broken[0]} in {rows} rows); mend the weights or the data, or "
            "quantize from a type that does not overflow"
        )
    if silent := [path for path, layer in layers.items() if not np.asarray(layer.tokens[...]).any()]:
        raise CalibrationError(
            f"model: {some(silent)} never called; give batches that reach every layer, or leave these out by a rule"
        )
    if idle := [path for path, layer in layers.items() if not np.asarray(layer.amax[...]).any((-2, -1)).all()]:
        raise CalibrationError(f"model: {some(idle)} fed nothing but zeros; give more or other data")


def _statistics(layer: Calibrated, method: Method, percentile: float) -> LayerStatistics:
    amax = np.asarray(layer.amax[...])
    counts = None if layer.histogram is None else total_counts(np.asarray(layer.histogram[...]))
    scale = np.empty_like(amax)
    for index in np.ndindex(layer.stack):
        of_layer = None if counts is None else counts[index]
        scale[index] = find_scale(method, percentile, amax[index], of_layer, layer.static_scheme)
    return LayerStatistics(layer.describe(), amax, scale, np.asarray(layer.tokens[...]))
