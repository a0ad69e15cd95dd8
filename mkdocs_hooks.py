"""The site's pictures: pages show those of assets/, which lie beside docs/, as readers of the repository need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PICTURES = Path(__file__).parent / "assets"


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures to what the site consists of."""
    for path in sorted(PICTURES.iterdir()):
        if path.suffix in {".svg", ".png"}:
            files.append(File.generated(config, f"assets/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let a page's pictures point to where they are on the site."""
    return markdown.replace("](../assets/", "](assets/")
