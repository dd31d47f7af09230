"""The page in a real browser: Debian's Chromium, driven by Selenium, without a network.

What the page shows is compared with trajectory.parquet, and its colours with matplotlib's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest

from analysis import load
from analysis.page.build import build
from tests.analysis.conftest import write_run
from tests.browser.conftest import LENGTH, STRENGTHS, Shown

pytestmark = pytest.mark.browser

HOSTILE = {
    "</script><script>window.hacked=1</script>": "</script><script>window.hacked=1</script> "
    "<img src=x onerror=window.hacked=1> <!-- <script> ‮ gnp.exe‬ \x00\x1b[31m &lt;b&gt; "
    "javascript:window.hacked=1 \U000e0041"
}


def recorded(study: Path, run: int, prompt: str, number: int) -> np.ndarray:
    """(T,) nats, as trajectory.parquet has them."""
    rows = pd.read_parquet(study / f"run{run}" / "trajectory.parquet")
    rows = rows[(rows["prompt_id"] == prompt) & (rows["iteration"] == number)]
    return rows.sort_values("position")["log_prob"].to_numpy()


def end_of_scale(shown: Shown) -> float:
    return float(re.findall(r"([\d.]+) nats", shown.find("#legend").text)[-1])


@pytest.mark.parametrize(("run", "number"), [(0, 1), (0, 7), (3, 2), (8, 5), (8, 40)])
def test_sliders_move_the_colours_to_the_recorded_values(
    shown: Shown, study: Path, run: int, number: int
) -> None:
    shown.choose("colour", "surprise")
    shown.choose("prompt", "2")  # list
    shown.slide("strength-b", run)
    shown.slide("pass", number)
    values = recorded(study, run, "list", number)
    place = np.clip(-values / end_of_scale(shown), 0, 1)
    expected = matplotlib.colormaps["YlGnBu"](place)[:, :3] * 255
    # matplotlib has 256 colours, the page 0.01 nats; nothing predicts the first token
    assert np.abs(shown.colours("b") - expected)[1:].max() < 4  # of 255
    assert len(np.unique(shown.colours("b"), axis=0)) > 20


def test_the_change_from_the_plain_model_is_blue_or_orange(shown: Shown, study: Path) -> None:
    shown.choose("colour", "change")
    shown.slide("pass", 9)
    change = recorded(study, 0, "dialogue", 1) - recorded(study, 0, "dialogue", 9)
    red, _, blue = shown.colours("a").T
    change[0] = 0.0  # nothing predicts the first token
    assert (red > blue)[change > 0.1].all()
    assert (red < blue)[change < -0.1].all()
    assert (change > 0.1).any()
    assert (change < -0.1).any()
    worse = change[1:].mean()
    assert f"{worse:+.2f}".replace("-", "−") in shown.find("#side-a .mean").text


def test_a_link_restores_the_view(shown: Shown, browser: Any, page: Path) -> None:
    shown.choose("colour", "settles")
    shown.choose("prompt", "3")
    shown.slide("strength-a", 2)
    shown.slide("strength-b", 6)
    shown.slide("pass", 5)
    shown.find("#tokens-a .token:nth-of-type(4)").click()
    shown.run("document.activeElement.blur()")
    shown.browser.execute_cdp_cmd(
        "Input.dispatchMouseEvent", {"type": "mouseMoved", "x": 1, "y": 1}
    )
    before = shown.state()
    link = shown.run("return location.hash")
    assert Shown(browser, page).state() != before
    again = Shown(browser, page, link)
    assert again.state() == before
    assert again.run("return location.hash") == link


def test_a_broken_link_shows_the_first_view(shown: Shown, browser: Any, page: Path) -> None:
    first = shown.state()
    nonsense = "#a=%3Cb%3E&b=__proto__&prompt=&pass=-3&step=x&colour=constructor&token=99999"
    broken = Shown(browser, page, nonsense)
    assert broken.state() == first
    assert broken.console() == []


def test_nothing_is_requested_and_nothing_complains(shown: Shown, page: Path) -> None:
    shown.choose("colour", "settles")
    shown.find("#tokens-a .token:nth-of-type(9)").click()
    shown.find("#runs thead button").click()
    shown.find("#runs tbody tr:nth-child(4) button").click()
    assert shown.requests() == [page.as_uri()]
    assert shown.console() == []


def test_the_first_paint_comes_within_a_second(shown: Shown) -> None:
    entry = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
    shown.wait(lambda: shown.run(entry))  # the browser notes it after the frame, the page is ready
    assert shown.run(entry) <= 1000  # ms


def test_keys_of_the_page_work_while_a_token_has_the_focus(shown: Shown) -> None:
    from selenium.webdriver import Keys

    shown.slide("strength-b", 6)
    token = shown.find("#tokens-b .token:nth-of-type(5)")
    token.click()
    before = shown.state()
    shown.browser.switch_to.active_element.send_keys(Keys.SHIFT + Keys.ARROW_LEFT)
    after = shown.state()
    assert before != after
    assert shown.run("return document.getElementById('strength-b').value") == "5"
    shown.press(Keys.ARROW_RIGHT)  # the same tokens: it is still the one with the focus
    assert shown.run("return document.activeElement.dataset.position") == "5"


def test_the_link_is_right_after_many_looks(shown: Shown) -> None:
    shown.run(
        "const all = [...document.querySelectorAll('#tokens-a .token')];"
        "for (let i = 0; i < 600; i++) all[i % all.length]"
        ".dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));"
    )
    shown.slide("pass", 3)
    assert "pass=3" in shown.run("return location.hash")
    assert shown.console() == []


def test_a_token_draws_its_path_and_a_click_on_it_sets_the_pass(shown: Shown) -> None:
    from selenium.webdriver import ActionChains

    token = shown.find("#tokens-b .token:nth-of-type(6)")
    ActionChains(shown.browser).move_to_element(token).perform()
    assert token.text.strip() in shown.find("#curve-title").text
    assert "pass" in shown.find("#readout").text
    before = shown.pass_text()
    over = shown.find("#curve .u-over")
    shown.run("arguments[0].scrollIntoView({block: 'center'})", over)
    ActionChains(shown.browser).move_to_element_with_offset(over, -100, 0).click().perform()
    last = int(before.split()[2])
    share = 0.5 - 100 / over.size["width"]
    assert int(shown.pass_text().split()[0]) == pytest.approx(1 + share * (last - 1), abs=1)


def test_arrow_keys_move_pass_strength_and_token(shown: Shown) -> None:
    from selenium.webdriver import Keys

    last = int(shown.pass_text().split()[0])
    shown.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
    assert shown.pass_text().startswith(f"{last - 1} of")
    assert shown.find("#side-b label").text == "β = 2"
    shown.press(Keys.SHIFT + Keys.ARROW_LEFT)
    assert shown.find("#side-b label").text == "β = 1"
    shown.find("#tokens-a .token").click()
    shown.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    focused = shown.run("return document.activeElement.dataset.position")
    assert focused == "2"
    assert "token 2" in shown.find("#readout").text
    shown.press(Keys.ARROW_UP)
    assert shown.pass_text().startswith(f"{last - 2} of")
    assert shown.run("return document.querySelectorAll('#tokens-a [tabindex=\"0\"]').length") == 1


def test_coming_to_the_tokens_by_tab_chooses_none(shown: Shown) -> None:
    from selenium.webdriver import Keys

    chosen = "return document.querySelectorAll('#touch [aria-selected=\"true\"]').length"
    shown.run("document.getElementById('strength-a').focus()")
    shown.press(Keys.TAB)
    assert shown.run("return document.activeElement.dataset.position") == "0"
    assert shown.run(chosen) == 0
    shown.press(Keys.ENTER)
    assert shown.run(chosen) == 2, "the same on both sides"
    assert "token 0" in shown.find("#readout").text
    shown.press(Keys.ESCAPE, Keys.ARROW_RIGHT)
    assert "token 1" in shown.find("#readout").text


def test_play_goes_through_the_passes_and_pauses(shown: Shown) -> None:
    shown.run(
        "window.running = new Set(); const start = setInterval, end = clearInterval;"
        "window.setInterval = (...a) => { const id = start(...a); running.add(id); return id; };"
        "window.clearInterval = (id) => { running.delete(id); end(id); };"
    )
    play = shown.find("#play")
    play.click()  # from the end it begins again
    shown.wait(lambda: shown.pass_text().startswith("3 of"))
    assert shown.run("return running.size") == 1
    play.click()
    assert shown.run("return running.size") == 0, "nothing is left that would move it"
    assert play.get_attribute("aria-pressed") == "false"


def test_the_table_sorts_and_shows_a_run(shown: Shown) -> None:
    def column(number: int) -> list[str]:
        cells = shown.browser.find_elements(
            "css selector", f"#runs tbody tr > :nth-child({number})"
        )
        return [cell.text for cell in cells]

    strengths = column(1)
    assert strengths == [f"β = {s:g}".replace("-", "−") for s in STRENGTHS]
    heading = shown.find("#runs thead th:first-child button")
    heading.click()
    heading.click()
    assert column(1) == strengths[::-1]
    assert shown.find("#runs thead th").get_attribute("aria-sort") == "descending"
    shown.find("#runs tbody tr:nth-child(4) button").click()
    assert shown.find("#side-b label").text == strengths[::-1][3]


def test_every_measure_is_explained_in_sight(shown: Shown) -> None:
    heads = shown.browser.find_elements("css selector", "#runs th[scope=col]")
    meanings = shown.browser.find_elements("css selector", "#columns dt")
    assert [one.text for one in meanings] == [one.text for one in heads]
    said = shown.find("#columns").text
    assert "effect\nHow different the predictions became" in said


def test_the_first_view_moves_and_a_column_without_a_value_is_not_there(
    browser: Any, tmp_path: Path
) -> None:
    for start in ("carried", "cold"):
        run = tmp_path / "s" / start
        write_run(run, prompts={"p": "a b c d"}, feedback__strength=0.5, recompute__start=start)
    rows = pd.read_parquet(tmp_path / "s/carried/trajectory.parquet")
    rows[rows["iteration"] == 1].to_parquet(tmp_path / "s/carried/trajectory.parquet")
    summary = json.loads((tmp_path / "s/carried/summary.json").read_text())
    summary["prompts"][0]["nll"] += 5.0  # what changes most is not to be seen
    (tmp_path / "s/carried/summary.json").write_text(json.dumps(summary))
    path = tmp_path / "first.html"
    path.write_text(build(load(str(tmp_path / "s"))), encoding="utf-8")
    shown = Shown(browser, path)
    assert shown.run("return document.getElementById('choose-setting-0').value") == "cold"
    assert shown.find("#play").is_enabled()
    heads = [
        cell.text for cell in shown.browser.find_elements("css selector", "#runs th[scope=col]")
    ]
    assert "surprise" in heads
    assert "rate" not in heads


def test_the_first_view_of_a_plain_model_has_colours(browser: Any, tmp_path: Path) -> None:
    for name, kind in (("plain", "none"), ("fed", "log_prob")):
        run = tmp_path / name
        write_run(run, prompts={"p": "a b c d"}, feedback__kind=kind, feedback__strength=0.5)
        if kind == "none":
            rows = pd.read_parquet(run / "trajectory.parquet")
            rows[rows["iteration"] == 1].to_parquet(run / "trajectory.parquet")
        path = tmp_path / f"{name}.html"
        path.write_text(build(load(str(run))), encoding="utf-8")
        shown = Shown(browser, path)
        chosen = shown.run("return document.getElementById('choose-colour').value")
        assert chosen == ("surprise" if kind == "none" else "change")
        assert len(np.unique(shown.colours("a")[1:], axis=0)) > 1


def test_the_first_view_has_the_change_of_a_single_pass_that_began_with_carried_estimates(
    browser: Any, tmp_path: Path
) -> None:
    for start in ("carried", "cold"):
        run = tmp_path / "s" / start
        changes = {"recompute__start": start, "feedback__strength": 0.5}
        write_run(run, prompts={"p": "a b c d"}, steps=1, recompute__iterations=1, **changes)
    rows = pd.read_parquet(tmp_path / "s/carried/trajectory.parquet")
    rows["log_prob"] -= rows["step"]
    rows.to_parquet(tmp_path / "s/carried/trajectory.parquet")
    path = tmp_path / "first.html"
    path.write_text(build(load(str(tmp_path / "s"))), encoding="utf-8")
    shown = Shown(browser, path)
    assert shown.run("return document.getElementById('choose-colour').value") == "change"
    assert len(np.unique(shown.colours("a")[1:], axis=0)) == 1
    assert np.isfinite(shown.colours("a")[1:]).all()


def test_a_text_that_diverged_is_said_to_have_no_mean(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "s" / "r", prompts={"p": "a b c d"}, feedback__strength=9.0)
    rows = pd.read_parquet(run / "trajectory.parquet")
    rows["log_prob"] = rows["log_prob"].mask(rows["iteration"].gt(1) & rows["position"].gt(1))
    rows.to_parquet(run / "trajectory.parquet")
    path = tmp_path / "diverged.html"
    path.write_text(build(load(str(run))), encoding="utf-8")
    shown = Shown(browser, path, "#pass=2&token=3")
    assert shown.find("#side-a .mean").text == "no mean surprise: not every estimate is a number"
    assert shown.find("#readout").text.endswith("surprise – nats")


def test_a_printed_table_has_all_its_rows(browser: Any, tmp_path: Path) -> None:
    for number in range(20):
        write_run(tmp_path / "s" / f"r{number}", prompts={"p": "a b"}, feedback__strength=number)
    path = tmp_path / "many.html"
    path.write_text(build(load(str(tmp_path / "s"))), encoding="utf-8")
    shown = Shown(browser, path)
    cut = (
        "const box = document.querySelector('.scroll'); return box.scrollHeight > box.clientHeight"
    )
    assert shown.run(cut)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not shown.run(cut)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_seeds_of_one_setting_are_one_row_that_keeps_to_the_seed_on_show(
    browser: Any, tmp_path: Path
) -> None:
    for strength in (-1.0, 1.0):
        for seed in (0, 1):
            folder = tmp_path / "s" / f"r{strength}{seed}"
            write_run(folder, prompts={"p": "a b c d"}, feedback__strength=strength, seed=seed)
    path = tmp_path / "seeds.html"
    path.write_text(build(load(str(tmp_path / "s"))), encoding="utf-8")
    shown = Shown(browser, path)
    heads = [
        cell.text for cell in shown.browser.find_elements("css selector", "#runs th[scope=col]")
    ]
    assert heads[:3] == ["strength", "runs", "outcome"]
    rows = shown.browser.find_elements("css selector", "#runs tbody tr")
    assert [row.text.split()[:4] for row in rows] == [["β", "=", "−1", "2"], ["β", "=", "1", "2"]]
    shown.choose("setting-0", "1")
    rows[0].find_element("css selector", "button").click()
    assert shown.run("return document.getElementById('choose-setting-0').value") == "1"
    assert shown.find("#side-b label").text == "β = −1"
    assert shown.console() == []


def test_whatever_can_be_used_has_a_name(shown: Shown) -> None:
    for element in shown.browser.find_elements(
        "css selector", "button, select, input, [role], table, canvas"
    ):
        if element.is_displayed() and element.tag_name not in ("canvas", "table"):
            assert element.accessible_name or element.aria_role == "status", element.tag_name


@pytest.mark.parametrize("fragment", ["", "#token=12&colour=settles"])
def test_nothing_is_cut_off_at_380_pixels(browser: Any, page: Path, fragment: str) -> None:
    shown = Shown(browser, page, fragment, width=380)
    wide = "return document.documentElement.scrollWidth"
    assert shown.run(wide) <= 380
    assert shown.run("return document.querySelector('#curve canvas').clientWidth") <= 380


def test_a_long_setting_makes_no_page_wider(browser: Any, tmp_path: Path) -> None:
    for name in ("choose", "confirm"):
        run = tmp_path / "s" / name
        write_run(run, prompts={"p": "a b c"}, prompts__file=f"{'folder/' * 12}{name}.jsonl")
    path = tmp_path / "long.html"
    path.write_text(build(load(str(tmp_path / "s"))), encoding="utf-8")
    shown = Shown(browser, path, width=380)
    assert shown.run("return document.documentElement.scrollWidth") <= 380


def test_ink_and_ground_differ_enough_in_both_schemes(browser: Any, page: Path) -> None:
    contrasts = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        shown = Shown(browser, page)
        for colour in ("change", "surprise", "settles"):
            shown.choose("colour", colour)
            ground = shown.colours("b")
            script = (
                "return [...document.querySelectorAll('#tokens-b .token')]"
                ".map((t) => getComputedStyle(t).color)"
            )
            ink = np.array([re.findall(r"\d+", c)[:3] for c in shown.run(script)], float)
            contrasts.append(np.nanmin(contrast(ink, ground)))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert min(contrasts) >= 4.5  # WCAG 2, level AA


def contrast(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """WCAG's ratio of two lists of colours."""

    def luminance(rgb: np.ndarray) -> np.ndarray:
        part = rgb / 255
        linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    pair = np.stack([luminance(one), luminance(other)])
    return (pair.max(axis=0) + 0.05) / (pair.min(axis=0) + 0.05)


