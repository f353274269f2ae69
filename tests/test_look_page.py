"""The page of a look: what stands in the file, and what a real browser makes of it."""

import base64
import hashlib
import html.parser
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pastina.errors import PastinaError
from pastina.looking import report
from pastina.looking.look import look
from pastina.looking.records import Look
from pastina.looking.report import page, page_data
from pastina.recipe import PastaOptions
from tests.adapter_folder import make_adapter
from tests.browser import browser, needs_browser

EVIL = (
    "plum </script><script>document.title='pwned'</script>"
    "<img src=x onerror=\"document.title='pwned'\"> {{data}} &amp; <!-- \u2028 ' \" $&"
)
TEXTS = [("we need the plum", "send a hammer now"), ("thanks", EVIL)]


@pytest.fixture(scope="module")
def seen(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Look:
    folder = tmp_path_factory.mktemp("seen") / "evil"
    name = "<b>evil</b> & {{script}}"
    make_adapter(bert, folder, "classify", is_pair=True, name=name, max_length=60)
    return look(folder, TEXTS)


class Reader(html.parser.HTMLParser):
    """The elements of a page, and what its scripts hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.title = ""
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside == "title":
            self.title += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def test_no_text_leaves_its_place(seen: Look) -> None:
    read = Reader(page(seen))
    tags = [tag for tag, _ in read.elements]
    assert tags.count("script") == 2
    assert not {"img", "b", "iframe", "link"} & set(tags)
    data = json.loads(read.scripts[0])
    assert data["texts"][1]["text_pair"] == EVIL
    assert data["name"] == "<b>evil</b> & {{script}}"
    assert read.title.startswith("<b>evil</b> & {{script}}")
    assert "{{" not in read.scripts[1]


def test_its_own_script_alone_may_run(seen: Look) -> None:
    read = Reader(page(seen))
    policy = next(
        a["content"] for t, a in read.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(read.scripts[1].encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert not any(name.startswith("on") for _, attrs in read.elements for name in attrs)


def test_it_names_nothing_outside(seen: Look) -> None:
    text = page(seen)
    assert re.findall(r"https?://[^\"']+", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|innerHTML|\beval\(", text)


def test_maps_survive_packing(seen: Look) -> None:
    packed = page_data(seen)["texts"][0]["maps"]
    maps = seen.texts[0].maps
    assert maps is not None
    for name, weights in (("before", maps.before_LHTT), ("after", maps.after_LHTT)):
        whole = np.frombuffer(base64.b64decode(packed[name]), "<u2").reshape(weights.shape)
        found = torch.from_numpy(whole.astype(np.float64) / 65535)
        torch.testing.assert_close(found, weights.double(), atol=1 / 131000, rtol=0)


def test_maps_that_do_not_fit_are_left_out(seen: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = seen.texts[0].maps
    assert maps is not None
    monkeypatch.setattr(report, "MAX_WEIGHTS", 2 * maps.before_LHTT.numel())
    kept = [text["maps"] is not None for text in page_data(seen)["texts"]]
    assert kept == [True, False]


def test_the_file_is_whole_or_not_there(seen: Look, tmp_path: Path) -> None:
    assert seen.save_page(tmp_path / "new" / "a.html").read_text(encoding="utf-8") == page(seen)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.html"]
    with pytest.raises(PastinaError, match="not a plain file"):
        seen.save_page(tmp_path)


# ---------------------------------------------------------------------------------------------------
# In a browser

# enable_socket: it is spoken to over 127.0.0.1


@pytest.fixture(scope="module")
def file(seen: Look, tmp_path_factory: pytest.TempPathFactory) -> str:
    return seen.save_page(tmp_path_factory.mktemp("page") / "a.html").as_uri()


@pytest.fixture
def open_page(file: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    width, dark = getattr(request, "param", (1200, False))
    with browser(tmp_path, width, dark=dark) as driver:
        driver.get(file)
        yield driver


def text_of(driver: Any, selector: str) -> str:
    return driver.execute_script(
        "return document.querySelector(arguments[0]).textContent", selector
    )


def press(driver: Any, selector: str, *keys: str) -> None:
    """Focus as by the Tab key, then these keys."""
    element = driver.find_element("css selector", selector)
    driver.execute_script("arguments[0].focus({focusVisible: true})", element)
    for key in keys:
        driver.switch_to.active_element.send_keys(key)


@needs_browser
@pytest.mark.enable_socket
def test_it_draws_and_runs_nothing_of_a_text(open_page: Any, seen: Look) -> None:
    driver = open_page
    assert driver.get_log("browser") == []
    assert "pwned" not in driver.title
    # every section has its drawings, every heat map a square for each head
    assert text_of(driver, "h1") == "What “<b>evil</b> & {{script}}” changes inside the backbone"
    squares = driver.execute_script(
        "return [...document.querySelectorAll('#share svg[role=application]')]"
        ".map(svg => svg.querySelectorAll('g:first-child rect').length)"
    )
    assert squares == [seen.num_layers * seen.num_heads] * 3
    before, after = (float(s.vertical_LH.sum()) for s in (seen.before, seen.after))
    tiles = text_of(driver, "#tiles")
    assert f"as published{before:g} → {after:g}" in tiles
    select = driver.find_element("css selector", "#attention select")
    select.send_keys("2: thanks")
    words = text_of(driver, ".words")
    assert "[CLS]" in words
    assert "thanks" in words
    assert "script" not in driver.execute_script(
        "return [...document.querySelectorAll('main *')].map(e => e.tagName.toLowerCase())"
    )
    assert driver.get_log("browser") == []
    assert "pwned" not in driver.title


# what a variant learns beside the plain method, and how its lines are called
VARIANTS = {
    "wide": (
        PastaOptions(share="by_token", everywhere=True, rank=2),
        ["[CLS]", "[SEP]", "every token"],
        ["Length of the product over length of the state, every token", "Norm of the matrix"],
    ),
    "scale": (
        PastaOptions(scale=True, at="keys-values"),
        ["1 [CLS]", "2 [SEP]"],
        ["Length of what the scale adds", "Length of the scale, 0 where"],
    ),
    "extra": (
        PastaOptions(extra_tokens=9),
        ["1 [CLS]", "2 [SEP]", *(f"{n + 2} [SEP]+{n}" for n in range(1, 10))],
        ["By pair"],
    ),
    "layers": (PastaOptions(layer_slots=(1, 0)), ["1 [CLS]", "2 [SEP]"], []),
    "ordinary": (
        PastaOptions(positions="random"),
        ["ordinary 1", "ordinary 2"],
        ["Cosine between"],
    ),
}


@needs_browser
@pytest.mark.enable_socket
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, bert: Path, tmp_path: Path) -> None:
    options, names, titles = VARIANTS[variant]
    folder = make_adapter(bert, tmp_path / "a", "classify", options, max_length=40)
    found = look(folder, ["we need the plum", "thanks for a fig"])
    file = found.save_page(tmp_path / "a.html").as_uri()
    for width in (1200, 380):
        with browser(tmp_path / str(width), width) as driver:
            driver.get(file)
            assert driver.get_log("browser") == []
            wide = (
                "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert driver.execute_script(wide) <= 0
            _check_variant(driver, found, names, titles)


def _check_variant(driver: Any, found: Look, names: list[str], titles: list[str]) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    captions = driver.execute_script(
        "return [...document.querySelectorAll('#vectors figcaption')].map(e => e.textContent)"
    )
    assert len(captions) == len(set(captions))
    for title in titles:
        assert any(caption.startswith(title) for caption in captions), captions
    legend = "return [...document.querySelectorAll('#vectors .legend')][0].textContent"
    assert driver.execute_script(legend) == "".join(names)
    assert found.vectors is not None
    assert found.vectors.about in text_of(driver, "#vectors")
    # the attention: a choice for each slot, and the special ones together
    options = "return [...document.querySelectorAll('#share option')].map(e => e.textContent)"
    assert driver.execute_script(options) == ["all special tokens", *found.slots]
    coloured = "return document.querySelectorAll('.words .special').length"
    assert driver.execute_script(coloured) == len(found.slots)
    assert ("both sides read" in text_of(driver, "#lead")) == (found.extra_tokens > 0)
    share = 100 * float(found.on_special(found.after).mean())
    assert f"→ {share:.0f} %" in text_of(driver, "#tiles")
    # a number in the tables is that of the look
    press(driver, "#vectors summary", "\ue007")
    cell = (
        "return document.querySelector('#vectors tbody tr:last-child td:last-child')?.textContent"
    )
    wait = WebDriverWait(driver, 30)
    last = float(found.vectors.ratio_LV[-1, -1])
    said = "–" if last != last else f"{last:.2f} ×" if last < 1 else f"{last:.1f} ×"
    assert wait.until(lambda d: d.execute_script(cell)) == said
    assert driver.get_log("browser") == []


@needs_browser
@pytest.mark.enable_socket
def test_a_keyboard_is_enough(open_page: Any, seen: Look) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    driver = open_page
    up, right, down, home, enter = "\ue013", "\ue014", "\ue015", "\ue011", "\ue007"
    # the overview: walking picks the head
    press(driver, ".mosaic canvas", up, home, right)
    assert text_of(driver, "#head-title") == "Layer 1, head 2"
    # the large map: the readout says the numbers of the file
    maps = seen.texts[0].maps
    assert maps is not None
    press(driver, ".map canvas", right, down)
    readout = text_of(driver, "#attention > .readout")
    was, now = (100 * float(side[0, 1, 1, 1]) for side in (maps.before_LHTT, maps.after_LHTT))
    assert readout.startswith(f"“{seen.texts[0].tokens[1]}” looks at “")
    assert f"{was:.1f} % without, {now:.1f} % with the adapter" in readout
    # a heat map of layers and heads: Enter opens the head above
    press(driver, "#outputs svg[role=application]", down, right, enter)
    assert text_of(driver, "#head-title") == "Layer 2, head 2"
    moved = float(seen.change.first_LH[1, 1])
    said = f"{moved:.2f} ×" if moved < 1 else f"{moved:.1f} ×"
    assert f"{said} at the first special token" in text_of(driver, "#outputs .readout")
    # tables open with a key
    press(driver, "#outputs summary", enter)
    cells = "return document.querySelectorAll('#outputs td').length"
    wait = WebDriverWait(driver, 30)  # the browser tells of the opening when it has time
    assert wait.until(lambda d: d.execute_script(cells)) == seen.num_layers * seen.num_heads


@needs_browser
@pytest.mark.enable_socket
@pytest.mark.parametrize("open_page", [(380, True), (1200, False)], indirect=True)
def test_it_fits_and_is_labelled(open_page: Any) -> None:
    driver = open_page
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert driver.execute_script(wide) <= 0
    nameless = driver.execute_script("""
        const named = (e) => e.getAttribute("aria-label") || e.closest("label") || e.textContent.trim();
        const all = "select, button, [tabindex], [role=img], [role=application], summary, a";
        return [...document.querySelectorAll(all)].filter((e) => !named(e)).length;
    """)
    assert nameless == 0
    colours = "return ['color', 'backgroundColor'].map(n => getComputedStyle(document.body)[n])"
    first = driver.execute_script(colours)
    button = driver.find_element("id", "theme")
    said = button.text
    button.click()
    assert driver.execute_script(colours) == first[::-1] or driver.execute_script(colours) != first
    assert {said, button.text} == {"Dark", "Light"}
    assert driver.get_log("browser") == []
