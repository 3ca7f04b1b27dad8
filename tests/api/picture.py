"""``python -m tests.api.picture``: docs/fleet.png, taken from the real page over a fleet after a busy night."""

from __future__ import annotations

import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from selenium.webdriver.support.ui import WebDriverWait

from reconciler.api.state import DaemonState
from reconciler.settings import Settings
from tests.api.browser import started
from tests.api.conftest import NODES, Site
from tests.api.showcase import Showcase, busy_night

PICTURE = Path(__file__).parents[2] / "docs" / "fleet.png"


def main(target: Path = PICTURE, width: int = 1200, height: int = 1290) -> None:
    """Take it."""
    with tempfile.TemporaryDirectory() as scratch:
        fleet = Showcase(Path(scratch) / "fleet", NODES)
        busy_night(fleet)
        soon = datetime.now(UTC) + timedelta(seconds=230)
        settings = Settings(db=fleet.db, http={"port": 0})  # type: ignore[arg-type]
        site = Site(settings, DaemonState(next_pass=soon, revision="4f2a9c1d7e03"))
        browser = started(Path(scratch) / "profile")
        try:
            browser.set_window_size(width, height)
            browser.get(site.url + "/")
            WebDriverWait(browser, 60).until(lambda b: b.find_element("id", "live").text == "live")
            browser.save_screenshot(str(target))
        finally:
            browser.quit()
            site.close()
            fleet.close()


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:2]), *(int(word) for word in sys.argv[2:4]))
