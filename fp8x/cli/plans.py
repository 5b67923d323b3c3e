"""What `fp8x quantize` says of a plan: all of it before the work, and what is unlike the rest after it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8x.cli import terminal
from fp8x.errors import few

if TYPE_CHECKING:
    from rich.table import Table

    from fp8x.checkpoint.plan import Plan, Row

LARGE = 0.1  # of a model's bytes, from which on a share is said
MOST = 8  # names of a kind, before the rest is a number


def show(plan: "Plan", source: Path, destination: Path, as_json: bool) -> None:
    """Everything that a plan says, and how long it will take."""
    from fp8x.checkpoint.estimate import estimate

    expected = estimate(plan, destination)
    requantized = plan.requantization and plan.requantization.to_json()
    if as_json:
        found = {"expected_seconds": round(expected.seconds, 1), "expected_limit": expected.limit}
        return terminal.show_json(plan.to_json() | {"requantized": requantized} | found)
    table = terminal.table(
        "tensors", "count", "shape", "from", "to", "before", "after", "why", left=("from", "to", "why")
    )
    for row in plan.groups:
        to = "left out" if row.after is None else str(row.after)
        sizes = terminal.size(row.bytes_before), terminal.size(row.bytes_after)
        shape = "×".join(map(str, row.shape)) or "1"
        table.add_row(row.name, str(row.count), shape, str(row.before or "–"), to, *sizes, row.reason or "")
    table.add_section()
    sizes = terminal.size(plan.bytes_before), terminal.size(plan.bytes_after)
    table.add_row("all", str(len(plan.rows)), "", "", "", *sizes, "")
    format = plan.format.name if plan.format else "unquantized"
    seconds = max(expected.seconds, 1)
    time = f"about {seconds:.0f} s after JAX has started, {expected.limit} slowest"
    line = f"format {format}; nothing is written yet; {time}"
    chosen = [choices(requantized)] if requantized else []
    terminal.show(f"{source} → {destination}", *chosen, table, *_beside(plan), line)


def show_exceptions(plan: "Plan") -> None:
    """What stays in 16 bits where a matrix could be in 8, and what is left out, each with the reason."""
    reasons: dict[str, list[Row]] = {}
    for row in plan.groups:
        if row.after is None:
            reasons.setdefault(f"left out ({row.reason})", []).append(row)
        elif row.reason and len(row.shape) > 1 and plan.format is not None:
            reasons.setdefault(f"in {row.after} ({row.reason})", []).append(row)
    lines = []
    for reason, rows in reasons.items():
        share = sum(row.bytes_before for row in rows) / max(plan.bytes_before, 1)
        of_all = f", {share:.0%} of all bytes" if share >= LARGE else ""
        lines.append(f"{reason}{of_all}: {few([row.name for row in rows], MOST)}")
    terminal.show(*lines, *_beside(plan))


def choices(modules: dict[str, Any]) -> "Table":
    """A row for each recipe that was chosen: for how many modules, and the most error that it and the best other of
    them add."""
    table = terminal.table("requantized to", "modules", "lowest SNR", "next best")
    for recipe in dict.fromkeys(found["recipe"] for found in modules.values()):
        mine = [found for found in modules.values() if found["recipe"] == recipe]
        others = [max(found["others_snr_db"].values()) for found in mine if found["others_snr_db"]]
        lowest = min(found["snr_db"] for found in mine)
        table.add_row(recipe, str(len(mine)), *map(terminal.decibels, (lowest, min(others, default=None))))
    return table


def _beside(plan: "Plan") -> list[str]:
    """Lines on fields and files."""
    lines = [f"field left out: {field} ({reason})" for field, reason in plan.left_fields.items()]
    reasons: dict[str, list[str]] = {}
    for file, reason in plan.companions.left.items():
        reasons.setdefault(reason, []).append(file)
    return lines + [f"files left behind ({reason}): {few(files, MOST)}" for reason, files in reasons.items()]
