"""What a sparse draft keeps: held against the attention weights that the eager kernel reports, policy by policy."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from video_llms import clip, inputs, tiny

from arsd.generation_parts import ModelTarget, Prompt, layout_of
from arsd.models import selection
from arsd.models.selection import LAZY_ROWS, POLICIES, SINKS, Attention, keep, shares
from arsd.models.sparse_draft import Choice

QUESTIONS = ["What happens?", "What is seen in the clip, and then?"]


@cache
def weights(frames: int = 16) -> tuple[list[Tensor], Tensor, Tensor]:
    """[R, H, P, P] attention of every layer by the eager kernel in float64, visual tokens [R, P] and padding [R, P].

    Every row is computed alone and without padding, where its entries are zero.
    """
    model, fed = twin(), fed64(frames)
    hidden, (rows, size), found = fed["attention_mask"] == 0, fed["input_ids"].shape, []
    model.set_attn_implementation({"text_config": "eager"})
    for row in range(rows):
        real = ~hidden[row]
        alone = {
            "input_ids": fed["input_ids"][row : row + 1, real],
            "pixel_values_videos": fed["pixel_values_videos"][[row]],
        }
        with torch.no_grad():
            out = model(**alone, output_attentions=True)
        found.append([torch.nn.functional.pad(x[0], (size - int(real.sum()), 0) * 2) for x in out.attentions])
    model.set_attn_implementation({"text_config": "sdpa"})
    return (
        [torch.stack(layer) for layer in zip(*found, strict=True)],
        fed["input_ids"] == model.config.video_token_id,
        hidden,
    )


@cache
def twin() -> Any:
    model = tiny("llava-onevision")[0]
    other = type(model)(model.config).double().eval()
    other.load_state_dict(model.state_dict())
    return other


@cache
def fed64(frames: int) -> dict[str, Any]:
    fed = inputs("llava-onevision", [clip(frames, seed=i) for i in range(2)], QUESTIONS)
    return {k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in fed.items()}


def chosen(policy: str, budget: int | None, frames: int = 16) -> Choice:
    """What a policy says of the prefill of the production target."""
    model, fed = twin(), fed64(frames)
    with torch.inference_mode():
        ids, mask = fed["input_ids"], fed["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        extras = {"pixel_values_videos": fed["pixel_values_videos"]}
        prompt = Prompt(model.get_input_embeddings()(ids)[None], (mask == 0)[None], positions, ids[None], extras)
        target = ModelTarget(model, layout_of(model, prompt), prompt, 8, 4)
        choice = target.observer = Choice(target, POLICIES[policy], budget, lambda: None)
        target.prefill([-target.unread] * 2, 1)
    return choice


pytestmark = pytest.mark.usefixtures("quiet_transformers")


def grouped(attention: Tensor, groups: int = 2) -> Tensor:
    """Sum over the heads of each group: [R, G, ...]."""
    return attention.unflatten(1, (groups, -1)).sum(2)


def text_rows(visual: Tensor, size: int) -> Tensor:
    """[R, S] rows behind the last picture."""
    last = visual.shape[1] - visual.flip(1).long().argmax(1)
    return torch.arange(size) >= last[:, None]


def test_std_sums_what_the_text_behind_the_clip_attends_to():
    choice = chosen("std", 8)
    attentions, visual, hidden = weights()
    size = visual.shape[1] - 1  # the last token of the prompt is always seen
    for layer, attention in enumerate(attentions):
        voters = text_rows(visual, size + 1)
        mine = (grouped(attention)[..., :size] * voters[:, None, :, None]).sum(2)
        assert torch.allclose(choice.worth[layer].double(), mine, atol=1e-5)


def test_h2o_sums_over_all_queries_and_goes_on():
    choice = chosen("h2o", 8)
    attentions, visual, hidden = weights()
    size = visual.shape[1] - 1
    for layer, attention in enumerate(attentions):
        mine = grouped(attention)[..., :size].sum(2)
        assert torch.allclose(choice.worth[layer].double() * ~hidden[:, None, :size], mine, atol=1e-4)


def test_token_select_asks_the_last_query_and_all_heads_together():
    choice = chosen("token-select", 8)
    attentions, visual, _ = weights()
    size = visual.shape[1] - 1
    for layer, attention in enumerate(attentions):
        mine = attention[:, :, size, :size].sum(1)
        assert torch.allclose(choice.worth[layer].double(), mine[:, None].expand(-1, 2, -1), atol=1e-5)
    kept = choice.entries()[0].index
    assert torch.equal(kept[:, 0], kept[:, 1])


def test_streaming_llm_keeps_the_first_entries_of_the_clip_and_its_latest_ones():
    choice = chosen("streaming-llm", 12)
    _, visual, hidden = weights()
    for row in range(2):
        places = visual[row].nonzero()[:, 0].tolist()
        wanted = set(places[:SINKS] + places[-(12 - SINKS) :])
        for kept in choice.entries():
            index = kept.index[row, 0][~kept.hidden[row]].tolist()
            assert {i for i in index if visual[row, i]} == wanted


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("budget", [1, 8, 30])
def test_all_text_is_kept_in_order_and_the_budget_of_every_head_is_met(policy, budget):
    choice = chosen(policy, budget)
    _, visual, hidden = weights()
    size, spent = visual.shape[1] - 1, []
    for kept in choice.entries():
        for row in range(2):
            text = set((~visual[row, :size] & ~hidden[row, :size]).nonzero()[:, 0].tolist())
            for head in range(2):
                index = kept.index[row, head][~kept.hidden[row]].tolist()
                assert index == sorted(set(index)) and text <= set(index)
                spent.append(len(index) - len(text))
    assert sum(spent) <= budget * len(spent) and (policy == "sim-layer-kv" or set(spent) == {budget})


def test_every_head_has_a_choice_of_its_own():
    kept = chosen("std", 6).entries()
    assert any(not torch.equal(layer.index[:, 0], layer.index[:, 1]) for layer in kept)
    assert not torch.equal(kept[0].index, kept[1].index)


def attention_of(near: bool, size: int = 400) -> Attention:
    """One row whose last queries look at what is near them, or at the middle of the prompt."""
    keys = torch.zeros(1, 1, size, 4)
    keys[:, :, 100:200, 0] = 5.0
    keys[:, :, size - 30 :, 1] = 5.0
    query = torch.zeros(1, 2, size, 4)
    query[..., 1 if near else 0] = 5.0
    slots, no = torch.arange(size)[None], torch.zeros(1, size, dtype=torch.bool)
    visual = no.clone()
    visual[:, 20:360] = True
    return Attention(query, keys, 1.0, slots, no, visual, slots >= 360)


def test_lazy_layers_leave_their_budget_to_the_others():
    """SimLayerKV: a layer whose last queries look at their neighbourhood is lazy."""
    lazy, busy = (selection.lazy_layers(attention_of(near))[1] for near in (True, False))
    assert lazy < busy == 1.0
    assert shares([lazy, busy, busy], 30, 100) == [4, 42, 42]  # of 3 * 30
    assert LAZY_ROWS == 32


@pytest.mark.parametrize(
    "weights, budget, most, given",
    [
        ([1.0, 1.0], 8, 100, [8, 8]),
        ([1.0, 1.0], 100, 100, [100, 100]),
        ([0.1, 1.0], 50, 80, [20, 80]),  # what a full layer cannot take goes to the others
        ([0.001, 1.0, 1.0], 2, 100, [1, 2, 2]),
    ],
)
def test_budgets_follow_the_weights(weights, budget, most, given):
    assert shares(weights, budget, most) == given


def test_received_is_the_same_in_pieces(monkeypatch):
    whole = attention_of(False).received(attention_of(False).voters)
    monkeypatch.setattr(selection, "CHUNK", 1)
    assert torch.allclose(attention_of(False).received(attention_of(False).voters), whole)


def test_rows_that_keep_less_have_places_that_hold_nothing():
    worth = torch.rand(2, 1, 10)
    visual, hidden = torch.zeros(2, 10, dtype=torch.bool), torch.zeros(2, 10, dtype=torch.bool)
    visual[0, 2:8], visual[1, 5:8], hidden[1, :4] = True, True, True
    kept = keep(worth, visual, hidden, 4)
    assert kept.index.shape[-1] == 8 and kept.hidden.sum(1).tolist() == [0, 2]
    assert kept.index[1, 0, :6].tolist() == [4, 5, 6, 7, 8, 9]
