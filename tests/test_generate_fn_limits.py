"""``arsd.generate_fn`` shows what it relies on, reads prompts with pictures, and refuses the rest in one clear line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from test_generate_fn import IDS, SIZES, VOCAB, Streamer, both, peaked, prompts, tiny
from tiny_pipeline import one_clear_line
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.generation import logits_process as hf

from arsd.decoding import SJD
from arsd.errors import ArsdError, InputError, NonFiniteLogitsError, StrategyError
from arsd.generation import generate_fn


@pytest.fixture(scope="module")
def llama():
    return tiny()


def test_padding_of_the_unconditional_stream_counts_for_nothing_and_every_return_sequence_has_its_own():
    model, inputs, ids = tiny("gpt2"), prompts(2), prompts(2, 5, (0, 0))["input_ids"]  # gpt2 learns absolute positions
    options = {"max_new_tokens": 9, "custom_generate": generate_fn(), "cfg_scale": 3.0, "seed": 1, "do_sample": True}
    mask = (torch.arange(9) >= 4).long().expand(2, -1)
    padded = {"negative_input_ids": torch.nn.functional.pad(ids, (4, 0)), "negative_attention_mask": mask}
    plain = model.generate(**inputs, **options, negative_input_ids=ids)
    assert torch.equal(model.generate(**inputs, **options, **padded), plain)
    twice = {name: x.repeat_interleave(2, 0) for name, x in (inputs | {"negative_input_ids": ids}).items()}
    several = model.generate(**inputs, **options, negative_input_ids=ids, num_return_sequences=2)
    assert torch.equal(several, model.generate(**twice, **options))


def test_a_stop_string_ends_the_text_where_plain_generate_ends_it(llama):
    words = Tokenizer(WordLevel({chr(65 + n): n for n in range(VOCAB)}, unk_token="A"))
    words.pre_tokenizer, words.decoder = Split("", "isolated"), Fuse()
    tokenizer, inputs = transformers.PreTrainedTokenizerFast(tokenizer_object=words), prompts(1)
    options = {"max_new_tokens": 24, "do_sample": False}
    text = llama.generate(**inputs, **options)
    string = "".join(chr(65 + n) for n in text[0, 16:18].tolist())
    plain = llama.generate(**inputs, **options, stop_strings=[string], tokenizer=tokenizer)
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [string])])
    ours = llama.generate(**inputs, **options, stopping_criteria=criteria, custom_generate=generate_fn())
    assert torch.equal(ours, plain) and plain.shape[1] < text.shape[1]


class Odd(transformers.LlamaForCausalLM):
    """Looks at the shape of its mask, as a model may that cannot be decoded in windows."""

    calls = 0

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, **more
    ):
        self.calls += 1
        out = super().forward(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **more)
        if attention_mask is not None and attention_mask.ndim == 4:
            out.logits = out.logits.roll(self.shift, -1)
        return out


def test_a_model_must_show_once_that_windows_give_its_own_logits():
    model = peaked(Odd(transformers.LlamaConfig(**SIZES)))
    model.shift = 0
    for calls in (4 + 1 + 2, 1 + 2):  # the check; then the prefill and two tokens
        before = model.calls
        model.generate(**prompts(), max_new_tokens=2, custom_generate=generate_fn("ar"))
        assert model.calls - before == calls
    odd = peaked(Odd(transformers.LlamaConfig(**SIZES)))
    odd.shift = 1
    with pytest.raises(InputError) as error:
        odd.generate(**prompts(), max_new_tokens=2, custom_generate=generate_fn("ar"))
    one_clear_line(error.value, "Odd gives other logits for a window of tokens than in its own generate")


class Counts(LogitsProcessor):
    """Bans the id that is the number of the call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids, scores):
        self.calls += 1
        return scores.index_fill(1, torch.tensor([self.calls]), -torch.inf)


class Nothing(LogitsProcessor):
    """Leaves no token behind some ids."""

    def __init__(self, *ids: int) -> None:
        self.ids = torch.tensor(ids)

    def __call__(self, ids, scores):
        return scores.masked_fill(torch.isin(ids[:, -1:], self.ids), -torch.inf)


