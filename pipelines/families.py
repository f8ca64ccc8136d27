"""The families of models that arsd knows, and telling by its content which one a folder or file belongs to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from arsd.errors import CheckpointError
from arsd.models.cosmos_files import cosmos_kind
from arsd.models.glm_image_files import glm_image_kind
from arsd.models.ivideogpt_files import find_kind as ivideogpt_kind
from arsd.models.larp_files import find_kind as larp_kind
from arsd.models.llamagen_files import llamagen_kind
from arsd.models.mineworld_files import mineworld_kind
from arsd.pipelines.anole import AnolePipeline
from arsd.pipelines.core import ARPipeline
from arsd.pipelines.cosmos import CosmosARPipeline
from arsd.pipelines.emu3 import Emu3Pipeline, Emu35Pipeline
from arsd.pipelines.glm_image import GLMImagePipeline
from arsd.pipelines.ivideogpt import IVideoGPTPipeline
from arsd.pipelines.janus import JanusPipeline
from arsd.pipelines.larp import LARPPipeline
from arsd.pipelines.liquid import LiquidPipeline
from arsd.pipelines.llamagen import LlamaGenPipeline
from arsd.pipelines.lumina_mgpt import LuminaMGPTPipeline
from arsd.pipelines.mineworld import MineWorldPipeline
from arsd.pipelines.simplear import SimpleARPipeline
from arsd.pipelines.token_images import TokenImagePipeline
from arsd.pipelines.video import ARVideoPipeline

_TOKEN_IMAGES: tuple[type[TokenImagePipeline], ...] = (
    LuminaMGPTPipeline,
    AnolePipeline,
    JanusPipeline,
    Emu3Pipeline,
    Emu35Pipeline,
    SimpleARPipeline,
    LiquidPipeline,
)
_CLIPS: tuple[type[ARVideoPipeline], ...] = (CosmosARPipeline, LARPPipeline, IVideoGPTPipeline, MineWorldPipeline)
_ALL: tuple[type[ARPipeline], ...] = (LlamaGenPipeline, *_TOKEN_IMAGES, GLMImagePipeline, *_CLIPS)
PIPELINES: dict[str, type[ARPipeline]] = {cls.__name__: cls for cls in _ALL}
WEIGHTS = (".pt", ".pth", ".safetensors", ".bin", ".ckpt")


@dataclass(frozen=True)
class Family:
    """One row of ``arsd models``.

    Args:
        kind: what :func:`recognise` calls it.
        name: models and sizes.
        pipeline: class that runs it.
        files: what is expected.
        features: beyond prompts, seeds, batches and every strategy, which all have.
        tested: against what.
    """

    kind: str
    name: str
    pipeline: str
    files: str
    features: str
    tested: str


_RANDOM = "tiny random weights in the published layout; no published weights were at hand"
FAMILIES = (
    Family(
        "llamagen-c2i",
        "LlamaGen class-to-image B, L, XL, XXL, 3B (and XXXL, 1B, 7B)",
        "LlamaGenPipeline",
        "c2i_*.pt (or a hub folder) + vq_ds16_c2i.pt or vq_ds8_c2i.pt",
        "256/384 px, guidance interval, continuation, EAGLE and small-model drafters",
        f"{_RANDOM}; logits against an independent forward",
    ),
    Family(
        "llamagen-t2i",
        "LlamaGen text-to-image XL, stages 1 and 2",
        "LlamaGenPipeline",
        "t2i_XL_stage*.pt + vq_ds16_t2i.pt + the folder of google/flan-t5-xl",
        "256/512 px, caption cleaner, continuation, drafters",
        f"{_RANDOM}; logits against an independent forward",
    ),
    Family(
        "lumina-mgpt",
        "Lumina-mGPT 7B (512, 768, 1024), 34B",
        "LuminaMGPTPipeline",
        "hub folder + chameleon/tokenizer/vqgan.ckpt (Meta)",
        "sizes in steps of 32 px, continuation, EAGLE drafters, device maps",
        f"{_RANDOM}; logits against an independent forward",
    ),
    Family(
        "lumina-mgpt-2",
        "Lumina-mGPT 2.0, 2.0-Omni",
        "LuminaMGPTPipeline",
        "hub folder + movqgan_270M.ckpt (ai-forever/MoVQGAN)",
        "sizes in steps of 32 px, continuation, device maps",
        f"{_RANDOM}; logits against an independent forward; where codes begin as config.json or upstream's code says",
    ),
    Family(
        "anole",
        "Anole 7B (transformers layout)",
        "AnolePipeline",
        "hub folder with model.vqmodel.* (decoder included)",
        "512 px, pictures in prompts (three streams), continuation, EAGLE drafters, device maps",
        f"{_RANDOM}; logits against transformers",
    ),
    Family(
        "anole-meta",
        "Anole 7B, Chameleon 7B (Meta's layout)",
        "AnolePipeline",
        "models/7b/{params.json, consolidated.pth} + tokenizer/{text_tokenizer.json, vqgan.ckpt}",
        "as anole",
        f"{_RANDOM}; logits against an independent forward",
    ),
    Family(
        "chameleon",
        "Chameleon 7B (transformers layout)",
        "AnolePipeline",
        "hub folder + vqgan.ckpt (Meta); Meta published no weights that draw well",
        "as anole",
        f"{_RANDOM}; logits against transformers",
    ),
    Family(
        "janus",
        "Janus-Pro 1B, 7B (transformers layout)",
        "JanusPipeline",
        "hub folder of deepseek-community (image tokenizer included)",
        "384 px, continuation, EAGLE and small-model drafters, device maps",
        f"{_RANDOM}; logits, greedy pictures and decoding against transformers",
    ),
    Family(
        "janus-original",
        "Janus-Pro 1B, 7B, Janus-1.3B (deepseek-ai)",
        "JanusPipeline",
        "hub folder of deepseek-ai (image tokenizer included); its code is not needed",
        "as janus; prompts of Janus-1.3B spell out their turns",
        f"{_RANDOM}; logits, greedy pictures and decoding against transformers",
    ),
    Family(
        "emu3",
        "Emu3-Gen (Emu3-Stage1, Emu3-Chat)",
        "Emu3Pipeline",
        "hub folder + the folder of BAAI/Emu3-VisionTokenizer",
        "sizes in steps of 8 px, negative prompts, continuation, device maps",
        f"{_RANDOM}; logits against an independent forward, pictures against an independent decoder",
    ),
    Family(
        "emu3-hf",
        "Emu3-Gen, Emu3-Chat (transformers layout)",
        "Emu3Pipeline",
        "hub folder (image tokenizer included)",
        "as emu3",
        f"{_RANDOM}; as emu3, and greedy pictures against transformers",
    ),
    Family(
        "emu3.5",
        "Emu3.5-Image, Emu3.5 (34B)",
        "Emu35Pipeline",
        "hub folder + the folder of BAAI/Emu3.5-VisionTokenizer + src/tokenizer_emu3_ibq of its code",
        "sizes in steps of 16 px, continuation, device maps",
        f"{_RANDOM}; logits against an independent forward, pictures against an independent decoder",
    ),
    Family(
        "simplear",
        "SimpleAR 0.5B, 1.5B (SFT, RL)",
        "SimpleARPipeline",
        "hub folder + encoder.jit and decoder.jit of nvidia/Cosmos-1.0-Tokenizer-DV8x16x16",
        "1024 px (other squares up to it), negative prompts, continuation, device maps",
        f"{_RANDOM}; logits against transformers, pictures against an independent decoder",
    ),
    Family(
        "liquid",
        "Liquid 7B",
        "LiquidPipeline",
        "hub folder + chameleon/vqgan.ckpt (Meta)",
        "512 px, continuation, device maps",
        f"{_RANDOM}; logits against transformers, pictures against an independent decoder",
    ),
    Family(
        "larp",
        "LARP-L-long-AR (classes of UCF-101)",
        "LARPPipeline",
        "hub folder + the folder of hywang66/LARP-L-long-tokenizer",
        "clips of 16 frames of 128 px, guidance interval, small-model drafters",
        f"{_RANDOM}; logits and clips against an independent network, greedy clips against upstream's code",
    ),
    Family(
        "larp-frames",
        "LARP-L-long-AR-FP (frame prediction, Kinetics-600)",
        "LARPPipeline",
        "hub folder + the folder of hywang66/LARP-L-long-tokenizer",
        "clips of 16 frames of 128 px from 5 given ones, small-model drafters; no guidance",
        f"{_RANDOM}; logits and clips against an independent network, greedy clips against upstream's code",
    ),
    Family(
        "ivideogpt",
        "iVideoGPT, act-free and goal-cond (64 and 256 px)",
        "IVideoGPTPipeline",
        "hub folder (tokenizer included)",
        "clips that go on from 1 or 2 frames, small-model drafters; no actions, no guidance",
        f"{_RANDOM}; codes and clips against an independent network and upstream's code, greedy tokens against transformers",
    ),
    Family(
        "glm-image",
        "GLM-Image",
        "GLMImagePipeline",
        "hub folder, or diffusers' own pipeline object (arsd.accelerate)",
        "sizes in steps of 32 px, pictures in prompts, small-model drafters, device maps; no guidance, no continuation",
        f"{_RANDOM}; logits and greedy tokens against transformers, pictures against diffusers",
    ),
    Family(
        "cosmos",
        "Cosmos-Predict1 4B, 12B (video)",
        "CosmosARPipeline",
        "hub folder (model.pt, config.json) + encoder.jit and decoder.jit of nvidia/Cosmos-Tokenize1-DV8x16x16-720p",
        "clips of 33 frames, 640 x 1024 px, from 1 or 9 given frames, EAGLE and small-model drafters",
        f"{_RANDOM}; logits against an independent forward and NVIDIA's code",
    ),
    Family(
        "mineworld",
        "MineWorld 300M, 700M, 1200M (video)",
        "MineWorldPipeline",
        "*.ckpt, with its tokenizer in it or vae/vae.ckpt beside it (withdrawn from the hub in May 2025)",
        "clips of 16 or 32 frames, 224 x 384 px, from given frames and actions, EAGLE and small-model drafters",
        f"{_RANDOM}; logits, actions, pixels and greedy clips against Microsoft's code",
    ),
)


def recognise(path: str | Path) -> str:
    """What a folder or file holds: the name of a pipeline class for a pipeline folder, else the kind of a family.

    Only headers are read, never names.

    Raises:
        CheckpointError: when it is nothing that arsd can run; the message says what was found, and what to give.
    """
    path = Path(path)
    index = path / "model_index.json"
    if index.is_file():
        return glm_image_kind(path) or _pipeline_of(index)
    if path.is_dir() and (clips := larp_kind(path) or ivideogpt_kind(path)) is not None:  # LARP has keys of LlamaGen
        if clips == "larp-tokenizer":
            raise CheckpointError(f"{path} is the video tokenizer of LARP: give it as vq=..., beside a transformer's folder")
        return clips
    if path.is_file() or path.is_dir():
        weights = llamagen_kind(path)
        if weights == "transformer":
            return "llamagen"
        if weights == "vq":
            raise CheckpointError(
                f"{path} is an image tokenizer of LlamaGen: give it as vq=..., beside a transformer's file"
            )
    if (kind := cosmos_kind(path) or mineworld_kind(path)) in ("cosmos", "mineworld"):
        return str(kind)
    if kind is not None:
        what = "cross-attention reads text, which is not supported" if kind == "cosmos-video2world" else "it is a tokenizer"
        raise CheckpointError(f"{path} is no model that arsd can run ({what}): see arsd models")
    if path.is_file():
        raise CheckpointError(f"{path} holds weights of no model that arsd knows: see arsd models")
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: check the path")
    for find_kind in dict.fromkeys(cls.files.find_kind for cls in _TOKEN_IMAGES):
        if (kind := find_kind(path)) is not None:
            return kind
    held = sorted(file.name for file in path.iterdir() if file.suffix in WEIGHTS)
    if held:
        listed = ", ".join(held[:4]) + (", ..." if len(held) > 4 else "")
        raise CheckpointError(f"{path} holds several weight files or unknown ones ({listed}): give one of them, with vq=...")
    raise CheckpointError(f"{path} has no model_index.json and no other files of a model that arsd knows: see arsd models")


def _pipeline_of(index: Path) -> str:
    try:
        name = str(json.loads(index.read_bytes())["_class_name"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{index} is damaged ({error}): download the folder again") from None
    if name not in PIPELINES:
        raise CheckpointError(f"{index.parent} needs the pipeline {name!r}; known are {', '.join(PIPELINES)}")
    return name


def check_class(folder: str | Path, cls: type) -> None:
    """Raise CheckpointError where a pipeline folder needs another class than ``cls``."""
    index = Path(folder) / "model_index.json"
    if index.is_file() and not issubclass(cls, PIPELINES[_pipeline_of(index)]):
        raise CheckpointError(f"{folder} needs the pipeline {_pipeline_of(index)}, not {cls.__name__}: use AutoARPipeline")


def pipeline_for(kind: str) -> type[ARPipeline]:
    """The pipeline class for what :func:`recognise` found."""
    if kind in PIPELINES:
        return PIPELINES[kind]
    if kind == "llamagen":
        return LlamaGenPipeline
    return PIPELINES[next(family.pipeline for family in FAMILIES if family.kind == kind)]
