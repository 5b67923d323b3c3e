import contextlib

import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

import fp8x
from fp8x.ops import mosaic_swapped


@pytest.fixture
def interpreted():
    """A context in which ops run Mosaic GPU kernels in the CPU interpreter, which must find no race in the last one.

    It runs a warpgroup in a thread of XLA's pool: with fewer threads than warpgroups it would hang. There are as many
    as CPU devices, tests/conftest.py has eight.
    """

    @contextlib.contextmanager
    def context():
        params = plgpu.InterpretGPUParams(detect_races=True)
        with plgpu.force_gpu_interpret_mode(params), fp8x.backend("mosaic_gpu"):
            yield
        races = gpu_callbacks._races  # None if no kernel ran: of no rows there is none
        assert races is None or not races.races_found

    yield context
    gpu_callbacks.reset_gpu_interpret_mode_state()  # after an exception in a kernel others would hang


@pytest.fixture
def short_sums() -> bool:
    """Whether 8-bit products are added as tensor cores add them; the interpreter has float32."""
    return False


@pytest.fixture(autouse=True)
def decode_kernel_only_where_it_is_tested(monkeypatch):
    """The shapes of tests have few rows, which would all take sm90_fp8_decode; its own tests set this back."""
    monkeypatch.setattr(mosaic_swapped, "FEW_ROWS", 0)
