"""Pictures of a report for the docs: its beginning on a desktop and on a phone, and its trajectories.

    python -m artifacts.pictures --report runs/a3t/report.html --out docs/images

Needs playwright (requirements/test.txt) and Chromium (Debian: apt install chromium).
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import shutil
from dataclasses import dataclass
from pathlib import Path

from artifacts.cli import run_main

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
VIEWER = "#trajectories"  # the section that a report without trajectories lacks
# Picture: width and height in CSS pixels, pixels of the picture for each, and what to scroll to.
PICTURES = {
    "report-desktop": (1280, 900, 1, "h1"),
    "report-phone": (390, 844, 2, "h1"),
    "report-trajectories": (1280, 900, 1, VIEWER),
}


@dataclass(frozen=True, kw_only=True)
class Args:
    report: Path = Path("runs/a3t/report.html")
    """The report."""
    out: Path = Path("docs/images")
    """Folder for the pictures."""


def find_browser() -> str | None:
    """The path of an installed Chromium."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def has_trajectories(report: Path) -> bool:
    return f'id="{VIEWER.removeprefix("#")}"' in report.read_text(encoding="utf-8", errors="replace")


def main(args: Args) -> None:
    if not args.report.is_file():
        raise ValueError(f"no such report: {args.report}; python -m artifacts.report --run RUN writes one")
    from playwright.sync_api import sync_playwright  # on demand: the path is checked without it

    if (browser := find_browser()) is None:
        raise ValueError(f"found none of {', '.join(BROWSERS)}; on Debian: apt install chromium")
    has_viewer = has_trajectories(args.report)
    args.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name, (width, height, scale, place) in PICTURES.items():
            if place == VIEWER and not has_viewer:
                print(f"{name}.png is left out: {args.report} has no trajectories")
                continue
            page = chromium.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
            page.goto(args.report.resolve().as_uri())
            if has_viewer:
                page.wait_for_selector("#list button")  # made once the data is unpacked
            page.eval_on_selector(place, "element => element.scrollIntoView()")
            page.screenshot(path=args.out / f"{name}.png")
            print(args.out / f"{name}.png")
        chromium.close()


if __name__ == "__main__":
    run_main(main, Args, __doc__)
