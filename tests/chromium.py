"""Headless Chromium for tests (Debian: chromium, chromium-driver), by selenium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest


def started(*flags: str) -> Iterator[Any]:
    """Yield a browser with more `flags`; the test is left out where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no Chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", *flags):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()
