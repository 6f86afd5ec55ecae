"""Presses the keys of choose_pairs.py's page in Chromium by a programmed taste: the lighter background wins.

    python tests/taste.py ADDRESS

With it the whole way, from choosing to judging, can be recorded on the small world: examples/docs/data.md.
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from small_world import PREFERENCES

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
    page, shown = browser.new_page(), ""
    page.goto(sys.argv[1])
    while page.evaluate("document.activeElement.id") != "finish":  # which is where the page ends
        pair = page.evaluate("document.body.dataset.pair")
        if not pair or pair == shown:
            page.wait_for_timeout(20)
            continue
        sources = [page.evaluate(f"document.querySelector('#{side} img').src") for side in ("left", "right")]
        pictures = [Image.open(io.BytesIO(page.request.get(source).body())) for source in sources]
        left, right = (PREFERENCES["tone"](np.asarray(picture)) for picture in pictures)
        page.keyboard.press("ArrowLeft" if left > right else "ArrowRight")
        shown = pair
    page.keyboard.press("Enter")
    page.wait_for_timeout(500)
