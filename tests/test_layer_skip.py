"""The model without some sublayers drafts for itself: never seen in the text, nor in the model, and it finds its layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from test_generate_fn import SIZES, both, peaked, prompts, tiny
from test_lookup import assert_plain
from tiny_pipeline import hushed, one_clear_line, text_pipeline

import arsd
from arsd.decoding import LayerSkip, Parts
from arsd.decoding.layer_skip import ROUNDS, LayerSkipDraft, SkipSearch, spread, sublayers_of
from arsd.errors import StrategyError
from arsd.generation import generate_fn
from arsd.models.layer_skip import Sublayer, num_layers, skipping

pytestmark = pytest.mark.usefixtures("quiet_transformers")
KINDS = ("qwen2", "qwen3", "mistral", "mixtral", "gemma2", "gemma3", "cohere", "granite", "emu3", "chameleon", "llama eager")


def deep(kind: str = "llama", layers: int = 4, **options: Any) -> Any:
    return tiny(kind, num_hidden_layers=layers, **options)


def drafters(strategy: LayerSkip) -> tuple[Any, list[Any]]:
    """(a strategy that does the same, the drafters that it has built)."""
    made: list[Any] = []

    class Watched(LayerSkip):
        def build(self, setting) -> Parts:
            parts = strategy.build(setting)
            made.append(parts.drafter)
            return parts

    return Watched(), made


@pytest.mark.parametrize("options", ["draft_length=3", "draft_length=30,skip=0.2", "draft_length=1,pass_tokens=4"])
def test_a_text_is_plain_generates_whatever_is_skipped(options: str):
    assert_plain(deep(), f"layer-skip:{options}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_of_attention_and_mlp_sublayers_drafts_for_itself(kind: str):
    assert_plain(deep(kind), "layer-skip:draft_length=4,search=false", rows=(3,))


def test_guidance_and_processors_go_with_it():
    model = deep()
    plain, ours = both(
        model, prompts(2), "layer-skip:draft_length=3", guidance_scale=2.0, cfg_scale=2.0, repetition_penalty=1.3
    )
    assert torch.equal(ours.sequences, plain)


@pytest.mark.parametrize("draft_length", [1, 3, 5])
def test_with_nothing_skipped_every_guess_is_accepted(draft_length: int):
    model = deep()
    for options in ({}, {"do_sample": True, "seed": 3, "temperature": 0.8, "top_k": 20}):
        _, ours = both(model, prompts(), f"layer-skip:skip=0,draft_length={draft_length}", **options)
        assert ours.stats.tokens_per_pass == draft_length + 1


def test_the_model_is_the_same_afterwards():
    model, inputs = deep(), prompts()
    modules = {name: (id(x), dict(vars(x))) for name, x in model.named_modules()}
    children = {name: {key: id(y) for key, y in x._modules.items()} for name, x in model.named_modules()}
    weights = {name: (id(x), x.clone()) for name, x in model.named_parameters()}
    logits = model(**inputs).logits
    both(model, inputs, "layer-skip:draft_length=3", max_new_tokens=40)
    assert {name: id(x) for name, x in model.named_modules()} == {name: number for name, (number, _) in modules.items()}
    assert children == {name: {key: id(y) for key, y in x._modules.items()} for name, x in model.named_modules()}
    assert all(vars(x).keys() == modules[name][1].keys() for name, x in model.named_modules())
    assert all(id(x) == weights[name][0] and torch.equal(x, weights[name][1]) for name, x in model.named_parameters())
    assert torch.equal(model(**inputs).logits, logits)


def test_a_view_shares_all_weights_and_adds_nothing_where_it_skips():
    model, ids = deep(layers=5), prompts(1)["input_ids"]
    view = skipping(model, [Sublayer(1, "a"), Sublayer(1, "m"), Sublayer(3, "m")])
    own = dict(model.named_parameters())
    assert {name: id(x) for name, x in view.named_parameters()}.items() < {name: id(x) for name, x in own.items()}.items()
    other = copy.deepcopy(model)
    other.model.layers[1].self_attn.o_proj.weight.data.zero_()
    for n in (1, 3):
        other.model.layers[n].mlp.down_proj.weight.data.zero_()
    torch.testing.assert_close(view(input_ids=ids).logits, other(input_ids=ids).logits, rtol=0, atol=0)
    assert not torch.equal(view(input_ids=ids).logits, model(input_ids=ids).logits)


def test_of_a_model_with_eyes_the_layers_of_the_text_are_skipped():
    eyes = {"model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlavaOnevisionConfig(
        text_config=SIZES | {"model_type": "qwen2", "num_hidden_layers": 4},
        vision_config=eyes | {"intermediate_size": 64},
        image_token_index=40,
        video_token_index=41,
    )
    model = peaked(transformers.LlavaOnevisionForConditionalGeneration(config)).double()
    view = skipping(model, [Sublayer(2, "a")])
    assert view.model.vision_tower is model.model.vision_tower
    assert view.model.language_model.layers[2].self_attn is not model.model.language_model.layers[2].self_attn
    plain, ours = both(model, prompts(vocab=40), "layer-skip:draft_length=3")
    assert torch.equal(ours.sequences, plain)


def test_a_draft_that_leaves_the_cache_longer_or_reads_committed_tokens_again_is_seen(monkeypatch):
    """Both spoil entries of the whole model, which the text shows."""
    model, inputs = deep(), prompts()
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)

    def text() -> torch.Tensor:
        fn = generate_fn("layer-skip:draft_length=3,search=false")
        return model.generate(**inputs, max_new_tokens=24, do_sample=False, custom_generate=fn)

    assert torch.equal(text(), plain)
    right = LayerSkipDraft._pass
    with monkeypatch.context() as patch:

        def one_earlier(self, tokens):
            self.lengths = (self.lengths - 1).clamp_min(0)
            logits = right(self, tokens)
            self.lengths = self.lengths + 1
            return logits

        patch.setattr(LayerSkipDraft, "_pass", one_earlier)
        assert not torch.equal(text(), plain)
    with monkeypatch.context() as patch:

        def longer(self, tokens):
            logits = right(self, tokens)
            self.target.cache.rollback((self.target.cache.lengths + 1).clamp_max(24))
            return logits

        patch.setattr(LayerSkipDraft, "_pass", longer)
        assert not torch.equal(text(), plain)


# ---------------------------------------------------------------- the search


def idle(layers: int = 6) -> tuple[Any, set[Sublayer]]:
    """A model of which half of the middle sublayers do nothing, and these."""
    model = deep(layers=layers, max_position_embeddings=1024)
    useless = {Sublayer(n, kind) for n in range(1, layers - 1) for kind in "am" if (n + (kind == "a")) % 2}
    for n, kind in useless:
        layer = model.model.layers[n]
        (layer.self_attn.o_proj if kind == "a" else layer.mlp.down_proj).weight.data.zero_()
    return model, useless


def test_the_sublayers_that_do_nothing_are_found_on_the_text():
    """Four of eight are skipped, at first those four that count; 600 tokens later three of them or more do nothing."""
    model, useless = idle()
    start = ".".join(str(x) for x in sorted({Sublayer(n, k) for n in range(1, 5) for k in "am"} - useless))
    strategy, made = drafters(LayerSkip(draft_length=3, layers=start))
    options = {"max_new_tokens": 600, "do_sample": True, "seed": 1, "return_dict_in_generate": True}
    model.generate(**prompts(2), custom_generate=generate_fn(strategy), **options)
    found = set(sublayers_of(made[0].model.found))
    assert len(found & useless) >= 3 and len(found) == 4
    known = []
    for layers in (start, made[0].model.found):
        fixed = generate_fn(LayerSkip(draft_length=3, search=False, layers=layers))
        known.append(model.generate(**prompts(2), custom_generate=fixed, **options).stats.tokens_per_pass)
    assert known[1] > 1.5 * known[0]


def test_a_search_is_the_same_every_time():
    model, _ = idle()
    texts = []
    for _ in range(2):
        strategy, made = drafters(LayerSkip(draft_length=3))
        options = {"max_new_tokens": 150, "do_sample": True, "seed": 1, "return_dict_in_generate": True}
        out = model.generate(**prompts(1), custom_generate=generate_fn(strategy), **options)
        texts.append((made[0].model.found, out.stats.forward_passes))
    assert texts[0] == texts[1]


def candidates(layers: int = 8) -> list[Sublayer]:
    return [Sublayer(n, kind) for n in range(1, layers - 1) for kind in "am"]


def turn(search: SkipSearch, accepted: int, judged: int = 10) -> None:
    for _ in range(ROUNDS):
        search.heard(accepted, judged)


def test_a_choice_stays_when_it_is_at_least_as_good_and_goes_when_it_is_not():
    start = spread(8, 0.45)
    search = SkipSearch(candidates(), start)
    turn(search, 5)
    first = search.trying
    assert first != search.found == tuple(sorted(start)) and len(first) == len(start)
    turn(search, 4)
    assert search.trying == search.found == tuple(sorted(start))
    turn(search, 5)
    second = search.trying
    turn(search, 5)
    assert search.found == second == search.trying != first
    turn(search, 3)  # it was lucky: both turns count now
    turn(search, 4)
    assert search.found not in (second, tuple(sorted(start)))


def test_a_search_rests_while_nine_in_ten_are_accepted():
    search = SkipSearch(candidates(), spread(8, 0.45))
    for accepted in (9, 10, 9):
        turn(search, accepted)
        assert search.trying == search.found
    turn(search, 8)
    assert search.trying != search.found


def test_where_there_is_nothing_to_swap_nothing_is_tried():
    for start in ((), candidates(4)):
        search = SkipSearch(candidates(4), start)
        for _ in range(3):
            turn(search, 1)
            assert search.trying == search.found == tuple(sorted(start))


def test_an_even_spread_leaves_the_first_and_the_last_layer_whole():
    for layers in (3, 4, 8, 32):
        for skip in (0, 0.1, 0.45, 0.8, 0.99):
            chosen = spread(layers, skip)
            assert len({*chosen}) == len(chosen) == min(round(2 * layers * skip), 2 * layers - 4)
            assert all(1 <= x.layer <= layers - 2 for x in chosen)
    assert ".".join(map(str, spread(8, 0.25))) == "2a.5a.2m.5m"


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("kind", ["gpt2", "gpt-neox"])
def test_a_model_of_other_layers_is_refused(kind: str):
    model = tiny(kind, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": 4})
    with pytest.raises(StrategyError) as error:
        both(model, prompts(1), "layer-skip")
    one_clear_line(error.value, "three or more layers of self_attn and mlp")
    with pytest.raises(StrategyError):
        num_layers(tiny())  # two layers: none in the middle


def test_a_model_whose_forward_is_wrapped_is_refused():
    """The wrapper would run the whole model, at the price of a guess."""
    model = deep()
    model.model.forward = model.model.forward
    with pytest.raises(StrategyError) as error:
        both(model, prompts(1), "layer-skip")
    one_clear_line(error.value, "the forward of LlamaModel is wrapped")


def test_a_pipeline_of_pictures_is_told_where_it_works():
    with pytest.raises(StrategyError) as error:
        hushed(text_pipeline())("red apple", decoder="layer-skip")
    one_clear_line(error.value, "use it with generate_fn")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"draft_length": 0}, "draft_length"),
        ({"skip": 1}, "below 1"),
        ({"skip": -0.1}, "skip must be a number >= 0"),
        ({"search": "no"}, "search must be true or false"),
        ({"layers": "3a,4m"}, "write 3a.4m"),
        ({"layers": ""}, "are no sublayers"),
        ({"layers": "0a"}, "must stay"),
        ({"pass_tokens": 3}, "pass_tokens"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str):
    with pytest.raises(StrategyError) as error:
        LayerSkip(**options)
    one_clear_line(error.value, says)


def test_the_last_layer_must_stay_which_is_known_when_the_call_begins():
    with pytest.raises(StrategyError) as error:
        both(deep(), prompts(1), "layer-skip:layers=1a.3m")
    one_clear_line(error.value, "sublayer 3m must stay: layers 1 to 2 may be skipped")


def test_layers_are_saved_as_text():
    assert str(LayerSkip(layers=("3a", "4m"))) == str(arsd.parse_strategy("layer-skip:layers=3a.4m"))
    assert LayerSkip.from_config(LayerSkip(layers=["3a", "4m"]).config).config["layers"] == "3a.4m"
