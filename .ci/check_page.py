#!/usr/bin/env python3
"""Drives the web page of `marlin serve` in a headless Chromium, as a reader would.

    check_page.py [--url URL] [--screenshots FOLDER] [--require] [--only NAME]

Without --url it runs everything against crates/server/page/tests/mock_server.py, whose answers are
known: streams cut inside characters, HTML that must not run, errors, a key, a restart. With --url it
runs what holds for any server against that one, and the unit tests.

Needs the package playwright and a Chromium (on PATH, in $CHROMIUM, or playwright's own). Without them it says so and ends
well. With --require it installs the packages of requirements.txt, and ends with 1 where no Chromium is.
"""
import argparse
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "crates/server/page/tests"), str(ROOT / ".ci")]
from check_server import enter_environment  # noqa: E402
from mock_server import MARKDOWN, STORY, UTF8, Mock  # noqa: E402
from reader import Reader, check  # noqa: E402

LIMIT_BYTES = 92 * 1024  # of everything that is built into the binary
TESTS = []

def test(any_server=False, allow=()):
    """Registers a test; `allow` are parts of console errors that belong to it."""
    def register(run):
        TESTS.append((run.__name__, run, any_server, allow))
        return run
    return register


@test()
def unit(r):
    r.page.goto(r.mock.url + "page/tests/unit.html")
    r.shows("window.outcome", seconds=120)
    outcome = r.page.evaluate("window.outcome")
    check(not outcome["failed"], "\n".join(outcome["failed"]))
    check(outcome["passed"] > 400, f"only {outcome['passed']} passed")
    print(f"  {outcome['passed']} unit checks")


@test()
def size(r):
    files = [f for f in (ROOT / "crates/server/page").iterdir() if f.is_file()]
    total = sum(f.stat().st_size for f in files)
    print(f"  {total} bytes in {len(files)} files")
    check(total <= LIMIT_BYTES, f"the page has grown to {total} bytes, over {LIMIT_BYTES}")


@test(any_server=True)
def streams(r):
    r.shot("welcome")
    r.page.evaluate("""() => {
      window.lengths = new Set();
      const note = () => window.lengths.add(document.querySelector(".assistant > .prose")?.textContent.length ?? 0);
      new MutationObserver(note).observe(document.querySelector("#messages"), { childList: true, characterData: true, subtree: true });
    }""")
    r.send("Tell me a story about the sea.", wait=False)
    r.shows("document.querySelector('.assistant > .prose').innerText.length > 5")
    r.shot("streaming")
    r.idle()
    check(r.page.evaluate("window.lengths.size") > 3, "the answer does not come piece by piece")
    figures = r.last("footer")
    for part in ("tokens/s", "tokens", "first token", "in prompt"):
        check(part in figures, f"no {part!r} in {figures!r}")
    check("≈" not in figures, f"estimated though usage came: {figures!r}")
    r.shows("document.querySelector('#load').innerText.includes('KV ')", "the use of the KV cache is not shown")
    if r.mock:
        check(r.last().strip() == STORY, r.last())
        check(r.body()["stream"] and r.body()["stream_options"] == {"include_usage": True}, "usage is not asked for")
        check(set(r.body()) == {"model", "messages", "stream", "stream_options"}, f"fields nobody set: {list(r.body())}")
    r.audit()


@test(any_server=True)
def stops(r):
    r.page.click("#open-settings")
    r.page.fill("#max_tokens", "1500")
    r.page.keyboard.press("Escape")
    for how in ("button", "Escape"):
        # A small model on a fast machine may have ended before it is stopped.
        for _ in range(10):
            r.send("Count forever, and do not stop.", wait=False)
            r.shows("document.querySelector('.assistant:last-child > .prose').innerText.length > 8")
            r.page.click("#send") if how == "button" else r.page.keyboard.press("Escape")
            r.idle()
            if "Stopped." in r.last(".notice"):
                break
        check("Stopped." in r.last(".notice"), r.last(".notice"))
        check(len(r.last()) > 8, "what had come is lost")
    if r.mock:
        deadline = time.monotonic() + 3
        while r.mock.state.running and time.monotonic() < deadline:
            time.sleep(0.05)
        check(r.mock.state.running == 0, "the server still writes")


