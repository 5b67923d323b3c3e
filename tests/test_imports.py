"""What is loaded when: JAX and Flax take seconds, and most of what a user asks first needs neither."""

import subprocess
import sys
from pathlib import Path

import pytest

import fp8x
from fp8x.models import parts
from fp8x.ops import gate


def loaded(code: str) -> set[str]:
    """The packages that a fresh interpreter has loaded after `code`."""
    code += "\nimport sys; print('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.rpartition("loaded:")[2].split()}


TINY = str(Path(__file__).parents[1] / "examples" / "tiny_mixtral")
CLI = "from fp8x.cli import app\ntry:\n    app({})\nexcept SystemExit:\n    pass"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["quantize", "--help"], ["quantize", "SRC"]])
def test_nothing_but_typer(arguments):
    found = loaded(CLI.format(arguments))
    assert "typer" in found
    assert not found & {"jax", "flax", "numpy", "rich"}


@pytest.mark.parametrize(
    "code",
    [
        "import fp8x; fp8x.plan, fp8x.HOPPER",
        CLI.format(["recipes"]),
        CLI.format(["quantize", "missing", "made", "--recipe", "nonsense"]),
        CLI.format(["quantize", "missing", "made", "--recipe", "mxfp8_bf16"]),
        CLI.format(["quantize", TINY, "made", "--recipe", "mxfp8_bf16", "--dry-run"]),
    ],
)
def test_nothing_of_jax(code):
    assert not loaded(code) & {"jax", "flax"}


@pytest.mark.parametrize("code", ["fp8x.convert", "import fp8x.checkpoint.inspect"])
def test_nothing_of_flax(code):
    assert "flax" not in loaded(f"import fp8x; {code}")


def test_names_that_modules_have_too():
    # Whoever imports the modules first, the package's names are the functions.
    code = "import fp8x.calibrate.sidecar, fp8x.recipe, fp8x; print(fp8x.recipe('mxfp8_bf16').weight, fp8x.calibrate)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("e4m3 1×32 e8m0 <function calibrate at")


def test_every_public_name():
    assert all(getattr(fp8x, name) is not None for name in fp8x.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        fp8x.quantise  # noqa: B018


def test_activations_are_those_of_the_gate():
    assert tuple(gate.ACTIVATIONS) == parts.ACTIVATIONS
