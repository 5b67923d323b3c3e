"""Lists of module names in a config: short ones out, and what others wrote matched."""

import re
from collections.abc import Collection, Iterable


def patterns(names: Iterable[str], others: Collection[str]) -> list[str]:
    """compressed-tensors targets that match all of `names` and none of `others`.

    A model has thousands of experts: a name becomes a `re:` pattern over all layers and experts, or over the experts of
    its layer, where no other name matches; else it stays itself.
    """
    chosen: dict[str, None] = {}
    verdicts: dict[str, bool] = {}
    for name in names:
        for candidate in _generalized(name):
            if candidate not in verdicts:
                verdicts[candidate] = not any(re.match(candidate, other) for other in others)
            if verdicts[candidate]:
                chosen[f"re:{candidate}"] = None
                break
        else:
            chosen[name] = None
    return list(chosen)


def _generalized(name: str) -> Iterable[str]:
    parts = [re.escape(part) for part in name.split(".")]
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    for indices in (numbers, numbers[-1:]):
        if indices:
            yield r"\.".join(r"\d+" if index in indices else part for index, part in enumerate(parts)) + "$"


def is_listed(name: str, entries: Iterable[str]) -> bool:
    """Whether a `modules_to_not_convert` names a module: whole components of it, like a parent or a suffix
    ("lm_head", "mlp.gate", "model.layers.0", "self_attn"), or a pattern from its start.

    transformers also takes any string that the name ends with; "gate" would then mean "expert_gate", so we do not.
    """
    return any(f".{entry}." in f".{name}." or _matches(entry, name) for entry in entries)


def _matches(entry: str, name: str) -> bool:
    try:
        return re.match(rf"(?:{entry.removeprefix('re:')})(?=\.|$)", name) is not None
    except re.error:
        return False
