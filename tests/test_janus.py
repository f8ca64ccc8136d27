"""What is special about Janus: codes that are no words, a null stream of padding, and transformers' own loop."""

from __future__ import annotations

from typing import Any

import family_janus as published
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from families import CODES, PROMPTS
from published_files import byte_tokenizer
from tiny_pipeline import one_clear_line, seeded
from transformers import DynamicCache, GenerationConfig

from arsd import EagleDrafter
from arsd.errors import ArsdError
from arsd.models.janus import JanusForImageGeneration, JanusProtocol
from arsd.models.janus_files import load_janus
from arsd.pipelines.janus import JanusPipeline

KINDS = ("janus", "janus-original")
CALL: dict[str, Any] = {"prompt": [*PROMPTS, "a dog"], "output_type": "latent", "progress": False}


def tokens_of(pipe: Any, **options: Any) -> torch.Tensor:
    return pipe(**CALL | {"decoder": "sjd:window=6"} | options, generator=seeded(3)).tokens


# ------------------------------------------------------------------------------------------- against transformers' own loop


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_greedy_pictures_are_those_of_transformers(samples, kind, prompts):
    """Token for token at its guidance of 5, with one prompt, and with two of which it pads the shorter on the left."""
    sample, pipe = samples.sample(kind), samples.pipe(kind)
    model, words = sample.whole, sample.parts["words"]
    rows = [sample.streams(text, sample.size)[0] for text in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([[words[published.PAD]] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    assert (len(prompts) == 1) == bool(mask.all())
    ends = {"bos_token_id": words[published.BOS], "pad_token_id": words[published.PAD], "guidance_scale": 5}
    told = GenerationConfig(**ends, do_sample=False, generation_kwargs={"boi_token_id": words[published.BEGIN]})
    cache = DynamicCache(config=model.config.text_config)  # the static one of transformers 5.17 cannot be made
    options = {"attention_mask": mask, "generation_config": told, "past_key_values": cache}
    expected = model.generate(ids, generation_mode="image", **options)
    assert len(set(expected.flatten().tolist())) > 5
    for decoder in ("ar", "sjd:window=5"):
        out = pipe(prompts, temperature=0, decoder=decoder, output_type="latent", progress=False)
        assert torch.equal(out.tokens, expected)


def test_published_sampling_and_sizes(samples):
    protocol = samples.pipe("janus").protocol
    assert protocol.sampling == {"guidance_scale": 5.0, "temperature": 1.0}
    released = JanusProtocol(samples.pipe("janus").tokenizer, 16384, 16)
    raster = released.raster(384, 384)
    assert (released.size, raster.num_tokens, raster.vocab, raster.forced) == (384, 576, 16384, {})


def test_words_of_the_structure_in_a_prompt_are_blanked_out_too(samples):
    """As deepseek-ai does it; transformers would leave them in the null stream."""
    protocol, words = samples.pipe("janus").protocol, samples.sample("janus").parts["words"]
    ids = protocol.prompt_ids(f"a {published.BEGIN} cat", 64, 64)
    assert ids.count(words[published.BEGIN]) == 2
    null = protocol.null_ids(64, 64, ids)
    assert null.count(words[published.BEGIN]) == 1 and null.count(words[published.PAD]) == len(ids) - 2


def test_space_around_a_prompt_is_dropped_and_turns_of_its_own_are_kept(samples):
    sample, protocol = samples.sample("janus"), samples.pipe("janus").protocol
    expected = sample.streams("a cat", sample.size)[0]
    assert protocol.prompt_ids(" a cat \n", 64, 64) == expected
    assert protocol.prompt_ids("<|User|>: a cat\n\n<|Assistant|>:", 64, 64) == expected
    old = [expected[0], *protocol.tokenizer.encode("User: a\n cat\n\nAssistant:", add_special_tokens=False), expected[-1]]
    assert protocol.prompt_ids("User: a\n cat\n\nAssistant:", 64, 64) == old
    assert len(protocol.prompt_ids("User: a cat\n\nAssistant: b", 64, 64)) > len(old)


def test_a_tokenizer_without_the_words_for_turns_gets_those_of_janus_1_3b(samples, tmp_path):
    words = [word for word in published.words_of() if word not in ("<|User|>", "<|Assistant|>")]
    published.write_sample("janus", tmp_path)
    byte_tokenizer({word: n for n, word in enumerate(words)}).save(str(tmp_path / "tokenizer.json"))
    protocol = JanusPipeline.from_pretrained(tmp_path).protocol
    ids = protocol.prompt_ids("a cat", 64, 64)
    assert protocol.tokenizer.decode(ids[1:-1]) == "User: a cat\n\nAssistant:"


# -------------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_network_by_itself(samples, kind):
    sample, model = samples.sample(kind), samples.pipe(kind).transformer
    prompt, picture = sample.streams("a cat", sample.size)[0], [int(n) for n in torch.arange(16) % CODES]
    embeds = [model.get_input_embeddings()(torch.tensor([prompt])), model.code_embedding(torch.tensor([picture]))]
    found = model(torch.cat(embeds, dim=1))[0, -len(picture) - 1 : -1]
    torch.testing.assert_close(found, sample.logits(prompt, picture), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_loaded_that_does_not_draw_and_no_head_overwrites_the_embedding(tmp_path, kind):
    """transformers' configuration says that both are tied, unless told otherwise; in the published files they are not."""
    state = published.write_sample(kind, tmp_path).parts["state"]
    model = load_janus(tmp_path)
    found = {f"model.{key}": value for key, value in model.state_dict().items()}
    inside = ("model.language_model.", "model.generation_")
    assert found.keys() == {key for key in state if key.startswith(inside)}
    assert all(torch.equal(value, state[key]) for key, value in found.items())
    model.tie_weights()
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding, state["model.language_model.embed_tokens.weight"])
    assert not torch.equal(embedding, state["lm_head.weight"])
    assert model.dtype == torch.bfloat16 and not model.training


@pytest.mark.parametrize("kind", KINDS)
def test_options_go_to_transformers(tmp_path, kind):
    published.write_sample(kind, tmp_path)
    model = load_janus(tmp_path, attn_implementation="eager", dtype=torch.float32)
    assert model.language_model.config._attn_implementation == "eager" and model.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoder", ["ar", "sjd:window=4"])
def test_other_dtypes_draw_as_well(samples, dtype, decoder):
    pipe = samples.sample("janus").load(dtype=dtype)
    out = pipe(**CALL | {"output_type": "pt"}, decoder=decoder, generator=seeded(1))
    assert out.images.shape == (3, 3, 64, 64) and out.images.isfinite().all() and int(out.tokens.max()) < CODES


# ------------------------------------------------------------------------------------------- weights that are elsewhere


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "on_disk",
    [
        ["language_model.layers.1", "generation_head"],
        ["language_model.embed_tokens", "generation_embeddings", "generation_aligner", "language_model.norm"],
    ],
)
def test_parts_on_disk_give_the_same_tokens(samples, kind, on_disk, tmp_path):
    parts = [f"language_model.{part}" for part in ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")]
    parts += ["generation_embeddings", "generation_aligner", "generation_head"]
    places = {part: "disk" if part in on_disk else "cpu" for part in parts}
    pipe = samples.sample(kind).load(device_map=places, offload_folder=str(tmp_path))
    held = [name for name, p in pipe.transformer.named_parameters() if p.device.type != "meta"]
    assert held and not any(name.startswith(tuple(on_disk)) for name in held)
    assert torch.equal(tokens_of(pipe), tokens_of(samples.pipe(kind)))


@pytest.mark.parametrize("how", ["leaf_level", "block_level"])
def test_groups_of_layers_on_disk_give_the_same_tokens(samples, how, tmp_path):
    pipe, group = samples.sample("janus").load(), {"num_blocks_per_group": 1} if how == "block_level" else {}
    for part in (pipe.transformer, pipe.vq):
        folder = str(tmp_path / type(part).__name__)
        apply_group_offloading(part, torch.device("cpu"), offload_type=how, offload_to_disk_path=folder, **group)
    assert torch.equal(tokens_of(pipe), tokens_of(samples.pipe("janus")))


def test_the_whole_network_is_brought_before_any_part_of_it_is_used(samples):
    pipe = samples.sample("janus").load()
    expected = tokens_of(samples.pipe("janus"))

    class Bring(ModelHook):
        def __init__(self, module: torch.nn.Module) -> None:
            self.kept = {name: p.detach().clone() for name, p in module.named_parameters()}
            for p in module.parameters():
                p.data.fill_(torch.nan)

        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            for name, p in module.named_parameters():
                p.data.copy_(self.kept[name])
            return args, kwargs

        def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
            for p in module.parameters():
                p.data.fill_(torch.nan)
            return output

    for part in (pipe.transformer, pipe.vq):
        add_hook_to_module(part, Bring(part))
    assert torch.equal(tokens_of(pipe), expected)


# ------------------------------------------------------------------------------------------------------------------ drafters


@pytest.mark.parametrize("decoder", ["eagle", "eagle:tree=2x2", "hybrid:window=6"])
def test_an_eagle_drafter_reads_the_embedding_of_the_codes(samples, monkeypatch, decoder):
    pipe = samples.sample("janus").load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drafter = EagleDrafter.for_transformer(pipe.transformer.language_model).double()
    pipe.register_modules(drafter=drafter)
    seen: set[int] = set()
    table = pipe.transformer.generation_embeddings
    kept = table.forward
    monkeypatch.setattr(table, "forward", lambda ids: (seen.add(ids.numel()), kept(ids))[1])
    assert torch.equal(tokens_of(pipe, decoder=decoder), tokens_of(samples.pipe("janus"), decoder="ar"))
    assert len(seen) > 1  # passes of the network, and those of the drafter


def test_a_drafter_of_words_is_refused_in_one_line(samples):
    pipe = samples.sample("janus").load()
    words = len(samples.sample("janus").parts["words"])
    pipe.register_modules(drafter=EagleDrafter.for_transformer(pipe.transformer.language_model, vocab_size=words).double())
    with pytest.raises(ArsdError) as error:
        tokens_of(pipe, decoder="eagle")
    one_clear_line(error.value, "an embedding of words")


def test_a_smaller_janus_drafts_and_one_that_is_the_model_itself_is_always_right(samples):
    pipe = samples.sample("janus").load()
    plain = tokens_of(samples.pipe("janus"), decoder="ar")
    pipe.register_modules(drafter=pipe.transformer)
    out = pipe(**CALL, decoder="speculative:drafter=draft-model,window=5", generator=seeded(3))
    assert torch.equal(out.tokens, plain) and out.stats.forward_passes == -(-out.tokens.shape[1] // 5)
    content = pipe.transformer.config.to_dict()
    content["text_config"] |= {"num_hidden_layers": 1, "layer_types": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = JanusForImageGeneration(type(pipe.transformer.config).from_dict(content)).eval().double()
    pipe.register_modules(drafter=small)
    assert torch.equal(tokens_of(pipe, decoder="speculative:drafter=draft-model,window=4"), plain)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"height": 96}, "64 x 64 pixels only"),
        ({"width": 48}, "64 x 64 pixels only"),
        ({"negative_prompt": "ugly"}, "leave out negative_prompt"),
        ({"prompt_images": torch.zeros(1, 3, 64, 64)}, "hold no pictures"),
        ({"prompt": " "}, "empty"),
    ],
)
def test_bad_inputs_are_answered_in_one_line(samples, call, says):
    with pytest.raises(ArsdError) as error:
        samples.pipe("janus")(**CALL | call)
    one_clear_line(error.value, says)
