"""Diffusers-style pipelines: prompt in, pictures out, with a decoding strategy as the component ``decoder``."""

from arsd.pipelines.anole import AnolePipeline
from arsd.pipelines.auto import AutoARPipeline
from arsd.pipelines.base import ARImagePipeline
from arsd.pipelines.emu3 import Emu3Pipeline, Emu35Pipeline
from arsd.pipelines.glm_acceleration import accelerate
from arsd.pipelines.glm_image import GLMImagePipeline
from arsd.pipelines.janus import JanusPipeline
from arsd.pipelines.liquid import LiquidPipeline
from arsd.pipelines.llamagen import LlamaGenPipeline
from arsd.pipelines.lumina_mgpt import LuminaMGPTPipeline
from arsd.pipelines.outputs import ARPipelineOutput
from arsd.pipelines.simplear import SimpleARPipeline

__all__ = [
    "ARImagePipeline",
    "ARPipelineOutput",
    "AnolePipeline",
    "AutoARPipeline",
    "Emu35Pipeline",
    "Emu3Pipeline",
    "GLMImagePipeline",
    "JanusPipeline",
    "LiquidPipeline",
    "LlamaGenPipeline",
    "LuminaMGPTPipeline",
    "SimpleARPipeline",
    "accelerate",
]
