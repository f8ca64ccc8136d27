"""The app in a real browser: what a visitor sees and does, on the models that are shipped."""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

from app_browser import CHROMIUM, RUN, WORDS, Visit, launched, loaded, served  # noqa: E402

from arsd.provenance import png_bytes, read_record  # noqa: E402

pytestmark = pytest.mark.slow
expect = playwright.expect

TABS = ("Race", "Explore", "Frontier", "Video", "Verify")
HOSTILE = "<img src=x onerror=window.hacked=1>"
STEADY = 0.1  # cumulative layout shift that a visitor does not mind
Visiting = Callable[..., Visit]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if not CHROMIUM.is_file():
        missing = pytest.fail if os.environ.get("ARSD_BROWSER") == "required" else pytest.skip
        missing(f"there is no browser at {CHROMIUM}: name one in ARSD_CHROMIUM")
    with launched() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def url(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("app")) as url:
        yield url


@pytest.fixture
def visiting(chromium: Any, url: str) -> Iterator[Visiting]:
    """Opens windows, in none of which an error or a request to another machine may have happened at the end."""
    visits: list[Visit] = []

    def visit(**options: bool) -> Visit:
        visits.append(Visit(chromium, url, **options))
        return visits[-1]

    yield visit
    for one in visits:
        one.window.close()
    assert [trouble for one in visits for trouble in one.troubles] == []


# ----------------------------------------------------------------------------------------------------------- the tabs


def test_race_draws_the_same_picture_twice(visiting: Visiting) -> None:
    visit = visiting()
    panel = visit.tab("Race")
    assert visit.run("Race").startswith("identical: all 256 tokens are the same")
    assert visit.figures(0)["passes"] == "256" and visit.figures(0)["tokens per pass"] == "1.00"
    assert 0 < int(visit.figures(1)["passes"]) < 128
    assert [visit.figures(side)["tokens"].replace(" ", "") for side in range(2)] == ["256/256"] * 2
    expect(panel.locator(".arsd-slider img")).to_have_count(2)
    assert loaded(panel.locator(".arsd-slider img")) == [(128, 128)] * 2
    assert panel.locator(".arsd-plot path").count() == 2
    assert panel.locator(".arsd-plot li").all_inner_texts() == ["Plain AR", "sjd"]
    assert visit.moved() < STEADY
    visit.shoot("race-desktop-light")


def test_explore_draws_four_pictures_that_can_be_saved(visiting: Visiting) -> None:
    visit = visiting()
    panel = visit.tab("Explore")
    visit.run("Explore")
    captions = panel.locator(".arsd-figure figcaption").all_inner_texts()
    assert [re.match(r"seed (\d+) \d+ passes, [\d.]+ tokens per pass", one)[1] for one in captions] == ["7", "8", "9", "10"]
    assert loaded(panel.locator(".arsd-figure .arsd-frame")) == [(128, 128)] * 4
    names = panel.locator(".arsd-save").evaluate_all("all => all.map((one) => one.download)")
    assert names == [f"red-apple-seed{seed}.png" for seed in range(7, 11)]
    assert visit.moved() < STEADY
    visit.shoot("explore-desktop-light")


def test_frontier_shows_what_was_measured(visiting: Visiting) -> None:
    visit = visiting()
    panel = visit.tab("Frontier")
    expect(panel.locator(".arsd-point").first).to_be_visible()
    assert panel.locator(".arsd-point").count() >= 20
    assert visit.moved() < STEADY
    visit.shoot("frontier-desktop-light")


def test_video_text_comes_as_it_is_decoded_in_the_colours_of_who_proposed_it(visiting: Visiting) -> None:
    visit = visiting()
    panel = visit.tab("Video")
    visit.listen()
    visit.run("Video")
    text = panel.locator(".arsd-said").text_content()
    seen = [words for words in visit.page.evaluate("window.said") if words.strip("\N{HORIZONTAL ELLIPSIS}")]
    assert len(seen) > 2 and all(text.startswith(words) for words in seen)
    marks = panel.locator(".arsd-said span[class^=arsd-o]")
    assert len(set(marks.evaluate_all("all => all.map((one) => getComputedStyle(one).borderBottomColor)"))) >= 2
    assert visit.moved() < STEADY
    visit.shoot("video-desktop-light")


