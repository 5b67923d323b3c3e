"""Tensors under the name of a matrix in 8 bits that are no part of it as fp8x reads it.

    tensor                                                    is left out where          else
    input_scale, activation_scale                             activations are not static read with the matrix
    weight_shape                                              always                     –
    weight_zero_point, input_zero_point                       all are 0                  refused
    weight_g_idx                                              columns lie in order       refused
    weight_global_scale, input_global_scale, weight_scale_2,
    input_scale_2, pre_quant_scale                            all are 1                  refused
    weight_scale beside weight_scale_inv                      never                      refused

Who passed the refused ones by would compute with other weights. Names: compressed-tensors'
`quantization/lifecycle/initialize.py` and `compressors`, ModelOpt's `export/quant_utils.py`.
"""

from collections.abc import Collection, Iterator

import numpy as np

from fp8x.checkpoint.header import DTYPES
from fp8x.checkpoint.reader import Reader
from fp8x.errors import CheckpointError

WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
INPUT_SCALES = ("input_scale", "activation_scale")
ZERO_POINTS = ("weight_zero_point", "input_zero_point")
FACTORS = ("weight_global_scale", "input_global_scale", "weight_scale_2", "input_scale_2", "pre_quant_scale")
ORDER, SHAPE = "weight_g_idx", "weight_shape"
KINDS = (*WEIGHT_SCALES, *INPUT_SCALES, *ZERO_POINTS, *FACTORS, ORDER, SHAPE)


def unread_parts(prefix: str, names: Collection[str], block: int | None, reader: Reader) -> dict[str, str]:
    """Tensors of a matrix that mean nothing beside its own, with the reason.

    Arguments:
        names: the tensors that are read with the matrix.
        block: columns that share a scale; None if all do.

    Raises:
        CheckpointError: one that says that the matrix has other values.
    """
    return dict(_parts(prefix, names, block, reader))


def _parts(prefix: str, names: Collection[str], block: int | None, reader: Reader) -> Iterator[tuple[str, str]]:
    for kind in KINDS:
        name = f"{prefix}.{kind}"
        if name not in reader or name in names:
            continue
        where = f"{name} in {reader.stored(name).file}"
        if kind in WEIGHT_SCALES:
            (other,) = (each for each in names if each.rpartition(".")[2] in WEIGHT_SCALES)
            raise CheckpointError(f"{where}: stands beside {other}; fp8x does not know which of them counts")
        if kind in INPUT_SCALES:
            yield name, "activations are not static in the source"
        elif kind == SHAPE:
            yield name, "the matrix has its own shape"
        elif kind in ZERO_POINTS:
            _check(_values(name, reader) == 0, where, "zero points other than 0; fp8x reads symmetric quantization")
            yield name, "all zero points are 0"
        elif kind in FACTORS:
            _check(_values(name, reader) == 1, where, "further factors of its values, which fp8x does not read")
            yield name, "all factors are 1"
        else:
            groups = _values(name, reader).reshape(-1)
            in_order = np.arange(groups.size) // (block or max(groups.size, 1))
            is_unused = (groups == -1).all()
            _check((groups == in_order) | is_unused, where, "columns in another order than their scales")
            yield name, "columns lie in the order of their scales"


def _values(name: str, reader: Reader) -> np.ndarray:
    tensor = reader.stored(name)
    return reader.read(name, shapes=[tensor.shape], dtypes=list(DTYPES))


def _check(fits: np.ndarray, where: str, problem: str) -> None:
    if not np.all(fits):
        raise CheckpointError(f"{where}: {problem}")
