"""What the writers of tiny published folders share: weights in transformers' containers, JSON, a text tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

State = dict[str, Tensor]


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def write_weights(folder: Path, state: State, shards: int = 2, suffix: str = ".safetensors") -> None:
    """``model.safetensors`` or ``pytorch_model.bin``, or their shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    keys = sorted(state)
    weight_map = {}
    for i in range(shards):
        name = f"{stem}-{i + 1:05d}-of-{shards:05d}{suffix}" if shards > 1 else stem + suffix
        part = {key: state[key] for key in keys[i * len(keys) // shards : (i + 1) * len(keys) // shards]}
        save_file(part, folder / name, {"format": "pt"}) if suffix == ".safetensors" else torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        size = sum(value.nbytes for value in state.values())
        write_json(folder / f"{stem}{suffix}.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def byte_words(first: int = 0) -> dict[str, int]:
    """Ids of the 256 bytes, as byte-level tokenizers write them, from ``first`` on."""
    return {word: first + i for i, word in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_tokenizer(words: dict[str, int]) -> Tokenizer:
    """Cuts text into bytes, and knows the words in angle brackets as special ones."""
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(w, normalized=False) for w in words if len(w) > 1 and w.startswith("<")])
    return tokenizer


def spelled(words: dict[str, int], text: str) -> list[int]:
    """The ids of a text, byte by byte."""
    letters = {" ": "\u0120", "\n": "\u010a"}
    return [words[letters.get(letter, letter)] for letter in text]
