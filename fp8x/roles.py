"""Heads, routers and embeddings of a model, told by names and by shapes: what stays in 16 bits unless a rule names it.

An error in a head reaches every token, one in a router sends tokens to other experts, and both are small. Flax models
and checkpoints of any architecture are read by these rules alike. Names are read word by word, `switchRouter` as
`switch` and `router`; shapes tell what the names do not:

- A product that gives as many outputs as an embedding has rows, from as many inputs as its rows are long, is a head.
- A product that gives an output for each of the experts beside it is their router.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping

NARROW = 512  # outputs: more experts than that no router has chosen among yet
PADDING = 512  # a vocabulary is padded to a multiple of 8 to 512 on its way to a head

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

_EMBEDDINGS = {"embed", "embedding", "embeddings"}
_POSITIONS = {"pos", "position", "positions", "positional", "wpe", "segment", "type", "time"}
_ROUTERS = {"router", "routing", "gating"}
_GATES = {"gate", "gates", "wg"}
# A gate of one of these is no gate of experts.
_OTHER_GATES = {"proj", "projection", "up", "wi", "attention", "attn", "input", "output", "forget", "reset", "update"}
_HEADS = {"unembed", "unembedding", "lmhead", "logits", "vocab", "vocabulary", "classifier", "classification"}
_HEADS |= {"regressor", "scorer", "pooler"}
_HEAD_NAMES = re.compile(r"scores?|cls|qa_outputs")
_ENDS = re.compile(r"proj_out|output(_layer|_projection)?")  # of a whole model, and parts of many a layer
_ATTENTION = {"attention", "attn", "multi", "per", "query", "key", "kv"}
_OF_A_LAYER = _ATTENTION | {"mlp", "ffn", "feed", "block"}
_LAYERS = {"layer", "layers", "block", "blocks", "stages", "h"}


@dataclasses.dataclass(frozen=True)
class Product:
    """What one layer multiplies by: a matrix from `k` inputs to `n` outputs.

    Attributes:
        n, k: N and K.
        lead: the sizes of a stack of layers, and then how many matrices are side by side, as experts are.
    """

    n: int
    k: int
    lead: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Roles:
    """What is to be said of the products of a model, by path.

    Attributes:
        products: as `find` was given them.
        kept: those that stay unless a rule names them, with what they are.
        doubts: those that are quantized, and may be heads or routers by their shape.
        missed: those of `doubts` beside experts whose router is not among `kept`.
    """

    products: Mapping[str, Product]
    kept: Mapping[str, str]
    doubts: Mapping[str, str]
    missed: tuple[str, ...]


def by_name(path: str) -> str | None:
    """What the name of a module says that it is, where nothing is known of its shape; None for nothing."""
    return _by_name(path, None, None)


def find(products: Mapping[str, Product], tables: Mapping[str, tuple[int, int]]) -> Roles:
    """What the products of a model are.

    Arguments:
        products: by path. Also those that can't be quantized count: a router is known by its experts.
        tables: the shapes `[V, D]` of embeddings, by path.
    """
    beside = _Beside(products)
    kept: dict[str, str] = {}
    for path, product in products.items():
        if reason := _by_experts(path, product, beside) or _by_name(path, product, beside):
            kept[path] = reason
    doubts: dict[str, str] = {}
    for table, shape in tables.items():
        if _POSITIONS.isdisjoint(_in_order(table.rpartition(".")[2])):
            _by_vocabulary(products, beside, table, shape, kept, doubts)
    for path, product in products.items():
        if path not in kept and path not in doubts and _is_narrow(path, product, beside):
            doubts[path] = f"may be a router or a head: {product.n} outputs of {product.k} inputs"
    known = {_parent(path) for path, reason in kept.items() if reason.startswith("a router")}
    missed = (path for path in doubts if _parent(path) not in known and beside.is_before_experts(path))
    return Roles(products, kept, doubts, tuple(missed))


@functools.lru_cache(10_000)  # models have many layers and experts, and few words
def _in_order(component: str) -> tuple[str, ...]:
    """The words of a component of a path, without numbers."""
    return tuple(word.lower() for word in _WORD.findall(component) if not word.isdecimal())


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _by_name(path: str, product: Product | None, beside: "_Beside | None") -> str | None:
    parts = path.split(".")
    is_listed = parts[-1].isdecimal() and len(parts) > 1
    if is_listed:
        parts.pop()
    *above, last = parts
    words = _in_order(last)
    if _EMBEDDINGS.intersection(words[-1:]) or words == ("embed", "tokens"):
        return "an embedding"
    if _names_a_router(parts) or (_names_a_gate(parts) and (beside is None or beside.is_gate(path, last))):
        return "a router"
    if any(map(_names_a_head, parts)):
        return "a head"
    is_in_layer = bool(product and product.lead) or any(part.isdecimal() for part in above)
    # What makes the heads of attention is called `heads`, too, but is no list of them.
    if (_ENDS.fullmatch(last) or (words[-1:] == ("heads",) and (is_listed or len(words) > 1))) and not is_in_layer:
        return None if any(_OF_A_LAYER.intersection(_in_order(part)) for part in parts) else "a head"
    return None


@functools.lru_cache(10_000)
def _names_a_head(component: str) -> bool:
    words = _in_order(component)
    if not words or not _ATTENTION.isdisjoint(words):
        return False
    return words[-1] == "head" or not _HEADS.isdisjoint(words) or bool(_HEAD_NAMES.fullmatch(component.lower()))


def _names_a_router(parts: list[str]) -> bool:
    """Whether a component says so; the experts themselves may lie below it."""
    named = [index for index, part in enumerate(parts) if not _ROUTERS.isdisjoint(_in_order(part))]
    return bool(named) and not any("expert" in part or "mlp" in part for part in parts[named[-1] + 1 :])


def _names_a_gate(parts: list[str]) -> bool:
    """Whether it is a gate, or what a module of that name holds; of experts or of an MLP."""
    words = (_in_order(part) for part in parts[-2:])
    return any(not _GATES.isdisjoint(each) and _OTHER_GATES.isdisjoint(each) for each in words)


def _by_experts(path: str, product: Product, beside: "_Beside") -> str | None:
    """A router has an output for each of the experts beside it, and reads what they read."""
    for experts in beside.experts(path) if product.n < product.k else ():
        if experts.lead == (*product.lead, product.n) and product.k in experts.ks:
            return f"a router: a row for each of {product.n} experts"
    return None


def _by_vocabulary(
    products: Mapping[str, Product],
    beside: "_Beside",
    table: str,
    shape: tuple[int, int],
    kept: dict[str, str],
    doubts: dict[str, str],
) -> None:
    """Takes products for heads by the shape of a table, but for what is in one of several layers, or in an MLP of that
    width. Where a name has told the head, the shape tells no other."""
    vocabulary, features = shape
    wide = {path: each for path, each in products.items() if _is_vocabulary(each, vocabulary)}
    if any(kept.get(path) == "a head" for path in wide):
        return
    readers = any(each.k == vocabulary for each in products.values())
    for path, product in wide.items():
        if path in kept or product.lead or beside.is_repeated(path):
            continue
        # Nothing else in the model is of this width, so it does not matter what it reads (factorized embeddings).
        is_alone = product.n == vocabulary and len(wide) == 1 and not readers
        if not is_alone and product.k != features:
            continue
        has_partner, outputs = beside.has_partner(path), f"its {product.n} outputs are the vocabulary of {table}"
        if is_alone or (vocabulary != features and not has_partner):
            kept[path] = f"taken for a head: {outputs}"
        elif vocabulary != features or not has_partner:
            doubts[path] = f"may be a head: {outputs} in number"


def _is_vocabulary(product: Product, vocabulary: int) -> bool:
    """Whether the outputs are the vocabulary, or one of both is the other padded."""
    small, large = sorted((product.n, vocabulary))
    if small == large:
        return True
    added = large - small
    is_padded = (large % 8 == 0 and added < min(PADDING, small / 16)) or (large % 64 == 0 and added < 64)
    return is_padded and product.n != product.k


def _is_narrow(path: str, product: Product, beside: "_Beside") -> bool:
    """Whether it may choose among something: no other is like it, and none reads what it gives."""
    return product.n <= NARROW and 4 * product.n <= product.k and not beside.has_partner(path)


@dataclasses.dataclass(frozen=True)
class _Experts:
    """Matrices side by side. `lead`: as a `Product` has it, with their number; `ks`: what they read."""

    lead: tuple[int, ...]
    ks: frozenset[int]


class _Beside:
    """Where the products of a model lie to each other."""

    def __init__(self, products: Mapping[str, Product]):
        self._products = products
        self._children: dict[str, list[str]] = collections.defaultdict(list)
        for path in products:
            self._children[_parent(path)].append(path)
        self._alike = collections.Counter(_without_numbers(parent) for parent in self._children)

    def siblings(self, path: str) -> list[Product]:
        """What the same module holds."""
        return [self._products[each] for each in self._children[_parent(path)] if each != path]

    def has_partner(self, path: str) -> bool:
        """Whether the same module holds a product of the same shape, or one that reads what this gives: as those of a
        gated MLP, of keys and values, and of an MLP do."""
        return _has_partner(self._products[path], self.siblings(path))

    def is_gate(self, path: str, last: str) -> bool:
        """Whether what is called a gate is of experts: it is narrow, and none of a gated MLP's."""
        product, above = self._products[path], _parent(path)
        if product.n > NARROW or self.has_partner(path):
            return False
        held_alike = [
            each for child in self._held_by[_parent(above)] if child != above for each in self._children[child]
        ]
        names_itself = not _GATES.isdisjoint(_in_order(last))
        return names_itself or not _has_partner(product, [self._products[each] for each in held_alike])

    @functools.cached_property
    def _held_by(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = collections.defaultdict(list)
        for module in self._children:
            found[_parent(module)].append(module)
        return found

    def experts(self, path: str) -> list[_Experts]:
        """Matrices side by side, and lists of modules, that the same module holds, or a module in it."""
        return self._experts[_parent(path)]

    @functools.cached_property
    def _experts(self) -> dict[str, list[_Experts]]:
        found: dict[str, list[_Experts]] = collections.defaultdict(list)
        lists: dict[tuple[str, str], tuple[set[int], set[int], tuple[int, ...]]] = {}
        for path, product in self._products.items():
            parent = _parent(path)
            names_layers = not _LAYERS.isdisjoint(_in_order(parent.rpartition(".")[2]))
            is_several = bool(product.lead) and product.lead[-1] > 1
            for holder in {parent, _parent(parent)} if is_several and not names_layers else ():
                found[holder].append(_Experts(product.lead, frozenset({product.k})))
            parts = path.split(".")
            for index, part in enumerate(parts):
                if index and part.isdecimal() and _LAYERS.isdisjoint(_in_order(parts[index - 1])):
                    place = ".".join(parts[: index - 1]), parts[index - 1]
                    numbers, ks, _ = lists.setdefault(place, (set(), set(), product.lead))
                    numbers.add(int(part))
                    ks.add(product.k)
        for (holder, _), (numbers, ks, lead) in lists.items():
            if len(numbers) > 1:
                found[holder].append(_Experts((*lead, max(numbers) + 1), frozenset(ks)))
        return found

    def is_before_experts(self, path: str) -> bool:
        """Whether there are experts beside it, and it is none of them."""
        return any(len(experts.lead) > len(self._products[path].lead) for experts in self.experts(path))

    def is_repeated(self, path: str) -> bool:
        """Whether it is in one of several layers that are alike."""
        parent = _parent(path)
        return any(part.isdecimal() for part in parent.split(".")) or self._alike[_without_numbers(parent)] > 1


def _has_partner(product: Product, others: Iterable[Product]) -> bool:
    return any(other.k == product.n or (other.n, other.k) == (product.n, product.k) for other in others)


@functools.lru_cache(10_000)
def _without_numbers(path: str) -> str:
    return re.sub(r"\d+", "*", path)
