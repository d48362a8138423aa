"""The chat page, in a real headless Chromium, against real server processes."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import requests
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Locator,
    Page,
    Request,
    Route,
    expect,
    sync_playwright,
)

from tests.conftest import LONG, ROOT, START_LIMIT, Server

BROWSERS = ["chromium", "chromium-browser", "google-chrome"]
HTML = (ROOT / "serving" / "chat.html").read_text("utf-8")
BROWSER_ACCEPT = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
GREEDY = {"temperature": 0}
ENDLESS = {"max_tokens": LONG["max_tokens"]}
NETWORK_ERROR = "Failed to load resource"
"""How Chromium's console tells of an answer that is no success: of each, whoever deals with it."""

LIMIT = 60
"""Seconds, for what should be there at once."""

expect.set_options(timeout=1000 * LIMIT)


class OpenPage(Protocol):
    """Opens the chat page in a browser profile of its own."""

    def __call__(
        self, url: str, *, tolerates: str | None = None, storage: dict[str, str] | None = None, **context: Any
    ) -> Page:
        """
        Args:
            tolerates: how an error in the console may begin.
            storage: what localStorage holds before.
        """


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium here (on Debian: apt-get install chromium)")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path) as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens pages. At the end none of them has had an error, broken the policy, or asked another host."""
    contexts, faults = [], []

    def open_page(
        url: str, *, tolerates: str | None = None, storage: dict[str, str] | None = None, **context: Any
    ) -> Page:
        def hear(message: ConsoleMessage) -> None:
            is_expected = tolerates is not None and message.text.startswith(tolerates)
            if message.type in ("error", "warning") and not is_expected:
                faults.append(message.text)

        def watch(request: Request) -> None:
            if not request.url.startswith((f"{url}/", "data:")):
                faults.append(request.url)

        kept = [{"name": name, "value": value} for name, value in (storage or {}).items()]
        state = {"cookies": [], "origins": [{"origin": url, "localStorage": kept}]}
        contexts.append(browser.new_context(**{"locale": "en-US", "storage_state": state} | context))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * LIMIT)
        page.on("console", hear)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", watch)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture(scope="module")
def endless(start_server: Callable[..., Server], long_model: Path) -> Server:
    """One that a test ends, and starts again."""
    return start_server(long_model)


def write(page: Page, question: str) -> None:
    page.get_by_role("textbox", name=re.compile("Write a message|输入消息")).fill(question)
    page.keyboard.press("Enter")


def wait_for_end(page: Page) -> None:
    expect(page.locator("body")).not_to_have_attribute("data-running", "")


def ask(page: Page, question: str) -> Locator:
    """Asks, waits for the end, and returns the answer."""
    write(page, question)
    wait_for_end(page)
    return page.locator(".answer").last


