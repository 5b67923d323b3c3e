"""What lies beside a checkpoint's weights: what comes along when it is written anew, and what does not."""

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

# Written anew, with what they say of the weights.
_REWRITTEN = ("config.json", "hf_quant_config.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz")
_INDEX = ".index.json"
MAX_BYTES = 100 * 10**6  # tokenizers have up to 35 MB; what is larger is no description


@dataclasses.dataclass(frozen=True)
class Companions:
    """The files of a directory that are no part of its safetensors checkpoint.

    Attributes:
        files: that come along, relative to the directory: tokenizer, chat template, settings of generation and of
            processors, code, README, licence.
        left: that do not, with the reason.
    """

    files: tuple[Path, ...]
    left: Mapping[str, str]


def find_companions(source: Path, weights: set[Path]) -> Companions:
    """The companions of a checkpoint.

    Arguments:
        source: its directory.
        weights: the files of its tensors, which are neither.
    """
    files, left = [], {}
    for path in sorted(_walk(source)):
        relative = path.relative_to(source)
        if path in weights or (path.parent == source and (path.name in _REWRITTEN or _is_index_of(path, weights))):
            continue
        if reason := _why_left(path):
            left[str(relative)] = reason
        else:
            files.append(relative)
    return Companions(tuple(files), left)


def copy_companions(found: Companions, source: Path, directory: Path) -> None:
    """Copies the files that come along."""
    for file in found.files:
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, directory / file)


def _walk(source: Path) -> Iterator[Path]:
    """Every file; hidden directories, and links to directories, count as one."""
    for path in source.iterdir():
        if path.is_dir() and not path.name.startswith(".") and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _is_index_of(path: Path, weights: set[Path]) -> bool:
    return path.name == f"model.safetensors{_INDEX}" and bool(weights)


def _why_left(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if not path.is_file():
        return "a link to a directory" if path.is_dir() else "no regular file, or a link to none"
    if path.suffix in _WEIGHTS:
        return "weights that the checkpoint does not count as its own"
    if path.name.endswith(_INDEX):
        return "the index of such weights"
    if (size := os.path.getsize(path)) > MAX_BYTES:
        return f"{size / 1e6:,.0f} MB; what describes a model is smaller"
    return None
