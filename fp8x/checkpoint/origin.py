"""What a checkpoint in 4 bits was like, kept beside what became of it, so that the way back ends where it began.

A conversion from MXFP4 to MXFP8 loses no value, but the words of `quantization_config` (`zp_dtype`, observers, lists
in another order) and which tensor lay in which file. They go into `fp8x_origin.json`:

    quantization_config   the source's
    index                 its model.safetensors.index.json; null where one file held everything

and come along as long as no matrix is quantized anew. What is written in 4 bits again takes them where they still fit.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fp8x.checkpoint.reader import INDEX, QUANTIZATION, SINGLE, Reader, read_json
from fp8x.errors import CheckpointError

ORIGIN = "fp8x_origin.json"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What `fp8x_origin.json` says.

    Attributes:
        quantization_config: of the checkpoint in 4 bits.
        index: of its files; None for one.
    """

    quantization_config: Mapping[str, Any]
    index: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def files(self, names: Iterable[str]) -> dict[str, str] | None:
        """The file of each tensor; None where these are others than there were."""
        if self.index is None:
            return dict.fromkeys(names, SINGLE)
        weight_map = self.index["weight_map"]
        return dict(weight_map) if set(names) == set(weight_map) else None


def origin_of(reader: Reader) -> Origin | None:
    """Of a checkpoint in 4 bits, or of what became of one.

    Warns of a file that says something else.
    """
    if any(reader.stored(name).is_packed for name in reader):
        is_one = (reader.path / SINGLE).is_file()
        stated = reader.config.get(QUANTIZATION) or {}
        return Origin(_plain(stated), None if is_one else read_json(reader.path / INDEX))
    file = reader.path / ORIGIN
    if not file.is_file():
        return None
    try:
        return _read(file)
    except CheckpointError as error:
        warnings.warn(f"{error}; it is not used", stacklevel=4)
        return None


def _read(file: Path) -> Origin:
    found = read_json(file)
    config, index = found.get("quantization_config"), found.get("index")
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{file}: quantization_config is {config!r:.100}, expected an object")
    weight_map = {} if index is None else index.get("weight_map") if isinstance(index, Mapping) else None
    # Beside a file of that name nobody reads an index.
    files = list(weight_map.values()) if isinstance(weight_map, Mapping) else [SINGLE]
    if not all(map(_is_file_name, files)) or SINGLE in files:
        raise CheckpointError(f"{file}: index has no weight_map of tensor name -> file name")
    return Origin(config, index)


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value and value.endswith(".safetensors")


def _plain(value: Any) -> Any:
    """JSON without the notes of what was read (`Noted`)."""
    if isinstance(value, Mapping):
        return {key: _plain(dict.__getitem__(value, key)) for key in value}
    return [_plain(item) for item in value] if isinstance(value, list) else value
