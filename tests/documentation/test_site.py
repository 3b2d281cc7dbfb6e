"""The documentation's site: built strictly, and every page opened in Chromium, without a network."""

from __future__ import annotations

import http.server
import importlib.util
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

import fusecell as fc
from fusecell.play import write_page
from tests.paths import ROOT

_MODULES = ("fusecell", "fusecell.cells", "fusecell.init", "fusecell.testing", "fusecell.wrappers", "fusecell.onnx")
pytestmark = pytest.mark.pages
_RAW = re.compile(r"\\(?:begin|frac|mathrm|sigma|odot|dot)\b|\$\$")


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference():
    return script("api_reference")


def test_every_public_name_has_a_place(reference):
    places = reference.anchors()
    for name in _MODULES:
        home = importlib.import_module(name)
        names = {each for each in home.__all__ if not isinstance(getattr(home, each), type(sys))}
        assert names - set(places) == set(), name


def test_a_place_has_the_signature_the_equation_and_the_example(reference):
    page = reference.page_of("layers", reference.anchors())
    entry = page[page.index("## Recurrent") : page.index("## Bidirectional")]
    assert "fusecell.Recurrent(\n    cell: Cell | nn.RNNCellBase,\n" in entry
    assert "$$\n(y_t, s_t) = \\mathrm{step}(x_t, s_{t-1})" in entry
    assert "```pycon\n>>> import torch, fusecell as fc" in entry
    assert "- `batch_first`: input and output are (N, T, features)" in entry
    assert ":class:" not in page
    assert ".. math::" not in page


def test_docstrings_say_what_they_must(reference):
    """An example where something can be called, and a source where it is a cell of a paper."""
    missing = []
    for page in reference.PAGES:
        for module, name, value in reference.names_of(page):
            doc = value.__doc__ or ""
            is_error = isinstance(value, type) and issubclass(value, Exception | Warning)
            if callable(value) and not is_error and ">>> " not in doc:
                missing.append(f"{module}.{name} has no example")
            if (
                isinstance(value, type)
                and issubclass(value, fc.Cell)
                and module == "fusecell.cells"
                and "Paper:" not in doc
            ):
                missing.append(f"{name} names no paper")
    assert missing == []


@pytest.fixture(scope="module")
def site(tmp_path_factory, reference) -> Path:
    zensical = shutil.which("zensical") or shutil.which("zensical", path=str(Path(sys.executable).parent))
    if zensical is None:
        pytest.skip("needs zensical: pip install 'fusecell[docs]'")
    source = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "mkdocs.yml", source)
    shutil.copytree(ROOT / "docs", source / "docs", dirs_exist_ok=True)
    reference.main(str(source / "docs" / "api"))
    script("gallery").main([str(source / "docs" / "gallery"), "--updates", "0", "--steps", "20"])
    write_page(source / "docs" / "play.html", updates=0)
    built = subprocess.run([zensical, "build", "--strict"], cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return source / "site"


def pages(site: Path) -> list[str]:
    return sorted(str(page.relative_to(site).parent) for page in site.rglob("index.html"))


def test_the_gallery_has_every_cell(site):
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for entry in (*fc.CELLS, *fc.cells.STRUCTURED_CELLS):
        assert f"gallery/{entry.name}.md" in navigation
        page = (site / "gallery" / entry.name / "index.html").read_text(encoding="utf-8")
        assert "the median of ten calls" in page
        drawing = (site / "gallery" / f"{entry.name}.svg").read_text(encoding="utf-8")
        cell = entry.make(32, 64)
        for name in (*cell.inputs, *cell.states, *(f"{state}&#x27;" for state in cell.states), "output"):
            assert f">{name}</text>" in drawing, (entry.name, name)
        assert (site / "gallery" / f"{entry.name}.png").stat().st_size > 3000


def test_links_lead_somewhere(site):
    ids, dead = {}, []
    for page in site.rglob("index.html"):
        ids[page] = set(re.findall(r'\bid="([^"]+)"', page.read_text(encoding="utf-8")))
    for page in ids:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r'<a [^>]*href="([^"]+)"', text):
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link) or path.startswith("/"):
                continue
            target = (page.parent / path).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (anchor and anchor not in ids.get(target, {anchor})):
                dead.append(f"{page.relative_to(site)}: {link}")
    assert dead == []


def test_every_page_in_a_browser(site, browser):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            """Say nothing of each request."""

    problems: list[str] = []
    with http.server.ThreadingHTTPServer(("localhost", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://localhost:{server.server_port}/"
        for scheme, width in (("light", 1200), ("dark", 390)):
            context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
            tab = context.new_page()
            listen(tab, home, problems)
            # Pages that a script writes look alike: all are opened in the second setting, the stricter one.
            opened = [page for page in pages(site) if scheme == "dark" or "gallery/" not in page]
            for page in opened:
                tab.goto(f"{home}{page}/")
                problems += [f"{page} ({scheme}, {width}): {problem}" for problem in look_at(tab)]
            context.close()
        server.shutdown()
    assert problems == []


def listen(tab, home: str, problems: list[str]) -> None:
    """Note what a page writes to the console, and what it asks for that is not there or not the site's own."""

    def on_request(request) -> None:
        if not request.url.startswith((home, "data:", "blob:")):
            problems.append(f"{tab.url} asks for {request.url}")

    def on_response(response) -> None:
        if response.status >= 400:
            problems.append(f"{tab.url}: {response.status} for {response.url}")

    tab.on("console", lambda message: problems.append(f"{tab.url}: {message.type}: {message.text}"))
    tab.on("pageerror", lambda error: problems.append(f"{tab.url}: {error}"))
    tab.on("request", on_request)
    tab.on("response", on_response)


def look_at(tab) -> list[str]:
    """Look at an open page: equations set, pictures there, nothing wider than the window."""
    text = tab.locator("article").inner_text()
    problems = [f"raw equation {match[0]}" for match in _RAW.finditer(re.sub(r"`[^`]*`", "", text))][:2]
    tab.evaluate("document.querySelectorAll('img').forEach(img => img.loading = 'eager')")
    if tab.evaluate("[...document.images].some(img => img.complete && img.naturalWidth === 0)"):
        problems.append("a picture is missing")
    unset = tab.evaluate("[...document.querySelectorAll('.arithmatex')].filter(e => !e.querySelector('.katex')).length")
    if unset:
        problems.append(f"{unset} equations are not set")
    if tab.evaluate("document.querySelectorAll('.katex-error').length"):
        problems.append("KaTeX fails on an equation")
    overflow = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    if overflow > 0:
        problems.append(f"{overflow} pixels wider than the window")
    return problems
