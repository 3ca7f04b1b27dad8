"""Headless Chromium, as Debian ships it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from selenium import webdriver

_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
]  # fmt: skip
_MISSING = shutil.which("chromium") is None or shutil.which("chromedriver") is None
# An automatic run installs both; there a missing browser must fail, not skip.
needs_browser = pytest.mark.skipif(
    _MISSING and not os.environ.get("CI"), reason="needs Debian's chromium and chromium-driver"
)


def started(profile: Path, language: str = "en") -> webdriver.Chrome:
    """A browser with a profile of its own; its owner ends it."""
    options = webdriver.ChromeOptions()
    for flag in [*_FLAGS, f"--user-data-dir={profile}", f"--lang={language}"]:
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.binary_location = str(shutil.which("chromium"))
    return webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
