"""Flax Linen models in 8 bits: variables in, variables out.

    variables = model.init(key, x)
    quantized = fp8x.linen.quantize(model, variables, "fp8_e4m3fn_bf16_block_scale", args=(x,))
    y = fp8x.linen.Quantized(model).apply(quantized, x)

`quantize` replaces the kernels of `nn.Dense`, `nn.DenseGeneral` (so of `nn.MultiHeadDotProductAttention`), `nn.Einsum`
and, where a rule names it, the table of `nn.Embed`, by `QuantizedKernel`s. The model's code stays as it is: where it is
run under `intercept`, as `Quantized` does, these layers multiply by `fp8x.ops` and return the recipe's output type,
whatever `dtype` and `precision` they were given. Everything works that Linen does with variables: `jax.jit`, gradients
of inputs and of the parameters that stay, `nn.scan` and `nn.vmap` over stacks, `nn.remat`, shared modules.

What does not:

- Recipes whose activation scale is calibrated: an observer would need a collection of its own in the `nn.scan` and
  `nn.vmap` of the model's code, which Linen asks for by name. Use a dynamic or weight-only recipe, `fp8x.nn` layers
  through `flax.nnx.bridge` (examples/linen_bridge.py), or an NNX model.
- Stacks along another axis of the parameters than the first (`variable_axes={"params": 0}` is what works).
- Kernels that are changed between the variables and their layer: by `nn.WeightNorm`, `nn.SpectralNorm`,
  `nn.map_variables`.
- Kernels that other code reads, such as `embed.embedding.T` for a tied head (`embed.attend` works), and layers whose
  output has to be of another type than the recipe's, as the carry of an `nn.scan` may.
- Layers with a `dot_general` or `promote_dtype` of their own, and types that fp8x does not know, such as `nn.Conv`.

All but the first stay as they are, and are named. The kernels in 8 bits are frozen, so take them out of what is
differentiated: `flax.traverse_util.flatten_dict` leaves a `QuantizedKernel` whole.
"""

import collections
import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import core, serialization
from flax import linen as nn
from flax.linen import dtypes
from jaxtyping import Array, Float, PyTree

from fp8x import numerics, ops
from fp8x.array import ScaledArray
from fp8x.errors import RecipeError, ShapeError
from fp8x.nn import contraction
from fp8x.nn.contraction import Kernel
from fp8x.nn.decide import (
    Unsupported,
    check_any,
    check_unsupported,
    decide,
    kept_of,
    recipe_of,
    say_unsupported,
    why_kept,
)
from fp8x.nn.embed import look_up, weight_only
from fp8x.nn.products import add_own, of_kernel
from fp8x.nn.quantized import weight_scheme
from fp8x.nn.report import Report, Row, doubt_of
from fp8x.recipe import Decision, Recipe
from fp8x.roles import Product, Roles
from fp8x.roles import find as find_roles
from fp8x.scheme import Scheme

__all__ = ["Quantized", "QuantizedKernel", "intercept", "quantize", "report"]

Path = tuple[str, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["dims", "recipe"])
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedKernel:
    """What `quantize` leaves in the place of a kernel. A pytree of two arrays.

    Attributes:
        weight: K-major, `[..., N, K]` or `[..., B, N, K]` with a batch; the axes of a stack come first. Its arrays are
            boxed where the kernel was (`nn.with_partitioning`), by the names of the kernel's axes.
        dims: what the dims of the kernel of one layer were.
        recipe: what the layer does.
    """

    weight: ScaledArray
    dims: Kernel
    recipe: Recipe

    def __jax_array__(self):
        raise RecipeError(
            f"kernel: {self.dims.shape} is in 8 bits, and no array; run the model by fp8x.linen.Quantized(model).apply "
            "or under fp8x.linen.intercept()"
        )


def _state(kernel: QuantizedKernel) -> dict:
    return {name: serialization.to_state_dict(getattr(kernel.weight, name)) for name in ("data", "scale")}


def _restored(kernel: QuantizedKernel, state: Mapping) -> QuantizedKernel:
    arrays = [serialization.from_state_dict(getattr(kernel.weight, name), state[name]) for name in ("data", "scale")]
    weight = ScaledArray.tree_unflatten(kernel.weight.scheme, arrays)  # in boxes, maybe
    return dataclasses.replace(kernel, weight=weight)


