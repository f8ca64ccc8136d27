"""Sets of pictures: drawn again they are the same, stopped they go on, and a folder belongs to one configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import CAPTIONS, TOKENS, class_pipeline, hushed, one_clear_line, text_pipeline

import arsd
from arsd.errors import DataError, InputError
from arsd.metrics.drawing import STREAM, DrawnSet, DrawPlan, draw, picture_path, stream_of
from arsd.metrics.sweep import entries, sweep
from arsd.provenance import read_png

PROMPTS = tuple(names[0] for names in CAPTIONS) * 3


@pytest.fixture(scope="module")
def pipe():
    return hushed(text_pipeline())


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def whole(pipe, folder, decoder="sjd:window=5", **options):
    plan = DrawPlan(PROMPTS, batch=4, **options)
    draw(pipe, arsd.parse_strategy(decoder), plan, folder)
    return plan, content(folder)


class Killed(Exception):
    pass


@pytest.mark.parametrize("decoder", ["ar", "sjd:window=5", "sjd:window=5,coupling=independent"])
@pytest.mark.parametrize("after", [1, 5, 11])
def test_a_killed_run_goes_on_to_the_same_files(pipe, tmp_path, decoder, after):
    plan, expected = whole(pipe, tmp_path / "whole", decoder)
    left = [after]

    def kill():
        left[0] -= 1
        if not left[0]:
            raise Killed

    with pytest.raises(Killed):
        draw(pipe, arsd.parse_strategy(decoder), plan, tmp_path / "killed", on_picture=kill)
    kept = content(tmp_path / "killed")
    assert len(kept) == after and all(expected[name] == data for name, data in kept.items())
    (tmp_path / "killed" / ".000009.png.part").write_bytes(b"half a picture")
    draw(pipe, arsd.parse_strategy(decoder), plan, tmp_path / "killed")
    assert content(tmp_path / "killed") == expected
    assert not list((tmp_path / "killed").glob(".*"))


def test_pictures_do_not_depend_on_what_else_is_drawn(pipe, tmp_path):
    plan, expected = whole(pipe, tmp_path / "whole")
    for turn in ([7], [0, 11, 3], range(12)):
        draw(pipe, arsd.parse_strategy("sjd:window=5"), plan, tmp_path / "turns", turn)
    assert content(tmp_path / "turns") == expected


def test_each_picture_is_the_one_of_its_seed(pipe, tmp_path):
    whole(pipe, tmp_path / "set", seed=40)
    record = read_png(picture_path(tmp_path / "set", 5))
    assert record["seed"] == 45
    alone = pipe(PROMPTS[5], decoder="ar", generator=torch.Generator().manual_seed(45)).images[0]
    assert np.array_equal(np.asarray(alone), np.asarray(Image.open(picture_path(tmp_path / "set", 5))))


def test_only_seed_exact_strategies_share_seeds():
    names = ["ar", "sjd", "eagle", "hybrid", "sjd:coupling=maximal", "cool-sd", "cool-sd:delta=2", "lantern"]
    streams = {name: stream_of(arsd.parse_strategy(name)) for name in names}
    assert [streams[name] for name in names[:4]] == [0] * 4
    others = [streams[name] for name in names[4:]]
    assert len(set(others)) == len(others) and 0 not in others
    assert max(others) * STREAM + STREAM < 2**63


def test_drawn_sets_read_what_was_drawn(pipe, tmp_path):
    whole(pipe, tmp_path / "set")
    drawn = DrawnSet.read(tmp_path / "set")
    assert drawn.inputs == list(PROMPTS) and drawn.tokens.shape == (len(PROMPTS), TOKENS)
    assert drawn.tokens_per_pass == len(PROMPTS) * TOKENS / drawn.passes.sum() > 1
    assert drawn.pass_tokens == 5 and drawn.seconds > 0
    picture_path(tmp_path / "set", 4).unlink()
    with pytest.raises(DataError, match="lacks 1 of 12"):
        DrawnSet.read(tmp_path / "set")
    with pytest.raises(DataError, match="not drawn by"):
        DrawnSet.read(tmp_path)


@pytest.mark.parametrize("change", ["decoder", "seed", "batch", "sampling", "prompts", "model"])
def test_a_folder_belongs_to_one_configuration(pipe, tmp_path, change):
    plan, expected = whole(pipe, tmp_path)
    decoder, other = "sjd:window=5", pipe
    changed = {
        "seed": {"seed": 1},
        "batch": {"batch": 3},
        "sampling": {"sampling": {"temperature": 1.15}},
        "prompts": {"inputs": PROMPTS[::-1]},
    }.get(change, {})
    if change == "decoder":
        decoder = "sjd:window=4"
    if change == "model":
        other = hushed(text_pipeline().to(torch.float64))
    plan = DrawPlan(**{"inputs": PROMPTS, "batch": 4, **changed})
    with pytest.raises(DataError) as caught:
        draw(other, arsd.parse_strategy(decoder), plan, tmp_path)
    one_clear_line(caught.value, "is a run with another")
    assert content(tmp_path) == expected


def test_strangers_pictures_are_left_alone(pipe, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "holiday.png")
    with pytest.raises(DataError, match="holiday.png of an unknown run"):
        whole(pipe, tmp_path)


def test_a_full_disk_is_one_line_and_keeps_what_is_there(pipe, tmp_path, monkeypatch):
    write, written = Path.write_bytes, []

    def full(path, content):
        if len(written) == 3:
            write(path, content[:10])
            raise OSError(28, "No space left on device")
        written.append(path)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError) as caught:
        whole(pipe, tmp_path)
    one_clear_line(caught.value, "No space left")
    assert len(content(tmp_path)) == 3 and not list(tmp_path.glob(".*"))


def test_class_models_are_drawn_by_label(tmp_path):
    pipe = hushed(class_pipeline())
    draw(pipe, arsd.parse_strategy("sjd:window=4"), DrawPlan((0, 1, 2, 0), batch=2), tmp_path)
    drawn = DrawnSet.read(tmp_path)
    assert drawn.inputs == [0, 1, 2, 0]
    assert drawn.hashes[0] != drawn.hashes[3]  # the same class, another seed


@pytest.mark.parametrize("wrong", [{"inputs": ()}, {"batch": 0}, {"seed": -1}, {"seed": STREAM}])
def test_impossible_plans_are_refused(wrong):
    with pytest.raises(InputError):
        DrawPlan(**{"inputs": PROMPTS, **wrong})


def test_on_picture_gives_each_picture_as_the_call_does(pipe):
    seen = {}
    options = {"decoder": "sjd:window=5,coupling=independent", "batch_size": 3, "log_probs": True}
    seeds = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    out = pipe(list(PROMPTS), generator=seeds, on_picture=lambda i, one: seen.setdefault(i, one), **options)
    assert sorted(seen) == list(range(len(PROMPTS)))
    for i, one in seen.items():
        assert torch.equal(one.tokens[0], out.tokens[i])
        assert np.array_equal(np.asarray(one.images[0]), np.asarray(out.images[i]))
        assert torch.equal(one.log_probs[0], out.log_probs[i]) and torch.equal(one.entropies[0], out.entropies[i])
        assert pipe.record(one, 0) == pipe.record(out, i)
        assert one.stats.tokens_per_pass == TOKENS / out.stats.row_passes[i]
    assert sum(one.stats.forward_passes for one in seen.values()) == sum(out.stats.row_passes)


# ---------------------------------------------------------------- sweeps


def test_a_sweep_adds_plain_ar_in_every_pass_shape(pipe, tmp_path):
    chosen = entries(["sjd:window=5", "sjd:window=5,coupling=maximal"])
    assert [e.role for e in chosen] == ["strategy"] * 3 + ["same-law", "hotter"]
    seen = []
    plan = DrawPlan(PROMPTS, batch=4)
    sets = sweep(pipe, chosen, plan, tmp_path, chunk=5, progress=lambda *told: seen.append(told))
    assert "ar:pass_tokens=5" in sets
    assert sets["sjd:window=5"].hashes == sets["ar:pass_tokens=5"].hashes == sets["ar"].hashes
    assert sets["sjd:window=5,coupling=maximal"].hashes != sets["ar"].hashes
    assert sets["sjd:window=16, temperature 1.15"].settings["sampling"] == {"temperature": 1.15}
    assert [done for done, _, _ in seen] == list(range(1, 6 * len(PROMPTS) + 1 + len(PROMPTS) * (len(sets) - 6)))
    assert seen[-1][0] == seen[-1][1]
    names = [json.loads((path / "run.json").read_text())["decoder"] for path in tmp_path.iterdir()]
    assert len(names) == len(sets) and all(re.fullmatch(r"[\w.+=-]+", path.name) for path in tmp_path.iterdir())


def test_a_strategy_named_twice_is_refused():
    with pytest.raises(InputError, match="twice"):
        entries(["sjd:window=5", "ar", "sjd:window=5"])
