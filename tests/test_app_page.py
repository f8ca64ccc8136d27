"""What the page of the app is made of: knobs and strategies, plots, escaped text, the frontier, cards that can be run."""

from __future__ import annotations

import html
import json
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from app_world import PROMPT, made_service, model_folder
from tiny_pipeline import one_clear_line, seeded
from video_llms import clip

from arsd.app import cards, frontier, markup
from arsd.app.drawing import Drawer
from arsd.app.knobs import COUPLINGS, KNOBS, PICTURES, TEXTS, asked, compose, knob_values, presets, promise, strategy
from arsd.app.markup import Canvas, Piece, Point
from arsd.app.painting import cells, how_grid, pass_grid
from arsd.app.progress import NAMES, Pace, Progress
from arsd.app.tabs.explore import ORDER
from arsd.app.theme import head
from arsd.cli import main
from arsd.decoding import Outcome
from arsd.decoding.types import Round
from arsd.errors import DataError, StrategyError
from arsd.models.raster import Raster
from arsd.provenance import read_png, tokens_sha256

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "<img src=x onerror=alert(1)> & \"quotes\" 'too'"


# ------------------------------------------------------------------------------------------------------------- knobs


@pytest.mark.parametrize("family", KNOBS)
def test_knobs_write_a_strategy_that_reads_back_as_the_same_knobs(family):
    turned = {"window": 12, "draft_length": 3, "coupling": "gumbel", "delta": 3.0, "nu": 0.2, "budget": 0}
    words = compose(family, **turned)
    name, values = knob_values(words)
    assert name == family and set(values) == set(KNOBS[family]) and str(strategy(words)) == words
    for knob, value in values.items():
        assert (value or 0) == turned[knob], (knob, value)


def test_a_budget_takes_the_place_of_the_schedule():
    assert compose("cool-sd", draft_length=4, delta=9.0, nu=1.0, budget=2.5) == str(strategy("cool-sd:budget=2.5"))
    assert "at most 2.5" in promise(strategy("cool-sd:budget=2.5"))


def test_every_coupling_can_be_chosen():
    assert [knob_values(compose("sjd", window=8, coupling=one))[1]["coupling"] for one in COUPLINGS] == list(COUPLINGS)


def test_strategies_without_knobs_are_left_as_words():
    assert knob_values("lantern:k=50") == (None, {})
    with pytest.raises(StrategyError) as caught:
        compose("nope")
    one_clear_line(caught.value, "unknown strategy 'nope'")


def test_every_preset_is_a_strategy_and_says_what_it_promises():
    for words in (*PICTURES.values(), *TEXTS.values()):
        decoder = strategy(words)
        assert str(strategy(str(decoder))) == str(decoder)
        assert promise(decoder).startswith("lossless" if decoder.lossless else "relaxed")
    assert set(presets(object())) < set(PICTURES), "without a drafter there are fewer"


def test_every_knob_has_a_place_on_the_page():
    assert {knob for knobs in KNOBS.values() for knob in knobs} == set(ORDER)


# ----------------------------------------------------------------------------------------------------- escaped, parsed


def texts(fragment: str) -> ElementTree.Element:
    """A fragment, which must be well formed."""
    return ElementTree.fromstring(f"<root>{re.sub('&(?!amp|lt|gt|quot|#)[a-z]+;', ' ', _closed(fragment))}</root>")


def _closed(fragment: str) -> str:
    return re.sub(r"<(img|rect|line)([^>]*[^/])>", r"<\1\2/>", fragment)


def test_whatever_a_user_writes_is_text_on_the_page():
    canvas = Canvas("data:,", "data:,", "data:,", 2, 2, [0, 1, 2, 3], [0, 1, 2, 3])
    fragments = [
        markup.notice(HOSTILE, "bad"),
        markup.pane(HOSTILE, HOSTILE, canvas.html(HOSTILE), {HOSTILE: HOSTILE}, HOSTILE),
        markup.figure(canvas, HOSTILE, markup.text(HOSTILE), (HOSTILE, "data:,")),
        markup.lengths_plot({HOSTILE: [1, 2, 3]}),
        markup.scatter([Point(HOSTILE, 1, 2, None, None, False, HOSTILE), Point("b", 2, 3, 2, 4, True)], HOSTILE, HOSTILE),
        markup.coloured([Piece(HOSTILE, Outcome.ACCEPTED, 0, HOSTILE)]),
    ]
    for fragment in fragments:
        tree = texts(fragment)
        assert "onerror" not in {name for one in tree.iter() for name in one.attrib}
        assert all(one.get("src", "data:").startswith("data:") for one in tree.iter("img"))
        assert HOSTILE in "".join(tree.itertext()) + "".join(v for one in tree.iter() for v in one.attrib.values())