serialization.register_serialization_state(QuantizedKernel, _state, _restored)


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A Linen model whose variables `quantize` has made: `apply` runs it as `nn.Module.apply` does.

    `Quantized(model).apply` can be jitted, or be the `apply_fn` of a train state. Elsewhere (`bind`, inside of another
    module) call the model itself under `intercept`.
    """

    model: nn.Module

    def apply(self, variables: Mapping, *args, **kwargs):
        """`model.apply`, with its arguments (`rngs`, `mutable`, `method`, …)."""
        with intercept():
            return self.model.apply(variables, *args, **kwargs)


@contextlib.contextmanager
def intercept() -> Iterator[None]:
    """Linen layers that are called here multiply in 8 bits if their variables say so. Others do what they always do."""
    with nn.intercept_methods(_run_quantized):
        yield


def quantize(
    model: nn.Module,
    variables: Mapping,
    recipe: Recipe | str | None,
    rules: Mapping[str, Recipe | str | None] | None = None,
    *,
    args: Sequence = (),
    kwargs: Mapping[str, Any] | None = None,
    method: Callable | str | None = None,
    unsupported: Unsupported = "warn",
    allow_nonfinite: bool = False,
) -> dict:
    """The variables of a Linen model with kernels in 8 bits. `variables` stay as they are.

    The model is run on shapes alone, to see which module owns which parameter; then once more with kernels that can't
    be read, to see that nobody but their layers does. Everything is checked before the first kernel is quantized.

    Arguments:
        model: any Linen module, as it was initialized.
        variables: what `model.init` returned, or a trained one; arrays may lie on many devices.
        recipe: for what no rule names; a `Recipe`, its code, or None to quantize only what rules name. Static
            activation scales are refused, but for a unit scale.
        rules: regex over the paths of modules, names joined by dots (`"layers_0.attn.query"`), to a recipe, its code,
            or None to skip; the first that matches a whole path wins. Embeddings, heads and routers are skipped
            unless a rule names them (`fp8x.roles` tells them by names and shapes).
        args, kwargs: of a call of the model; arrays, or `jax.ShapeDtypeStruct`s in their place.
        method: what is called, as in `model.apply`. For a model with several, a function that calls all of them:
            `lambda model, x: model.decode(model.encode(x))`.
        unsupported: what to do about matrices that no rule skips and that can't be quantized: warn once, raise an
            error, or nothing. `fp8x.linen.report` lists them with the reasons.
        allow_nonfinite: quantize weights that hold NaN or Inf instead of raising.

    Returns:
        New variables, for `Quantized(model).apply`.

    Raises:
        RecipeError: the model is quantized already, or holds nothing that can be quantized; a recipe that needs
            calibration; matrices that can't be quantized, if those are to be an error, or if a rule names them alone.
        RuleError: a rule that matches no module, or rules that skip all.
        ShapeError: a kernel that its recipe does not fit, or NaN or Inf in it, named by path.
    """
    check_unsupported(unsupported)
    call = _call(model, variables, args, kwargs, method)
    variables = core.unfreeze(variables)
    params = dict(_leaves(variables.get("params", {})))
    if already := next((path for path, leaf in params.items() if isinstance(leaf, QuantizedKernel)), None):
        raise RecipeError(f"model: {'.'.join(already)} is quantized already; start from the unquantized variables")
    found = _holders(call, variables, params)
    _check_any_layer(model, found)
    roles = _roles_of(found)
    found, chosen, to_do = _settle(call, variables, found, recipe, rules, roles)
    _check_any_layer(model, found)
    check_any(its for _, its in to_do)
    if not allow_nonfinite:
        for each, _ in to_do:
            numerics.check_finite(_unboxed(each.leaf), each.path or "model")
    say_unsupported(found, chosen, roles, unsupported, report="fp8x.linen.report(model, variables, …)")
    for each, its in to_do:
        kernel = _quantized(each, its, allow_nonfinite)
        variables = _replaced(variables, ("params", *each.kernel_path), kernel)
    return variables


def report(
    model: nn.Module,
    variables: Mapping,
    recipe: Recipe | str | None = None,
    rules: Mapping[str, Recipe | str | None] | None = None,
    *,
    args: Sequence = (),
    kwargs: Mapping[str, Any] | None = None,
    method: Callable | str | None = None,
) -> Report:
    """Every parameter of two or more dims of a Linen model, quantized or not, with its recipe or the reason.

    Arguments:
        model, variables, args, kwargs, method: as in `quantize`; `variables` from before it, or what it returned.
        recipe, rules: what `quantize` is given, or was: the reasons follow from them.
    """
    call = _call(model, variables, args, kwargs, method)
    variables = core.unfreeze(variables)
    params = dict(_leaves(variables.get("params", {})))
    found = _holders(call, variables, params)
    roles = _roles_of(found)
    found, chosen, _ = _settle(call, variables, found, recipe, rules, roles)
    rows = {}
    for each in found:
        for name, (leaf, reason) in each.matrices.items():
            path = ".".join((*each.module_path, name))
            if isinstance(leaf, QuantizedKernel):
                data, scale = (_unboxed(array) for array in (leaf.weight.data, leaf.weight.scale))
                doubt = doubt_of(roles, each.path)
                rows[path] = Row(path, each.type, data.shape, data.dtype, _nbytes(data, scale), leaf.recipe, "", doubt)
                continue
            kernel = _unboxed(leaf)
            decision = chosen[each.path]
            # Without recipe and rules nobody knows what they said.
            if reason is None and recipe_of(each, decision) is not None:
                reason = "fp8x.linen.quantize has not been called"
            elif reason is None and (rules or decision.kept or each.on_request or each.fault is not None):
                reason = why_kept(each, decision)
            reason = reason or "it is not quantized; the recipe and the rules would say why"
            rows[path] = Row(path, each.type, kernel.shape, np.dtype(kernel.dtype), _nbytes(kernel), None, reason)
    order = [".".join(path) for path in params]
    return Report(tuple(rows[path] for path in sorted(rows, key=order.index)))


@dataclasses.dataclass(frozen=True)
class _Layer:
    """How a layer of Linen is told from others, and what it does.

    Attributes:
        type: the module's.
        matrix: the parameter that is quantized.
        dims: what the dims of a kernel of this shape are, by the module and the call's arguments.
        fault: why this one can't be quantized.
        run: the call in 8 bits: of module, weight, dims, recipe and the call's arguments.
        on_request: whether only a rule that names it gets it quantized.
    """

    type: type[nn.Module]
    matrix: str
    dims: Callable[..., Kernel]
    fault: Callable[..., str | None]
    run: Callable[..., Array]
    on_request: bool = False


@dataclasses.dataclass
class _Holder:
    """Parameters of two or more dims of one module; a `fp8x.nn.decide.Candidate`.

    Attributes:
        module_path, type: where and what the module is.
        fault: why they can't be quantized.
        matrices: the parameters by name, each with the reason why it is no matrix, or None.
        layer, dims: how it is quantized, where it is the matrix of a known layer.
    """

    module_path: Path
    type: str
    fault: str | None
    matrices: dict[str, tuple[Any, str | None]]
    layer: _Layer | None = None
    dims: Kernel | None = None

    @property
    def path(self) -> str:
        return ".".join(self.module_path)

    @property
    def on_request(self) -> bool:
        return self.layer is not None and self.layer.on_request

    @property
    def leaf(self) -> Any:
        """The first parameter."""
        return next(iter(self.matrices.values()))[0]

    @property
    def kernel_path(self) -> Path:
        return *self.module_path, self.layer.matrix


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a model that is run on shapes alone."""

    model: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    method: Callable | str | None

    def trace(self, variables: Mapping, interceptor: Callable) -> None:
        """Runs the call with `interceptor` around every method."""
        leaves, tree = jax.tree.flatten((self.args, self.kwargs))
        is_array = [isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct) for leaf in leaves]
        arrays = [leaf for leaf, traced in zip(leaves, is_array) if traced]
        # What nn.jit has traced before, it would not trace again: no interceptor would see it. A stream of random
        # numbers that no call had before prevents that.
        streams = ("params", f"fp8x_{next(_TRACES)}")

        def run(variables, arrays, seed):
            given = iter(arrays)
            args, kwargs = tree.unflatten([next(given) if traced else leaf for leaf, traced in zip(leaves, is_array)])
            rngs = dict.fromkeys(streams, jax.random.key(seed))
            with nn.intercept_methods(interceptor):
                mutable = nn.DenyList("params")
                self.model.apply(variables, *args, **kwargs, rngs=rngs, mutable=mutable, method=self.method)

        jax.eval_shape(run, variables, arrays, jax.ShapeDtypeStruct((), jnp.uint32))


