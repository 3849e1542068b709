"""Write files so that they exist whole or not at all: into a temporary file first, then renamed."""

import json
from pathlib import Path
from typing import Any

from fast.checkpoint import write_whole as write_whole


def write_text(path: Path, text: str) -> None:
    """Write the text in UTF-8, whole or not at all."""
    write_whole(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write the content as JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")
