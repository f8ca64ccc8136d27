"""Emu3 in both layouts and Emu3.5, as samples of :mod:`families`.

BAAI's folders have ``emu3.tiktoken`` (here: the 256 bytes and a few longer pieces) and the list of special words, with ids
from 151643 on; transformers' has ``tokenizer.json`` and one configuration for language model and image tokenizer.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import reference_emu3_vq
import reference_llama
import reference_vqgan
import torch
from families import CODES, Sample
from published_files import State, byte_tokenizer, byte_words, spelled, write_json, write_weights
from torch import Tensor

WIDTH, LAYERS, HEADS, KV_HEADS, HIDDEN, HEAD_DIM = 64, 2, 4, 2, 96, 32
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
VISION = ["<|image token|>", "<|image start|>", "<|image end|>", *(f"<|visual token {i:06d}|>" for i in range(CODES))]
FIRST_SPECIAL = 151643
PIECES = [b"ca", b"cat", b" a", b"pp", b"le", b"pple", b"ed", b" red", b"ta", b"ble", b"lo", b"ow", b"quality"]
IBQ = {"ch": 32, "mult": (1, 1, 1, 1, 1), "blocks": 1, "z": 16, "dim": 16, "codes": CODES}
QUALITY = " masterpiece, film grained, best quality."
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
EMU3_SIZES = ((8, 8), (8, 24), (24, 8), (32, 32), (64, 40))
EMU35_SIZES = ((16, 16), (16, 48), (48, 16), (64, 32))
OTHERS = {
    "attention_dropout": 0.1,
    "bos_token_id": 151849,
    "boi_token_id": 151852,
    "eof_token_id": 151847,
    "eoi_token_id": 151853,
    "eol_token_id": 151846,
    "eos_token_id": 151850,
    "img_token_id": 151851,
    "pad_token_id": 151643,
    "hidden_act": "silu",
    "image_area": 518400,
    "initializer_range": 0.02,
    "max_position_embeddings": 9216,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
}


def write_sample(kind: str, folder: Path) -> Sample:
    """A checkpoint of this kind; BAAI's image tokenizers lie beside it, as users put them."""
    words = small_words() if kind == "emu3-hf" else {name: FIRST_SPECIAL + i for i, name in enumerate(SPECIAL + VISION)}
    vocab = max(words.values()) + 1
    network = (
        vocab,
        WIDTH,
        LAYERS,
        HEADS,
        KV_HEADS,
        HEAD_DIM if kind == "emu3.5" else WIDTH // HEADS,
        HIDDEN,
        kind == "emu3.5",
    )
    state = {key: value.bfloat16() for key, value in reference_llama.llama_state(*network).items()}
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
    sizes |= {"num_key_value_heads": KV_HEADS, "vocab_size": vocab}
    parts: dict[str, Any] = {"state": state, "words": words}
    if kind == "emu3.5":
        write_baai(folder, state, sizes | {"head_dim": HEAD_DIM})
        parts["vq"] = reference_vqgan.vqgan_state(**IBQ)
        write_ibq(folder.parent / "ibq", parts["vq"])
        options: dict[str, Any] = {"vq": folder.parent / "ibq"}
        return Emu35Sample(kind, folder, (64, 48), options, EMU35_SIZES, parts)
    parts["vq"] = reference_emu3_vq.emu3_vq_state()
    if kind == "emu3":
        write_baai(folder, state, sizes)
        write_vision_tokenizer(folder.parent / "vision", parts["vq"])
        return Emu3Sample(kind, folder, (32, 24), {"vq": folder.parent / "vision"}, EMU3_SIZES, parts)
    parts["vq"] = {k: v.bfloat16() if v.is_floating_point() else v for k, v in parts["vq"].items()}
    write_hf(folder, state, sizes, parts["vq"], words)
    return Emu3Sample(kind, folder, (32, 24), {}, EMU3_SIZES, parts)


def write_baai(folder: Path, state: State, sizes: dict[str, int], tokenizer: bool = True) -> None:
    names = {"AutoConfig": "configuration_emu3.Emu3Config", "AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM"}
    write_json(
        folder / "config.json",
        {"architectures": ["Emu3ForCausalLM"], "auto_map": names, "model_type": "Emu3", **OTHERS, **sizes},
    )
    write_json(folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": 151849, "do_sample": True})
    write_weights(folder, state)
    if tokenizer:
        write_tiktoken(folder)


def write_tiktoken(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [bytes([i]) for i in range(256)] + PIECES
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(pieces)]
    (folder / "emu3.tiktoken").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "emu3_vision_tokens.txt").write_text("\n".join(VISION) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "Emu3Tokenizer", "model_max_length": 9216})


