"""``arsd describe``: text for people, one JSON object for machines, one line and status 2 for mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from video_llms import clip, folder

import arsd
from arsd.cli.describe import clips_and_question
from arsd.errors import InputError

NEW = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return folder("llava-onevision", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Path]:
    from test_video_reading import animation, write

    path = tmp_path_factory.mktemp("clips")
    return [animation(path / "one.webp", clip(8, seed=1)), write(path / "two.mp4", clip(12, seed=2))]


@pytest.fixture
def describe(command, model):
    """(status, stdout, lines of stderr) of a call in float32, 24 tokens."""

    def call(*words):
        more = () if "--model" in words else ("--model", model)
        more += () if "--max-new-tokens" in words else ("--max-new-tokens", NEW)
        return command("describe", *words, *more, "--dtype", "float32")

    return call


@pytest.fixture(scope="module")
def texts(model, clips) -> list[str]:
    pipe = arsd.VideoLLMPipeline.from_pretrained(model)
    return [pipe(path, "What is it?", max_new_tokens=NEW).text for path in clips]


def test_the_text_and_a_line_of_figures_come_for_every_clip(describe, clips, texts):
    status, out, err = describe(*clips, "What is it?", "--compare", "--decoder", "sjd:window=4")
    assert status == 0 and not err
    for path, text in zip(clips, texts, strict=True):
        assert f"{path}:\n{text}\n\nsjd:window=4: {NEW} tokens in " in out
    assert out.count("ar: 24 tokens in 24 passes") == 2 and out.count("the same text") == 2
    assert "8 frames, 33 visual tokens" in out and "12 frames, 49 visual tokens" in out
    _, alone, _ = describe(clips[0], "What is it?")
    assert describe(clips[0], "--question", "What is it?")[1].startswith(texts[0])
    assert alone.startswith(texts[0] + "\n\nar: 24 tokens in 24 passes (1.00 tokens/pass)") and "same" not in alone


def test_json_holds_the_same_and_nothing_else_is_printed(describe, clips, texts):
    status, out, err = describe(
        *clips, "What is it?", "--json", "--compare", "--decoder", "sjd:window=4", "--num-frames", 99
    )
    report = json.loads(out)
    assert status == 0 and not err and [entry["text"] for entry in report["clips"]] == texts
    assert (report["decoder"], report["lossless"], report["question"]) == ("sjd:window=4", True, "What is it?")
    for entry, path, frames in zip(report["clips"], clips, (8, 12), strict=True):
        assert entry["path"] == str(path) and entry["num_frames"] == frames and entry["num_visual_tokens"] == 4 * frames + 1
        assert entry["tokens"] == NEW and 0 < entry["seconds_prefill"] < entry["seconds"]
        assert entry["tokens_per_pass"] == pytest.approx(NEW / entry["forward_passes"])
        assert entry["ar"]["same_text"] is True and entry["ar"]["forward_passes"] == NEW


def test_seeds_and_sampling_options_are_those_of_the_pipeline(describe, clips, model):
    pipe = arsd.VideoLLMPipeline.from_pretrained(model)
    drawn = json.loads(describe(clips[0], "--json", "--temperature", 1.4, "--top-k", 0, "--seed", 5, "--fps", 5)[1])
    options = {"do_sample": True, "temperature": 1.4, "top_k": 0, "seed": 5, "fps": 5, "max_new_tokens": NEW}
    assert drawn["clips"][0]["text"] == pipe(clips[0], **options).text and drawn["clips"][0]["num_frames"] == 4
    other = json.loads(describe(clips[0], "--json", "--sample", "--seed", 6, "--top-k", 0)[1])
    assert other["clips"][0]["text"] == pipe(clips[0], do_sample=True, seed=6, top_k=0, max_new_tokens=NEW).text


def test_the_last_word_is_a_question_where_it_is_no_file(tmp_path):
    here = tmp_path / "a.mp4"
    here.touch()
    path = str(here)
    assert clips_and_question([path], None) == ([path], "Describe the clip.")
    for asked in ("What?", "Describe", "Is it from v1.2 of a.mp4", "really..."):
        assert clips_and_question([path, path, asked], None) == ([path, path], asked)
    missing = [["b.mp4"], [path, "b.mp4"], ["b c", path], [""]]
    for words, question in (*((words, None) for words in missing), ([path, "What?"], "Why?")):
        with pytest.raises(InputError, match="there is no file"):
            clips_and_question(words, question)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none.mp4",), "there is no file 'none.mp4'"),
        (("CLIP", "--num-frames", 0), "num_frames"),
        (("CLIP", "--fps", -1), "fps"),
        (("CLIP", "--max-new-tokens", 0), "max_new_tokens"),
        (("CLIP", "--temperature", 0), "temperature"),
        (("CLIP", "--top-p", 2), "top_p"),
        (("CLIP", "--sample", "--seed", -1), "seed"),
        (("CLIP", "--decoder", "quick"), "unknown decoder"),
        (("CLIP", "--model", "none"), "no Video-LLM 'none'"),
        (("CLIP", "--model", "emoji-128"), "AutoARPipeline"),
        (("CLIP", "--threads", 0), "--threads"),
        (("CLIP", "--device", "moon"), "device 'moon'"),
        (("CLIP", ""), "question"),
        (("BROKEN",), "cannot be read as a video"),
    ],
)
def test_mistakes_are_one_line_and_status_2(describe, clips, tmp_path, words, message):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all" * 40)
    status, out, err = describe(*[{"CLIP": clips[0], "BROKEN": broken}.get(word, word) for word in words])
    assert status == 2 and not out and len(err) == 1 and message in err[0] and err[0].startswith("arsd: ")