def test_processors_that_leave_no_token_matter_only_where_a_text_comes_to_that(llama):
    dead = LogitsProcessorList([Nothing(*range(40, VOCAB)), hf.SuppressTokensLogitsProcessor([*range(40, VOCAB)])])
    inputs, options = prompts(pads=(0, 0, 0), vocab=40), {"logits_processor": dead, "top_k": 0}
    plain, ours = both(llama, inputs, **options)
    assert torch.equal(ours.sequences, plain)
    drawn = [both(llama, inputs, name, do_sample=True, seed=1, **options)[1].sequences for name in ("ar", "sjd")]
    assert torch.equal(*drawn)
    plain, ours = both(llama, inputs, logits_processor=LogitsProcessorList([Nothing(*range(20))]))
    assert torch.equal(ours.sequences, plain)
    with pytest.raises(InputError) as error:
        options = {"do_sample": True, "max_new_tokens": 3, "logits_processor": [Nothing(*range(VOCAB))]}
        llama.generate(**inputs, **options, custom_generate=generate_fn())
    one_clear_line(error.value, "the logits processors left no token to draw")


FULL = transformers.DynamicCache()
FULL.update(torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8), 0)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "guidance_scale": ({"guidance_scale": 2.0}, "pass cfg_scale=2.0 instead"),
    "its processor": (
        {"logits_processor": [hf.UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, None)]},
        "UnbatchedClassifierFreeGuidanceLogitsProcessor counts its calls",
    ),
    "a watermark with a state": (
        {"watermarking_config": transformers.SynthIDTextWatermarkingConfig(keys=[1, 2], ngram_len=3)},
        "SynthIDTextWatermarkLogitsProcessor counts its calls",
    ),
    "counting": ({"logits_processor": [Counts()]}, "of Counts, none may remember its calls"),
    "beams": ({"num_beams": 2}, "not by beam_search"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "not by assisted_generation"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True is not supported"),
    "a used cache": ({"past_key_values": FULL, "position_ids": torch.arange(7)[None]}, "holds tokens already"),
    "right padding": ({"attention_mask": torch.ones(3, 7).triu()[:, [0, 1, 2, 3, 4, 5, 0]]}, "pad on the left"),
    "a seed": ({"seed": 1.5}, "seed must be a whole number"),
    "a scale": ({"cfg_scale": "2"}, "cfg_scale must be a number"),
    "no scale": ({"negative_input_ids": torch.ones(3, 2).long()}, "pass cfg_scale, too"),
    "other rows": (
        {"cfg_scale": 2, "negative_input_ids": torch.ones(2, 2).long()},
        "negative_input_ids must be [3, length]",
    ),
    "masked ids": (
        {"cfg_scale": 2, "negative_input_ids": torch.ones(1, 2).long(), "negative_attention_mask": torch.tensor([[1, 0]])},
        "pad on the left",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_refused_in_one_clear_line(llama, what: str):
    options, says = REFUSED[what]
    with pytest.raises(ArsdError) as error:
        llama.generate(**prompts() | {"max_new_tokens": 5, **options}, custom_generate=generate_fn())
    one_clear_line(error.value, says)


SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1}
T5 = {"vocab_size": VOCAB, "d_model": 32, "num_layers": 1, "decoder_start_token_id": 0}
JAMBA = SIZES | {"use_mamba_kernels": False, "num_experts": 2}
LATENT = SIZES | {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 2,
}
ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "encoder": ("T5ForConditionalGeneration", T5, "has an encoder"),
    "recurrent": ("MambaForCausalLM", SMALL, "layers of linear_attention"),
    "mixed": ("JambaForCausalLM", JAMBA, "layers of linear_attention"),
    "no positions": ("BloomForCausalLM", SMALL | {"n_head": 2}, "no argument position_ids"),
    "window": ("MistralForCausalLM", SIZES | {"sliding_window": 10}, "more than the attention window"),
    "latent": ("DeepseekV3ForCausalLM", LATENT, "no plain keys and values"),
    "flex": ("LlamaForCausalLM", SIZES | {"attn_implementation": "flex_attention"}, "use 'sdpa' or 'eager'"),
    "turning": ("LlamaForCausalLM", SIZES | {"rope_parameters": ROPE, "max_position_embeddings": 9}, "lower max_new_tokens"),
}


