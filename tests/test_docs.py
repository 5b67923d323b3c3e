"""Pages of docs whose code runs as a whole."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def read_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["flax-models"])
def test_every_block_runs_in_order(page, tmp_path, monkeypatch, capsys):
    from fp8x.nn import registry

    monkeypatch.setattr(registry, "_CONVERTERS", dict(registry._CONVERTERS))
    monkeypatch.chdir(tmp_path)
    blocks = read_blocks(page)
    assert len(blocks) > 5
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}.md, block {number}", "exec"), names)
    assert "embed.embedding" in capsys.readouterr().out


@pytest.mark.slow
def test_generation_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (block,) = [block for block in read_blocks("models") if "generate(" in block]
    exec(compile(block, "models.md", "exec"), {})
    texts, *tokens = capsys.readouterr().out.splitlines()
    assert "Return a list of" in texts and "The file" in texts and len(tokens) == 8
