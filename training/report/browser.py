"""A headless Chromium that opens a page: what its console said, what the page then holds, and its picture."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from aqnsim._errors import AqnsimError

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
"""Commands that may be a Chromium; Debian has the first in a package of that name."""


class BrowserError(AqnsimError):
    """No browser, or one that could not open a page."""


@dataclass(frozen=True)
class Page:
    """What a browser made of a file: its HTML after loading, the lines of its console, and its picture."""

    dom: str
    console: list[str]
    picture: Path


def browser() -> str:
    """The path of a Chromium.

    Raises:
        BrowserError: none is installed.
    """
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise BrowserError(f"none of {', '.join(NAMES)} is installed: on Debian, apt-get install {NAMES[0]}")
    return found


def open_page(path: Path, picture: Path, *, width: int = 1400, height: int = 2400, dark: bool = False) -> Page:
    """Open a file, with no network to reach, and take its picture.

    Args:
        path: the HTML.
        picture: the PNG to write; its folder exists.
        width: of the window, in pixels.
        height: likewise; what lies below is not in the picture.
        dark: whether the reader prefers a dark page.

    Raises:
        BrowserError: no browser is installed, or it failed.
    """
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser(),
            "--headless",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),  # Chromium's own sandbox refuses root
            "--disable-gpu",
            "--hide-scrollbars",
            "--proxy-server=127.0.0.1:1",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--enable-logging=stderr",
            "--dump-dom",
            f"--screenshot={picture}",
            path.resolve().as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode or not picture.exists():
        raise BrowserError(f"{command[0]} could not open {path}: {done.stderr[-500:]}")
    return Page(done.stdout, re.findall(r"CONSOLE.*", done.stderr), picture)