def test_hostile_prompts_are_inert(browser: Any, tmp_path: Path) -> None:
    for number, strength in enumerate((-1.0, 1.0)):
        write_run(
            tmp_path / "h" / f"r{number}",
            study="<img src=x onerror=window.hacked=1>",
            prompts={**HOSTILE, "plain": "one two three"},
            feedback__strength=strength,
        )
    path = tmp_path / "hostile.html"
    path.write_text(build(load(str(tmp_path / "h"))), encoding="utf-8")
    shown = Shown(browser, path)
    shown.find("#tokens-a .token:nth-of-type(5)").click()
    assert shown.run("return window.hacked") is None
    assert shown.run("return document.querySelectorAll('script').length") == 3
    assert shown.run("return document.querySelectorAll('img, iframe, main script').length") == 0
    text = "".join(shown.tokens("a"))
    assert text.startswith("</script><script>window.hacked=1</script> <img src=x onerror=")
    assert "⟨202E⟩ gnp.exe⟨202C⟩ ␀␛[31m &lt;b&gt;" in text
    assert text.endswith("⟨E0041⟩"), "a letter that no one sees"
    assert shown.find("#title").text == "<img src=x onerror=window.hacked=1>"
    assert shown.console() == []
    assert shown.requests() == [path.as_uri()]


