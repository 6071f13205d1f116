"""README.md as the long description of a release, whose page has no files beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PICTURE = r"!\[[^]]*\]\((?!https:)[^)]*\)\n\n"
LINK = r"\[([^]]*)\]\((?!https:)[^)]*\)"
NOTE = "\nThe source distribution has the pages that this text names, in `docs/`.\n"


class LongDescription(MetadataHookInterface):
    """Hook of hatchling."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Leave relative pictures out, and keep the text of relative links."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = re.sub(LINK, r"\1", re.sub(PICTURE, "", text)) + NOTE
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
