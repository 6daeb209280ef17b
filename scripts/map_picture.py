"""Draw the picture of the map of models, in Chromium: python scripts/map_picture.py [path of the browser]"""
import shutil
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from lps.core.files import write_atomic
from lps.index.map import bundled_map

PICTURE = Path(__file__).resolve().parent.parent/"nbs/images/market-map.png"
MODEL = "task07_run5"  # part of the name of the chosen model


def photograph(page: Path, browser: str) -> Image.Image:
    "Return a screenshot of the page with one model chosen"
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        tab = chromium.new_page(viewport=dict(width=1200, height=960), color_scheme="light")
        tab.goto(page.as_uri())
        tab.wait_for_selector("body[data-ready]")
        tab.fill("#search", MODEL)
        tab.keyboard.press("Enter")
        tab.evaluate("document.activeElement.blur()")
        tab.wait_for_timeout(1000)  # until all models are lit again
        taken = tab.screenshot()
        chromium.close()
    return Image.open(BytesIO(taken))


def draw(browser: str):
    "Write the picture, in 128 colours"
    with tempfile.TemporaryDirectory() as folder: picture = photograph(bundled_map(Path(folder)/"map.html"), browser)
    small = BytesIO()
    picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    write_atomic(PICTURE, small.getvalue())


if __name__ == "__main__":
    found = sys.argv[1:2] or [path for path in map(shutil.which, ("chromium", "google-chrome")) if path]
    if not found: sys.exit("no browser on PATH: name one, python scripts/map_picture.py /path/to/chromium")
    draw(found[0])
