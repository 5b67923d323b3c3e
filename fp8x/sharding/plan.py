"""`Plan`: which dims of which parameters of a decoder are split, over which mesh axes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from fp8x.errors import MeshError
from fp8x.recipe import Recipe
from fp8x.scheme import Scheme
from fp8x.sharding.split import Split, even, key_value_heads

if TYPE_CHECKING:
    from fp8x.models.config import DecoderConfig

DATA, TENSOR, EXPERT = AXES = ("data", "tensor", "expert")


@dataclasses.dataclass(frozen=True)
class LayerSplit:
    """The dims of a weight `[E, P, N, K]`, `[E, N, K]` or `[N, K]` that are split; None: every device has all of it.

    Where K is split, devices hold partial sums of each other's outputs.
    """

    experts: Split | None = None
    n: Split | None = None
    k: Split | None = None

    def dims(self, ndim: int) -> tuple[Split | None, ...]:
        """Of a weight of so many dims."""
        experts = (self.experts,) if ndim > 2 else ()
        return (*experts, *(None,) * (ndim - 2 - len(experts)), self.n, self.k)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a decoder lies, for those who run it. A part of the model that jit compiles for.

    Attributes:
        mesh: the devices.
        batch: mesh axes over which rows of a batch are split.
        heads: those over which attention heads are.
        vocab: those over which the rows of the embedding and of `lm_head` are: the devices that hold one model.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    vocab: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a decoder lies on a mesh.

    Attributes:
        placement: the mesh and what its axes are for.
        layers: the splits of every linear layer, by path; `lm_head` too.
        embedding: the split of the embedding's rows.
        head_dim: dims of a head of queries.
    """

    placement: Placement
    layers: dict[str, LayerSplit]
    embedding: Split | None
    head_dim: int

    def param(self, path: str, ndim: int) -> tuple[Split | None, ...]:
        """The dims of a parameter that is no linear layer's matrix: the embedding, a norm, attention sinks, or a linear
        layer's bias."""
        if path.endswith("embedding"):
            return (self.embedding, None)
        if path.endswith(".bias"):
            return self.layers[path.removesuffix(".bias")].dims(ndim + 1)[:-1]
        if path.endswith(".sinks"):
            queries = self.layers[f"{path.removesuffix('.sinks')}.q_proj"].n
            # One a head, as there is a scale a block.
            return (None if queries is None else queries.of_scales(self.head_dim),)
        return (None,) * ndim


def check_mesh(mesh: Mesh) -> None:
    """Raises MeshError for an axis that has no meaning here."""
    if not isinstance(mesh, Mesh):
        raise MeshError(f"mesh: {mesh!r:.40} is no Mesh; make one with jax.make_mesh((2,), ('tensor',))")
    if unknown := [axis for axis in mesh.axis_names if axis not in AXES]:
        raise MeshError(f"mesh: axis {unknown[0]!r} is unknown; use {', '.join(AXES)}")


def plan(config: "DecoderConfig", mesh: Mesh, recipes: Mapping[str, Recipe | None]) -> Plan:
    """How a decoder with these recipes, by path of every linear layer, lies on a mesh.

    Raises:
        MeshError: an unknown axis, or attention heads or experts that their axis does not divide.
    """
    check_mesh(mesh)
    model = tuple(axis for axis in mesh.axis_names if axis != DATA and mesh.shape[axis] > 1)
    tensor, parts = _axis(mesh, TENSOR), math.prod(mesh.shape[axis] for axis in model)
    _check_divides(mesh, TENSOR, config.num_attention_heads, "attention heads")
    # The devices that share the experts share all else too, where the number of heads admits it.
    heads = model if config.num_attention_heads % parts == 0 else tensor
    layers: dict[str, LayerSplit] = {}
    for index in range(config.num_hidden_layers):
        layer = f"layers.{index}"
        attention = _attention if config.latent is None else _latent_attention
        layers |= attention(config, f"{layer}.self_attn", recipes, heads, math.prod(mesh.shape[axis] for axis in heads))
        if index in config.dense_layers:
            layers |= _mlp(f"{layer}.mlp", config.intermediate_size, model, parts, recipes)
        else:
            w13, w2 = f"{layer}.mlp.w13", f"{layer}.mlp.w2"
            sizes = (config.num_experts, config.mixture.intermediate)
            layers[w13], layers[w2] = mixture(*sizes, mesh, [recipes[w13], recipes[w2]])
            layers[f"{layer}.mlp.router"] = LayerSplit()
            if config.mixture.shared_intermediate is not None:
                layers |= _mlp(f"{layer}.mlp.shared", config.mixture.shared_intermediate, model, parts, recipes)
            if config.mixture.shared_gate:
                layers[f"{layer}.mlp.shared_expert_gate"] = LayerSplit()
    vocab = _features(config.vocab_size, model, parts, [recipes.get("lm_head")])
    if not config.tie_word_embeddings:
        layers["lm_head"] = LayerSplit(n=vocab)
    return Plan(Placement(mesh, _axis(mesh, DATA), heads, model), layers, vocab, config.head_dim)


