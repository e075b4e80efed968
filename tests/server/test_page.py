"""The chat page in a real browser, without a window."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live import Live

from kuiperllm.engine.async_llm import AsyncLLM

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHAT = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1100, "height": 800}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Playwright's own Chromium, or the one of the system."""
    with playwright.sync_playwright() as run:
        found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        try:
            made = run.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        # The first answer waits for kernels to be compiled.
        playwright.expect.set_options(timeout=60_000)
        yield made
        playwright.expect.set_options(timeout=5_000)
        made.close()


@pytest.fixture(scope="module")
def site() -> Iterator[Live]:
    """The demo model, which gets a chat template."""
    from kuiperllm.server.config import ServerConfig

    server = Live(
        AsyncLLM(None, max_num_seqs=4), ServerConfig(port=0, model_names=("demo",), chat_template=CHAT)
    )
    yield server
    server.assert_idle()
    server.stop()


@pytest.fixture
def open_page(browser: Any, site: Live) -> Iterator[Callable[..., Any]]:
    """Opens the page in a browser that has never seen it; at the end nothing may have gone wrong there."""
    contexts: list[Any] = []
    complaints: list[str] = []

    def open_one(url: str | None = None, script: str = "", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": DESK} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.add_init_script(script)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: is_error(line) and complaints.append(line.text))
        page.goto(url or site.url)
        playwright.expect(page.locator("#model")).not_to_be_empty()
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not complaints


def is_error(line: Any) -> bool:
    """Whether a line of the console is about the page, and not about an answer other than 200."""
    return line.type == "error" and "Failed to load resource" not in line.text


def set_up(page: Any, **values: object) -> None:
    page.keyboard.press("Alt+s")
    for name, value in values.items():
        page.fill(f"#{name}", str(value))
    page.keyboard.press("Alt+s")


def say(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.keyboard.press("Enter")


def answers(page: Any) -> Any:
    return page.locator(".message.assistant")


def pretend(page: Any, text: str, reasoning: str = "") -> None:
    """Let the model say this."""
    events = [{"choices": [{"index": 0, "delta": {"reasoning_content": reasoning}}]}] if reasoning else []
    events += [
        {"choices": [{"index": 0, "delta": {"content": text[i : i + 7]}}]} for i in range(0, len(text), 7)
    ]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream")
    )


def test_a_conversation(open_page: Callable[..., Any], site: Live) -> None:
    page = open_page()
    set_up(page, max_tokens=30, temperature=0, system="Speak as Romeo.")
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Good morrow")
    body = asked.value.post_data_json
    assert body["messages"] == [
        {"role": "system", "content": "Speak as Romeo."},
        {"role": "user", "content": "Good morrow"},
    ]
    assert (body["temperature"], body["max_tokens"], body["stream"]) == (0, 30, True)
    assert "top_p" not in body
    figures = page.locator(".figures")
    playwright.expect(figures).to_contain_text("tokens/s")
    playwright.expect(figures).to_contain_text("first token after")
    first = answers(page).locator(".text").inner_text()
    assert first.strip()

    say(page, "And again")
    playwright.expect(page.locator(".figures")).to_have_count(2)
    assert page.locator(".message").count() == 4

    page.get_by_role("button", name="Regenerate").click()
    playwright.expect(page.locator(".figures")).to_have_count(2)
    assert page.locator(".message").count() == 4

    page.reload()  # everything is still there
    assert page.locator(".message").count() == 4
    assert answers(page).first.locator(".text").inner_text() == first
    assert page.input_value("#system") == "Speak as Romeo."


FOR_EVER = """
    const real = window.fetch;
    window.fetch = (url, options) => real(url, options?.body
        ? { ...options, body: JSON.stringify({ ...JSON.parse(options.body), ignore_eos: true }) } : options);
"""
"""Lets the model go on behind the end of its text."""


@pytest.mark.usefixtures("slow_steps")  # or the text is at its end before it is stopped
def test_stop(open_page: Callable[..., Any], site: Live) -> None:
    page = open_page(script=FOR_EVER)
    set_up(page, temperature=1)
    say(page, "Go on for ever")
    playwright.expect(answers(page).locator(".text")).not_to_be_empty()
    page.keyboard.press("Escape")
    playwright.expect(page.locator(".figures")).to_contain_text("stopped")
    site.assert_idle()
    playwright.expect(page.locator("#send")).to_be_visible()
    assert page.evaluate("document.activeElement.id") == "input"


def test_several_conversations(open_page: Callable[..., Any]) -> None:
    page = open_page()
    set_up(page, max_tokens=3)
    for number, text in enumerate(("first talk", "second talk"), start=1):
        page.keyboard.press("Alt+n")
        say(page, text)
        playwright.expect(page.locator(".figures")).to_have_count(1)
        assert page.locator("#conversations li").count() == number
    page.get_by_role("button", name="first talk", exact=True).click()
    playwright.expect(page.locator(".message.user .text")).to_have_text("first talk")
    page.get_by_role("button", name="Delete second talk").click()
    assert page.locator("#conversations li").count() == 1
    page.get_by_role("button", name="Edit").click()
    assert page.input_value("#input") == "first talk"
    assert page.locator(".message").count() == 0


MARKDOWN = """# Title

Some *emphasis*, **strength**, `code` and [a link](https://example.com/x).

- one
- two
  1. inner

> quoted

| a | b |
| --- | --- |
| 1 | 2 |

```python
print("<b>")
```
"""


def test_markdown(open_page: Callable[..., Any]) -> None:
    page = open_page()
    pretend(page, MARKDOWN, reasoning="I *think*")
    say(page, "x")
    text = answers(page).locator(".text")
    playwright.expect(text.locator("pre code")).to_have_text('print("<b>")')
    assert text.locator("h1").inner_text() == "Title"
    assert text.locator("em").inner_text() == "emphasis"
    assert text.locator("strong").inner_text() == "strength"
    assert text.locator("ul > li").count() == 2
    assert text.locator("ul ol > li").inner_text() == "inner"
    assert text.locator("blockquote").inner_text() == "quoted"
    assert text.locator("td").all_inner_texts() == ["1", "2"]
    link = text.locator("a")
    assert link.get_attribute("href") == "https://example.com/x"
    assert "noopener" in (link.get_attribute("rel") or "")
    thought = answers(page).locator("details")
    thought.locator("summary").click()
    assert thought.locator("em").inner_text() == "think"


HOSTILE = [
    "<img src=x onerror=\"document.title='broken'\">",
    "<script>document.title='broken'</script>",
    "[x](javascript:document.title='broken')",
    "[x](JaVaScRiPt:document.title='broken')",
    "[x](data:text/html,<script>1</script>)",
    "![x](https://example.com/track.png)",
    "`<svg onload=alert(1)>`",
    "```\n</code></pre><script>document.title='broken'</script>\n```",
    "| <img src=x onerror=alert(1)> | b |\n| --- | --- |\n| <script>alert(1)</script> | 2 |",
    '[<img src=x onerror=alert(1)>](https://example.com/"onmouseover="alert(1))',
    "# <iframe src='javascript:alert(1)'></iframe>",
    "https://example.com/\"><script>document.title='broken'</script>",
]


def test_what_a_model_writes_cannot_run(open_page: Callable[..., Any]) -> None:
    page = open_page()
    fetched: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    page.on("dialog", lambda dialog: fetched.append("dialog"))
    for text in HOSTILE:
        page.keyboard.press("Alt+n")
        pretend(page, text + "\n\nthe end", reasoning=text)
        say(page, text)
        playwright.expect(answers(page).locator(".text")).to_contain_text("the end")
        answers(page).locator("details").evaluate("element => { element.open = true; }")
        log = page.locator("#log")
        assert log.locator("img, script, iframe, svg, object, embed, style").count() == 0
        protocols = log.locator("a").evaluate_all("links => links.map((link) => link.protocol)")
        assert set(protocols) <= {"https:", "http:"}
        handlers = "all => all.some((e) => [...e.attributes].some((a) => a.name.startsWith('on')))"
        assert not log.locator("*").evaluate_all(handlers)
    page.wait_for_timeout(100)
    assert page.title() == "KuiperLLM"
    assert not [url for url in fetched if "example.com" in url or url == "dialog"]


def test_a_great_deal_of_markdown_takes_little_time(open_page: Callable[..., Any]) -> None:
    page = open_page()
    for text in (
        "**a " * 5000,
        "[" * 10_000,
        "`" * 10_000,
        "> " * 2000 + "x",
        "- " * 500,
        "*_" * 5000,
        "|" * 5000,
    ):
        took = page.evaluate(
            """async (text) => {
                const { render } = await import("/static/markdown.js");
                const started = performance.now();
                render(text);
                return performance.now() - started;
            }""",
            text,
        )
        assert took < 2000, text[:20]


def test_errors_are_shown(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=503, json={"error": {"message": "try later", "type": "x"}}),
    )
    say(page, "x")
    playwright.expect(page.locator(".error")).to_have_text("try later")


