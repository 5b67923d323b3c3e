"""benchmarks/quantize.py from end to end, at small shapes, on XLA."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from fp8x.benchmark import timing


@pytest.fixture
def quantize(monkeypatch):
    monkeypatch.setattr(timing, "BATCH_SECONDS", 1e-4)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("quantize")
    sys.modules.pop("quantize")


@pytest.mark.slow
def test_from_end_to_end(quantize, tmp_path, capsys, monkeypatch):
    path = tmp_path / "out.json"
    arguments = ["--json", str(path), "--tiny", "--quick", "--who", "xla"]
    quantize.main(arguments)
    plain, gated = json.loads(path.read_text())["results"]
    assert (plain["case"], gated["case"]) == ("16 × 256, 1×128", "16 × 256, 1×128, gate")
    assert (plain["bytes"], gated["bytes"]) == (16 * 256 * 3 + 16 * 2 * 4, 16 * 256 * 5 + 16 * 2 * 4)
    assert plain["bytes_that_differ"] == gated["bytes_that_differ"] == 0 and plain["seconds"] > 0

    monkeypatch.setattr(quantize, "measure", lambda *_: pytest.fail("ran again"))
    quantize.main(arguments)  # everything is there
    quantize.main([*arguments, "--who", "kernel", "--seconds", "0"])  # and nothing begins after the deadline
    capsys.readouterr()
    quantize.main(["--table", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| 16 × 256, 1×128 | xla | ") and "µs" in lines[3]


def test_what_the_kernel_does_not_support_is_a_result(quantize):
    assert "too few" in quantize.measure(quantize.Case(1, 768, "per token", None), "kernel")["failure"]
