"""benchmarks/grouped_gemm.py from end to end, at small shapes, on XLA."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from fp8x.benchmark import timing

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def grouped_gemm(monkeypatch):
    monkeypatch.setattr(timing, "BATCH_SECONDS", 1e-4)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("grouped_gemm")
    for name in ("grouped_gemm", "peers", "deepgemm"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_from_end_to_end(grouped_gemm, tmp_path, capsys, monkeypatch):
    path = tmp_path / "out.json"
    arguments = ["--json", str(path), "--tiny", "--backend", "xla", "--quick"]
    grouped, dense = (["--shapes", "N 4096", "--forms", "W8A16, per"], ["--shapes", "dense", "--forms", "per tensor"])
    grouped_gemm.main([*arguments, *grouped])
    grouped_gemm.main([*arguments, *dense])
    document = json.loads(path.read_text())
    assert document["facts"]["device"] == "cpu" and document["facts"]["copy_bandwidth"] > 0
    found = {(result["who"], result["quantized"]): result for result in document["results"]}
    for (who, _), result in found.items():
        assert ("seconds" in result) == (who in OURS_AND_JAX), result
        assert "seconds" in result or "No module named" in result["failure"]
    ours = {("fp8x", False), ("fp8x", True)}  # a quick run has x quantized where a form has activations
    assert {*found} - ours == {(who, "8" in who or "scaled" in who) for who in (OURS_AND_JAX | OTHERS) - {"fp8x"}}

    monkeypatch.setattr(grouped_gemm, "measure", lambda *_, **__: pytest.fail("ran again"))
    grouped_gemm.main([*arguments, *grouped])  # everything is there
    grouped_gemm.main([*arguments, "--seconds", "0"])  # and nothing begins after the deadline
    assert json.loads(path.read_text())["results"] == document["results"]
    capsys.readouterr()
    grouped_gemm.main(["--table", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("device cpu, platform cpu, ") and lines[1].startswith("A copy: ")
    rows = [line for line in lines if line.startswith("|") and "µs" in line]
    assert len(rows) == sum("seconds" in result for result in document["results"])
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


OURS_AND_JAX = {"fp8x", "jax.lax.ragged_dot, bf16", "XLA's dot, fp8"}
OTHERS = {
    "torch.nn.functional.scaled_mm, fast accumulation",
    "torch.nn.functional.scaled_mm, full accumulation",
    "torch._grouped_mm, bf16",
    "tokamax.ragged_dot, bf16",
}


def test_row_of_a_result(grouped_gemm):
    result = dict(shape="s", form="f", who="fp8x", quantized=True, bytes=10**9, flops=10**12, floor_seconds=1e-3)
    result |= dict(seconds=2e-3, host_seconds=1e-5, relative_error=2e-3, kernels={"mosaic_a": 1.5e-3, "fusion": 4e-4})
    row = grouped_gemm._row(result, 1e12)
    assert row == "| f | fp8x | 8 bits | 2000.0 µs | 1500.0 µs | 1000.0 µs | 50% | 500 | 500 | 50% | 2.0e-03 |"
    peer = result | dict(kernels={"gemm": 9e-4, "split": 1e-4}, host_seconds=1.9e-3)
    assert "| 2000.0 µs (host) | 900.0 µs |" in grouped_gemm._row(peer, 1e12)
    failed = grouped_gemm._row({**result, "failure": "TypeError: no\nmore"}, 1e12)
    assert failed.startswith("| f | fp8x | 8 bits | TypeError: no | ") and failed.count("|") == row.count("|")


def test_something_to_write_or_to_read_is_needed(grouped_gemm, capsys):
    with pytest.raises(SystemExit):
        grouped_gemm.main([])
    assert "--json or --table is needed" in capsys.readouterr().err
