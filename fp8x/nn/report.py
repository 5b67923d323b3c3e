"""`report`: every matrix of a model, with its recipe or the reason why it is in 16 or 32 bits."""

import dataclasses
import math
from typing import Any

import numpy as np
from flax import nnx

from fp8x.nn.decide import EMBEDDING, OVERRIDE, kept_of
from fp8x.nn.notes import Notes
from fp8x.nn.products import roles_of
from fp8x.nn.quantized import QuantizedLayer, called_layers
from fp8x.nn.registry import conversion_of, holders, type_name
from fp8x.nn.training import layers_in_training
from fp8x.nn.walk import named_layers, named_modules
from fp8x.recipe import Recipe, describe
from fp8x.roles import Roles

why_left = Notes()  # of modules that `quantize_model` left


@dataclasses.dataclass(frozen=True)
class Row:
    """A parameter of two or more dims.

    Attributes:
        path: of the variable, dotted.
        type: of the module that holds it.
        shape, dtype: as stored; K-major where it is stored in 8 bits.
        nbytes: with its scales.
        recipe: what a quantized layer does; None for what is not quantized. One with `master_weights` is of a matrix
            in training, which is stored as it was and quantized at every call.
        reason: why it is not; empty for what is.
        doubt: what else it may be, by its shape, where it is quantized and no name says what it is; or empty.
        is_called: whether the layer in 8 bits is called; None where that was not asked, or can't be seen.
    """

    path: str
    type: str
    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int
    recipe: Recipe | None
    reason: str
    doubt: str = ""
    is_called: bool | None = None

    @property
    def code(self) -> str:
        """The recipe's code, or what it is made of."""
        if self.recipe is None:
            return ""
        end = ", at every call (in training)" if self.recipe.master_weights else ""
        stored = dataclasses.replace(self.recipe, master_weights=False)
        return describe(stored) + end


@dataclasses.dataclass(frozen=True)
class Report:
    """Every parameter of two or more dims, in the order of the model; prints as a table."""

    rows: tuple[Row, ...]

    @property
    def quantized(self) -> tuple[Row, ...]:
        """Those in 8 bits."""
        return tuple(row for row in self.rows if row.recipe is not None and not row.recipe.master_weights)

    @property
    def in_training(self) -> tuple[Row, ...]:
        """Those in 16 or 32 bits that are quantized at every call."""
        return tuple(row for row in self.rows if row.recipe is not None and row.recipe.master_weights)

    @property
    def kept(self) -> tuple[Row, ...]:
        """Those in 16 or 32 bits that are not quantized at all."""
        return tuple(row for row in self.rows if row.recipe is None)

    def __str__(self) -> str:
        head = ("path", "type", "shape", "dtype", "bytes", "recipe, or why it stays")
        cells = [
            (
                row.path,
                row.type,
                "×".join(map(str, row.shape)),
                str(row.dtype),
                f"{row.nbytes:,}",
                "; ".join(filter(None, (row.code or row.reason, row.doubt, "never called" * (row.is_called is False)))),
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *cells)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(each, widths)).rstrip() for each in (head, *cells)]
        total, small = (sum(row.nbytes for row in rows) for rows in (self.rows, self.quantized))
        last = f"{len(self.quantized)} of {len(self.rows)} in 8 bits, {small:,} of {total:,} bytes"
        if self.in_training:
            last += f"; {len(self.in_training)} quantized at every call"
        return "\n".join([*lines, last])


def report(model: nnx.Module, *inputs: Any) -> Report:
    """Every parameter of two or more dims of a model, quantized or not; one that is held twice is listed once.

    With `inputs`, arrays or `jax.ShapeDtypeStruct`s, it also says which layers in 8 bits `model(*inputs)` never calls.
    The model is traced for that, not run.

    Of a model that `fp8x.quantize_model` has not seen, or a copy of one, reasons follow from types and paths alone.
    """
    order = {path: index for index, (path, _) in enumerate(named_modules(model))}
    rows: dict[int, tuple[int, Row]] = {}
    layers = named_layers(model)
    called = called_layers(layers, model, inputs) if inputs else None
    roles = roles_of(model)

    def add(path: str, module: nnx.Module, name: str, variable: nnx.Variable, recipe: Recipe | None, reason: str):
        nbytes = _nbytes(variable)
        if isinstance(module, QuantizedLayer) and variable is module.weight:
            nbytes += _nbytes(module.weight_scale)
        full = f"{path}.{name}" if path else name
        dtype, is_called = np.dtype(variable.dtype), None if called is None or path not in layers else path in called
        doubt = doubt_of(roles, path) if recipe is not None else ""
        row = Row(full, type_name(module), variable.shape, dtype, nbytes, recipe, reason, doubt, is_called)
        rows.setdefault(id(variable), (order[path], row))

    for path, module in layers.items():
        add(path, module, "weight", module.weight, module.recipe, "")
        if module.bias is not None and module.bias.ndim >= 2:
            add(path, module, "bias", module.bias, None, "a bias")
    trained = layers_in_training(model)
    for path, layer in trained.items():
        matrix = conversion_of(layer.source)[0].matrix
        inside = f"{path}.source" if path else "source"
        add(inside, layer.source, matrix, getattr(layer.source, matrix), layer.recipe, "")
        if (bias := getattr(layer.source, "bias", None)) is not None and bias.ndim >= 2:
            add(inside, layer.source, "bias", bias, None, "a bias")
    found = holders(model)
    kept = kept_of(found, roles)
    for holder in found:
        for name, (variable, reason) in holder.matrices.items():
            if reason is None:
                reason = why_left.get(holder.module) or holder.fault
            if reason is None and (holder.path in kept or holder.conversion.on_request):
                reason = kept.get(holder.path, EMBEDDING) + OVERRIDE
            add(holder.path, holder.module, name, variable, None, reason or "no rule or recipe has taken it")
    return Report(tuple(row for _, row in sorted(rows.values(), key=lambda pair: pair[0])))


def doubt_of(roles: Roles, path: str) -> str:
    """What a quantized layer may be, and what to do if it is."""
    return f"{roles.doubts[path]}; if it is, a rule with None keeps it" if path in roles.doubts else ""


def _nbytes(variable: nnx.Variable) -> int:
    return math.prod(variable.shape) * np.dtype(variable.dtype).itemsize