@test(any_server=True)
def regenerates(r):
    r.send("Say something short.")
    r.page.click(".assistant [data-action=again]")
    r.idle()
    check("2 / 2" in r.last("footer"), r.last("footer"))
    check(r.page.locator(".assistant").count() == 1, "both answers are shown")
    r.page.click("[data-action=previous]")
    check("1 / 2" in r.last("footer"), r.last("footer"))
    r.page.reload()
    r.shows("document.querySelector('.assistant footer').innerText.includes('1 / 2')", "the chosen answer is not kept")


@test(any_server=True)
def edits(r):
    r.send("What is a marlin?")
    r.send("And a tuna?")
    r.page.hover(".user >> nth=0")
    r.page.click(".user >> nth=0 >> [data-action=edit]")
    field = r.page.locator(".edit textarea")
    check(field.input_value() == "What is a marlin?", field.input_value())
    field.fill("What is a swordfish?")
    r.shot("editing")
    field.press("Enter")
    r.page.wait_for_selector(".assistant")
    r.idle()
    check(r.page.locator(".message").count() == 2, "what followed the edited message is still there")
    check("2 / 2" in r.page.locator(".user footer").inner_text(), "the first version is lost")
    if r.mock:
        check([m["content"] for m in r.body()["messages"]] == ["What is a swordfish?"], r.body()["messages"])
    r.page.click(".user [data-action=previous]")
    r.shows("document.querySelectorAll('.message').length === 4", "the first version lost its answers")
    r.page.hover(".user >> nth=0")
    r.page.click(".user >> nth=0 >> [data-action=edit]")
    r.page.keyboard.press("Escape")
    check(r.page.locator(".edit").count() == 0, "Escape does not end editing")


@test(any_server=True)
def history(r):
    r.send("First conversation")
    r.page.keyboard.press("Control+Shift+O")
    r.shows("!document.querySelector('#welcome').hidden", "no new conversation")
    r.send("Second conversation")
    r.page.reload()
    r.shows("document.querySelectorAll('#conversations li').length === 2", "history is not there after a reload")
    r.shows("document.querySelector('.user .text').innerText === 'Second conversation'", "another conversation is shown after a reload")
    r.page.click("#conversations li:nth-child(2) .open")
    r.shows("document.querySelector('.user .text').innerText === 'First conversation'", "the first does not open")
    r.page.go_back()
    r.shows("document.querySelector('.user .text').innerText === 'Second conversation'", "going back does not work")
    row = r.page.locator("#conversations li").nth(0)
    row.hover()
    row.locator("[data-action=rename]").click()
    r.page.keyboard.type("Renamed <b>it</b>")
    r.page.keyboard.press("Enter")
    r.shows("document.querySelector('#conversations .open').innerText === 'Renamed <b>it</b>'", "not renamed")
    row.hover()
    with r.page.expect_download() as download:
        row.locator("[data-action=export]").click()
    saved = json.loads(Path(download.value.path()).read_text("utf-8"))
    check(saved["conversations"][0]["messages"][0]["content"] == "Second conversation", saved)
    row.hover()
    row.locator("[data-action=delete]").click()
    r.shows("document.querySelectorAll('#conversations li').length === 1", "not deleted")
    r.page.click("#toast button:text('Undo')")
    r.shows("document.querySelectorAll('#conversations li').length === 2", "not restored")
    r.page.click("#open-settings")
    r.page.set_input_files("#file", download.value.path())
    r.shows("document.querySelectorAll('#conversations li').length === 3", "not imported")
    r.page.click("#open-settings")
    r.page.set_input_files("#file", {"name": "x.json", "mimeType": "application/json", "buffer": b"{}"})
    r.shows("document.querySelector('#settings-problem').innerText.includes('x.json was not imported')", "a wrong file is taken")
    r.page.keyboard.press("Escape")
    other = r.open()
    check(other.locator("#conversations li").count() == 3, "another tab does not see the history")
    r.page.locator("#conversations li").nth(1).hover()
    r.page.locator("#conversations li").nth(1).locator("[data-action=delete]").click()
    r.shows("document.querySelectorAll('#conversations li').length === 2", "another tab keeps what was deleted", page=other)


