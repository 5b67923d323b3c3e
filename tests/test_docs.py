"""Pages of docs whose code runs as a whole."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["flax-models"])
def test_every_block_runs_in_order(page, tmp_path, monkeypatch, capsys):
    from fp8x.nn import registry

    monkeypatch.setattr(registry, "_CONVERTERS", dict(registry._CONVERTERS))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert len(blocks) > 5
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}.md, block {number}", "exec"), names)
    assert "embed.embedding" in capsys.readouterr().out