def mixture(
    num_experts: int, intermediate: int, mesh: Mesh, recipes: list[Recipe | None]
) -> tuple[LayerSplit, LayerSplit]:
    """The splits of w13 and w2: experts over `expert`, what lies between them over `tensor`.

    Raises:
        MeshError: experts that their axis does not divide.
    """
    _check_divides(mesh, EXPERT, num_experts, "experts")
    tensor, expert = _axis(mesh, TENSOR), _axis(mesh, EXPERT)
    experts = even(num_experts, expert, mesh.shape[EXPERT]) if expert else None
    inner = _features(intermediate, tensor, mesh.shape.get(TENSOR, 1), recipes)
    return LayerSplit(experts, n=inner), LayerSplit(experts, k=inner)


def _axis(mesh: Mesh, axis: str) -> tuple[str, ...]:
    """An axis of one device splits nothing."""
    return (axis,) if mesh.shape.get(axis, 1) > 1 else ()


def _check_divides(mesh: Mesh, axis: str, count: int, what: str) -> None:
    size = mesh.shape.get(axis, 1)
    if count % size:
        fits = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise MeshError(
            f"mesh: axis {axis!r} has {size} devices, which do not divide the model's {count} {what}; use {fits}"
        )


def _attention(
    config: "DecoderConfig", path: str, recipes: Mapping[str, Recipe | None], axes: tuple[str, ...], parts: int
) -> dict[str, LayerSplit]:
    paths = {name: f"{path}.{name}_proj" for name in "qkvo"}
    if not axes:
        return dict.fromkeys(paths.values(), LayerSplit())
    granule = math.lcm(config.head_dim, _granule([recipes[paths["q"]], recipes[paths["o"]]]))
    queries = even(config.num_attention_heads * config.head_dim, axes, parts, granule)
    keys = key_value_heads(queries, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    splits = {"q": LayerSplit(n=queries), "k": LayerSplit(n=keys), "v": LayerSplit(n=keys), "o": LayerSplit(k=queries)}
    return {paths[name]: split for name, split in splits.items()}


def _latent_attention(
    config: "DecoderConfig", path: str, recipes: Mapping[str, Recipe | None], axes: tuple[str, ...], parts: int
) -> dict[str, LayerSplit]:
    """Heads over the axes; what makes the latents is every device's."""
    latent, count = config.latent, config.num_attention_heads
    queries = "q_proj" if latent.q_rank is None else "q_b_proj"
    low = ["kv_a_proj_with_mqa", *([] if latent.q_rank is None else ["q_a_proj"])]
    dims = {queries: config.head_dim, "kv_b_proj": latent.nope_dim + latent.v_dim, "o_proj": latent.v_dim}
    if not axes:
        return {f"{path}.{name}": LayerSplit() for name in (*dims, *low)}
    # Heads of which a device holds a multiple, so that it holds whole blocks of each matrix.
    granule = math.lcm(*(math.lcm(dim, _granule([recipes[f"{path}.{name}"]])) // dim for name, dim in dims.items()))
    splits = {name: even(count * dim, axes, parts, granule * dim) for name, dim in dims.items()}
    over = {name: LayerSplit(k=split) if name == "o_proj" else LayerSplit(n=split) for name, split in splits.items()}
    return {f"{path}.{name}": split for name, split in (over | dict.fromkeys(low, LayerSplit())).items()}


def _mlp(
    path: str, intermediate: int, axes: tuple[str, ...], parts: int, recipes: Mapping[str, Recipe | None]
) -> dict[str, LayerSplit]:
    paths = [f"{path}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    inner = _features(intermediate, axes, parts, [recipes[path] for path in paths])
    return dict.fromkeys(paths[:2], LayerSplit(n=inner)) | {paths[2]: LayerSplit(k=inner)}


def _features(size: int, axes: tuple[str, ...], parts: int, recipes: list[Recipe | None]) -> Split | None:
    return even(size, axes, parts, _granule(recipes)) if axes else None


def _granule(recipes: list[Recipe | None]) -> int:
    """Features of which a device holds a multiple, so that it holds whole blocks of weights and activations."""
    schemes: list[Scheme] = [s for r in recipes if r is not None for s in (r.weight, r.activation) if s is not None]
    return math.lcm(*(block for scheme in schemes for block in scheme.block[-2:] if block is not None))
