"""Tiny random Video-LLMs of seven families with their processors, in the layout of the published folders.

Two layers, grouped queries (4 heads on 2), frames of 56 or 64 pixels (4 visual tokens each, or for each pair of them in the
Qwen family). The weights are large enough that greedy text varies and depends on the clip.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.smolvlm import processing_smolvlm
from transformers.video_utils import VideoMetadata

if processing_smolvlm.num2words is None:  # SmolVLM's prompt spells its number of frames: figures do without the package
    processing_smolvlm.num2words = str

KINDS = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava-onevision", "llava-next-video", "smolvlm", "internvl")
FPS, WIDTH, PIECES = 4.0, 64, 320
WORDS = "the red ball moves left and the blue square goes up while a green star turns around, then it stops. what is seen?\n"
CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN = (*CHAT, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
LLAVA = (*CHAT, "<image>", "<video>")
SMOL = (*CHAT[:2], "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<video>", "<global-img>")
INTERN = (*CHAT, "<img>", "</img>", "<IMG_CONTEXT>", "<video>")


def tokenizer(special: tuple[str, ...], end: str, **names: str) -> Any:
    """A byte-level BPE tokenizer of ``PIECES`` ids and the special ones; ``names`` are attributes, such as InternVL's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": PIECES, "initial_alphabet": sorted(alphabet), "show_progress": False}
    bpe.train_from_iterator([WORDS] * 3, trainers.BpeTrainer(**options))
    bpe.add_special_tokens(list(special))
    named = {"extra_special_tokens": names} if names else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=None, eos_token=end, pad_token="<|endoftext|>", padding_side="left", **named
    )


def template(opening: str, video: str, closing: str, turn: str, system: str = "", roles: str = "message['role']") -> str:
    """A chat template: (system), opening role, pieces, closing; ``turn`` opens the answer."""
    first = "{% if loop.first and message['role'] != 'system' %}" + system + "{% endif %}" if system else ""
    return (
        "{% for message in messages %}" + first + opening + "{{ " + roles + " }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for piece in message['content'] %}"
        "{% if piece['type'] == 'video' %}" + video + "{% elif 'text' in piece %}{{ piece['text'] }}{% endif %}"
        "{% endfor %}{% endif %}" + closing + "{% endfor %}{% if add_generation_prompt %}" + turn + "{% endif %}"
    )


CHATML = {"opening": "<|im_start|>", "closing": "<|im_end|>\n", "turn": "<|im_start|>assistant\n"}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
VICUNA = {"opening": "", "closing": "\n", "turn": "ASSISTANT:", "roles": "message['role'].upper() + ':'"}


def text_config(words: Any, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": words.pad_token_id, "bos_token_id": None, "eos_token_id": words.eos_token_id}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 4096, "vocab_size": -(-len(words) // 16) * 16}
    return sizes | ids | {"tie_word_embeddings": False} | more


def vision_config(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return sizes | {"image_size": 56, "patch_size": 14} | more


def ids_of(words: Any, **tokens: str) -> dict[str, int]:
    return {name: words.convert_tokens_to_ids(token) for name, token in tokens.items()}


def qwen(kind: str) -> tuple[Any, Any]:
    name = {"qwen2-vl": "Qwen2VL", "qwen2.5-vl": "Qwen2_5_VL", "qwen3-vl": "Qwen3VL"}[kind]
    words, third = tokenizer(QWEN, "<|im_end|>"), kind == "qwen3-vl"
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 16 if third else 14}
    if kind == "qwen2-vl":
        vision |= {"embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": WIDTH}
        own = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]} if third else {"window_size": 56}
        vision |= own if third else own | {"fullatt_block_indexes": [1], "tokens_per_second": 2}
    text = text_config(words, rope_parameters=rope | {"mrope_interleaved": True} if third else rope)
    marks = ids_of(words, image_token_id=QWEN[5], video_token_id=QWEN[6], vision_start_token_id=QWEN[3])
    marks |= ids_of(words, vision_end_token_id=QWEN[4])
    config = getattr(transformers, f"{name}Config")(
        text_config=text | ({"head_dim": 16} if third else {}), vision_config=vision, tie_word_embeddings=False, **marks
    )
    edge = 32 if third else 28
    size = {"shortest_edge": edge**2, "longest_edge": 4 * edge**2}
    options = {"patch_size": vision["patch_size"], "merge_size": 2, "temporal_patch_size": 2}
    video = {"size": {**size, "longest_edge": 256 * 4 * edge**2} if third else size, **options}
    video_class = transformers.Qwen3VLVideoProcessor if third else transformers.Qwen2VLVideoProcessor
    chat = template(**CHATML, video="<|vision_start|><|video_pad|><|vision_end|>", system="" if third else SYSTEM)
    processor = getattr(transformers, f"{name}Processor")(
        transformers.Qwen2VLImageProcessor(size=size, **options), words, video_class(**video), chat_template=chat
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def llava_onevision() -> tuple[Any, Any]:
    words, pinpoints = tokenizer(LLAVA, "<|im_end|>"), [[56, 56], [56, 112], [112, 56]]
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False, **vision_config()}
    marks = ids_of(words, image_token_index="<image>", video_token_index="<video>")
    parts = {"vision_config": vision, "text_config": {"model_type": "qwen2", **text_config(words)}}
    config = transformers.LlavaOnevisionConfig(**parts, **marks, image_grid_pinpoints=pinpoints, tie_word_embeddings=False)
    size = {"height": 56, "width": 56}
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        words,
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template(**CHATML, video="<video>\n"),
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def llava_next_video() -> tuple[Any, Any]:
    words, pinpoints = tokenizer(LLAVA, "<|im_end|>"), [[56, 112], [112, 56], [112, 112]]
    marks = ids_of(words, image_token_index="<image>", video_token_index="<video>")
    vision = {"model_type": "clip_vision_model", "projection_dim": 32, **vision_config()}
    parts = {"vision_config": vision, "text_config": {"model_type": "llama", **text_config(words)}}
    config = transformers.LlavaNextVideoConfig(
        **parts, **marks, image_grid_pinpoints=pinpoints, image_seq_length=16, video_seq_length=4, tie_word_embeddings=False
    )
    size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    processor = transformers.LlavaNextVideoProcessor(
        transformers.LlavaNextVideoVideoProcessor(**size),
        transformers.LlavaNextImageProcessor(**size, image_grid_pinpoints=pinpoints),
        words,
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=template(**VICUNA, video="<video>\n"),
    )
    return transformers.LlavaNextVideoForConditionalGeneration(config), processor


