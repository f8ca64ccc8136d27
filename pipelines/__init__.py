"""Diffusers-style pipelines: prompt in, pictures or clips out, with a decoding strategy as the component ``decoder``."""

from arsd.pipelines.anole import AnolePipeline
from arsd.pipelines.auto import AutoARPipeline
from arsd.pipelines.base import ARImagePipeline
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
from arsd.pipelines.video import ARVideoPipeline

__all__ = [
    "ARImagePipeline",
    "ARPipelineOutput",
    "ARVideoOutput",
    "ARVideoPipeline",
    "AnolePipeline",
    "AutoARPipeline",
    "CosmosARPipeline",
    "Emu35Pipeline",
    "Emu3Pipeline",
    "GLMImagePipeline",
    "IVideoGPTPipeline",
    "JanusPipeline",
    "LARPPipeline",
    "LiquidPipeline",
    "LlamaGenPipeline",
    "LuminaMGPTPipeline",
    "MineWorldPipeline",
    "SimpleARPipeline",
    "accelerate",
]
