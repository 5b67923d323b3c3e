"""Lists of module names in a config: short ones out, and what others wrote matched.

A model has tens of thousands of experts' matrices, so a name is looked up in sets; only patterns are tried in turn.
"""

import bisect
import fnmatch
import functools
import re
from collections.abc import Callable, Collection, Iterable

from fp8x.errors import CheckpointError

Matcher = Callable[[str], bool]

_ROUTER = re.compile(r"gate|router|shared_expert_gate")
_PLAIN = re.compile(r"[\w.-]*")


def patterns(names: Iterable[str], others: Collection[str]) -> list[str]:
    """The fewest compressed-tensors targets that match all of `names` and none of `others`.

    Names that differ in numbers alone become one `re:` pattern: any number where none of `others` lies, else those that
    it is. Patterns that differ in the last part alone become one. The library warns of each target that matches no
    module of its model, and transformers 5 has no modules for single experts.

    Readers of models with towers give modules other names than the checkpoint: `visual.blocks.0` is `model.visual.…` in
    transformers 5, and `model.layers.0` is `language_model.model.…` in vLLM, which takes patterns as they are. So where
    modules lie in more than one place, a target matches behind any prefix, unless it would match one of `others` then.
    """
    names, others = list(names), list(others)
    wanted, unwanted = _by_template(names), _by_template(others)
    ends: dict[str, list[str]] = {}  # what stands before the last part -> the last parts
    for template, numbers in wanted.items():
        *parents, last = template
        where = _pattern(parents, numbers, unwanted.get(template, set()))
        ends.setdefault(where, []).append(r"\d+" if last is None else _escaped(last))
    targets = [_target(where, parts) for where, parts in ends.items()]
    if len({name.removeprefix("model.").partition(".")[0] for name in (*names, *others) if "." in name}) < 2:
        return targets
    return [_behind_any_prefix(target, others) for target in targets]


_OWN_PREFIX = re.compile(r"(model\\\.)?(language_model\\\.)?(model\\\.)?")


def _behind_any_prefix(target: str, others: Collection[str]) -> str:
    if "." not in target:  # such as `lm_head`
        return target
    pattern = target.removeprefix("re:") if target.startswith("re:") else rf"{re.escape(target)}$"
    loose = rf"(?:.*\.)?{pattern[_OWN_PREFIX.match(pattern).end() :]}"
    return target if any(map(re.compile(loose).match, others)) else f"re:{loose}"


_Numbers = tuple[str, ...]


def _by_template(names: Iterable[str]) -> dict[tuple[str | None, ...], set[_Numbers]]:
    """A name's parts, None in the place of numbers but at the end -> the numbers of all names like it."""
    found: dict[tuple[str | None, ...], set[_Numbers]] = {}
    for name in names:
        *parents, last = name.split(".")
        template = (*(None if part.isdecimal() else part for part in parents), last)
        found.setdefault(template, set()).add(tuple(part for part in parents if part.isdecimal()))
    return found


def _pattern(template: list[str | None], wanted: set[_Numbers], unwanted: set[_Numbers]) -> str:
    """A pattern for the parts of a template, each with a dot behind it."""
    if None not in template:
        return "".join(rf"{_escaped(part)}\." for part in template)
    first = template.index(None)
    inner, outer = _by_first(wanted), _by_first(unwanted)
    alike: dict[str, list[str]] = {}  # numbers after which all goes on in the same way
    for number, rest in inner.items():
        alike.setdefault(_pattern(template[first + 1 :], rest, outer.get(number, set())), []).append(number)
    if len(alike) == 1 and outer.keys() <= inner.keys():
        (only,) = alike
        branches = [rf"\d+\.{only}"]
    else:
        branches = [rf"{_any_of(numbers)}\.{rest}" for rest, numbers in alike.items()]
    return "".join(rf"{_escaped(part)}\." for part in template[:first]) + _any_of(branches)


def _by_first(numbers: Iterable[_Numbers]) -> dict[str, set[_Numbers]]:
    found: dict[str, set[_Numbers]] = {}
    for first, *rest in sorted(numbers, key=lambda each: list(map(int, each))):
        found.setdefault(first, set()).add(tuple(rest))
    return found


def _any_of(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def _target(where: str, ends: list[str]) -> str:
    """The name itself, if the pattern matches no other."""
    pattern = where + _any_of(ends)
    name = pattern.replace(r"\.", ".").replace(r"\-", "-")
    return name if _PLAIN.fullmatch(name) else f"re:{pattern}$"


_escaped = functools.lru_cache(10_000)(re.escape)


def shell_wildcards(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Few ModelOpt wildcards that match all of `names` and none of `others`.

    Whatever lies in a module of which nothing is among `others` goes with it, `vision_tower*`. Routers become one for
    all layers. All else stays itself: vLLM and SGLang look for q, k and v, which they hold as one matrix, by name.
    """
    ordered, inside = sorted(others), {parent for other in others for parent in _parents(other)}

    def entry(name: str) -> str:
        if (top := next((parent for parent in reversed(_parents(name)[1:]) if parent not in inside), None)) is not None:
            after = bisect.bisect_left(ordered, top)
            return f"{top}.*" if after < len(ordered) and ordered[after].startswith(top) else f"{top}*"
        if _ROUTER.fullmatch(name.rpartition(".")[2]):
            wildcard = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            return name if is_taken(wildcard) else wildcard
        return name

    @functools.cache
    def is_taken(wildcard: str) -> bool:
        return any(map(re.compile(fnmatch.translate(wildcard)).match, others))

    return list(dict.fromkeys(map(entry, names)))


def _parents(name: str) -> list[str]:
    """The name, and the modules that it lies in, outwards."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


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
