"""Arguments and options that several commands take, and the words that the user wrote turned into recipes and rules."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp8x.errors import RuleError

if TYPE_CHECKING:
    from fp8x.recipe import Recipe

RecipeCode = Annotated[str, typer.Option("--recipe", "-r", metavar="CODE", help="A recipe; `fp8x recipes` lists them.")]
Rule = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        metavar="REGEX=CODE",
        help="Another recipe, or `none`, for the modules whose whole path matches. Repeatable: the first match wins.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Draws the order of the documents.")]
NumSamples = Annotated[int, typer.Option(min=1, metavar="N", help="Rows of tokens to calibrate on.")]
MaxLength = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Tokens a row; by default the model's context, 2048 at most.")
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Rows at a time.")]
MinTokens = Annotated[int, typer.Option(min=0, metavar="N", help="Name the experts that saw fewer tokens.")]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Accept weights that hold NaN or Inf.")]

NUM_SAMPLES, BATCH_SIZE, MIN_TOKENS = 256, 8, 64
DATA_HELP = "JSONL with `text`, chat `messages`, ShareGPT `conversations` or token `ids`."


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
        parsed[pattern] = None if code.lower() == "none" else parse_recipe(code)
    return parsed


def needs_calibration(recipe: "Recipe | None") -> bool:
    """Whether a layer's static activation scale comes from data; a bare cast's is 1."""
    return recipe is not None and recipe.is_static and recipe.activation.scale_rule != "unit"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What to calibrate on."""

    data: Path
    num_samples: int
    max_length: int | None
    batch_size: int
    seed: int
