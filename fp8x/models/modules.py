"""Any Flax module on disk, bit for bit: `save_module`, which `fp8x.save` calls, and `load_into`.

    DIRECTORY/model.safetensors   every array of `nnx.state(model)`, by dotted path: `encoder.0.up.weight_scale`
    DIRECTORY/fp8x.json           the recipe of every layer in 8 bits, and what safetensors has no type for

Nothing of the model's code is stored. The user's own code builds the model, and `load_into` puts the layers in 8 bits
and all arrays into it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding

from fp8x.checkpoint import DESCRIPTION, Reader, Writer, recipes
from fp8x.checkpoint.destination import DEFAULT_SHARD_BYTES
from fp8x.checkpoint.header import DTYPES
from fp8x.errors import CheckpointError, Fp8xError, some
from fp8x.models.module_shardings import Leaf, abstract, shardings_of
from fp8x.nn.convert import quantize_model
from fp8x.nn.walk import check_calibrated, get_module, named_layers, named_modules, remember_paths, set_module
from fp8x.recipe import Recipe

VERSION = 1


def save_module(
    model: nnx.Module,
    path: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    beside: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the arrays of any module; `fp8x.save` has the arguments.

    Variables that are tied are written once. An array that lies on several devices is gathered when its turn comes.

    Raises:
        CalibrationError: layers that are in calibration, or whose static activation scale is missing.
        CheckpointError: a variable that safetensors can't hold, by name, or `path` can't be written; nothing is left.
    """
    leaves = _named_leaves(nnx.state(model))
    if empty := [name for name, leaf in leaves.items() if isinstance(leaf, jax.ShapeDtypeStruct)]:
        raise CheckpointError(f"model: {some(empty)} without values; load or initialize the model first")
    if apart := [name for name, leaf in leaves.items() if not getattr(leaf, "is_fully_addressable", True)]:
        raise CheckpointError(
            f"model: {some(apart)} on devices of {jax.process_count()} processes; save with orbax, or in one process"
        )
    check_calibrated(model)
    if DESCRIPTION in (beside or {}):
        raise CheckpointError(f"beside: {DESCRIPTION} is written by fp8x; give the file another name")
    description = _Description(
        {path: _without_observer(layer.recipe) for path, layer in named_layers(model).items()},
        {name: str(jax.random.key_impl(leaf)) for name, leaf in leaves.items() if _is_key(leaf)},
    )
    total = sum(_stored_array(leaf).nbytes for leaf in leaves.values())
    report = None if progress is None else lambda done: progress(done, total)
    with Writer(path, max_shard_bytes=max_shard_bytes, progress=report) as writer:
        for name, value in ({DESCRIPTION: description.to_json(model)} | dict(beside or {})).items():
            writer.add_json(name, value)
        for name, leaf in leaves.items():
            writer.add(name, _stored_array(leaf))