def write_vision_tokenizer(folder: Path, state: State, **changed: Any) -> None:
    n = reference_emu3_vq.SIZES
    config = {"architectures": ["Emu3VisionVQModel"], "model_type": "Emu3VisionVQ", "torch_dtype": "float32", "dropout": 0.0}
    config |= {"attn_resolutions": list(n["attn"]), "ch": n["ch"], "ch_mult": list(n["mult"]), "codebook_size": n["codes"]}
    config |= {"double_z": False, "embed_dim": n["dim"], "in_channels": 3, "num_res_blocks": n["blocks"], "out_channels": 3}
    config |= {"temporal_downsample_factor": n["frames"], "z_channels": n["z"]}
    write_json(folder / "config.json", config | changed)
    write_json(folder / "preprocessor_config.json", {"spatial_factor": 8, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    write_weights(folder, state, shards=1)


def write_ibq(folder: Path, state: State) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["n_embed: 32", "embed_dim: 16", "ddconfig:", "  z_channels: 16", "  ch: 32", "  ch_mult: [1, 1, 1, 1, 1]"]
    (folder / "config.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    torch.save(state, folder / "model.ckpt")


def small_words() -> dict[str, int]:
    """transformers' layout keeps all ids in its own files: here they are as small as they can be."""
    words = byte_words()
    return words | {name: len(words) + i for i, name in enumerate([*SPECIAL, *VISION, "<image>"])}


def write_hf(folder: Path, state: State, sizes: dict[str, int], vq: State, words: dict[str, int]) -> None:
    """As the ports were published: prefixes ``text_model.`` and ``vqmodel.``, matrices where BAAI has 1x1 convolutions."""
    text = {"model_type": "emu3_text_model", **OTHERS, **sizes, "attention_bias": False, "mlp_bias": False}
    text |= {
        "pad_token_id": words["<|endoftext|>"],
        "bos_token_id": words["<|extra_203|>"],
        "eos_token_id": words["<|extra_204|>"],
    }
    n = reference_emu3_vq.SIZES
    image = {
        "model_type": "emu3_vqgan",
        "attn_resolutions": list(n["attn"]),
        "base_channels": n["ch"],
        "codebook_size": n["codes"],
    }
    image |= {
        "channel_multiplier": list(n["mult"]),
        "embed_dim": n["dim"],
        "latent_channels": n["z"],
        "double_latent": False,
    }
    image |= {
        "num_res_blocks": n["blocks"],
        "temporal_downsample_factor": n["frames"],
        "hidden_size": n["ch"] * n["mult"][-1],
    }
    config = {"architectures": ["Emu3ForConditionalGeneration"], "model_type": "emu3", "torch_dtype": "bfloat16"}
    kept = {word: number for word, number in words.items() if word.startswith("<")}
    write_json(folder / "config.json", config | {"text_config": text, "vq_config": image, "vocabulary_map": kept})
    both = {f"text_model.{key}": value for key, value in state.items()}
    both |= {
        f"vqmodel.{hf_key(key)}": value[..., 0, 0].contiguous() if is_matrix(key) else value for key, value in vq.items()
    }
    write_weights(folder, both)
    byte_tokenizer(words).save(str(folder / "tokenizer.json"))
    special = {
        "bos_token": "<|extra_203|>",
        "eos_token": "<|extra_204|>",
        "pad_token": "<|endoftext|>",
        "eof_token": "<|extra_201|>",
    }
    special |= {"boi_token": "<|image start|>", "eoi_token": "<|image end|>", "image_wrapper_token": "<|image token|>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "image_token": "<image>", **special})


def is_matrix(key: str) -> bool:
    return any(f".{part}.weight" in key for part in ("q", "k", "v", "proj_out"))


def hf_key(key: str) -> str:
    """transformers' name of an image tokenizer's key."""
    key = key.replace("encoder.down.", "encoder.down_block.down.").replace("decoder.up.", "decoder.up_block.up.")
    key = key.replace(".mid.attn_1.norm.", ".middle_block.attn_norm.").replace(".mid.", ".middle_block.")
    for i in range(4):
        key = key.replace(f".attn.{i}.norm.", f".attn_norms.{i}.")
    for part, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("proj_out", "out_proj")):
        key = key.replace(f".{part}.weight", f".{name}.weight").replace(f".{part}.bias", f".{name}.bias")
    return key


class Emu3Sample(Sample):
    """Emu3 in either layout."""

    factor, tail = 8, ("<|extra_201|>", "<|image end|>", "<|extra_204|>")

    @property
    def first_code(self) -> int:
        return int(self.parts["words"]["<|visual token 000000|>"])

    def logits(self, prompt: list[int], picture: list[int]) -> Tensor:
        every = reference_llama.logits(self.parts["state"], torch.tensor([*prompt, *picture]), HEADS, KV_HEADS)
        return every[-len(picture) - 1 : -1, self.first_code : self.first_code + CODES]

    def decode(self, codes: Tensor) -> Tensor:
        state = {key: value.double() if value.is_floating_point() else value for key, value in self.parts["vq"].items()}
        return reference_emu3_vq.decode(state, codes)

    def spelled(self, text: str) -> list[int]:
        return spelled(self.parts["words"], text) if self.kind == "emu3-hf" else pieces_of(text)

    def opening(self, size: tuple[int, int]) -> list[int]:
        words, (rows, columns) = self.parts["words"], (side // self.factor for side in size)
        return [words["<|image start|>"], *self.spelled(f"{rows}*{columns}"), words["<|image token|>"]]

    def streams(self, text: str, size: tuple[int, int]) -> tuple[list[int], list[int]]:
        first = self.parts["words"]["<|extra_203|>"]
        opening = self.opening(size)
        return [first, *self.spelled(text + QUALITY), *opening], [first, *self.spelled(NEGATIVE), *opening]

    def legal(self, ids: list[int], size: tuple[int, int]) -> bool:
        words, (h, w) = self.parts["words"], (side // self.factor for side in size)
        for o, number in enumerate(ids, 1):
            if o % (w + 1) == 0 and o <= h * (w + 1):
                right = number == words["<|extra_200|>"]
            elif o > h * (w + 1):
                right = number == words[self.tail[o - h * (w + 1) - 1]]
            else:
                right = self.first_code <= number < self.first_code + CODES
            if not right:
                return False
        return len(ids) == h * (w + 1) + 3


class Emu35Sample(Emu3Sample):
    """Emu3.5."""

    factor = 16

    def decode(self, codes: Tensor) -> Tensor:
        return reference_vqgan.decode({key: value.double() for key, value in self.parts["vq"].items()}, codes)

    def streams(self, text: str, size: tuple[int, int]) -> tuple[list[int], list[int]]:
        words = self.parts["words"]
        first, answer, opening = words["<|extra_203|>"], words["<|extra_100|>"], self.opening(size)
        asked = self.spelled(f"You are a helpful assistant for t2i task. USER: {text} ASSISTANT: ")
        unasked = self.spelled("You are a helpful assistant. USER:  ASSISTANT: ")
        return [first, *asked, answer, *opening], [first, *unasked, answer, *opening]

    def legal(self, ids: list[int], size: tuple[int, int]) -> bool:
        words, (h, w) = self.parts["words"], (side // self.factor for side in size)
        for o, number in enumerate(ids, 1):
            if o == h * (w + 1):
                right = number == words["<|image end|>"]
            elif o % (w + 1) == 0:
                right = number == words["<|extra_200|>"]
            else:
                right = self.first_code <= number < self.first_code + CODES
            if not right:
                return False
        return len(ids) == h * (w + 1)


def pieces_of(text: str) -> list[int]:
    """Ids of a text by the ranks of its pieces: of all neighbours, the pair with the least rank is joined first."""
    import re

    ranks = {piece: rank for rank, piece in enumerate([bytes([i]) for i in range(256)] + PIECES)}
    cut = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    found = []
    for word in re.findall(cut, text):
        parts = [word.encode()] if word.encode() in ranks else [bytes([byte]) for byte in word.encode()]
        while True:
            joined = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks]
            if not joined:
                break
            i = min(joined)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found += [ranks[part] for part in parts]
    return found
