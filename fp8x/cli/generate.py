"""`fp8x generate`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from fp8x.cli import options, terminal
from fp8x.cli.loading import load, load_tokenizer


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face directory, quantized or not.")],
    prompt: Annotated[str, typer.Argument(help="What the text begins with.")],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, max=1_000_000, metavar="N", help="Tokens to add.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", min=0.0, metavar="X", help="0: the likeliest token.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Draw among the k likeliest tokens only.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Draws the tokens, at a temperature above 0.")
    ] = 0,
    mesh: options.MeshText = None,
    as_json: options.AsJson = False,
) -> None:
    """Continue a text.

    $ fp8x generate MODEL-fp8 "A function that" --max-new-tokens 40 --temperature 0.8 --seed 1\n
    $ fp8x generate MODEL-fp8 "A function that" --mesh tensor=4,expert=2
    """
    import numpy as np

    from fp8x.errors import DataError
    from fp8x.models.generate import generate as run

    if prompt != prompt.encode(errors="replace").decode():
        raise DataError("prompt: it is not UTF-8")
    devices = options.parse_mesh(mesh)
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode(prompt).ids if prompt.strip() else []
    if not ids:
        raise DataError("prompt: it is empty; give the text to continue")
    model = load(checkpoint, mesh=devices)
    if max(ids) >= model.config.vocab_size:
        raise DataError(
            f"{checkpoint}/tokenizer.json: gives id {max(ids)}, beyond the model's vocab_size {model.config.vocab_size}"
        )
    start = time.monotonic()
    with terminal.progress("generating"):
        found = run(
            model,
            np.array([ids], np.int32),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            eos_id=model.config.eos_token_id,
            seed=seed,
        )
        new = np.asarray(found)[0, len(ids) :].tolist()
    seconds = time.monotonic() - start
    for end in model.config.eos_token_id:
        new = new[: new.index(end)] if end in new else new
    text = tokenizer.decode(new)
    if as_json:
        return terminal.show_json({"prompt": prompt, "text": text, "ids": new, "seconds": round(seconds, 2)})
    typer.echo(prompt + text)
