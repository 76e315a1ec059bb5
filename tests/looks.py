"""What is wrong with a page of a report, as a browser sees it: for tests of made studies and for any study's own (benchmarks/look.py).

with Browser() as browser:
    page = browser.open(Path(out, "report/index.html").as_uri()); assert wrong(page) == []
"""

from pathlib import Path

from browser import Page

WIDTHS = (1280, 390)  # pixels of a desk's window and of a phone's
FIGURES = "Array.from(document.querySelectorAll('svg, img'))"
SILENT = f"""{FIGURES}.filter(function (one) {{
  var words = one.getAttribute('aria-label') || one.getAttribute('alt')
    || (one.querySelector('title') && one.querySelector('desc') && one.querySelector('desc').textContent);
  return !words || words.length < 10; }}).map(function (one) {{ return one.outerHTML.slice(0, 80); }})"""
DANGLING = """Array.from(document.querySelectorAll('[aria-labelledby], a[href^="#"]')).map(function (one) {
  return one.getAttribute('aria-labelledby') || one.getAttribute('href').slice(1); }).join(' ').split(' ').filter(function (id) {
  return id && !document.getElementById(id); })"""
# Every head of every table is clicked twice. Numbers come before what has none, as the page's own script orders them; what is printed with
# commas between its thousands is read as people read it.
UNSORTED = """Array.from(document.querySelectorAll('table.sortable')).flatMap(function (table, number) {
  return Array.from(table.tHead.rows[0].cells).filter(function (head, at) {
    var read = function () { head.querySelector('button').click();
      return Array.from(table.tBodies[0].rows, function (row) { var cell = row.cells[at];
        return cell.dataset.v !== undefined ? cell.dataset.v : cell.textContent.trim().replace(/([0-9]),(?=[0-9]{3})/g, '$1'); }); };
    var up = read(), said = head.getAttribute('aria-sort'), down = read(), numbers = up.map(parseFloat).filter(isFinite);
    var rises = numbers.every(function (x, i) { return !i || numbers[i - 1] <= x; });
    var same = up.slice().sort().join() === down.slice().sort().join();
    return !(rises && same && said === 'ascending' && head.getAttribute('aria-sort') === 'descending');
  }).map(function (head) { return 'table ' + number + ', ' + head.textContent; }); })"""
ESCAPES = """Array.from(document.querySelectorAll('body *')).filter(function (one) {
  return one.getBoundingClientRect().right > innerWidth + 1 && !one.closest('.scroll, .wide, nav, pre, svg'); }).map(function (one) {
  return one.tagName + ' ' + one.className + ' ' + one.textContent.slice(0, 40); }).slice(0, 3)"""


def wrong(page: Page) -> list[str]:
    """All that is wrong, in words: complaints of the browser, requests, figures without words, references to nothing, tables that do not
    sort, and what is wider than the window."""
    found = []
    for what, expression in (("a figure without words", SILENT), ("a reference to nothing", DANGLING), ("does not sort", UNSORTED)):
        found += [f"{what}: {one}" for one in page.run(expression)]
    for width in WIDTHS:
        page.width(width)
        if (wide := page.run("document.documentElement.scrollWidth")) > width:
            found.append(f"{wide} px wide in a window of {width}: {page.run(ESCAPES)}")
    return found + [f"console: {error}" for error in page.errors] + [f"request: {url}" for url in page.requests]


def shots(page: Page, folder: Path, name: str = "report") -> list[Path]:
    """The whole page at both widths, light, and dark on a desk."""
    made = []
    for width, dark in ((WIDTHS[0], False), (WIDTHS[1], False), (WIDTHS[0], True)):
        page.width(width, dark=dark)
        made.append(folder / f"{name}-{width}{'-dark' if dark else ''}.png")
        page.screenshot(made[-1], whole=True)
    return made