def load_into(
    model: nnx.Module,
    path: str | Path,
    mesh: Mesh | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> nnx.Module:
    """Makes a model the one that `fp8x.save` wrote: with its layers in 8 bits, and its arrays bit for bit.

        model = nnx.eval_shape(lambda: MyModel(rngs=nnx.Rngs(0)))
        fp8x.load_into(model, "my-model-fp8")

    Nothing is quantized again, and nothing of an abstract model is ever in memory unquantized.

    Each array lies as the variable that it replaces: with its sharding, where that variable is on a device or its
    `jax.ShapeDtypeStruct` has one; or as its metadata says (`nnx.with_partitioning`). The weight and scales of a layer
    in 8 bits lie as the weight that they replace. On a mesh, what says nothing is on every device. Each process reads
    only what its devices hold.

    Arguments:
        model: unquantized, or quantized as the one on disk is; real, or abstract as `nnx.eval_shape` makes it. Changed
            in place; after an error it is as it was.
        path: the directory that `fp8x.save` wrote.
        mesh: whose axes the shardings name; by default the one that the variables lie on, or `jax.set_mesh` has set.
        progress: called after every array with the bytes read and the bytes in all.

    Returns:
        The model; a new layer where `model` itself is a layer that has yet to be in 8 bits.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or its layers or variables are not those of the model:
            missing, unknown, of another recipe, shape or type; by name.
        MeshError: a sharding that a variable does not fit, or that names no devices.
    """
    reader = Reader(path, config=DESCRIPTION)
    description = _Description.read(reader)
    rules = _rules(model, description.layers, reader.path)
    quantize = functools.partial(_quantized, rules=rules, path=reader.path)
    target = quantize(abstract(model))
    _check_layers(target, description.layers, reader.path)

    kept = {name: leaf for name, leaf in _named_leaves(nnx.state(model)).items() if not _is_inside(name, rules)}
    # Of what stays as it is the model knows more: numpy arrays of 64 bits, arrays in plain lists.
    expected = _named_leaves(nnx.state(target)) | kept
    _check(reader, expected, description.keys)
    sharding_of = shardings_of(model, kept, quantize, mesh)
    shardings = {name: sharding_of(name, leaf) for name, leaf in expected.items()}
    arrays, done, total = {}, 0, sum(reader.stored(name).nbytes for name in expected)
    for name, leaf in expected.items():
        arrays[name] = _read(reader, name, leaf, shardings[name], description.keys.get(name))
        done += reader.stored(name).nbytes
        if progress is not None:
            progress(done, total)
    model = _install(model, target, rules, arrays)
    remember_paths(model)
    return model


@dataclasses.dataclass(frozen=True)
class _Description:
    """What `fp8x.json` holds.

    Attributes:
        layers: the recipe of every layer in 8 bits, by path.
        keys: the implementation of every typed random key, whose bits are stored as uint32, by name.
    """

    layers: Mapping[str, Recipe]
    keys: Mapping[str, str]

    def to_json(self, model: nnx.Module) -> dict[str, Any]:
        return {
            "version": VERSION,
            "model": type(model).__qualname__,  # for people; nothing reads it
            "layers": {path: recipes.to_json(recipe) for path, recipe in self.layers.items()},
            "random_keys": dict(self.keys),
        }

    @classmethod
    def read(cls, reader: Reader) -> "_Description":
        file, found = reader.path / DESCRIPTION, reader.config
        if (version := found.get("version")) != VERSION:
            raise CheckpointError(f"{file}: version is {version!r}, expected {VERSION}; read it with the fp8x it is of")
        layers, keys = found.get("layers"), found.get("random_keys")
        for name, value in {"layers": layers, "random_keys": keys}.items():
            if not isinstance(value, dict):
                raise CheckpointError(f"{file}: {name} is {value!r:.200}, expected an object")
        return cls({path: recipes.from_json(value, f"{file}: {path}") for path, value in layers.items()}, keys)


def _without_observer(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, observer=None)


def _named_leaves(state: nnx.State) -> dict[str, Leaf]:
    """The arrays of a state by dotted path; a variable may hold several.

    Raises:
        CheckpointError: a value that is no array, or two of one name.
    """
    leaves: dict[str, Leaf] = {}
    for path, leaf in nnx.to_flat_state(state):
        value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        for name, array in _flat_value(path, value):
            if not isinstance(array, jax.Array | np.ndarray | np.generic | bool | int | float | jax.ShapeDtypeStruct):
                raise CheckpointError(f"{name}: is a {type(array).__name__}, which no tensor holds; use an array")
            if name in leaves:
                raise CheckpointError(f"{name}: two variables of the model have this name; rename one of them")
            leaves[name] = jnp.asarray(array) if isinstance(array, bool | int | float) else array
    return leaves


def _flat_value(path: tuple, value: Any) -> Iterator[tuple[str, Any]]:
    for keys, array in jax.tree.leaves_with_path(value):
        inner = jax.tree_util.keystr(keys, simple=True, separator=".")
        yield ".".join([*map(str, path), *([inner] if inner else [])]), array


def _is_key(leaf: Leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored_array(leaf: Leaf) -> jax.Array | np.ndarray:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _rules(model: nnx.Module, stored: Mapping[str, Recipe], path: Path) -> dict[str, Recipe]:
    """Which modules of the model are to be quantized, and how; none where it is quantized already.

    A module of a registered type may become several layers, whose paths begin with its own.
    """
    if named_layers(model):
        return {}
    modules, rules = {name for name, _ in named_modules(model)}, {}
    for name, recipe in stored.items():
        source = name
        while source not in modules and "." in source:
            source = source.rpartition(".")[0]
        if source not in modules:
            raise CheckpointError(f"{path}: holds {name} in 8 bits, but the model has no module of that name")
        if rules.setdefault(source, recipe) != recipe:
            raise CheckpointError(f"{path}: the layers of {source} have several recipes; fp8x quantizes it by one")
    return rules


def _quantized(model: nnx.Module, rules: Mapping[str, Recipe], path: Path) -> nnx.Module:
    """An abstract model, quantized; nothing is computed."""
    if not rules:
        return model
    graphdef, state = nnx.split(model)
    graphdefs = []

    def quantize(state: nnx.State) -> nnx.State:
        patterns = {re.escape(name): recipe for name, recipe in rules.items()}
        graphdef_after, state = nnx.split(
            quantize_model(nnx.merge(graphdef, state), None, patterns, unsupported="ignore")
        )
        graphdefs.append(graphdef_after)
        return state

    try:
        state = jax.eval_shape(quantize, state)
    except Fp8xError as error:
        raise CheckpointError(f"{path}: its layers in 8 bits do not fit the model: {error}") from error
    return nnx.merge(graphdefs[-1], state)


def _is_inside(name: str, modules: Container[str]) -> bool:
    """Whether something is, or lies in, one of these modules."""
    keys = name.split(".")
    return any(".".join(keys[:depth]) in modules for depth in range(len(keys) + 1))


def _check_layers(target: nnx.Module, stored: Mapping[str, Recipe], path: Path) -> None:
    there = {name: _without_observer(layer.recipe) for name, layer in named_layers(target).items()}
    if different := [name for name in stored | there if stored.get(name) != there.get(name)]:
        name = different[0]
        raise CheckpointError(
            f"{path}: {some(different)} quantized otherwise than in the model: {name} by {_show(stored.get(name))} "
            f"on disk, by {_show(there.get(name))} in the model; give the unquantized model"
        )


def _show(recipe: Recipe | None) -> str:
    if recipe is None:
        return "no recipe"
    activation = f"{recipe.activation} {recipe.activation_scale}" if recipe.activation else "none"
    return f"weights {recipe.weight}, activations {activation}, output {recipe.out_dtype}"


def _check(reader: Reader, expected: Mapping[str, Leaf], keys: Mapping[str, str]) -> None:
    """Every array that the model needs is on disk, and no other; of the same shapes and types.

    Raises:
        CheckpointError: with several names.
    """
    if missing := [name for name in expected if name not in reader]:
        raise CheckpointError(
            f"{reader.path}: {some(missing)} missing, which the model has; is it built with the same arguments? "
            "(Variables that are tied are stored once: tie them in the model, too.)"
        )
    if unknown := [name for name in reader if name not in expected]:
        raise CheckpointError(
            f"{reader.path}: {some(unknown)} not in the model; is it built with the same arguments? (Of arrays that no "
            "nnx.Variable holds, nnx.eval_shape leaves none: load into a real model.)"
        )
    different = []
    for name, leaf in expected.items():
        stored, fits = _stored_kind(reader, name, keys), (str(leaf.dtype), leaf.shape)
        if stored != fits:
            different.append(f"{name}: {_kind(*stored)} on disk, {_kind(*fits)} in the model")
    if different:
        more = f"; and {len(different) - 4} more" if len(different) > 4 else ""
        raise CheckpointError(f"{reader.path}: does not fit the model: {'; '.join(different[:4])}{more}")


def _stored_kind(reader: Reader, name: str, keys: Mapping[str, str]) -> tuple[str, tuple[int, ...]]:
    """The type and shape of what is stored."""
    stored = reader.stored(name)
    dtype = str(DTYPES.get(stored.dtype, stored.dtype))
    if name not in keys:
        return dtype, stored.shape
    try:
        key = jax.eval_shape(lambda: jax.random.key(0, impl=keys[name]))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{reader.path / DESCRIPTION}: random_keys: {name}: {error}") from None
    bits = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=keys[name])))
    if dtype != str(bits.dtype) or stored.shape[-1:] != bits.shape:
        fits = _kind(str(bits.dtype), ("...", *bits.shape))
        raise CheckpointError(f"{name} in {stored.file}: is {_kind(dtype, stored.shape)}, but a random key is {fits}")
    return str(key.dtype), stored.shape[:-1]


