"""Liquid as a sample of :mod:`families`: a Gemma with three of its unused words renamed, and codes behind them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import reference_vqgan
import torch
from families import CODES
from family_chameleon import F16
from family_simplear import StockSample, drawn_state
from published_files import State, byte_tokenizer, byte_words, spelled, write_json, write_weights
from tokenizers import processors
from torch import Tensor
from transformers import GemmaConfig, GemmaForCausalLM

WIDTH, LAYERS, HEADS, HEAD_DIM, HIDDEN = 64, 2, 4, 32, 96
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "<at-bos>", "<boi>", "<eoi>", "<unconditional>"]


def words_of() -> dict[str, int]:
    return {name: i for i, name in enumerate(SPECIAL)} | byte_words(len(SPECIAL))


def write_sample(kind: str, folder: Path) -> LiquidSample:
    """A checkpoint, with Chameleon's image tokenizer where upstream's scripts have it."""
    words, vq = words_of(), reference_vqgan.vqgan_state(**F16)
    state = write_liquid(folder, words)
    (folder / "chameleon").mkdir()
    torch.save({"state_dict": vq}, folder / "chameleon" / "vqgan.ckpt")
    parts = {"state": state, "words": words, "vq": vq}
    return LiquidSample(kind, folder, (64, 64), {"image_size": 64}, ((16, 16), (64, 64), (96, 96)), parts)


def write_liquid(folder: Path, words: dict[str, int], codes: int = CODES) -> State:
    """``config.json`` as published but for the sizes; no image tokenizer."""
    config: dict[str, Any] = {"_name_or_path": "gemma7b_multimodal", "architectures": ["GemmaForCausalLM"]}
    config |= {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config |= {"head_dim": HEAD_DIM, "hidden_act": "gelu", "hidden_activation": None, "hidden_size": WIDTH}
    config |= {"initializer_range": 0.02, "intermediate_size": HIDDEN, "max_position_embeddings": 8192}
    config |= {"model_type": "gemma", "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "rms_norm_eps": 1e-06}
    config |= {"num_key_value_heads": HEADS, "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16"}
    config |= {"transformers_version": "4.39.2", "use_cache": True, "vocab_size": len(words) + codes}
    state = drawn_state(stock(len(words) + codes), plus_one=True)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 1})
    write_weights(folder, state)
    tokenizer = byte_tokenizer(words)
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", words["<bos>"])])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {"add_bos_token": True, "tokenizer_class": "GemmaTokenizer", **special})
    return state


def stock(vocab: int) -> Any:
    """transformers' own, with the activation that Gemma was trained with."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": vocab}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM}
    return GemmaForCausalLM(GemmaConfig(**sizes, **heads, hidden_act="gelu_pytorch_tanh", rms_norm_eps=1e-6)).eval()


class LiquidSample(StockSample):
    """Liquid."""

    def network(self) -> Any:
        return stock(len(self.parts["words"]) + CODES)

    def decode(self, codes: Tensor) -> Tensor:
        return reference_vqgan.decode({key: value.double() for key, value in self.parts["vq"].items()}, codes)

    def streams(self, text: str, size: tuple[int, int]) -> tuple[list[int], list[int]]:
        words: dict[str, int] = self.parts["words"]
        asked = spelled(words, text + " Generate an image based on this description.")
        return [words["<bos>"], *asked, words["<boi>"]], [words["<bos>"], words["<unconditional>"], words["<boi>"]]