_TRACES = itertools.count()


def _call(
    model: nn.Module,
    variables: Mapping,
    args: Sequence,
    kwargs: Mapping[str, Any] | None,
    method: Callable | str | None,
) -> _Call:
    """
    Raises:
        RecipeError: something else than a Linen module, its variables, or arguments that it can be called with.
    """
    if not isinstance(model, nn.Module):
        raise RecipeError(f"model: a {type(model).__name__} came; give an nn.Module, or an NNX one to quantize_model")
    if not isinstance(variables, Mapping) or "params" not in variables:
        has = f"has {', '.join(map(str, variables))}" if isinstance(variables, Mapping) else type(variables).__name__
        raise RecipeError(f"variables: no collection 'params' ({has}); give what model.init returned")
    if not isinstance(args, tuple | list):
        raise RecipeError(
            f"args: a {type(args).__name__} came; give a tuple of what the model is called with, like (x,)"
        )
    named = method if callable(method) else getattr(type(model), method or "__call__")
    try:
        inspect.signature(named).bind(model, *args, **kwargs or {})
    except TypeError as error:
        name = type(model).__name__
        raise RecipeError(
            f"args: {name} can't be called with {len(args)} of these: {error}; give all, or kwargs"
        ) from None
    return _Call(model, tuple(args), dict(kwargs or {}), method)


