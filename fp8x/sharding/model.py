"""`shard`: a whole model onto a mesh."""

from typing import TYPE_CHECKING

from flax import nnx
from jax.sharding import Mesh

from fp8x.errors import MeshError
from fp8x.nn.convert import get_module, named_modules
from fp8x.nn.moe import MoE
from fp8x.sharding.layers import mark_moe, place_layer
from fp8x.sharding.place import SPEC, place, put, values_of
from fp8x.sharding.plan import Plan, plan

if TYPE_CHECKING:
    from fp8x.models.decoder import Decoder


def shard(model: "Decoder", mesh: Mesh) -> "Decoder":
    """Lays a decoder out on a mesh, in place, layer by layer. It is called and generates as before, on every device.

    What is split how, and what moves between devices, is in docs/sharding.md. `fp8x.load(path, recipe, mesh)` does the
    same without the whole model in memory.

    Arguments:
        model: quantized, calibrated if its recipe has static activation scales; or in 16 or 32 bits. An abstract one
            (`nnx.eval_shape`) becomes the description of what lies on the mesh, for orbax to restore into.
        mesh: with axes among `data` (rows of a batch), `tensor` (heads and features) and `expert`.

    Raises:
        MeshError: the model is on a mesh already or in calibration; an unknown axis; or heads or experts that their
            axis does not divide. The model is as it was.
    """
    if getattr(model, "placement", None) is not None:
        raise MeshError("model: it is on a mesh already; load or quantize it anew for another")
    layers = plan_of(model, mesh)
    for path, split in layers.layers.items():
        place_layer(get_module(model, path), split, mesh)
    embedding = model.embed_tokens.embedding
    dims = (layers.embedding, None)
    put(embedding, place(values_of(embedding), embedding.shape, embedding.dtype, dims, mesh))
    finish(model, layers)
    return model


def plan_of(model: "Decoder", mesh: Mesh) -> Plan:
    """The plan for a decoder as it is quantized."""
    if not hasattr(model, "placement"):
        raise MeshError(f"model: a {type(model).__name__} is no decoder; see docs/sharding.md for models of your own")
    recipes = {path: getattr(module, "recipe", None) for path, module in named_modules(model)}
    return plan(model.config, mesh, recipes)


def finish(model: "Decoder", layers: Plan) -> None:
    """Copies what is not split to every device, and tells the modules what is."""
    mesh = layers.placement.mesh
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        if SPEC not in variable.get_metadata():
            dims = (None,) * variable.ndim
            put(variable, place(values_of(variable), variable.shape, variable.dtype, dims, mesh))
    for path, module in named_modules(model):
        if isinstance(module, MoE):
            mark_moe(module, layers.layers[f"{path}.w2"])
    model.vocab_axes = layers.placement.vocab
    model.placement = layers.placement
