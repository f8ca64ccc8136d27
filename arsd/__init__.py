"""arsd: fast autoregressive image generation that can prove what it did to the output."""

from __future__ import annotations

import importlib
import os.path
from typing import TYPE_CHECKING, Any

_here = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_here, "pipelines")):  # a checkout without symbolic links
    __path__.append(os.path.dirname(_here))

__version__ = "0.1.0"

_LAZY = {
    "AnolePipeline": "arsd.pipelines.anole",
    "ARPipelineOutput": "arsd.pipelines.outputs",
    "ArsdError": "arsd.errors",
    "accelerate": "arsd.pipelines.glm_acceleration",
    "AutoARPipeline": "arsd.pipelines.auto",
    "Autoregressive": "arsd.decoding.strategies",
    "ARVideoOutput": "arsd.pipelines.outputs",
    "CosmosARPipeline": "arsd.pipelines.cosmos",
    "CosmosTransformer": "arsd.models.cosmos",
    "CosmosTokenizer": "arsd.tokenizers.cosmos",
    "CoolSD": "arsd.decoding.relaxed_strategies",
    "EXP3Spec": "arsd.decoding.bandit_strategies",
    "Emu35Pipeline": "arsd.pipelines.emu3",
    "Emu3Pipeline": "arsd.pipelines.emu3",
    "Emu3VQTokenizer": "arsd.tokenizers.emu3",
    "Eagle": "arsd.decoding.model_strategies",
    "EagleDrafter": "arsd.models.eagle",
    "FrameCopy": "arsd.decoding.frame_copy",
    "GLMImagePipeline": "arsd.pipelines.glm_image",
    "GenerateFnOutput": "arsd.generation",
    "GroupedSD": "arsd.decoding.relaxed_strategies",
    "Hybrid": "arsd.decoding.model_strategies",
    "Lantern": "arsd.decoding.relaxed_strategies",
    "LanternPlusPlus": "arsd.decoding.relaxed_strategies",
    "IVideoGPTPipeline": "arsd.pipelines.ivideogpt",
    "JanusPipeline": "arsd.pipelines.janus",
    "LARPPipeline": "arsd.pipelines.larp",
    "LiquidPipeline": "arsd.pipelines.liquid",
    "LayerSkip": "arsd.decoding.layer_skip",
    "LlamaGenPipeline": "arsd.pipelines.llamagen",
    "LlamaGenTransformer": "arsd.models.llamagen",
    "LuminaMGPTPipeline": "arsd.pipelines.lumina_mgpt",
    "MineWorldPipeline": "arsd.pipelines.mineworld",
    "PromptLookup": "arsd.decoding.lookup",
    "PassCosts": "arsd.decoding.costs",
    "PublishedCoolSD": "arsd.decoding.relaxed_strategies",
    "SimpleARPipeline": "arsd.pipelines.simplear",
    "SJD": "arsd.decoding.strategies",
    "SmallARDrafter": "arsd.decoding.small_ar",
    "SparseToDense": "arsd.decoding.sparse_to_dense",
    "Speculative": "arsd.decoding.speculative",
    "TokenRecycling": "arsd.decoding.recycling",
    "UCBSpec": "arsd.decoding.bandit_strategies",
    "VQGANTokenizer": "arsd.tokenizers.vqgan",
    "VQTokenizer": "arsd.tokenizers.vq",
    "VideoLLMPipeline": "arsd.pipelines.video_llm",
    "generate_fn": "arsd.generation",
    "parse_strategy": "arsd.decoding.strategies",
    "save_png": "arsd.provenance",
    "save_webp": "arsd.clip_files",
    "register_drafter": "arsd.decoding.registry",
    "register_rule": "arsd.decoding.registry",
    "shipped_models": "arsd.pipelines.auto",
}
__all__ = sorted(_LAZY)

if TYPE_CHECKING:
    from arsd.clip_files import save_webp
    from arsd.decoding.bandit_strategies import EXP3Spec, UCBSpec
    from arsd.decoding.costs import PassCosts
    from arsd.decoding.frame_copy import FrameCopy
    from arsd.decoding.layer_skip import LayerSkip
    from arsd.decoding.lookup import PromptLookup
    from arsd.decoding.model_strategies import Eagle, Hybrid
    from arsd.decoding.recycling import TokenRecycling
    from arsd.decoding.registry import register_drafter, register_rule
    from arsd.decoding.relaxed_strategies import CoolSD, GroupedSD, Lantern, LanternPlusPlus, PublishedCoolSD
    from arsd.decoding.small_ar import SmallARDrafter
    from arsd.decoding.sparse_to_dense import SparseToDense
    from arsd.decoding.speculative import Speculative
    from arsd.decoding.strategies import SJD, Autoregressive, parse_strategy
    from arsd.errors import ArsdError
    from arsd.generation import GenerateFnOutput, generate_fn
    from arsd.models.cosmos import CosmosTransformer
    from arsd.models.eagle import EagleDrafter
    from arsd.models.llamagen import LlamaGenTransformer
    from arsd.pipelines.anole import AnolePipeline
    from arsd.pipelines.auto import AutoARPipeline, shipped_models
    from arsd.pipelines.cosmos import CosmosARPipeline
    from arsd.pipelines.emu3 import Emu3Pipeline, Emu35Pipeline
    from arsd.pipelines.glm_acceleration import accelerate
    from arsd.pipelines.glm_image import GLMImagePipeline
    from arsd.pipelines.ivideogpt import IVideoGPTPipeline
    from arsd.pipelines.janus import JanusPipeline
    from arsd.pipelines.larp import LARPPipeline
    from arsd.pipelines.liquid import LiquidPipeline
    from arsd.pipelines.llamagen import LlamaGenPipeline
    from arsd.pipelines.lumina_mgpt import LuminaMGPTPipeline
    from arsd.pipelines.mineworld import MineWorldPipeline
    from arsd.pipelines.outputs import ARPipelineOutput, ARVideoOutput
    from arsd.pipelines.simplear import SimpleARPipeline
    from arsd.pipelines.video_llm import VideoLLMPipeline
    from arsd.provenance import save_png
    from arsd.tokenizers.cosmos import CosmosTokenizer
    from arsd.tokenizers.emu3 import Emu3VQTokenizer
    from arsd.tokenizers.vq import VQTokenizer
    from arsd.tokenizers.vqgan import VQGANTokenizer


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'arsd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