@dataclasses.dataclass
class _Seen:
    """What a run showed of one module path.

    Attributes:
        type: of the outermost module there, or of the layer.
        shapes: of one layer's parameters.
        layers: known layers, by how a call reads the kernel.
        faults: why one can't be quantized.
    """

    type: type[nn.Module]
    shapes: dict[str, tuple[int, ...]]
    layers: dict[Kernel, _Layer] = dataclasses.field(default_factory=dict)
    faults: dict[str, None] = dataclasses.field(default_factory=dict)


def _holders(call: _Call, variables: dict, params: dict[Path, Any]) -> list[_Holder]:
    """Every module that can be quantized or holds parameters of two or more dims, in the order of the parameters."""
    by_module: dict[Path, dict[str, Any]] = collections.defaultdict(dict)
    for (*module_path, name), leaf in params.items():
        by_module[tuple(module_path)][name] = leaf
    seen = _observe(call, variables, by_module)
    found = []
    for module_path, leaves in by_module.items():
        matrices = {name: leaf for name, leaf in leaves.items() if len(_shape(leaf)) >= 2}
        its = seen.get(module_path)
        if its is None:
            kind, fault = "", "no module that this call runs holds it; see the argument method"
        else:
            kind, fault = _type_name(its.type), next(iter(its.faults), None)
        if its is not None and its.layers:
            (dims, layer), *others = its.layers.items()
            leaf = matrices.pop(layer.matrix)
            if others:
                fault = fault or "its calls read the kernel in different ways"
            fault = fault or _misfit(leaf, dims)
            found.append(_Holder(module_path, kind, fault, {layer.matrix: (leaf, None)}, layer, dims))
            fault = f"{kind} holds it beside its {layer.matrix}"
        if matrices:
            fault = fault or f"{kind} is no type that fp8x can quantize"
            reasons = {name: (leaf, _no_matrix(name, leaf, its)) for name, leaf in matrices.items()}
            found.append(_Holder(module_path, kind, fault, reasons))
    return found


def _observe(call: _Call, variables: dict, by_module: dict[Path, dict[str, Any]]) -> dict[Path, _Seen]:
    """Runs the model on shapes alone; what it shows of every module that holds parameters."""
    seen: dict[Path, _Seen] = {}
    running: list[nn.Module] = []

    def observe(next_fun, args, kwargs, context):
        module = context.module
        path = () if module.scope is None else tuple(module.path)
        if path in by_module and module.scope is not None:
            its = seen.setdefault(path, _Seen(type(module), {}))
            for name in by_module[path]:
                if module.has_variable("params", name):
                    its.shapes[name] = _shape(module.get_variable("params", name))
            layer = _layer_of(context)
            if layer is not None and layer.matrix in its.shapes:
                given = _arguments(context, args, kwargs)
                above = next((kind for kind in running if isinstance(kind, _REWRITERS)), None)
                fault = f"nn.{type(above).__name__} rewrites it at every call" if above is not None else None
                fault = fault or _own_product(module) or layer.fault(module, *given)
                if fault:
                    its.faults[fault] = None
                    # Its dims may not be known, but that it is read as a matrix is.
                    dims = Kernel(its.shapes[layer.matrix], (), (), ())
                else:
                    dims = layer.dims(module, its.shapes[layer.matrix], *given)
                its.type = layer.type
                its.layers[dims] = layer
        running.append(module)
        try:
            return _run_quantized(next_fun, args, kwargs, context)
        finally:
            running.pop()

    call.trace(variables, observe)
    return seen


