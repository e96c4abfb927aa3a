"""The page in a real browser: it renders, complains of nothing, asks for nothing, fits a phone.

Authority: headless Chromium, over its own debugging protocol. Skipped where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evals.gate import check
from evals.html.page import page
from evals.policy import load_policy

from . import reports
from .browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: apt-get install chromium"
)

PAGES: dict[str, dict[str, Any]] = {
    "scout": reports.quantized(48, 16, poor=9, tasks=reports.TASKS, lengths=9, depths=11),
    "maverick": reports.quantized(
        48, 128, dense_every=2, tasks=reports.TASKS, lengths=9, depths=11
    ),
    "eval": reports.evaluated(tasks=()),
    "dense": reports.quantized(experts=0),
    "empty": {"llama4q": "0.1.0"},
}
# elements beyond the right edge, but for those in a region that scrolls by itself
OVERFLOWING = """
  [...document.querySelectorAll("body *")]
    .filter((one) => one.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
    .filter((one) => !one.closest(".wide"))
    .map((one) => one.outerHTML.slice(0, 120))
"""
CLIPPED = """
  [...document.querySelectorAll(".heat td, .heat th")]
    .filter((one) => one.scrollWidth > one.clientWidth)
    .map((one) => one.textContent)
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages as files, each with a verdict."""
    folder = tmp_path_factory.mktemp("pages")
    found = {name: folder / f"{name}.html" for name in PAGES}
    for name, path in found.items():
        verdict = check(PAGES[name], load_policy(None, ["likelihood.kl_mean.max=0.01"]))
        path.write_text(page(PAGES[name], verdict), encoding="utf-8")
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("name", PAGES)
def test_it_renders_by_itself(
    browser: Browser, written: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    browser.open(written[name], width, dark)
    assert browser.complaints == []
    assert browser.requests == [written[name].as_uri()]
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OVERFLOWING) == []
    assert browser.evaluate(CLIPPED) == []
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(18, 22, 27)" if dark else "rgb(246, 247, 249)")


def test_a_bad_page_is_seen(browser: Browser, tmp_path: Path) -> None:
    """The same questions find what is wrong where something is."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<meta name=viewport content='width=device-width'><div style='width:500px'>wide</div>"
        "<img src='http://127.0.0.1:9/picture.png'><script>console.error('no'); throw 1</script>"
        "<table class=heat style='table-layout:fixed;width:20px'><td style='overflow:hidden'>"
        "<nobr>too long"
    )
    browser.open(bad, 360)
    assert "http://127.0.0.1:9/picture.png" in browser.requests
    assert any('"no"' in complaint for complaint in browser.complaints)
    assert any("Uncaught" in complaint for complaint in browser.complaints)
    assert browser.evaluate(OVERFLOWING) != []
    assert browser.evaluate(CLIPPED) != []


def test_the_pages_policy_forbids_what_it_does_not_do(
    browser: Browser, written: dict[str, Path], tmp_path: Path
) -> None:
    """Had a text become HTML after all, it would neither run nor load anything."""
    broken = tmp_path / "broken.html"
    text = written["eval"].read_text(encoding="utf-8")
    hostile = "<img src='http://127.0.0.1:9/spy.png'><script>document.title = 'taken'</script>"
    broken.write_text(text.replace("<main>", f"<main>{hostile}"), encoding="utf-8")
    browser.open(broken)
    assert browser.evaluate("document.title") != "taken"
    assert len(browser.complaints) == 2
    assert all("Content Security Policy" in complaint for complaint in browser.complaints)


def test_all_is_there_without_a_script(browser: Browser, written: dict[str, Path]) -> None:
    said = "document.querySelector('main').textContent"
    browser.open(written["scout"])
    with_script = browser.evaluate(said)
    browser.open(written["scout"], script=False)
    assert browser.complaints == []
    assert browser.evaluate("document.querySelectorAll('output, thead button').length") == 0
    assert browser.evaluate(said) == with_script


def test_a_table_sorts_by_a_click(browser: Browser, written: dict[str, Path]) -> None:
    """By value, smallest first, then the other way: "0.0101" is above "0.00998"."""
    browser.open(written["scout"])
    figures = [entry["hidden_error"] for entry in PAGES["scout"]["evidence"]["layers"]]
    table = "document.querySelector('table.sortable')"
    layers = f"[...{table}.tBodies[0].rows].map((row) => Number(row.cells[0].textContent))"
    assert browser.evaluate(layers) == list(range(48))
    browser.evaluate(f"{table}.tHead.rows[0].cells[1].querySelector('button').click()")
    rising = sorted(range(48), key=figures.__getitem__)
    assert browser.evaluate(layers) == rising
    browser.evaluate(f"{table}.tHead.rows[0].cells[1].querySelector('button').click()")
    assert browser.evaluate(layers) == rising[::-1]
    sorted_by = f"{table}.tHead.rows[0].cells[1].getAttribute('aria-sort')"
    assert browser.evaluate(sorted_by) == "descending"


def test_a_heat_map_says_the_figure_under_the_pointer(
    browser: Browser, written: dict[str, Path]
) -> None:
    browser.open(written["maverick"])
    box = browser.evaluate(
        "(() => { const one = document.querySelector('svg.cells'); one.scrollIntoView();"
        " const box = one.getBoundingClientRect();"
        " return [box.left, box.top, box.width, box.height] })()"
    )
    left, top, width, height = box
    row, column = 3, 77  # the fourth of 24 layers with experts: layer 7
    browser.call(
        "Input.dispatchMouseEvent", type="mouseMoved",
        x=left + width * (column + 0.5) / 128, y=top + height * (row + 0.5) / 24,
    )  # fmt: skip
    tokens = PAGES["maverick"]["layers"][7]["expert_tokens"][column]
    said = browser.evaluate("document.querySelector('output').textContent")
    assert said == f"layer 7, expert 77: {tokens:,}"


def test_it_prints(browser: Browser, written: dict[str, Path]) -> None:
    """On white, whatever the screen's scheme."""
    browser.open(written["scout"], dark=True)
    browser.call("Emulation.setEmulatedMedia", media="print")
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = browser.evaluate("getComputedStyle(document.body).color")
    browser.call("Emulation.setEmulatedMedia", media="")
    assert (ground, ink) == ("rgb(255, 255, 255)", "rgb(26, 32, 39)")


def test_a_screen_reader_finds_pictures_and_headings(
    browser: Browser, written: dict[str, Path]
) -> None:
    """Chromium's own accessibility tree: every image has a name, sections are regions."""
    browser.open(written["dense"])
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    names: dict[str, list[str]] = {}
    for node in nodes:
        role = node.get("role", {}).get("value")
        names.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert len(names["image"]) >= 5
    assert all(names["image"])
    assert {"Predictions", "Layers", "Provenance"} <= set(names["region"])
    assert names["navigation"] == ["Sections"]