def test_verify_tells_pictures_of_arsd_from_others(visiting: Visiting, tmp_path: Path) -> None:
    visit = visiting(dark=True)
    genuine = visit.save(tmp_path)
    image, record = read_record(genuine)
    image.putpixel((5, 5), tuple(255 - value for value in image.getpixel((5, 5))))
    (tmp_path / "tampered.png").write_bytes(png_bytes(image, record))
    Image.new("RGB", (128, 128), "teal").save(tmp_path / "plain.png")
    panel = visit.tab("Verify")
    found = {}
    for name in ("tampered.png", "plain.png", genuine.name):
        visit.give(tmp_path / name)
        found[name] = visit.ended("Verify").partition(":")[0]
        assert loaded(panel.locator(".arsd-thumb img")) == [(128, 128)]
    assert found == {"tampered.png": "refuted", "plain.png": "unknown", genuine.name: "verified"}
    expect(panel.locator(".arsd-facts td").first).to_have_text(genuine.name)
    assert visit.moved() < STEADY
    visit.shoot("verify-desktop-dark")


# ----------------------------------------------------------------------------------------------- overlays and pointer


def test_overlays_lie_over_the_pictures_of_their_own_tab(visiting: Visiting) -> None:
    visit = visiting(dark=True)
    panel = visit.tab("Explore")
    visit.draw_pictures(1)
    visit.run("Explore")
    panel.get_by_label("in which pass").check()
    layers = {name: f"{name} .arsd-%s" for name in ("#arsd-race", "#arsd-explore")}
    expect(panel.locator("#arsd-explore .arsd-when").first).to_have_css("opacity", "0.62")
    assert visit.opacity(layers["#arsd-explore"] % "how") == 0
    panel = visit.tab("Race")
    visit.run("Race")
    assert [visit.opacity(layers["#arsd-race"] % name) for name in ("how", "when")] == [0, 0]
    panel.get_by_label("how tokens came").check()
    for side in range(2):
        expect(panel.locator("#arsd-race .arsd-how").nth(side)).to_have_css("opacity", "0.62")
    visit.shoot("race-desktop-dark")
    panel.get_by_label("picture", exact=True).check()
    expect(panel.locator("#arsd-race .arsd-how").first).to_have_css("opacity", "0")
    visit.tab("Explore")
    assert [visit.opacity(layers["#arsd-explore"] % name) for name in ("how", "when")] == [0, 0.62]


def test_the_pointer_tells_how_a_token_came(visiting: Visiting) -> None:
    visit = visiting()
    panel = visit.tab("Explore")
    visit.draw_pictures(2)
    visit.run("Explore")
    canvas = panel.locator("#arsd-explore .arsd-canvas").nth(1)
    canvas.scroll_into_view_if_needed()
    told, box = json.loads(canvas.get_attribute("data-tokens") or ""), canvas.bounding_box()
    assert told["columns"] == 16 and len(told["kinds"]) == 256 and box
    tip = canvas.locator(".arsd-tip")
    ways = {0: "accepted guess", 1: "resampled: the guess was refused", 2: "the model's own, without a guess"}
    for row, column in ((0, 0), (2, 4), (15, 15)):
        visit.page.mouse.move(box["x"] + (column + 0.5) * box["width"] / 16, box["y"] + (row + 0.5) * box["height"] / 16)
        at = row * 16 + column
        way, when = ways[told["kinds"][at]], told["when"][at] + 1
        expect(tip).to_have_text(f"row {row + 1}, column {column + 1}: {way}, pass {when}")
        expect(tip).to_have_css("opacity", "1")
    visit.page.mouse.move(0, 0)
    expect(tip).to_have_css("opacity", "0")


# ------------------------------------------------------------------------------------------------------- stop and queue


def test_a_race_that_is_stopped_ends_soon_and_keeps_its_picture(visiting: Visiting) -> None:
    visit = visiting()
    panel = visit.tab("Race")
    visit.press("Race")
    expect(panel.locator(".arsd-pane dd").first).to_have_text(re.compile(r"^\d\d+$"), timeout=RUN * 1000)
    began = time.monotonic()
    visit.press("Stop")
    line = visit.ended("Race")
    assert time.monotonic() - began < 5
    assert "cut short" in line and "stopped" in line
    visit.page.wait_for_timeout(2000)  # nothing comes after it
    expect(visit.notice).to_have_text(line)
    assert 0 < int(visit.figures(0)["passes"]) < 256
    assert loaded(panel.locator(".arsd-pane .arsd-frame")) == [(128, 128)]
    assert visit.run("Race").startswith("identical")
    assert visit.figures(0)["passes"] == "256"


