"""The report in a real browser: no complaint, no request, tables that sort, every figure with words, nothing wider than a phone (looks)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, Page
from looks import wrong
from made_study import make

from analysis import report as reports
from analysis.comparing import compare_studies
from analysis.evidence import gather
from analysis.replicates import Bootstrap

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
QUICK = Bootstrap(200)
COLUMN = """(function (at) {
  var table = document.querySelector('#cells table'), head = table.tHead.rows[0].cells[at];
  head.querySelector('button').click();
  return Array.from(table.tBodies[0].rows).map(function (row) { return parseFloat(row.cells[at].dataset.v); });
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as held:
        yield held


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tasks = {"phantom-chest": "classification", "lungs": "segmentation"}
    made = make(tmp_path_factory.mktemp("browser"), {"random": 0.0, "random-b": 0.0, "simclr": 0.7}, tasks=tasks, seeds=3, images=120)
    reports.report(str(made), gather(str(made), QUICK))
    return made


@pytest.fixture(scope="module")
def page(browser: Browser, out: Path) -> Page:
    return browser.open((out / "report" / "index.html").as_uri())


def test_nothing_is_wrong_with_it(page: Page) -> None:
    assert page.run("document.title") == "made: Allograft report"
    assert page.run("document.querySelectorAll('svg.figure').length") >= 4
    assert page.run("document.querySelectorAll('table.sortable').length") >= 6
    assert wrong(page) == []


def test_tables_sort_by_a_click_up_and_down(page: Page) -> None:
    seconds = page.run(
        "Array.from(document.querySelectorAll('#cells thead th')).findIndex(function (h) { return h.textContent == 'seconds'; })"
    )
    up = page.run(f"{COLUMN}({seconds})")
    down = page.run(f"{COLUMN}({seconds})")
    assert len(up) == 18
    assert up == sorted(up)
    assert down == sorted(up, reverse=True)
    assert up != down
    assert page.run("document.querySelector('#cells th[aria-sort]').getAttribute('aria-sort')") == "descending"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_window_and_it_can_be_read(page: Page, width: int, dark: bool, tmp_path: Path) -> None:
    page.width(width, dark=dark)
    assert page.run("document.documentElement.scrollWidth") <= width
    colours = page.run("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    lightness = [sum(map(int, colour[colour.index("(") + 1 : -1].split(",")[:3])) for colour in colours]
    assert (lightness[0] > lightness[1]) is dark
    page.screenshot(tmp_path / "shot.png")
    assert (tmp_path / "shot.png").stat().st_size > 10_000


def test_what_is_folded_away_is_printed(browser: Browser, out: Path) -> None:
    page = browser.open((out / "report" / "index.html").as_uri())
    closed = "Array.from(document.querySelectorAll('details')).filter(function (one) { return !one.open; }).length"
    before = page.run(closed)
    assert before > 0
    printed = page.call("Page.printToPDF")["data"]
    page.run("dispatchEvent(new Event('beforeprint')), 0")
    assert page.run(closed) == 0
    page.run("dispatchEvent(new Event('afterprint')), 0")
    assert page.run(closed) == before
    page.run("document.querySelectorAll('details').forEach(function (one) { one.remove(); }), 0")
    assert len(page.call("Page.printToPDF")["data"]) < 0.95 * len(printed)


def test_two_studies_beside_each_other(browser: Browser, out: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", {"random": 0.0, "simclr": 1.5}, tasks={"phantom-chest": "classification"}, seeds=4, images=120)
    url = compare_studies(str(out), str(other), QUICK)
    page = browser.open(Path(url).as_uri())
    assert wrong(page) == []
    assert "2 settings stand in both studies" in page.run("document.querySelector('h1').textContent")
    assert page.run("document.querySelectorAll('#results tbody tr').length") == 2
    assert "cells.seeds" in page.run("document.querySelector('#settings').textContent")
    assert page.run("document.querySelectorAll('#alone tbody tr').length") == 4


def test_what_is_wrong_with_a_page_is_found(browser: Browser, out: Path, tmp_path: Path) -> None:
    text = (out / "report" / "index.html").read_text()
    spoilt = text.replace("return down ? -order : order", "return order").replace('href="#cells"', 'href="#nowhere"')
    spoilt = spoilt.replace("<main>", '<main><img src="http://127.0.0.1:1/x.png"><div style="width:2000px">wide</div>', 1)
    (tmp_path / "index.html").write_text(spoilt.replace("    return down", "    console.error('oh'); return down"))
    said = "\n".join(wrong(browser.open((tmp_path / "index.html").as_uri())))
    for word in ("console: ", "request: http://127.0.0.1:1/x.png", "without words: <img", "reference to nothing: nowhere", "px wide in"):
        assert word in said
    rows = "".join(f"<tr><td>{n:,}</td></tr>" for n in (9_000, 23_508_032, 464_154))
    commas = f'<table class="sortable"><thead><tr><th><button>parameters</button></th></tr></thead><tbody>{rows}</tbody></table>'
    (tmp_path / "index.html").write_text(text.replace("<main>", f"<main>{commas}", 1))
    assert "does not sort: table 0, parameters" in wrong(browser.open((tmp_path / "index.html").as_uri()))
    (tmp_path / "index.html").write_text(text.replace("a, b) {", "a, b) { return 0;"))
    assert "does not sort: table" in "\n".join(wrong(browser.open((tmp_path / "index.html").as_uri())))