def test_the_tokens_of_a_canvas_can_be_read_by_the_page():
    fragment = Canvas("data:,", "", "", 2, 1, [0, 4], [0, 7]).html("x")
    numbers = json.loads(html.unescape(re.search('data-tokens="([^"]*)"', fragment)[1]))
    assert numbers == {"columns": 2, "kinds": [0, 4], "when": [0, 7]}
    ways = json.loads(re.search(r"window.arsdWays = (\[.*?\]);", head())[1])
    assert [ways[kind] for kind in Outcome] == [NAMES[kind] for kind in Outcome], "script and page say the same"


def test_every_way_a_token_may_come_has_a_name_a_colour_and_a_class():
    style = (ROOT / "app" / "style.css").read_text(encoding="utf-8")
    for kind in Outcome:
        assert kind in NAMES and kind in markup.SHORT and f".{markup.CLASSES[kind]} " in style
    hexes = dict(re.findall(r"\.arsd-o(\d) \{ --c: (#\w{6})", style))
    from arsd.app.painting import COLOURS

    assert hexes == {str(int(kind)): "#" + "".join(f"{c:02x}" for c in colour) for kind, colour in COLOURS.items()}


def test_nothing_on_the_page_asks_another_host():
    assert not re.search(r"https?://|@import|url\(", head())


# ------------------------------------------------------------------------------------------------------------- plots


@pytest.mark.parametrize("low, high", [(0, 1), (0.3, 0.31), (-5, 7), (1, 1), (0, 1e-4), (3, 5000), (-2e-5, -1e-5)])
def test_ticks_are_few_round_and_enclose_what_is_shown(low, high):
    ticks = markup._ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 10 and ticks == sorted(set(ticks))


def test_a_plot_of_lengths_has_a_bar_for_each_pass():
    tree = texts(markup.lengths_plot({"Plain AR": [1] * 20, "sjd": [4, 0, 16]}, 20))
    paths = [one.get("d") for one in tree.iter("path")]
    assert [path.count("V") for path in paths] == [20, 2]
    assert [one.get("class") for one in tree.iter("path")] == ["arsd-s0", "arsd-s1"]
    tops = [float(y) for y in re.findall(r"V([\d.]+)", paths[1])]
    assert tops == [markup.HEIGHT * 0.75, 0.0]
    texts(markup.lengths_plot({}))


def test_points_lie_where_they_were_measured():
    points = [Point("a", 1, 10, 9, 11, False), Point("b", 3, 30, None, None, True), Point("c", 2, 20, None, None, True)]
    tree = texts(markup.scatter(points, "x", "y", (10, 12), chosen="b"))
    found = {one.get("data-decoder"): one for one in tree.iter("circle")}
    at = {name: (float(one.get("cx")), float(one.get("cy"))) for name, one in found.items()}
    assert at["a"][0] < at["c"][0] < at["b"][0] and at["a"][1] > at["c"][1] > at["b"][1]
    assert abs(at["a"][0] + at["b"][0] - 2 * at["c"][0]) < 0.2
    assert "chosen" in found["b"].get("class") and "relaxed" not in found["a"].get("class")
    assert len(list(tree.iter("rect"))) == 1


# ------------------------------------------------------------------------------------------------- progress and grids


def turn(positions, tokens, outcomes, counts, pictures, arm=""):
    make = torch.tensor
    return Round(make(positions), make(tokens)[:, 1:], make(tokens), make(outcomes), counts, pictures, arm)


def test_progress_keeps_how_and_when_each_token_came():
    progress = Progress(3, 4)
    progress.hear(turn([[0, 1, 2], [0, 1, 2]], [[5, 6, 7], [8, 9, 1]], [[0, 1, 2], [4, 2, 0]], [2, 1], [0, 1]))
    progress.hear(turn([[2, 3, 4], [0, 1, 2]], [[3, 4, 0], [2, 2, 2]], [[2, 3, 0], [0, 0, 1]], [2, 3], [0, 2], "std"))
    assert progress.tokens.tolist() == [[5, 6, 3, 4], [8, 0, 0, 0], [2, 2, 2, 0]]
    assert progress.outcomes.tolist() == [[0, 1, 2, 3], [4, -1, -1, -1], [0, 0, 1, -1]]
    assert progress.passes.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]]
    assert progress.committed == [[2, 2], [1], [3]]
    assert (progress.done, progress.total, progress.forward_passes, progress.tokens_per_pass) == (8, 12, 2, 2.0)
    assert progress.counts(1) == {NAMES[Outcome.RELAXED]: 1}


