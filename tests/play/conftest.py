"""The page, built once and opened in Debian's chromium without a network."""

from __future__ import annotations

import pytest

from fusecell.play import page, train_models


@pytest.fixture(scope="session")
def models():
    """Models after a few updates, by task and kind: all that is compared needs no good ones."""
    return {(model.task, model.kind): model for model in train_models(updates=20)}


@pytest.fixture(scope="session")
def path(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "play.html"
    path.write_text(page(list(models.values())), encoding="utf-8")
    return path


@pytest.fixture
def visit(browser, path):
    """Return a function that opens the page offline; a console message, or asking for anything, fails the test."""
    contexts, messages = [], []

    def open_page(path=path, **options):
        context = browser.new_context(**{"locale": "en-GB", "viewport": {"width": 1200, "height": 900}, **options})
        context.set_offline(True)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))

        def on_request(request):
            if request.url != f"file://{path}" and not request.url.startswith("data:"):
                messages.append(f"asked for {request.url}")

        tab.on("request", on_request)
        tab.goto(f"file://{path}")
        tab.wait_for_selector("html[data-ready]", state="attached")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert messages == []
