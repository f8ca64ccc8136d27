"""Diffusers-style pipelines: prompt in, pictures out, with a decoding strategy as the component ``decoder``."""

from arsd.pipelines.auto import AutoARPipeline
from arsd.pipelines.base import ARImagePipeline, ARPipelineOutput
from arsd.pipelines.llamagen import LlamaGenPipeline

__all__ = ["ARImagePipeline", "ARPipelineOutput", "AutoARPipeline", "LlamaGenPipeline"]
