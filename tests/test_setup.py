"""`setup.sh` says what it does, and what to do where that fails; with a `uv` that does nothing."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def setup(path: Path, fails: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs it in `path`, where uv fails for commands that begin with `fails`."""
    for name in ("setup.sh", ".python-version"):
        shutil.copy(ROOT / name, path / name)
    uv = path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(f'#!/bin/sh\ncase "$*" in "{fails}"*) echo what uv says; exit 2;; esac\n')
    uv.chmod(0o755)
    environment = os.environ | {"PATH": f"{uv.parent}:{os.environ['PATH']}"}
    return subprocess.run([path / "setup.sh", *arguments], env=environment, capture_output=True, text=True)


def test_says_what_it_does_and_how_long_it_takes(tmp_path):
    run = setup(tmp_path, "nothing", "compile")
    assert run.returncode == 0 and not run.stderr
    assert [re.sub(r"\d+ s$", "_ s", line) for line in run.stdout.splitlines()] == [
        "setup: Python 3.12 in .venv ... _ s",
        "setup: the packages of requirements.lock ... _ s",
        "setup: fp8x, editable ... _ s",
        "setup: the compiler for Hopper in .venv/cuda-compiler ... _ s",
    ]


@pytest.mark.parametrize(
    ("fails", "advice"),
    [
        ("venv", "no Python 3.12 was found, or downloaded: install it, or name one by UV_PYTHON="),
        ("pip sync", "is PyPI, or the index that UV_INDEX_URL names, reached from here?"),
        ("pip install --python .venv --target", "is PyPI, or the index"),
    ],
)
def test_says_what_to_do(tmp_path, fails, advice):
    run = setup(tmp_path, fails, "compile")
    assert run.returncode == 1
    assert "what uv says" in run.stderr and f"setup: {advice}" in run.stderr
