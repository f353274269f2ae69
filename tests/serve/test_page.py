"""The page in a real browser: by keyboard, in light and dark, with tokens."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


# What the page asks for comes late, or something else comes instead; see `Page.meddle`.
_MEDDLE = """(rules) => {
  const real = window.fetch;
  window.late = 0;
  window.fetch = async (path, options) => {
    const rule = rules.find((rule) => path.includes(rule.part) && rule.times > 0);
    if (!rule) return real(path, options);
    rule.times -= 1;
    await new Promise((done) => setTimeout(done, rule.ms || 0));
    try {
      if (rule.isGone) throw new TypeError("Failed to fetch");
      return rule.status ? new Response(rule.body, rule) : await real(path, options);
    } finally {
      window.late += 1;
    }
  };
}"""


def meddling(*rules: dict[str, Any]) -> str:
    """A script for the page: to these requests there are other answers."""
    return f"({_MEDDLE})({json.dumps([{'times': 1, **rule} for rule in rules])})"


def listing(part: str, count: int, total: int) -> dict[str, Any]:
    """A rule: so many tasks are told of, however often."""
    tasks = [
        {"name": f"task-{i}", "kind": "tag", "digest": "d", "refused": None} for i in range(count)
    ]
    body = json.dumps({"tasks": tasks, "total": total})
    return {"part": part, "status": 200, "body": body, "times": 1000}


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

    def meddle(self, *rules: dict[str, Any]) -> None:
        """Answer some requests otherwise: those with a rule's `part` in their path, once or so many
        `times`. The answer comes so many `ms` late, or has a `status`, `headers` and `body` of the
        rule's own, or there is none (`isGone`)."""
        self.browser.execute_script(meddling(*rules))

    def wait_for_late(self, count: int = 1) -> None:
        """Until so many meddled requests ended, and the page had time to make something of it."""
        self.until(lambda: self.browser.execute_script("return window.late") == count)
        time.sleep(0.4)

    def is_open(self) -> bool:
        """Whether the list of tasks is open."""
        is_open, is_shown = self.browser.execute_script(  # at one moment
            "return [document.querySelector('#task').ariaExpanded === 'true', "
            "document.querySelector('#options').checkVisibility()]"
        )
        assert is_shown == is_open
        return is_open

    def problems(self) -> list[str]:
        """What the browser complained of."""
        return [line["message"] for line in self.browser.get_log("browser")]


@pytest.fixture
def page(browser: Any, server: Running) -> Page:
    return Page(browser, server)


@contextmanager
def meddled(browser: Any, *rules: dict[str, Any]) -> Iterator[None]:
    """Pages opened meanwhile are meddled with from their beginning."""
    add, remove = (
        "Page.addScriptToEvaluateOnNewDocument",
        "Page.removeScriptToEvaluateOnNewDocument",
    )
    added = browser.execute_cdp_cmd(add, {"source": meddling(*rules)})
    try:
        yield
    finally:
        browser.execute_cdp_cmd(remove, added)


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
    page.find("#task").send_keys(Keys.CONTROL, "a")
    page.find("#task").send_keys("acme")
    page.until(lambda: len(page.all("#options [role=option]")) == 3)
    names = {"acme/many", "acme/spans", "acme/topics", "classify", "tag"}
    check_contrast(
        page, names | {"pastina", "version", "Metric on dev", "6 tasks", "task when empty"}
    )
    page.find("#task").send_keys("/nothing", Keys.ENTER)
    page.until(lambda: page.all("#answer .bad"))
    check_contrast(page, {page.text("answer")})


def check_contrast(page: Page, expected: set[str]) -> None:
    """Fail if some text is too faint in light or dark, or if one of these was not looked at."""
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        found = page.browser.execute_script(_COLORS)
        faint = [
            (what, round(ratio, 2))
            for what, text, back in found
            if (ratio := contrast(text, back)) < 4.5
        ]
        assert not faint, scheme
        assert expected <= {what for what, _, _ in found}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# All text in view but that of buttons that do nothing: what it is, its color, the color behind it.
