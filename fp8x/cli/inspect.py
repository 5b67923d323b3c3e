"""`fp8x inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp8x import interrupt
from fp8x.cli import options, terminal

if TYPE_CHECKING:
    from fp8x.checkpoint.inspect import Inspection, TensorRow


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face directory, quantized or not.")],
    reference: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The bf16 checkpoint it was made from: gives the SNR.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", metavar="CODE", help="For a bf16 checkpoint: show what this recipe would give."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw SNR and amax of every matrix, layer by layer.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="A row for every expert, not one for all of a layer.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Show what a checkpoint holds: scheme, shape, bytes, amax and SNR of every tensor.

    $ fp8x inspect MODEL-fp8 --reference MODEL --plot snr.png\n
    $ fp8x inspect MODEL --recipe mxfp8_bf16

    SNR is 10 log10(Σ w² / Σ (w - ŵ)²) in dB, against the bf16 weights w: 6 dB more is half the error. --json has a row
    for every tensor.
    """
    from fp8x.checkpoint import inspect as module

    if plot is not None:
        terminal.check_file("--plot", plot)
    chosen = None if recipe is None else options.parse_recipe(recipe)
    with terminal.progress(f"reading {checkpoint.name}", unit="bytes") as update:
        found = module.inspect(checkpoint, reference=reference, recipe=chosen, progress=update)
    if plot is not None:
        from fp8x.cli import plots

        title = f"{checkpoint.absolute().name}, {recipe or found.format or 'not quantized'}"
        with interrupt.shielded():
            plots.draw(found.rows, title, plot)
    for row in found.rows:
        if row.nonfinite:
            terminal.warn(f"{row.name}: {row.nonfinite:,} of {row.size:,} values are NaN or Inf")
    if as_json:
        rows = [_as_dict(row) for row in found.rows]
        exactness = found.exactness and found.exactness.to_json()
        summary = {"format": found.format, "bytes": found.bytes, "exactness": exactness, "tensors": rows}
        return terminal.show_json(summary)
    _show(found, found.rows if every else module.merge_experts(found.rows), checkpoint, recipe)
    if plot is not None:
        terminal.show(f"wrote {plot}")


def _as_dict(row: "TensorRow") -> dict[str, Any]:
    return {
        "name": row.name,
        "scheme": row.stored_as,
        "quantized": row.is_quantized,
        "shape": row.shape,
        "bytes": row.bytes,
        "amax": row.amax,
        "snr_db": row.snr,
        "nonfinite": row.nonfinite,
        "differing": row.differing,
        "blocks": row.blocks,
        "exact_blocks": row.exact_blocks,
    }


def _show(found: "Inspection", rows: "list[TensorRow]", checkpoint: Path, recipe: str | None) -> None:
    what = found.format or (f"not quantized; in {recipe} it would be:" if recipe else "not quantized")
    table = terminal.table("tensor", "scheme", "shape", "bytes", "amax", "SNR", left=("scheme",))
    for row in rows:
        name = row.name.removeprefix("model.").removesuffix(".weight")
        shape = "×".join(map(str, row.shape))
        amax = "–" if row.amax is None else f"{row.amax:.4g}"
        table.add_row(name, row.stored_as, shape, terminal.size(row.bytes), amax, terminal.decibels(row.snr))
    table.add_section()
    values = sum(row.size for row in rows)
    per_value = f"{8 * found.bytes / values:.2f} bits a value"
    table.add_row("all", per_value, f"{values:,}", terminal.size(found.bytes), "", terminal.decibels(found.mean_snr))
    terminal.show(f"{checkpoint}: {what}", table, *_notes(found))


def _notes(found: "Inspection") -> list[str]:
    """What is the same, and why an SNR is missing."""
    if found.mean_snr is not None:
        exactness = [] if found.exactness is None else [str(found.exactness)]
        return [
            *exactness,
            "The last row's SNR is the mean over quantized tensors with an error; – is exact: not quantized.",
        ]
    if found.format is not None:
        return ["No SNR: it needs the weights before quantization; pass --reference BF16_DIR."]
    return ["No SNR: nothing is quantized; --recipe CODE shows what a recipe would give."]
