"""SimpleAR as a sample of :mod:`families`: a Qwen2 whose tokenizer has SimpleAR's special words, and codes behind them all.

As upstream's training left them: ``len(tokenizer) + codes`` ids, input and output embedding tied, bfloat16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import reference_cosmos
import torch
from families import CODES, Sample
from published_files import State, byte_tokenizer, byte_words, spelled, write_json, write_weights
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

WIDTH, LAYERS, HEADS, KV_HEADS, HIDDEN = 64, 2, 4, 2, 96
TEXT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL = ["<|t2i|>", "<|i2t|>", "<|soi|>", "<|vtokens|>", "<|t2v|>", "<|v2t|>", "<|sov|>"]
COSMOS = "Cosmos-1.0-Tokenizer-DV8x16x16"
NEGATIVE = (
    "An image of aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, bad eyes,"
    " bad limbs, distortion"
)


def words_of() -> dict[str, int]:
    words = byte_words()
    return words | {name: len(words) + i for i, name in enumerate([*TEXT, *SPECIAL])}


def write_sample(kind: str, folder: Path) -> SimpleARSample:
    """A checkpoint, with the image tokenizer in a folder in it."""
    words = words_of()
    state = write_simplear(folder, words)
    vq = reference_cosmos.write_cosmos(folder / COSMOS)
    parts = {"state": state, "words": words, "vq": vq}
    options = {"image_size": 64, "vq": folder / COSMOS}
    return SimpleARSample(kind, folder, (64, 64), options, ((16, 16), (32, 32), (64, 64), (96, 96)), parts)


def config_of(words: dict[str, int], codes: int = CODES) -> dict[str, Any]:
    """``config.json``, as published but for the sizes."""
    config: dict[str, Any] = {"_name_or_path": "./checkpoints/simpar_0.5B_sft", "architectures": ["SimpARForCausalLM"]}
    config |= {"attention_dropout": 0.0, "hidden_act": "silu"}
    config |= {"bos_token_id": words["<|endoftext|>"], "eos_token_id": words["<|im_end|>"]}
    config |= {"hidden_size": WIDTH, "initializer_range": 0.02, "intermediate_size": HIDDEN, "model_type": "qwen2"}
    config |= {"max_position_embeddings": 32768, "max_window_layers": 21, "num_attention_heads": HEADS}
    config |= {"num_hidden_layers": LAYERS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-06, "rope_scaling": None}
    config |= {"rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    config |= {"mm_patch_merge_type": "spatial_unpad", "tokenizer_padding_side": "right", "use_cache": True}
    return config | {"transformers_version": "4.47.0", "use_sliding_window": False, "vocab_size": len(words) + codes}


def write_simplear(folder: Path, words: dict[str, int], slow: bool = False, codes: int = CODES) -> State:
    """Without an image tokenizer; ``slow``: the tokenizer in files of the slow class."""
    config = config_of(words, codes)
    state = drawn_state(stock(config))
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"do_sample": True, "eos_token_id": [words["<|im_end|>"], words["<|endoftext|>"]], "top_k": 20},
    )
    write_weights(folder, state, shards=1)
    (write_slow if slow else write_fast)(folder, words)
    return state


def stock(config: dict[str, Any]) -> Any:
    """transformers' own, of these sizes; the rotary base by the name that it has there."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    sizes = {name: config[name] for name in (*names, "rms_norm_eps", "vocab_size", "tie_word_embeddings")}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, rope_parameters=rope, hidden_act="silu")).eval()


def drawn_state(model: Any, plus_one: bool = False) -> State:
    """Random weights of its keys and shapes, the tied head left out; ``plus_one``: norms multiply by 1 + weight."""
    generator, state = torch.Generator().manual_seed(0), {}
    for key, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if key == "lm_head.weight":
            continue
        if "norm" in key:
            noise = 0.2 * noise + (0 if plus_one else 1)
        elif "embed_tokens" in key:
            noise = 0.1 * noise
        elif value.ndim == 2:
            noise = 1.5 * noise / value.shape[-1] ** 0.5
        state[key] = noise.bfloat16()
    return state


def special_entries(words: dict[str, int]) -> dict[str, Any]:
    same = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    named = {str(words[name]): {"content": name, **same} for name in [*TEXT, *SPECIAL]}
    config: dict[str, Any] = {
        "add_prefix_space": False,
        "added_tokens_decoder": named,
        "bos_token": None,
        "errors": "replace",
    }
    config |= {"additional_special_tokens": SPECIAL, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config |= {"model_max_length": 4608, "padding_side": "right", "tokenizer_class": "Qwen2Tokenizer", "unk_token": None}
    return config | {"clean_up_tokenization_spaces": False, "split_special_tokens": False}


def write_fast(folder: Path, words: dict[str, int]) -> None:
    byte_tokenizer(words).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", special_entries(words))


def write_slow(folder: Path, words: dict[str, int]) -> None:
    special = {name: words[name] for name in [*TEXT, *SPECIAL]}
    write_json(folder / "vocab.json", {word: n for word, n in words.items() if word not in special})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    write_json(folder / "added_tokens.json", special)
    write_json(folder / "tokenizer_config.json", special_entries(words))


class StockSample(Sample):
    """Codes behind the words of a model that transformers has: SimpleAR, Liquid."""

    def network(self) -> Any:
        """transformers' own class with the published tensors, in double precision."""
        raise NotImplementedError

    def full_logits(self, ids: list[int]) -> Tensor:
        """[N, V] logits after each id."""
        if "network" not in self.parts:
            model = self.network()
            problems = model.load_state_dict(self.parts["state"], strict=False)
            assert problems.missing_keys == ["lm_head.weight"] and not problems.unexpected_keys
            model.tie_weights()
            self.parts["network"] = model.double()
        with torch.no_grad():
            logits: Tensor = self.parts["network"](torch.tensor([ids]), use_cache=False).logits[0]
        return logits

    def logits(self, prompt: list[int], picture: list[int]) -> Tensor:
        first = len(self.parts["words"])
        return self.full_logits([*prompt, *picture])[-len(picture) - 1 : -1, first : first + CODES]

    def legal(self, ids: list[int], size: tuple[int, int]) -> bool:
        """Nothing but codes, as many as squares of 16 pixels."""
        first = len(self.parts["words"])
        return len(ids) == (size[0] // 16) * (size[1] // 16) and all(first <= n < first + CODES for n in ids)


class SimpleARSample(StockSample):
    """SimpleAR."""

    def network(self) -> Any:
        return stock(json.loads((self.folder / "config.json").read_text()))

    def decode(self, codes: Tensor) -> Tensor:
        return reference_cosmos.decode(self.parts["vq"], codes)

    def streams(self, text: str, size: tuple[int, int]) -> tuple[list[int], list[int]]:
        words: dict[str, int] = self.parts["words"]
        captions = ("A highly realistic image of " + text, NEGATIVE)
        first, second = ([words["<|t2i|>"], *spelled(words, caption), words["<|soi|>"]] for caption in captions)
        return first, second
