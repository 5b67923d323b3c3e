"""`reduce_blocks`: one number of each block of a matrix in NumPy, without JAX."""

import numpy as np


def reduce_blocks(ufunc: np.ufunc, values: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """A reduction of each block of `values` `[N, K]`: `[ceil(N / rows), ceil(K / columns)]`, of the ufunc's dtype.

    Arguments:
        block: rows and columns; those at the end may be smaller.
    """
    (n, k), (rows, columns) = values.shape, block
    by_rows = ufunc.reduceat(values, np.arange(0, n, rows), axis=0)
    return ufunc.reduceat(by_rows, np.arange(0, k, columns), axis=1)
