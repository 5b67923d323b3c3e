"""Real English that ships with Python: pydoc topics and the docstrings of the standard library.

`documents()` reads the running Python, so the text depends on its version and build; `sha256` of the corpus says
whether two machines have the same. Sources are parsed with `ast` and never imported, except extension modules, whose
docstrings exist nowhere else.
"""

import ast
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# In every CPython build; optional extensions (readline, _sqlite3, _curses) would make the corpus depend on the machine.
EXTENSION_MODULES = (
    "builtins", "_abc", "_ast", "_asyncio", "_bisect", "_codecs", "_collections", "_contextvars", "_csv",
    "_datetime", "_decimal", "_elementtree", "_functools", "_heapq", "_imp", "_io", "_json", "_locale", "_lsprof",
    "_operator", "_opcode", "_pickle", "_queue", "_random", "_signal", "_socket", "_sre", "_stat", "_statistics",
    "_string", "_struct", "_thread", "_tracemalloc", "_typing", "_warnings", "_weakref", "_zoneinfo", "array",
    "atexit", "audioop", "binascii", "cmath", "errno", "faulthandler", "fcntl", "gc", "grp", "itertools", "marshal",
    "math", "mmap", "posix", "pwd", "pyexpat", "resource", "select", "sys", "syslog", "time", "unicodedata", "zlib",
)  # fmt: skip
# Paragraphs shorter than this ("Examples:", "See base class.") repeat by nature and carry no content to leak.
MIN_PARAGRAPH = 64
# No held-out run of so many characters occurs in the training text.
MAX_COPY = 64
SHINGLE_WORDS = 8
MAX_SHARED_SHINGLES = 0.5

_COMMON_WORDS = frozenset((
    "the", "a", "an", "of", "to", "is", "are", "in", "and", "or", "that", "for", "it", "not", "be", "with",
    "this", "as", "if", "by", "on", "from", "which"
))  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One topic, or all docstrings of one module.

    `name` is where the text comes from, `kind` what sort of source that is.
    """

    name: str
    kind: Literal["topic", "module", "extension", "test"]
    text: str

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode())

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def documents() -> list[Document]:
    """Cleaned documents without repeated or nearly repeated paragraphs, in an order that content alone decides."""
    sources = [*_topics(), *_modules(), *_extensions()]
    return sorted(_without_repeats(sources), key=lambda document: document.digest)


def split(corpus: Iterable[Document], heldout_fraction: float = 0.05) -> tuple[list[Document], list[Document]]:
    """`(training, held-out)`, by whole document.

    Within each kind, documents are held out in the order of their sha256 for as long as they fit into the fraction.
    Training paragraphs that share a run of `MAX_COPY` characters with held-out text are then dropped.
    """
    corpus = list(corpus)
    budget = Counter()
    for document in corpus:
        budget[document.kind] += heldout_fraction * document.num_bytes
    training, heldout = [], []
    for document in sorted(corpus, key=lambda document: document.digest):
        fits = document.num_bytes <= budget[document.kind]
        if fits:
            budget[document.kind] -= document.num_bytes
        (heldout if fits else training).append(document)
    return list(_without_copies(training, heldout)), heldout


def sha256(corpus: Iterable[Document]) -> str:
    """Of the documents' texts in the given order, separated by zero bytes."""
    return hashlib.sha256(b"\0".join(document.text.encode() for document in corpus)).hexdigest()


def shared_with(training: Iterable[Document], heldout: Iterable[Document], length: int) -> float:
    """The part of the held-out characters that lies in a run of `length` characters occurring in training.

    Whitespace is collapsed on both sides first, so that a different line wrap does not hide a copy.
    """
    seen = set()
    for document in training:
        seen.update(_runs(document.text, length))
    covered = total = 0
    for document in heldout:
        end = 0
        for start, run in enumerate(_runs(document.text, length)):
            if run in seen:
                covered += start + length - max(end, start)
                end = start + length
        total += len(" ".join(document.text.split()))
    return covered / max(total, 1)


def _runs(text: str, length: int) -> Iterator[int]:
    """Hashes of all runs of `length` characters, whitespace collapsed."""
    text = " ".join(text.split())
    return (hash(text[start : start + length]) for start in range(len(text) - length + 1))


