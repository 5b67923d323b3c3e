"""Results as one JSON document, written after each of them: a killed run leaves what it had."""

import json
import os
from pathlib import Path
from typing import Any


class Results:
    """`{"facts": …, "results": […]}` in a file. Opened again it goes on, so that a restarted run skips what is done."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path = path
        self.document = json.loads(path.read_text()) if path.exists() else {"facts": facts, "results": []}

    def add(self, **result: Any) -> None:
        self.document["results"].append(result)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.document, indent=1, ensure_ascii=False) + "\n")
        os.replace(partial, self.path)

    def has(self, **key: Any) -> bool:
        """Whether a result with these fields is there."""
        return any(all(result.get(name) == value for name, value in key.items()) for result in self)

    def __iter__(self):
        return iter(self.document["results"])