def _settle(
    call: _Call,
    variables: dict,
    found: list[_Holder],
    recipe: Recipe | str | None,
    rules: Mapping[str, Recipe | str | None] | None,
    roles: Roles,
) -> tuple[list[_Holder], dict[str, Decision], list[tuple[_Holder, Recipe]]]:
    """What was found, with the faults that a run shows; what was decided; and what is to be quantized, by what."""
    while True:
        chosen = decide(found, recipe, rules, kept_of(found, roles), others=_without_matrices(variables, found))
        recipes = [recipe_of(each, chosen[each.path]) for each in found]
        to_do = [
            (each, _checked(each, its))
            for each, its in zip(found, recipes)
            if its is not None and not isinstance(each.leaf, QuantizedKernel)
        ]
        if not (faults := _faults(call, variables, to_do)):
            return found, chosen, to_do
        found = [
            dataclasses.replace(each, fault=faults[each.path]) if each.layer and each.path in faults else each
            for each in found
        ]


def _without_matrices(variables: dict, found: Sequence[_Holder]) -> dict[str, str]:
    """The modules with parameters that are not among `found`, each with the reason."""
    held = {".".join(path[:-1]) for path, _ in _leaves(variables.get("params", {}))} - {each.path for each in found}
    return dict.fromkeys(held, "its parameters are vectors")


def _roles_of(found: Sequence[_Holder]) -> Roles:
    """What the products of a model are."""
    products: dict[str, Product] = {}
    tables: dict[str, tuple[int, int]] = {}
    for each in found:
        if each.on_request:
            tables[each.path] = _shape(each.leaf)[-2:]
        elif each.layer is not None:
            if each.dims.contracted:  # else its dims are not known
                products[each.path] = of_kernel(each.dims, _shape(each.leaf))
        elif not each.type.startswith("nn."):
            for name, (leaf, _) in each.matrices.items():
                add_own(".".join((*each.module_path, name)), _shape(leaf), products, tables)
    return find_roles(products, tables)


def _check_any_layer(model: nn.Module, found: Sequence[_Holder]) -> None:
    if any(each.fault is None for each in found):
        return
    kinds = ", ".join(dict.fromkeys(f"nn.{layer.type.__name__}" for layer in _LAYERS.values()))
    reasons = "".join(f"; {each.path or 'model'}: {each.fault}" for each in found if each.layer is not None)
    raise RecipeError(f"model: {type(model).__name__} calls no module that can be quantized ({kinds}){reasons}")


def _misfit(leaf: Any, dims: Kernel) -> str | None:
    """Why a stored kernel is not one, or a stack, of what its layer reads."""
    if isinstance(leaf, QuantizedKernel):
        return None
    if isinstance(leaf, nn.meta.AxisMetadata) and not isinstance(leaf, nn.Partitioned):
        return f"its kernel is boxed in {type(leaf).__name__}; use nn.with_partitioning, or nn.unbox"
    shape = _shape(leaf)
    if shape[len(shape) - len(dims.shape) :] != dims.shape:
        return f"its layers {dims.shape} are not stacked along the first axes of {shape}; use axis 0 in variable_axes"
    return None


def _no_matrix(name: str, leaf: Any, seen: _Seen | None) -> str | None:
    """Why a parameter of two or more dims is no matrix that should be quantized."""
    if name == "bias":
        return "a bias"
    if seen is not None and issubclass(seen.type, _NORMS):
        return "scale or bias of a norm"
    if seen is not None and len(seen.shapes.get(name, _shape(leaf))) < 2:
        return "a stack of vectors"
    return None


def _checked(holder: _Holder, recipe: Recipe) -> Recipe:
    """The recipe that a layer gets, once it fits."""
    name = holder.path or "model"
    if recipe.observer or recipe.needs_calibration:
        raise RecipeError(
            f"{name}: its recipe has a static activation scale, which fp8x.linen can't calibrate; use a dynamic or "
            "weight-only recipe, fp8x.nn layers through flax.nnx.bridge (examples/linen_bridge.py), or an NNX model"
        )
    rank = len(holder.dims.matrix)
    weight_scheme(recipe, rank).check_shape(holder.dims.matrix, name)
    if not jnp.issubdtype(dtype := _unboxed(holder.leaf).dtype, jnp.floating):
        raise ShapeError(f"{name}: dtype is {dtype}; only floating-point kernels can be quantized")
    return weight_only(recipe) if holder.on_request else recipe


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key"], meta_fields=["shape", "dims", "recipe"])
@dataclasses.dataclass(frozen=True, eq=False)
class _Sealed:
    """Stands for a `QuantizedKernel` in a run on shapes.

    Attributes:
        key: random keys, a type that has no arithmetic: whoever computes with a kernel fails.
        shape: that the keys of one layer have.
        dims, recipe: of the kernel.
    """

    key: Any
    shape: tuple[int, ...]
    dims: Kernel
    recipe: Recipe


