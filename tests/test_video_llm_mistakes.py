"""``VideoLLMPipeline``: what it cannot work with is one clear line, of the exception type of the mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from video_llms import KINDS, clip, folder, tiny

from arsd.errors import CheckpointError, InputError, StrategyError
from arsd.pipelines.video_llm import VideoLLMPipeline


@pytest.fixture
def one() -> VideoLLMPipeline:
    return VideoLLMPipeline(*tiny("llava-onevision"))


VIDEO = np.zeros((4, 56, 56, 3), dtype=np.uint8)
REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "empty question": ((VIDEO, ""), {}, "question"),
    "blank question": ((VIDEO, "  \n"), {}, "question"),
    "no question": ((VIDEO, []), {}, "question"),
    "question of bytes": ((VIDEO, [b"what"]), {}, "question"),
    "question 3": ((VIDEO, 3), {}, "question"),
    "questions 3": ((VIDEO, [3]), {}, "question"),
    "two questions, three clips": (([VIDEO] * 3, ["a", "b"]), {}, "3 clips and 2 questions"),
    "two clips of a question": (([[VIDEO, VIDEO]], "a"), {}, "one clip"),
    "no clips": (([], "a"), {}, "question|clip"),
    "None": ((None, "a"), {}, "a clip is"),
    "no file": (("none.mp4", "a"), {}, "there is no file"),
    "num_frames": ((VIDEO, "a"), {"num_frames": 0}, "num_frames"),
    "num_frames of nothing": ((VIDEO, "a"), {"num_frames": -3}, "num_frames"),
    "fps": ((VIDEO, "a"), {"fps": -1.0}, "fps"),
    "no rate": ((VIDEO, "a"), {"fps": 1.0}, "source_fps"),
    "max_new_tokens 0": ((VIDEO, "a"), {"max_new_tokens": 0}, "max_new_tokens"),
    "max_new_tokens -1": ((VIDEO, "a"), {"max_new_tokens": -1}, "max_new_tokens"),
    "max_new_tokens 1.5": ((VIDEO, "a"), {"max_new_tokens": 1.5}, "max_new_tokens"),
    "max_new_tokens True": ((VIDEO, "a"), {"max_new_tokens": True}, "max_new_tokens"),
    "temperature 0": ((VIDEO, "a"), {"temperature": 0, "do_sample": True}, "temperature.*greedy"),
    "temperature -1": ((VIDEO, "a"), {"temperature": -1.0, "do_sample": True}, "temperature"),
    "temperature nan": ((VIDEO, "a"), {"temperature": float("nan"), "do_sample": True}, "temperature"),
    "temperature of words": ((VIDEO, "a"), {"temperature": "hot", "do_sample": True}, "temperature"),
    "temperature of greedy": ((VIDEO, "a"), {"temperature": 0.5}, "do_sample=True"),
    "top_k": ((VIDEO, "a"), {"top_k": -1, "do_sample": True}, "top_k"),
    "top_k 0.5": ((VIDEO, "a"), {"top_k": 0.5, "do_sample": True}, "top_k"),
    "top_p 0": ((VIDEO, "a"), {"top_p": 0.0, "do_sample": True}, "top_p"),
    "top_p 1.1": ((VIDEO, "a"), {"top_p": 1.1, "do_sample": True}, "top_p"),
    "seed": ((VIDEO, "a"), {"seed": -1, "do_sample": True}, "seed"),
    "two seeds": ((VIDEO, "a"), {"seed": 1, "generator": torch.Generator(), "do_sample": True}, "not both"),
    "beams": ((VIDEO, "a"), {"num_beams": 2}, "num_beams"),
    "several answers": ((VIDEO, "a"), {"num_return_sequences": 2}, "num_return_sequences"),
    "unknown option": ((VIDEO, "a"), {"max_tokens": 4}, "max_tokens"),
    "system": ((VIDEO, "a"), {"system": ""}, "system"),
    "streams": ((VIDEO, "a"), {"stream": print, "streamer": object()}, "not both"),
    "stream of a batch": (([VIDEO, VIDEO], "a"), {"stream": print}, "one row"),
    "decoders": (([VIDEO, VIDEO], "a"), {"decoder": ["ar", "sjd"]}, "one decoder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_one_clear_line(one, name: str):
    args, options, message = REFUSED[name]
    with pytest.raises(InputError, match=f"(?s){message}") as caught:
        one(*args, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_marks_of_videos_in_a_question_are_refused(kind: str):
    mark = "<|video_pad|>" if "qwen" in kind else "<video>"
    with pytest.raises(InputError, match="cannot work with this"):
        VideoLLMPipeline(*tiny(kind))(VIDEO, f"What is {mark}?")


def test_wrong_decoders_and_wrong_uses_of_stream_are_refused(one):
    with pytest.raises(StrategyError, match="unknown decoder"):
        one(VIDEO, decoder="faster")
    with pytest.raises(StrategyError, match="decoding strategy"):
        VideoLLMPipeline(one.model, one.processor, 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a batch"):
        one.stream([VIDEO, VIDEO])
    with pytest.raises(InputError, match="leave out stream"):
        one.stream(VIDEO, stream=print)


def test_a_model_without_videos_is_refused(one):
    with pytest.raises(InputError, match="takes no videos"):
        VideoLLMPipeline(one.model, one.processor.tokenizer)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    with pytest.raises(InputError, match="takes no videos"):
        VideoLLMPipeline(llama, one.processor)


def test_a_template_without_the_clip_is_refused(one, monkeypatch):
    monkeypatch.setattr(one.processor, "chat_template", "{% for m in messages %}{{ m['content'][1]['text'] }}{% endfor %}")
    with pytest.raises(InputError, match="chat template|cannot work with"):
        one(clip(), "What?")


def damage(path: Path, how: str) -> None:
    weights = path / "model.safetensors"
    if how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "no weights":
        weights.unlink()
    elif how == "fewer weights":
        from safetensors.torch import load_file, save_file

        held = load_file(weights)
        held.pop("lm_head.weight" if "lm_head.weight" in held else sorted(held)[0])
        save_file(held, weights, metadata={"format": "pt"})
    elif how == "other shapes":
        config = json.loads((path / "config.json").read_text())
        config["text_config"]["intermediate_size"] = 80
        (path / "config.json").write_text(json.dumps(config))
    elif how == "no processor":
        for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
            (path / name).unlink()
    elif how == "broken config":
        (path / "config.json").write_text("{")
    elif how == "no config":
        (path / "config.json").unlink()
    elif how == "text model":
        (path / "config.json").write_text('{"model_type": "llama"}')
    else:
        (path / "decoder").mkdir()
        (path / "decoder" / "decoder_config.json").write_text('{"_class_name": "Faster"}')


HOWS = ["truncated weights", "no weights", "fewer weights", "other shapes", "no processor", "broken config", "no config"]


@pytest.mark.parametrize("how", [*HOWS, "text model", "unknown decoder"])
def test_damaged_folders_are_one_clear_line(tmp_path, how: str):
    path = folder("llava-onevision", tmp_path)
    damage(path, how)
    with pytest.raises(CheckpointError) as caught:
        VideoLLMPipeline.from_pretrained(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_names_that_are_nothing_and_models_of_pictures_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="no Video-LLM 'none'"):
        VideoLLMPipeline.from_pretrained("none")
    (tmp_path / "model_index.json").write_text('{"_class_name": "LlamaGenPipeline"}')
    with pytest.raises(CheckpointError, match="AutoARPipeline"):
        VideoLLMPipeline.from_pretrained(tmp_path)
