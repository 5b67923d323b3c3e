"""`fp8x recipes`."""

from fp8x.cli import options, terminal


def recipes(as_json: options.AsJson = False) -> None:
    """List the recipes: what each code does with weights and activations.

    $ fp8x recipes
    """
    from fp8x.recipe import RECIPES

    rows = {
        code: {
            "weights": str(recipe.weight),
            "activations": "16 bits" if recipe.activation is None else str(recipe.activation),
            "activation_scale": recipe.activation_scale,
            "output": str(recipe.out_dtype),
            "needs_calibration": options.needs_calibration(recipe),
        }
        for code, recipe in RECIPES.items()
        if recipe.observer is None
    }
    if as_json:
        return terminal.show_json(rows)
    words = ("weights", "activations", "activation scale", "output")
    table = terminal.table("code", *words, left=words)
    for code, row in rows.items():
        scale = "calibrated" if row["needs_calibration"] else row["activation_scale"] or "–"
        table.add_row(code, row["weights"], row["activations"], scale, row["output"])
    terminal.show(
        table,
        "Weights [N, K], activations [M, K]: element, block of one scale (· is the whole dim), scale type.\n"
        "Codes that end in _max_calibrate are accepted too and mean the same. 'calibrated' needs --calibrate DATA.",
    )
