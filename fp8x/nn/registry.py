"""Which module types can be quantized, how, and why a module can't."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol

import jax
from flax import nnx

from fp8x import numerics
from fp8x.nn.contraction import Einsum, LinearGeneral, check_einsum, check_linear_general, einsum_fault
from fp8x.nn.embed import Embed, check_embed
from fp8x.nn.grouped import GroupedLinear, check_grouped
from fp8x.nn.linear import Linear, LoRALinear, check_linear
from fp8x.nn.quantized import QuantizedLayer
from fp8x.nn.unquantized import UnquantizedGroupedLinear
from fp8x.nn.walk import named_modules
from fp8x.recipe import Recipe


class Converter(Protocol):
    """Makes the quantized counterpart of a module. `name` is its path, for errors."""

    def __call__(self, module: nnx.Module, recipe: Recipe, *, name: str, allow_nonfinite: bool) -> nnx.Module: ...


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How modules of one type are quantized.

    Attributes:
        convert: makes the quantized layer.
        matrix: the attribute that is quantized, and the others that the layer takes over; None for a user's own type.
        check: raises what `convert` would, but for NaN and Inf, at no cost; None for a user's own type.
        fault: why this module can't be quantized, where that depends on more than its type.
        on_request: whether only a rule that names it gets it quantized.
    """

    convert: Converter
    matrix: str | None = None
    check: Callable[[nnx.Module, Recipe, str], None] | None = None
    fault: Callable[[nnx.Module], str | None] = lambda module: None
    on_request: bool = False

    def check_before(self, module: nnx.Module, recipe: Recipe, name: str, allow_nonfinite: bool) -> None:
        """What would fail in `convert` fails here, before any module is swapped."""
        if self.check is not None:
            self.check(module, recipe, name)
            if not allow_nonfinite:
                numerics.check_finite(getattr(module, self.matrix)[...], name)


def _own_product(module: nnx.Module) -> str | None:
    """A layer that was told to multiply in another way is not multiplied in ours."""
    if getattr(module, "dot_general_cls", None) is not None:
        return "it has a dot_general_cls of its own"
    if getattr(module, "dot_general", None) not in (None, jax.lax.dot_general):
        return "it has a dot_general of its own"
    return None


def _einsum_fault(module: nnx.Einsum) -> str | None:
    if module.einsum_op is not jax.numpy.einsum:
        return "it has an einsum_op of its own"
    return einsum_fault(module)


_CONVERTERS: dict[type[nnx.Module], Conversion] = {
    nnx.Linear: Conversion(Linear.from_linear, "kernel", check_linear, _own_product),
    nnx.LoRALinear: Conversion(LoRALinear.from_linear, "kernel", check_linear, _own_product),
    nnx.LinearGeneral: Conversion(LinearGeneral.from_linear_general, "kernel", check_linear_general, _own_product),
    nnx.Einsum: Conversion(Einsum.from_einsum, "kernel", check_einsum, _einsum_fault),
    nnx.Embed: Conversion(Embed.from_embed, "embedding", check_embed, on_request=True),
    UnquantizedGroupedLinear: Conversion(GroupedLinear.from_unquantized, "weight", check_grouped),
}
# They rewrite the matrix of the layer inside at every call.
_REWRITERS = (nnx.WeightNorm, nnx.SpectralNorm)
_NORMS = (nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm)


def register(
    source: type[nnx.Module], converter: Converter | None = None
) -> Callable[[Converter], Converter] | Converter:
    """Teaches `quantize_model` a module type, and subclasses that override nothing of it. Usable as a decorator.

    @fp8x.nn.register(MyExperts)
    def quantize_my_experts(module, recipe, *, name, allow_nonfinite):
        return fp8x.nn.GroupedLinear.from_arrays(...)
    """
    if converter is None:
        return lambda function: register(source, function)
    _CONVERTERS[source] = Conversion(converter)
    return converter


def known_types() -> str:
    """The names of the types that can be quantized, for errors."""
    return ", ".join(source.__name__ for source in _CONVERTERS)


def conversion_of(module: nnx.Module) -> tuple[Conversion | None, str | None]:
    """How a module is quantized, or None; and why not, if it looks as if it should be."""
    source = next((kind for kind in type(module).__mro__ if kind in _CONVERTERS), None)
    if source is None:
        return None, None
    conversion = _CONVERTERS[source]
    fault = _override(module, source, conversion) or conversion.fault(module)
    return (None, fault) if fault else (conversion, None)