@test(any_server=True)
def narrow(r):
    r.page.set_viewport_size({"width": 375, "height": 720})
    check(not r.page.is_visible("#nav"), "the list covers the page")
    r.send("Show markdown, please.")
    for width in (320, 375):
        r.page.set_viewport_size({"width": width, "height": 720})
        wide = r.page.evaluate("Math.max(document.scrollingElement.scrollWidth, document.querySelector('#scroll').scrollWidth)")
        check(wide <= width, f"at {width} px the page is {wide} px wide")
    r.shot("phone")
    r.page.click("#menu")
    check(r.page.evaluate("document.querySelector('#page').inert"), "what lies behind the list can be reached")
    r.shot("phone-list")
    r.audit()
    r.page.keyboard.press("Escape")
    check(not r.page.is_visible("#nav"), "Escape does not close the list")
    r.page.click("#menu")
    r.page.click("#conversations .open")
    check(not r.page.is_visible("#nav"), "the list stays open")
    r.page.click("#open-settings")
    r.shot("phone-settings")
    r.audit()


@test(any_server=True)
def touch(r):
    phone = Reader(r.context.browser, r.url, viewport={"width": 390, "height": 700}, has_touch=True, is_mobile=True)
    check(phone.page.evaluate("document.activeElement.id") != "input", "the keyboard of the phone opens by itself")
    phone.page.fill("#input", "Two")
    phone.page.keyboard.press("Enter")
    phone.page.keyboard.type("lines")
    phone.page.tap("#send")
    phone.page.wait_for_selector(".assistant")
    phone.idle()
    check(phone.text(".user .text") == "Two\nlines", phone.text(".user .text"))
    phone.page.tap(".user [data-action=edit]")
    check(phone.page.locator(".edit textarea").count() == 1, "what is shown on hover only cannot be tapped")
    check(not phone.errors and not phone.strangers, [*phone.errors, *phone.strangers])
    phone.context.close()


@test(any_server=True)
def keyboard_only(r):
    press = r.page.keyboard.press
    r.page.focus("#skip")
    focus = "document.activeElement.id || document.activeElement.className"
    order = []
    for _ in range(7):
        order.append(r.page.evaluate(focus))
        check(r.page.evaluate("document.activeElement.matches(':focus-visible') && (getComputedStyle(document.activeElement).outlineStyle !== 'none' "
                              "|| document.activeElement.closest('#composer') !== null)"), f"{order[-1]}: focus is not seen")
        press("Tab")
    check(order == ["skip", "new", "menu", "model", "theme", "open-settings", "input"] or order[-1] == "scroll", f"order of focus: {order}")
    r.page.focus("#skip")
    press("Enter")
    check(r.page.evaluate(focus) == "input", "the skip link leads elsewhere")
    r.page.keyboard.type("Two")
    press("Shift+Enter")
    r.page.keyboard.type("lines")
    press("Enter")
    r.page.wait_for_selector(".assistant")
    r.idle()
    check(r.text(".user .text") == "Two\nlines", r.text(".user .text"))
    for _ in range(3):
        press("Shift+Tab")
    check(r.page.evaluate("document.activeElement.dataset.action") is not None, "the buttons of messages cannot be reached")
    press("Enter")
    r.idle()
    press("Control+Shift+O")
    check(r.page.evaluate(focus) == "input", "a new chat does not start in the field")


