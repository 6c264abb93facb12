"""The page of the fidelity report in a real browser: it runs without errors, fetches nothing, and its controls work.

Needs Chromium (Debian: apt-get install chromium), which `.ci/run` installs where it may.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import gnswap
from gnswap._report.write import PAGE
from tests._models import randomise_norms, small_cnn

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

# Clicks through the page and writes what it saw into the document.
PROBE = """
<script>
const seen = {};
const layer = () => document.getElementById("channels").firstChild.getAttribute("aria-label");
const ground = () => getComputedStyle(document.body).backgroundColor;
const button = document.getElementById("theme");
seen.start = layer();
document.getElementById("after").click();
seen.next = layer();
document.querySelector('.column[data-layer="0"]').dispatchEvent(new MouseEvent("click", {bubbles: true}));
seen.column = layer();
const first = ground(), named = button.textContent;
button.click();
seen.changed = first !== ground() && named !== button.textContent;
seen.theme = document.documentElement.dataset.theme;
seen.hash = location.hash;
button.click();
seen.back = first === ground();
seen.wide = document.documentElement.scrollWidth <= innerWidth;
const shown = (svg) => svg.getBoundingClientRect().width > 0;
seen.charts = [...document.querySelectorAll(".narrow svg")].filter(shown).length;
seen.photos = [...document.querySelectorAll(".worst img")].filter((image) => image.naturalWidth > 0).length;
document.title = "probe " + JSON.stringify(seen);
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    net, photos = randomise_norms(small_cnn()).eval(), [torch.randn(10, 3, 12, 12)]
    plan = gnswap.plan(net, groups=4).edit("1", channel_order=tuple(reversed(range(16))), signs=(1, -1) * 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gnswap._report.write.figures", lambda _report: {})
        gnswap.report(net, gnswap.apply(net, plan), photos, directory=folder, class_names=["<b>", "b", "c", "d", "e"])
    return (folder / PAGE).read_text()


def browse(text: str, folder: Path, address: str = "", width: int = 500) -> tuple[str, list[str]]:
    """The document after its scripts have run, and what the browser's console had to say."""
    assert CHROMIUM is not None
    path = folder / "page.html"
    path.write_text(text)
    done = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=2000",
            f"--window-size={width},900", "--dump-dom", f"file://{path}{address}",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r"CONSOLE[:(]\d+\)?\] (.*)", done.stderr)


def test_the_address_chooses_layer_and_theme(page: str, tmp_path: Path) -> None:
    document, said = browse(page, tmp_path, "#layer=1&theme=dark")
    assert said == []
    assert '<html lang="en" data-theme="dark">' in document
    assert "☀ light" in document
    assert 'aria-label="Channels of 4 and their groups"' in document
    assert "24 channels, 4 groups" in document
    assert all('data-layer="1"' in column for column in re.findall(r'<rect[^>]* class="column chosen"[^>]*>', document))
    assert document.count('class="column chosen"') >= 4
    assert "&lt;b&gt;" in document


def test_the_controls_work(page: str, tmp_path: Path) -> None:
    document, said = browse(page.replace("</body>", f"{PROBE}</body>"), tmp_path, "#theme=light")
    assert said == []
    found = re.search(r"<title>probe (.*?)</title>", document)
    assert found is not None, "the probe did not run to its end"
    for expected in (
        '"start":"Channels of 1 and their groups"',
        '"next":"Channels of 4 and their groups"',
        '"column":"Channels of 1 and their groups"',
        '"changed":true',
        '"theme":"dark"',
        '"hash":"#theme=dark&amp;layer=0"',
        '"back":true',
        '"wide":true',
        '"charts":7',
        '"photos":10',
    ):
        assert expected in found[1]


def test_requests_and_errors_would_be_seen(page: str, tmp_path: Path) -> None:
    bad = '<img src="https://example.com/a.png"><script>undefined.nothing</script></body>'
    _, said = browse(page.replace("</body>", bad), tmp_path)
    assert any("violates the following Content Security Policy" in line for line in said)
    assert any("Cannot read properties of undefined" in line for line in said)
