"""Chromium, driven by Selenium without a network, and pages to show in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import load
from analysis.page.build import build
from tests.analysis.conftest import TEXTS, write_run

STRENGTHS = (-1.0, -0.5, -0.25, -0.1, 0.0, 0.1, 0.5, 1.0, 2.0)  # as many as README's study has
LENGTH = 96  # tokens, as its texts have
SWITCHES = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync force-color-profile=srgb"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver  # the fast suite collects this file without it

    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    assert driver, "install Debian's packages chromium and chromium-driver"
    assert chromium, "install Debian's packages chromium and chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in SWITCHES.split():
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    os.environ["SE_OFFLINE"] = "true"  # the driver is here: nothing is to be looked for
    service = webdriver.ChromeService(executable_path=driver)
    browser = webdriver.Chrome(options=options, service=service)
    try:
        yield browser
    finally:
        browser.quit()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sweep"
    words = " ".join(TEXTS.values()).split()
    texts = {
        name: " ".join((words[start:] + words)[:LENGTH])
        for start, name in enumerate(("dialogue", "harbour", "list", "rain"))
    }
    for number, strength in enumerate(STRENGTHS):
        write_run(
            folder / f"run{number}",
            study="sweep",
            prompts=texts,
            feedback__strength=strength,
            recompute__iterations=LENGTH - 1,
        )
    return folder


@pytest.fixture(scope="module")
def page(study: Path) -> Path:
    path = study.parent / "study.html"
    path.write_text(build(load(str(study))), encoding="utf-8")
    assert path.stat().st_size <= 1_000_000
    return path


class Shown:
    """A page on show, and what is read off it."""

    def __init__(self, browser: Any, path: Path, fragment: str = "", width: int = 1280) -> None:
        self.browser = browser
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get("about:blank")
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(f"{path.as_uri()}{fragment}")
        self.wait(lambda: self.run("return document.documentElement.dataset.ready === 'true'"))

    def run(self, script: str, *arguments: object) -> Any:
        return self.browser.execute_script(script, *arguments)

    def wait(self, done: Callable[[], object]) -> None:
        end = time.monotonic() + 10
        while not done():
            assert time.monotonic() < end, self.browser.get_log("browser")
            time.sleep(0.02)

    def find(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def slide(self, name: str, value: int) -> None:
        self.run(
            "const slider = document.getElementById(arguments[0]); slider.value = arguments[1];"
            "slider.dispatchEvent(new Event('input'))",
            name,
            value,
        )

    def choose(self, name: str, value: str) -> None:
        self.find(f"#choose-{name} option[value='{value}']").click()

    def press(self, *keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(*keys)

    def tokens(self, side: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((t) => t.textContent)"
        return self.run(script, f"#tokens-{side} .token")

    def colours(self, side: str) -> np.ndarray:
        """(T, 3) of 0 to 255; NaN where a token has no colour."""
        script = (
            "return [...document.querySelectorAll(arguments[0])]"
            ".map((t) => getComputedStyle(t).backgroundColor)"
        )
        found = [
            [float(part) for part in re.findall(r"[\d.]+", colour)]
            for colour in self.run(script, f"#tokens-{side} .token")
        ]
        return np.array([rgb if len(rgb) == 3 else [np.nan] * 3 for rgb in found])

    def pass_text(self) -> str:
        return self.find("#pass-value").text

    def state(self) -> tuple[Any, ...]:
        """Everything that a link must bring back."""
        script = (
            "return ['#side-a label', '#side-b label', '#pass-value', '#readout', '#legend',"
            "'#curve-title'].map((name) => document.querySelector(name).textContent)"
        )
        chosen = self.run(
            "return [...document.querySelectorAll('.choices select')].map((s) => s.value)"
        )
        sides = [self.colours(side).tolist() for side in "ab"]
        return (self.run(script), chosen, self.tokens("a"), json.dumps(sides))

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]

    def requests(self) -> list[str]:
        events = [
            json.loads(one["message"])["message"] for one in self.browser.get_log("performance")
        ]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]


@pytest.fixture
def shown(browser: Any, page: Path) -> Shown:
    return Shown(browser, page)