def smolvlm() -> tuple[Any, Any]:
    words = tokenizer(SMOL, "<end_of_utterance>")
    text = {"model_type": "llama", **text_config(words)}
    config = transformers.SmolVLMConfig(
        text_config=text,
        vision_config=vision_config(),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=words.pad_token_id,
        **ids_of(words, image_token_id="<image>"),
    )
    size = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 56}}
    processor = transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**size, do_image_splitting=False),
        words,
        transformers.SmolVLMVideoProcessor(**size, fps=1, num_frames=64),
        image_seq_len=4,
        chat_template=processing_smolvlm.DEFAULT_CHAT_TEMPLATE,
    )
    return transformers.SmolVLMForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    words = tokenizer(INTERN, "<|im_end|>", **names, video_token="<video>")
    vision = vision_config(image_size=[56, 56], patch_size=[14, 14])
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **text_config(words)},
        vision_config=vision,
        image_seq_length=4,
        tie_word_embeddings=False,
        **ids_of(words, image_token_id="<IMG_CONTEXT>"),
    )
    size = {"height": 56, "width": 56}
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size),
        words,
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=template(**CHATML, video="<video>\n"),
    )
    return transformers.InternVLForConditionalGeneration(config), processor


OTHERS = {"llava-onevision": llava_onevision, "llava-next-video": llava_next_video, "smolvlm": smolvlm, "internvl": internvl}

SEEDS = {"smolvlm": 3, "internvl": 2}  # where 0 gives loops


@cache
def tiny(kind: str) -> tuple[Any, Any]:
    """(model in float32 and eval mode, processor) of one of ``KINDS``; shared by all callers: leave them as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEEDS.get(kind, 0))
        model, processor = OTHERS[kind]() if kind in OTHERS else qwen(kind)
        for p in model.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=1.5 / p[0].numel() ** 0.5)
    words = processor.tokenizer
    model.lm_head.weight.data[PIECES:] = 0  # special ids are never the likeliest: no marks of pictures, no early end
    model.generation_config.update(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, bos_token_id=None)
    return model.float().eval(), processor


def clip(frames: int = 8, size: int = 56, seed: int = 0) -> np.ndarray:
    """A clip [frames, size, size, 3] uint8: a bright square that moves over a coloured ground."""
    rng = np.random.default_rng(seed)
    ground, colour, start, step = (
        rng.integers(0, 256, 3),
        rng.integers(0, 256, 3),
        rng.integers(0, size, 2),
        rng.integers(-9, 10, 2),
    )
    video = np.empty((frames, size, size, 3), dtype=np.uint8)
    video[:] = ground
    for t in range(frames):
        y, x = (start + t * step) % size
        video[t, y : y + size // 3, x : x + size // 3] = colour
    return video


def metadata(video: np.ndarray, fps: float = FPS) -> VideoMetadata:
    """What a clip that was decoded whole says of itself."""
    n = len(video)
    return VideoMetadata(n, fps, video.shape[2], video.shape[1], n / fps, "array", list(range(n)))


def inputs(kind: str, videos: list[np.ndarray], questions: list[str]) -> dict[str, Any]:
    """A batch of clips with a question each, padded on the left, for ``model.generate``."""
    _, processor = tiny(kind)
    asked = [
        [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": question}]}]
        for video, question in zip(videos, questions, strict=True)
    ]
    options = {"padding": True, "padding_side": "left", "do_sample_frames": False}
    options["video_metadata"] = [metadata(video) for video in videos]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(processor.apply_chat_template(asked, processor_kwargs=options, **how))


def folder(kind: str, path: str | Path) -> Path:
    """Save model and processor as published folders are."""
    for part in tiny(kind):
        part.save_pretrained(path)
    return Path(path)
