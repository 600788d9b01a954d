"""The explorer's page in a real browser, with everything on it clicked once.

Skipped where Playwright or a Chromium is missing. One server and one page for all tests, which
follow each other as a user's steps do. ``CONLENS_SCREENSHOTS=folder`` keeps pictures of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import urllib.parse
from pathlib import Path

import pytest
from pipeline import quick_compilation
from servers import serving
from tiny_user import TEXT, TEXTS, tiny_user_lens

from conlens_jax.evaluation.support import Calibration

pytest.importorskip("fastapi", reason="the page needs the extra 'explore'")
pytest.importorskip("uvicorn", reason="the page needs the extra 'explore'")
from conlens_jax.explorer.text_runs import BATCH, Asked

playwright = pytest.importorskip("playwright.sync_api", reason="a browser needs playwright")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
ODD = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    with quick_compilation(tmp_path_factory):
        lens = tiny_user_lens(folder)
        (folder / "chat_template.jinja").write_text(CHAT)
        knots = ((0.0, 0.1), (1.0, 0.99))
        calibration = Calibration({"comma": None, "separator": None}, {"next": knots})
        yield dataclasses.replace(lens, calibration=calibration)


@pytest.fixture(scope="module")
def app(lens):
    from conlens_jax.explorer.server import make_app

    return make_app(lens, [lens], names=["runs/one", "runs/two"], example=TEXT)


@pytest.fixture(scope="module")
def address(app):
    with serving(app) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        paths = [found for name in NAMES if (found := shutil.which(name))]
        path = own if Path(own).exists() else next(iter(paths), None)
        if path is None:
            pytest.skip("there is no Chromium")
        try:
            browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"Chromium does not start: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser):
    context = browser.new_context(viewport={"width": 1100, "height": 800}, has_touch=True)
    context.set_default_timeout(120_000)  # of a busy machine
    with contextlib.closing(context):
        yield context


@pytest.fixture(scope="module")
def page(context, address):
    page = context.new_page()
    problems = []
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    done(page)
    yield page
    refused = [problem for problem in problems if "status of 413" in problem]
    assert problems == refused and len(refused) == 1  # of test_a_new_text_and_cancel


@pytest.fixture(scope="module")
def rows(app):
    """What the page was told of TEXT, by position; tests of the server compare it with the lens."""
    return app.state.runs.run_of(Asked(TEXT)).rows


def done(page):
    page.wait_for_selector(".token.known")
    page.wait_for_selector("#progress", state="hidden")


def keep_picture(page, name):
    if folder := os.environ.get("CONLENS_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def pins(page):
    return page.locator(".pin h3").all_text_contents()


def press(page, name):
    """A button of the first card."""
    page.locator(f".pin >> nth=0 >> button:text-is('{name}')").click()


# Of the controls and texts that are seen: which reach out of the window or out of their box, and
# which lie over another one.
LAYOUT = """() => {
  const seen = (node) => node.offsetParent !== null && node.getClientRects().length > 0;
  const name = (node) => `${node.tagName}#${node.id} ${node.textContent.slice(0, 20)}`;
  const problems = [];
  if (document.documentElement.scrollWidth > innerWidth) problems.push("the page is too wide");
  for (const box of document.querySelectorAll(".box")) {
    if (!seen(box)) continue;
    const outer = box.getBoundingClientRect();
    for (const node of box.querySelectorAll("*")) {
      if (!seen(node) || node.closest(".scroll, .token, option")) continue;
      const inner = node.getBoundingClientRect();
      const inside = inner.left >= outer.left - 1 && inner.right <= outer.right + 1;
      if (!inside) problems.push(`${name(node)} sticks out`);
    }
  }
  const kinds = "button, select, textarea, input, h1, h2, h3, h4, h5, .note, .explanation, " +
    ".chips div, .legend li";
  const apart = [...document.querySelectorAll(kinds)].filter(seen);
  const rects = apart.map((node) => node.getBoundingClientRect());
  const shared = (a, b, from, to) => Math.min(a[to], b[to]) - Math.max(a[from], b[from]);
  for (let a = 0; a < apart.length; a++) for (let b = a + 1; b < apart.length; b++) {
    if (apart[a].contains(apart[b]) || apart[b].contains(apart[a])) continue;
    const wide = shared(rects[a], rects[b], "left", "right");
    const high = shared(rects[a], rects[b], "top", "bottom");
    if (wide > 1 && high > 1) problems.push(`${name(apart[a])} lies over ${name(apart[b])}`);
  }
  return problems;
}"""


def test_it_opens_on_an_explained_text(lens, page, rows):
    assert page.locator(".token").all_text_contents() == lens.tokens(TEXT)
    assert page.locator(".token.known").count() == len(rows)
    page.hover("#token-4")
    assert rows[4].explanation in page.inner_text("#tip")
    label = page.get_attribute("#token-4", "aria-label")
    assert rows[4].explanation in label and "KL" in label
    assert page.locator("#legend .swatch").count() == 6
    page.check("[name=colour][value=support]")
    assert page.locator("#legend .swatch").count() == 5
    assert page.locator(".known[class*=' s']").count() == len(rows)
    keep_picture(page, "map")


def test_keys_and_pins(lens, page, rows):
    page.mouse.move(2, 2)
    page.focus("#text")
    page.locator("#tokens").focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "Enter", "ArrowLeft", "ArrowDown"):
        page.keyboard.press(key)
    assert page.get_attribute("#tokens", "aria-activedescendant") == "token-1"
    assert page.get_attribute("#token-2", "aria-selected") == "true"
    assert page.is_visible("#tip")
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip") and page.is_hidden("#difference")
    page.click("#token-5")
    assert pins(page) == ["“cat” (2)", "“red” (5)"]
    best = rows[2].best
    card = page.locator(".pin >> nth=0")
    assert f"{best.kl:.3f}" in card.inner_text() and "norm" in card.inner_text()
    assert best.after[0].token in card.inner_text()
    page.locator("#difference button").click()
    page.wait_for_selector("#difference .facts-line")
    assert str(lens.compare((TEXT, 2), (TEXT, 5)).towards_a) in page.inner_text("#difference")


def test_what_can_be_asked_of_a_pin(lens, page):
    press(page, "Claims of 16 samples")
    page.wait_for_selector("table.claims tbody tr")
    claims = lens.claims(TEXT, 2, batch_size=BATCH, whole=True)  # in the same shapes
    assert page.locator("table.claims tbody tr").count() == len(claims)
    assert f"{round(claims[0].share * 16)}/16" in page.inner_text("table.claims")
    press(page, "Other layers")
    page.wait_for_selector("text=At every layer")
    assert page.locator(".pin >> nth=0").inner_text().count("block 1, runs/") == 2


def test_an_explanation_is_edited(lens, page, rows):
    best = rows[2].best
    press(page, "Edit")
    piece = page.locator(".pieces >> nth=0 >> .piece")
    assert piece.count() == len(best.pieces)
    piece.first.click()
    page.wait_for_selector(".choices .pieces")
    (first, *_), *_ = lens.alternatives(TEXT, 2, best, 2)
    page.locator(".choices .piece").first.click()
    assert page.locator(".piece.changed").count() == 1
    press(page, "Predict")
    page.wait_for_selector("text=control: a random change of the same size")
    other = next(a for a in lens.alternatives(TEXT, 2, best, 2)[0] if a != first)
    swapped = lens.swaps(TEXT, [(2, [other.token, *best.tokens[1:]])] * 2)[0].best
    assert f"edited: KL {swapped.kl:.3f}" in page.locator(".edit").inner_text()
    piece.last.click()
    page.wait_for_selector(".choices .pieces")
    page.locator(".choices button:text-is('drop it')").click()
    assert piece.count() == len(best.pieces) - 1
    page.locator(".edit textarea").fill("two red fox saw")
    page.locator("[aria-label=Strength]").fill("4")
    press(page, "Continue")
    page.wait_for_selector("text=control: as far in a random direction")
    ids = lens.model.tokenizer.encode(TEXT, add_bos=True)[:3]
    options = dict(strength=4.0, new_tokens=16, written=best)
    assert lens.steer(ids, 2, "two red fox saw", **options).after in page.inner_text(".edit")


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (1100, "dark"), (360, "light")])
def test_nothing_overlaps_or_sticks_out(page, width, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.mouse.move(2, 2)
    keep_picture(page, f"{width}-{scheme}")
    assert page.evaluate(LAYOUT) == []
    if width == 360:
        page.tap("#token-7")
        box = page.locator("#tip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        assert len(pins(page)) == 2, "the first tap shows"
        page.tap("#token-7")
        assert len(pins(page)) == 3, "the second pins"
        page.tap("#token-7")
        page.emulate_media(media="print")
        assert page.is_hidden("#form") and page.is_visible("#tokens") and page.is_hidden("#tip")
        page.emulate_media(media="screen", color_scheme="light")
        page.set_viewport_size({"width": 1100, "height": 800})


def test_the_state_is_in_the_address_and_in_files(lens, page, rows, context, tmp_path):
    page.locator("#least").fill("0.5")
    again = context.new_page()
    again.goto(page.url)
    done(again)
    assert pins(again) == pins(page) and again.input_value("#least") == "0.5"
    assert again.is_checked("[name=colour][value=support]")
    again.close()

    def saved(selector, name):
        with page.expect_download() as download:
            page.click(selector)
        download.value.save_as(tmp_path / name)
        return (tmp_path / name).read_bytes()

    svg = saved("[data-file=svg]", "map.svg").decode()
    assert svg.startswith("<svg") and all(f">{token}<" in svg for token in TEXT.split())
    assert saved("[data-file=png]", "map.png").startswith(b"\x89PNG")
    assert b"explanation" in saved("[data-file=csv]", "rows.csv")
    assert json.loads(saved("[data-file=json]", "rows.json"))["documents"] == [lens.tokens(TEXT)]
    assert saved("[data-file=html]", "page.html").startswith(b"<!doctype html>")
    state = json.loads(saved("#save", "state.json"))
    assert state["pins"] == [2, 5] and len(state["rows"]) == len(rows)

    # A text that only a file has: odd tokens are text, and 2,000 of them are no burden.
    row = state["rows"]["1"]
    state["tokens"] = ["<bos>", ODD, *(f"word{n}" for n in range(1998))]
    state["rows"] = {str(n): {**row, "position": n} for n in range(1, 2000)}
    (tmp_path / "long.json").write_text(json.dumps(state))
    page.set_input_files("#file", tmp_path / "long.json")
    page.wait_for_selector("#token-1999.known")
    assert page.inner_text("#token-1") == ODD and page.locator("#map img").count() == 0
    assert page.locator("#tokens *").count() == 2000
    moves = """() => { const began = performance.now(), map = document.getElementById("tokens");
      map.focus();
      const down = () => map.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown"}));
      for (let n = 0; n < 20; n++) down();
      return (performance.now() - began) / 20; }"""
    assert page.evaluate(moves) < 250
    (tmp_path / "wrong.json").write_text('{"schema": 2, "tokens": 5}')
    page.set_input_files("#file", tmp_path / "wrong.json")
    page.wait_for_selector("#message:text('wrong.json is not a saved state')")


def test_python_lines_give_the_same(page, context, address):
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto("about:blank")
    page.goto(address)
    done(page)
    page.click("#token-3")
    page.click("#copy-python")
    page.wait_for_selector("#shared:text('copied')")
    lines = page.evaluate("navigator.clipboard.readText()")
    assert 'Lens.load("runs/one")' in lines and "lens.explain(text, 3)" in lines
    compile(lines, "lines", "exec")


def test_a_new_text_and_cancel(lens, app, page):
    page.fill("#text", TEXTS[1])
    with app.state.turns.turn():  # somebody else uses the lens
        page.click("#explain")
        page.wait_for_selector("#progress-text:text('waiting')")
        assert page.locator(".token").count() == len(lens.tokens(TEXTS[1]))
        page.click("#cancel")
        page.wait_for_selector("#progress", state="hidden")
        assert "Stopped" in page.inner_text("#message")
    page.click("#explain")
    done(page)
    assert page.locator(".token.known").count() == len(lens.tokens(TEXTS[1])) - 1
    page.fill("#text", "x" * 200_000)
    page.click("#explain")
    page.wait_for_selector("#message:text('at most 100000')")


def test_a_chat(lens, page):
    page.fill("#text", "the cat")
    page.check("#is-chat")
    page.click("#add-message")
    page.locator("#messages textarea").last.fill("saw one")
    page.click("#explain")
    page.wait_for_selector("#token-7", state="detached")
    page.wait_for_selector("#token-6.known")
    done(page)
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "saw one"}]
    assert page.locator(".token").all_text_contents() == lens.tokens(chat)
    assert page.evaluate(LAYOUT) == []
    assert urllib.parse.urlsplit(page.url).fragment.startswith("s=")