def test_a_run_that_waits_says_its_place_in_the_queue_and_has_its_turn(visiting: Visiting) -> None:
    other, visit = visiting(), visiting()
    other.occupy()
    panel = visit.tab("Explore")
    visit.draw_pictures(1)
    visit.press("Draw")
    place = panel.get_by_text("queue: 1/1")
    place.wait_for()
    visit.page.wait_for_timeout(500)
    place.scroll_into_view_if_needed()
    expect(place).to_be_in_viewport(ratio=0.9)  # all of it: what a box cuts away does not count
    other.press("Stop")
    assert other.ended("Explore").startswith("stopped")
    visit.ended("Explore")
    expect(place).to_have_count(0)


def test_a_race_that_waits_is_taken_out_of_the_queue(visiting: Visiting) -> None:
    other, visit = visiting(), visiting()
    other.occupy()
    visit.tab("Race")
    visit.press("Race")
    place = visit.panel.get_by_text("queue:")
    place.wait_for()
    assert visit.waiting() == 1
    visit.press("Stop")
    expect(place).to_be_hidden(timeout=5000)
    assert visit.waiting() == 0
    other.press("Stop")
    assert other.ended("Explore").startswith("stopped")
    visit.page.wait_for_timeout(2000)
    expect(visit.notice).to_have_text("Press Race.")
    assert visit.run("Race").startswith("identical")


# ---------------------------------------------------------------------------------------------------------- bad input


def one_line(words: str) -> bool:
    return 0 < len(words) < 300 and "\n" not in words and "Error" not in words


def test_words_that_mean_nothing_are_one_clear_line_and_the_next_run_works(visiting: Visiting) -> None:
    visit = visiting()
    visit.tab("Race").get_by_label("Prompt").fill("")
    visit.press("Race")
    words = visit.toast()
    assert one_line(words) and "prompt is empty" in words
    panel = visit.tab("Explore")
    visit.draw_pictures(1)
    panel.get_by_label(WORDS).fill("nope")
    expect(panel.locator(".arsd-notice").first).to_contain_text("nope")
    visit.press("Draw")
    words = visit.toast()
    assert one_line(words) and "nope" in words
    panel.get_by_label(WORDS).fill("sjd")
    visit.run("Explore")


def test_files_that_are_something_else_are_one_clear_line_and_the_next_run_works(visiting: Visiting, tmp_path: Path) -> None:
    visit = visiting()
    genuine = visit.save(tmp_path)
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "words.txt").write_text("no clip")
    visit.tab("Verify")
    visit.give(tmp_path / "words.png")
    words = visit.toast()
    assert one_line(words) and "words.png" in words
    visit.give(genuine)
    assert visit.ended("Verify").startswith("verified")
    panel = visit.tab("Video")
    sample = panel.locator(".arsd-clip img").get_attribute("src")
    panel.locator(".icon-button-wrapper").get_by_label("Clear", exact=True).click()
    expect(panel.locator(".arsd-clip")).to_have_text("no clip")
    assert ".txt" not in (panel.locator("input[type=file]").get_attribute("accept") or "")
    panel.locator("input[type=file]").set_input_files(tmp_path / "words.txt")
    assert one_line(visit.toast())
    clip = tmp_path / "clip.gif"
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(clip, save_all=True, append_images=frames[1:])
    visit.give(clip)
    expect(panel.locator(".arsd-clip img")).not_to_have_attribute("src", sample or "")
    visit.run("Video")


def test_html_is_shown_as_text_and_never_runs(visiting: Visiting, tmp_path: Path) -> None:
    visit = visiting()
    visit.tab("Explore")
    visit.draw_pictures(1)
    visit.tab("Video").get_by_label("number input for Tokens").fill("16")
    for tab, label in (("Race", "Prompt"), ("Explore", "Prompt"), ("Explore", WORDS), ("Video", "Question")):
        panel = visit.tab(tab)
        field = panel.get_by_label(label)
        before = field.input_value()
        field.fill(HOSTILE)
        if label == WORDS:
            expect(panel.locator(".arsd-notice").first).to_contain_text(HOSTILE)
            visit.press("Draw")
            assert HOSTILE in visit.toast()
        else:
            visit.run(tab)
            panel.get_by_text("Card of this run").click()
            expect(panel.locator(".cm-content").first).to_contain_text(HOSTILE)
        field.fill(before)
    visit.tab("Verify")
    path = tmp_path / f"{HOSTILE}.png"
    Image.new("RGB", (8, 8)).save(path)
    visit.give(path)
    assert visit.ended("Verify").startswith("unknown")
    visit.page.wait_for_timeout(300)
    assert visit.page.evaluate("window.hacked") is None
    assert visit.page.locator('img[src="x"]').count() == 0


