"""`load` and `save`: Hugging Face directories in and out of a `Decoder`, one layer at a time.

`save` hands every other module to `modules.py`.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from fp8x.calibrate import sidecar
from fp8x.checkpoint import CONFIG, Format, Reader, Writer, choose_format, format_of
from fp8x.checkpoint.destination import DEFAULT_SHARD_BYTES, check_source
from fp8x.checkpoint.kv_cache import KVScales, kv_tensors
from fp8x.checkpoint.requantize import Requantize, check_alone
from fp8x.errors import CheckpointError
from fp8x.models.config import DecoderConfig
from fp8x.models.decoder import Decoder
from fp8x.models.hf_names import flat, linear_names, param_names, rule_names, unquantized_names
from fp8x.models.loading import Loader, get
from fp8x.models.matrices import check_counts, wide_enough, with_dtype
from fp8x.models.mesh_loading import MeshLoader
from fp8x.models.modules import save_module
from fp8x.models.saving import fused_names, parts_of, stored_bytes, tensors_of
from fp8x.nn.training import check_finished
from fp8x.nn.walk import check_calibrated, remember_paths
from fp8x.recipe import OUT_DTYPES, Recipe, Rules, as_recipe, check_stored
from fp8x.scheme import Scheme, is_kv_static, per_row
from fp8x.sharding.layers import gathered
from fp8x.sharding.model import plan_of
from fp8x.sharding.place import whole, whole_shape
from fp8x.sharding.plan import Plan, check_mesh


def load(
    path: str | Path,
    recipe: Recipe | str | None = None,
    mesh: Mesh | None = None,
    *,
    rules: Mapping[str, Recipe | str | None] | None = None,
    requantize: Requantize | None = None,
    calibration: str | Path | None = None,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Loads a checkpoint of any family in docs/models.md, quantized or not.

    A checkpoint whose config declares a KV cache in FP8, or that has scales for one, stores keys and values so
    (`Decoder.kv_cache`); `model.set_kv_cache(None)` leaves them in 16 bits.

    Each matrix goes from its file into its place; with a recipe it is quantized on the way, so a bf16 model is never
    whole in memory: the peak is the model as it will be, and one matrix. What is in 8 bits on disk stays so, byte by
    byte; its layers return the checkpoint's type.

    Arguments:
        path: a directory with config.json and safetensors files.
        recipe: quantizes while loading, as `fp8x.quantize_model` does: a `Recipe` or its code. Or "bf16", "f16", "f32":
            the whole model in that type, and what is in 8 bits on disk dequantized, as `fp8x.convert` has it.
        mesh: lays the model out on it as `fp8x.sharding.shard` does; each process reads only what its devices hold.
        rules: exceptions to `recipe`, as `fp8x.quantize_model` takes them; modules go by their path or by the names of
            their matrices in the checkpoint.
        requantize: for a checkpoint in 8 bits: every module gets the one of these recipes that adds the least error, as
            `fp8x.convert` has it; "hopper" for the two that Hopper's tensor cores multiply, into which MXFP8 goes
            nearly unchanged. To choose, all matrices in 8 bits are read beforehand, on a mesh by every process.
            `fp8x.choose_recipes(path)` shows the choice and the errors; given here, it is taken as it is.
        calibration: a file of static activation scales, as `fp8x calibrate` writes it; where it holds scales of a KV
            cache too, keys and values are stored by these.
        allow_nonfinite: load weights that hold NaN or Inf instead of raising.
        progress: called with the bytes read and the bytes in all, after every tensor; before that, where `requantize`
            measures, through all that it reads, from several threads but one at a time.

    Raises:
        CalibrationError: a calibration file that can't be read, or that does not fit the model or recipe; a recipe to
            requantize to whose static activation scales the checkpoint lacks.
        CheckpointError: the checkpoint is missing, damaged, quantized in a way that is not supported, or quantized
            already where a recipe or rules without one are given, or not where `requantize` is.
        ConfigError: config.json describes no model that fp8x can build.
        MeshError: a mesh with an unknown axis, or one that does not divide the model's heads or experts.
        RecipeError: an unknown recipe, or `requantize` beside another.
        RuleError: a rule that matches no module, or stands beside `requantize`.
        ShapeError: a weight that its recipe does not fit.
    """
    if requantize is not None:
        check_alone(recipe, rules)
    if mesh is not None:
        check_mesh(mesh)
    reader = Reader(path)
    # As transformers does, in memory only: `save` finds the tokenizer there.
    dtype = OUT_DTYPES.get(recipe) if isinstance(recipe, str) else None
    hf = reader.config if dtype is None else with_dtype(reader.config, dtype)
    config = DecoderConfig.from_hf(hf | {"_name_or_path": str(reader.path)})
    format = format_of(reader.config)
    if format is not None and dtype is None and (recipe is not None or rules):
        raise CheckpointError(
            f"recipe: {reader.path} is quantized already ({format.name}); load it without a recipe, with 'bf16' to "
            "dequantize it, give the unquantized checkpoint, or requantize in the place of recipe"
        )
    check_counts(reader, config)
    config = wide_enough(reader, config)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    options = (reader, model, format, allow_nonfinite, progress)
    loader = Loader(*options) if mesh is None else MeshLoader(*options, mesh)
    loader.check()
    recipes = loader.stored
    if requantize is not None:
        recipes = loader.choose(requantize)
    elif format is None or dtype is not None:
        recipes = _chosen(loader, None if dtype is not None else recipe, rules or {})
        check_stored(recipes.values())
    scales = None if calibration is None else sidecar.read(calibration)
    if scales is None or scales.kv_cache is None:
        # Where all else leaves 8 bits, keys and values do too.
        loader.set_kv_cache() if dtype is None or any(recipes.values()) else loader.warn_of_kv_cache(recipe)
    if scales is not None:
        static = {path: each.activation for path, each in recipes.items() if each is not None and each.is_static}
        scales.check({path: (scheme, loader.shapes[path][-1]) for path, scheme in static.items()})
        scales.set_kv_cache(model)
    if mesh is not None:
        loader.load(recipes, {} if scales is None else scales.scales)
        remember_paths(model)
        return model
    loader.load(recipes)
    remember_paths(model)
    if scales is not None:
        scales.apply(model)
    return model


