"""The chat template of a checkpoint: messages as the text that the model was trained to read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fp8x.checkpoint.downloads import check_file
from fp8x.errors import CheckpointError, DataError

SPECIAL_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def apply_chat_template(
    path: str | Path, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
) -> str:
    """Messages as text, special tokens and all; encode it with `add_special_tokens=False`.

    Arguments:
        path: a checkpoint's directory, with chat_template.jinja, or a `chat_template` in tokenizer_config.json.
        messages: such as `[{"role": "user", "content": "Why?"}]`.
        add_generation_prompt: ends with what stands before an answer.

    Raises:
        CheckpointError: there is no template, or one that can't be read or does not take these messages.
        DataError: messages that are no list of objects.
    """
    path = Path(path)
    try:
        # Plain data: a method of anything else would be in the template's reach.
        plain = json.loads(json.dumps(list(messages)))
    except (TypeError, ValueError) as error:
        raise DataError(f"messages: {error}; use text, numbers, lists and dicts") from None
    if not plain or not all(isinstance(message, dict) for message in plain):
        raise DataError(f"messages: {messages!r} does not fit; give at least one, like {{'role': …, 'content': …}}")
    # As in transformers: templates that know no None would write the word.
    plain = [{name: value for name, value in message.items() if value is not None} for message in plain]
    config = _read_config(path / "tokenizer_config.json")
    source, template = _find_template(path, config)
    named = _read_config(path / "special_tokens_map.json") | config  # older checkpoints name them there alone
    tokens = {name: _content(named[name]) for name in SPECIAL_TOKENS if named.get(name) is not None}
    # Late: importing Jinja takes a fifth of a second, which only chats need.
    from fp8x.models.chat_sandbox import environment

    try:
        return (
            environment()
            .from_string(template)
            .render(messages=plain, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **tokens)
        )
    except Exception as error:  # whatever a program may raise
        raise CheckpointError(f"{source}: its chat template fails on these messages: {error}") from None


def _read_text(file: Path) -> str:
    check_file(file)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: is not UTF-8: {error}") from None


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: holds a {type(config).__name__}, but should be an object")
    return config


def _find_template(path: Path, config: dict[str, Any]) -> tuple[Path, str]:
    """The template, and the file that it is from."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file, _read_text(file)
    file, template = path / "tokenizer_config.json", config.get("chat_template")
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        if "default" not in named:
            raise CheckpointError(f"{file}: has chat templates {sorted(map(str, named))}, but none is named 'default'")
        template = named["default"]
    if not isinstance(template, str):
        raise CheckpointError(
            f"{path}: has no chat template, neither chat_template.jinja nor chat_template in tokenizer_config.json; "
            "copy it from the original checkpoint, or write the prompt as the model takes it"
        )
    return file, template


def _content(token: str | dict[str, Any]) -> str:
    """A special token's text; older files describe it by an object."""
    return str(token["content"] if isinstance(token, dict) and "content" in token else token)
