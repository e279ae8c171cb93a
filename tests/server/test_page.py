"""The page in real Chromium, beside a server that answers by script, so that each test decides when a word comes; and
once beside the real one.

After every test the browser's console must be empty: no script error, no refused policy, no missing file.
"""

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import threading
import time

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from uvicorn import Config, Server

from octavo.server.app import PAGE, POLICY

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver: scripts/fetch_chromium"
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
BLOCK_SIZE = 16
FREE, CACHED, SHARED, TAIL, FIRST_OWNER = range(5)


class ScriptedServer:
    """Plays the server. `pieces`: what the model says; `gate`: while it is clear, all after the first piece waits."""

    def __init__(self):
        self.pieces = ["Hello", " there."]
        self.gate = threading.Event()
        self.gate.set()
        self.refusal = None  # (status, message) of the next answer
        self.last_event = None  # instead of a clean end
        self.key = None
        self.requests = []
        self.hung_up = threading.Event()
        self.cells = [FREE] * 128
        self.tails = []
        self.running = 0
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/stats", self.stats),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ]
        self.app = Starlette(routes=routes)

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)

    def refuses(self, request):
        return self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}"

    async def models(self, request):
        return error(401, "wrong key") if self.refuses(request) else JSONResponse({"data": [{"id": "a-model"}]})

    async def chat(self, request):
        self.requests.append(await request.json())
        if self.refuses(request):
            return error(401, "wrong key")
        if self.refusal:
            return error(*self.refusal)
        return StreamingResponse(self.answer(), media_type="text/event-stream")

    async def answer(self):
        try:
            for index, piece in enumerate(self.pieces):
                while index and not self.gate.is_set():
                    await asyncio.sleep(0.01)
                yield event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
            if self.last_event:
                yield event(self.last_event)
                return
            yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            yield event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(self.pieces)}})
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.hung_up.set()
            raise

    async def stats(self, request):
        if self.refuses(request):
            return error(401, "wrong key")

        async def snapshots():
            while True:
                yield event(self.snapshot())
                await asyncio.sleep(0.05)

        return StreamingResponse(snapshots(), media_type="text/event-stream")

    def snapshot(self):
        names = ("cache", "used", "reserved", "internal", "external", "cached", "free", "saved")
        return {
            "time": time.monotonic(),
            "block_size": BLOCK_SIZE,
            "map": base64.b64encode(bytes(self.cells)).decode(),
            "tails": self.tails,
            "owners": {"0": "chat-1", "1": "chat-2"},
            "memory": dict.fromkeys(names, 0) | {"cache": 2**20, "used": 60, "internal": 30, "reserved": 10},
            "running": self.running,
            "waiting": 0,
            "tokens_per_second": 12.0,
            "prefix_hit_tokens": 1,
            "prefix_queried_tokens": 4,
        }


def event(data):
    return f"data: {json.dumps(data)}\n\n"


def error(status, message):
    return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": None}}, status)


