"""What is known of modules beside what they hold."""

import weakref

from flax import nnx


class Notes:
    """A text for each of some modules, as long as there is the module.

    Beside the model, not in it: an attribute or metadata of a layer would make layers that are alike different graphs,
    each of which `nnx.jit` compiles by itself. So a copy, and what `nnx.merge` makes inside of jit, have none.
    """

    def __init__(self):
        self._texts: dict[int, tuple[weakref.ref, str]] = {}

    def set(self, module: nnx.Module, text: str) -> None:
        key = id(module)
        self._texts[key] = (weakref.ref(module, lambda _: self._texts.pop(key, None)), text)

    def get(self, module: nnx.Module) -> str | None:
        reference, text = self._texts.get(id(module), (lambda: None, None))
        return text if reference() is module else None