def _kind(dtype: str, shape: tuple) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _read(reader: Reader, name: str, leaf: Leaf, sharding: Sharding | None, key: str | None) -> jax.Array | np.ndarray:
    stored = reader.stored(name)
    slices = reader.slices(name, shapes=[stored.shape], dtypes=[stored.dtype])
    if key is not None:
        return jax.device_put(jax.random.wrap_key_data(jnp.array(slices[...]), impl=key), sharding)
    if isinstance(leaf, np.ndarray | np.generic):
        return slices[...]
    if sharding is None:
        return jnp.array(slices[...])
    return jax.make_array_from_callback(leaf.shape, sharding, slices.__getitem__)


def _install(
    model: nnx.Module, target: nnx.Module, converted: Collection[str], arrays: Mapping[str, jax.Array | np.ndarray]
) -> nnx.Module:
    """Puts the layers and the arrays into the model."""
    if "" in converted:
        model = target
    else:
        for path in converted:
            set_module(model, path, get_module(target, path))
    _tie(model, target, converted)
    state = []
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        filled = jax.tree.unflatten(jax.tree.structure(value), [arrays[name] for name, _ in _flat_value(path, value)])
        state.append((path, leaf.replace(filled) if isinstance(leaf, nnx.Variable) else filled))
    nnx.update(model, nnx.from_flat_state(state))
    return model


def _tie(model: nnx.Module, target: nnx.Module, converted: Container[str]) -> None:
    """Ties variables of new layers to those outside that their converter has kept."""
    for group in nnx.find_duplicates(target):
        paths = [".".join(map(str, path)) for path in group]
        outside = [path for path in paths if not _is_inside(path, converted)]
        kept = get_module(model, (outside or paths)[0])
        for path in paths:
            if get_module(model, path) is not kept:
                set_module(model, path, kept)
