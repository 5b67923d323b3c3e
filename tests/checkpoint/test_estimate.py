"""How long a conversion will take: the slowest of reading, computing and writing."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

import fp8x
from fp8x.checkpoint import estimate


@pytest.fixture
def plan(tmp_path):
    """2 MB of bf16's size before; half of it, and 4 kB of scales, after."""
    (tmp_path / "a").mkdir()
    save_file({"fc.weight": np.ones((1024, 1024), np.float16)}, tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "config.json").write_text('{"model_type": "other", "torch_dtype": "float16"}')
    return fp8x.plan(tmp_path / "a", "e4m3_f16")


@pytest.mark.parametrize(
    "rates, limit, seconds",
    [
        ({"_reading": 1e6, "widening": 1e9, "_writing": 1e9}, "reading", 2 * 1024**2 / 1e6),
        ({"_reading": 1e9, "widening": 1e9, "_writing": 1e6}, "writing", (1024**2 + 4096) / 1e6),
        ({"_reading": 1e9, "widening": 1e6, "_writing": 1e9}, "computing", None),
    ],
)
def test_the_slowest_part_counts(plan, tmp_path, monkeypatch, rates, limit, seconds):
    for name, rate in rates.items():
        monkeypatch.setattr(estimate, name, lambda *_, rate=rate: rate)
    found = estimate.estimate(plan, tmp_path / "b")
    cores = len(os.sched_getaffinity(0))
    assert found.limit == limit
    assert found.seconds == pytest.approx(seconds or 2 * 1024**2 / (1e6 * cores * estimate._WIDENED))


def test_a_look_at_this_machine_leaves_nothing(plan, tmp_path):
    found = estimate.estimate(plan, tmp_path / "not" / "made" / "yet")
    assert 0 < found.seconds < 60
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_a_place_that_can_not_be_written_is_found_out_later(plan, tmp_path):
    assert estimate._writing(tmp_path / "a" / "config.json" / "out") > 0
