"""Chromium, headless and empty, driven by playwright; and what went wrong in its console."""

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = [
    "--no-sandbox",  # containers run tests as root
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Any]:
    """A tab of a new profile; whatever the console complains of, but statuses, fails the test."""
    api = pytest.importorskip("playwright.async_api")  # of the extra `browser`
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip("no Chromium: install one, or name it in CHROMIUM")
    complaints: list[str] = []
    async with api.async_playwright() as driver:
        browser = await driver.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=path, headless=True, args=_FLAGS
        )
        tab = browser.pages[0]
        tab.set_default_timeout(30_000)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on(
            "console", lambda told: complaints.append(told.text) if told.type == "error" else None
        )
        yield tab
        await browser.close()
    # The browser itself reports statuses of the API, which tests provoke.
    assert not [text for text in complaints if not text.startswith("Failed to load resource")]
