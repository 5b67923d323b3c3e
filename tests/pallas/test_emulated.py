"""What the compiler makes of the kernels, their PTX, emulated (tests/ptx): every form of each, and the interpreter's
tests over again, for their shapes."""

import contextlib

import pytest
import test_gated_fp8 as gated
import test_ragged_experts as ragged
import test_sm90_grouped_fp8 as fp8
import test_sm90_grouped_swapped as swapped
import test_sm90_quantize as quantize
from ptx import examples, forms
from ptx.emulated import emulated

import fp8x
from fp8x.ops import mosaic_swapped
from fp8x.pallas import aot

pytestmark = [pytest.mark.slow, pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))]

test_fp8 = fp8.test_grouped
test_fp8_tilings = fp8.test_tilings
test_gated_bits_with_an_exact_activation = gated.test_bits_with_an_exact_activation
test_gated_activations = gated.test_activations_are_within_a_code
test_gated_nan = gated.test_nan_of_a_product_stays
test_ragged_experts = ragged.test_is_what_xla_makes
test_swapped = swapped.test_grouped
test_swapped_tilings = swapped.test_tilings
test_swapped_rows_that_name_their_expert = swapped.test_rows_that_name_their_expert
test_quantize = quantize.test_ragged


@pytest.fixture
def interpreted():
    """In the interpreter's place."""

    @contextlib.contextmanager
    def context():
        with emulated(), fp8x.backend("mosaic_gpu"):
            yield

    return context


@pytest.fixture
def short_sums():
    return True


@pytest.fixture(autouse=True)
def swapped_however_many_rows(request, monkeypatch):
    if request.function.__module__ == swapped.__name__:
        monkeypatch.setattr(mosaic_swapped, "FEW_ROWS", 10**9)


@pytest.mark.parametrize("form", forms.EMULATED, ids=str)
def test_every_form(form):
    examples.check(form)
