"""A headless Chromium that opens a page: what its console said, what the page then holds, how it looks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Page:
    """What a browser made of a file; `errors` are the lines of its console."""

    dom: str
    errors: list[str]
    screenshot: Path


def browser() -> str:
    """The command of a Chromium. Without one a test is skipped, or fails where AQNSIM_REQUIRE names chromium."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        reason = f"none of {', '.join(NAMES)} is installed; Debian has the first"
        if "chromium" in os.environ.get("AQNSIM_REQUIRE", "").split(","):
            pytest.fail(f"AQNSIM_REQUIRE asks for chromium: {reason}")
        pytest.skip(reason)
    return found


def opened(path: Path, screenshot: Path, *, width: int = 1400, height: int = 2400, dark: bool = False) -> Page:
    """Open a file without a network, and take its picture."""
    command = [
        browser(),
        "--headless",
        "--no-sandbox",  # Chromium's own sandbox refuses root, which CI is
        "--disable-gpu",
        "--hide-scrollbars",
        "--proxy-server=127.0.0.1:1",  # whatever the page asked for would fail, and say so in the console
        f"--user-data-dir={screenshot.parent / 'profile'}",
        f"--window-size={width},{height}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--enable-logging=stderr",
        "--dump-dom",
        f"--screenshot={screenshot}",
        path.resolve().as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return Page(done.stdout, re.findall(r"CONSOLE.*", done.stderr), screenshot)
