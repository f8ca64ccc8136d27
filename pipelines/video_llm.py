"""``VideoLLMPipeline``: a clip and a question to text, with Video-LLMs of transformers and what ``generate_fn`` runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from arsd.decoding import DecodeStats, DecodingStrategy
from arsd.decoding.types import OnRound
from arsd.errors import CheckpointError, InputError
from arsd.generation import generate_fn
from arsd.models.visual import visual_ids, visual_mask
from arsd.pipelines.checks import dtype_of, strategies_of
from arsd.pipelines.video_parts import Pieces, check_kind, checked_options, find_video_llm, said, saved_decoder
from arsd.video import check_sampling, read_video

DEFAULT_FRAMES = 32  # of a file, where the model's own processor names neither a number nor a rate


@dataclass
class VideoLLMOutput(BaseOutput):
    """What a call returns. Of one clip with one question, texts and counts are single; of a batch they are lists.

    Args:
        text: what the model said, without special tokens.
        tokens: [B, n] new ids, padded behind the end of each row.
        stats: figures of decoding, :class:`arsd.decoding.DecodeStats`; ``stats.total_seconds`` are those of decoding alone.
        num_visual_tokens: tokens of the prompt that are frames.
        num_frames: frames that were shown.
        seconds: of the whole call: reading, processing, decoding.
    """

    text: str | list[str]
    tokens: Tensor
    stats: DecodeStats
    num_visual_tokens: int | list[int]
    num_frames: int | list[int]
    seconds: float


@dataclass
class _Call:
    """A call that was checked and whose prompt is made."""

    inputs: dict[str, Any]
    frames: list[int]
    batch: bool
    strategy: DecodingStrategy
    options: dict[str, Any]
    streamer: Any
    began: float
    on_round: OnRound | None = None


class VideoLLMPipeline:
    """Ask a Video-LLM about clips: any model of transformers with a processor for videos.

    Args:
        model: as ``AutoModelForImageTextToText`` loads it, in eval mode.
        processor: as ``AutoProcessor`` loads it; its chat template makes the prompt.
        decoder: strategy of all calls that name none, an object or text such as ``"sjd:window=8"``; plain AR by default.

    Raises:
        InputError: for a model that takes no videos.
        StrategyError: for a decoder that is none.
    """

    def __init__(self, model: Any, processor: Any, decoder: DecodingStrategy | str | None = None) -> None:
        if getattr(processor, "video_processor", None) is None or not visual_ids(model.config):
            raise InputError(f"{type(model).__name__} with {type(processor).__name__} takes no videos: use a Video-LLM")
        self.model, self.processor, self.decoder = model, processor, decoder

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        decoder: DecodingStrategy | str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> VideoLLMPipeline:
        """Load a model and its processor.

        Args:
            name: shipped name, folder in transformers' layout, or hub id.
            dtype: of the weights; that of the files by default.
            device_map: as transformers takes it.
            decoder: see the class; by default what was saved with the pipeline.
            revision: branch, tag or commit on the hub.
            cache_dir: where downloads are kept.
            kwargs: further arguments of transformers' ``from_pretrained`` of the model.

        Raises:
            CheckpointError: when there is no such model, or its files are damaged.
            InputError: for a model that takes no videos.
        """
        dtype = dtype_of(dtype, kwargs)
        path = find_video_llm(name, revision=revision, cache_dir=cache_dir)
        trust = {"trust_remote_code": True} if kwargs.get("trust_remote_code") else {}
        if not trust:
            check_kind(path)
        try:
            processor = AutoProcessor.from_pretrained(path, **trust)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                path, dtype=dtype or "auto", device_map=device_map, output_loading_info=True, **kwargs
            )
        except Exception as error:  # a damaged folder can raise anything
            raise CheckpointError(f"could not load {path}: {' '.join(str(error).split())[:300]}") from error
        model, info = loaded
        missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
        if missing:
            raise CheckpointError(f"{path} lacks {len(missing)} weights ({missing[0]}, ...): download it again")
        return cls(model.eval(), processor, decoder if decoder is not None else saved_decoder(path))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model, processor and decoder to a folder that transformers loads as well."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        self.decoder.save_pretrained(Path(folder) / "decoder")

    @property
    def decoder(self) -> DecodingStrategy:
        """The strategy of calls that name none; text or ``None`` may be assigned, too."""
        return self._decoder

    @decoder.setter
    def decoder(self, decoder: DecodingStrategy | str | None) -> None:
        self._decoder = _strategy(decoder, None)

    @property
    def device(self) -> torch.device:
        """Of the model."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def to(self, *args: Any, **kwargs: Any) -> VideoLLMPipeline:
        """Move or cast the model, as ``torch.nn.Module.to`` does."""
        self.model.to(*args, **kwargs)
        return self

    def __repr__(self) -> str:
        """Parts, device and dtype."""
        parts = f"{type(self.model).__name__}, {type(self.processor).__name__}"
        return f"VideoLLMPipeline({parts}, decoder={str(self.decoder)!r}, device={self.device}, dtype={self.dtype})"

    def __call__(
        self,
        video: Any,
        question: str | Sequence[str] = "Describe the clip.",
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        source_fps: float | None = None,
        max_new_tokens: int | None = 256,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        decoder: DecodingStrategy | str | None = None,
        streamer: Any = None,
        stream: Callable[[str], Any] | None = None,
        system: str | None = None,
        on_round: OnRound | None = None,
        on_frame: Callable[[], Any] | None = None,
        **generate_kwargs: Any,
    ) -> VideoLLMOutput:
        """Answer a question about a clip, or several in one batch.

        Args:
            video: a clip as :func:`arsd.video.read_video` takes it, or a list of clips.
            question: one for all clips, or one for each; several may be asked of one clip.
            num_frames: frames that are shown at most, evenly over the clip. Without it and ``fps``, the model's processor
                decides for a file (32 frames where it says nothing); frames in memory are shown as they are.
            fps: frames that are shown of each second; with ``num_frames`` no more than those.
            source_fps: frames per second of frames in memory or a folder, for models that tell time.
            max_new_tokens: tokens of the answer at most; ``None``: as the model's generation config has it.
            do_sample: draw tokens; else take the likeliest ones.
            temperature: divides the logits. Like the next two, of the model's generation config where not given.
            top_k: keep the k likeliest tokens; 0 keeps all.
            top_p: keep the smallest set of tokens with this mass.
            generator: source of the seed of sampling.
            seed: of sampling, instead; the rows of a batch draw apart. Without both, torch's global generator gives it.
            decoder: strategy of this call; ``None``: the pipeline's own.
            streamer: of transformers: gets prompt and tokens as they are committed (one row only).
            stream: called with each new piece of text (one row only).
            system: a system message before the question.
            on_round: called (untimed) with the :class:`arsd.decoding.Round` of each pass; ``True`` stops the call,
                which returns the text so far.
            on_frame: called for every frame of a file that is decoded; what it raises ends the call.
            generate_kwargs: further options of ``model.generate``, as far as :func:`arsd.generate_fn` supports them.

        Returns:
            :class:`VideoLLMOutput`.

        Raises:
            InputError: for inputs that cannot be worked with.
            StrategyError: for a decoder that is none, or does not go with the model.
            NonFiniteLogitsError: when the model breaks.
        """
        began = time.perf_counter()
        if streamer is not None and stream is not None:
            raise InputError("give streamer or stream, not both")
        if stream is not None:
            streamer = Pieces(self.processor.tokenizer, stream)
        given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        options = checked_options(generator, do_sample, generate_kwargs, **given)
        strategy = _strategy(decoder, self.decoder)
        inputs, frames, batch = self._prompt(video, question, (num_frames, fps, source_fps), system, on_frame)
        return self._run(_Call(inputs, frames, batch, strategy, options, streamer, began, on_round))

    def stream(
        self, video: Any, question: str = "Describe the clip.", **options: Any
    ) -> Generator[str, None, VideoLLMOutput]:
        """The answer in pieces of text, as they are committed; together they are the ``text`` of the call.

        Decoding runs in a thread of its own, and stops when the iterator is closed. What goes wrong there is raised here;
        ``output = yield from pipe.stream(...)`` gets what the call would return.

        Args:
            video: one clip; see :meth:`__call__`.
            question: one question.
            options: as those of :meth:`__call__`, but for ``stream`` and ``streamer``.

        Raises:
            InputError: for options that do not fit at once; else as :meth:`__call__`, and with the first piece.
            StrategyError: as :meth:`__call__`, with the first piece.
        """
        if {"stream", "streamer"} & set(options):
            raise InputError("stream() is a streamer already: leave out stream and streamer")
        if _several(video) or not isinstance(question, str):
            raise InputError("stream() takes one clip and one question: call the pipeline for a batch")
        heard: SimpleQueue[Any] = SimpleQueue()
        closed = Event()

        def hear(piece: str) -> None:
            if closed.is_set():
                raise _Closed
            heard.put(piece)

        def work() -> None:
            try:
                heard.put(self(video, question, stream=hear, **options))
            except BaseException as error:  # raised again where the pieces go
                heard.put(error)

        return _heard(Thread(target=work, daemon=True), heard, closed)

    def _prompt(
        self, video: Any, question: Any, sampling: tuple[Any, Any, Any], system: Any, on_frame: Any = None
    ) -> tuple[dict[str, Any], list[int], bool]:
        """(inputs of the model, frames of each row, whether it is a batch)."""
        check_sampling(*sampling)
        batch = _several(video) or not isinstance(question, str)
        clips = list(video) if _several(video) else [video]
        questions = list(question) if isinstance(question, (list, tuple)) else [question]
        if any(_several(clip) for clip in clips):
            raise InputError("a question is about one clip: ask about several clips in a batch, or join their frames")
        if not questions or not all(isinstance(one, str) and one.strip() for one in questions):
            raise InputError(f"a question must be text that is not empty, not {question!r}")
        if system is not None and not (isinstance(system, str) and system.strip()):
            raise InputError(f"system must be text that is not empty, not {system!r}")
        rows = max(len(clips), len(questions))
        if len(clips) not in (1, rows) or len(questions) not in (1, rows):
            raise InputError(f"{len(clips)} clips and {len(questions)} questions: give one question for all or one for each")
        read = [self._read(clip, *sampling, on_frame) for clip in clips]
        asked = list(zip(read * (rows // len(read)), questions * (rows // len(questions)), strict=True))
        inputs = self._processed([(frames, _copied(told), text) for (frames, told), text in asked], system)
        return inputs, [len(frames) for (frames, _), _ in asked], batch

    def _read(
        self, clip: Any, num_frames: int | None, fps: float | None, source_fps: float | None, on_frame: Any = None
    ) -> tuple[np.ndarray, VideoMetadata]:
        """Frames of a clip, as many as asked for or as the processor says that the model is used to."""
        own, least = self.processor.video_processor, 1
        if num_frames is None and fps is None and isinstance(clip, (str, Path)):
            fps, num_frames = getattr(own, "fps", None), getattr(own, "num_frames", None)
            if num_frames is None:
                num_frames = DEFAULT_FRAMES if fps is None else getattr(own, "max_frames", None)
            fps = None if Path(clip).is_dir() and source_fps is None else fps
            least = getattr(own, "min_frames", None) or 1
        frames, told = read_video(clip, num_frames, fps, source_fps, on_frame)
        if len(frames) < least and len(frames) < told.total_num_frames:
            frames, told = read_video(clip, least, None, source_fps, on_frame)
        short = (getattr(own, "temporal_patch_size", None) or 1) - len(frames)
        if short > 0:  # Qwen looks at pairs of frames
            frames = np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)])
            indices = list(told.frames_indices or ())
            told.frames_indices = indices + indices[-1:] * short
        return frames, told

    def _processed(self, rows: list[tuple[np.ndarray, VideoMetadata, str]], system: str | None) -> dict[str, Any]:
        """What the processor makes of clips and questions, on the model's device."""
        name = type(self.processor).__name__
        before = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
        asked = [
            [*before, {"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": text}]}]
            for frames, _, text in rows
        ]
        how: dict[str, Any] = {"do_sample_frames": False, "video_metadata": [told for _, told, _ in rows]}
        if len(rows) > 1:
            how |= {"padding": True, "padding_side": "left"}
        form = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        uneven = f"{name} takes clips of one number of frames in a batch: pass num_frames, or ask one by one"
        ragged = len({len(frames) for frames, *_ in rows}) > 1
        try:
            made = self.processor.apply_chat_template(asked, processor_kwargs=how, **form)
        except Exception as error:  # every processor has its own ways to fail
            raise InputError(
                uneven if ragged else f"{name} cannot work with this: {' '.join(str(error).split())[:200]}"
            ) from error
        if ragged and "video_grid_thw" not in made:  # SmolVLM's prompt would count the frames of the longest clip
            raise InputError(uneven)
        if not bool(visual_mask(self.model.config, made["input_ids"]).any(1).all()):
            raise InputError(f"the chat template of {name} leaves the clip out of the prompt: use one that takes videos")
        inputs = {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in made.items()}
        return {key: value.to(self.dtype) if key.startswith("pixel_values") else value for key, value in inputs.items()}

    def _run(self, call: _Call) -> VideoLLMOutput:
        """Decode."""
        fn = generate_fn(call.strategy, streamer=call.streamer, on_round=call.on_round)
        try:
            out = self.model.generate(**call.inputs, **call.options, custom_generate=fn, return_dict_in_generate=True)
        except ValueError as error:
            if "model_kwargs" not in str(error) or isinstance(error, InputError):
                raise
            raise InputError(f"unknown option for generate: {' '.join(str(error).split())[:200]}") from error
        ids = call.inputs["input_ids"]
        tokens, seen = out.sequences[:, ids.shape[1] :], visual_mask(self.model.config, ids).sum(1).tolist()
        texts = [said(self.processor.tokenizer, row[:n]) for row, n in zip(tokens, out.stats.tokens, strict=True)]
        seconds, many = time.perf_counter() - call.began, call.batch
        figures = (seen, call.frames) if many else (seen[0], call.frames[0])
        return VideoLLMOutput(texts if many else texts[0], tokens, out.stats, *figures, seconds)


class _Closed(Exception):
    """Nobody listens any more."""


def _heard(thread: Thread, heard: SimpleQueue[Any], closed: Event) -> Generator[str, None, VideoLLMOutput]:
    thread.start()
    try:
        while isinstance(item := heard.get(), str):
            yield item
        if isinstance(item, BaseException):
            raise item
        return item
    finally:
        closed.set()
        thread.join()


def _strategy(decoder: DecodingStrategy | str | None, default: DecodingStrategy | None) -> DecodingStrategy:
    if isinstance(decoder, (list, tuple)):
        raise InputError("give one decoder for all rows")
    return strategies_of(decoder, default)[0]


def _several(video: Any) -> bool:
    """Whether it is a list of clips: a list of pictures is one clip."""
    return isinstance(video, (list, tuple)) and not (bool(video) and all(isinstance(x, Image.Image) for x in video))


def _copied(told: VideoMetadata) -> VideoMetadata:
    """Processors write into it."""
    return replace(told, frames_indices=list(told.frames_indices or ()))
