"""Lists of module names in a config: short ones out, and what others wrote matched.

A model has tens of thousands of experts' matrices, so a name is looked up in sets; only patterns are tried in turn.
"""

import fnmatch
import functools
import re
from collections.abc import Callable, Collection, Iterable

from fp8x.errors import CheckpointError

Matcher = Callable[[str], bool]

_PLAIN = re.compile(r"[\w.-]*")


def patterns(names: Iterable[str], others: Collection[str]) -> list[str]:
    """compressed-tensors targets that match all of `names` and none of `others`.

    A model has thousands of experts: a name becomes a `re:` pattern over all layers and experts, or over the experts of
    its layer, where no other name matches; else it stays itself.
    """
    taken = {pattern for other in others for pattern in _generalized(other)}
    return list(dict.fromkeys(_shortest(name, taken) for name in names))


def _shortest(name: str, taken: Collection[str]) -> str:
    return next((f"re:{pattern}" for pattern in _generalized(name) if pattern not in taken), name)


def _generalized(name: str) -> list[str]:
    """Patterns with any number for every number of a name, and for its last. Two names share one that matches both."""
    parts = [_escaped(part) for part in name.split(".")]
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return [
        r"\.".join(r"\d+" if index in indices else part for index, part in enumerate(parts)) + "$"
        for indices in (numbers, numbers[-1:])
        if indices
    ]


_escaped = functools.lru_cache(10_000)(re.escape)


def listed(entries: Iterable[str]) -> Matcher:
    """What a `modules_to_not_convert` names: whole components of a module's name, like a parent or a suffix ("lm_head",
    "mlp.gate", "model.layers.0", "self_attn"), or a pattern from its start (shell wildcards, if it is no pattern).

    transformers also takes any string that the name ends with; "gate" would then mean "expert_gate", so we do not.
    """
    entries = list(entries)
    regexes = [_from_start(entry) for entry in entries if not _PLAIN.fullmatch(entry)]
    has_components = _components(entry for entry in entries if _PLAIN.fullmatch(entry))
    return lambda name: has_components(name) or any(regex.match(name) for regex in regexes)


def wildcards(entries: Iterable[str]) -> Matcher:
    """What an `exclude_modules` names: shell wildcards for a whole name, as ModelOpt writes and vLLM reads them
    ("lm_head", "model.layers.0*", "*.mlp.gate"), or whole components of it.

    vLLM also takes any part of a name; "layers.1" would then mean "layers.10", so we do not.
    """
    entries = list(entries)
    regexes = [re.compile(fnmatch.translate(entry)) for entry in entries if not _PLAIN.fullmatch(entry)]
    has_components = _components(entry for entry in entries if _PLAIN.fullmatch(entry))
    return lambda name: has_components(name) or any(regex.match(name) for regex in regexes)


def whole_names(entries: Iterable[str]) -> Matcher:
    """What Quark's `exclude` names: shell wildcards for a whole name ("lm_head", "*.mlp.gate"), or a `re:` pattern from
    its start, which vLLM alone knows.

    Raises:
        CheckpointError: a pattern that is none.
    """
    entries = list(entries)
    exact = {entry for entry in entries if _PLAIN.fullmatch(entry)}
    regexes = [
        _compiled(entry) if entry.startswith("re:") else re.compile(fnmatch.translate(entry))
        for entry in entries
        if entry not in exact
    ]
    return lambda name: name in exact or any(regex.match(name) for regex in regexes)


def first_target(targets: Iterable[str], everything: str) -> Callable[[str], str | None]:
    """Which compressed-tensors target a name has: the name itself, then a `re:` pattern for its start, then the class
    name `everything`, as the library orders them (`match_targets`); None without any.

    Raises:
        CheckpointError: a pattern that is none.
    """
    targets = sorted(targets)
    exact = set(targets)
    regexes = [(target, _compiled(target)) for target in targets if target.startswith("re:")]
    default = everything if everything in exact else None

    def find(name: str) -> str | None:
        if name in exact:
            return name
        return next((target for target, regex in regexes if regex.match(name)), default)

    return find


def _components(entries: Iterable[str]) -> Matcher:
    """Whether a name has one of `entries` between dots, or its ends."""
    known = {entry.strip(".") for entry in entries} - {""}
    lengths = {entry.count(".") + 1 for entry in known}

    def match(name: str) -> bool:
        parts = name.split(".")
        return any(
            ".".join(parts[start : start + length]) in known
            for length in lengths
            for start in range(len(parts) - length + 1)
        )

    return match


def _from_start(entry: str) -> re.Pattern:
    try:
        return re.compile(rf"(?:{entry.removeprefix('re:')})(?=\.|$)")
    except re.error:
        return re.compile(fnmatch.translate(entry))


def _compiled(target: str) -> re.Pattern:
    try:
        return re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise CheckpointError(f"config.json: quantization_config: {target!r} is no pattern: {error}") from None


def natural(name: str) -> list[tuple[bool, int | str]]:
    """A sort key that puts layer 10 after layer 9."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in re.split(r"(\d+)", name)]
