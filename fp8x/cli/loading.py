"""Checkpoints and their tokenizers, with progress on stderr."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fp8x.cli import terminal
from fp8x.errors import CheckpointError

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from tokenizers import Tokenizer

    from fp8x.calibrate.data import Text
    from fp8x.models import Decoder, DecoderConfig
    from fp8x.recipe import Recipe


def load(
    path: Path,
    recipe: "Recipe | None" = None,
    rules: "Mapping[str, Recipe | None] | None" = None,
    allow_nonfinite: bool = False,
    mesh: "Mesh | None" = None,
) -> "Decoder":
    """`fp8x.load`, with a progress bar."""
    import fp8x

    with terminal.progress(f"loading {path.name}", unit="bytes") as update:
        return fp8x.load(path, recipe, mesh, rules=rules, allow_nonfinite=allow_nonfinite, progress=update)


def read_config(path: Path) -> "DecoderConfig":
    """What a checkpoint's model is like: before it is loaded, which may take minutes."""
    from fp8x.checkpoint import Reader
    from fp8x.models import DecoderConfig

    return DecoderConfig.from_hf(Reader(path).config)


def set_context(model: "Decoder", path: Path, context: int | None) -> None:
    """What `--context` says: a warning where it is more than the model was made for. None leaves the model as it is."""
    if context is None:
        return
    limit = model.config.context
    if limit is not None and context > limit:
        terminal.warn(
            f"--context {context}: {path.name} was made for {limit} tokens; what comes behind may be worthless"
        )
    model.set_context(context)


def read_texts(path: Path, list_malformed: bool) -> "tuple[list[Text], int]":
    """The documents of a data file, and how many of its records are malformed; those are named, ten at most or all."""
    from fp8x.calibrate import data

    malformed: list[str] = []
    try:
        texts = data.read_texts(path, report=malformed.append, limit=None)
    finally:
        named = malformed if list_malformed else malformed[: data.MAX_REPORTS]
        for message in named:
            terminal.warn(message)
        if more := len(malformed) - len(named):
            terminal.warn(f"{path}: {more:,} more are malformed; skipped (--list-malformed names all)")
    return texts, len(malformed)


def load_tokenizer(path: Path) -> "Tokenizer":
    """The tokenizer of a checkpoint directory.

    Raises:
        CheckpointError: there is no tokenizer.json, or none that can be read.
    """
    from tokenizers import Tokenizer

    from fp8x.checkpoint.downloads import check_file
    from fp8x.checkpoint.source import source_directory

    file = source_directory(path) / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; copy it from the original checkpoint")
    check_file(file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{file}: is no tokenizer: {error}") from None
    # Either would silently cut or stretch what is measured.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
