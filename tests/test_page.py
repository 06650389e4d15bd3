"""The web page: what it is given, and what a person sees of it in a real browser."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from data_pipeline.errors import InputError
from data_pipeline.loader import load_all
from tests.cluster.ports import free_ports
from tests.models import write_images
from tests.test_images import encoded
from trainer.page import Explainer, PageConfig, check_port, serve

ROOT = Path(__file__).parents[1]


def test_an_explainer_takes_files_of_any_size(model):
    explainer = Explainer(model, None, 2)
    found = explainer("a.png", encoded(Image.fromarray(np.full((50, 70, 3), 9, np.uint8))))
    assert found.name == "a.png" and len(found.neighbours) == 2 and found.image.shape == (16, 16, 1)
    with pytest.raises(InputError, match="not an image file"):
        explainer("b.png", b"no image")


def test_bad_options(model, tmp_path):
    for options in ({"port": 0}, {"port": 65536}, {"neighbours": -1}):
        with pytest.raises(InputError, match=next(iter(options))):
            PageConfig(model="m", **options)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match="cannot be listened at"):
            check_port("127.0.0.1", port)
        with pytest.raises(InputError, match="name another --port"):
            serve(PageConfig(model="m", port=port), Console(quiet=True))


@pytest.fixture
def address(model, digits, tmp_path) -> Iterator[str]:
    """Of the page, served by its own command."""
    model.save(tmp_path / "model")
    (port,) = free_ports(1)
    command = [
        sys.executable, "-m", "trainer.page", "--model", str(tmp_path / "model"), "--port", str(port), "--data",
        str(digits.folder),
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    # Whoever runs tests under pytest does not want NiceGUI to look for a test of its own.
    environment.pop("PYTEST_CURRENT_TEST", None)
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log.txt").read_text()
            time.sleep(0.3)
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.browser
def test_dropped_images_are_recognised_and_explained(address, model, digits, tmp_path):
    from playwright.sync_api import sync_playwright

    images = torch.cat(
        [load_all(digits, f"test_{n}", device=torch.device("cpu")).images[:1] for n in ("known", "unknown")]
    )
    expected = model.recognise(images)
    paths = write_images(tmp_path / "pictures", images)
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    with sync_playwright() as playwright:
        # Debian's own where there is one, else Playwright's.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        errors, elsewhere = [], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "request",
            lambda r: elsewhere.append(r.url) if not r.url.startswith((address, "data:", "blob:", "ws:")) else None,
        )
        page.goto(address)
        assert f"It knows {', '.join(model.card.class_names)}." in page.inner_text("body")
        for number, path in enumerate([*paths, broken], 1):
            page.set_input_files("input[type=file]", str(path))
            page.wait_for_function(f"document.querySelectorAll('.q-card').length == {number}", timeout=30_000)
        cards = page.locator(".q-card")
        assert "broken.png: the image is not an image file" in cards.nth(0).inner_text()
        for card, row in ((cards.nth(1), 1), (cards.nth(2), 0)):  # the newest on top
            text = card.inner_text()
            assert text.startswith(expected.labels[row]) and paths[row].name in text
            assert f"score {expected.scores[row]:.3f}" in text and f"threshold {model.card.threshold:.3f}" in text
            card.locator("img").nth(6).wait_for()
            assert card.locator("img").count() == 7  # the image, its attribution, five neighbours
            widths = card.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
            assert widths == [16] * 7
        assert not errors and not elsewhere  # nothing is fetched from the Internet
        browser.close()