_COLORS = """
const numbers = (color) => color.match(/[0-9.]+/g).map(Number);
function look(what, element, color) {
  let opacity = numbers(color)[3] ?? 1, back = null;
  for (let at = element; at && !back; at = at.parentElement) {
    const style = getComputedStyle(at);
    opacity *= Number(style.opacity);
    if (style.backgroundColor !== "rgba(0, 0, 0, 0)") back = numbers(style.backgroundColor);
  }
  const text = numbers(color).map((part, i) => opacity * part + (1 - opacity) * back[i]);
  return [what, text.slice(0, 3), back.slice(0, 3)];
}
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement, what = walker.currentNode.data.trim();
  if (!what || !element.checkVisibility() || element.matches("button[aria-disabled=true]")) continue;
  found.push(look(what, element, getComputedStyle(element).color));
}
for (const box of document.querySelectorAll("input, textarea")) {
  found.push(look(box.id, box, getComputedStyle(box).color));
  found.push(look(box.id + " when empty", box, getComputedStyle(box, "::placeholder").color));
}
return found;
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


def test_a_token_that_is_not_known(browser: Any, guarded: tuple[Running, Path]) -> None:
    page = Page(browser, guarded[0])
    page.until(lambda: page.focused() == "token")
    page.keys("nobody's €", Keys.ENTER)
    page.until(lambda: "does not know this token" in page.text("state"))
    page.write(ACME, "token")
    page.find("#token").send_keys(Keys.ENTER)
    page.until(lambda: page.text("state") == "ready")
    assert page.focused() == "task", "the focus is not left in a form that is gone"
    browser.execute_script("sessionStorage.clear()")


def test_the_last_choice_counts(page: Page) -> None:
    """Whichever task is told of first."""
    page.write("saw and plum")
    page.meddle({"part": "tasks/acme/many", "ms": 1000})
    box = page.find("#task")
    box.send_keys("acme/many", Keys.ENTER)
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("globex/sets", Keys.ENTER)
    page.until(lambda: len(page.all("#answer li")) == 3)
    page.wait_for_late()
    assert box.get_attribute("value") == "globex/sets"
    assert "multilabel" in page.text("facts")
    assert len(page.all("#answer li")) == 3


def test_another_choice_while_an_answer_is_awaited(page: Page) -> None:
    page.choose("acme/many")
    page.meddle({"part": "acme/many/predict", "ms": 1000})
    page.write("saw and plum")
    page.until(lambda: page.browser.execute_script("return window.late") == 0)
    time.sleep(0.3)  # it is asked
    page.choose("globex/sets")
    page.wait_for_late()
    assert len(page.all("#answer li")) == 3


@pytest.mark.parametrize("key", [Keys.TAB, Keys.ESCAPE])
def test_a_list_that_comes_late_stays_shut(page: Page, key: str) -> None:
    page.meddle({"part": "limit=50", "ms": 500})
    page.keys(Keys.TAB, Keys.TAB)
    assert page.focused() == "task"
    time.sleep(0.1)  # it is asked for
    page.keys(key)
    page.wait_for_late()
    assert not page.is_open()
    assert page.focused() == ("text" if key == Keys.TAB else "task")


def test_enter_at_once(page: Page) -> None:
    """The list does not open for what was chosen already."""
    page.choose("acme/many")
    time.sleep(0.5)
    assert not page.is_open()
    assert page.focused() == "task"


def test_a_list_of_what_was_typed_before(page: Page) -> None:
    """It comes just after the next letter, and Enter takes nothing from it."""
    page.meddle({"part": "search=&limit=50", "ms": 400}, {"part": "search=p&limit=50", "ms": 2000})
    page.find("#task").click()
    time.sleep(0.3)
    page.keys("p")
    page.wait_for_late()
    page.keys(Keys.ENTER)
    page.until(lambda: "There is no task 'p'" in page.text("answer"))


def test_the_list_does_not_catch_the_focus(page: Page) -> None:
    """Neither by Tab nor by a click beside the names, though it is long enough to be scrolled."""
    page.meddle(listing("limit=50", 50, 70))
    page.find("#task").click()
    page.until(page.is_open)
    more = page.find("#options li:last-child")
    more.click()
    assert more.text == "and 20 more"
    assert page.is_open()
    assert page.focused() == "task"
    page.keys(Keys.TAB)
    assert page.focused() == "text"
    assert not page.is_open()


def test_by_mouse(page: Page) -> None:
    page.find("#task").click()
    page.until(page.is_open)
    page.find("#options [role=option]:nth-child(3)").click()
    page.until(lambda: "version" in page.text("facts"))
    assert page.find("#task").get_attribute("value") == "acme/topics"
    assert not page.is_open()


def test_an_engine_that_starts(browser: Any, server: Running) -> None:
    """The page asks again until it is there."""
    error = {"error": {"code": "not_ready", "message": "The engine is not ready."}}
    starting = {"status": 503, "headers": {"Retry-After": "1"}, "body": json.dumps(error)}
    with meddled(browser, {"part": "limit=25", "times": 2, **starting}):
        page = Page(browser, server)
        assert page.text("state") == "The engine is not ready. Trying again in 1 s."
        page.until(lambda: page.text("state") == "ready")
        assert page.text("count") == "6 tasks"
    page.meddle({"part": "tasks/acme/many", "times": 2, **starting})
    page.write("saw")
    page.choose("acme/many")
    page.until(lambda: len(page.all("#answer li")) == 8)
    page.meddle({"part": "limit=50", **starting})
    page.find("#task").send_keys(Keys.ARROW_DOWN)
    page.until(lambda: "not ready" in page.text("state"))
    page.keys(Keys.TAB)
    page.until(lambda: page.text("state") == "ready")


def test_an_unknown_name(page: Page) -> None:
    """It is said, nothing of the task before stays on view, and it is said for as long as it is so."""
    page.write("saw")
    page.choose("acme/many")
    page.until(lambda: page.all("#answer li"))
    box = page.find("#task")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("acme/mani", Keys.ENTER)
    page.until(lambda: "There is no task 'acme/mani'" in page.text("answer"))
    assert "Did you mean 'acme/many'?" in page.text("answer")
    assert page.text("facts") == page.text("about") == ""
    page.find("#text").send_keys(" and plum")
    time.sleep(0.5)
    assert "There is no task 'acme/mani'" in page.text("answer")
    page.choose("acme/many")
    page.until(lambda: page.all("#answer li"))


def test_a_name_without_enter(page: Page) -> None:
    """Whoever goes on to the text means the name in the box."""
    page.write("saw")
    page.until(lambda: page.text("answer") == "No task is chosen.")
    page.find("#task").click()
    page.keys("globex/sets", Keys.TAB)
    page.until(lambda: len(page.all("#answer li")) == 3)
    page.find("#task").click()
    page.keys("what", Keys.ESCAPE, Keys.ESCAPE)
    assert page.find("#task").get_attribute("value") == "globex/sets"
    page.keys(Keys.BACKSPACE, Keys.TAB)
    page.until(lambda: "There is no task 'globex/set'" in page.text("answer"))
    assert page.text("facts") == ""


def test_a_task_that_was_refused(page: Page) -> None:
    body = json.dumps({"name": "bad", "refused": "there is no adapter.json"})
    page.meddle({"part": "tasks/bad", "status": 200, "body": body})
    page.find("#task").send_keys("bad", Keys.ENTER)
    page.until(lambda: page.text("answer") == "bad was refused: there is no adapter.json")


def test_answers_that_cannot_be_read(page: Page) -> None:
    """What happened is said in words; a server that is away is asked again."""
    busy = {"status": 503, "statusText": "Service Unavailable", "body": "Service Unavailable"}
    broken = {"status": 500, "body": "<h1>Oh</h1>"}
    page.choose("acme/many")
    page.meddle({"part": "predict", **busy}, {"part": "predict", "isGone": True})
    page.write("saw")
    page.until(lambda: page.text("answer") != "")
    told = "The server's answer, status 503 Service Unavailable, cannot be read."
    assert page.text("answer") == f"{told} Trying again in 2 s."
    page.until(lambda: "cannot be reached. Trying again" in page.text("answer"))
    page.until(lambda: len(page.all("#answer li")) == 8)
    page.meddle({"part": "predict", **broken})
    page.write("plum")
    told = "The server's answer, status 500, cannot be read. Please try again."
    page.until(lambda: page.text("answer") == told)
    page.write("plum and saw")
    page.until(lambda: len(page.all("#answer li")) == 8)


def test_quick_turns_of_the_table(browser: Any, server: Running) -> None:
    """They end at the last page, and the button keeps the focus."""
    pages = [listing(f"offset={at}&", count, 30) for at, count in ((0, 25), (25, 5), (50, 0))]
    with meddled(browser, *pages):
        page = Page(browser, server)
        page.until(lambda: page.text("page") == "1 to 25 of 30")
        button = page.find("#after")
        button.send_keys(Keys.ENTER, Keys.ENTER)
        page.until(lambda: page.text("page") == "26 to 30 of 30")
        assert len(page.all("#rows tr")) == 5
        assert button.get_attribute("aria-disabled") == "true"
        assert page.focused() == "after"


def test_colors_of_the_system(page: Page) -> None:
    """Where it sets all colors, the option that Enter takes is seen, and so are the bars."""
    page.write("saw")
    page.choose("acme/many")
    page.until(lambda: page.all("#answer li"))
    page.find("#task").send_keys(Keys.CONTROL, "a")
    page.find("#task").send_keys("acme")
    page.until(lambda: len(page.all("#options [role=option]")) == 3)
    features = [{"name": "forced-colors", "value": "active"}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    taken, other, bar, room = (
        page.find(css).value_of_css_property("background-color")
        for css in ("[aria-selected=true]", "[aria-selected=false]", ".bar", ".room")
    )
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert taken != other
    assert bar != room


def test_nothing_comes_from_elsewhere(page: Page) -> None:
    names = page.browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    origin = page.browser.execute_script("return location.origin")
    assert names
    assert all(name.startswith(origin) for name in names)
    page.browser.get_log("browser")
