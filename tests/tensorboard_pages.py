"""Look at a run's TensorBoard pages in a browser: screenshots, and whether what belongs there is.

    python tests/tensorboard_pages.py lightning_logs screenshots

starts TensorBoard on this machine's loopback and Chromium without a window. It ends with an error
where a page lacks what `Monitor`, `Panels` and `Writer` put there. Needs the extra `dev` and
Debian's package `chromium`.
"""

import socket
import subprocess
import sys
import time
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.request import urlopen

if TYPE_CHECKING:
    from playwright.sync_api import Page

SETTLED = 3000  # ms that a page's charts take to be drawn

# What is to be seen of a fit of DeepRED whose true image is known.
PAGES = {
    "scalars": ["curves/data_term", "curves/gap", "curves/denoiser_busy_seconds"],
    "custom_scalars": [
        "Figure 3",
        "objective (Eq. 4), data term",
        "gap ‖x − T_θ(z)‖",
        "PSNR in dB",
    ],
    "images": ["panels/average", "panels/error × 5", "panels/measurement", "panels/out"],
    "hparams": ["denoiser", "method", "DeepRED", "final/psnr"],
}


def look(page: "Page", address: str, name: str, texts: list[str], folder: Path) -> list[str]:
    """Save a page's picture; return the texts that it lacks."""
    page.goto(f"{address}/#{name}")
    missing = []
    for text in texts:
        try:
            page.get_by_text(text, exact=True).first.wait_for(timeout=20_000)
        except Exception:  # the browser's own kinds of time-out
            missing.append(text)
    page.wait_for_timeout(SETTLED)
    page.screenshot(path=folder / f"tensorboard_{name}.png")
    return missing


def main(logs: str, folder: str) -> None:
    """Look at all pages of `PAGES` of the runs under `logs`."""
    from playwright.sync_api import sync_playwright  # of the extra dev; pytest imports this file

    browser = which("chromium") or sys.exit("expected the program chromium, found none")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logs]
    Path(folder).mkdir(parents=True, exist_ok=True)
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)], stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(60):
            try:
                urlopen(address).close()
                break
            except URLError:
                time.sleep(0.5)
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(
                executable_path=browser, args=["--no-sandbox", "--disable-gpu"]
            )
            lacking = {}
            for name, texts in PAGES.items():
                page = chromium.new_page(viewport={"width": 1600, "height": 900})
                lacking[name] = look(page, address, name, texts, Path(folder))
                page.close()
            chromium.close()
    finally:
        server.terminate()
        server.wait()
    faults = [f"{name}: no {', '.join(texts)}" for name, texts in lacking.items() if texts]
    sys.exit("\n".join(faults) if faults else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
