"""The page in a real browser: log in by keyboard, see it live, in both languages, on a phone."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.sidecar.harness import ADMIN, CHAT, Providers, SidecarProcess, backend

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
MISSING = shutil.which("chromium") is None or shutil.which("chromedriver") is None
# CI installs both; there a missing browser must fail, not skip.
needs_browser = pytest.mark.skipif(
    MISSING and os.environ.get("CI") != "true", reason="needs Debian's chromium and chromium-driver"
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for flag in [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--lang=en"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.binary_location = str(shutil.which("chromium"))
    made = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    yield made
    made.quit()


def text(browser: webdriver.Chrome, name: str) -> str:
    return browser.find_element(By.ID, name).text


@needs_browser
def test_the_overview(
    browser: webdriver.Chrome, providers: Providers, sidecar: Callable[..., SidecarProcess]
) -> None:
    process = sidecar(
        [backend("glm", providers.new().url, label="<b>GLM</b>")], SIDECAR_DASHBOARD_SSE_SECONDS="0.2"
    )
    # The page is drawn anew five times a second, now and then between finding a part and reading it.
    wait = WebDriverWait(browser, 60, ignored_exceptions=[StaleElementReferenceException])
    browser.get(process.url + "/dashboard")
    wait.until(lambda b: b.find_element(By.ID, "token").is_displayed())
    field = browser.switch_to.active_element
    assert field.get_attribute("id") == "token", "the keyboard is where it is needed"
    field.send_keys("wrong", Keys.ENTER)
    wait.until(lambda b: text(b, "login-error") != "")
    field.clear()
    field.send_keys(ADMIN, Keys.ENTER)
    wait.until(lambda b: text(b, "live") == "live")
    assert text(browser, "n-requests") == "0"
    for _ in range(3):
        assert httpx.post(process.url + "/v1/chat/completions", json=CHAT).status_code == 200
    wait.until(lambda b: text(b, "n-requests") == "3" and text(b, "n-tokens") == "45")
    # Names are text, never markup.
    wait.until(lambda b: "<b>GLM</b>" in text(b, "backends"))
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#c-tokens rect"))
    browser.find_element(By.ID, "language").send_keys(Keys.ENTER)
    wait.until(lambda b: text(b, "live") == "实时")
    assert browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == "zh-CN"
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True},
    )
    wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0, "nothing sticks out on a phone"
    cookie = browser.get_cookie("sidecar_session")
    assert cookie is not None
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert browser.execute_script("return document.cookie") == ""
    severe = [
        entry
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE" and "401" not in entry["message"]
    ]
    assert [entry for entry in severe if "favicon" not in entry["message"]] == [], (
        "the page breaks no rule of its own CSP"
    )
    asked = [
        entry["message"]
        for entry in browser.get_log("performance")
        if '"Network.requestWillBeSent"' in entry["message"]
    ]
    urls = [part.split('"')[0] for message in asked for part in message.split('"url":"')[1:]]
    assert urls
    assert all(url.startswith(process.url) for url in urls if url.startswith("http")), (
        "nothing is loaded from elsewhere"
    )


def test_the_page_is_strict(sidecar: Callable[..., SidecarProcess]) -> None:
    process = sidecar()
    page = httpx.get(process.url + "/dashboard")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert httpx.get(process.url + "/dashboard/sse").status_code == 401
    login = process.url + "/dashboard/login"
    assert httpx.post(login, content=ADMIN).status_code == 403, "no Origin"
    assert httpx.post(login, content=ADMIN, headers={"origin": "http://evil.example"}).status_code == 403
    good = httpx.post(login, content=ADMIN, headers={"origin": process.url})
    assert good.status_code == 204
    cookie = {"cookie": good.headers["set-cookie"].split(";")[0]}
    api = process.url + "/api/admin/clients"
    assert httpx.get(api, headers=cookie).status_code == 200
    assert httpx.post(api, json={"name": "x"}, headers=cookie).status_code == 403
    assert httpx.post(api, json={"name": "x"}, headers={**cookie, "origin": process.url}).status_code == 201
    out = httpx.post(process.url + "/dashboard/logout", headers=cookie)
    assert out.status_code == 303
    assert httpx.get(api, headers=cookie).status_code == 401
