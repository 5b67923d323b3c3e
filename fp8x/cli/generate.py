"""`fp8x generate`."""

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp8x.cli import options, terminal
from fp8x.cli.loading import load, load_tokenizer, read_config, set_context
from fp8x.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fp8x.models import Decoder

CONTEXT = 8  # tokens


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face directory, quantized or not.")],
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="What the text begins with; several are one batch.")
    ],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, max=1_000_000, metavar="N", help="Tokens to add.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", min=0.0, metavar="X", help="0: the likeliest token.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Draw among the k likeliest tokens only.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, metavar="P", help="Draw among the fewest tokens with this probability in all."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, metavar="P", help="Draw among tokens at least P as likely as the likeliest."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Draws the tokens, at a temperature above 0.")
    ] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End with the token that completes this. Repeatable.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt to the model's chat template.")] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="With --chat: what the model is told before.")
    ] = None,
    cache_dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Keys and values in 8 bits: e4m3 or e5m2; or in bf16, f16, f32.")
    ] = None,
    context: options.Context = None,
    mesh: options.MeshText = None,
    allow_nonfinite: options.AllowNonfinite = False,
    as_json: options.AsJson = False,
) -> None:
    """Continue a text, or several.

    $ fp8x generate MODEL-fp8 "A function that" --max-new-tokens 40 --temperature 0.8 --seed 1\n
    $ fp8x generate MODEL-fp8 "What is a monad?" --chat --top-p 0.9 -t 0.7 --cache-dtype e4m3\n
    $ fp8x generate MODEL-fp8 "def add(" "def sub(" --stop "def " --json\n
    $ fp8x generate MODEL-fp8 "A function that" --mesh tensor=4,expert=2
    """
    for name, text in (("prompt", "".join(prompts)), ("--stop", "".join(stop or [])), ("--system", system or "")):
        if text != text.encode(errors="replace").decode():
            raise DataError(f"{name}: it is not UTF-8")
    if system is not None and not chat:
        raise DataError("--system: is a message of a chat; add --chat")
    devices = options.parse_mesh(mesh)
    tokenizer = load_tokenizer(checkpoint)
    ids = [_encode(checkpoint, tokenizer, prompt, system, chat) for prompt in prompts]
    from fp8x.models import stream
    from fp8x.models.inputs import check_length, check_tokens
    from fp8x.programs import kept_programs

    config = read_config(checkpoint)
    check_tokens(f"{checkpoint}/tokenizer.json", itertools.chain(*ids), tokenizer, config.vocab_size)
    check_length(max(map(len, ids)), max_new_tokens, context or config.context)
    with kept_programs():
        model = load(checkpoint, allow_nonfinite=allow_nonfinite, mesh=devices)
        set_context(model, checkpoint, context)
        ends = _ends(checkpoint, model)
        start = time.monotonic()
        columns = stream(
            model,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            eos_id=ends,
            stop_strings=stop,
            tokenizer=tokenizer,
            cache_dtype=cache_dtype,
        )
        texts = [Text(tokenizer, each, ends, stop or [], model.config.vocab_size) for each in ids]
        is_live = len(prompts) == 1 and not as_json
        with terminal.progress("generating") as update:
            for done, column in enumerate(columns, 1):
                for text, token in zip(texts, column.tolist(), strict=True):
                    text.add(token)
                update(done, max_new_tokens)
                if is_live:  # the first token takes the longest: XLA compiles
                    break
        openings = [""] * len(prompts) if chat else prompts
        if is_live:
            typer.echo(openings[0] + texts[0].new_words(), nl=False)
            for (token,) in columns:
                texts[0].add(int(token))
                typer.echo(texts[0].new_words(), nl=False)
            return typer.echo(texts[0].new_words(is_last=True))
        seconds = round(time.monotonic() - start, 2)
        found = [
            {"prompt": prompt, "text": text.new_words(is_last=True), "ids": text.new, "seconds": seconds}
            for prompt, text in zip(prompts, texts)
        ]
        if as_json:
            return terminal.show_json(found if len(found) > 1 else found[0])
        for opening, each in zip(openings, found):
            typer.echo(opening + each["text"])


class Text:
    """A text that grows: its ids, without the end token, and its words."""

    def __init__(
        self, tokenizer: "Tokenizer", ids: list[int], ends: Sequence[int], stop_strings: list[str], vocab_size: int
    ):
        from fp8x.models.stop import Stops

        self.tokenizer, self.ids, self.ends = tokenizer, [*ids], ends
        self._strings, self._tail = [string.encode() for string in stop_strings], b""
        self._stops = Stops.of(stop_strings, tokenizer, vocab_size) if stop_strings else None
        self.is_done, self._start, self._shown = False, len(ids), len(ids)

    @property
    def new(self) -> list[int]:
        return self.ids[self._start :]

    def add(self, token: int) -> None:
        """Adds a token, unless the text has ended."""
        self.is_done = self.is_done or token in self.ends
        if self.is_done:
            return
        self.ids.append(token)
        if self._stops is not None:  # as in the compiled loop, which goes on for other texts
            read = self._tail + self._stops.bytes_of(token)
            self.is_done = any(string in read for string in self._strings)
            self._tail = read[-max(map(len, self._strings)) :]

    def new_words(self, is_last: bool = False) -> str:
        """What has come since the last call. A character that lacks bytes waits for them, unless this is the last."""
        # Decoders drop the space before the first word, so some tokens go before.
        context = self.ids[max(0, self._shown - CONTEXT) : self._shown]
        words = self.tokenizer.decode(context + self.ids[self._shown :])[len(self.tokenizer.decode(context)) :]
        if words.endswith("\N{REPLACEMENT CHARACTER}") and not is_last:
            return ""
        self._shown = len(self.ids)
        return words


def _encode(checkpoint: Path, tokenizer: "Tokenizer", prompt: str, system: str | None, chat: bool) -> list[int]:
    if not prompt.strip():
        raise DataError("prompt: it is empty; give the text to continue")
    if chat:
        from fp8x.models import apply_chat_template

        messages = [] if system is None else [{"role": "system", "content": system}]
        prompt = apply_chat_template(checkpoint, [*messages, {"role": "user", "content": prompt}])
    # The template has written the special tokens.
    ids = tokenizer.encode(prompt, add_special_tokens=not chat).ids
    if not ids:
        raise DataError("prompt: it is empty; give the text to continue")
    return ids


def _ends(checkpoint: Path, model: "Decoder") -> Sequence[int]:
    """The tokens that end a text. As in transformers, generation_config.json goes before config.json: of chats it alone
    has the token that ends a turn."""
    file = checkpoint / "generation_config.json"
    try:
        ends = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    except (ValueError, AttributeError):
        raise CheckpointError(f"{file}: is no JSON object") from None
    if ends is None:
        return model.config.eos_token_id
    return ends if isinstance(ends, list) else [ends]
