"""Writes docs/page-desktop.png, docs/page-tablet.png and docs/page-phone.png: the page, as `dpa serve` shows it.

    python scripts/make_screenshots.py runs/demo/iter_3/policy --reward runs/demo/reward_model

It starts the server, asks a question of the demo world in a preset's direction (on the tablet in five), and looks with
Debian's Chromium (`apt-get install chromium`) through Playwright. `--all FOLDER` keeps every width in light and dark.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from dpa.world.questions import make_questions

DOCS = Path(__file__).parents[1] / "docs"
SIZES = {"desktop": (1440, 900), "tablet": (820, 1100), "phone": (390, 780)}
KEPT = {("desktop", "light"), ("tablet", "light"), ("phone", "dark")}
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def main() -> None:
    """Serve, look, stop."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="policy folder")
    parser.add_argument("--reward", type=Path, help="reward model folder: scores beside the answers")
    parser.add_argument("--preset", default="terse", help="direction of the steered answer")
    parser.add_argument("--all", type=Path, help="folder for every width in light and dark")
    args = parser.parse_args()
    command = [sys.executable, "-m", "dpa", "serve", str(args.model), "--name", "demo", "--port", "8000"]
    if args.reward:
        command += ["--reward", str(args.reward)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        address = next(line.rpartition(" at ")[2].strip() for line in server.stdout or () if " at http" in line)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            for size in SIZES:
                for scheme in ("light", "dark"):
                    if (size, scheme) in KEPT:
                        _look(browser, address, args.preset, size, scheme, DOCS / f"page-{size}.png")
                    if args.all:
                        args.all.mkdir(parents=True, exist_ok=True)
                        _look(browser, address, args.preset, size, scheme, args.all / f"{size}-{scheme}.png")
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=60)


def _look(browser: Browser, address: str, preset: str, size: str, scheme: str, file: Path) -> None:
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    page.fill("#question", make_questions(1, seed=77)[0].text)
    page.click(f"#presets >> text={preset}")
    page.click("#sweep" if size == "tablet" else "#go")
    page.wait_for_selector("article[aria-busy]", state="detached", timeout=60_000)
    page.wait_for_timeout(600)
    page.evaluate("document.activeElement.blur()")
    if size == "desktop":
        page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=file)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")
    context.close()


if __name__ == "__main__":
    main()