def _chosen(
    loader: Loader | MeshLoader, recipe: Recipe | str | None, rules: Mapping[str, Recipe | str | None]
) -> dict[str, Recipe | None]:
    """What recipe and rules say of every layer, by path; rules may go by the names of the checkpoint's matrices."""
    modules = {path: [prefix for _, prefix in flat(names)] for path, names in loader.names.items()}
    decisions = Rules(None if recipe is None else as_recipe(recipe), rules).decide(
        modules, names=rule_names(modules, loader.reader.fused), others=unquantized_names(loader.model.config)
    )
    return {path: decision.recipe for path, decision in decisions.items()}


def save(
    model: nnx.Module,
    path: str | Path,
    format: str | None = None,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    beside: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a model into a directory, completely or not at all; weights and scales byte by byte.

    A `Decoder` becomes a Hugging Face directory, which `fp8x.load` reads; the tokenizer and generation settings are
    copied from where the model was loaded from, if that is still there. Any other module becomes safetensors with its
    variables by path, and a `fp8x.json` that says how each layer is quantized; `fp8x.load_into` reads that.

    Arguments:
        model: a `Decoder`, or any NNX module, quantized or not.
        path: the directory to make; it must not exist, or be empty.
        format: of a `Decoder`: "compressed-tensors", "fp8" or "modelopt"; by default the first that can hold the model.
            "mxfp4" (the experts of gpt-oss) and "mxfp4-pack-quantized" where all codes of MX blocks are e2m1's. None
            for a model that is not quantized.
        max_shard_bytes: several files with an index, where one would be larger. What is packed or transposed for a
            file (gpt-oss's experts in 4 or 16 bits) is in memory until that is written.
        beside: further JSON files, by name: they come with the weights or not at all.
        progress: called after every tensor with the bytes written and the bytes in all.

    Raises:
        CalibrationError: layers that are in calibration, or whose static activation scale is missing.
        RecipeError: layers that are in training.
        CheckpointError: the format can't hold the model, or `path` can't be written, or is where the model was loaded
            from, in it or around it; nothing is left there.
    """
    if not isinstance(model, Decoder):
        if format is not None:
            raise CheckpointError(
                f"format: {format!r} does not fit: the model is a {type(model).__name__}, and Hugging Face's formats "
                "hold Decoders alone; leave the format out"
            )
        save_module(model, path, max_shard_bytes=max_shard_bytes, beside=beside, progress=progress)
        return
    config, names = model.config, linear_names(model.config)
    if not config.hf:
        raise CheckpointError("model.config.hf: is empty; build the model's config with DecoderConfig.from_hf")
    source = Path(named) if (named := config.hf.get("_name_or_path")) else None
    if source is not None:
        check_source(source, Path(path))
    layers = {path: get(model, path) for path in names}
    check_finished(model)
    check_calibrated(model)
    # An `lm_head` that is tied is still a matrix to others, which must not look for its scales.
    recipes = {"lm_head": None} | {
        prefix: getattr(layer, "recipe", None) for path, layer in layers.items() for _, prefix in flat(names[path])
    }
    used = [recipe for recipe in recipes.values() if recipe is not None]
    if not model.norm.scale[...].is_fully_addressable:
        raise CheckpointError(
            f"model: it lies on devices of {jax.process_count()} processes; load it in one process and save it there "
            "(a calibration over several leaves a sidecar, which fp8x.load takes)"
        )
    kv_scales = _kv_scales(model, is_quantized=bool(used))
    if format is not None and not used and kv_scales is None:
        raise CheckpointError(f"format: {format!r} does not fit: the model is not quantized; leave the format out")
    declared = None if kv_scales is None else kv_scales.scheme
    writer_format = choose_format(used, format, declared) if used or kv_scales else None
    kv = {} if kv_scales is None else kv_tensors(kv_scales, writer_format)
    fused = fused_names(config, layers, writer_format)
    params, placed = param_names(config), None if model.placement is None else plan_of(model, model.placement.mesh)
    total = sum(get(model, path).dtype.itemsize * math.prod(_shape(model, path, placed)) for path in params)
    total += sum(
        stored_bytes(layer, names[path], writer_format, placed and placed.layers[path])
        for path, layer in layers.items()
    )
    total += sum(array.nbytes for array in kv.values())
    report = None if progress is None else lambda done: progress(done, total)
    with Writer(path, max_shard_bytes=max_shard_bytes, progress=report) as writer:
        hf = _hf_config(model, writer_format, recipes, declared)
        further = {} if writer_format is None else writer_format.beside(hf["quantization_config"])
        for name, value in ({CONFIG: hf} | further | dict(beside or {})).items():
            writer.add_json(name, value)
        if source is not None:
            writer.copy_companions(source)
        for variable_path, of_params in params.items():
            array = get(model, variable_path)[...]
            array = array if placed is None else whole(array, placed.param(variable_path, array.ndim))
            fused_name = fused.get(variable_path.removesuffix(".bias"))
            for name, part in parts_of(array, of_params, fused_name and f"{fused_name}_bias"):
                writer.add(name, part)
        for module_path, layer in layers.items():
            layer = layer if placed is None else gathered(layer, placed.layers[module_path])
            for name, array in tensors_of(layer, names[module_path], fused.get(module_path), writer_format):
                writer.add(name, array)
        for name, array in kv.items():
            writer.add(name, array)


def _kv_scales(model: Decoder, is_quantized: bool) -> KVScales | None:
    """What is to be stored of how a model keeps keys and values."""
    scheme = model.kv_cache
    if scheme is None:
        return None
    if is_quantized and scheme == per_row():
        return KVScales(scheme, {})  # declared, without scales
    if not is_kv_static(scheme) or scheme.scale_rule == "unit":
        warnings.warn(
            f"model: keys and values in {scheme} need nothing that is stored; say model.set_kv_cache(...) again after "
            "fp8x.load, or fp8x.calibrate(model, batches, kv_cache=True) for scales that a checkpoint holds",
            stacklevel=3,
        )
        return None
    return KVScales(scheme, {f"model.layers.{index}.self_attn": pair for index, pair in enumerate(model.kv_scales())})


def _hf_config(
    model: Decoder, format: Format | None, recipes: Mapping[str, Recipe | None], kv_cache: Scheme | None
) -> dict:
    hf = {key: value for key, value in model.config.hf.items() if key not in ("quantization_config", "_name_or_path")}
    dtype = model.embed_tokens.embedding.dtype
    if str(dtype) != model.config.dtype:
        hf["torch_dtype" if "torch_dtype" in hf and "dtype" not in hf else "dtype"] = str(dtype)
    if format is not None:
        kv_fields = {} if kv_cache is None else format.kv_fields(kv_cache)
        hf["quantization_config"] = format.to_config(recipes, dtype) | kv_fields
    return hf


def _shape(model: Decoder, path: str, placed: Plan | None) -> tuple[int, ...]:
    """Of a parameter that is no linear layer's matrix, on disk."""
    shape = get(model, path).shape
    return shape if placed is None else whole_shape(shape, placed.param(path, len(shape)))
