"""The frontier's tests can fail: a wrong token, a hotter law and a biased sampler are seen; what is lossless passes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_clip import Colours
from tiny_pipeline import CAPTIONS, hushed, text_pipeline

import arsd
from arsd.metrics.drawing import DrawPlan
from arsd.metrics.frontier import SURPRISE, family_of, measure, order_of_relaxed, promise_of, rows_of
from arsd.metrics.judge import Judge
from arsd.metrics.plots import plot_frontier
from arsd.metrics.report import columns, number, to_csv, to_markdown, with_interval
from arsd.metrics.sweep import entries, sweep

PROMPTS = tuple(names[0] for names in CAPTIONS) * 50
DECODERS = ["sjd:window=16", "sjd:window=16,coupling=maximal", "sjd:window=16,acceptance=cool-sd:delta=4:nu=0"]


@pytest.fixture(scope="module")
def judge():
    reference = torch.from_numpy(np.random.default_rng(0).normal(0.5, 0.1, size=(40, 6)).astype(np.float32))
    return Judge(Colours(), Colours(), reference=reference)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, judge):
    pipe = hushed(text_pipeline().to(torch.float64))
    out = tmp_path_factory.mktemp("sweep")
    plan = DrawPlan(PROMPTS, batch=40)
    chosen = entries(DECODERS)
    sets = sweep(pipe, chosen, plan, out, chunk=200)
    found = measure(pipe, chosen, sets, judge, {}, forced=8)
    return pipe, chosen, sets, found, out


@pytest.fixture(scope="module")
def rows(swept, judge):
    _, _, sets, found, _ = swept
    return {row["decoder"]: row for row in rows_of(found, sets, judge)}


def test_lossless_sets_hold_and_the_hotter_one_is_rejected(rows):
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert verdicts["ar"] == verdicts["sjd:window=16"] == "200 of 200 equal"
    assert verdicts["sjd:window=16,coupling=maximal"] == verdicts["sjd:window=16, other seeds"] == "holds"
    assert verdicts["sjd:window=16, temperature 1.15"] == "REJECTED"
    assert verdicts["sjd:window=16,acceptance=cool-sd:delta=4:nu=0"] == "moved"


def test_one_wrong_token_is_seen(swept, judge):
    _, _, sets, found, _ = swept
    drawn = found["sjd:window=16"].drawn
    kept = list(drawn.hashes)
    try:
        drawn.hashes[17] = "0" * 64
        row = next(row for row in rows_of(found, sets, judge) if row["decoder"] == "sjd:window=16")
        assert row["verdict"] == "199 of 200 equal"
    finally:
        drawn.hashes[:] = kept


def test_either_statistic_alone_can_reject(swept, judge):
    _, _, sets, found, _ = swept
    lossless = found["sjd:window=16,coupling=maximal"]
    for name, shift in (("surprise", 0.5), ("scores", 20.0)):
        holder = lossless if name == "surprise" else lossless.seen
        kept = getattr(holder, name)
        try:
            setattr(holder, name, kept + shift)
            row = next(r for r in rows_of(found, sets, judge) if r["decoder"] == "sjd:window=16,coupling=maximal")
            assert row["verdict"] == "REJECTED", name
        finally:
            setattr(holder, name, kept)


def test_intervals_are_corrected_for_the_number_of_sets(swept, judge):
    """With eight claims in the place of one every interval is wider."""
    _, _, sets, found, _ = swept
    name = "sjd:window=16,coupling=maximal"
    many = dict(found) | {f"copy {i}": found[name] for i in range(7)}
    few, wide = (next(r for r in rows_of(which, sets, judge) if r["decoder"] == name) for which in (found, many))
    for statistic in (SURPRISE, "CLIP score (colours) against AR"):
        low, high = few[f"{statistic} interval"]
        lower, higher = wide[f"{statistic} interval"]
        assert lower < low < high < higher


def test_what_was_measured_is_kept_and_used_again(swept, judge):
    pipe, chosen, sets, found, out = swept

    class Broken:
        def __getattr__(self, name):
            raise AssertionError("measured again")

    again = measure(Broken(), chosen, sets, judge, {}, forced=8)
    for name, measured in again.items():
        assert torch.equal(measured.seen.features, found[name].seen.features)
        assert np.array_equal(measured.surprise, found[name].surprise)
    assert not list(out.rglob(".*part*"))


def test_relaxed_rows_say_what_they_cost(rows):
    row = rows["sjd:window=16,acceptance=cool-sd:delta=4:nu=0"]
    assert row["TV per token"] > 0 and row["TV per token on AR's prefixes"] > 0 and not row["lossless"]
    assert order_of_relaxed(list(rows.values())) == [row["decoder"]]
    assert rows["ar"]["TV per token"] == 0 and "TV per token on AR's prefixes" not in rows["ar"]
    assert rows["ar"]["speedup"] == 1.0 and rows["sjd:window=16"]["tokens per pass"] > 1


def test_families_and_promises():
    names = {
        "ar": ("AR", "AR's own tokens"),
        "eagle:coupling=rejection": ("EAGLE", "AR's law"),
        "cool-sd:delta=2": ("COOL-SD, clamped", "relaxed"),
        "cool-sd:nu=0": ("uniform", "relaxed"),
        "cool-sd:budget=2": ("COOL-SD, budget", "relaxed"),
        "cool-sd-published": ("COOL-SD, published", "relaxed"),
        "grouped": ("GSD", "relaxed"),
    }
    for name, (family, promise) in names.items():
        strategy = arsd.parse_strategy(name)
        assert (family_of(strategy), promise_of(strategy)) == (family, promise)


# ---------------------------------------------------------------- tables and plots


def test_csv_has_everything_and_markdown_is_a_table(rows):
    table = to_csv(list(rows.values()))
    header = table.splitlines()[0].split(",")
    assert "KID (colours) low" in header and "KID (colours) high" in header and f'"{SURPRISE} low"' in table
    assert len(table.splitlines()) == len(rows) + 1
    lines = to_markdown(list(rows.values())).splitlines()
    assert len({line.count("|") for line in lines if line}) == 1 and "CLIP score (colours)" in lines[0]
    assert set(columns(list(rows.values()), brief=True)) < set(columns(list(rows.values())))


def test_a_biased_fid_carries_its_flag(judge, rows):
    row = {**rows["ar"], "FID biased": True}
    text = to_markdown([row])
    assert f"{number(row['FID (colours)'])}*" in text and "fewer pictures than features" in text
    assert "*" not in to_markdown([{**row, "FID biased": False}])


def test_figures_have_as_many_decimals_as_their_interval():
    assert with_interval({"x": 1.23456, "x interval": [1.2, 1.27]}, "x") == "1.235 (1.200, 1.270)"
    assert with_interval({"x": 12.3456, "x interval": [9.0, 15.0]}, "x") == "12.3 (9.0, 15.0)"
    assert with_interval({}, "x") == "" and number(None) == "" and number(float("nan")) == "" and number(0.12345) == "0.123"


def test_the_plot_is_drawn(rows, tmp_path):
    pytest.importorskip("matplotlib")
    plot_frontier(json.loads(json.dumps(list(rows.values()))), tmp_path / "f.png", "CLIP score (colours)", "title")
    from PIL import Image

    with Image.open(tmp_path / "f.png") as image:
        assert image.width > 600 and len(set(image.convert("L").tobytes())) > 10