def wait_until(page: Page, is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not is_true():
        assert time.monotonic() < deadline
        page.wait_for_timeout(20)


def stored(page: Page) -> list[dict[str, Any]]:
    exchanges: list[dict[str, Any]] = json.loads(
        page.evaluate("localStorage.getItem('llama-chat.exchanges')") or "[]"
    )
    return exchanges


def settings(**values: object) -> dict[str, str]:
    return {"llama-chat.settings": json.dumps(values)}


def bodies(page: Page) -> list[dict[str, Any]]:
    """Where the bodies of the page's questions gather from now on."""
    gathered: list[dict[str, Any]] = []

    def gather(request: Request) -> None:
        if request.post_data:
            gathered.append(json.loads(request.post_data))

    page.on("request", gather)
    return gathered


def event(text: str, **more: object) -> str:
    return f"data: {json.dumps({'response': text, 'status': 200, 'time': ''} | more)}\n\n"


def stream_of(*texts: str) -> str:
    usage = {"prompt_tokens": 1, "completion_tokens": len(texts), "total_tokens": 1 + len(texts)}
    last = event("", finish_reason="stop", usage=usage)
    return "".join([*map(event, texts), last, "data: [DONE]\n\n"])


def error_body(status: int, message: str) -> str:
    error = {"message": message, "type": "", "param": None, "code": ""}
    return json.dumps({"error": error, "status": status, "time": ""})


def answer_with(page: Page, *texts: str) -> None:
    """Lets the page's questions be answered with these pieces: what no model can be made to say."""
    intercept(page, 200, stream_of(*texts))


def intercept(page: Page, status: int, body: str) -> None:
    def answer(route: Route) -> None:
        if route.request.method == "POST":
            kind = "text/event-stream" if body.startswith("data:") else "application/json"
            route.fulfill(status=status, body=body, content_type=kind)
        else:
            route.continue_()

    page.unroute_all()
    page.route("**/*", answer)


# ---- over HTTP --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accept", ["*/*", "application/json", None])
def test_programs_get_the_description_as_ever(demo_server: str, accept: str | None) -> None:
    response = requests.get(demo_server, headers={"Accept": accept}, timeout=30)
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Vary"] == "Accept"
    assert list(response.json()) == ["model", "ask", "docs", "health"]


def test_browsers_get_the_page_under_a_policy_that_allows_its_own_script_alone(demo_server: str) -> None:
    response = requests.get(demo_server, headers={"Accept": BROWSER_ACCEPT}, timeout=30)
    headers = response.headers
    assert response.status_code == 200
    assert response.text == HTML
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-cache"
    assert headers["Vary"] == "Accept"
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    for tag in ("script", "style"):
        content = HTML.split(f"<{tag}>")[1].split(f"</{tag}>")[0].encode()
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"


def test_the_page_makes_no_markup_from_text() -> None:
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc|eval\(|new Function"
    assert not re.search(ways, HTML)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_of_text_is_legible(scheme: str) -> None:
    light, dark = (block.split("}")[0] for block in HTML.split(":root {")[1:3])
    colours = dict(re.findall(r"--([\w-]+): #(\w{6})", light if scheme == "light" else dark))

    def luminance(colour: str) -> float:
        parts = [int(colours[colour][i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one: str, other: str) -> float:
        dark, light = sorted(map(luminance, (one, other)))
        return (light + 0.05) / (dark + 0.05)

    for ground in ("paper", "raised", "tint"):
        assert min(contrast(text, ground) for text in ("ink", "quiet", "accent", "danger")) >= 4.5
        assert contrast("edge", ground) >= 3  # of what is no text: the edges of fields
    assert contrast("accent", "on-accent") >= 4.5


# ---- a conversation ---------------------------------------------------------------------------------------


def test_an_answer_grows_while_it_is_made(open_page: OpenPage, endless: Server) -> None:
    page = open_page(endless.url, storage=settings(**ENDLESS))
    write(page, "x")
    lengths: set[int] = set()

    def grows() -> bool:
        lengths.add(len(page.locator("#exchanges").inner_text()))
        return len(lengths) > 3

    wait_until(page, grows)
    expect(page.locator("body")).to_have_attribute("data-running", "")
    page.keyboard.press("Escape")
    wait_for_end(page)


@pytest.mark.parametrize(("locale", "question"), [("en-US", "What can you do?"), ("zh-CN", "你能做什么？")])
def test_an_answer_is_shown_measured_and_told_to_a_screen_reader(
    open_page: OpenPage, demo_server: str, locale: str, question: str
) -> None:
    page = open_page(demo_server, storage=settings(**GREEDY), locale=locale)
    page.evaluate("""() => {
        window.said = [];
        const status = document.querySelector("#status");
        const note = () => said.push(status.textContent);
        new MutationObserver(note).observe(status, {childList: true, subtree: true});
    }""")
    answer = ask(page, question)
    whole = requests.post(demo_server, json={"prompt": question, **GREEDY}, timeout=60).json()["response"]
    assert stored(page)[0]["answer"] == whole
    assert answer.inner_text().split() == whole.replace("- ", "").split()
    # A screen reader is told that an answer is made, and then the answer: not every token.
    begin, end = page.evaluate("said")
    assert begin in ("Answering", "正在回答")
    assert end.endswith(whole)
    note = r"\d+ tokens · [\d.]+ tokens/s · complete|\d+ 个 token · [\d.]+ token/秒 · 已完成"
    expect(page.locator(".note")).to_have_text(re.compile(note))


@pytest.mark.parametrize(
    ("locale", "lang", "words"),
    [
        ("de", "en", ["New chat", "Settings", "What would you like to know?"]),
        ("zh-CN", "zh-CN", ["新对话", "设置", "想聊点什么？"]),
    ],
)
def test_the_page_speaks_the_language_of_the_browser(
    open_page: OpenPage, demo_server: str, locale: str, lang: str, words: list[str]
) -> None:
    page = open_page(demo_server, locale=locale)
    expect(page.locator("html")).to_have_attribute("lang", lang)
    for word in words:
        expect(page.get_by_text(word, exact=True).first).to_be_visible()
    expect(page.get_by_role("heading", level=1)).to_have_text("Demo model" if lang == "en" else "演示模型")


@pytest.mark.parametrize(
    ("first", "second", "answer"),
    [
        ("My favourite colour is red.", "What is my favourite colour?", "Your favourite colour is red."),
        ("我最喜欢的颜色是红色。", "我最喜欢什么颜色？", "你最喜欢的颜色是红色。"),
    ],
)
def test_the_second_turn_sends_the_first(
    open_page: OpenPage, demo_server: str, first: str, second: str, answer: str
) -> None:
    page = open_page(demo_server, storage=settings(**GREEDY))
    asked = bodies(page)
    remembered = ask(page, first).inner_text()
    expect(ask(page, second)).to_have_text(answer)
    assert asked[1] == {
        "prompt": second,
        "history": [{"role": "user", "content": first}, {"role": "assistant", "content": remembered}],
        "stream": True,
        **GREEDY,
    }


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_stop_keeps_what_has_come(open_page: OpenPage, endless: Server, way: str) -> None:
    page = open_page(endless.url, storage=settings(**ENDLESS))
    write(page, "x")
    expect(page.locator(".answer > *").nth(0)).to_be_visible()
    if way == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    wait_for_end(page)
    expect(page.locator(".note")).to_have_text("stopped")
    kept = stored(page)[0]["answer"]
    assert kept
    shown = page.locator(".answer").inner_text()
    wait_until(page, lambda: "finish_reason=aborted" in endless.log)
    assert page.locator(".answer").inner_text() == shown
    assert stored(page)[0]["answer"] == kept
    expect(page.get_by_role("button", name="Retry")).to_be_visible()


def test_retry_asks_the_same_again(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server)
    asked = bodies(page)
    ask(page, "Hello")
    ask(page, "Who are you?")
    page.get_by_role("button", name="Retry").click()
    wait_for_end(page)
    assert asked[1] == asked[2]
    assert [exchange["question"] for exchange in stored(page)] == ["Hello", "Who are you?"]
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.get_by_role("button", name="Retry")).to_have_count(1)
    expect(page.locator("#prompt")).to_be_focused()


def test_a_retry_that_fails_leaves_the_answer_there_was(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server, tolerates=NETWORK_ERROR)
    before = ask(page, "Hello").inner_text()
    intercept(page, 503, error_body(503, "the engine has stopped"))
    page.get_by_role("button", name="Retry").click()
    wait_for_end(page)
    expect(page.locator(".answer")).to_have_text(before)
    expect(page.locator(".problem")).to_have_text("the engine has stopped")


def test_a_question_can_be_edited_and_sent_again(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server)
    ask(page, "Hello")
    ask(page, "Who are you?")
    asked = bodies(page)
    page.get_by_role("button", name="Edit").first.click()
    field = page.get_by_role("textbox", name="Edit")
    expect(field).to_be_focused()
    expect(field).to_have_value("Hello")
    field.fill("something else")
    page.keyboard.press("Escape")
    expect(page.locator(".said").first).to_have_text("Hello")
    expect(page.get_by_role("button", name="Edit").first).to_be_focused()
    page.keyboard.press("Enter")
    page.get_by_role("textbox", name="Edit").fill("What is your name?")
    page.keyboard.press("Enter")
    wait_for_end(page)
    assert asked == [{"prompt": "What is your name?", "history": [], "stream": True}]
    assert [exchange["question"] for exchange in stored(page)] == ["What is your name?"]
    expect(page.locator(".said")).to_have_text(["What is your name?"])


def test_the_conversation_outlives_a_reload_until_a_new_one_begins(
    open_page: OpenPage, demo_server: str
) -> None:
    page = open_page(demo_server)
    answer = ask(page, "你好").inner_text()
    note = page.locator(".note").inner_text()
    page.reload()
    expect(page.locator(".said")).to_have_text("你好")
    expect(page.locator(".answer")).to_have_text(answer)
    expect(page.locator(".note")).to_have_text(note)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".exchange")).to_have_count(0)
    assert stored(page) == []
    page.get_by_role("button", name="Bring back the last conversation").click()
    expect(page.locator(".answer")).to_have_text(answer)
    page.get_by_role("button", name="New chat").click()
    page.reload()
    expect(page.get_by_text("What would you like to know?")).to_be_visible()
    expect(page.get_by_role("button", name="Bring back the last conversation")).to_be_hidden()


def test_a_reload_in_the_middle_keeps_what_has_come(open_page: OpenPage, endless: Server) -> None:
    page = open_page(endless.url, storage=settings(**ENDLESS))
    write(page, "x")
    expect(page.locator(".answer > *").nth(0)).to_be_visible()
    page.reload()
    expect(page.locator(".note")).to_have_text("interrupted")
    expect(page.locator(".answer")).not_to_be_empty()


RUBBISH = [
    "{",
    "null",
    '"text"',
    '{"question": "a", "answer": "b", "system": {}, "seed": {}}',
    '[null, 1, {}, {"question": 1, "answer": 2}]',
    '[{"question": "a", "answer": "b", "finish": {}, "tokens": "x", "rate": []}]',
]


def test_a_damaged_storage_does_not_break_the_page(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server)
    answer_with(page, "fine")
    for rubbish in RUBBISH:
        page.evaluate(
            """(rubbish) => {
                localStorage.setItem("llama-chat.exchanges", rubbish);
                localStorage.setItem("llama-chat.settings", rubbish);
                sessionStorage.setItem("llama-chat.key", rubbish);
            }""",
            rubbish,
        )
        page.reload()
        expect(ask(page, "x")).to_have_text("fine")


def test_another_tab_shows_the_same_conversation(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server)
    other = page.context.new_page()
    other.goto(demo_server)
    ask(page, "Hello")
    expect(other.locator(".said")).to_have_text("Hello")


# ---- what answers look like -------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script><b>b</b>"


FRAMES = ["{}", "```html\n{}\n```", "`{}`", "# {}", "- {}", "> {}", "**{}**", "| {} |\n| - |\n| {} |"]


def test_markup_in_an_answer_stays_text(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server)
    for frame in FRAMES:
        answer_with(page, *frame.replace("{}", HOSTILE))
        expect(ask(page, "x")).to_contain_text(HOSTILE)
    page.reload()
    for answer in page.locator(".answer").all():
        expect(answer).to_contain_text(HOSTILE)
    assert page.locator("main :is(img, script, b)").count() == 0
    assert page.title() == "Llama 3"


def test_markup_in_a_question_stays_text(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server)
    ask(page, HOSTILE)
    expect(page.locator(".said")).to_have_text(HOSTILE)
    page.get_by_role("button", name="Edit").click()
    expect(page.get_by_role("textbox", name="Edit")).to_have_value(HOSTILE)
    page.reload()
    expect(page.locator(".said")).to_have_text(HOSTILE)
    assert page.locator("main :is(img, script, b)").count() == 0
    assert page.title() == "Llama 3"


def test_markup_in_an_error_stays_text(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server, tolerates=NETWORK_ERROR)
    intercept(page, 500, error_body(500, HOSTILE))
    ask(page, "x")
    expect(page.locator(".problem")).to_have_text(HOSTILE)
    assert page.locator("main :is(img, script, b)").count() == 0


OUTLINE = """(source) => {
    const outline = (node) => {
        if (node.nodeType === Node.TEXT_NODE) return node.data;
        if (node.matches("figcaption")) return "";
        const inside = [...node.childNodes].map(outline).join("");
        if (node.matches("li > p ~ p")) return "|" + inside;
        if (node.matches("figure, div, thead, tbody, li > p")) return inside;
        const start = node.start > 1 ? node.start : "";
        const link = node.href ? ` ${node.href} ${node.rel} ${node.target}` : "";
        return `<${node.localName}${start}${link}>${inside}</>`;
    };
    const [whole, grown] = [document.createElement("div"), document.createElement("div")];
    renderMarkdown(whole, source);
    for (let end = 0; end <= source.length; end++) renderMarkdown(grown, source.slice(0, end));
    return [whole, grown].map((answer) => [...answer.childNodes].map(outline).join(""));
}"""
"""The elements of an answer that came whole, and of one that grew, as text, which is easier to compare."""

HARMLESS = [
    ("plain\nlines\n\nand 2 * 3 * 4", "<p>plain\nlines</><p>and 2 * 3 * 4</>"),
    ("# One\n## Two\ntext\n###### Six", "<h3>One</><h4>Two</><p>text</><h6>Six</>"),
    ("**bold** *it* _it_ ~~no~~", "<p><strong>bold</> <em>it</> <em>it</> <del>no</></>"),
    ("***both*** **a *b* c**", "<p><strong><em>both</></> <strong>a <em>b</> c</></>"),
    ("**中文**后面，snake_case_name", "<p><strong>中文</>后面，snake_case_name</>"),
    ("`*d*` ``e`f`` \\*g\\*", "<p><code>*d*</> <code>e`f</> *g*</>"),
    ("open **bold and `code", "<p>open **bold and `code</>"),
    ("- a\n- b\n\n  more\n- c\n\nend", "<ul><li>a</><li>b|more</><li>c</></><p>end</>"),
    ("- a\n  - b\n    1. c\n- d", "<ul><li>a<ul><li>b<ol><li>c</></></></></><li>d</></>"),
    ("Do:\n1. a\n2. b\n- c", "<p>Do:</><ol><li>a</><li>b</></><ul><li>c</></>"),
    ("1. a\n```sh\nls\n```\n2. b", "<ol><li>a</></><pre><code>ls</></><ol2><li>b</></>"),
    ("1. a\n   ```\n   x\n     y\n   ```\n2. b", "<ol><li>a<pre><code>x\n  y</></></><li>b</></>"),
    ("```py\na = '**'\n\n# b\n```\nc", "<pre><code>a = '**'\n\n# b</></><p>c</>"),
    ("~~~\n```\n~~~", "<pre><code>```</></>"),
    ("```\nnot closed", "<pre><code>not closed</></>"),
    ("> a\n> - b", "<blockquote><p>a</><ul><li>b</></></>"),
    ("a\n\n---\n\nb", "<p>a</><hr></><p>b</>"),
    (
        "| a | b |\n| --- | :-: |\n| `c` | d |",
        "<table><tr><th>a</><th>b</></><tr><td><code>c</></><td>d</></></>",
    ),
    ("a | b", "<p>a | b</>"),
    ("[a](https://b.example/c_(d)) x", "<p><a https://b.example/c_(d)>a</> x</>"),
    ("看http://b.example/c。谢谢", "<p>看<a http://b.example/c>http://b.example/c</>。谢谢</>"),
    ("(see http://b.example/c.)", "<p>(see <a http://b.example/c>http://b.example/c</>.)</>"),
    ("![a](https://b.example/c.png)", "<p><a https://b.example/c.png>a</></>"),
    ("[http://a.example](https://b.example)", "<p><a https://b.example/>http://a.example</></>"),
]
HOSTILE_LINKS = [
    "[a](javascript:alert(1))",
    "[a](JaVaScRiPt:alert(1))",
    "[a]( javascript:alert(1))",
    "[a](&#106;avascript:alert(1))",
    "[a](data:text/html,b)",
    "[a](vbscript:b)",
    "[a](file:///etc/passwd)",
    "[a](//b.example)",
    "[a](/health)",
    "javascript:alert(1)",
    "<javascript:alert(1)>",
]


def test_markdown(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server)
    expected = [*HARMLESS, *((link, f"<p>{link}</>") for link in HOSTILE_LINKS)]
    for source, outline in expected:
        outline = re.sub(r"<a (.*?)>", r"<a \1 noopener noreferrer _blank>", outline)
        assert page.evaluate(OUTLINE, source) == [outline, outline]


SHAPES = [
    "> ",
    "- ",
    "1. a\n ",
    "**a ",
    "*a ",
    "`",
    "``a ",
    "[",
    "[a](",
    "_a ",
    "| a ",
    "~~a ",
    "#",
    "https://",
]


def test_an_answer_of_any_shape_is_shown(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server)
    for shape in SHAPES:
        answer_with(page, shape * 500, "end")
        expect(ask(page, shape)).to_contain_text("end")


def test_only_the_block_that_grows_is_built_again(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server, storage=settings(**GREEDY))
    ask(page, "Hello")
    page.evaluate("""() => {
        document.querySelector(".answer").firstChild.isTheSame = true;
        window.removed = [];
        const note = (records) => records.filter(({target}) => target.matches(".answer"))
            .forEach(({removedNodes}) => removed.push(...[...removedNodes].map((node) => node.textContent)));
        const exchanges = document.querySelector("#exchanges");
        new MutationObserver(note).observe(exchanges, {childList: true, subtree: true});
    }""")
    blocks = ask(page, "What can you do?").locator("> *").all_text_contents()
    assert len(blocks) == 2
    assert page.evaluate("document.querySelector('.answer').firstChild.isTheSame")
    assert blocks[0] not in page.evaluate("removed")


def test_answers_and_code_can_be_copied(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server, permissions=["clipboard-read", "clipboard-write"])
    source = "Run:\n\n```sh\nls -l  你好\n```"
    answer_with(page, source)
    ask(page, "x")
    prompt = page.locator("#prompt")
    for clipboard in ("navigator.clipboard", "undefined"):  # over plain http from elsewhere there is none
        page.evaluate(
            f"Object.defineProperty(navigator, 'clipboard', {{value: {clipboard}, configurable: true}})"
        )
        for name, text in ((".foot", source), (".code", "ls -l  你好")):
            prompt.fill("")
            page.locator(name).get_by_role("button", name=re.compile("Copy|Copied")).click()
            expect(page.locator(name).get_by_role("button", name="Copied")).to_be_visible()
            prompt.focus()
            page.keyboard.press("Control+V")
            expect(prompt).to_have_value(text)


# ---- the stream, and its end ------------------------------------------------------------------------------


def test_events_may_be_cut_anywhere(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server)
    texts = page.evaluate(
        """async (stream) => {
            const bytes = new TextEncoder().encode(stream);
            const read = async (chunks) => {
                const events = [];
                const body = new ReadableStream({start(controller) {
                    chunks.forEach((chunk) => controller.enqueue(chunk));
                    controller.close();
                }});
                for await (const event of readEvents(body)) events.push(event);
                return events.join("|");
            };
            const cuts = [[...bytes].map((byte) => new Uint8Array([byte]))];
            for (let at = 0; at <= bytes.length; at++) cuts.push([bytes.slice(0, at), bytes.slice(at)]);
            return Promise.all(cuts.map(read));
        }""",
        ": a comment\r\n\r\n" + 'data: {"response":"你好👋🏽é"}\n\ndata:{"a":"b\\n"}\r\n\r\ndata: [DONE]\n\n',
    )
    assert set(texts) == {'{"response":"你好👋🏽é"}|{"a":"b\\n"}|[DONE]'}


def test_a_server_that_goes_away_and_comes_back(open_page: OpenPage, endless: Server, tmp_path: Path) -> None:
    page = open_page(endless.url, tolerates=NETWORK_ERROR, storage=settings(**ENDLESS))
    write(page, "x")
    expect(page.locator(".answer > *").nth(0)).to_be_visible()
    endless.stop()
    wait_for_end(page)
    problem = page.locator(".problem")
    expect(problem).to_have_text(re.compile("The connection broke off"))
    expect(page.locator(".answer > *").nth(0)).to_be_visible()
    kept = stored(page)[0]["answer"]
    assert kept
    page.get_by_role("button", name="Retry").click()
    wait_for_end(page)
    expect(problem).to_have_text(re.compile("can’t be reached"))
    assert stored(page)[0]["answer"] == kept
    with (tmp_path / "log").open("w") as log:
        endless.process = subprocess.Popen(endless.process.args, cwd=ROOT, stdout=log, stderr=log)
    deadline = time.monotonic() + START_LIMIT
    while not endless.answers():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    page.get_by_role("button", name="Retry").click()
    expect(problem).to_have_count(0)
    expect(page.locator(".answer > *").nth(0)).to_be_visible()
    page.keyboard.press("Escape")
    wait_for_end(page)
    assert stored(page)[0]["answer"]


def test_a_stream_that_ends_too_early_is_told(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server)
    intercept(page, 200, event("so far"))
    expect(ask(page, "x")).to_have_text("so far")
    expect(page.locator(".problem")).to_have_text(re.compile("The connection broke off"))


def test_an_error_is_shown_as_the_server_says_it(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server, tolerates=NETWORK_ERROR, storage=settings(max_tokens=99_999))
    ask(page, "x")
    expect(page.locator(".problem")).to_have_text("max_tokens: at most 2048, the context")


def test_an_error_within_a_stream_is_shown(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server)
    intercept(page, 200, event("so far") + f"data: {error_body(500, 'request 1 failed')}\n\n")
    expect(ask(page, "x")).to_have_text("so far")
    expect(page.locator(".problem")).to_have_text("request 1 failed")


def test_an_error_of_somebody_in_between_is_shown(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server, tolerates=NETWORK_ERROR)
    intercept(page, 502, "<h1>Bad Gateway</h1>")
    ask(page, "x")
    expect(page.locator(".problem")).to_have_text("The server answered with status 502.")
    page.unroute_all()
    asked = bodies(page)
    ask(page, "y")
    assert asked[0]["history"] == []  # what was not answered is no turn of the dialog


def test_a_server_that_wants_a_key_gets_it(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server, tolerates=NETWORK_ERROR)

    def guard(route: Route) -> None:
        if route.request.method != "POST":
            route.continue_()
        elif route.request.headers.get("authorization") == "Bearer s3cret":
            route.fulfill(body=stream_of("welcome"), content_type="text/event-stream")
        else:
            route.fulfill(status=401, body=error_body(401, "the key is wrong"))

    page.route("**/*", guard)
    field = page.locator("#key")
    expect(field).to_be_hidden()
    ask(page, "x")
    for key in ("wrong", "s3cret"):
        expect(page.locator(".problem")).to_have_text("the key is wrong")
        expect(field).to_be_focused()
        expect(field).to_have_attribute("type", "password")
        field.fill(key)
        page.keyboard.press("Enter")
        wait_for_end(page)
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator(".answer")).to_have_text("welcome")
    assert "s3cret" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    expect(ask(page, "y")).to_have_text("welcome")


