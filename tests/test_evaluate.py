"""``arsd evaluate``: folders and strategies judged as a user would, cards that say all, one line for every mistake."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_protocols import write_coco
from tiny_clip import saved_clip
from tiny_pipeline import CAPTIONS, TOKENS, saved, text_pipeline

from arsd.cli import main

WORDS = [word for names in CAPTIONS for word in names[0].split()]
PROMPTS = [names[0] for names in CAPTIONS] * 4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, a CLIP, prompts and real pictures."""
    folder = tmp_path_factory.mktemp("evaluate")
    saved(text_pipeline(), folder / "model")
    saved_clip(folder / "clip", WORDS)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    paint(folder / "real", 20, 0)
    return folder


def paint(folder, count, seed, side=8):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")


@pytest.fixture
def run(home, tmp_path, capsys, monkeypatch):
    """``run(...)`` in an empty folder gives (status, stdout, lines of stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        capsys.readouterr()
        try:
            status = main(["evaluate", *map(str, words)])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, [line for line in re.split(r"[\r\n]", err) if line.strip()]

    return call


def networks(home):
    return ("--features", f"clip:{home / 'clip'}", "--scorer", f"clip:{home / 'clip'}")


def strategies(home, *decoders):
    given = ("--model", home / "model", "--dtype", "float32", "--device", "cpu", "--prompts", home / "prompts.txt")
    return ("--decoders", *decoders, *given, "--reference", home / "real", *networks(home), "--batch", 4, "--chunk", 8)


def card_of(run, *words):
    status, out, err = run(*words, "--json")
    assert (status, err) == (0, []), err
    return json.loads(out)


# ---------------------------------------------------------------- strategies


def test_strategies_are_drawn_and_judged(run, home, tmp_path):
    card = card_of(run, *strategies(home, "ar", "sjd:window=5", "sjd:window=5,coupling=independent"), "--out", "o")
    assert card == json.loads((tmp_path / "o" / "card.json").read_text())
    rows = {row["decoder"]: row for row in card["rows"]}
    assert rows["sjd:window=5"]["verdict"] == "16 of 16 equal"
    label = card["features"]["name"]
    for row in rows.values():
        assert {f"FID ({label})", f"KID ({label})", f"precision ({label})", f"recall ({label})"} <= set(row)
        assert row["pictures"] == 16 and f"CLIP score ({label})" in row
        assert not row["FID biased"]
    drawing = card["drawing"]
    assert drawing["dtype"] == "float32" and drawing["batch"] == 4 and drawing["guidance_scale"] == 2.0
    assert len(drawing["inputs_sha256"]) == 64 and drawing["seeds"]["seed"] == 0 and drawing["image_format"] == "png"
    assert len(card["features"]["weights_sha256"]) == 64 and card["versions"]["torch"] == torch.__version__.split("+")[0]
    assert card["reference"]["pictures"] == 20 and len(card["reference"]["sha256"]) == 64
    with (tmp_path / "o" / "table.csv").open() as stream:
        assert [row["decoder"] for row in csv.DictReader(stream)] == list(rows)
    assert "| sjd:window=5 |" in (tmp_path / "o" / "table.md").read_text()


def test_a_stopped_evaluation_goes_on_to_the_same_table(run, home, tmp_path):
    words = strategies(home, "ar", "sjd:window=5")
    whole = card_of(run, *words, "--out", "whole")
    card_of(run, *words, "--out", "again")
    for path in list((tmp_path / "again").rglob("0000*.png"))[::3] + list((tmp_path / "again").rglob("seen-*.npz")):
        path.unlink()
    again = card_of(run, *words, "--out", "again")
    for first, second in zip(whole["rows"], again["rows"], strict=True):
        kept = [name for name in first if "seconds" not in name and name != "speedup"]
        assert {k: first[k] for k in kept} == {k: second[k] for k in kept}


def test_the_frontier_has_controls_and_a_plot(run, home, tmp_path):
    status, out, err = run("--frontier", *strategies(home, "sjd:window=5"), "--out", "o", "--forced", 0)
    assert status == 0, err
    card = json.loads((tmp_path / "o" / "card.json").read_text())
    assert [row["role"] for row in card["rows"]] == ["strategy", "strategy", "same-law", "hotter"]
    assert "frontier.png" in out and (tmp_path / "o" / "frontier.png").stat().st_size > 5000


def test_a_folder_of_another_run_is_refused_and_kept(run, home, tmp_path):
    card_of(run, *strategies(home, "ar"), "--out", "o")
    before = {path: path.read_bytes() for path in (tmp_path / "o").rglob("*.png")}
    status, _, err = run(*strategies(home, "ar"), "--out", "o", "--seed", 3)
    assert status == 2 and "run with another seed" in err[-1]
    assert before == {path: path.read_bytes() for path in (tmp_path / "o").rglob("*.png")}


def test_biased_fid_is_flagged(run, home):
    card = card_of(run, *strategies(home, "ar"), "--out", "o", "--pictures", 5)
    assert card["rows"][0]["FID biased"] and "fewer pictures than features (8)" in card["flags"][0]


# ---------------------------------------------------------------- folders


def test_folders_are_judged_and_paired(run, home, tmp_path):
    card_of(run, *strategies(home, "ar", "sjd:window=5", "sjd:window=5,coupling=maximal"), "--out", "o")
    folders = [tmp_path / "o" / name for name in ("ar", "sjd_window=5", "sjd_window=5_coupling=maximal")]
    card = card_of(run, *folders, *networks(home), "--reference", home / "real")
    first, same, other = card["rows"]
    assert same["identical pictures"] == 16 > other["identical pictures"]
    label = card["features"]["name"]
    assert same[f"cosine to the first ({label})"] == pytest.approx(1.0)
    assert same[f"CLIP score ({label}) against the first"] == 0.0
    assert same["tokens per pass"] > first["tokens per pass"] == 1.0
    assert first[f"FID ({label})"] == same[f"FID ({label})"]


def test_any_folder_of_pictures_will_do(run, home, tmp_path):
    paint(tmp_path / "a", 12, 1)
    np.savez(tmp_path / "b.npz", np.random.default_rng(2).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8))
    card = card_of(run, "a", "b.npz", *networks(home), "--reference", home / "real")
    assert [row["image format"] for row in card["rows"]] == ["png", "npz"]
    assert not any(name.startswith("CLIP score") for row in card["rows"] for name in row)  # there are no prompts
    (tmp_path / "p.txt").write_text("red apple\n" * 12)
    status, out, err = run("a", *networks(home), "--prompts", "p.txt")
    assert status == 0 and "CLIP score" in out, err


def test_published_statistics_take_the_place_of_pictures(run, home, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 8))
    np.savez(tmp_path / "stats.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    card = card_of(run, home / "real", *networks(home), "--stats", "stats.npz")
    row, label = card["rows"][0], card["features"]["name"]
    assert row[f"FID ({label})"] > 0 and f"KID ({label})" not in row and card["reference"]["statistics"]
    np.savez(tmp_path / "stats.npz", mu=np.zeros(9), sigma=np.eye(9))
    status, _, err = run(home / "real", *networks(home), "--stats", "stats.npz")
    assert status == 2 and "9 features" in err[-1]


def test_scores_of_different_networks_never_share_a_column(run, home, tmp_path):
    saved_clip(tmp_path / "other", WORDS, seed=1)
    names = []
    for clip in (home / "clip", tmp_path / "other"):
        card = card_of(run, home / "real", "--features", f"clip:{clip}", "--scorer", "none", "--reference", home / "real")
        names.append({name for name in card["rows"][0] if name.startswith("FID (")})
    assert names[0].isdisjoint(names[1])


def test_a_protocol_reads_the_users_files(run, home, tmp_path):
    """LANTERN's protocol on two pictures of COCO's layout; the prefix is in the card."""
    write_coco(tmp_path / "coco")
    paint(tmp_path / "coco" / "val2017", 9, 4, side=40)
    words = ("--protocol", "lantern", "--data", "coco", "--pictures", 2, "--decoders", "ar", "--out", "o")
    given = ("--model", home / "model", "--dtype", "float32", "--device", "cpu", *networks(home), "--batch", 2)
    status, out, err = run(*words, *given, "--json")
    assert status == 0 and len(err) == 1 and "does not know: Two, brown" in err[0], err
    card = json.loads(out)
    assert card["scorer"]["prefix"] == "A photo depicts " and card["resizer"] == "bicubic-256"
    assert card["protocol"]["name"] == "lantern" and card["reference"]["resizer"] == "bicubic-256-center"


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "words,says",
    [
        (("nowhere",), "does not exist"),
        (("--decoders", "sjd", "sjd"), "named twice"),
        (("--decoders", "magic"), "magic"),
        (("--protocol", "nobody"), "choose from"),
        (("--protocol", "lantern", "--decoders", "ar"), "download http"),
        (("--protocol", "sjd-parti", "--data", ".", "--decoders", "ar"), "download http"),
        (("--decoders", "ar", "--features", "vgg"), "no extractor"),
        (("--decoders", "ar", "--scorer", "vgg"), "no scorer"),
        (("--decoders", "ar", "--batch", "0"), "--batch must be at least 1"),
        (("--decoders", "ar", "--n", "-1"), "--n must be at least 1"),
        (("--decoders", "ar", "--pictures", "0"), "--pictures must be at least 1"),
        (("--decoders", "ar", "--forced", "-1"), "--forced"),
        (("--decoders", "ar", "--seed", "-1"), "seed must lie"),
        (("--decoders", "ar", "--prompts", "nowhere.txt"), "nowhere.txt"),
        (("x", "--decoders", "ar"), "not both"),
        (("--decoders", "ar", "--resizer", "huge"), "resizer"),
        (("--decoders", "ar", "--stats", "a.npz", "--reference", "b"), "not both"),
    ],
)
def test_a_mistake_is_one_line(run, home, words, says):
    where = () if "--features" in words or "--scorer" in words else networks(home)
    status, out, err = run(*words, *where)
    assert status == 2 and not out and len(err) == 1 and says in err[0], err


def test_prompts_that_do_not_fit_are_refused(run, home, tmp_path):
    (tmp_path / "p.txt").write_text("red apple\n")
    status, _, err = run(home / "real", "--prompts", "p.txt", *networks(home))
    assert status == 2 and "20 pictures" in err[-1] and "1 prompts" in err[-1]


def test_passes_are_counted_per_picture(run, home):
    card = card_of(run, *strategies(home, "sjd:window=5"), "--out", "o")
    row = next(row for row in card["rows"] if row["decoder"] == "sjd:window=5")
    low, high = row["tokens per pass interval"]
    assert 1 < low <= row["tokens per pass"] <= high <= TOKENS
