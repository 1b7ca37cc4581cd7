"""The app in a real browser: a click, a picture, a slider, at the width of a desk and of a phone. `make browser-test`.

    python tests/browser_app.py FOLDER [--browser /usr/bin/chromium]

Starts the app with the demo model, clicks, waits for the clips, and writes desk.png and phone.png into the folder, for
a person to look at. Needs the app extra, playwright and a Chromium; downloads none.
"""

import argparse
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from shutil import which
from time import monotonic, sleep

from playwright.sync_api import Page, sync_playwright

WIDTHS = {"desk": 1280, "phone": 390}
MINUTES = 10  # for what one click asks for, on a busy machine
# whether the canvas of a column holds more than one colour, so a clip was drawn
DRAWN = """column => {
  const canvas = document.querySelector(`clip-wall canvas[data-column="${column}"][data-row="0"]`);
  if (!canvas || !canvas.width) return false;
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return new Set(new Uint32Array(data.buffer)).size > 16;
}"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    start = monotonic()
    while monotonic() - start < 60 * MINUTES:
        assert process.poll() is None, f"the app ended with {process.returncode}"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            sleep(1)
    raise TimeoutError(url)


def names(page: Page) -> list[str]:
    return page.locator("clip-wall .cells .name").all_inner_texts()


def wait_for_clips(page: Page, wanted: list[str]) -> None:
    page.wait_for_function(
        "wanted => JSON.stringify([...document.querySelectorAll('clip-wall .cells .name')].map(e => e.textContent))"
        " === JSON.stringify(wanted)",
        arg=wanted,
        timeout=60_000 * MINUTES,
    )
    for column in range(len(wanted)):
        page.wait_for_function(DRAWN, arg=column, timeout=60_000)


def check(page: Page, folder: Path) -> None:
    """A click, three clips; another mode, whose clips of full and plain sparse are there already."""
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.get_by_role("button", name="Generate").click()
    wait_for_clips(page, ["full", "plain sparse", "ours"])
    assert "rsa.enable(pipe, sparsity=0.8" in page.locator("body").inner_text()
    seconds = page.locator("clip-wall dd").all_inner_texts()
    for name, width in WIDTHS.items():
        page.set_viewport_size({"width": width, "height": 900})
        sleep(1)
        page.screenshot(path=folder / f"{name}.png", full_page=True)
        beyond = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert beyond <= 0, f"{name}: {beyond} pixels are to the right of the window"
    page.locator("clip-wall .wipe input").fill("10")
    page.get_by_label("paper", exact=True).check()
    wait_for_clips(page, ["full", "plain sparse", "paper"])
    again = page.locator("clip-wall dd").all_inner_texts()
    assert again[:8] == seconds[:8], "full or plain sparse was made again"
    assert not errors, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--browser", default=which("chromium") or which("chromium-browser") or which("google-chrome"))
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    words = ["app", "--steps", "4", "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-m", "rectified_spaattn", *words])
    try:
        wait_for(f"http://127.0.0.1:{port}/", process)
        with sync_playwright() as tools:
            browser = tools.chromium.launch(executable_path=asked.browser, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": WIDTHS["desk"], "height": 900})
            page.goto(f"http://127.0.0.1:{port}/")
            check(page, asked.folder)
            browser.close()
    finally:
        process.terminate()
        process.wait(60)
    print(f"1 passed: look at {', '.join(str(asked.folder / f'{name}.png') for name in WIDTHS)}")


if __name__ == "__main__":
    main()
