"""The app as ``arsd app`` serves it, and windows of a headless Chromium that visit it."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Locator, Request, expect, sync_playwright

CHROMIUM = Path(os.environ.get("ARSD_CHROMIUM", "/usr/bin/chromium"))
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 1000}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2}
PHONE |= {"is_mobile": True, "has_touch": True}
LOADED, RUN = 120.0, 90.0  # seconds that a start, and a run, may take on a busy machine
WATCH = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) {
    const moved = entry.sources.map((one) => one.node && (one.node.className || one.node.nodeName));
    window.shifts.push([entry.value, String(moved)]);
  }
}).observe({type: 'layout-shift', buffered: true});
"""
LAST = {
    "Race": r"^(identical|differs|cut short|stopped)",
    "Explore": "per pass and picture",
    "Video": "of it for the prompt",
}
LAST |= {"Verify": "^(verified|refuted|unknown)"}
WORDS = "Strategy in words (this is what runs)"
SIZES = """(all) => Promise.all(all.map(async (one) => {
  await one.decode().catch(() => {});
  return [one.naturalWidth, one.naturalHeight];
}))"""
SAID = """() => {
  window.said = [];
  setInterval(() => {
    const words = document.querySelector('.arsd-said').textContent;
    if (words !== window.said.at(-1)) window.said.push(words);
  }, 20);
}"""
BYTES = "async (one) => Array.from(new Uint8Array(await (await fetch(one.src)).arrayBuffer()))"
BUTTONS = {"Race": "Race", "Explore": "Draw", "Video": "Describe", "Verify": "Verify"}


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of ``arsd app`` with the models that are shipped; afterwards it has ended well and left no file."""
    log, temporary = folder / "log", folder / "temporary"
    temporary.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "arsd", "app", "--port", str(port), "--dtype", "float32"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child would go on ignoring what is ignored here
    try:
        with log.open("w") as out:
            environment = {**os.environ, "TMPDIR": str(temporary), "OMP_WAIT_POLICY": "PASSIVE"}
            process = subprocess.Popen(words, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield _address(process, log)
        process.send_signal(signal.SIGINT)
        status = process.wait(30)
    finally:
        process.kill()
        process.wait()
    said = log.read_text()
    assert status == 130, said
    assert "Traceback" not in said, said
    left = [str(path.relative_to(temporary)) for path in temporary.rglob("*")]
    assert not [name for name in left if name.startswith("arsd") or (temporary / name).is_file()], left


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + LOADED
    while time.monotonic() < until:
        if found := re.search(r"^arsd app: (http\S+)", log.read_text(), re.MULTILINE):
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"not served after {LOADED} s: {log.read_text()}")


@contextmanager
def launched() -> Iterator[Browser]:
    """A browser without windows."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def loaded(images: Locator) -> list[tuple[int, int]]:
    """Widths and heights of pictures, as they are in their files; 0 for what cannot be shown."""
    expect(images.first).to_be_visible()
    return [(width, height) for width, height in images.evaluate_all(SIZES)]


def _few_colours(image: Image.Image) -> Image.Image:
    """A picture of 256 colours: those of most of the page as they are, and enough that no colour of a token is lost."""
    common = [value for _, colour in sorted(image.getcolors(2**24), reverse=True)[:16] for value in colour]
    spread = image.quantize(240, Image.Quantize.MAXCOVERAGE, 3).getpalette()
    palette = Image.new("P", (1, 1))
    palette.putpalette(common + spread[: 3 * 240])
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