def _override(module: nnx.Module, source: type, conversion: Conversion) -> str | None:
    """What a subclass does that its base does not, and that a quantized base would lose."""
    below = type(module).__mro__[: type(module).__mro__.index(source)]
    methods = [name for kind in below for name, value in vars(kind).items() if _is_method(name, value)]
    if methods:
        return f"it is a {source.__name__} with {', '.join(sorted(set(methods)))} of its own; see fp8x.nn.register"
    known = {conversion.matrix, "bias", "lora"}
    held = [name for name, value in vars(module).items() if isinstance(value, nnx.Variable | nnx.Module)]
    if below and conversion.matrix and (more := [name for name in held if name not in known]):
        return f"it is a {source.__name__} that holds {', '.join(more)} as well; see fp8x.nn.register"
    return None


def _is_method(name: str, value) -> bool:
    wraps = callable(value) or isinstance(value, property | classmethod | staticmethod)
    return wraps and name not in ("__init__", "__abstractmethods__") and not name.startswith(("_pytree__", "_abc"))


@dataclasses.dataclass
class Holder:
    """A module that holds parameters of two or more dims itself.

    Attributes:
        path, module: where and what it is.
        conversion: how it is quantized; None if it can't be.
        fault: why it can't.
        matrices: its parameters of two or more dims, by attribute, each with the reason why it is no matrix, or None.
    """

    path: str
    module: nnx.Module
    conversion: Conversion | None
    fault: str | None
    matrices: dict[str, tuple[nnx.Variable, str | None]]

    @property
    def on_request(self) -> bool:
        return self.conversion is not None and self.conversion.on_request


def holders(model: nnx.Module) -> list[Holder]:
    """Every module that can be quantized or holds a matrix, in the order of the model; one held twice comes twice."""
    from fp8x.nn.training import QuantizationAware  # late: it imports this module

    found, rewriters, trained = [], [], set()
    for path, module in named_modules(model):
        if isinstance(module, QuantizationAware):
            trained.add(id(module.source))
            continue
        if id(module) in trained:
            continue
        if isinstance(module, _REWRITERS):
            rewriters.append((f"{path}." if path else "", type(module).__name__))
        if isinstance(module, QuantizedLayer):
            continue
        conversion, fault = conversion_of(module)
        if above := next((kind for prefix, kind in rewriters if path.startswith(prefix) and path != prefix), None):
            conversion, fault = None, fault or f"nnx.{above} rewrites it at every call"
        matrices = {name: (each, _no_matrix(module, name, each)) for name, each in _own_params(module)}
        if conversion is None and not fault:
            fault = f"{type_name(module)} is no type that fp8x can quantize; see fp8x.nn.register"
        if conversion is not None or matrices:
            found.append(Holder(path, module, conversion, None if conversion else fault, matrices))
    owned = {id(each) for holder in found if holder.conversion for each, _ in holder.matrices.values()}
    for holder in found:
        if holder.conversion is None:
            holder.matrices = {
                name: (each, reason or ("another layer has it, too" if id(each) in owned else None))
                for name, (each, reason) in holder.matrices.items()
            }
    return found


def without_matrices(model: nnx.Module, found: Iterable[Holder]) -> dict[str, str]:
    """The modules that are not among `found`, by path, each with the reason why nothing in it can be quantized."""
    paths = {holder.path for holder in found}
    reasons = {}
    for path, module in named_modules(model):
        if path and path not in paths:
            has_vectors = any(isinstance(value, nnx.Param) for value in vars(module).values())
            what = "its parameters are vectors" if has_vectors else "it holds no matrix"
            reasons[path] = f"{type_name(module)}: {what}"
    return reasons


def _own_params(module: nnx.Module) -> list[tuple[str, nnx.Variable]]:
    """The parameters of two or more dims that a module holds, itself or in plain containers."""

    def walk(prefix: str, node):
        if isinstance(node, nnx.Param):
            if node.ndim >= 2:
                yield prefix, node
        elif isinstance(node, dict):
            for key, value in node.items():
                yield from walk(f"{prefix}.{key}", value)
        elif isinstance(node, list | tuple):
            for index, value in enumerate(node):
                yield from walk(f"{prefix}.{index}", value)

    return [each for name, value in vars(module).items() for each in walk(name, value)]


def _no_matrix(module: nnx.Module, name: str, variable: nnx.Variable) -> str | None:
    """Why a parameter of two or more dims is no matrix that should be quantized."""
    if isinstance(variable, nnx.LoRAParam):
        return "an adapter, which is trained"
    if isinstance(module, _NORMS):
        return "scale or bias of a norm"
    if name == "bias":
        return "a bias"
    return None


def type_name(module: nnx.Module) -> str:
    """What a user calls the module's type."""
    kind = type(module)
    return f"nnx.{kind.__name__}" if kind.__module__.startswith("flax.nnx") else kind.__name__
