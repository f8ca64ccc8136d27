"""The tabs of the app: what their buttons show, step by step, as the components of the page take it."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest
from app_world import LIMITS, PROMPT, running_app
from PIL import Image
from tiny_pipeline import seeded
from video_llms import clip

from arsd.app.server import forget
from arsd.app.service import STOPPED
from arsd.provenance import save_png

SJD = "sjd:window=4"

pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with running_app(tmp_path_factory.mktemp("app") / "model") as running:
        yield running


@pytest.fixture(autouse=True)
def no_pause(world):
    yield
    world.pause.seconds = 0.0


@pytest.fixture(scope="module")
def gif(tmp_path_factory):
    frames = [Image.fromarray(frame) for frame in clip(4)]
    path = tmp_path_factory.mktemp("clip") / "clip.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return str(path)


def handler(world, module: str):
    """The function behind a tab's button, and its output components."""
    for fn in world.page.fns.values():
        if getattr(fn.fn, "__module__", "") == f"arsd.app.tabs.{module}" and fn.fn.__qualname__ == "build.<locals>.run":
            return fn
    raise AssertionError(module)


def shown(fn, *inputs, session="me"):
    """What the handler shows: every output of every step as its component takes it."""
    steps = []
    for values in fn.fn(*inputs, request=SimpleNamespace(session_hash=session)):
        assert len(values) == len(fn.outputs)
        for component, value in zip(fn.outputs, values, strict=True):
            if not (isinstance(value, dict) and value.get("__type__") == "update"):
                component.postprocess(value)
        steps.append(values)
    return steps


def test_every_button_of_the_page_shares_one_place_at_the_model(world):
    for name in ("race", "explore", "video", "verify"):
        fn = handler(world, name)
        assert (fn.concurrency_id, fn.concurrency_limit, fn.api_visibility) == ("model", 1, "private")
    public = [fn for fn in world.page.fns.values() if fn.api_visibility == "public" and fn.api_name != "list_presets"]
    assert {fn.concurrency_id for fn in public} == {"model"} and len(public) == 4


def test_the_race_on_the_page(world):
    world.pause.seconds = 0.05
    steps = shown(handler(world, "race"), PROMPT, SJD, 3, True)
    seed, left, right, verdict, plot, slider, card, python, command = steps[-1]
    assert seed == 3 and "identical" in verdict and "16/16" in left and "16/16" in right and len(steps) > 5
    assert len(slider) == 2 and card["race"]["changed_tokens"] == 0 and "arsd generate" in command and "pipe(" in python
    assert plot.count("<path") == 2 and "data-tokens" in right
    assert not any(Path(name).exists() for name in slider), "what was shown is deleted"


def test_an_unlocked_seed_is_another_one_each_time(world):
    fn = handler(world, "race")
    seeds = [shown(fn, PROMPT, SJD, 3, False)[-1][0] for _ in range(2)]
    assert len({3, *seeds}) == 3


def test_exploring_on_the_page(world):
    fn = handler(world, "explore")
    seed, status, gallery, plot, card, python, command = shown(fn, PROMPT, "cool-sd:delta=5", 3, True, 3, 2.0, 1.0, 0)[-1]
    assert gallery.count("<figure") == 3 and gallery.count("data:image/png;base64") >= 3 and "seed 5" in gallery
    assert (
        "changed tokens expected" in status and card["sampling"]["guidance_scale"] == 2.0 and "for seed in 3 4 5" in command
    )


def test_describing_on_the_page(world, gif):
    status, answer, plot, card, python, command = shown(handler(world, "video"), gif, "What?", "std:budget=8", 4, 20)[-1]
    assert "20 tokens in" in status and "arsd-o0" in answer and card["how"] and "print(out.text)" in python
    assert command.startswith("arsd describe '--question=What?'") and command.endswith("-- clip.gif\n")
    assert plot.count("<path") == 1


def test_verifying_on_the_page(world, tmp_path):
    out = world.service.pipe(PROMPT, decoder=SJD, generator=seeded(3), progress=False)
    save_png(out.images[0], tmp_path / "a.png", world.service.pipe.record(out, 0))
    verdict, facts, command, card = shown(handler(world, "verify"), str(tmp_path / "a.png"))[-1]
    assert "verified" in verdict and "good" in verdict and card["result"] == "verified" and "pixels match" in facts
    assert command.startswith("arsd verify") and command.endswith("-- a.png\n")


def test_stop_on_the_page_ends_the_run_of_its_window_only(world):
    world.pause.seconds = 0.1
    fn, stopped = handler(world, "race"), []
    stops = [one for one in world.page.fns.values() if getattr(one.fn, "__qualname__", "") == "wire.<locals>.end"]
    steps = []
    for values in fn.fn(PROMPT, SJD, 3, True, request=SimpleNamespace(session_hash="me")):
        steps.append(values)
        if len(steps) == 2:
            for stop in stops:
                threading.Thread(target=stop.fn, args=(SimpleNamespace(session_hash="you"),)).start()
        if len(steps) == 4:
            assert not stopped
            stopped = [threading.Thread(target=stop.fn, args=(SimpleNamespace(session_hash="me"),)) for stop in stops]
            for thread in stopped:
                thread.start()
    assert len(steps) > 4 and f"cut short ({STOPPED})" in steps[-1][3] and "stopped" in steps[-1][1]


def test_mistakes_on_the_page_are_toasts_whose_text_is_no_html(world):
    fn = handler(world, "race")
    with pytest.raises(gr.Error) as caught:
        shown(fn, "", SJD, 3, True)
    assert "the prompt is empty" in caught.value.message and caught.value.print_exception is False
    with pytest.raises(gr.Error) as caught:
        shown(fn, PROMPT, "<img src=x onerror=alert(1)>", 3, True)
    assert "&lt;img" in caught.value.message and "<img" not in caught.value.message


def test_the_page_asks_nobody_and_keeps_nothing(world):
    assert world.page.analytics_enabled is False and world.page.share is False and world.page.run_history is False
    assert world.page.delete_cache == forget(LIMITS) and world.page.max_file_size == LIMITS.upload
    assert world.page.local_url.startswith("http://127.0.0.1:")
    assert httpx.get(f"{world.url}config").json()["analytics_enabled"] is False
