"""Files that are there whole or not at all: written aside, then renamed."""

import json
from pathlib import Path
from typing import Any

from fast.checkpoint import write_whole as write_whole


def write_text(path: Path, text: str) -> None:
    """`write_whole` of the text in UTF-8."""
    write_whole(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """`write_text` of the content as JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")
