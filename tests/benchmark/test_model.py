"""benchmarks/model.py: what it says of a product, by hand."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("model")
    for name in ("model", "launches", "mixtures"):
        sys.modules.pop(name, None)


def test_one_token(model):
    """w13 of eight experts: twelve tiles of 128 rows each, for 132 SMs."""
    found = model.product(model.MIXTURES["Qwen3-30B-A3B"], "mxfp8_bf16", 1, 1536, 2048)
    assert found.nbytes == 8 * 1536 * 2048 * 33 / 32 and found.floor == found.nbytes / 4.8e12
    assert found.tiling.rows == 128 and found.tasks == 8 * 12 * found.tiling.splits
    assert found.balance == pytest.approx(96 / 132)
    assert found.floor < found.seconds < 1.5 * found.floor


def test_the_ring_holds_what_memory_needs(model):
    for mixture in model.MIXTURES.values():
        for tokens in model.TOKENS:
            for code in model.RECIPES:
                found = model.product(mixture, code, tokens, mixture.hidden, mixture.intermediate)
                assert found.ring > 3 * model.in_flight() and 0 < found.balance <= 1


def test_tables(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["model.py", "--mixtures", "DeepSeek-V3"])
    model.main()
    first, *rows = [line for line in capsys.readouterr().out.splitlines() if line]
    assert first == "Little's law, 800 ns: 29 kB in flight an SM."
    assert sum(row.startswith("| DeepSeek-V3") for row in rows) == 3 * len(model.TOKENS) * len(model.RECIPES)
    assert len({row.count("|") for row in rows}) == 2
