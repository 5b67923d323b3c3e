"""`python -m fp8x`."""

from fp8x.cli import app

app(prog_name="fp8x")
