"""Checkpoints with something broken in them: what storage, the network, other tools and enemies do to files."""

import copy
import json
import random
from typing import Any

Files = dict[str, bytes]  # name -> content

VALUES = [
    None, True, False, 0, -1, 1, 2, 3, 7, 128, 2**31 - 1, 2**31, 2**63, 10**9, 10**30, -(2**63), 0.5, -1.5, 1e300,
    float("inf"), float("nan"), "", "a", "F32", "BF16", "U8", "F8_E4M3", "F8_E4M3FNUZ", "\ud800", "é\n", "../x",
    "/dev/zero", "re:(", "re:.*", "a" * 5000, [], [0], [1, 2], [[]], {}, {"a": 1}, {"": {}}, [None], ["lm_head", 3],
]  # fmt: skip


# What stands in a file's place, or before it.
DOWNLOADS = [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<!DOCTYPE html>", b"Entry not found"]


def mutate(files: Files, rng: random.Random) -> Files:
    """One to three mutations of some of the files."""
    files = dict(files)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(sorted(files))
        if rng.random() < 0.02:
            del files[name]
            if not files:
                break
        elif rng.random() < 0.02:
            files[name] = rng.choice(DOWNLOADS) + files[name] * rng.randrange(2)
        elif rng.random() < 0.02:
            files[f"{name}.incomplete"] = files.pop(name)
        elif name.endswith(".safetensors") and rng.random() < 0.1:
            files[name] = _codes(files[name], rng)
        elif name.endswith(".json"):
            files[name] = rng.choice([_json, _json, _json, _bytes])(files[name], rng)
        else:
            files[name] = rng.choice([_header, _header, _bytes, _near_the_begin, _length])(files[name], rng)
    return files


def _bytes(content: bytes, rng: random.Random) -> bytes:
    """A bit or byte changed; a part cut off, removed, repeated, moved, or added."""
    if not content:
        return b"\0"
    a, b = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
    at, values = rng.randrange(len(content)), bytearray(content)
    match rng.randrange(8):
        case 0:
            values[at] ^= 1 << rng.randrange(8)
            return bytes(values)
        case 1:
            for _ in range(rng.randrange(1, 20)):
                values[rng.randrange(len(values))] = rng.randrange(256)
            return bytes(values)
        case 2:
            return content[:at]
        case 3:
            return content[:a] + content[b:]
        case 4:
            return content[:b] + content[a:]
        case 5:
            return content[b:] + content[a:b] + content[:a]
        case 6:
            return content + rng.randbytes(rng.randrange(1, 100))
        case _:
            return content[:at] + rng.choice([b"{", b"}", b"[", b'"', b",", b"9", b"\0", b"\xff"]) + content[at:]


def _codes(content: bytes, rng: random.Random) -> bytes:
    """Some bytes of tensors that are no numbers, or scales that are none."""
    begin = 8 + int.from_bytes(content[:8], "little")
    if begin >= len(content):
        return content
    values, at = bytearray(content), rng.randrange(begin, len(content))
    values[at : at + rng.choice([1, 2, 4, 64])] = bytes([rng.choice([0, 0x7F, 0x80, 0xFF])]) * rng.choice([1, 2, 4, 64])
    return bytes(values[: len(content)]).ljust(len(content), b"\0")


def _near_the_begin(content: bytes, rng: random.Random) -> bytes:
    return _bytes(content[:200], rng) + content[200:]


def _length(content: bytes, rng: random.Random) -> bytes:
    """Another length of the header."""
    length = int.from_bytes(content[:8], "little")
    length = rng.choice([0, 1, length - 1, length + 1, len(content), 10**8, 10**11, 2**63, 2**64 - 1]) % 2**64
    return length.to_bytes(8, "little") + content[8:]


def _header(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = _json(content[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _json(text: bytes, rng: random.Random) -> bytes:
    """A value, key or item changed, anywhere."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return _bytes(text, rng)
    if rng.random() < 0.02:
        depth = rng.choice([100, 100_000])
        return b"[" * depth + b"]" * depth
    places = _places(tree)
    if not places:
        return json.dumps(rng.choice(VALUES)).encode()
    parent, key = rng.choice(places)
    other_parent, other = rng.choice(places)
    match rng.randrange(7):
        case 0 | 1:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        case 2:
            del parent[key]
        case 3:
            parent[key] = copy.deepcopy(other_parent[other])
        case 4:
            parent[key] = _nearby(parent[key], rng)
        case 5:
            parent[key] = [parent[key]]
        case _:
            return _repeated(tree, parent, key, rng)
    return json.dumps(tree).encode()


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Everything that can be replaced: its container, and its key there."""
    if not isinstance(tree, dict | list):
        return []
    found = []
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        found += [(tree, key), *_places(tree[key])]
    return found


def _nearby(value: Any, rng: random.Random) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return rng.choice([value + 1, value - 1, 2 * value, -value, float(value), str(value)])
        case str():
            return rng.choice([value[:-1], value + "x", value.upper(), f"re:{value}", value.replace(".", "/")])
        case list():
            return [*value, *value] if rng.random() < 0.5 else value[::-1]
    return str(value)


def _repeated(tree: Any, parent: Any, key: Any, rng: random.Random) -> bytes:
    """A key that comes twice, or under another name."""
    if not isinstance(parent, dict):
        parent.append(copy.deepcopy(parent[key]))
        return json.dumps(tree).encode()
    value = parent[key]
    parent["SECOND"] = value if rng.random() < 0.5 else copy.deepcopy(rng.choice(VALUES))
    name = key if rng.random() < 0.5 else f"{key}x"
    return json.dumps(tree).replace('"SECOND"', json.dumps(name)).encode()