@test(any_server=True)
def theme_switch(r):
    background = "getComputedStyle(document.body.parentElement).backgroundColor"
    light = r.page.evaluate(background)
    r.page.click("#theme", click_count=2)
    dark = r.page.evaluate(background)
    check(light != dark, f"both are {light}")
    r.page.reload()
    check(r.page.evaluate(background) == dark, "the theme is forgotten")
    r.page.click("#theme")
    r.page.emulate_media(color_scheme="dark")
    check(r.page.evaluate(background) == dark, "the system's theme is not followed")


@test()
def markdown(r):
    r.context.grant_permissions(["clipboard-read", "clipboard-write"])
    r.send("markdown, please")
    for selector, number in {"h4": 1, "ol > li": 3, "ul ul, ol ul": 1, "figure.code": 1, "tbody tr": 3, "blockquote": 1, "input[type=checkbox]": 2, "a": 2}.items():
        found = r.page.locator(f".assistant > .prose {selector}").count()
        check(found == number, f"{selector}: {found}, not {number}")
    r.page.click(".code button")
    check(r.page.evaluate("navigator.clipboard.readText()").startswith("/// The next state"), "the code is not copied")
    r.page.click(".assistant [data-action=copy]")
    check(r.page.evaluate("navigator.clipboard.readText()") == MARKDOWN, "the answer is not copied as written")
    r.page.evaluate("document.querySelector('#scroll').scrollTop = 0")
    r.shot("markdown-light")
    r.audit()
    r.page.emulate_media(color_scheme="dark")
    r.page.wait_for_timeout(500)
    r.shot("markdown-dark")
    r.audit()
    r.page.click("#open-settings")
    r.shot("settings-dark")
    r.audit()
    r.page.emulate_media(color_scheme="light")
    r.shot("settings-light")
    r.audit()


@test()
def html_does_not_run(r):
    r.send("evil <script>window.pwned = 20</script><img src=x onerror='window.pwned = 21'>")
    r.page.wait_for_timeout(300)
    check(r.page.evaluate("window.pwned") is None, "script of an answer ran")
    for tag in ("script", "img", "iframe", "style", "svg [onload]", "[onerror]", "[onmouseover]", "a[href^=javascript], a[href^=data]"):
        check(r.page.locator(f"#messages :is({tag})").count() == 0, f"{tag} came into the page")
    check("The end of it." in r.last() and "<script>window.pwned = 1</script>" in r.last(), "HTML is not shown as text")
    check("<script>" in r.text("#conversations .open"), r.text("#conversations .open"))
    r.page.reload()
    r.page.wait_for_selector(".assistant")
    check(r.page.evaluate("window.pwned") is None, "script ran after a reload")


@test()
def cut_characters(r):
    r.send("utf8")
    check(r.last().strip() == UTF8, r.last())


@test()
def reasoning(r):
    r.send("think", wait=False)
    r.page.wait_for_selector(".reasoning[open]")
    r.shows("document.querySelector('.reasoning').innerText.includes('the short way')")
    check(r.text(".reasoning summary") == "Reasoning…", r.text(".reasoning summary"))
    r.shot("reasoning")
    r.mock.state.go.set()
    r.idle()
    check(r.page.locator(".reasoning[open]").count() == 0, "reasoning stays open")
    check("answer itself" in r.last(), r.last())
    r.page.click(".reasoning summary")
    check(r.page.locator(".reasoning em").inner_text() == "the short way", "reasoning is not rendered")
    r.send("next")
    check([m["role"] for m in r.body()["messages"]] == ["user", "assistant", "user"], r.body()["messages"])
    check("weigh" not in json.dumps(r.body()), "reasoning is sent back")


