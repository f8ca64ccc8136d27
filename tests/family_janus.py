"""Janus-Pro in both layouts as samples of :mod:`families`; what is expected comes from transformers' own whole network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from families import CODES, Sample
from published_files import State, byte_tokenizer, byte_words, spelled, write_json, write_weights
from torch import Tensor
from transformers import JanusConfig, JanusForConditionalGeneration

WIDTH, LAYERS, HEADS, HIDDEN, SIDE, EYES, CODE_DIM = 64, 2, 4, 96, 64, 32, 8
BOS, EOS, PAD, BEGIN = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"
MORE = ("<|User|>", "<|Assistant|>", "<image_placeholder>", "<end_of_image>")
VQ_SIZES = {"base_channels": 32, "channel_multiplier": [1, 1, 1, 1, 1], "num_res_blocks": 1, "latent_channels": 16}
ORIGINAL = (  # transformers' keys to the original ones
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.generation_embeddings\.", "gen_embed."),
    (r"^model\.generation_aligner\.fc1\.", "gen_aligner.layers.0."),
    (r"^model\.generation_aligner\.hidden_layers\.0\.", "gen_aligner.layers.2."),
    (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
    (r"^model\.generation_head\.", "gen_head."),
    (r"^model\.aligner\.fc1\.", "aligner.layers.0."),
    (r"^model\.aligner\.hidden_layers\.0\.", "aligner.layers.2."),
    (r"^model\.vqmodel\.((?:en|de)coder)\.(?:down|up)\.", r"gen_vision_model.\1.conv_blocks."),
    (r"^model\.vqmodel\.", "gen_vision_model."),
    (r"^(gen_vision_model\..*)\.block\.", r"\1.res."),
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
)


def words_of() -> dict[str, int]:
    words = byte_words()
    return words | {name: len(words) + i for i, name in enumerate((BOS, EOS, PAD, *MORE, BEGIN))}


def text_sizes() -> dict[str, Any]:
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return sizes | {"num_key_value_heads": HEADS, "vocab_size": len(words_of()), "max_position_embeddings": 16384}


def config_of() -> dict[str, Any]:
    """As deepseek-community has it, which says nothing of ties."""
    eyes = {"hidden_size": EYES, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 16}
    eyes |= {"projection_dim": WIDTH, "num_image_tokens": (SIDE // 16) ** 2, "depth": 2, "mlp_ratio": 2.0}
    codes = {"embed_dim": CODE_DIM, "num_embeddings": CODES, "projection_dim": WIDTH, "image_token_embed_dim": WIDTH}
    codes |= VQ_SIZES | {"num_patches": SIDE // 16, "num_hidden_layers": 2}
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "image_token_id": words_of()["<image_placeholder>"],
        "model_type": "janus",
        "text_config": text_sizes() | {"model_type": "llama", "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16"},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.0.dev0",
        "vision_config": eyes | {"model_type": "janus_vision_model"},
        "vq_config": codes | {"model_type": "janus_vqgan"},
    }


def janus_state(seed: int = 0) -> State:
    """Random weights whose laws are far from uniform, by transformers' keys; the head over words is not the embedding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration(JanusConfig.from_dict(config_of() | {"tie_word_embeddings": False}))
        for name, p in model.named_parameters():
            if p.ndim == 2 and "vqmodel" not in name:
                torch.nn.init.normal_(p, std=1.0 if "embed" in name else 1.5 / p.shape[1] ** 0.5)
            elif p.ndim == 1 and "norm" in name:
                torch.nn.init.normal_(p, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
        torch.nn.init.normal_(model.model.vqmodel.quantize.embedding.weight, std=2.0)  # of any length
    return {key: value.detach().bfloat16() for key, value in model.state_dict().items() if "position_ids" not in key}


def original_state(state: State) -> State:
    """The same by the original keys, with the other names and shapes of the encoder that understands pictures (timm)."""
    found = {key: value for key, value in state.items() if not key.startswith("model.vision_model.")}
    for old, new in ORIGINAL:
        found = {re.sub(old, new, key): value for key, value in found.items()}
    found["gen_vision_model.quantize.codebook_used"] = torch.zeros(65536)
    eyes = {"patch_embed.proj.weight": (EYES, 3, 16, 16), "pos_embed": (1, 16, EYES), "norm.weight": (EYES,)}
    eyes |= {"blocks.0.attn.qkv.weight": (3 * EYES, EYES), "attn_pool.latent": (1, 1, EYES)}
    return found | {f"vision_model.vision_tower.{key}": torch.ones(shape).bfloat16() for key, shape in eyes.items()}


def original_config() -> dict[str, Any]:
    """As deepseek-ai has it: parts with ``cls`` and ``params``; the language model without what LLaMA's defaults say."""

    def part(cls: str, kind: str, **params: Any) -> dict[str, Any]:
        return {"cls": cls, "model_type": kind, "params": params}

    mlp = {"depth": 2, "n_embed": WIDTH, "projector_type": "mlp_gelu"}
    head = {"image_token_embed": WIDTH, "image_token_size": CODES, "n_embed": WIDTH}
    eyes = {"image_size": SIDE, "model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1}
    return {
        "aligner_config": part("MlpProjector", "aligner", **mlp, input_dim=EYES),
        "architectures": ["MultiModalityCausalLM"],
        "gen_aligner_config": part("MlpProjector", "gen_aligner", **mlp, input_dim=CODE_DIM),
        "gen_head_config": part("vision_head", "gen_head", **head),
        "gen_vision_config": part("VQ-16", "gen_vision", image_token_size=CODES, n_embed=CODE_DIM),
        "language_config": text_sizes() | {"model_type": "llama", "torch_dtype": "bfloat16"},
        "model_type": "multi_modality",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "vision_config": part("CLIPVisionTower", "vision", **eyes),
    }


def write_sample(kind: str, folder: Path) -> Sample:
    """A checkpoint of this kind."""
    state, words = janus_state(), words_of()
    folder.mkdir(parents=True, exist_ok=True)
    ends = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    write_json(folder / "special_tokens_map.json", ends)
    write_json(folder / "tokenizer_config.json", ends | {"add_bos_token": True, "tokenizer_class": "LlamaTokenizer"})
    byte_tokenizer(words).save(str(folder / "tokenizer.json"))
    if kind == "janus":
        write_json(folder / "config.json", config_of())
        write_json(folder / "generation_config.json", {"bos_token_id": words[BOS], "guidance_scale": 5})
        write_weights(folder, state, shards=2)
    else:
        write_json(folder / "config.json", original_config())
        write_json(folder / "processor_config.json", {"processor_class": "VLChatProcessor", "sft_format": "deepseek"})
        write_weights(folder, original_state(state), shards=1, suffix=".bin")
    return JanusSample(kind, folder, (SIDE, SIDE), parts={"state": state, "words": words})


class JanusSample(Sample):
    """Of either layout."""

    @property
    def whole(self) -> Any:
        """Transformers' network with all its parts, in float64."""
        if "whole" not in self.parts:
            model = JanusForConditionalGeneration(JanusConfig.from_dict(config_of() | {"tie_word_embeddings": False}))
            missing, unexpected = model.load_state_dict(self.parts["state"], strict=False)
            assert not unexpected and all("position_ids" in key for key in missing)
            self.parts["whole"] = model.double().eval()
        return self.parts["whole"]

    @torch.no_grad()
    def logits(self, prompt: list[int], picture: list[int]) -> Tensor:
        inner = self.whole.model
        codes = self.whole.prepare_embeddings_for_image_generation(torch.tensor([picture]))
        embeds = torch.cat([inner.language_model.embed_tokens(torch.tensor([prompt])), codes], dim=1)
        hidden = inner.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return inner.generation_head(hidden)[0, -len(picture) - 1 : -1]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        return self.whole.decode_image_tokens(codes.flatten(1)).permute(0, 3, 1, 2)

    def streams(self, text: str, size: tuple[int, int]) -> tuple[list[int], list[int]]:
        words: dict[str, int] = self.parts["words"]
        user = [words["<|User|>"], *spelled(words, f": {text}\n\n")]
        full = [words[BOS], *user, words["<|Assistant|>"], *spelled(words, ":"), words[BEGIN]]
        return full, [words[BOS], *[words[PAD]] * (len(full) - 2), words[BEGIN]]

    def legal(self, ids: list[int], size: tuple[int, int]) -> bool:
        return len(ids) == (size[0] // 16) * (size[1] // 16) and all(0 <= number < CODES for number in ids)
