"""The browser that opens the website: one of the system, or Playwright's own."""

import shutil

SYSTEM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = """--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking --disable-component-update
    --disable-sync --disable-default-apps --no-first-run --disable-extensions""".split()


def launch(playwright):
    "A headless Chromium; without any, an error that says how to get one."
    found = next(filter(None, map(shutil.which, SYSTEM)), None)
    try:
        return playwright.chromium.launch(executable_path=found, args=QUIET)
    except Exception as error:
        raise RuntimeError(
            "No Chromium was found to open the website: install one (Debian and Ubuntu: apt-get install chromium; "
            f"elsewhere: .venv/bin/python -m playwright install chromium). {str(error).splitlines()[0]}"
        ) from None
