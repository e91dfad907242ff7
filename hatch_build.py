"""The README as the package index shows it: every link that is relative in the repository becomes absolute."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = re.compile(r"(?P<picture>!?)(?P<text>\[[^\[\]]*\])\((?P<to>(?![a-z]+:|#)[^()\s]+)\)")


def absolute(text: str, source: str) -> str:
    """Return Markdown in which relative links lead into the repository, and relative pictures to their bytes."""

    def link(match: re.Match[str]) -> str:
        kind = "raw" if match["picture"] else "blob"
        return f"{match['picture']}{match['text']}({source}/{kind}/main/{match['to']})"

    return RELATIVE.sub(link, text)


class ReadmeHook(MetadataHookInterface):
    """Fill in ``readme``, which pyproject.toml leaves open as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the readme of the distribution."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        source = metadata["urls"]["Source"]
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, source)}
