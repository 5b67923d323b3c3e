"""What lies where a download should: Git LFS pointers, pages of HTML, parts of files.

Each begins like no safetensors or JSON file does, or has a name of its own, so the error can say what to do.
"""

from pathlib import Path

from fp8x.errors import CheckpointError

HEAD = 512  # bytes that tell

_LFS = b"version https://git-lfs.github.com/spec/v1"
# The last ones are what huggingface.co answers to curl.
_PAGES = (b"<!doctype html", b"<html", b"<?xml", b"entry not found", b"invalid username", b"access to model")
_PARTS = ("*.incomplete", "*.part")
_DOWNLOAD = "`hf download`"


def check_download(head: bytes, file: Path) -> None:
    """Refuses what stands in a file's place.

    Arguments:
        head: the first `HEAD` bytes.
        file: where they lie.

    Raises:
        CheckpointError: it is a Git LFS pointer, or what a server says; the message says what to do.
    """
    if head.startswith(_LFS):
        raise CheckpointError(
            f"{file}: is a Git LFS pointer, not the file that it stands for; run `git lfs pull` in {file.parent}, or "
            f"get the model by {_DOWNLOAD}"
        )
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGES):
        raise CheckpointError(
            f"{file}: is what a server answers, not the file: a download that failed (often it asks for a login); "
            f"get the file again by {_DOWNLOAD}"
        )


def is_pointer(file: Path) -> bool:
    """Whether a file is a Git LFS pointer."""
    with file.open("rb") as opened:
        return opened.read(len(_LFS)) == _LFS


def check_file(file: Path) -> None:
    """`check_download` of a file that other libraries read; what can't be read is left to them."""
    try:
        with file.open("rb") as opened:
            head = opened.read(HEAD)
    except OSError:
        return
    check_download(head, file)


def unfinished(file: Path) -> str | None:
    """That the download of a missing file has not ended; None if none was begun."""
    # huggingface_hub names the parts by file and content in a directory of the user's, by content alone in its cache.
    parts = [
        part for where in (*_PARTS, f".cache/huggingface/download/{_PARTS[0]}") for part in file.parent.glob(where)
    ]
    parts = [part for part in parts if part.name.startswith(f"{file.name}.")]
    if file.parent.parent.name == "snapshots":
        parts += file.parent.glob(f"../../blobs/{_PARTS[0]}")
    return f"its download has not ended ({parts[0].resolve()}); run {_DOWNLOAD} again, which goes on" if parts else None
