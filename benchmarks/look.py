"""A study's report in headless Chromium: complaints, requests, figures without words, tables that do not sort; and screenshots to look at.

    python benchmarks/look.py OUT [FOLDER]        # screenshots of 1280 and 390 px go to FOLDER, by default OUT/report/shots

The checks are those of tests/test_report_browser.py, on the pages of a study that really ran. Ends with 1 where something is wrong.
"""

import sys
from pathlib import Path

from base.paths import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from browser import CHROMIUM, Browser
from looks import shots, wrong


def main() -> int:
    if len(sys.argv) not in (2, 3) or CHROMIUM is None:
        print(__doc__ if CHROMIUM else "no Chromium here")
        return 2
    report = Path(sys.argv[1], "report").resolve()
    folder = Path(sys.argv[2]) if len(sys.argv) == 3 else report / "shots"
    folder.mkdir(parents=True, exist_ok=True)
    found = 0
    with Browser() as browser:
        for file in sorted(report.glob("*.html")):
            page = browser.open(file.as_uri())
            figures, tables = (page.run(f"document.querySelectorAll('{name}').length") for name in ("svg, img", "table.sortable"))
            made = shots(page, folder, file.stem)  # before the checks, which sort every table
            said = wrong(page)
            found += len(said)
            print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB, {figures} figures, {tables} tables, {len(said)} things wrong")
            print("".join(f"  {one}\n" for one in said), end="")
            print("".join(f"  {shot}\n" for shot in made), end="")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