def _faults(call: _Call, variables: dict, to_do: Sequence[tuple[_Holder, Recipe]]) -> dict[str, str]:
    """Why layers can't be quantized that don't get their kernels as they are stored, or without which it runs, by path.

    Raises:
        RecipeError: the model does not run, though it does with each of them by itself.
    """
    faults: dict[str, str] = {}

    def run_sealed(next_fun, args, kwargs, context):
        layer = _layer_of(context)
        value = _stored(context.module, layer)
        if not isinstance(value, _Sealed):
            return _run_quantized(next_fun, args, kwargs, context)
        if value.key.shape != value.shape:
            faults[".".join(context.module.path)] = "something changes its kernel on the way, as nn.map_variables does"
        matrix = value.dims.matrix
        weight = numerics.quantize(jnp.zeros(matrix), weight_scheme(value.recipe, len(matrix)))
        return _run(context, layer, QuantizedKernel(weight, value.dims, value.recipe), args, kwargs)

    def error_with(to_do) -> Exception | None:
        try:
            call.trace(functools.reduce(_seal, to_do, variables), run_sealed)
        except Exception as error:  # of the model's own code, so it may be any
            return error
        return None

    error = error_with(to_do)
    if error is None or faults:
        return faults
    for each in to_do:
        if alone := error_with([each]):
            faults[each[0].path] = (
                f"the model does not run if its kernel is no array and its output {each[1].out_dtype}; "
                f"{_first_line(alone)}"
            )
    if not faults:
        raise RecipeError(f"model: it does not run with these layers in 8 bits: {_first_line(error)}") from error
    return faults


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _seal(variables: dict, item: tuple[_Holder, Recipe]) -> dict:
    holder, recipe = item
    dims, shape = holder.dims, _shape(holder.leaf)
    stack = shape[: len(shape) - len(dims.shape)]
    # Sizes that the stack does not have show where it is cut along another axis. nn.Embed compares the shape of its
    # table with what it expects.
    size = max(stack, default=0) + 1
    shape = dims.shape if holder.on_request else (size, size + 1)
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (*stack, *shape)))
    return _replaced(variables, ("params", *holder.kernel_path), _Sealed(key, shape, dims, recipe))


def _quantized(holder: _Holder, recipe: Recipe, allow_nonfinite: bool) -> QuantizedKernel:
    """A stored kernel in 8 bits, boxed if it was."""
    leaf = holder.leaf
    kernel, scheme = jnp.asarray(_unboxed(leaf)), weight_scheme(recipe, len(holder.dims.matrix))
    options = dict(name=holder.path or "model", allow_nonfinite=allow_nonfinite, to_weight=holder.dims.to_weight)
    weight = numerics.quantize_weight(kernel, scheme, **options)
    if isinstance(leaf, nn.Partitioned):
        weight = _boxed(weight, leaf, holder.dims)
    return QuantizedKernel(weight, holder.dims, recipe)


def _boxed(weight: ScaledArray, box: nn.Partitioned, dims: Kernel) -> ScaledArray:
    """Data and scale in boxes like the kernel's. A dim that was merged from several lies as the first of them did."""
    kernel = box.value
    stack = kernel.ndim - len(dims.shape)
    of_kernel = (*box.names, *[None] * (kernel.ndim - len(box.names)))
    names = (*of_kernel[:stack], *(of_kernel[stack + merged[0]] for merged in dims.merged))
    # A device's part of a dim may end within a block of several: there every device has all scales.
    of_scales = tuple(
        name if count == size else None for name, size, count in zip(names, weight.shape, weight.scale.shape)
    )
    boxes = (box.replace(value=weight.data, names=names), box.replace(value=weight.scale, names=of_scales))
    return ScaledArray.tree_unflatten(weight.scheme, boxes)


