"""Arguments and options that several commands take, and the words that the user wrote turned into recipes and rules."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp8x.errors import MeshError, RecipeError, RuleError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from fp8x.recipe import Recipe

RecipeCode = Annotated[str, typer.Option("--recipe", "-r", metavar="CODE", help="A recipe; `fp8x recipes` lists them.")]
Rule = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        metavar="REGEX=CODE",
        help="Another recipe, or `none`, where a module's whole path or name in SRC matches. Repeatable: the "
        "first match wins.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Draws the order of the documents, and pieces of long ones.")]
NumSamples = Annotated[int, typer.Option(min=1, metavar="N", help="Rows of tokens to calibrate on.")]
MaxLength = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Tokens a row; by default the model's context, 2048 at most.")
]
Context = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Tokens that the model may read; by default what its config.json says."),
]
DocumentRows = Annotated[
    int, typer.Option(min=1, metavar="N", help="Rows that one document fills at most, while there are others.")
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Rows at a time.")]
MinTokens = Annotated[int, typer.Option(min=0, metavar="N", help="Name the experts that saw fewer tokens.")]
MeshText = Annotated[
    str | None,
    typer.Option("--mesh", metavar="AXIS=N,...", help="Devices by axis: data, tensor, expert, like data=2,tensor=4."),
]
MethodName = Annotated[
    str,
    typer.Option("--method", metavar="NAME", help="How scales follow from what layers see: max, percentile or mse."),
]
Percentile = Annotated[
    float, typer.Option(metavar="P", help="For --method percentile: the share of values, in %, that is not clipped.")
]
KVCache = Annotated[
    str | None,
    typer.Option("--kv-cache", metavar="KIND", help="Keys and values in e4m3 too, with a scale a `tensor` or `head`."),
]
ListMalformed = Annotated[
    bool, typer.Option("--list-malformed", help="Name every malformed line of the data, not the first ten alone.")
]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Accept weights that hold NaN or Inf.")]

NUM_SAMPLES, DOCUMENT_ROWS, BATCH_SIZE, MIN_TOKENS = 256, 1, 8, 64
METHOD, PERCENTILE = "max", 99.99
DATA_HELP = "JSONL with `text`, chat `messages`, ShareGPT `conversations` or token `ids`; also in gzip or Zstandard."


def parse_recipe(code: str) -> "Recipe":
    """The recipe with a code. A `…_max_calibrate` one is the same recipe: whether there is data decides on calibration.

    Raises:
        RecipeError: an unknown code.
    """
    from fp8x.recipe import recipe

    return dataclasses.replace(recipe(code), observer=None)


def parse_rules(rules: list[str] | None) -> dict[str, "Recipe | None"]:
    """`REGEX=CODE` and `REGEX=none`, in their order.

    Raises:
        RuleError: a rule without `=`.
        RecipeError: an unknown code.
    """
    parsed = {}
    for rule in rules or []:
        # Codes have no "=", a regular expression may.
        pattern, equals, code = rule.rpartition("=")
        if not equals or not pattern:
            raise RuleError(rf"--rule {rule!r}: expected REGEX=CODE or REGEX=none, like 'layers\.0\..*=none'")
        try:
            parsed[pattern] = None if code.lower() == "none" else parse_recipe(code)
        except RecipeError as error:
            raise RecipeError(f"--rule {rule!r}: {error}; none leaves what it names in 16 bits") from None
    return parsed


MESH_AXES = ("data", "tensor", "expert")


def parse_mesh(text: str | None) -> "Mesh | None":
    """`data=2,tensor=4` as a mesh of the first 8 devices, in that order; None for None.

    Raises:
        MeshError: text that is no list of axes and sizes, an unknown axis, or more devices than there are.
    """
    if text is None:
        return None
    import jax

    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = (word.strip() for word in part.partition("="))
        if axis not in MESH_AXES:
            raise MeshError(
                f"--mesh {text}: axis {axis!r} is unknown; use {', '.join(MESH_AXES)}, like data=2,tensor=4"
            )
        if axis in sizes:
            raise MeshError(f"--mesh {text}: axis {axis!r} comes twice; name each once")
        if not (equals and size.isdecimal() and int(size)):
            raise MeshError(f"--mesh {text}: the size of axis {axis!r} is {size!r}; use a positive number")
        sizes[axis] = int(size)
    needed, devices = math.prod(sizes.values()), jax.devices()
    if needed > len(devices):
        hint = ""
        if devices[0].platform == "cpu":
            hint = f" (on a machine without GPUs run with JAX_NUM_CPU_DEVICES={needed}, which splits the CPU)"
        raise MeshError(f"--mesh {text}: needs {needed} devices, but there are {len(devices)}{hint}")
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), auto, devices=devices[:needed])


def check_kv_cache(kind: str | None, *others: str) -> None:
    """
    Raises:
        RecipeError: an unknown kind of scales.
    """
    from fp8x.scheme import KV_SCHEMES

    fits = (*others, *KV_SCHEMES)
    if kind is not None and kind not in fits:
        raise RecipeError(f"--kv-cache {kind}: is unknown; use {', '.join(fits)}")


def needs_calibration(recipe: "Recipe | None") -> bool:
    """Whether a layer's static activation scale comes from data; a bare cast's is 1."""
    return recipe is not None and recipe.needs_calibration


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What to calibrate on, and how."""

    data: Path
    num_samples: int
    max_length: int | None
    batch_size: int
    seed: int
    method: str = METHOD
    percentile: float = PERCENTILE
    mesh: "Mesh | None" = None
    kv_cache: str | None = None
    kv_cache_only: bool = False
    context: int | None = None
    document_rows: int = DOCUMENT_ROWS
    list_malformed: bool = False