# ---- by hand ----------------------------------------------------------------------------------------------


def test_enter_in_an_input_method_does_not_send(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server)
    asked = bodies(page)
    prompt = page.locator("#prompt")
    prompt.focus()
    devtools = page.context.new_cdp_session(page)
    devtools.send("Input.imeSetComposition", {"text": "nihao", "selectionStart": 5, "selectionEnd": 5})
    # 229 is the code of a key that the input method takes for itself.
    enter = {"type": "rawKeyDown", "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}
    devtools.send("Input.dispatchKeyEvent", enter)
    devtools.send("Input.dispatchKeyEvent", enter | {"windowsVirtualKeyCode": 13})
    expect(page.locator(".exchange")).to_have_count(0)
    devtools.send("Input.insertText", {"text": "你好"})
    expect(prompt).to_have_value("你好")
    devtools.send("Input.dispatchKeyEvent", enter)  # Safari's order: the composition has ended by then
    expect(page.locator(".exchange")).to_have_count(0)
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("!")
    page.keyboard.press("Enter")
    wait_for_end(page)
    assert [body["prompt"] for body in asked] == ["你好\n!"]


def test_nothing_is_sent_while_an_answer_is_made_or_when_there_is_nothing(
    open_page: OpenPage, endless: Server
) -> None:
    page = open_page(endless.url, storage=settings(**ENDLESS))
    asked = bodies(page)
    write(page, " \n ")
    write(page, "x")
    expect(page.locator("body")).to_have_attribute("data-running", "")
    write(page, "the next one")
    expect(page.locator("#prompt")).to_have_value("the next one")
    page.keyboard.press("Escape")
    wait_for_end(page)
    assert [body["prompt"] for body in asked] == ["x"]


def test_settings_are_sent_and_kept(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server)
    asked = bodies(page)
    page.get_by_role("button", name="Settings").click()
    dialog = page.get_by_role("dialog", name="Settings")
    dialog.get_by_label("System prompt").fill("You are brief.")
    numbers = {
        "Max tokens": 9,
        "Temperature": 0.25,
        "Top-p": 0.5,
        "Top-k": 3,
        "Repetition penalty": 1.25,
        "Seed": 7,
    }
    for label, value in numbers.items():
        dialog.get_by_label(label, exact=True).fill(str(value))
    dialog.get_by_label("Min-p").fill("3")  # out of bounds: not sent
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    page.reload()
    ask(page, "Hello")
    assert asked == [{
        "prompt": "Hello", "history": [{"role": "system", "content": "You are brief."}], "stream": True,
        "max_tokens": 9, "temperature": 0.25, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.25, "seed": 7,
    }]  # fmt: skip
    expect(page.locator(".note")).to_have_text(re.compile("9 tokens · .* · cut off at the token limit"))
    page.get_by_role("button", name="Settings").click()
    expect(dialog.get_by_label("Temperature")).to_have_value("0.25")
    dialog.get_by_role("button", name="Reset").click()
    dialog.get_by_role("button", name="Done").click()
    expect(dialog).to_be_hidden()
    ask(page, "Hello")
    assert set(asked[1]) == {"prompt", "history", "stream"}


def test_the_page_follows_an_answer_unless_the_reader_has_scrolled_up(
    open_page: OpenPage, endless: Server
) -> None:
    page = open_page(endless.url, storage=settings(**ENDLESS), viewport={"width": 400, "height": 300})
    write(page, "x")
    scroller = page.locator("main")

    def height() -> int:
        return int(scroller.evaluate("(node) => node.scrollHeight"))

    def distance() -> int:
        return int(scroller.evaluate("(node) => node.scrollHeight - node.clientHeight - node.scrollTop"))

    wait_until(page, lambda: scroller.evaluate("(node) => node.scrollTop") > 100)
    assert distance() < 60
    page.mouse.move(200, 150)
    page.mouse.wheel(0, -60)
    wait_until(page, lambda: distance() > 150)
    page.mouse.wheel(0, 100_000)
    wait_until(page, lambda: distance() < 3)
    before = height()
    wait_until(page, lambda: height() > before + 100)
    assert distance() < 60
    # The reader scrolls up by less than the page has just followed the answer.
    scroller.evaluate("""(node) => {
        const line = document.createElement("p");
        line.style.height = "50px";
        node.querySelector(".answer").after(line);
        follow();
        node.scrollTop -= 20;
    }""")
    wait_until(page, lambda: distance() > 150)
    # The answer grows between the reader's coming to the end and the page's hearing of it.
    scroller.evaluate("""(node) => {
        node.scrollTop = node.scrollHeight;
        const line = document.createElement("p");
        line.style.height = "50px";
        node.querySelector("li:last-child .foot").append(line);
    }""")
    before = height()
    wait_until(page, lambda: height() > before + 100)
    assert distance() < 60
    page.keyboard.press("Escape")
    wait_for_end(page)


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_narrow_phone_needs_no_scrolling_sideways(
    open_page: OpenPage, demo_server: str, locale: str
) -> None:
    page = open_page(
        demo_server, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, locale=locale
    )
    wide = "x" * 300
    frames = [
        "# {}",
        "{}",
        "- {}",
        "> {}",
        "`{}`",
        "```\n{}\n```",
        "| {} | b |\n| - | - |",
        "https://b.example/{}",
    ]
    width = "document.documentElement.scrollWidth"
    scroller = "document.querySelector('main').scrollWidth"
    assert page.evaluate(width) == page.evaluate(scroller) == 360
    answer_with(page, "\n\n".join(frame.replace("{}", wide) for frame in frames))
    ask(page, wide)
    assert page.evaluate(width) == page.evaluate(scroller) == 360
    page.locator(".actions button").first.click()
    assert page.evaluate(width) == page.evaluate(scroller) == 360
    page.locator("#open-settings").click()
    assert page.evaluate("document.querySelector('dialog').scrollWidth") == 360


FOCUSED_NAME = """() => {
    const {ariaLabel, labels, textContent} = document.activeElement;
    return ariaLabel || labels?.[0]?.textContent || textContent;
}"""


def test_all_of_it_can_be_reached_by_keyboard_and_has_a_name(open_page: OpenPage, demo_server: str) -> None:
    page = open_page(demo_server)
    answer_with(page, "a\n\n```sh\nls\n```\n\n| a | b |\n| - | - |\n\n[link](https://b.example)")
    ask(page, "x")
    expect(page.locator("#prompt")).to_be_focused()
    reached = []
    page.get_by_role("heading", level=1).click()
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(FOCUSED_NAME))
    names = ["New chat", "Settings", "Conversation", "Edit", "Copy", "code", "Table", "link", "Copy", "Retry",
             "Write a message", "Send"]  # fmt: skip
    assert [name for name in reached if name in names][: len(names)] == names
    for landmark in (page.get_by_role("banner"), page.get_by_role("main"), page.get_by_role("status")):
        expect(landmark).to_have_count(1)


def test_the_docs_need_no_other_host_and_ask_with_a_key(
    open_page: OpenPage, start_server: Callable[..., Server]
) -> None:
    url = start_server("demo", "--api-key", "s3cret").url
    page = open_page(url)
    page.goto(f"{url}/docs")
    page.get_by_role("button", name="Authorize").click()
    dialog = page.locator(".dialog-ux")
    dialog.get_by_role("textbox").fill("s3cret")
    dialog.get_by_role("button", name="Apply credentials").click()
    dialog.get_by_role("button", name="Close").click()
    route = page.locator("#operations-default-create_answer__post")
    route.locator(".opblock-summary-control").click()
    route.get_by_role("button", name="Try it out").click()
    route.get_by_role("button", name="Execute").click()
    answer = route.locator(".live-responses-table .response")
    expect(answer.locator(".response-col_status")).to_have_text(re.compile("^200"))
    expect(answer).to_contain_text('"finish_reason"')