def _run_quantized(next_fun, args, kwargs, context):
    """The interceptor: a layer that has a `QuantizedKernel` multiplies by it."""
    layer = _layer_of(context)
    value = _stored(context.module, layer)
    if not isinstance(value, QuantizedKernel):
        return next_fun(*args, **kwargs)
    return _run(context, layer, nn.unbox(value), args, kwargs)


def _run(context, layer: _Layer, kernel: QuantizedKernel, args, kwargs) -> Array:
    module = context.module
    name, given = ".".join(module.path) or "model", _arguments(context, args, kwargs)
    if fault := _own_product(module) or layer.fault(module, *given):
        raise RecipeError(f"{name}: its kernel is in 8 bits, but {fault}")
    if (dims := layer.dims(module, kernel.dims.shape, *given)) != kernel.dims:
        raise ShapeError(f"{name}: it reads its kernel as {dims}, but was quantized as {kernel.dims}")
    if kernel.weight.data.shape != kernel.dims.matrix:
        raise ShapeError(
            f"{name}: its weight is {kernel.weight.data.shape}, a stack of layers {kernel.dims.matrix}; run it by "
            "nn.scan or nn.vmap"
        )
    return layer.run(module, jax.lax.stop_gradient(kernel), name, *given)


def _layer_of(context) -> _Layer | None:
    """The layer whose own method is called; a subclass that calls it has it, too, and one that does not has none."""
    return _LAYERS.get(context.orig_method.func)


def _stored(module: nn.Module, layer: _Layer | None) -> Any:
    if layer is None or module.scope is None or not module.has_variable("params", layer.matrix):
        return None
    return module.get_variable("params", layer.matrix)


def _arguments(context, args, kwargs) -> tuple:
    """Of a layer's call, by position."""
    names = ("query",) if context.method_name == "attend" else ("inputs", "einsum_str")
    return *args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)


def _own_product(module: nn.Module) -> str | None:
    """A layer that was told to multiply in another way is not multiplied in ours."""
    if getattr(module, "dot_general_cls", None) is not None:
        return "it has a dot_general_cls of its own"
    if getattr(module, "dot_general", None) not in (None, jax.lax.dot_general):
        return "it has a dot_general of its own"
    if module.promote_dtype is not dtypes.promote_dtype:
        return "it has a promote_dtype of its own"
    return None


def _activation(recipe: Recipe, k: int) -> dict[str, Scheme | Array | None]:
    """How a product is to quantize its input. A static scale is a unit scale here."""
    scale = jnp.ones(recipe.activation.scale_shape((1, k)), jnp.float32) if recipe.is_static else None
    return {"activation": recipe.activation, "activation_scale": scale}


def _contract(
    kernel: QuantizedKernel, x: Float[Array, "..."], labels, bias: Array | None, described: str
) -> Float[Array, "..."]:
    def multiply(x, group_sizes):
        options = dict(bias=bias, out_dtype=kernel.recipe.out_dtype, **_activation(kernel.recipe, x.shape[-1]))
        return contraction.multiply(x, kernel.weight, group_sizes, **options)

    return contraction.contract(jnp.asarray(x), kernel.dims, labels, multiply, described)


def _bias(module: nn.Module) -> Array | None:
    return nn.unbox(module.get_variable("params", "bias")) if module.use_bias else None


def _tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _general_dims(module: nn.DenseGeneral, shape: tuple[int, ...], x) -> Kernel:
    return contraction.general_kernel(shape, len(_tuple(module.batch_dims)), len(_tuple(module.features)))


def _general_run(module: nn.DenseGeneral, kernel: QuantizedKernel, name: str, x) -> Array:
    features = len(kernel.dims.features)
    labels = contraction.general_labels(jnp.ndim(x), _tuple(module.axis), _tuple(module.batch_dims), features)
    bias = _bias(module)
    bias = None if bias is None else bias.reshape(kernel.dims.matrix[:-1])
    return _contract(kernel, x, labels, bias, name)


def _dense_dims(module: nn.Dense, shape: tuple[int, ...], x) -> Kernel:
    return contraction.general_kernel(shape, 0, 1)


def _dense_run(module: nn.Dense, kernel: QuantizedKernel, name: str, x) -> Array:
    return _contract(kernel, x, contraction.general_labels(jnp.ndim(x), (-1,), (), 1), _bias(module), name)


def _equation(module: nn.Einsum, einsum_str: str | None) -> str:
    return module.einsum_str if einsum_str is None else einsum_str


