"""Sets of clips: read from anywhere, judged, put on a card; and ``arsd evaluate --video`` as a user runs it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from moving_clips import Stub, moving, noise, save, save_frames, script
from PIL import Image
from tiny_clip import Colours, saved_clip

from arsd.errors import DataError, InputError
from arsd.metrics import Statistics, frechet_distance, kernel_distance, video
from arsd.metrics.images import Resizer
from arsd.metrics.resampling import bootstrap_mean
from arsd.metrics.video import FrameFeatures, I3DFeatures
from arsd.metrics.video_card import make_video_card, video_cells, video_columns, video_markdown
from arsd.metrics.video_clips import Clips, FramePick
from arsd.metrics.video_frames import MOVED, Changes, Consistency
from arsd.metrics.video_judge import VideoJudge, judge_clips


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> Path:
    return script(Stub(), tmp_path_factory.mktemp("i3d") / "i3d_torchscript.pt")


# ---------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".apng", "", ".mp4"])
def test_clips_are_read_from_files_and_folders_of_frames(tmp_path, suffix):
    made = [moving(seed, frames=11) for seed in range(3)]
    for name, clip in zip(("b", "c", "a"), made, strict=True):
        if suffix == ".mp4":
            pytest.importorskip("av")
            from arsd.clip_files import mp4_bytes

            (tmp_path / f"{name}.mp4").write_bytes(mp4_bytes([Image.fromarray(frame) for frame in clip], 20))
        else:
            save(clip, tmp_path / f"{name}{suffix}") if suffix else save_frames(clip, tmp_path / name)
    (tmp_path / ".hidden.webp").write_text("x")
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    found = Clips.open(tmp_path, FramePick(5))
    assert found.names == [f"{name}{suffix}" for name in "abc"] and found.format == (suffix[1:] or "frames")
    for clip, whole in zip(sum(found.batches(2), []), [made[2], made[0], made[1]], strict=True):
        wanted = whole[[0, 2, 5, 8, 10]]
        assert clip.frames.shape == wanted.shape
        assert np.abs(clip.frames.astype(int) - wanted).mean() < {".mp4": 10, ".gif": 2}.get(suffix, 1e-9)
        assert clip.rate == (None if not suffix else pytest.approx(20 * 4 / 10))
    first = Clips.open(tmp_path, FramePick(5, "first"), limit=1)
    assert len(first) == 1 and np.abs(first[0].frames.astype(int) - made[2][:5]).mean() < 10
    assert first[0].rate == (None if not suffix else pytest.approx(20))
    if suffix:
        slow = Clips.open(tmp_path, FramePick(4, "first", fps=10))[0]
        assert slow.rate == pytest.approx(10, rel=0.1) and len(slow.frames) == 4
    assert len(Clips.open(tmp_path, FramePick(None))[0].frames) == 11


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".apng"])
def test_equal_frames_that_writers_merge_are_counted(tmp_path, suffix):
    whole = np.repeat(np.array([10, 10, 10, 200, 200, 30], np.uint8), 64 * 3).reshape(6, 8, 8, 3)
    save(whole, tmp_path / f"a{suffix}")
    clip = Clips.open(tmp_path / f"a{suffix}", FramePick(6))[0]
    assert np.array_equal(clip.frames, whole) and clip.rate == pytest.approx(20)
    save(whole[:3], tmp_path / f"a{suffix}")
    clip = Clips.open(tmp_path / f"a{suffix}", FramePick(6))[0]
    assert np.array_equal(clip.frames, whole[:1].repeat(6, 0)) and clip.rate is None


def test_an_npz_of_clips_is_read(tmp_path):
    rows = np.stack(noise(4, frames=5))
    np.savez(tmp_path / "a.npz", rows)
    found = Clips.open(tmp_path / "a.npz", FramePick(3), limit=2)
    assert found.format == "npz" and len(found) == 2 and np.array_equal(found[1].frames, rows[1, [0, 2, 4]])
    np.savez(tmp_path / "a.npz", rows[0])
    (tmp_path / "b.npz").write_text("x")
    for name in "ab":
        with pytest.raises(DataError, match=r"give uint8 \[N, T, H, W, 3\]"):
            Clips.open(tmp_path / f"{name}.npz")


def test_sources_that_hold_no_clips_are_refused_in_one_line(tmp_path):
    save_frames(noise()[0], tmp_path / "still" / "clip")
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    (tmp_path / "text.txt").write_text("x")
    wrong = {"nowhere": "does not exist", "empty": "holds no clips", "text.txt": "no set of clips"}
    for name, says in (wrong | {"still/clip": "holds pictures, not clips: give the folder above"}).items():
        with pytest.raises(DataError, match=says) as caught:
            Clips.open(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    save(moving(0), tmp_path / "broken" / "a.webp")
    (tmp_path / "broken" / "a.webp").write_bytes((tmp_path / "broken" / "a.webp").read_bytes()[:300])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.mp4").write_bytes(b"not a video" * 40)
    for folder, name in (("broken", "a.webp"), ("other", "a.mp4")):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            Clips.open(tmp_path / folder)[0]
    with pytest.raises(DataError, match=r"clip has 6 frames, 7 are looked at: ask for fewer"):
        Clips.open(tmp_path / "still", FramePick(7))[0]
    for wrong_pick in ({"num_frames": 0}, {"pick": "random"}, {"fps": 8.0}, {"pick": "first", "fps": -1.0}):
        with pytest.raises(InputError):
            FramePick(**wrong_pick)
    with pytest.raises(InputError, match="limit"):
        Clips.open(tmp_path / "still", limit=0)


# ------------------------------------------------------------------------------------------------------------ judge


@pytest.fixture
def sets(tmp_path) -> tuple[Path, Path]:
    """Real clips, as files; and others, of which the first is real."""
    for seed in range(9):
        save(moving(seed, frames=10), tmp_path / "real" / f"{seed}.webp")
        save_frames(moving(seed if seed == 0 else seed + 50, frames=10), tmp_path / "made" / f"{seed}")
    return tmp_path / "real", tmp_path / "made"


class Brightness(Colours):
    """A score that depends on picture and prompt."""

    name = "brightness"

    def score(self, pictures, prompts, prefix=None):
        return super().score(pictures, prompts) + torch.tensor([float(len(prefix or "") + len(text)) for text in prompts])


def test_figures_are_those_of_each_clip_put_together(sets):
    real, made = sets
    judge = VideoJudge(FrameFeatures(Colours()), Colours(), Brightness(), FramePick(8), prefix="a ")
    judge.set_reference(real)
    prompts = [f"{'x' * i}" for i in range(9)]
    same, row = judge_clips([real, made], judge, prompts)
    fake = [clip.frames for clip in sum(Clips.open(made, FramePick(8)).batches(4), [])]
    true = [clip.frames for clip in sum(Clips.open(real, FramePick(8)).batches(4), [])]
    features = [FrameFeatures(Colours()).features(some) for some in (true, fake)]
    label = "frames of colours"
    assert row[f"Frechet video distance ({label})"] == pytest.approx(frechet_distance(*features), rel=1e-9)
    distance = kernel_distance(*features)
    assert row[f"kernel video distance ({label})"] == pytest.approx(distance.value)
    assert row[f"kernel video distance ({label}) interval"] == pytest.approx([distance.low, distance.high])
    assert same[f"Frechet video distance ({label})"] == pytest.approx(0, abs=1e-9)
    assert "identical clips" not in same and row["identical clips"] == 1
    each = [np.mean([frame.mean() / 2.55 + 2 + i for frame in clip]) for i, clip in enumerate(fake)]
    assert row["CLIP score (brightness)"] == pytest.approx(np.mean(each), rel=1e-5)
    interval = bootstrap_mean(np.array(each))
    assert row["CLIP score (brightness) interval"] == pytest.approx([interval.low, interval.high], rel=1e-4)
    for name in ("flicker", "motion", "loop_gap"):
        values = [getattr(Changes.of(clip), name) for clip in fake]
        assert row[name.replace("_", " ")] == pytest.approx(np.mean(values))
    seen = [Consistency.seen_by(Colours(), clip) for clip in fake]
    assert row["consistency (colours)"] == pytest.approx(np.mean([one.subject for one in seen]))
    assert row["cosine to the frame before (colours)"] == pytest.approx(np.mean([one.before for one in seen]))
    assert row["cosine to the first frame (colours)"] == pytest.approx(np.mean([one.first for one in seen]))
    assert (row["clips"], row["frames"], row["size"], row["clip format"]) == (9, "8", "24x24", "frames")
    assert same["frames per second"] == pytest.approx(20 * 7 / 9) and row["frames per second"] is None
    about = judge.reference_about
    assert about["figures"]["flicker"] == same["flicker"] and about["clips"] == 9 and len(about["sha256"]) == 64


def test_the_card_says_what_the_figures_depend_on(sets, stub, monkeypatch):
    real, made = sets
    judge = VideoJudge(I3DFeatures(stub), Colours(), None, FramePick(9, "first"))
    judge.set_reference(real)
    card = json.loads(json.dumps(make_video_card(judge, judge_clips([made], judge), note="mine")))
    assert card["features"]["weights_sha256"] == judge.features._hash and card["consistency"]["name"] == "colours"
    assert card["pick"] == {"num_frames": 9, "pick": "first", "fps": None, "name": "first-9"}
    assert card["reference"]["clip format"] == "webp" and card["motion_threshold"] == MOVED and card["note"] == "mine"
    assert card["kind"] == "clips" and card["versions"]["torch"] and card["scorer"] is None and card["resizer"] == "none"
    assert [flag.split(":")[0] for flag in card["flags"]] == [
        "the distance of 1 rows is biased",
        "the I3D is not the published file",
    ]
    assert card["rows"][0]["distance biased"]
    text = video_markdown(card)
    assert text.count("*") == 2 and f"| FVD ({judge.features.name}) |" in text and "real (reference)" in text
    monkeypatch.setattr(video, "I3D_SHA256", judge.features._hash)
    assert make_video_card(judge, card["rows"])["flags"] == card["flags"][:1]


def test_flags_name_still_clips_and_rates_that_differ(tmp_path):
    for seed in range(3):
        save(moving(seed), tmp_path / "real" / f"{seed}.webp", duration=50)
        save(moving(seed), tmp_path / "fast" / f"{seed}.webp", duration=40)
        save(moving(seed)[:1] if seed else moving(seed), tmp_path / "still" / f"{seed}.webp", duration=52)
    judge = VideoJudge(FrameFeatures(Colours()), None, None, FramePick(4))
    judge.set_reference(tmp_path / "real")
    rows = judge_clips([tmp_path / "real", tmp_path / "fast", tmp_path / "still"], judge)
    flags = [flag for flag in make_video_card(judge, rows)["flags"] if "biased" not in flag]
    assert len(flags) == 2 and "fast is looked at with 8.33 frames per second, the reference with 6.67" in flags[0]
    assert "2 clips of" in flags[1] and "never move" in flags[1] and rows[2]["still clips"] == 2
    assert [row.get("identical clips") for row in rows] == [None, 3, 1]


def test_distances_are_unflagged_from_as_many_clips_as_features_on(sets):
    real, made = sets
    for limit, biased in ((5, True), (6, False)):  # of 6 features
        judge = VideoJudge(FrameFeatures(Colours()), None, None, FramePick(4))
        judge.set_reference(real)
        (row,) = rows = judge_clips([made], judge, limit=limit)
        assert row["distance biased"] is biased and row["clips"] == limit
        names = video_columns(rows)
        assert any(cell.endswith("*") for cell in video_cells(rows, names)[0]) is biased


def test_statistics_take_the_place_of_real_clips(sets, tmp_path):
    real, made = sets
    judge = VideoJudge(FrameFeatures(Colours()), None, None, FramePick(8))
    judge.set_reference(real)
    wanted = judge_clips([made], judge)[0]
    Statistics.of(judge.reference).save(tmp_path / "stats.npz")
    judge.set_reference(tmp_path / "stats.npz")
    row = judge_clips([made], judge)[0]
    name = "Frechet video distance (frames of colours)"
    assert row[name] == pytest.approx(wanted[name], rel=1e-6) and "kernel video distance (frames of colours)" not in row
    Statistics.of(torch.randn(9, 5)).save(tmp_path / "other.npz")
    with pytest.raises(InputError, match="statistics of 5 features"):
        judge.set_reference(tmp_path / "other.npz")


def test_frames_are_resized_before_they_are_looked_at(sets):
    real, _ = sets
    resizer = Resizer(8, "box")
    judge = VideoJudge(FrameFeatures(Colours()), Colours(), None, FramePick(4), resizer)
    (row,) = judge_clips([real], judge, limit=2)
    small = [
        np.stack([resizer(frame) for frame in clip.frames]) for clip in next(Clips.open(real, FramePick(4), 2).batches(2))
    ]
    assert row["flicker"] == pytest.approx(np.mean([Changes.of(clip).flicker for clip in small]))
    assert row["consistency (colours)"] == pytest.approx(np.mean([Consistency.seen_by(Colours(), c).subject for c in small]))
    seen = judge.look(judge.open(real, 2))
    assert torch.allclose(seen.features, FrameFeatures(Colours()).features(small)) and row["size"] == "24x24"
    assert judge.describe()["resizer"] == "box-8"


def test_clips_and_extractor_must_fit(sets, stub, tmp_path):
    real, made = sets
    with pytest.raises(InputError, match="needs 9 frames of a clip, not 8"):
        VideoJudge(I3DFeatures(stub), pick=FramePick(8))
    save_frames(moving(0, frames=5), tmp_path / "short" / "a")
    with pytest.raises(DataError, match="short: a has 5 frames, I3D .* needs 9"):
        judge_clips([tmp_path / "short"], VideoJudge(I3DFeatures(stub), pick=FramePick(None)))
    judge = VideoJudge(FrameFeatures(Colours()), pick=FramePick(5))
    with pytest.raises(InputError, match="9 clips in .*, and 2 prompts"):
        judge_clips([real], judge, ["a", "b"])
    with pytest.raises(InputError, match="has one clip"):
        judge.set_reference(tmp_path / "short")
    judge.set_reference(real)
    with pytest.raises(InputError, match="a distance needs two clips"):
        judge_clips([tmp_path / "short"], judge)


# ---------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def evaluate(command, sets, tmp_path, monkeypatch):
    """``evaluate(...)`` of small networks, where the sets are, gives (status, stdout, lines of stderr)."""
    monkeypatch.chdir(tmp_path)
    clip = f"clip:{saved_clip(tmp_path / 'clip', ['red', 'square'])}"
    usual = ("--video", "--features", f"frames:{clip}", "--scorer", clip, "--consistency", clip, "--num-frames", 8)
    return lambda *words: command("evaluate", *usual, *words)


def test_the_command_prints_a_table_and_writes_the_card(evaluate, tmp_path):
    (tmp_path / "p.txt").write_text("a red square\n" * 9)
    words = ("made", "real", "--reference", "real", "--prompts", "p.txt")
    status, out, err = evaluate(*words, "--out", "o")
    assert status == 0, err
    lines = out.splitlines()
    assert "Frechet video distance (frames of CLIP" in lines[0] and "flicker" in lines[0] and "motion" in lines[0]
    assert [line.split()[0] for line in lines[2:5]] == ["made", "real", "real"] and "(reference)" in lines[4]
    card = json.loads((tmp_path / "o" / "card.json").read_text())
    assert [row["folder"] for row in card["rows"]] == ["made", "real"] and card["pick"]["name"] == "even-8"
    label = card["features"]["name"]
    assert card["rows"][0][f"Frechet video distance ({label})"] > 0.0
    assert card["rows"][1][f"Frechet video distance ({label})"] == pytest.approx(0, abs=1e-9)
    assert card["rows"][1]["identical clips"] == 1 and f"CLIP score ({card['scorer']['name']})" in card["rows"][0]
    with (tmp_path / "o" / "table.csv").open() as stream:
        assert [row["folder"] for row in csv.DictReader(stream)] == ["made", "real"]
    assert "| made |" in (tmp_path / "o" / "table.md").read_text()
    status, out, err = evaluate(*words, "--json")
    assert (status, err) == (0, []) and json.loads(out) == card


def test_the_command_computes_fvd_with_the_file_of_the_user(evaluate, stub):
    words = ("made", "--reference", "real", "--features", f"i3d:{stub}", "--pick", "first", "--consistency", "none")
    status, out, err = evaluate(*words, "--num-frames", 9, "--scorer", "none", "--json")
    assert (status, err) == (0, [])
    card = json.loads(out)
    (row,) = card["rows"]
    assert row[f"FVD ({card['features']['name']})"] > 0 and card["consistency"] is None and card["scorer"] is None
    assert card["pick"]["name"] == "first-9" and not any(name.startswith(("cosine", "CLIP")) for name in row)
    status, out, err = evaluate("made", "--num-frames", 0, "--pictures", 3, "--json")
    assert status == 0 and json.loads(out)["pick"]["name"] == "even-all" and json.loads(out)["rows"][0]["clips"] == 3


@pytest.mark.parametrize(
    "words,says",
    [
        (("nowhere",), "nowhere does not exist"),
        (("made", "--reference", "nowhere"), "nowhere does not exist"),
        (("made/0",), "give the folder above it"),
        (("made", "--num-frames", 16), "0 has 10 frames, 16 are looked at"),
        (("made", "--num-frames", 1), "needs 2 frames of a clip, not 1"),
        (("made", "--num-frames", -1), "--num-frames must not be negative"),
        (("made", "--features", "inception"), "no extractor of clips 'inception'"),
        (("made", "--features", "i3d:nowhere.pt"), "there is no file nowhere.pt: download http"),
        (("made", "--consistency", "i3d:x"), "no extractor 'i3d:x'"),
        (("made", "--fps", 4), "goes with the first frames"),
        (("made", "--prompts", "two.txt"), "9 clips in made, and 2 prompts"),
        (("made", "--protocol", "lantern"), "--protocol is about pictures"),
        (("made", "--stats", "a.npz", "--reference", "real"), "--reference or --stats, not both"),
        ((), "no clips were given"),
        (("--decoders", "ar"), "--decoders is about pictures"),
    ],
)
def test_a_mistake_is_one_line(evaluate, tmp_path, words, says):
    (tmp_path / "two.txt").write_text("red\nred\n")
    status, out, err = evaluate(*words)
    said = [line for line in err if "clips/s]" not in line]
    assert status == 2 and not out and len(said) == 1 and said[0].startswith("arsd: ") and says in said[0], err


def test_options_of_clips_need_clips(command):
    for words in (("--num-frames", 4), ("--pick", "even"), ("--consistency", "none"), ("--fps", 3)):
        status, _, err = command("evaluate", "x", *words)
        assert status == 2 and f"{words[0]} is about clips: pass --video" in err[-1]
