"""`shard`: a whole model onto a mesh."""

import math
from typing import TYPE_CHECKING

from flax import nnx
from jax.sharding import Mesh

from fp8x.errors import MeshError
from fp8x.nn.calibrated import Calibrated
from fp8x.nn.moe import MoE
from fp8x.nn.quantized import QuantizedLayer
from fp8x.nn.training import check_finished
from fp8x.nn.walk import get_module, named_modules, named_static
from fp8x.sharding.layers import input_scale_dims, mark_moe, place_layer
from fp8x.sharding.place import SPEC, Dims, place, put, values_of
from fp8x.sharding.plan import Plan, check_mesh, mixture, plan

if TYPE_CHECKING:
    from fp8x.models.decoder import Decoder


def shard(model: "Decoder | MoE", mesh: Mesh) -> "Decoder | MoE":
    """Lays a model out on a mesh, in place, layer by layer.

    What is split how, and what moves between devices, is in docs/sharding.md. A decoder is called and generates as
    before, on every device; `fp8x.load(path, recipe, mesh)` makes the same without the whole model in memory. A mixture
    of experts becomes what a `jax.shard_map` of yours calls, with `fp8x.sharding.specs(moe)` for its state: tokens come
    in whole, and so does the output go out, on every device along `tensor` and `expert`.

    Arguments:
        model: quantized, calibrated if its recipe has static activation scales; or in 16 or 32 bits. An abstract one
            (`nnx.eval_shape`) becomes the description of what lies on the mesh, for orbax to restore into.
        mesh: with axes among `data` (rows of a batch), `tensor` (heads and features) and `expert`.

    Raises:
        MeshError: the model is on a mesh already or in calibration; an unknown axis; or heads or experts that their
            axis does not divide. The model is as it was.
        RecipeError: the model is in training.
    """
    check_finished(model)
    if any(SPEC in variable.get_metadata() for _, variable in nnx.to_flat_state(nnx.state(model))):
        raise MeshError("model: it is on a mesh already; load or quantize it anew for another")
    if isinstance(model, MoE):
        check_mesh(mesh)
        experts, _, intermediate = model.w2.weight.shape
        recipes = [getattr(layer, "recipe", None) for layer in (model.w13, model.w2)]
        w13, w2 = mixture(experts, intermediate, mesh, recipes)
        place_layer(model.w13, w13, mesh)
        place_layer(model.w2, w2, mesh)
        mark_moe(model, w2)
        _copy_rest(model, mesh)
        return model
    layers = plan_of(model, mesh)
    for path, split in layers.layers.items():
        place_layer(get_module(model, path), split, mesh)
    for at, variable in nnx.to_flat_state(nnx.state(model)):
        if at[-1] in ("embedding", "sinks"):
            dims = layers.param(".".join(map(str, at)), variable.ndim)
            put(variable, place(values_of(variable), variable.shape, variable.dtype, dims, mesh))
    finish(model, layers)
    return model


def plan_of(model: "Decoder", mesh: Mesh) -> Plan:
    """The plan for a decoder as it is quantized."""
    if not hasattr(model, "placement"):
        raise MeshError(
            f"model: a {type(model).__name__} is neither a Decoder nor an fp8x.nn.MoE; see docs/sharding.md"
        )
    recipes = {path: getattr(module, "recipe", None) for path, module in named_modules(model)}
    return plan(model.config, mesh, recipes)


def place_static(model: "Decoder", layers: Plan) -> None:
    """Places the scales of keys and values that hold for all tokens: those of a head where the head is."""
    for path, module in named_static(model).items():
        if not isinstance(module, QuantizedLayer):
            scale, dims = module.input_scale, static_dims(path, module, layers)
            put(scale, place(values_of(scale), scale.shape, scale.dtype, dims, layers.placement.mesh, fill=1))


def static_dims(path: str, module: Calibrated, layers: Plan) -> Dims:
    """How a static scale lies, of a layer in 8 bits or of the keys and values of an attention."""
    if isinstance(module, QuantizedLayer):
        return input_scale_dims(module.static_scheme, module.weight.shape[-1], layers.layers[path].k)
    k_proj = layers.layers.get(f"{path.rpartition('.')[0]}.k_proj")  # through latents there is none
    return input_scale_dims(module.static_scheme, math.prod(module.shape), None if k_proj is None else k_proj.n)


def finish(model: "Decoder", layers: Plan) -> None:
    """Copies what is not split to every device, and tells the modules what is."""
    place_static(model, layers)
    _copy_rest(model, layers.placement.mesh)
    for path, module in named_modules(model):
        if isinstance(module, MoE):
            mark_moe(module, layers.layers[f"{path}.w2"])
    model.vocab_axes = layers.placement.vocab
    model.placement = layers.placement


def _copy_rest(model: nnx.Module, mesh: Mesh) -> None:
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        if SPEC not in variable.get_metadata():
            dims = (None,) * variable.ndim
            put(variable, place(values_of(variable), variable.shape, variable.dtype, dims, mesh))
