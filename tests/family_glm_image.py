"""GLM-Image in the published layout: a complete pipeline of diffusers with tiny random weights, and what is true of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from families import CODES, Sample
from published_files import byte_tokenizer, byte_words, spelled
from torch import Tensor
from transformers import (
    ByT5Tokenizer,
    GenerationConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessorPil,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

START, END, HEAD = CODES, CODES + 1, CODES + 8  # as 16384, 16385 and 16512 are to 16384 codes
BEGIN, CLOSE, PICTURE, PAD = "<sop>", "<eop>", "<|image|>", "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|dit_token_16384|><|image|><|dit_token_16385|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
SIZES = ((32, 128), (96, 32), (64, 64))


def vocabulary() -> dict[str, int]:
    """Codes, the two words around a picture, rows of the head that mean nothing, bytes, special words."""
    names = [*range(CODES), 16384, 16385, *range(16386, 16386 + HEAD - CODES - 2)]
    words = {f"<|dit_token_{name}|>": i for i, name in enumerate(names)}
    words |= byte_words(HEAD)
    return words | {word: len(words) + i for i, word in enumerate((BEGIN, CLOSE, PICTURE, PAD))}


def make_processor() -> GlmImageProcessor:
    special: Any = {"image_token": PICTURE, "grid_bos_token": BEGIN, "grid_eos_token": CLOSE}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(vocabulary()),
        bos_token="<|dit_token_16384|>",
        eos_token="<|dit_token_16385|>",
        pad_token=PAD,
        padding_side="left",
        extra_special_tokens=special,
    )
    pictures = GlmImageImageProcessorPil(
        size={"shortest_edge": 32 * 32, "longest_edge": 512 * 512}, patch_size=16, merge_size=1, temporal_patch_size=1
    )
    return GlmImageProcessor(pictures, tokenizer, chat_template=TEMPLATE)


def make_network(seed: int = 0, width: int = 64) -> GlmImageForConditionalGeneration:
    """Two layers whose random laws are far from uniform; text, picture and position all matter."""
    words = vocabulary()
    text = {"vocab_size": len(words), "hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"num_attention_heads": width // 16, "num_key_value_heads": width // 32, "vision_vocab_size": HEAD}
    text |= {"pad_token_id": words[PAD], "eos_token_id": END, "max_position_embeddings": 4096}
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "image_size": 128, "patch_size": 16}
    codes = {"embed_dim": 16, "num_embeddings": CODES, "latent_channels": 32}
    config = GlmImageConfig(
        text_config=text | {"rope_parameters": rotary},
        vision_config=vision,
        vq_config=codes,
        image_token_id=words[PICTURE],
        image_start_token_id=START,
        image_end_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GlmImageForConditionalGeneration(config)
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                fan = 1.0 if "embed" in name else p[0].numel()
                torch.nn.init.normal_(p, std=(2.5 if "lm_head" in name else 1.2) / fan**0.5)
            elif "norm" in name and "bias" not in name:
                torch.nn.init.normal_(p, mean=1.0, std=0.1)
            else:
                torch.nn.init.normal_(p, std=0.1)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.9, top_p=0.75, eos_token_id=END, pad_token_id=words[PAD]
    )
    return model.bfloat16().eval()


def make_pipeline(seed: int = 0) -> GlmImagePipeline:
    """All components of diffusers' pipeline."""
    network = make_network(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        glyphs = T5EncoderModel(T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))
        dit = GlmImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=CODES,
        )
        vae = AutoencoderKL(
            block_out_channels=(4, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=128,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        for part in (dit, vae):
            for p in part.parameters():
                if p.ndim >= 2:
                    torch.nn.init.normal_(p, std=1 / p[0].numel() ** 0.5)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear"
    )
    parts = (ByT5Tokenizer(), make_processor(), glyphs.bfloat16().eval(), network, vae.bfloat16(), dit.bfloat16(), scheduler)
    return GlmImagePipeline(*parts)


def write_sample(kind: str, folder: Path) -> GlmImageSample:
    """A published folder; ``parts`` has the language model in float64."""
    make_pipeline().save_pretrained(folder)
    index = folder / "model_index.json"  # diffusers takes transformers' module for its own of the same name
    index.write_text(index.read_text().replace('"glm_image"', '"transformers"'))
    network = GlmImageForConditionalGeneration.from_pretrained(folder / "vision_language_encoder", dtype=torch.float64)
    parts = {"network": network.eval(), "words": vocabulary()}
    return GlmImageSample(kind, folder, (64, 96), {"image_size": 64, "num_inference_steps": 2}, SIZES, parts)


def grids_of(size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of the preview and of the picture, from the published formula."""
    rows, columns = size[0] // 32, size[1] // 32
    ratio = rows / columns
    return (int(math.sqrt(ratio) * 16), int(math.sqrt(1 / ratio) * 16)), (rows, columns)


class GlmImageSample(Sample):
    """The whole pipeline; what is independent is transformers' own forward, with its own positions."""

    def logits(self, prompt: list[int], picture: list[int]) -> Tensor:
        """Of a text-to-image prompt; the grids are read from its words, as the model's users would."""
        return own_logits(self.parts["network"], prompt, picture, target_grids(prompt, self.parts["words"]))

    def decode(self, codes: Tensor) -> Tensor:
        raise NotImplementedError("codes alone are no picture: diffusers paints it")

    def streams(self, text: str, size: tuple[int, int]) -> tuple[list[int], list[int]]:
        """Text, rows and columns of the picture and then of its preview, and the word that a picture begins with."""
        words = self.parts["words"]
        prompt = spelled(words, text)
        for rows, columns in reversed(grids_of(size)):
            prompt += [words[BEGIN], *spelled(words, f"{rows} {columns}"), words[CLOSE]]
        return [*prompt, START], []

    def legal(self, ids: list[int], size: tuple[int, int]) -> bool:
        (a, b), (c, d) = grids_of(size)
        return len(ids) == a * b + c * d + 1 and all(0 <= n < CODES for n in ids[:-1]) and ids[-1] == END


def target_grids(prompt: list[int], words: dict[str, int]) -> list[list[int]]:
    """[[1, rows, columns], ...] as a prompt tells them, in its order."""
    letters, found, ids = {n: word for word, n in words.items()}, [], list(prompt)
    while words[BEGIN] in ids:
        first = ids.index(words[BEGIN])
        last = ids.index(words[CLOSE], first)
        told = "".join(letters[n] for n in ids[first + 1 : last]).replace("\u0120", " ")
        found.append([1, *map(int, told.split())])
        ids = ids[last + 1 :]
    return found


def own_logits(network: Any, prompt: list[int], picture: list[int], grids: list[list[int]]) -> Tensor:
    """[N, C] logits of a picture in one call of transformers' forward, without cache; positions from its own function."""
    ids, table = torch.tensor([prompt]), torch.tensor(grids)
    many, state = torch.tensor([len(grids)]), network.model
    before, _ = state.get_rope_index(ids, table, many, torch.ones_like(ids))
    positions = torch.cat([before[:, 0], state._cached_decode_position_ids[0]], dim=-1)[:, None]
    whole = torch.tensor([[*prompt, *picture]])
    with torch.no_grad():
        logits = network(input_ids=whole, position_ids=positions[..., : whole.shape[1]], use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1, :CODES]