def test_grids_leave_marks_out_and_colour_what_is_decided():
    raster = Raster(2, 2, 8, ("eol", "eoi"), "eol", ("eoi",))
    values = np.arange(raster.num_tokens)
    assert cells(raster, values).tolist() == [[0, 1], [3, 4]]
    outcomes = np.array([0, -1, 3, 4, 2, 3, -1], dtype=np.int8)
    grid = np.asarray(how_grid(raster, outcomes))
    assert grid.shape == (2, 2, 4) and grid[..., 3].tolist() == [[255, 0], [255, 255]]
    times = np.asarray(pass_grid(raster, outcomes, values.astype(np.int32)))
    assert times[..., 3].tolist() == [[255, 0], [255, 255]] and times[1, 1, 0] > times[0, 0, 0], "later is lighter"


def test_showing_takes_a_bounded_share_of_the_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("arsd.app.progress.time.perf_counter", lambda: clock[0])
    spent, pace = 0.0, Pace(every=0.25, share=0.2)
    for _ in range(10_000):
        spent += pace(lambda: clock.__setitem__(0, clock[0] + 1.0))  # a drawing that takes a second
        clock[0] += 0.01
    assert 0.15 < spent / clock[0] <= 0.21


# ---------------------------------------------------------------------------------------------------------- frontier


def test_the_shipped_model_has_the_frontier_that_was_measured():
    card = frontier.find_card("emoji-128")
    assert card == json.loads((ROOT / "benchmarks/results/evaluate-emoji-128/card.json").read_text(encoding="utf-8"))
    for x in frontier.speeds(card):
        for y in frontier.qualities(card):
            points = frontier.points(card, x, y)
            assert points and all(strategy(point.name).lossless != point.relaxed for point in points)
            texts(markup.scatter(points, x, y, frontier.band(card, y)))
    assert frontier.qualities(card)[0].endswith("against AR") and "200 concepts" in frontier.about(card)
    assert frontier.band(card, frontier.qualities(card)[0]) is not None


NO_CARDS = ["no json", "[]", '{"rows": [{}]}', '{"rows": [{"decoder": "ar", "tokens per pass": 1.0}]}']


@pytest.mark.parametrize("content", [*NO_CARDS, '{"rows": [{"decoder": 3, "tokens per pass": 1.0}]}'])
def test_a_file_that_is_no_card_is_one_line(tmp_path, content):
    (tmp_path / "card.json").write_text(content)
    with pytest.raises(DataError) as caught:
        frontier.find_card("emoji-128", str(tmp_path / "card.json"))
    one_clear_line(caught.value, "no evaluation card")
    assert frontier.find_card(str(tmp_path)) is None, "a model without a card has no frontier"
    with pytest.raises(DataError):
        frontier.find_card("emoji-128", str(tmp_path / "gone.json"))


# ------------------------------------------------------------------------------------------------------------- cards


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    made = made_service(model_folder(tmp_path_factory.mktemp("cards") / "model"), video=True)
    yield made
    made.close()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 9, "guidance_scale": 1.0}])
def test_the_code_of_a_card_draws_the_same_tokens(service, here, pictures, options, capsys):
    wanted = asked(service.pipe, PROMPT, "sjd:window=5", 11, service.limits, **options)
    run = service.new_run()
    drawn = list(service.stream(run, Drawer(service, run, wanted, pictures)))[-1]
    card = json.loads(json.dumps(cards.picture_card(service, wanted, drawn)))
    hashes = [tokens_sha256(row) for row in drawn.output.tokens]
    assert [one["tokens_sha256"] for one in card["images"]] == hashes and card["seeds"] == [11, 12, 13][:pictures]
    exec(compile(cards.picture_python(service, wanted, drawn.output), "card", "exec"), {})
    assert [read_png(f"red-apple-seed{11 + i}.png")["tokens_sha256"] for i in range(pictures)] == hashes
    for words in commands(cards.picture_command(service, wanted, drawn.output)):
        assert main([words[0], "--out", "again", *words[1:]]) == 0
    assert [read_png(f"again/red-apple-seed{11 + i}-0.png")["tokens_sha256"] for i in range(pictures)] == hashes


