"""The package's page in an index: README.md, whose links and pictures must lead somewhere from there, too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

REPOSITORY = "cekkr/learnit-r8"


def absolute(text: str) -> str:
    """Return Markdown whose links to files of the repository are addresses: pages on its site, pictures in themselves.

    Args:
        text: Markdown with links relative to the repository's root.
    """

    def address(match: re.Match[str]) -> str:
        picture, words, path = match.groups()
        host = "https://raw.githubusercontent.com" if picture else "https://github.com"
        branch = "main" if picture else "blob/main"
        return f"{picture}[{words}]({host}/{REPOSITORY}/{branch}/{path})"

    return re.sub(r"(!?)\[([^]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)", address, text)


class Readme(MetadataHookInterface):
    """Sets the project's `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the description to the metadata."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text)}
