"""What lies beside a checkpoint's weights: what comes along when it is written anew, and what does not."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from fp8x.checkpoint.downloads import check_file, is_pointer

# Written anew, with what they say of the weights.
_REWRITTEN = ("config.json", "hf_quant_config.json", "model.safetensors.index.json", "fp8x_origin.json")
_MODULES = "modules.json"  # of sentence-transformers: what comes before and after the model, each in a directory
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".msgpack",
    ".npz",
    ".ot",
    ".tflite",
)
_INDEX = ".index.json"
_SIDECAR = "calibration.json"
MAX_BYTES = 100 * 10**6  # tokenizers have up to 35 MB; what is larger is no description

# What libraries read; a download that failed in its place must not be passed on. (Images and texts may be anything.)
_READ = (".json", ".jinja", ".model", ".tiktoken", ".py")


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


def find_companions(source: Path, weights: Collection[Path] = ()) -> Companions:
    """The companions of a checkpoint.

    Arguments:
        source: its directory; without one there are none.
        weights: the files of its tensors, which are neither.
    """
    files, left, modules = [], {}, _modules(source)
    for path in sorted(_walk(source)) if source.is_dir() else ():
        relative = path.relative_to(source)
        if path in weights or str(relative) in _REWRITTEN:
            continue
        if reason := _why_left(path, is_module=path.parent in modules):
            left[str(relative)] = reason
        else:
            files.append(relative)
    return Companions(tuple(files), left)


def check_companions(source: Path) -> None:
    """
    Raises:
        CheckpointError: a tokenizer or the like that is something else (`downloads.py`).
    """
    for file in find_companions(source).files:
        if file.suffix in _READ:
            check_file(source / file)


def copy_companions(source: Path, directory: Path) -> None:
    """Copies what comes along, and is not there yet."""
    for file in find_companions(source).files:
        if not (directory / file).exists():
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, directory / file)


def _walk(source: Path) -> Iterator[Path]:
    """Every file; hidden directories, and links to directories, count as one."""
    for path in source.iterdir():
        if path.is_dir() and not path.name.startswith(".") and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _modules(source: Path) -> set[Path]:
    """The directories of a sentence-transformers model that hold small layers of its own, like 2_Dense."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return {source / module["path"] for module in json.loads((source / _MODULES).read_bytes())} - {source}
    return set()


def _why_left(path: Path, *, is_module: bool) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if not path.is_file():
        return "a link to a directory" if path.is_dir() else "no regular file, or a link to none"
    if path.suffix in _WEIGHTS and not is_module:
        return "weights that the checkpoint does not count as its own"
    if path.name.endswith(_INDEX):
        return "the index of such weights"
    if path.name == _SIDECAR:
        return "activation scales that were found for the source"
    if (size := path.stat().st_size) > MAX_BYTES:
        return f"{size / 1e6:,.0f} MB; what describes a model is smaller"
    if path.suffix not in _READ and is_pointer(path):
        return "a Git LFS pointer"
    return None