def _einsum_fault(module: nn.Einsum, x, einsum_str: str | None = None) -> str | None:
    equation = _equation(module, einsum_str) or ""
    if equation.count(",") != 1 or equation.count("->") != 1:
        return f"its equation {equation!r} is not of two operands"
    reason = contraction.equation_fault(equation, len(module.shape))
    return None if reason is None else f"its equation {equation!r} {reason}"


def _einsum_dims(module: nn.Einsum, shape: tuple[int, ...], x, einsum_str: str | None = None) -> Kernel:
    return contraction.einsum_kernel(_equation(module, einsum_str), shape)


def _einsum_run(module: nn.Einsum, kernel: QuantizedKernel, name: str, x, einsum_str: str | None = None) -> Array:
    equation = _equation(module, einsum_str)
    if (labels := contraction.einsum_labels(equation, jnp.ndim(x))) is None:
        raise ShapeError(f"x: shape {jnp.shape(x)} does not fit the kernel {kernel.dims.shape} of {name}, {equation!r}")
    bias = _bias(module)
    bias = None if bias is None else contraction.einsum_bias(bias, equation, kernel.dims)
    return _contract(kernel, x, labels, bias, name)


def _table_dims(module: nn.Embed, shape: tuple[int, ...], x) -> Kernel:
    return Kernel(tuple(shape), (), (1,), (0,))


def _embed_run(module: nn.Embed, kernel: QuantizedKernel, name: str, ids) -> Array:
    return look_up(kernel.weight, jnp.asarray(ids), kernel.recipe.out_dtype)


def _attend_run(module: nn.Embed, kernel: QuantizedKernel, name: str, query) -> Array:
    return ops.matmul(jnp.asarray(query), kernel.weight, out_dtype=kernel.recipe.out_dtype)


def _no_fault(module: nn.Module, *args) -> None:
    return None


# By the function that Flax runs: whoever overrides it in a subclass has another one.
_LAYERS: dict[Callable, _Layer] = {
    nn.Dense.__call__.__wrapped__: _Layer(nn.Dense, "kernel", _dense_dims, _no_fault, _dense_run),
    nn.DenseGeneral.__call__.__wrapped__: _Layer(nn.DenseGeneral, "kernel", _general_dims, _no_fault, _general_run),
    nn.Einsum.__call__.__wrapped__: _Layer(nn.Einsum, "kernel", _einsum_dims, _einsum_fault, _einsum_run),
    nn.Embed.__call__.__wrapped__: _Layer(nn.Embed, "embedding", _table_dims, _no_fault, _embed_run, on_request=True),
    nn.Embed.attend.__wrapped__: _Layer(nn.Embed, "embedding", _table_dims, _no_fault, _attend_run, on_request=True),
}
_REWRITERS = (nn.WeightNorm, nn.SpectralNorm)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm, nn.GroupNorm, nn.InstanceNorm)


def _leaves(params: PyTree) -> Iterator[tuple[Path, Any]]:
    """Every parameter with its path."""
    if not isinstance(params, Mapping):
        raise RecipeError(f"variables: 'params' is a {type(params).__name__}; use the dict that model.init returns")
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from (((name, *path), leaf) for path, leaf in _leaves(value))
        elif isinstance(value, list | tuple):  # one parameter of several arrays
            nested = _leaves({str(index): each for index, each in enumerate(value)})
            yield from (((".".join((name, *path)),), leaf) for path, leaf in nested)
        else:
            yield (name,), value


def _replaced(tree: dict, path: Path, value: Any) -> dict:
    """A dict of dicts with another value at a path; what is not on the path is shared."""
    first, *rest = path
    return {**tree, first: _replaced(tree[first], tuple(rest), value) if rest else value}


def _unboxed(leaf: Any) -> Any:
    return leaf.unbox(apply_constraint=False) if isinstance(leaf, nn.Partitioned) else nn.unbox(leaf)


def _shape(leaf: Any) -> tuple[int, ...]:
    """Of a parameter; of a quantized one, of its kernel."""
    if isinstance(leaf, QuantizedKernel):
        data = _unboxed(leaf.weight.data)
        return (*data.shape[: data.ndim - len(leaf.dims.matrix)], *leaf.dims.shape)
    return tuple(getattr(_unboxed(leaf), "shape", ()))


def _nbytes(*arrays: Array) -> int:
    return sum(array.size * np.dtype(array.dtype).itemsize for array in arrays)


def _type_name(kind: type[nn.Module]) -> str:
    """What a user calls a module's type."""
    return f"nn.{kind.__name__}" if kind.__module__.startswith("flax.linen") else kind.__name__