def _without_copies(training: Iterable[Document], heldout: Iterable[Document]) -> Iterator[Document]:
    """Drops the paragraphs that have a part in a run of `MAX_COPY` characters of held-out text."""
    held_runs = {run for document in heldout for run in _runs(document.text, MAX_COPY)}
    for document in training:
        copies = [start for start, run in enumerate(_runs(document.text, MAX_COPY)) if run in held_runs]
        kept = []
        start = 0  # of the paragraph, in the text with collapsed whitespace
        for paragraph in document.text.split("\n\n"):
            end = start + len(" ".join(paragraph.split()))
            if bisect_left(copies, end) == bisect_left(copies, start - MAX_COPY + 1):
                kept.append(paragraph)
            start = end + 1
        if kept:
            yield Document(document.name, document.kind, "\n\n".join(kept))


def _topics() -> Iterator[Document]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name, text in topics.items():
        yield Document(f"topic {name}", "topic", _clean(text))


def _modules() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if skipped.intersection(name.parts) or name.parts[0].startswith("config-"):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # the test suite and lib2to3 hold sources that are wrong on purpose
        is_test = bool({"test", "tests", "idle_test"}.intersection(name.parts))
        docstrings = map(_clean, _docstrings(tree))
        # Docstrings of tests are often fixtures and doctests; of those only prose is wanted.
        texts = [text for text in docstrings if not is_test or _is_prose(text)]
        yield Document(str(name), "test" if is_test else "module", "\n\n".join(dict.fromkeys(texts)))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """In the order of the source."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (text := ast.get_docstring(node)):
            yield text
        pending.extend(reversed(list(ast.iter_child_nodes(node))))


def _extensions() -> Iterator[Document]:
    for name in EXTENSION_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        members = [module]
        for value in _public_members(module):
            if not isinstance(value, type):
                members.append(value)
            elif value.__module__.split(".")[0].strip("_") == name.strip("_"):  # not one that it only re-exports
                members += [value, *_public_members(value)]
        texts = [_clean(inspect.cleandoc(doc)) for doc in map(_own_doc, members) if doc]
        yield Document(f"extension {name}", "extension", "\n\n".join(dict.fromkeys(texts)))


def _public_members(owner: object) -> list[object]:
    return [value for name, value in sorted(vars(owner).items()) if not name.startswith("__")]


def _own_doc(member: object) -> str | None:
    doc = getattr(member, "__doc__", None)
    # An instance (a constant, say) shows the docstring of its class, which is listed there already.
    inherited = not isinstance(member, type) and doc == type(member).__doc__
    return doc if isinstance(doc, str) and not inherited else None


def _clean(text: str) -> str:
    lines = [line.rstrip() for line in text.expandtabs().splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _is_prose(text: str) -> bool:
    words = text.split()
    letters = sum(character.isalpha() or character == " " for character in text)
    common = sum(word.lower() in _COMMON_WORDS for word in words)
    return ">>>" not in text and len(words) >= 5 and letters >= 0.85 * len(text) and common >= 0.1 * len(words)


def _without_repeats(sources: Iterable[Document]) -> Iterator[Document]:
    """Drops paragraphs of which earlier ones have most word shingles; longer documents come first and stay whole."""
    order = {"topic": 0, "module": 1, "extension": 2, "test": 3}
    seen: set[tuple[str, ...]] = set()
    for document in sorted(sources, key=lambda document: (order[document.kind], -document.num_bytes, document.name)):
        kept = []
        for paragraph in document.text.split("\n\n"):
            shingles = _shingles(paragraph) if len(paragraph) >= MIN_PARAGRAPH else set()
            if len(shingles & seen) <= MAX_SHARED_SHINGLES * len(shingles):
                kept.append(paragraph)
            seen |= shingles
        text = "\n\n".join(kept)
        if len(text) >= MIN_PARAGRAPH:
            yield Document(document.name, document.kind, text)


def _shingles(paragraph: str) -> set[tuple[str, ...]]:
    """Runs of words, blind to case, punctuation and numbers; a shorter paragraph is one run."""
    words = re.findall(r"[^\W\d_]+", paragraph.lower())
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def main() -> None:
    """Prints what the corpus of the running Python holds."""
    corpus = documents()
    training, heldout = split(corpus)
    for title, part in [("corpus", corpus), ("training", training), ("held-out", heldout)]:
        kinds = Counter()
        for document in part:
            kinds[document.kind] += document.num_bytes
        print(f"{title}: {len(part)} documents, {kinds.total()} bytes, {dict(kinds)}, sha256 {sha256(part)}")
    for length in (32, 64, 128):
        print(f"held-out characters within a copy of {length} or more: {shared_with(training, heldout, length):.2%}")


if __name__ == "__main__":
    sys.exit(main())
