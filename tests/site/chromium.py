"""The installed browser. A test that imports this module is skipped where there is none."""

from __future__ import annotations

import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FOUND = [os.environ.get("CHROMIUM"), *map(shutil.which, NAMES)]
if not any(FOUND):
    reason = f"no browser looks at the pages: there is no {' or '.join(NAMES)} (or set CHROMIUM)"
    pytest.skip(reason, allow_module_level=True)

LAUNCH = {
    "executable_path": next(filter(None, FOUND)),
    "args": [
        *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
        *("--disable-component-update", "--disable-sync"),
    ],
}
