"""The `fp8x` command: one file a command. Each imports what is slow (jax, flax) when it runs, so that help is quick."""

from typing import Annotated

import typer

from fp8x.cli import bench, calibrate, evaluate, generate, inspect, quantize, recipes
from fp8x.cli.terminal import command
from fp8x.version import __version__

app = typer.Typer(
    name="fp8x",
    help="""FP8 for Flax: quantize, calibrate, evaluate and run Hugging Face checkpoints.

    Llama, Mistral, Mixtral, Qwen, DeepSeek and GLM are run; any is quantized.

    A model's way, from bf16 to text:

    $ fp8x quantize MODEL MODEL-fp8 --recipe e4m3_e4m3_bf16 --calibrate texts.jsonl\n
    $ fp8x eval MODEL MODEL-fp8 --data heldout.jsonl\n
    $ fp8x inspect MODEL-fp8 --reference MODEL\n
    $ fp8x generate MODEL-fp8 "Once upon a time"
    """,
    no_args_is_help=True,
    rich_markup_mode=None,  # its modules take longer than all else that help needs
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    pretty_exceptions_show_locals=False,
)

app.command("quantize", no_args_is_help=True)(command(quantize.quantize))
app.command("calibrate", no_args_is_help=True)(command(calibrate.calibrate))
app.command("eval", no_args_is_help=True)(command(evaluate.evaluate))
app.command("generate", no_args_is_help=True)(command(generate.generate))
app.command("inspect", no_args_is_help=True)(command(inspect.inspect))
app.command("recipes")(command(recipes.recipes))

benchmarks = typer.Typer(help="Measure products on this device, and tune kernels for it.", no_args_is_help=True)
benchmarks.command("grouped", no_args_is_help=True)(command(bench.grouped))
app.add_typer(benchmarks, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fp8x {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
