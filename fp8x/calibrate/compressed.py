"""Data files that are compressed, by gzip or Zstandard."""

import gzip
import zlib
from pathlib import Path

from fp8x.errors import DataError

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def decompressed(path: Path, raw: bytes) -> bytes:
    """What is in a file, whose first bytes tell whether it is compressed; its name says nothing.

    Raises:
        DataError: it is cut or damaged.
    """
    try:
        if raw.startswith(_GZIP):
            return gzip.decompress(raw)
        return _from_zstd(raw) if raw.startswith(_ZSTD) else raw
    except EOFError:
        raise DataError(f"{path}: it is compressed, and cut short; get it again") from None
    except (OSError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: it is compressed, and damaged ({error}); get it again") from None


def _from_zstd(raw: bytes) -> bytes:
    """Of all frames; EOFError where the last is cut, ValueError where one is damaged."""
    import zstandard  # only here: other files need none

    parts = []
    while raw:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(raw))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
        if not frame.eof:
            raise EOFError
        raw = frame.unused_data
    return b"".join(parts)