def test_a_key_is_asked_for_and_used(
    open_page: Callable[..., Any], browser: Any, start: Callable[..., Live]
) -> None:
    server = start(api_keys=("secret",))
    context = browser.new_context(viewport=DESK)
    page = context.new_page()
    page.goto(server.url)
    playwright.expect(page.locator("#status")).to_contain_text("API key")
    set_up(page, key="secret", max_tokens=3)
    playwright.expect(page.locator("#model")).to_have_text("tiny")
    say(page, "x")
    playwright.expect(page.locator(".figures")).to_have_count(1)
    context.close()


def test_a_model_without_a_chat_template(browser: Any, start: Callable[..., Live]) -> None:
    server = start(llm=AsyncLLM(None, max_num_seqs=2))
    context = browser.new_context(viewport=DESK)
    page = context.new_page()
    page.goto(server.url)
    playwright.expect(page.locator(".empty")).to_contain_text("goes on with the text")
    set_up(page, max_tokens=8, temperature=0)
    say(page, "ROMEO:")
    playwright.expect(page.locator(".figures")).to_have_count(1)
    assert answers(page).locator(".text").inner_text().strip()
    context.close()


def test_a_phone(open_page: Callable[..., Any]) -> None:
    page = open_page(viewport=PHONE, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    playwright.expect(page.locator("#sidebar")).to_be_hidden()
    page.locator("#menu").tap()
    playwright.expect(page.locator("#sidebar")).to_be_visible()
    page.locator("#new").tap()
    playwright.expect(page.locator("#sidebar")).to_be_hidden()
    page.locator("#show-settings").tap()
    page.fill("#max_tokens", "4")
    page.locator("#show-settings").tap()
    page.fill("#input", "long " * 60)
    page.locator("#send").tap()
    playwright.expect(page.locator(".figures")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_light_and_dark(open_page: Callable[..., Any]) -> None:
    def back(page: Any) -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page = open_page(color_scheme="dark")
    dark = back(page)
    page.locator("#theme").click()
    assert back(page) != dark
    page.reload()
    assert back(page) != dark  # what was chosen stays
    assert back(open_page(color_scheme="light")) != dark


def test_without_a_mouse(open_page: Callable[..., Any]) -> None:
    page = open_page()
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#input") == "one\ntwo"
    unnamed = "all => all.filter((e) => !(e.textContent.trim() || e.getAttribute('aria-label'))).length"
    assert page.locator("button").evaluate_all(unnamed) == 0
    assert page.locator("#settings input").evaluate_all("all => all.every((e) => e.labels.length)")
    reached = set()
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"send", "new", "theme"} <= reached


def test_only_our_own_server_is_asked(browser: Any, site: Live) -> None:
    context = browser.new_context(viewport=DESK)
    page = context.new_page()
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    response = page.goto(site.url)
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page.wait_for_selector("#model:not(:empty)")
    assert urls
    assert all(url.startswith(site.url) for url in urls)
    context.close()


def test_files_are_not_large() -> None:
    from kuiperllm.server import pages

    folder = Path(pages.__file__).parent / "static"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 64 << 10
