"""Names that are imported when first used: the command line's help needs no JAX, and `fp8x.convert` no Flax."""

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any


class _LazyPackage(ModuleType):
    """A package that hides a module behind a public name that both have: `fp8x.recipe` is a function, of recipe.py."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets a module as its package's attribute whenever it is first imported, by whomever.
        if not (isinstance(value, ModuleType) and name in self.__dict__["_lazy_names"]):
            super().__setattr__(name, value)


def lazily(package: str, names: Mapping[str, str], submodules: Collection[str] = ()) -> Callable[[str], Any]:
    """The `__getattr__` (PEP 562) of a package.

    Arguments:
        package: its `__name__`.
        names: by public name, the module that has it.
        submodules: modules of the package that are public themselves.
    """
    this = sys.modules[package]
    this.__dict__["_lazy_names"] = frozenset(names)
    this.__class__ = _LazyPackage

    def find(name: str) -> Any:
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(names[name]), name)
        this.__dict__[name] = found
        return found

    return find
