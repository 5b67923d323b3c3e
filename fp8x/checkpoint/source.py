"""`source_directory`: the directory that a user named as a checkpoint, or why it is none and what to do."""

import os
import re
from pathlib import Path

from fp8x.errors import CheckpointError

_HUB = re.compile(r"(?:https?://(?:huggingface\.co|hf\.co)/|hf://)([\w.-]+/[\w.-]+)(?:/.*)?")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def source_directory(path: str | Path, config: str = "config.json") -> Path:
    """The directory, absolute; links are kept. `config` is the JSON file that it should hold.

    Raises:
        CheckpointError: nothing is there, or a file, or a link to nothing; a model's name on huggingface.co; a working
            directory that is gone.
    """
    named = Path(path).expanduser()
    if named.is_dir():
        return _absolute(named)
    if (hub_id := _hub_id(str(path))) is not None:
        raise CheckpointError(
            f"{path}: does not exist here; if it is a model of huggingface.co, get it first: "
            f"`hf download {hub_id} --local-dir {hub_id.rpartition('/')[2]}`, and give that directory"
        )
    found = _absolute(named)
    if found.is_symlink() and not found.exists():
        raise CheckpointError(f"{found}: is a link to {os.readlink(found)}, which does not exist; give a directory")
    what = "is a file" if found.exists() else "does not exist"
    hint = f", like {found.parent}, where it lies" if (found.parent / config).is_file() and found.exists() else ""
    raise CheckpointError(f"{found}: {what}; give a directory with {config} and model.safetensors{hint}")


def _absolute(path: Path) -> Path:
    try:
        return path.absolute()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the working directory is gone; change to one that is there") from None


def _hub_id(text: str) -> str | None:
    """What may be a model's name there: an address, or two words where no such directory is at hand."""
    # A Path has only one of two slashes.
    if match := _HUB.match(re.sub(r"^(https?|hf):/+", r"\1://", text)):
        return match[1]
    return text if _HUB_ID.fullmatch(text) and not os.path.lexists(text) and not Path(text).parent.is_dir() else None
