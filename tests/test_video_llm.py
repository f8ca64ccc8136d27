"""``VideoLLMPipeline``: clip and question to the text that ``generate`` gives, for seven families, in pieces and batches."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import video_llms
from video_llms import KINDS, clip, folder, inputs, tiny

import arsd
from arsd.decoding import Autoregressive
from arsd.errors import InputError
from arsd.models.visual import text_config, visual_ids, visual_mask
from arsd.pipelines.video_llm import VideoLLMOutput, VideoLLMPipeline
from arsd.pipelines.video_parts import Pieces, said

NEW, ASKED = 40, ["What?", "What is seen here, and then?"]


pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(params=KINDS)
def pipe(request) -> VideoLLMPipeline:
    pipe = VideoLLMPipeline(*tiny(request.param))
    pipe.kind = request.param  # type: ignore[attr-defined]
    return pipe


@pytest.fixture
def one() -> VideoLLMPipeline:
    return VideoLLMPipeline(*tiny("llava-onevision"))


def plain(kind: str, videos: list[np.ndarray], questions: list[str], **options: Any) -> tuple[torch.Tensor, list[str]]:
    """New tokens and texts of ``model.generate`` itself."""
    model, processor = tiny(kind)
    fed = inputs(kind, videos, questions)
    new = model.generate(**fed, **{"max_new_tokens": NEW, "do_sample": False, **options})[:, fed["input_ids"].shape[1] :]
    return new, [said(processor.tokenizer, row) for row in new]


# --------------------------------------------------------------------------------------------------- the text is generate's


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [8, 64])
@pytest.mark.parametrize("strategy", ["ar", "sjd:window=6"])
def test_generate_fn_gives_what_generate_gives_for_batches_of_clips(kind: str, frames: int, strategy: str):
    """The 64 frames take more positions than a row of the picture: text behind them goes on from where ``generate`` does."""
    model, _ = tiny(kind)
    fed = inputs(kind, [clip(frames, seed=1), clip(frames, seed=2)], ASKED)
    lengths = fed["attention_mask"].sum(1)
    assert lengths[0] < lengths[1] == fed["input_ids"].shape[1], "no padding: the test shows less"
    options = {"max_new_tokens": NEW, "do_sample": False}
    own = model.generate(**fed, **options)
    assert torch.equal(model.generate(**fed, **options, custom_generate=arsd.generate_fn(strategy)), own)


def test_the_text_is_that_of_generate_and_depends_on_the_clip(pipe):
    videos = [clip(8, seed=1), clip(8, seed=2)]
    texts = []
    for video in videos:
        for decoder in (None, "sjd:window=5"):
            out = pipe(video, ASKED[1], source_fps=video_llms.FPS, max_new_tokens=NEW, decoder=decoder)
            tokens, (text,) = plain(pipe.kind, [video], [ASKED[1]])
            assert torch.equal(out.tokens, tokens) and out.text == text
        texts.append(out.text)
        ids = inputs(pipe.kind, [video], [ASKED[1]])["input_ids"]
        assert out.num_visual_tokens == int(visual_mask(pipe.model.config, ids).sum()) >= 16 and out.num_frames == 8
        assert out.stats.tokens == [NEW] and out.seconds >= out.stats.total_seconds > 0
        assert len(set(out.tokens[0].tolist())) > 10, "a loop: the test shows little"
    assert texts[0] != texts[1]


def test_a_batch_gives_every_row_what_it_gets_alone(pipe):
    videos = [clip(8, seed=1), clip(8, seed=2)]
    options = {"source_fps": video_llms.FPS, "max_new_tokens": NEW}
    out = pipe(videos, ASKED, **options)
    tokens, texts = plain(pipe.kind, videos, ASKED)
    assert torch.equal(out.tokens, tokens) and out.text == texts and out.num_frames == [8, 8]
    assert out.text == [pipe(video, asked, **options).text for video, asked in zip(videos, ASKED, strict=True)]
    for given in ((videos, ASKED[0]), (videos[:1], ASKED), (videos[0], ASKED), (videos[:1], ASKED[0])):
        both = pipe(*given, **options)
        rows = max(len(given[0]) if isinstance(given[0], list) else 1, len(given[1]) if isinstance(given[1], list) else 1)
        assert isinstance(both.text, list) and len(both.text) == rows
    assert pipe(videos[0], ASKED, **options).text[1] == pipe(videos[0], ASKED[1], **options).text


def test_clips_of_other_lengths_share_a_batch_where_the_processor_can(pipe):
    videos, options = [clip(8, seed=1), clip(4, seed=2)], {"source_fps": video_llms.FPS, "max_new_tokens": NEW}
    if pipe.kind.startswith("qwen"):
        out = pipe(videos, ASKED, **options)
        assert out.text == [pipe(video, asked, **options).text for video, asked in zip(videos, ASKED, strict=True)]
        assert out.num_frames == [8, 4] and out.num_visual_tokens[0] > out.num_visual_tokens[1]
    else:
        with pytest.raises(InputError, match="pass num_frames"):
            pipe(videos, ASKED, **options)
        assert pipe(videos, ASKED, num_frames=4, **options).num_frames == [4, 4]


def test_pieces_are_the_text_and_come_while_decoding_goes_on(pipe):
    video, options = clip(8, seed=3), {"source_fps": video_llms.FPS, "max_new_tokens": NEW}
    out = pipe(video, **options)
    for decoder in ("ar", "sjd:window=6"):
        pieces: list[str] = []
        assert pipe(video, stream=pieces.append, decoder=decoder, **options).text == out.text == "".join(pieces)
        assert len(pieces) > NEW // 4
        assert list(pipe.stream(video, decoder=decoder, **options)) == pieces

    def told():
        yield (yield from pipe.stream(video, **options))

    *pieces, last = told()
    assert "".join(pieces) == out.text == last.text and isinstance(last, VideoLLMOutput)


@pytest.mark.parametrize("frames", [1, 2, 3, 7])
def test_odd_numbers_of_frames_and_single_ones_are_shown_too(pipe, frames: int):
    out = pipe(clip(frames, seed=4), source_fps=4, max_new_tokens=4)
    assert out.num_visual_tokens > 0 and out.num_frames in (frames, 2)


# -------------------------------------------------------------------------------------------------------------- sampling


def test_a_seed_fixes_what_is_drawn_under_every_seed_exact_decoder(pipe):
    video, options = clip(8, seed=5), {"source_fps": video_llms.FPS, "max_new_tokens": NEW, "do_sample": True}
    first = pipe(video, seed=3, **options).text
    assert first == pipe(video, seed=3, decoder="sjd:window=7", **options).text != pipe(video, seed=4, **options).text
    drawn = [pipe(video, generator=torch.Generator().manual_seed(7), **options).text for _ in range(2)]
    assert drawn[0] == drawn[1] != first
    both = pipe([video, video], seed=3, **options).text
    assert both[0] == first != both[1], "the first row of a batch is the row of a single call, and the others draw apart"


def test_sampling_options_reach_the_law(one):
    video, options = clip(8, seed=5), {"max_new_tokens": NEW, "do_sample": True, "seed": 1}
    greedy = one(video, max_new_tokens=NEW).text
    assert one(video, top_k=1, **options).text == one(video, top_p=1e-6, **options).text == greedy
    assert one(video, temperature=1e-3, **options).text == greedy != one(video, temperature=2.0, **options).text
    assert one(video, temperature=0.8, top_k=0, top_p=0.9, **options).text != one(video, top_k=0, **options).text


def test_options_of_generate_are_those_of_generate(one):
    video, more = clip(8, seed=2), {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2}
    out = one(video, ASKED[1], max_new_tokens=NEW, **more)
    tokens, (text,) = plain("llava-onevision", [video], [ASKED[1]], **more)
    assert torch.equal(out.tokens, tokens) and out.text == text != one(video, ASKED[1], max_new_tokens=NEW).text
    end = int(out.tokens[0, 9])
    early = one(video, ASKED[1], max_new_tokens=NEW, eos_token_id=end, **more)
    assert early.stats.tokens == [1 + out.tokens[0].tolist().index(end)] and out.text.startswith(early.text)


def test_a_system_message_goes_before_the_question(one, monkeypatch):
    heard = []
    real = one.processor.apply_chat_template
    monkeypatch.setattr(one.processor, "apply_chat_template", lambda asked, **how: heard.append(asked) or real(asked, **how))
    one(clip(), "What?", system="Be brief.", max_new_tokens=1)
    assert [message["role"] for message in heard[0][0]] == ["system", "user"]


# --------------------------------------------------------------------------------------------------------- clips on disk


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> Path:
    from test_video_reading import write

    return write(tmp_path_factory.mktemp("clips") / "ramp.mp4", clip(90, seed=6))


def test_a_video_file_is_shown_as_the_model_is_used_to(pipe, mp4):
    """90 frames, 10 a second."""
    own = pipe.processor.video_processor
    default = {"smolvlm": 9, "qwen3-vl": 18}.get(pipe.kind, 32)
    out = pipe(mp4, max_new_tokens=8)
    assert out.num_frames == default, (own.fps, own.num_frames)
    for options, frames in (
        ({"num_frames": 8}, 8),
        ({"fps": 2}, 18),
        ({"fps": 2, "num_frames": 6}, 6),
        ({"num_frames": 500}, 90),
    ):
        assert pipe(str(mp4), max_new_tokens=1, **options).num_frames == frames, options
    frames, told = arsd.video.read_video(mp4, 8)
    prompt = pipe.processor.tokenizer.decode(pipe._processed([(frames, told, "What?")], None)["input_ids"][0])
    if pipe.kind == "qwen3-vl":  # the mean of each pair of frames: 0 and 13, 25 and 38, ...
        assert "<0.7 seconds>" in prompt and "<8.2 seconds>" in prompt
    if pipe.kind == "smolvlm":
        assert "Frame from 00:00:" in prompt and "Frame from 00:08:" in prompt and "0:00:09" in prompt


def test_files_of_every_sort_and_frames_in_memory_are_the_same_clip(tmp_path, one):
    from PIL import Image
    from test_video_reading import animation

    video = clip(6, seed=8)
    pictures = [Image.fromarray(frame) for frame in video]
    for i, picture in enumerate(pictures):
        (tmp_path / "folder").mkdir(exist_ok=True)
        picture.save(tmp_path / "folder" / f"{i}.png")
    animation(tmp_path / "clip.webp", video)
    sources = [
        video,
        torch.from_numpy(video).permute(0, 3, 1, 2),
        pictures,
        tmp_path / "folder",
        str(tmp_path / "clip.webp"),
    ]
    texts = {one(source, max_new_tokens=NEW).text for source in sources}
    assert len(texts) == 1
    assert one(sources[:3], max_new_tokens=NEW).text == [texts.pop()] * 3


# -------------------------------------------------------------------------------------------------------------- the object


def test_a_saved_folder_gives_the_same_text_in_transformers_and_here(pipe, tmp_path):
    pipe.decoder = "sjd:window=4"
    pipe.save_pretrained(tmp_path)
    again = VideoLLMPipeline.from_pretrained(tmp_path)
    video = clip(8, seed=9)
    options = {"source_fps": video_llms.FPS, "max_new_tokens": NEW}
    assert again(video, **options).text == pipe(video, **options).text
    assert str(again.decoder) == "sjd:window=4" and again.dtype == torch.float32
    assert type(transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)) is type(pipe.model)


def test_it_moves_casts_and_shows_itself(tmp_path):
    pipe = arsd.VideoLLMPipeline.from_pretrained(
        folder("qwen2.5-vl", tmp_path), dtype=torch.bfloat16, decoder="sjd:window=3"
    )
    assert (
        pipe.dtype == torch.bfloat16 and pipe.device.type == "cpu" and isinstance(pipe(clip(), max_new_tokens=3).text, str)
    )
    assert pipe.to(torch.float64) is pipe and pipe.dtype == torch.float64
    for part in ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor", "sjd:window=3", "cpu", "float64"):
        assert part in repr(pipe)
    pipe.decoder = None
    assert isinstance(pipe.decoder, Autoregressive)
    assert VideoLLMPipeline.from_pretrained(tmp_path, torch_dtype="float16").dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_seconds_between_frames_keep_their_precision_in_every_dtype(dtype: torch.dtype, tmp_path):
    """7 frames of 30 a second: positions would move if the time between frames were rounded with the pixels."""
    pipe = VideoLLMPipeline.from_pretrained(folder("qwen2.5-vl", tmp_path)).to(dtype)
    made = pipe._prompt(clip(7), "What?", (None, None, 30.0), None)[0]
    assert made["second_per_grid_ts"].dtype != torch.bfloat16 and made["pixel_values_videos"].dtype == dtype


def test_visual_tokens_are_known_by_their_ids():
    for kind in KINDS:
        model, processor = tiny(kind)
        ids = inputs(kind, [clip(8)], ["What?"])["input_ids"]
        marks = {"smolvlm": "<image>", "internvl": "<IMG_CONTEXT>"}.get(
            kind, "<|video_pad|>" if "qwen" in kind else "<video>"
        )
        mark = processor.tokenizer.convert_tokens_to_ids(marks)
        assert mark in visual_ids(model.config) and torch.equal(visual_mask(model.config, ids), ids == mark)
        assert text_config(model).num_key_value_heads == 2 and text_config(model).num_hidden_layers == 2
    assert visual_ids(transformers.LlamaConfig()) == set() and not visual_mask(transformers.LlamaConfig(), ids).any()


# ------------------------------------------------------------------------------------------------------------------ pieces


def test_characters_of_several_tokens_are_handed_on_whole():
    tokenizer = tiny("smolvlm")[1].tokenizer
    text = "naïve 🦊 the ball 漢字 moves\n🇩🇪 é end 👩‍🚀"
    pieces: list[str] = []
    streamer = Pieces(tokenizer, pieces.append)
    ids = tokenizer(text)["input_ids"]
    for _ in range(2):
        streamer.put(torch.tensor([[1, 2, 3]]))
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert "".join(pieces) == text and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        pieces.clear()
    broken = [*tokenizer("🦊")["input_ids"][:2], *tokenizer(" a")["input_ids"], tokenizer("é")["input_ids"][0]]
    streamer.put(torch.tensor([[1]]))
    for token in broken:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == said(tokenizer, broken)


def test_what_goes_wrong_while_decoding_is_raised_where_the_pieces_go(one):
    threads = []

    def broken(*args):
        threads.append(threading.current_thread())
        if len(threads) > 12:
            raise RuntimeError("the device is gone")

    hook = one.model.lm_head.register_forward_pre_hook(broken)
    pieces = []
    try:
        with pytest.raises(RuntimeError, match="the device is gone"):
            for piece in one.stream(clip(), max_new_tokens=NEW):
                pieces.append(piece)
    finally:
        hook.remove()
    assert pieces and threads[0] is not threading.current_thread() and not threads[0].is_alive()
    with pytest.raises(InputError, match="question"):
        next(one.stream(clip(), " "))


def test_closing_the_iterator_stops_the_decoding(one):
    before = threading.active_count()
    pieces = one.stream(clip(), max_new_tokens=3000)
    first = next(pieces)
    pieces.close()
    assert first and threading.active_count() == before