def commands(text: str) -> list[list[str]]:
    """The words behind ``arsd`` of a command, or of one in a loop over seeds."""
    if not text.startswith("for "):
        return [shlex.split(text)[1:]]
    first, body, _ = text.splitlines()
    return [shlex.split(body.replace("$seed", seed))[1:] for seed in re.search(r"in ([\d ]+);", first)[1].split()]


def test_hostile_prompts_stay_prompts_in_the_code_of_a_card(service, here):
    prompt = 'red apple\'; import os; "$(touch hacked)" `touch hacked`'
    wanted, output = made(service, prompt)
    code, command = cards.picture_python(service, wanted, output), cards.picture_command(service, wanted, output)
    assert repr(prompt) in code and shlex.split(command)[-1] == prompt
    compile(code, "card", "exec")


@pytest.mark.parametrize("prompt", ["-x", "--json", "--help"])
def test_prompts_that_look_like_options_are_prompts(service, here, prompt):
    from arsd.cli import build_parser

    (words,) = commands(cards.picture_command(service, *made(service, prompt)))
    assert build_parser().parse_args(words).prompt == [prompt]
    question = shlex.split(cards.text_command(service, "a.gif", prompt, strategy("ar"), {}))
    assert build_parser().parse_args(question[1:]).question == prompt


def made(service, subject=PROMPT, decoder="sjd:window=5", pictures=1):
    """What was asked for and what came of it."""
    wanted, run = asked(service.pipe, subject, decoder, 1, service.limits), service.new_run()
    return wanted, list(service.stream(run, Drawer(service, run, wanted, pictures)))[-1].output


def test_the_window_that_auto_took_is_written_out(service, here):
    wanted, output = made(service, decoder="sjd:coupling=maximal", pictures=3)
    for made_of in (cards.picture_python, cards.picture_command):
        assert f"window={output.stats.pass_tokens}" in made_of(service, wanted, output).replace("'", "")


def test_what_a_model_was_loaded_from_is_part_of_every_command(service, here, monkeypatch):
    monkeypatch.setattr(service, "parts", {"vq": "a b.pt", "image_size": 384})
    monkeypatch.setattr(service, "plugins", ["my.py"])
    wanted, output = made(service)
    code = cards.picture_python(service, wanted, output)
    assert "vq='a b.pt', image_size=384" in code and "import_plugin('my.py')" in code
    for command in (cards.picture_command(service, wanted, output), cards.verify_command("a.png", service)):
        assert "--vq 'a b.pt' --image-size 384" in command
    assert "--import my.py" in cards.picture_command(service, wanted, output)


def test_a_comparing_card_compares(service, here, capsys):
    wanted, output = made(service)
    exec(compile(cards.picture_python(service, wanted, output, compare=True), "card", "exec"), {})
    assert capsys.readouterr().out.strip().endswith("0 tokens differ")
    assert "--compare" in cards.picture_command(service, wanted, output, compare=True)


def test_cards_of_class_models_name_the_class(tmp_path, here):
    service = made_service(model_folder(tmp_path / "class", classes=True))
    wanted, output = made(service, 3)
    exec(compile(cards.picture_python(service, wanted, output), "card", "exec"), {})
    (words,) = commands(cards.picture_command(service, wanted, output))
    assert main(words) == 0
    expected = tokens_sha256(service.pipe(class_labels=3, generator=seeded(1), decoder="ar", progress=False).tokens[0])
    assert read_png("3-seed1.png")["tokens_sha256"] == read_png("outputs/3-seed1-0.png")["tokens_sha256"] == expected
    service.close()


def test_cards_of_descriptions_are_commands_that_the_command_line_takes(service, here):
    from arsd.cli import build_parser

    options = {"num_frames": 4, "max_new_tokens": 20}
    words = shlex.split(cards.text_command(service, "a clip.gif", 'What\'s "it"?', strategy("std:budget=8"), options))
    parsed = build_parser().parse_args(words[1:])
    assert parsed.clip == ["a clip.gif"] and parsed.question == 'What\'s "it"?'
    assert (parsed.num_frames, parsed.max_new_tokens, parsed.decoder) == (4, 20, "std:budget=8")
    code = cards.text_python(service, "a.gif", "What?", strategy("ar"), options).replace(
        code_load := cards._load("arsd.VideoLLMPipeline", service.video_model, service.video_llm), "pipe = given"
    )
    assert code_load.endswith("dtype=torch.float32)")
    from PIL import Image

    frames = [Image.fromarray(frame) for frame in clip(4)]
    frames[0].save("a.gif", save_all=True, append_images=frames[1:], duration=100)
    exec(compile(code, "card", "exec"), {"given": service.video_llm})