class Visit:
    """A window of its own on the app.

    Attributes:
        page: what it shows.
        troubles: errors of scripts and of the console, and requests to other machines.

    Args:
        chromium: the browser.
        url: of the app.
        phone: as small as one, with its touch screen.
        dark: in dark colours.
    """

    def __init__(self, chromium: Browser, url: str, phone: bool = False, dark: bool = False) -> None:
        self.url = url
        self.troubles: list[str] = []
        self.window = chromium.new_context(**(PHONE if phone else DESKTOP))
        self.window.add_init_script(WATCH)
        self.window.on("request", self._asked)
        self.window.on("console", self._told)
        self.page = self.window.new_page()
        self.page.on("pageerror", lambda error: self.troubles.append(f"page error: {error}"))
        self.page.on("websocket", lambda socket: self.troubles.append(f"web socket: {socket.url}"))
        self.page.goto(f"{url}?__theme={'dark' if dark else 'light'}")
        self.page.get_by_text("Press Race.").wait_for(timeout=30_000)

    def _asked(self, request: Request) -> None:
        asked = urlsplit(request.url)
        if asked.scheme not in ("data", "blob") and asked.netloc != urlsplit(self.url).netloc:
            self.troubles.append(f"request: {request.url}")

    def _told(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.troubles.append(f"console: {message.text}")

    @property
    def panel(self) -> Locator:
        """The tab that is open."""
        return self.page.get_by_role("tabpanel")

    @property
    def notice(self) -> Locator:
        """The line in which the open tab says how a run goes."""
        return self.panel.locator(".arsd-notice").last

    def tab(self, name: str) -> Locator:
        """Open a tab, and forget what moved so far."""
        one = self.page.get_by_role("tab", name=name, exact=True)
        if not one.is_visible():  # a narrow window has a menu for those that do not fit
            self.page.locator(".overflow-menu > button").click()
            one = self.page.locator(".overflow-dropdown").get_by_text(name, exact=True)
        one.click()
        self.panel.locator(".arsd-intro, .arsd-notice, .arsd-scatter").first.wait_for()
        self.page.evaluate("window.shifts = []")
        return self.panel

    def press(self, name: str) -> None:
        """Press a button of the open tab; a line of an earlier run no longer counts."""
        self.notice.evaluate("line => { line.dataset.old = 1; }")
        self.panel.get_by_role("button", name=name, exact=True).click()

    def ended(self, tab: str) -> str:
        """The line that ends the run of a tab, once it is there."""
        line = self.panel.locator(".arsd-notice:not([data-old])").last
        expect(line).to_contain_text(re.compile(LAST[tab]), timeout=RUN * 1000)
        return line.inner_text()

    def run(self, tab: str) -> str:
        """Start a run of the open tab; returns the line that ends it."""
        self.press(BUTTONS[tab])
        return self.ended(tab)

    def draw_pictures(self, count: int) -> None:
        """Set how many pictures Explore, which is open, draws."""
        self.panel.get_by_label("number input for Pictures").fill(str(count))

    def occupy(self) -> None:
        """Have the model draw for a long time."""
        self.tab("Explore").get_by_label(WORDS).fill("ar")
        self.draw_pictures(16)
        self.press("Draw")
        expect(self.notice).to_contain_text("of 4096 tokens", timeout=RUN * 1000)

    def save(self, folder: Path) -> Path:
        """Draw a picture in Explore, and save it by its link."""
        self.tab("Explore")
        self.draw_pictures(1)
        self.run("Explore")
        with self.page.expect_download() as download:
            self.panel.locator(".arsd-save").click()
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path

    def give(self, path: Path) -> None:
        """Give the open tab a file, in place of the one that it has."""
        clear = self.panel.locator(".icon-button-wrapper").get_by_label("Clear", exact=True)
        if clear.is_visible():
            clear.click()
        field = self.panel.locator("input[type=file]")
        field.wait_for(state="attached")
        self.notice.evaluate("line => { line.dataset.old = 1; }")
        field.set_input_files(path)

    def figures(self, side: int) -> dict[str, str]:
        """The counters of one side of a race."""
        pane = self.panel.locator(".arsd-pane").nth(side)
        return dict(zip(pane.locator("dt").all_inner_texts(), pane.locator("dd").all_inner_texts(), strict=True))

    def pictures(self) -> list[list[int]]:
        """The bytes of all pictures of a race: both sides, and both files of the slider."""
        images = self.panel.locator(".arsd-pane .arsd-frame, .arsd-slider img")
        expect(images).to_have_count(4)
        return [images.nth(i).evaluate(BYTES) for i in range(4)]

    def moved(self) -> float:
        """How far things moved by themselves since the tab was opened: cumulative layout shift."""
        self.page.wait_for_timeout(300)  # what the last lines moved is reported a little later
        shifts = self.page.evaluate("window.shifts")
        total = float(sum(value for value, _ in shifts))
        if total:
            print("moved:", *sorted(shifts, reverse=True)[:5])
        return total

    def toast(self) -> str:
        """The only toast, which is put away."""
        toasts = self.page.get_by_test_id("toast-text")
        toasts.first.wait_for()
        self.page.wait_for_timeout(500)
        assert toasts.count() == 1, toasts.all_inner_texts()
        words = toasts.inner_text()
        self.page.get_by_test_id("toast-close").click()
        expect(toasts).to_have_count(0)
        return words

    def listen(self) -> None:
        """Keep in ``window.said`` whatever the answer of the tab Video is from now on."""
        self.page.evaluate(SAID)

    def fits(self) -> bool:
        """Whether nothing is wider than a phone; the window itself would grow with what is."""
        return bool(self.page.evaluate("document.scrollingElement.scrollWidth") <= PHONE["viewport"]["width"] + 1)

    def opacity(self, selector: str) -> float:
        """Of the first element that is found anywhere on the page."""
        return float(self.page.evaluate("one => getComputedStyle(document.querySelector(one)).opacity", selector))

    def waiting(self) -> int:
        """Runs in the queue of the server."""
        return int(self.page.request.get(f"{self.url}gradio_api/queue/status").json()["queue_size"])

    def shoot(self, name: str) -> None:
        """Keep a picture of the whole page, if the environment variable ARSD_SHOTS names a folder for them."""
        if not (folder := os.environ.get("ARSD_SHOTS")):
            return
        self.page.mouse.move(0, 0)
        self.page.wait_for_timeout(500)
        image = Image.open(io.BytesIO(self.page.screenshot(full_page=True))).convert("RGB")
        Path(folder).mkdir(parents=True, exist_ok=True)
        _few_colours(image).save(Path(folder) / f"{name}.png", optimize=True)