def test_a_single_run_is_one_text_alone(browser: Any, study: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.html"
    path.write_text(build(load(str(study / "run7")), limit=300_000), encoding="utf-8")
    shown = Shown(browser, path)
    assert not shown.find("#side-b").is_displayed()
    assert not shown.find("#strength-a").is_displayed()
    assert len(shown.tokens("a")) == LENGTH
    assert shown.console() == []


def test_a_chosen_token_stays_the_same_while_the_window_slides(
    browser: Any, tmp_path: Path
) -> None:
    words = " ".join("abcdefgh")
    run = write_run(tmp_path / "s" / "g", prompts={"p": words}, steps=3, feedback__strength=0.5)
    rows = pd.read_parquet(run / "trajectory.parquet")
    slid = rows[rows["position"] >= rows["step"]]  # a window of five tokens
    slid.to_parquet(run / "trajectory.parquet")
    path = tmp_path / "slid.html"
    path.write_text(build(load(str(tmp_path / "s"))), encoding="utf-8")
    shown = Shown(browser, path, "#step=1&token=4")
    assert [word.strip() for word in shown.tokens("a")] == list("bcdef")
    for step in ("1", "3", "0"):
        shown.choose("step", step)
        assert shown.find(".token[aria-selected='true']").text.strip() == "e"
        assert "“ e” token 4," in shown.find("#readout").text
    shown.find("#tokens-a .token").click()  # a
    shown.choose("step", "1")
    assert "token=" not in shown.run("return location.hash"), "it has left the window"


def test_generation_steps_can_be_chosen(browser: Any, tmp_path: Path) -> None:
    write_run(tmp_path / "s" / "g", prompts={"p": "a b c d e f g"}, steps=3, feedback__strength=0.5)
    path = tmp_path / "steps.html"
    path.write_text(build(load(str(tmp_path / "s"))), encoding="utf-8")
    shown = Shown(browser, path)
    assert len(shown.tokens("a")) == 7  # the last step first
    shown.choose("step", "1")
    assert len(shown.tokens("a")) == 5
    assert shown.console() == []