@test()
def tool_calls(r):
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    r.page.click("#open-settings")
    r.page.fill("#tools", "[1")
    check("not valid JSON" in r.text("#settings-problem"), r.text("#settings-problem"))
    r.page.fill("#tools", json.dumps(tools))
    r.shows("document.querySelector('#settings-problem').innerText === ''", "right tools are refused")
    r.page.keyboard.press("Escape")
    r.send("tools")
    check(r.body()["tools"] == tools, r.body())
    check(r.page.locator(".call").count() == 2, "two calls, two blocks")
    check('"city": "Havana",\n  "unit": "celsius"' in r.text(".call pre >> nth=0"), r.text(".call pre >> nth=0"))
    r.page.fill(".call textarea >> nth=0", "31 °C")
    r.page.fill(".call textarea >> nth=1", "noon")
    r.shot("tools")
    r.audit()
    r.page.click("[data-action=results]")
    r.page.wait_for_selector(".tool")
    r.idle()
    sent = r.body()["messages"]
    check([m["role"] for m in sent] == ["user", "assistant", "tool", "tool"], sent)
    check(sent[1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Havana", "unit": "celsius"}', sent[1])
    check(sent[3] == {"role": "tool", "tool_call_id": "call_1", "content": "noon"}, sent[3])
    check(not r.page.is_visible("[data-action=results]"), "results can be sent twice")


@test()
def settings_and_model(r):
    r.page.select_option("#model", "SmolLM2-135M-Instruct")
    r.page.click("#open-settings")
    values = {"system": "Be brief.", "temperature": "0.3", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "max_tokens": "99", "seed": "7", "stop": "END\n\\n\\n"}
    for name, value in values.items():
        r.page.fill(f"#{name}", value)
    r.page.fill("#temperature", "9")
    check("Temperature" in r.text("#settings-problem"), "a temperature of 9 is taken")
    r.page.fill("#temperature", values["temperature"])
    r.page.keyboard.press("Escape")
    r.send("hello")
    body = r.body()
    wanted = {"model": "SmolLM2-135M-Instruct", "temperature": 0.3, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 99, "seed": 7, "stop": ["END", "\n\n"]}
    check({name: body[name] for name in wanted} == wanted, body)
    check(body["messages"][0] == {"role": "system", "content": "Be brief."}, body["messages"])
    r.page.reload()
    r.page.wait_for_selector(".assistant")
    check(r.page.input_value("#model") == "SmolLM2-135M-Instruct", "the model is forgotten")
    r.page.click("#open-settings")
    check(r.page.input_value("#system") == "Be brief.", "the system prompt is forgotten")
    r.page.click("#reset")
    r.page.keyboard.press("Escape")
    r.send("again")
    check("temperature" not in r.body() and r.body()["messages"][0]["role"] == "user", r.body())
    r.mock.state.models = ["glm-stories"]
    r.page.reload()
    r.shows("document.querySelector('#toast').innerText.includes('is not served here')", "another model answers without a word")
    r.send("length")
    check("limit of tokens" in r.last(".notice"), r.last(".notice"))


@test(allow=["401"])
def api_key(r):
    r.mock.state.key = "s3cret-key"
    r.page.reload()
    r.page.wait_for_selector("#ask-key[open]")
    r.shot("key")
    r.audit()
    check(r.page.evaluate("document.activeElement.id") == "key", "the field of the key has no focus")
    r.page.keyboard.type("wrong")
    r.page.keyboard.press("Enter")
    r.shows("document.querySelector('#ask-key-problem').innerText.includes('refused')", "a wrong key is not told")
    r.page.keyboard.type("s3cret-key")
    r.page.keyboard.press("Enter")
    r.shows("document.querySelector('#model').value === 'glm-stories' && !document.querySelector('#ask-key').open", "the right key does not help")
    r.send("hello")
    check(r.last().strip() == STORY, r.last())
    r.shows("!document.querySelector('#load').hidden", "metrics are asked for without the key")
    r.mock.state.key = "changed-key"
    r.send("hello again", wait=False)
    r.page.wait_for_selector("#ask-key[open]")
    r.page.keyboard.type("changed-key")
    r.page.keyboard.press("Enter")
    r.shows("document.querySelectorAll('.assistant').length === 2", "the message is not sent again after the key")
    r.idle()
    check("/" not in r.page.locator(".assistant:last-child .branches").inner_text(), "the refusal counts as an answer")
    kept = r.page.evaluate("""async () => {
      const open = indexedDB.open("marlin");
      const database = await new Promise((resolve) => (open.onsuccess = () => resolve(open.result)));
      const all = database.transaction("conversations").objectStore("conversations").getAll();
      await new Promise((resolve) => (all.onsuccess = resolve));
      return JSON.stringify([{ ...localStorage }, all.result, document.cookie]);
    }""")
    check("-key" not in kept, "the key is kept beyond the tab")
    check(r.page.evaluate("sessionStorage.getItem('marlin.key')") == "changed-key", "the key is not in sessionStorage")


@test(allow=["400", "429", "ERR_INCOMPLETE_CHUNKED", "ERR_CONNECTION"])
def errors(r):
    for word, parts in {
        "refuse": ["temperature must lie between 0 and 2", "status 400", "invalid_value", "field temperature"],
        "busy": ["too many requests", "status 429", "wait 7 s"],
        "broken": ["the engine stopped while it wrote this"],
        "severed": ["connection"],
    }.items():
        r.send(word)
        notice = r.last(".notice")
        for part in parts:
            check(part in notice, f"no {part!r} in {notice!r}")
    check("The line goes dead" in r.last(), "what had come is lost")
    r.shot("errors")
    r.audit()
    r.page.click(".assistant:last-child .notice button")
    r.idle()
    check("2 / 2" in r.last("footer"), "trying again hides what had come")


@test(allow=["503", "ERR_CONNECTION"])
def restart(r):
    r.send("hello")
    r.mock.stop()
    r.send("is anybody there?")
    check("cannot be reached" in r.last(".notice"), r.last(".notice"))
    r.shows("document.querySelector('#banner').innerText.includes('Trying again')", "no word of the server's absence")
    r.shot("away")
    r.audit()
    r.mock.state.loading = True
    r.mock.start()
    r.shows("document.querySelector('#banner').innerText.includes('being loaded')", "no word of the loading")
    r.mock.state.loading = False
    r.mock.state.models = ["another-model"]
    r.shows("document.querySelector('#banner').innerText === ''", "the banner stays")
    check(r.page.input_value("#model") == "another-model", "the models are not read again")
    r.page.click(".assistant:last-child .notice button")
    r.idle()
    check(r.last().strip() == STORY, r.last())
    check("/" not in r.page.locator(".assistant:last-child .branches").inner_text(), "the failure counts as an answer")


@test()
def slow_start_and_announcements(r):
    r.page.evaluate("""() => {
      window.said = [];
      const node = document.querySelector("#announce");
      new MutationObserver(() => window.said.push(node.textContent)).observe(node, { childList: true, characterData: true, subtree: true });
    }""")
    r.send("patient", wait=False)
    r.shows("/waiting [\\d.]+ s/.test(document.querySelector('.assistant footer').innerText)", "no sign of waiting")
    r.mock.state.go.set()
    r.idle()
    r.shows("window.said.length > 1", "the end is not announced")
    said = [text.strip() for text in r.page.evaluate("window.said")]
    check(said == ["Waiting for the answer.", f"Answer: {STORY}"], said)
    check(r.page.get_attribute("#messages", "aria-live") == "off", "every token would be read out")


@test()
def several_at_once(r):
    r.send("forever", wait=False)
    r.page.keyboard.press("Control+Shift+O")
    r.page.fill("#input", "draft")
    r.shows("document.querySelectorAll('#conversations .busy').length === 1", "the running conversation is not marked")
    r.page.click("#conversations .open")
    r.shows("document.querySelector('.assistant > .prose').innerText.length > 40", "it does not go on in the background")
    check(r.page.input_value("#input") == "", "the draft follows into another conversation")
    r.shows("document.querySelector('#load').innerText.replace(/\\s+/g, ' ').trim() === 'KV 34 % · 1 running'", "the load is not shown live")
    r.page.wait_for_timeout(2300)
    r.page.evaluate("document.querySelector('#scroll').scrollTop = 0")
    r.page.reload()
    r.shows("document.querySelector('.assistant .notice')?.innerText.includes('Stopped')", "a reload while it runs loses the answer")
    check(len(r.last()) > 40, "what had come is lost")


@test(allow=["404"])
def without_metrics(r):
    asked = []
    r.page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/metrics") else None)
    r.mock.state.metrics = False
    for _ in range(3):
        r.send("hello")
    r.page.wait_for_timeout(400)
    check(not r.page.is_visible("#load") and len(asked) == 1, f"asked for metrics {len(asked)} times")


@test()
def flood(r):
    r.send("flood", wait=False)
    r.shows("document.querySelectorAll('.assistant > .prose > p').length === 500", "what came is not shown")
    r.page.mouse.move(700, 400)
    r.page.mouse.wheel(0, -3000)
    r.shows("!document.querySelector('#latest').hidden", "no way back for a reader who scrolled up")
    start = time.monotonic()
    r.mock.state.go.set()
    r.idle()
    seconds = time.monotonic() - start
    print(f"  2500 events, 85 KB of Markdown: {seconds:.1f} s")
    check(seconds < 30, f"{seconds:.1f} s for 2500 events")
    check(r.page.locator(".assistant > .prose > p").count() == 3000, "paragraphs are missing")
    check(r.page.is_visible("#latest"), "the view runs away from a reader who scrolled up")
    r.page.click("#latest")
    r.shows("(({ scrollHeight, scrollTop, clientHeight }) => scrollHeight - scrollTop - clientHeight < 50)(document.querySelector('#scroll'))", "no way back to the end")


def chromium():
    """A Chromium to start, or None for playwright's own."""
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


def launch(playwright):
    # CI runs as root in a container, where Chromium's sandbox cannot start.
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    return playwright.chromium.launch(executable_path=chromium(), args=arguments)


def run(browser, options, folder):
    failures = 0
    for name, body, any_server, allow in TESTS:
        if options.only not in (None, name) or (options.url and not any_server and name not in ("unit", "size")):
            continue
        mock = Mock() if not options.url or name == "unit" else None
        started = time.monotonic()
        reader = None
        try:
            reader = Reader(browser, mock.url if mock else options.url, mock, folder, color_scheme="light", reduced_motion="reduce")
            body(reader)
            noise = [line for line in reader.errors if not any(part in line for part in allow)]
            check(not noise, f"on the console: {noise}")
            check(not reader.strangers, f"requests to others: {reader.strangers}")
            print(f"ok      {name} ({time.monotonic() - started:.1f} s)", flush=True)
        except Exception:
            failures += 1
            print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)
            if reader and folder:
                reader.shot(f"failed-{name}")
        finally:
            if reader:
                reader.context.close()
            if mock:
                mock.stop()
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server, instead of the mock one")
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER")
    parser.add_argument("--require", action="store_true", help="install what is missing, and fail where the browser is")
    parser.add_argument("--only", metavar="NAME", help="one test")
    options = parser.parse_args()
    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    if options.require:
        enter_environment()
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        print("the page is not checked: the Python package playwright is missing (pip install playwright)")
        return int(options.require)
    with sync_playwright() as playwright:
        try:
            browser = launch(playwright)
        except Error as error:
            print(f"the page is not checked: no Chromium starts; install one or set CHROMIUM ({error.message.splitlines()[0]})")
            return int(options.require)
        failures = run(browser, options, options.screenshots)
        browser.close()
    print(f"{failures} failed" if failures else "ok")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
