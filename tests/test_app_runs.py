"""Runs of the app, without a page: races, galleries, descriptions, checks; stopped, timed out, crashed, side by side."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from app_world import PROMPT, Pause, made_service, model_folder
from PIL import Image
from tiny_pipeline import SIDE, TOKENS, one_clear_line, seeded
from video_llms import clip

from arsd.app.checking import check
from arsd.app.describing import describe
from arsd.app.drawing import Drawer, png_of
from arsd.app.knobs import asked
from arsd.app.progress import NAMES
from arsd.app.race import _words, race
from arsd.app.service import STOPPED, TIMED_OUT, Limits, RunFailed, Service
from arsd.app.tabs.video import asked_text
from arsd.app.uploads import checked_clip, checked_picture
from arsd.errors import InputError, NonFiniteLogitsError, StrategyError
from arsd.provenance import read_png

pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("app") / "model")


@pytest.fixture
def service(folder):
    made = made_service(folder, drafter=True)
    yield made
    made.close()


@pytest.fixture(scope="module")
def chat(folder):
    made = made_service(folder, video=True)
    yield made
    made.close()


def wanted(service: Service, decoder: str = "sjd:window=4", seed: int = 3, **sampling):
    return asked(service.pipe, PROMPT, decoder, seed, service.limits, **sampling)


def raced(service: Service, decoder: str = "sjd:window=4", seed: int = 3):
    return list(race(service, service.new_run(), wanted(service, decoder, seed)))


def drawn(service: Service, decoder: str = "sjd:window=4", seed: int = 3, pictures: int = 1, run=None):
    run = run or service.new_run()
    return list(service.stream(run, Drawer(service, run, wanted(service, decoder, seed), pictures)))


def alone(service: Service, decoder: str, seed: int = 3) -> torch.Tensor:
    return service.pipe(PROMPT, decoder=decoder, generator=seeded(seed), progress=False).tokens[0]


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


# ------------------------------------------------------------------------------------------------------------- races


def test_a_race_goes_through_its_stages_and_ends_with_identical_tokens(service):
    stages = raced(service)
    order = [now.stage for now in stages]
    assert order == sorted(order, key=["preparing", "ar", "decoder", "over"].index) and set(order) == {
        "preparing",
        "ar",
        "decoder",
        "over",
    }
    last = stages[-1]
    assert last.same and last.verdict.startswith("identical") and last.pngs is not None
    assert (last.plain.forward_passes, last.plain.tokens_per_pass) == (TOKENS, 1.0)
    assert last.fast.forward_passes < TOKENS
    assert torch.equal(last.fast.output.tokens[0], alone(service, "ar"))


def test_the_pictures_of_a_race_carry_records_that_verify(service, tmp_path):
    for content in raced(service)[-1].pngs:
        (tmp_path / "a.png").write_bytes(content)
        assert service.pipe.verify(str(tmp_path / "a.png")).result == "verified"
        assert read_png(tmp_path / "a.png")["seed"] == 3


def test_what_other_strategies_promise_is_said(service):
    relaxed = raced(service, "cool-sd:delta=20,nu=0", 4)[-1]
    assert not relaxed.same and "expected changed tokens" in relaxed.verdict
    other = raced(service, "sjd:window=4,coupling=maximal", 4)[-1]
    assert not other.same and "of the same law" in other.verdict


def test_tokens_that_rounding_parts_are_verified_in_their_own_pass_shape(service):
    fast = raced(service)[-1].fast
    words = _words(service, wanted(service), fast, [5, 9], TOKENS)
    assert words.startswith("differs in 2 of 16 tokens, from token 6 on") and words.endswith("it is plain AR's, verified")


def test_the_card_of_a_race_is_json_and_agrees_with_what_was_seen(service):
    last = raced(service)[-1]
    card = json.loads(json.dumps(last.card))
    assert card["race"]["changed_tokens"] == 0
    assert card["race"]["forward_passes"] == [TOKENS, last.fast.forward_passes]
    assert card["decoder"]["decoder"] == "sjd:window=4" and card["ar"]["decoder"] == "ar"
    assert sum(card["decoder"]["images"][0]["how"].values()) == TOKENS
    assert sum(card["decoder"]["tokens_committed_per_pass"][0]) == TOKENS


# ---------------------------------------------------------------------------------------------- pictures as they grow


def test_pictures_grow_and_what_is_undecided_is_transparent(service):
    Pause(service.pipe).seconds = 0.1
    seen = drawn(service, "ar")
    done = [one.done for one in seen]
    assert len(seen) > 4 and done == sorted(done) and done[-1] == TOKENS
    for one in seen:
        alpha = np.asarray(opened(one.canvases[0].frame).convert("RGBA"))[..., 3]
        assert alpha.shape == (SIDE, SIDE) and (alpha > 0).sum() == one.done * SIDE * SIDE // TOKENS
        assert sum(one.committed[0]) == one.done == sum(one.counts[0].values())


def test_showing_and_sleeping_listeners_are_in_nobodys_seconds(service):
    Pause(service.pipe).seconds = 0.05
    began = time.perf_counter()
    last = drawn(service, "ar")[-1]
    assert time.perf_counter() - began > TOKENS * 0.05 and last.seconds < TOKENS * 0.05 / 2


def test_the_grid_says_how_every_token_came(service):
    last = drawn(service, "cool-sd:delta=20,nu=0", 5, pictures=3)[-1]
    relaxed = sum(one.get(NAMES[4], 0) for one in last.counts)
    assert relaxed > 0, "a loose rule takes guesses that a strict one refuses"
    for canvas, committed in zip(last.canvases, last.committed, strict=True):
        assert opened(canvas.how).size == opened(canvas.passes).size == (4, 4)
        assert len(canvas.kinds) == len(canvas.when) == TOKENS and max(canvas.when) + 1 >= len(committed)


def test_pictures_of_a_gallery_are_those_of_their_seeds_alone(service):
    last = drawn(service, "sjd:window=4", 5, pictures=4)[-1]
    for i in range(4):
        assert torch.equal(last.output.tokens[i], alone(service, "ar", 5 + i))


# ------------------------------------------------------------------------------------------- stopping, limits, crashes


def test_a_stopped_race_keeps_what_it_has_and_the_next_one_is_whole(service):
    pause = Pause(service.pipe)
    pause.seconds, run = 0.1, service.new_run("me")
    seen = []
    for now in race(service, run, wanted(service)):
        seen.append(now)
        if now.plain is not None and now.plain.done >= 3:
            service.stop("me")
    last = seen[-1]
    assert (last.stage, last.plain.stopped, last.fast, last.same) == ("over", STOPPED, None, None)
    tokens, count = last.plain.output.tokens[0], last.plain.done
    assert 3 <= count < TOKENS and torch.equal(tokens[:count], alone(service, "ar")[:count]) and not tokens[count:].any()
    assert last.card["ar"]["stopped"] == STOPPED and "cut short" in last.verdict
    pause.seconds = 0
    assert raced(service)[-1].same


def test_a_run_that_takes_too_long_ends_by_itself(folder):
    service = made_service(folder, limits=Limits(seconds=0.5))
    Pause(service.pipe).seconds = 0.1
    last = drawn(service, "ar")[-1]
    assert last.stopped == TIMED_OUT and 2 <= last.done < TOKENS
    service.close()


def test_stopping_reaches_only_the_runs_of_their_owner(service):
    mine, yours = service.new_run("me"), service.new_run("you")
    assert service.stop("me") == 1 and service.stop("me") == 0
    assert mine.over() and not yours.over()


def test_a_run_that_is_stopped_before_it_begins_draws_nothing(service):
    run = service.new_run("me")
    service.stop("me")
    assert drawn(service, run=run) == []
    with pytest.raises(InputError, match="before it began"):
        service.call(run, lambda: 1)


def test_whoever_stops_listening_frees_the_model(service):
    Pause(service.pipe).seconds = 0.1
    listening = race(service, service.new_run(), wanted(service))
    while (now := next(listening)).plain is None:
        pass
    assert now.plain.done < TOKENS
    began = time.perf_counter()
    listening.close()
    service.call(service.new_run(), lambda: None)
    assert time.perf_counter() - began < 0.5, "the pass that was under way, and no more"


def crash(error):
    def work(hear):
        hear("first")
        raise error

    return work


@pytest.mark.parametrize(
    "error, says",
    [
        (RuntimeError("boom"), "the run failed (RuntimeError)"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "not enough memory"),
        (SystemExit(3), "the run failed (SystemExit)"),
    ],
)
def test_a_crash_is_one_line_and_the_next_run_is_not_affected(service, error, says):
    heard = []
    with pytest.raises(RunFailed) as caught:
        for item in service.stream(service.new_run(), crash(error)):
            heard.append(item)
    one_clear_line(caught.value, says)
    assert heard == ["first"] and raced(service)[-1].same


def test_a_model_that_breaks_says_so_and_recovers(service):
    weight = service.pipe.transformer.lm.lm_head.weight
    before = weight.detach().clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteLogitsError) as caught:
        raced(service)
    one_clear_line(caught.value, "NaN")
    weight.data.copy_(before)
    assert raced(service)[-1].same


def test_users_at_once_get_what_they_would_get_alone(service):
    seeds = list(range(20, 26))
    with ThreadPoolExecutor(len(seeds)) as pool:
        found = list(pool.map(lambda seed: drawn(service, "sjd:window=4", seed)[-1], seeds))
    for seed, one in zip(seeds, found, strict=True):
        single = drawn(service, "sjd:window=4", seed)[-1]
        assert torch.equal(one.output.tokens, single.output.tokens) and one.committed == single.committed
        pngs = [png_of(service.pipe, "m", seed, each.output) for each in (one, single)]
        assert pngs[0] == pngs[1], "to the last bit"


def test_everything_computes_in_one_thread_one_run_after_the_other(service):
    names, working, most = set(), [], []

    def work():
        names.add(threading.current_thread().name)
        working.append(1)
        time.sleep(0.05)
        most.append(len(working))
        working.pop()

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda _: service.call(service.new_run(), work), range(5)))
    assert len(names) == 1 and names != {threading.current_thread().name} and most == [1] * 5


# ------------------------------------------------------------------------------------------------------- bad requests

BAD = [
    ({"subject": ""}, InputError, "the prompt is empty"),
    ({"subject": "  "}, InputError, "the prompt is empty"),
    ({"subject": None}, InputError, "the prompt is empty"),
    ({"subject": "x" * 1001}, InputError, "at most 1000"),
    ({"decoder": "nope"}, StrategyError, "unknown decoder 'nope'"),
    ({"decoder": None}, StrategyError, "choose a strategy"),
    ({"decoder": "sjd:window=-4"}, StrategyError, "window"),
    ({"decoder": "std"}, StrategyError, "decodes text"),
    ({"seed": -1}, InputError, "the seed"),
    ({"seed": 1.5}, InputError, "the seed"),
    ({"seed": None}, InputError, "the seed"),
    ({"seed": True}, InputError, "the seed"),
    ({"seed": 2**53}, InputError, "the seed"),
    ({"guidance_scale": float("nan")}, InputError, "guidance_scale"),
    ({"guidance_scale": -1}, InputError, "guidance_scale"),
    ({"temperature": -0.5}, InputError, "temperature"),
    ({"temperature": "hot"}, InputError, "temperature"),
    ({"top_k": -1}, InputError, "top_k"),
    ({"top_k": 2.5}, InputError, "top_k"),
]


@pytest.mark.parametrize("changes, kind, says", BAD)
def test_bad_requests_are_refused_in_one_line(service, changes, kind, says):
    given = {"subject": PROMPT, "decoder": "sjd", "seed": 0, **changes}
    with pytest.raises(kind) as caught:
        asked(service.pipe, given.pop("subject"), given.pop("decoder"), given.pop("seed"), service.limits, **given)
    one_clear_line(caught.value, says)


def test_strategies_with_a_drafter_need_one(folder):
    service = made_service(folder)
    with pytest.raises(StrategyError, match="needs a draft model"):
        wanted(service, "eagle")
    service.close()


def test_classes_are_numbers(tmp_path):
    service = made_service(model_folder(tmp_path / "class", classes=True))
    for bad in ("dog", 1.5, -1, None):
        with pytest.raises(InputError, match="class"):
            asked(service.pipe, bad, "sjd", 0, service.limits)
    last = list(race(service, service.new_run(), asked(service.pipe, 2.0, "sjd:window=4", 0, service.limits)))[-1]
    assert last.same and last.card["ar"]["class_labels"] == 2
    service.close()


# ----------------------------------------------------------------------------------------------------------- uploads


def written(path, content: bytes):
    path.write_bytes(content)
    return str(path)


def test_uploads_of_every_bad_kind_are_refused_in_one_line(tmp_path):
    limits = Limits(upload=200_000, pixels=10_000, clip_pixels=10_000, clip_frames=3)
    wide, many, png = tmp_path / "wide.png", tmp_path / "many.gif", tmp_path / "jpeg.png"
    Image.new("RGB", (200, 200)).save(wide)
    frames = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(4)]
    frames[0].save(many, save_all=True, append_images=frames[1:])
    Image.new("RGB", (8, 8)).save(png, format="JPEG")
    bad = [
        (checked_picture, None, "there is no file"),
        (checked_picture, str(tmp_path / "gone.png"), "there is no file gone.png"),
        (checked_picture, written(tmp_path / "empty.png", b""), "0 bytes"),
        (checked_picture, written(tmp_path / "text.png", b"no picture"), "cannot be read as a picture"),
        (checked_picture, written(tmp_path / "large.png", b"x" * 200_001), "200001 bytes"),
        (checked_picture, str(wide), "40000 pixels"),
        (checked_picture, str(png), "JPEG, no PNG"),
        (checked_clip, None, "there is no file"),
        (checked_clip, written(tmp_path / "clip.txt", b"no clip"), "no clip that can be read"),
        (checked_clip, written(tmp_path / "clip.gif", b"no clip"), "cannot be read as a picture"),
        (checked_clip, str(many), "4 frames"),
        (checked_clip, str(wide), "40000 pixels"),
        (checked_clip, written(tmp_path / "list.avi", b"ffconcat version 1.0\nfile other.mp4"), "no video"),
        (checked_clip, written(tmp_path / "post.gif", b"%!PS-Adobe-3.0 EPSF-3.0"), "cannot be read as a picture"),
    ]
    for look, path, says in bad:
        with pytest.raises(InputError) as caught:
            look(path, limits)
        one_clear_line(caught.value, says)
    assert checked_clip(written(tmp_path / "clip.mp4", b"\0\0\0\x18ftypmp42"), limits).name == "clip.mp4", (
        "reading it will say why"
    )


# ------------------------------------------------------------------------------------------------------------ checks


def test_pictures_are_verified_refuted_or_unknown(service, tmp_path):
    png = raced(service)[-1].pngs[1]
    honest, forged, bare = (tmp_path / f"{name}.png" for name in ("honest", "forged", "bare"))
    honest.write_bytes(png)
    image, record = Image.open(honest).convert("RGB"), read_png(honest)
    from arsd.provenance import save_png

    save_png(image, forged, {**record, "noise_seed": record["noise_seed"] + 1})
    image.save(bare)
    found = [check(service, service.new_run(), file) for file in (honest, forged, bare)]
    assert [one["result"] for one in found] == ["verified", "refuted", "unknown"]
    assert found[0]["record"]["seed"] == 3 and "tokens" not in found[0]["record"]
    assert all("path" not in one and json.dumps(one) for one in found)


def test_a_picture_made_in_another_dtype_is_verified_in_that_dtype(service, folder, tmp_path):
    other = service.reload(torch.float64)
    out = other(PROMPT, generator=seeded(1), progress=False)
    (tmp_path / "a.png").write_bytes(png_of(other, "m", 1, out))
    assert check(service, service.new_run(), tmp_path / "a.png")["result"] == "verified"
    assert service.pipe.dtype == torch.float32, "the model of the others is left alone"


# ------------------------------------------------------------------------------------------------------ descriptions


@pytest.fixture(scope="module")
def gif(tmp_path_factory):
    frames = [Image.fromarray(frame) for frame in clip(4)]
    path = tmp_path_factory.mktemp("clip") / "clip.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return path


@pytest.mark.parametrize("decoder", ["ar", "std:budget=8", "token-recycling", "prompt-lookup", "ucb-spec"])
def test_a_description_streams_the_text_of_the_pipeline(chat, gif, decoder):
    asked_for = asked_text(chat, "What?", decoder, 4, 30)
    seen = list(describe(chat, chat.new_run(), gif, *asked_for))
    last = seen[-1]
    assert last.text == last.output.text == chat.video_llm(gif, "What?", num_frames=4, max_new_tokens=30, decoder="ar").text
    assert all(last.text.startswith(one.text) for one in seen) and last.tokens == 30 == len(last.pieces)
    assert sum(last.counts.values()) == 30 and sum(last.committed) == 30
    assert json.dumps(last.card) and last.card["text"] == last.text


def test_tokens_say_who_proposed_them(chat, gif):
    last = list(describe(chat, chat.new_run(), gif, *asked_text(chat, "What?", "std:budget=8", 4, 30)))[-1]
    proposed = sum(count for who, count in last.counts.items() if who == "proposed by the sparse pass")
    accepted = last.output.stats
    assert proposed == 30 - accepted.forward_passes, "every pass adds one token of the model's own"
    assert last.counts["the model's own"] == accepted.forward_passes


def test_a_stopped_description_keeps_its_text(chat, gif):
    run, seen = chat.new_run("me"), []
    full = chat.video_llm(gif, "What?", num_frames=4, max_new_tokens=200, decoder="ar").text
    for told in describe(chat, run, gif, *asked_text(chat, "What?", "ar", 4, 200)):
        seen.append(told)
        if told.tokens > 0:
            run.stop()
    assert seen[-1].stopped == STOPPED and 0 < seen[-1].tokens < 200 and full.startswith(seen[-1].text)


def test_a_clip_that_cannot_be_read_is_one_line(chat, tmp_path):
    broken = tmp_path / "clip.mp4"
    broken.write_bytes(b"no clip")
    with pytest.raises(InputError) as caught:
        list(describe(chat, chat.new_run(), broken, *asked_text(chat, "What?", "ar", 4, 10)))
    one_clear_line(caught.value, "clip.mp4")


@pytest.mark.parametrize("changes", [{"question": ""}, {"frames": 0}, {"frames": 1000}, {"tokens": 0}, {"decoder": "nope"}])
def test_bad_questions_are_refused(chat, changes):
    given = {"question": "What?", "decoder": "ar", "frames": 4, "tokens": 10, **changes}
    with pytest.raises((InputError, StrategyError)) as caught:
        asked_text(chat, **given)
    one_clear_line(caught.value, "")