@pytest.mark.parametrize("what", MODELS)
def test_models_that_cannot_take_guesses_back_are_refused_in_one_clear_line(what: str):
    name, sizes, says = MODELS[what]
    model = getattr(transformers, name)(getattr(transformers, name).config_class(**sizes)).eval()
    with pytest.raises(InputError) as error:
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=9, custom_generate=generate_fn())
    one_clear_line(error.value, says)


def test_strategies_and_streamers_that_do_not_fit_are_refused_and_so_is_nan(llama):
    def run(fn: Any, model: Any = llama) -> None:
        model.generate(**prompts(), max_new_tokens=3, custom_generate=fn)

    broken = tiny()
    broken.lm_head.weight.data[5] = torch.nan
    for call, kind, says in (
        (lambda: generate_fn("nonsense"), StrategyError, "unknown decoder"),
        (lambda: generate_fn(SJD), StrategyError, "generate_fn takes a strategy"),
        (lambda: run(generate_fn("eagle")), StrategyError, "eagle needs a draft model"),
        (lambda: run(generate_fn("sjd:acceptance=lantern")), StrategyError, "no codebook"),
        (lambda: run(generate_fn(streamer=Streamer())), InputError, "one row, not 3"),
        (lambda: run(generate_fn(), broken), NonFiniteLogitsError, "NaN or infinite logits"),
    ):
        with pytest.raises(kind) as error:
            call()
        one_clear_line(error.value, says)


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}


def llava() -> tuple[Any, dict[str, torch.Tensor]]:
    vision = transformers.CLIPVisionConfig(**VISION, patch_size=8)
    text = transformers.LlamaConfig(**SIZES)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=2, **IDS)
    inputs = prompts(2, 10)
    inputs["input_ids"][:, 4:8] = 2
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return peaked(transformers.LlavaForConditionalGeneration(config)), inputs | {"pixel_values": pixels}


def qwen() -> tuple[Any, dict[str, torch.Tensor]]:
    """Positions in three dimensions, which go on behind the picture."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    ids = {"image_token_id": 2, "video_token_id": 45, "vision_start_token_id": 46, "vision_end_token_id": 47}
    config = transformers.Qwen2VLConfig(text_config=SIZES | {"rope_parameters": rope}, vision_config=vision, **ids, **IDS)
    inputs = prompts(1, 10)
    inputs["input_ids"][:, 3:9] = torch.tensor([46, 2, 2, 2, 2, 47])
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    inputs |= {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    inputs |= {"mm_token_type_ids": (inputs["input_ids"] == 2).long()}
    return peaked(transformers.Qwen2VLForConditionalGeneration(config)), inputs


@pytest.mark.parametrize("make", [llava, qwen])
def test_prompts_with_pictures_are_read_by_the_model_itself(make):
    model, inputs = make()
    plain, ours = both(model, inputs)
    assert torch.equal(ours.sequences, plain)
    inputs["pixel_values"] = -inputs["pixel_values"]
    other, ours = both(model, inputs)
    assert torch.equal(ours.sequences, other) and not torch.equal(plain, other)


def test_a_model_that_looks_both_ways_in_a_picture_is_refused_with_one_and_reads_text():
    vision = transformers.SiglipVisionConfig(**VISION, patch_size=4)
    text = transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=64)
    ids = {"image_token_index": 2, "boi_token_index": 46, "eoi_token_index": 47}
    config = transformers.Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=4, **ids)
    model, inputs = peaked(transformers.Gemma3ForConditionalGeneration(config)), prompts(1, 10)
    plain, ours = both(model, inputs | {"token_type_ids": torch.zeros(1, 10, dtype=torch.int64)})
    assert torch.equal(ours.sequences, plain)
    inputs["input_ids"][:, 3:9] = torch.tensor([46, 2, 2, 2, 2, 47])
    inputs |= {"pixel_values": torch.ones(1, 3, 16, 16), "token_type_ids": (inputs["input_ids"] == 2).long()}
    with pytest.raises(InputError) as error:
        model.generate(**inputs, max_new_tokens=3, custom_generate=generate_fn())
    one_clear_line(error.value, "gives other logits for a prompt with")
