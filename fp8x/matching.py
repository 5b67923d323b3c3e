"""Which modules a rule reaches: by their path in the model, by their names in a checkpoint, or by a parameter's."""

import difflib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence

from fp8x.errors import RuleError, few

# A module's further names, each of which names all of its matrices.
Names = Mapping[str, Sequence[Sequence[str]]]

_PARAMETERS = (".weight", ".kernel", ".embedding")  # as reports and files have them behind a module's name


def reached(pattern: str, paths: Sequence[str], names: Names, others: Mapping[str, str]) -> set[str]:
    """The paths that a rule reaches.

    A pattern has to match the whole path of a module, or the names of its matrices. What matches the names of some of
    them, as of an expert, reaches the module with a warning. Where nothing matches, names of parameters are tried.

    Arguments:
        pattern: a regular expression; `re:` before it, as compressed-tensors writes it, means nothing.
        paths: of the modules.
        names: by path, in a checkpoint.
        others: what else there is, with the reason why nothing in it can be quantized.

    Raises:
        RuleError: no regular expression, or one that reaches nothing.
    """
    try:
        regex = re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise RuleError(f"rules: {pattern!r} is not a regular expression: {error}; '.*' stands for any text") from None
    for suffixes in ("",), _PARAMETERS:
        whole, parts = _reached(regex, suffixes, paths, names)
        if parts:
            path, name = next(iter(parts.items()))
            more = f", and {len(parts) - 1} more layers" if len(parts) > 1 else ""
            warnings.warn(
                f"rules: {pattern!r} matches {name}, which is one layer with other matrices: it reaches all of "
                f"{path}{more}",
                stacklevel=5,
            )
        if whole or parts:
            return whole | set(parts)
    raise RuleError(f"rules: {pattern!r} " + _why_none(pattern, regex, paths, names, others))


def _reached(
    regex: re.Pattern, suffixes: Sequence[str], paths: Sequence[str], names: Names
) -> tuple[set[str], dict[str, str]]:
    """The paths that match as a whole; and those of which some matrices do, with one of these."""

    def match(name: str) -> bool:
        return any(regex.fullmatch(name + suffix) for suffix in suffixes)

    whole, parts = set(), {}
    for path in paths:
        if match(path):
            whole.add(path)
            continue
        for each in names.get(path, ()):
            matched = [name for name in each if match(name)]
            if len(matched) == len(each):
                whole.add(path)
            elif matched:
                parts.setdefault(path, matched[0])
    return whole, {path: name for path, name in parts.items() if path not in whole}


def _why_none(pattern: str, regex: re.Pattern, paths: Sequence[str], names: Names, others: Mapping[str, str]) -> str:
    """Why a pattern reaches nothing: what it matches holds no matrix, or it matches nothing."""
    held: dict[str, list[str]] = {}
    for path in paths:
        for name in {path, *(name for each in names.get(path, ()) for name in each)}:
            for module in _above(name):
                if regex.fullmatch(module):
                    held.setdefault(module, []).append(name)
    if held:
        module, inside = next(iter(held.items()))
        return (
            f"matches {few(list(held), 3)} alone, which can't be quantized as a whole: it holds {few(inside, 3)}; "
            f"{pattern + r'\..*'!r} matches what it holds"
        )
    others = {f"{path}.bias": "a bias, which stays as it is" for path in paths} | dict(others)
    if alone := [name for name in others if any(regex.fullmatch(each) for each in _forms(name))]:
        reasons = dict.fromkeys(others[name] for name in alone)
        return f"matches {few(alone, 3)} alone, where nothing can be quantized: {'; '.join(list(reasons)[:4])}"
    near = difflib.get_close_matches(pattern.replace("\\", ""), dict.fromkeys(paths), n=3, cutoff=0.0)
    return "matches no module (the whole path has to match); " + (
        f"near it: {', '.join(near)}" if near else "the model has no module that can be quantized"
    )


def _above(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _forms(name: str) -> list[str]:
    """What else a name is written as."""
    bare = name.removeprefix("model.")
    return [f"{each}{suffix}" for each in (bare, f"model.{bare}") for suffix in ("", ".scale", *_PARAMETERS)]
