"""The page in a real browser, and the service under requests made from its own description: long tests.

They need a chromium (Debian: apt-get install chromium) and the extra `soak`.
"""

import shutil
import socket
import threading
import time

import pytest

from evaclip.encoder import load_encoder
from evaclip.search.index import open_index
from evaclip.search.service import Limits, create_app
from tests.search.conftest import picture

pytestmark = pytest.mark.soak
TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def address(searchable, model):
    """A server of the page in a thread, with a token."""
    import uvicorn

    app = create_app(open_index(searchable), load_encoder(model), Limits(), TOKEN, ("127.0.0.1",))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture
def page(address):
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "there is no chromium here: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        opened = browser.new_page()
        wrong: list[str] = []
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.on("requestfailed", lambda request: wrong.append(request.url))
        opened.on("request", lambda request: None if request.url.startswith((address, "blob:", "data:"))
                  else wrong.append(request.url))  # fmt: skip
        opened.goto(f"{address}#token={TOKEN}")
        yield opened
        assert wrong == []
        browser.close()


def until(page, expression):
    """Wait for an expression to be true on the page; the page's own rules forbid waiting inside of it."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {expression}; the page says {page.text_content('#status')!r}")


def says(page, words):
    until(page, f"document.getElementById('status').textContent.includes({words!r})")


def settled(page, count=12):
    """The grid's rows, when all its pictures have come."""
    says(page, "results in")
    seen = "[...document.querySelectorAll('#grid img')]"
    until(page, f"{seen}.length === {count} && {seen}.every(one => one.complete && one.naturalWidth > 0)")
    return [int(figure.get_attribute("data-row")) for figure in page.query_selector_all("#grid figure")]


def test_typing_shows_a_grid_and_more_like_this_leads_on(page):
    page.fill("#text", "some words")
    page.press("#text", "Enter")
    rows = settled(page)
    assert sorted(rows) == list(range(12))
    assert page.text_content("#grid figure:first-child .key").endswith(".png")
    assert "<b>number</b>" in page.get_attribute("#grid figure:first-child img", "alt")  # as text, never as markup
    assert page.query_selector("#grid b") is None
    page.evaluate("document.getElementById('status').textContent = ''")
    page.click("#grid figure:nth-child(5) .like")
    again = settled(page)
    assert again[0] == rows[4] and page.input_value("#text") == ""


def test_the_unwanted_changes_the_order(page):
    page.fill("#text", "some words")
    page.press("#text", "Enter")
    before = settled(page)
    page.evaluate("document.getElementById('status').textContent = ''")
    page.fill("#without", "noise")
    page.press("#without", "Enter")
    assert settled(page) != before


def test_choosing_and_dropping_an_image(page, tmp_path):
    picture(7).save(tmp_path / "seven.png")
    page.set_input_files("#file", str(tmp_path / "seven.png"))
    assert settled(page)[0] == 7
    assert page.is_visible("#preview") and page.text_content("#name") == "seven.png"
    page.click("#clear")
    assert not page.is_visible("#chosen")
    page.evaluate("document.getElementById('status').textContent = ''")
    dropped = page.evaluate_handle(
        "bytes => { const held = new DataTransfer();"
        " held.items.add(new File([new Uint8Array(bytes)], 'nine.png', {type: 'image/png'})); return held }",
        list(saved(9, tmp_path)),
    )
    page.dispatch_event("body", "drop", {"dataTransfer": dropped})
    assert settled(page)[0] == 9


def saved(number, folder):
    picture(number).save(folder / "x.png")
    return (folder / "x.png").read_bytes()


def test_what_goes_wrong_is_said_on_the_page(page, address, tmp_path):
    page.click("button:has-text('Search')")
    assert "type something" in page.text_content("#status")
    (tmp_path / "no.png").write_bytes(b"no image at all")
    page.set_input_files("#file", str(tmp_path / "no.png"))
    says(page, "no JPEG, PNG or WebP")
    page.goto("about:blank")
    page.goto(f"{address}#token=wrong")
    page.fill("#text", "some words")
    page.press("#text", "Enter")
    says(page, "a token is needed")


def test_requests_made_from_the_description(searchable, model):
    """Every answer has a status, a type and a form that the description promises; nothing makes the service fail."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    app = create_app(open_index(searchable), load_encoder(model), Limits(), TOKEN, None)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    statuses = set()

    def asked(case):
        # That a string is an image, and which rows there are, cannot be said in a schema.
        answer = case.call_and_validate(
            headers={"Authorization": f"Bearer {TOKEN}"}, excluded_checks=[positive_data_acceptance]
        )
        statuses.add((case.path, answer.status_code))

    for operation in (found.ok() for found in schema.get_all_operations()):
        for mode in GenerationMode:
            if mode.is_negative and operation.path == "/healthz":
                continue  # it takes nothing that could be wrong
            cases = operation.as_strategy(generation_mode=mode)
            settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))(
                given(case=cases)(asked)
            )()
    assert {path for path, _ in statuses} == {"/search", "/embed", "/thumbnail/{row}", "/healthz"}
    assert {("/search", 200), ("/search", 422), ("/embed", 200), ("/thumbnail/{row}", 404)} <= statuses