@contextlib.contextmanager
def serving(app):
    """The address at which `app` answers, from a thread."""
    server = Server(Config(app, port=0, log_level="error", ws="none", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as its user sees it."""

    def __init__(self, driver):
        self.driver = driver
        self.expected_errors = ()

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def text(self, selector):
        return self.find(selector).text

    def wait(self, condition, what):
        WebDriverWait(self.driver, 10, 0.02).until(lambda _: condition(), f"timed out waiting until {what}")

    def say(self, text):
        self.find("#prompt").send_keys(text, Keys.ENTER)

    def bodies(self):
        return [element.text for element in self.driver.find_elements("css selector", ".turn .body")]

    def wait_for_answer(self):
        self.wait(lambda: self.driver.find_elements("css selector", ".turn:last-child .colophon"), "the answer ends")

    def counts(self):
        pairs = [re.fullmatch(r"(.+)\s(\d+)", item.text) for item in self.driver.find_elements("css selector", "li")]
        return {pair[1]: int(pair[2]) for pair in pairs if pair}

    def pixels(self):
        return self.driver.execute_script("return document.getElementById('map').toDataURL()")

    def emulate(self, **features):
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def resize(self, width, height):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def console(self):
        messages = [entry["message"] for entry in self.driver.get_log("browser")]
        return [text for text in messages if not any(expected in text for expected in self.expected_errors)]


@pytest.fixture
def server():
    return ScriptedServer()


@contextlib.contextmanager
def opened(chromium, address, *expected_errors):
    """The page at `address`, ready. Afterwards the console must hold nothing but the expected errors."""
    page = Page(chromium)
    page.expected_errors = expected_errors
    page.resize(1280, 800)
    page.emulate(prefers_color_scheme="light")
    page.address = address
    chromium.get(address)
    page.wait(lambda: page.text("#connection") == "live" or page.find("#key-form").is_displayed(), "it is ready")
    yield page
    console = page.console()
    chromium.execute_script("sessionStorage.clear()")
    chromium.get("about:blank")
    assert console == []


@pytest.fixture
def page(chromium, server):
    with serving(server) as address, opened(chromium, address) as page:
        yield page


# ---- the real server -----------------------------------------------------------------------------------------------


@needs_chromium
@pytest.mark.real_model
def test_beside_the_real_server_the_map_moves_while_the_model_speaks(chromium, default_server):
    with opened(chromium, default_server.url, "v1/stats") as page:  # refused while the engine is dead
        page.wait(lambda: page.counts().get("free", 0) > 0, "the map is there")
        before = page.counts()
        assert page.text("#model") == default_server.service.model_names[0]
        page.find("summary").click()
        page.find("[name=temperature]").send_keys("0")
        page.say("Name the colours of the rainbow.")
        page.wait(lambda: page.counts()["last of a sequence"] == 1, "the map has moved")
        page.wait_for_answer()
        question, answer = page.bodies()
        assert question == "Name the colours of the rainbow."
        assert len(answer.split()) > 3
        page.wait(lambda: page.counts()["cached"] > before["cached"], "the beginning is kept")
        page.wait(lambda: page.counts()["last of a sequence"] == 0, "the rest is free")
        os.kill(default_server.service.engine.pid, signal.SIGKILL)
        page.wait(lambda: "lost" in page.text("#connection"), "the loss is shown")
        page.wait(lambda: page.text("#connection") == "live", "the new engine is followed")
        page.say("Say hello.")
        page.wait_for_answer()
        assert page.bodies()[-1]


# ---- the conversation ----------------------------------------------------------------------------------------------


@needs_chromium
def test_an_answer_is_shown_while_it_is_written(page, server):
    server.gate.clear()
    page.say("Good morning")
    page.wait(lambda: page.bodies() == ["Good morning", "Hello"], "the first piece is shown")
    assert page.find("#stop").is_displayed()
    assert page.find("#conversation").get_attribute("aria-busy") == "true"
    server.gate.set()
    page.wait_for_answer()
    assert page.bodies() == ["Good morning", "Hello there."]
    assert "2 tokens" in page.text(".colophon")
    assert page.find("#send").is_displayed()
    assert page.find("#conversation").get_attribute("aria-busy") == "false"
    assert page.text("#model") == "a-model"


@needs_chromium
@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_hangs_up_and_keeps_what_was_written(page, server, how):
    server.gate.clear()
    page.say("Tell me all")
    page.wait(lambda: page.bodies()[-1:] == ["Hello"], "the first piece is shown")
    if how == "button":
        page.find("#stop").click()
    else:
        ActionChains(page.driver).send_keys(Keys.ESCAPE).perform()
    page.wait_for_answer()
    assert server.hung_up.wait(5)
    assert page.bodies() == ["Tell me all", "Hello"]
    assert "stopped" in page.text(".colophon")


@needs_chromium
def test_regenerate_asks_the_same_again(page, server):
    page.say("One")
    page.wait_for_answer()
    server.pieces = ["Otherwise."]
    page.find("#regenerate").click()
    page.wait(lambda: page.bodies() == ["One", "Otherwise."], "the new answer has replaced the old one")
    assert server.requests[0] == server.requests[1]


@needs_chromium
def test_a_request_carries_the_conversation_and_only_the_fields_filled_in(page, server):
    page.say("One")
    page.wait_for_answer()
    page.find("summary").click()
    for name, value in {"temperature": "0.5", "top_k": "40", "seed": "7", "repetition_penalty": "1.1"}.items():
        page.find(f"[name={name}]").send_keys(value)
    page.find("#system").send_keys("Be brief")
    page.find("#prompt").send_keys("Two", Keys.SHIFT, Keys.ENTER, Keys.NULL, "lines", Keys.ENTER)
    page.wait(lambda: len(page.bodies()) == 4, "the second answer begins")
    page.wait_for_answer()
    assert server.requests[1] == {
        "model": "a-model",
        "messages": [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "Hello there."},
            {"role": "user", "content": "Two\nlines"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "top_k": 40,
        "seed": 7,
        "repetition_penalty": 1.1,
    }


@needs_chromium
def test_a_value_out_of_range_is_not_sent(page, server):
    page.find("summary").click()
    page.find("[name=top_p]").send_keys("7")
    page.say("One")
    assert page.driver.switch_to.active_element == page.find("[name=top_p]")
    assert page.bodies() == []
    assert server.requests == []


@needs_chromium
def test_a_new_conversation_forgets_the_old_one(page, server):
    page.say("One")
    page.wait_for_answer()
    page.find("#clear").click()
    assert page.bodies() == []
    page.say("Two")
    page.wait_for_answer()
    assert server.requests[1]["messages"] == [{"role": "user", "content": "Two"}]


@needs_chromium
def test_markup_stays_text(page, server):
    attack = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script><b>bold</b>&lt;"
    server.pieces = [attack[:9], attack[9:]]
    page.say(attack)
    page.wait_for_answer()
    assert page.bodies() == [attack, attack]
    assert page.driver.execute_script("return document.querySelectorAll('.body *').length") == 0
    assert page.driver.execute_script("return window.hacked") is None


@needs_chromium
def test_a_refusal_is_shown_in_the_servers_words(page, server):
    page.expected_errors = ("429",)
    server.refusal = (429, "The queue is full; try again in 3 s")
    page.say("One")
    page.wait(lambda: page.text("#problem") == "The queue is full; try again in 3 s", "the refusal is shown")
    server.refusal = None
    page.find("#regenerate").click()
    page.wait(lambda: page.bodies() == ["One", "Hello there."], "the second attempt is answered")
    assert not page.find("#problem").is_displayed()


@needs_chromium
def test_an_error_in_mid_stream_keeps_what_was_written(page, server):
    server.last_event = {"error": {"message": "The engine restarted"}}
    page.say("One")
    page.wait(lambda: page.text("#problem") == "The engine restarted", "the error is shown")
    assert page.bodies() == ["One", "Hello there."]
    assert "failed" in page.text(".colophon")


@needs_chromium
def test_screen_readers_hear_whole_sentences(page, server):
    server.pieces = ["First thing. Sec", "ond thing"]
    server.gate.clear()
    page.say("One")
    page.wait(lambda: page.bodies()[-1:] == ["First thing. Sec"], "the first piece is shown")
    server.gate.set()
    page.wait_for_answer()
    heard = page.driver.execute_script("return [...document.getElementById('spoken').children].map(p => p.textContent)")
    assert heard == ["First thing.", "Second thing"]


# ---- the key -------------------------------------------------------------------------------------------------------


@needs_chromium
class TestKey:
    @pytest.fixture
    def server(self):
        server = ScriptedServer()
        server.key = "sesame"
        return server

    def test_the_key_is_asked_for_kept_in_the_tab_and_sent(self, page, server):
        page.expected_errors = ("401",)
        page.find("#key").send_keys("guess", Keys.ENTER)
        page.wait(lambda: page.find("#key-form").is_displayed(), "a wrong key is asked for again")
        page.find("#key").send_keys("sesame", Keys.ENTER)
        page.wait(lambda: page.text("#connection") == "live", "the right key opens the statistics")
        assert page.text("#model") == "a-model"
        page.say("One")
        page.wait(lambda: page.bodies() == ["One", "Hello there."], "the chat answers")
        stored = page.driver.execute_script("return [{...sessionStorage}, {...localStorage}, document.cookie]")
        assert stored == [{"octavo.key": "sesame"}, {}, ""]


# ---- the cache -----------------------------------------------------------------------------------------------------


@needs_chromium
def test_the_map_follows_the_cache(page, server):
    page.wait(lambda: page.counts().get("free") == 128, "all blocks are free")
    before = page.pixels()
    server.cells[:6] = [FIRST_OWNER, FIRST_OWNER, SHARED, CACHED, TAIL, FIRST_OWNER + 1]
    server.tails = [[4, 0, 5]]
    server.running = 2
    page.wait(lambda: page.counts()["free"] == 122, "the map has followed")
    assert page.counts() == {
        "one sequence’s": 3,
        "last of a sequence": 1,
        "shared": 1,
        "cached": 1,
        "free": 122,
    }
    assert page.pixels() != before
    plots = page.text("#plots")
    assert "running 2" in plots
    assert "prefix hits 25 %" in plots
    assert "internal 30 %" in plots


@needs_chromium
def test_a_last_block_fills_as_it_is_written(page, server):
    server.cells[0] = TAIL
    seen = []
    for filled in (1, 8, 16):
        server.tails = [[0, 0, filled]]
        page.find("#map").send_keys(Keys.HOME)
        page.wait(lambda n=filled: page.text("#block").startswith(f"Block 0: {n} of 16"), "the page has followed")
        seen.append(page.pixels())
    assert len(set(seen)) == 3


@needs_chromium
def test_blocks_tell_about_themselves_to_pointer_and_keyboard(page, server):
    server.cells[:3] = [FIRST_OWNER, SHARED, TAIL]
    server.tails = [[2, 1, 5]]
    page.wait(lambda: page.counts()["free"] == 125, "the map has followed")
    canvas = page.find("#map")
    page.driver.execute_script("arguments[0].focus()", canvas)
    told = []
    for key in (Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.END, Keys.ARROW_RIGHT):
        canvas.send_keys(key)
        told.append(page.text("#block"))
    assert told == [
        "Block 0: all 16 tokens written, of chat-1",
        "Block 1: shared by several sequences",
        "Block 2: 5 of 16 tokens written, of chat-2",
        "Block 10: free",
        "Block 127: free",
        "Block 127: free",
    ]
    size = canvas.size
    corner = (5 - size["width"] // 2, 5 - size["height"] // 2)
    ActionChains(page.driver).move_to_element_with_offset(canvas, *corner).perform()
    page.wait(lambda: page.text("#block") == told[0], "the pointer is followed")


@needs_chromium
@pytest.mark.parametrize("num_blocks", [1, 63, 1024, 20000])
def test_any_number_of_blocks_fits_the_width(page, server, num_blocks):
    server.cells = [FREE] * num_blocks
    page.wait(lambda: page.counts().get("free") == num_blocks, "the map has followed")
    frame, canvas = page.find("#map-frame").size, page.find("#map").size
    assert 0 < canvas["width"] <= frame["width"]
    page.find("#map").send_keys(Keys.END)
    assert page.text("#block") == f"Block {num_blocks - 1}: free"


# ---- the sheet of paper --------------------------------------------------------------------------------------------


@needs_chromium
def test_the_keyboard_reaches_everything_in_reading_order(page):
    page.say("One")
    page.wait_for_answer()
    page.find("#conversation").send_keys("")
    order = []
    for _ in range(7):
        order.append(page.driver.switch_to.active_element.get_attribute("id") or "summary")
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
    assert order == ["conversation", "prompt", "send", "regenerate", "clear", "summary", "map"]


@needs_chromium
@pytest.mark.parametrize("width", [320, 390, 768, 1280, 2560])
def test_no_width_needs_scrolling_sideways(page, width):
    page.resize(width, 800)
    page.say("A word" + "x" * 300)
    page.wait_for_answer()
    assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert page.find("#send").size["height"] >= 32


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_paper(page, scheme):
    page.emulate(prefers_color_scheme=scheme)
    names = ["--ink", "--faint", "--accent", "--external", "--on-accent"]
    read = "const s = getComputedStyle(document.documentElement); return arguments[0].map(n => s.getPropertyValue(n))"
    colours = [luminance(colour) for colour in page.driver.execute_script(read, ["--paper", *names])]
    paper, accent = colours[0], colours[3]
    assert (paper < 0.2) == (scheme == "dark")
    for name, colour in zip(names, colours[1:], strict=True):
        ground = accent if name == "--on-accent" else paper
        assert contrast(colour, ground) >= 4.5, name


def luminance(colour):
    channels = [int(colour.strip()[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


def test_the_page_is_static_and_of_one_host():
    """What the policy demands, seen without a browser: no inline script or style, nothing from elsewhere."""
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<script\b[^>]*>", page) == ['<script type="module" src="page.js">']
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=", page)