# ------------------------------------------------------------------------------------------------- seeds and strategies


def test_a_seed_is_kept_while_it_is_locked_and_drawn_anew_otherwise(visiting: Visiting) -> None:
    visit = visiting()
    panel = visit.tab("Explore")
    visit.draw_pictures(1)
    seed, caption = panel.get_by_label("Seed", exact=True), panel.locator(".arsd-figure figcaption b")
    visit.run("Explore")
    expect(seed).to_have_value("7")
    panel.get_by_label("Lock seed").uncheck()
    visit.run("Explore")
    expect(seed).not_to_have_value("7")
    fresh = seed.input_value()
    expect(caption).to_have_text(f"seed {fresh}")
    panel.get_by_label("Lock seed").check()
    visit.run("Explore")
    expect(seed).to_have_value(fresh)
    expect(caption).to_have_text(f"seed {fresh}")


def test_a_point_of_the_frontier_sets_the_knobs_of_explore(visiting: Visiting) -> None:
    visit = visiting()
    chosen = {"cool-sd:delta=5": ("cool-sd", "Delta", "5"), "sjd:window=16,coupling=maximal": ("sjd", "Window", "16")}
    for key, (decoder, (family, knob, value)) in zip(("", "Enter"), chosen.items(), strict=True):
        panel = visit.tab("Frontier")
        point = panel.locator(f'.arsd-point[data-decoder="{decoder}"]')
        if key:
            point.focus()
            visit.page.keyboard.press(key)
        else:
            point.click()
        expect(visit.notice).to_have_text(f"Explore is set to {decoder}.")
        expect(panel.locator(".arsd-point.chosen")).to_have_attribute("data-decoder", decoder)
        panel = visit.tab("Explore")
        expect(panel.get_by_label(WORDS)).to_have_value(decoder)
        expect(panel.get_by_label("Strategy", exact=True)).to_have_value(family)
        expect(panel.get_by_label(f"number input for {knob}")).to_have_value(value)
        expect(panel.get_by_label(f"number input for {knob}")).to_be_enabled()
    expect(panel.get_by_label("Coupling", exact=True)).to_have_value("maximal")
    visit.draw_pictures(1)
    visit.run("Explore")
    expect(panel.locator(".arsd-plot li")).to_contain_text("sjd:window=16,coupling=maximal")


# --------------------------------------------------------------------------------------------------------- two visitors


def test_two_visitors_at_once_get_the_pictures_that_each_gets_alone(visiting: Visiting) -> None:
    visits, alone = (visiting(), visiting()), []
    for visit, prompt in zip(visits, ("red apple", "blue heart"), strict=True):
        visit.tab("Race").get_by_label("Prompt").fill(prompt)
        assert visit.run("Race").startswith("identical")
        alone.append(visit.pictures())
    assert alone[0] != alone[1]
    for visit in visits:
        visit.press("Race")
    for visit in visits:
        assert visit.ended("Race").startswith("identical")
    assert [visit.pictures() for visit in visits] == alone


# ------------------------------------------------------------------------------------------------------------- a phone


@pytest.mark.parametrize("dark", [True, False], ids=["dark", "light"])
def test_a_phone_shows_every_tab_without_sideways_scrolling(visiting: Visiting, dark: bool) -> None:
    visit = visiting(phone=True, dark=dark)
    corner = Image.open(io.BytesIO(visit.page.screenshot())).convert("RGB").getpixel((2, 2))
    assert max(corner) < 60 if dark else min(corner) > 230
    for tab in TABS:
        panel = visit.tab(tab)
        visit.page.wait_for_timeout(300)
        assert visit.fits(), tab
        if tab != "Frontier":
            button = panel.locator("button.primary")
            expect(button).to_be_visible()
            assert (button.bounding_box() or {})["height"] >= 36
        if tab == ("Race" if dark else "Video"):
            visit.run(tab)
            visit.page.wait_for_timeout(300)
            assert visit.fits(), tab
            visit.shoot("race-phone-dark" if dark else "video-phone-light")
