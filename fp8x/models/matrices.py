"""Which matrices a checkpoint has, of which modules they are, and how they are stored. Imports no JAX."""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from fp8x.checkpoint import Format, Reader
from fp8x.checkpoint.format import stored_recipes
from fp8x.checkpoint.header import DTYPES, FLOAT8, UNQUANTIZED
from fp8x.checkpoint.kept import LOOKUPS
from fp8x.checkpoint.unread import INPUT_SCALES, WEIGHT_SCALES
from fp8x.errors import CheckpointError, ConfigError, some
from fp8x.models.config import DecoderConfig
from fp8x.models.families import FAMILIES
from fp8x.models.hf_names import flat, linear_names, param_names, skipped
from fp8x.recipe import OUT_DTYPES, Recipe


def modules_of(reader: Reader) -> dict[str, list[str]]:
    """The prefixes of every module that holds matrices, by path: as `fp8x.load` has it where it knows the model."""
    by_name = {prefix: [prefix] for prefix in _matrices(reader)}
    # A classifier or a reward model of a family has its own head, and no `lm_head`.
    stated = reader.config.get("architectures")
    architecture = stated[0] if isinstance(stated, list) and stated else "ForCausalLM"
    family = str(reader.config.get("model_type"))
    if family not in FAMILIES or not str(architecture).endswith("ForCausalLM"):
        return by_name
    try:
        config = DecoderConfig.from_hf(reader.config)
        check_counts(reader, config)
    except (CheckpointError, ConfigError) as error:
        if isinstance(error, CheckpointError) and any(name.startswith("model.layers.") for name in reader):
            raise
        warnings.warn(
            f"{reader.path}: fp8x.load could not build this model ({error}); its matrices go by their own names",
            stacklevel=4,
        )
        return by_name
    modules = {path: [prefix for _, prefix in flat(names)] for path, names in linear_names(config).items()}
    needed = [name for names in param_names(config).values() for _, name in flat(names)]
    needed += [f"{prefix}.weight" for names in modules.values() for prefix in names]
    missing = [name for name in needed if name not in reader]
    if len(missing) == len(needed):
        warnings.warn(
            f"{reader.path}: fp8x.load could not build this model ({needed[0]} and all others that config.json calls "
            "for are missing); its matrices go by their own names",
            stacklevel=4,
        )
        return by_name
    if missing:
        raise CheckpointError(f"{reader.path}: {some(missing)} missing, which config.json calls for")
    return modules | {prefix: names for prefix, names in by_name.items() if skipped(config, prefix)}


def check_counts(reader: Reader, config: DecoderConfig) -> None:
    """Refuses more layers and experts than a checkpoint has tensors: to describe them would take forever.

    Raises:
        CheckpointError: with both counts.
    """
    count = sum(1 for _ in reader)
    matrices = config.num_experts * (config.num_hidden_layers - len(config.dense_layers))
    if config.num_hidden_layers + matrices > count:
        raise CheckpointError(
            f"{reader.path}: config.json has {config.num_hidden_layers} layers and {config.num_experts} experts, which "
            f"{count} tensors can't be"
        )


def wide_enough(reader: Reader, config: DecoderConfig) -> DecoderConfig:
    """The config in a type that holds every parameter as stored, where config.json names none."""
    found = set() if names_dtype(config.hf) else parameter_types(reader)
    if config.dtype == "float32" or found <= {np.dtype(config.dtype)}:
        return config
    dtype = found.pop() if len(found) == 1 else np.dtype(np.float32)
    return dataclasses.replace(config, dtype=str(dtype), hf=with_dtype(config.hf, dtype))


def _matrices(reader: Reader) -> list[str]:
    """The prefixes of what is a linear layer's matrix, to all appearance."""
    names = [name.removesuffix(".weight") for name in reader if name.endswith(".weight")]
    return [
        name
        for name, tensor in ((name, reader.stored(f"{name}.weight")) for name in names)
        if len(tensor.shape) == 2 and tensor.dtype in (*UNQUANTIZED, *FLOAT8) and not LOOKUPS.fullmatch(name)
    ]


_TABLE = re.compile(r"(.*\.)?([^.]*embed[^.]*|wte|shared)(\.\d+)?", re.IGNORECASE)


def tables_of(reader: Reader) -> dict[str, tuple[int, int]]:
    """The shapes `[V, D]` of embeddings, by name; what config.json says of the vocabulary where none is stored."""
    stored = {name.removesuffix(".weight"): reader.stored(name).shape for name in reader if name.endswith(".weight")}
    tables = {name: shape for name, shape in stored.items() if len(shape) == 2 and _TABLE.fullmatch(name)}
    tables = {name: shape for name, shape in tables.items() if LOOKUPS.fullmatch(name)}
    sizes = reader.config.get("vocab_size"), reader.config.get("hidden_size")
    if not tables and all(isinstance(size, int) for size in sizes):
        tables["config.json"] = sizes
    return tables


def stored_by_prefix(
    reader: Reader, modules: Mapping[str, list[str]], source_format: Format | None
) -> dict[str, Recipe | None]:
    """The recipe of every prefix in the source."""
    prefixes = [prefix for names in modules.values() for prefix in names]
    if source_format is None:
        return dict.fromkeys(prefixes)
    return stored_recipes(source_format, reader, prefixes, dtype_of(reader.config))


def names_dtype(config: Mapping[str, Any]) -> bool:
    """Whether a config says in which type the model computes."""
    return bool(config.get("dtype") or config.get("torch_dtype"))


def parameter_types(reader: Reader) -> set[np.dtype]:
    """The types in 16 and 32 bits of all tensors but scales."""
    dtypes = {reader.stored(name).dtype for name in reader if "scale" not in name.rpartition(".")[2]}
    return {DTYPES[dtype] for dtype in dtypes.intersection(UNQUANTIZED)}


def with_dtype(config: Mapping[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """A config.json that states the model's type."""
    named = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    return dict(config) | dict.fromkeys(named, str(dtype))


def dtype_of(config: Mapping[str, Any]) -> np.dtype:
    """The type in which a model computes, as its config says; bfloat16 without a word."""
    named = config.get("dtype") or config.get("torch_dtype")
    return {str(dtype): dtype for dtype in OUT_DTYPES.values()}.get(str(named), np.dtype(ml_dtypes.bfloat16))


def check_scales(reader: Reader, stored: Mapping[str, Recipe | None], source_format: Format | None) -> None:
    """Raises for scales that belong to no matrix."""
    scales = (*WEIGHT_SCALES, *INPUT_SCALES)
    for name in reader if source_format is not None else ():
        prefix, _, kind = name.rpartition(".")
        if kind in scales and f"{prefix}.weight" not in reader:
            raise CheckpointError(f"{name} in {reader.stored(name).file}: the matrix that it scales is missing")
        if kind in scales and prefix not in stored:
            raise CheckpointError(
                f"{prefix}.weight in {reader.stored(name).file}: is quantized, but fp8x reads quantized matrices of "
                "linear layers alone"
            )
