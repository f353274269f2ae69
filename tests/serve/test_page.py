"""The page in a real browser: by keyboard, in light and dark, with tokens."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.serving import ACME, Running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.allow_hosts(["127.0.0.1", "localhost", "::1"]),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver here"),
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning"
    ),  # selenium leaves the driver's pipes open
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--window-size=1000,1000",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(str(DRIVER))
    with webdriver.Chrome(options=options, service=service) as browser:
        browser.set_page_load_timeout(60)
        yield browser


class Page:
    """The page in a browser, and what is on it."""

    def __init__(self, browser: Any, server: Running) -> None:
        self.browser = browser
        browser.get(server.url)
        self.until(lambda: self.text("state") not in ("", "Loading ..."))

    def find(self, css: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def text(self, id: str) -> str:
        return self.find(f"#{id}").text

    def until(self, is_so: Any) -> None:
        passing = [StaleElementReferenceException]  # it was drawn anew while we looked
        wait = WebDriverWait(self.browser, 30, poll_frequency=0.05, ignored_exceptions=passing)
        wait.until(lambda _: is_so(), f"the page shows: {self.find('main').text[:800]}")

    def keys(self, *keys: str) -> None:
        """Into whatever has the focus."""
        self.browser.switch_to.active_element.send_keys(*keys)

    def focused(self) -> str:
        return self.browser.switch_to.active_element.get_attribute("id")

    def choose(self, name: str) -> None:
        box = self.find("#task")
        box.clear()
        box.send_keys(name)
        box.send_keys(Keys.ENTER)  # at once: what was typed counts, not what is listed still
        self.until(lambda: "version" in self.text("facts"))

    def write(self, text: str, id: str = "text") -> None:
        box = self.find(f"#{id}")
        box.clear()
        box.send_keys(text)

    def problems(self) -> list[str]:
        """What the browser complained of."""
        return [line["message"] for line in self.browser.get_log("browser")]


@pytest.fixture
def page(browser: Any, server: Running) -> Page:
    return Page(browser, server)


def test_by_keyboard_alone(page: Page) -> None:
    """From the top to an answer without a mouse."""
    page.keys(Keys.TAB)
    assert page.browser.switch_to.active_element.text == "To the text"
    page.keys(Keys.TAB)
    assert page.focused() == "task"
    page.keys("spans")
    page.until(lambda: len(page.all("#options [role=option]")) == 1)
    box = page.find("#task")
    assert box.get_attribute("aria-expanded") == "true"
    active = box.get_attribute("aria-activedescendant")
    assert page.find(f"#{active}").text.startswith("acme/spans")
    page.keys(Keys.ENTER)
    page.until(lambda: "tag" in page.text("facts"))
    assert box.get_attribute("aria-expanded") == "false"
    page.keys(Keys.TAB)
    assert page.focused() == "text"
    text = "we need 😀 plum and nail today"
    page.browser.execute_script(
        "const t = document.activeElement; t.value = arguments[0];"
        "t.dispatchEvent(new Event('input'))",
        text,
    )
    page.until(lambda: page.all("#answer mark"))
    shown = page.find("#answer .spans").get_attribute("textContent")
    labels = [mark.text for mark in page.all("#answer mark small")]
    for label in labels:
        shown = shown.replace(label, "", 1)
    assert shown == text, "spans begin and end where the server says"
    page.keys(Keys.TAB)
    assert page.focused() == "filter"


def test_answers_as_you_type(page: Page) -> None:
    page.choose("acme/many")
    page.write("saw")
    page.until(lambda: len(page.all("#answer li")) == 8)
    first = page.text("answer")
    assert page.find("#answer li.yes .name").text.startswith("label ")
    assert "ms" in page.text("about")
    digest = page.find("#facts").text.split("\n")[-1]
    assert digest in page.text("about")
    page.find("#text").send_keys(" and a plum and a drill")
    page.until(lambda: page.text("answer") not in ("", first))
    page.choose("globex/number")
    page.until(lambda: page.all("#answer .value"))
    float(page.find("#answer .value").text)
    page.choose("globex/sets")
    page.until(lambda: len(page.all("#answer li")) == 3)
    page.write("[SEP] [SEP] [SEP]")
    page.until(lambda: page.all("#answer .bad"))
    assert "special tokens" in page.text("answer")
    page.write("")
    page.find("#text").send_keys(" ", Keys.BACKSPACE)
    page.until(lambda: page.text("answer") == "")
    page.choose("pairs")
    page.write("saw")
    assert page.find("#second").is_displayed()
    page.write("plum", "pair")
    page.until(lambda: len(page.all("#answer li")) == 2)
    assert all("422" in problem for problem in page.problems())


def test_the_table(page: Page) -> None:
    page.until(lambda: page.text("count") == "6 tasks")
    rows = [row.text for row in page.all("#rows tr")]
    assert rows[0].startswith("acme/many classify 17")
    page.find("#filter").send_keys("globex")
    page.until(lambda: page.text("count") == "2 tasks")
    page.find("#rows button").click()
    page.until(lambda: "regress" in page.text("facts"))
    assert page.focused() == "text"


def test_light_and_dark(page: Page) -> None:
    """All text stands out from what is behind it, by 4.5 to 1 or more."""
    page.choose("acme/spans")
    page.write("we need plum and nail today")
    page.until(lambda: page.all("#answer mark"))
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for css in ("body", "label", "mark", "#about", "#facts dd", "th button", "caption"):
            colors = page.browser.execute_script(_COLORS, page.find(css))
            assert contrast(*colors) >= 4.5, (scheme, css, colors)
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


_COLORS = """
const text = getComputedStyle(arguments[0]).color;
let element = arguments[0], back = "";
while (element) {
  back = getComputedStyle(element).backgroundColor;
  if (back !== "rgba(0, 0, 0, 0)") break;
  element = element.parentElement;
}
return [text, back].map((color) => color.match(/[0-9.]+/g).slice(0, 3).map(Number));
"""


def contrast(text: list[float], back: list[float]) -> float:
    """WCAG 2's ratio."""

    def light(color: list[float]) -> float:
        parts = [
            part / 255 / 12.92 if part / 255 <= 0.04045 else ((part / 255 + 0.055) / 1.055) ** 2.4
            for part in color
        ]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(text), light(back)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_everything_has_a_name(page: Page) -> None:
    """As a screen reader hears it: no input, button or region without a name."""
    page.choose("acme/many")
    page.browser.execute_cdp_cmd("Accessibility.enable", {})
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    told = (
        "textbox",
        "combobox",
        "button",
        "region",
        "searchbox",
        "listbox",
        "table",
        "navigation",
    )
    seen = set()
    for node in nodes:
        role = node.get("role", {}).get("value")
        if role in told and not node.get("ignored"):
            assert node.get("name", {}).get("value"), node
            seen.add(role)
    assert {"textbox", "combobox", "button", "region", "table"} <= seen


def test_a_token_is_asked_for(browser: Any, guarded: tuple[Running, Path]) -> None:
    page = Page(browser, guarded[0])
    page.until(lambda: page.find("#login").is_displayed())
    page.write(ACME, "token")
    page.find("#token").send_keys(Keys.ENTER)
    page.until(lambda: page.text("count") == "2 tasks")
    assert not page.find("#login").is_displayed()
    browser.execute_script("sessionStorage.clear()")


def test_nothing_comes_from_elsewhere(page: Page) -> None:
    names = page.browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    origin = page.browser.execute_script("return location.origin")
    assert names
    assert all(name.startswith(origin) for name in names)
    page.browser.get_log("browser")
