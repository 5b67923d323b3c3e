"""What the modules of a model multiply by, and its tables: what `fp8x.roles` tells heads and routers from."""

from flax import nnx

from fp8x import roles
from fp8x.nn.contraction import Kernel, einsum_fault, einsum_kernel, general_kernel
from fp8x.nn.embed import Embed
from fp8x.nn.quantized import QuantizedLayer
from fp8x.nn.unquantized import UnquantizedGroupedLinear
from fp8x.nn.walk import named_modules
from fp8x.roles import Product, Roles


def roles_of(model: nnx.Module) -> Roles:
    """What the products of a model are; of layers in 8 bits, and of a user's own tables and experts, too."""
    products, tables = {}, {}
    for path, module in named_modules(model):
        if isinstance(module, nnx.Embed | Embed):
            tables[path] = (module.embedding if isinstance(module, nnx.Embed) else module.weight).shape[-2:]
        elif (product := product_of(module)) is not None:
            products[path] = product
        elif not type(module).__module__.startswith("flax."):
            _add_own(path, module, products, tables)
    return roles.find(products, tables)


def product_of(module: nnx.Module) -> Product | None:
    """What a layer multiplies by; None where that is no matrix."""
    match module:
        case nnx.Linear():  # LoRALinear, too
            k, n = module.kernel.shape[-2:]
            return Product(n, k, module.kernel.shape[:-2])
        case nnx.LinearGeneral():
            shape = (*module.batch_axis.values(), *module.in_features, *module.out_features)
            return of_kernel(
                general_kernel(shape, len(module.batch_axis), len(module.out_features)), module.kernel.shape
            )
        case nnx.Einsum() if module.einsum_str is not None and einsum_fault(module) is None:
            return of_kernel(einsum_kernel(module.einsum_str, module.kernel_shape), module.kernel.shape)
        case UnquantizedGroupedLinear():
            shape, rank = module.weight.shape, module.rank
            return Product(shape[-2], shape[-1], shape[: len(shape) - rank + 1])
        case QuantizedLayer():
            shape, rank = module.weight.shape, module.rank
            return Product(shape[-2], shape[-1], shape[: len(shape) - rank + (rank > 2)])
    return None


def of_kernel(kernel: Kernel, shape: tuple[int, ...]) -> Product:
    """The product by a kernel, or by a stack of such, of that shape."""
    *batch, n, k = kernel.matrix
    return Product(n, k, (*shape[: len(shape) - len(kernel.shape)], *batch))


def _add_own(path: str, module: nnx.Module, products: dict[str, Product], tables: dict[str, tuple[int, int]]) -> None:
    """What a user's module holds itself: a table by its name, experts `[E, K, N]`."""
    for name, value in vars(module).items():
        if not isinstance(value, nnx.Param):
            continue
        add_own(f"{path}.{name}" if path else name, value.shape, products, tables)


def add_own(
    path: str, shape: tuple[int, ...], products: dict[str, Product], tables: dict[str, tuple[int, int]]
) -> None:
    """The same, of one parameter."""
    if len(shape) == 2 and roles.by_name(path) == "an embedding":
        tables[path] = shape
    elif len(shape) > 2:
        products[path] = Product(shape[-1], shape[-2], shape[:-2])
