"""The outside baselines of benchmarks/rivals.py compute what they claim to: a rival that is wrong proves nothing."""

from __future__ import annotations

import math

import pytest
import rival_decoders
import rivals
import torch
from rival_decoders import hf_generate, released_sjd
from timing import paired_ratio, spread
from tiny_pipeline import TOKENS, VOCAB, class_pipeline, codes, hushed, seeded, text_pipeline

from arsd.decoding import CounterNoise, LawConfig
from arsd.models.llamagen import LlamaGenTransformer

PROMPTS = ["dog face", "red apple", "pear"]  # of unequal length, so that the rows are padded unequally


@pytest.fixture(scope="module")
def pipes():
    return {kind: hushed(make()).to(torch.float64) for kind, make in (("text", text_pipeline), ("class", class_pipeline))}


def given_of(pipe, kind: str) -> dict:
    if kind == "class":
        return {"class_labels": [3, 0, 4]}
    features, mask = pipe.encode_prompt(PROMPTS)
    assert len(set(mask.sum(1).tolist())) > 1 and int(mask.sum(1).max()) < mask.shape[1], "unequal, and all padded"
    return {"prompt_embeds": features, "prompt_attention_mask": mask}


def gumbel_of(seed: int, batch: int):
    """The noise that a pipeline with such a seed gives each token."""
    key = int(torch.randint(2**63 - 1, (), generator=seeded(seed)))
    noise = CounterNoise([key] * batch, list(range(batch)))

    def gumbel(position: int) -> torch.Tensor:
        noise.prepare([position] * batch, 1, VOCAB, torch.float64)
        return noise.token_gumbel(torch.full((batch, 1), position), VOCAB, torch.float64)[:, 0]

    return gumbel


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["text", "class"])
@pytest.mark.parametrize("sampling", [{}, {"guidance_scale": 1.0}, {"top_k": 5, "temperature": 0.8}], ids=str)
@torch.no_grad()
def test_generate_gives_the_tokens_of_plain_ar_when_it_gets_the_same_noise(pipes, kind, cache, sampling):
    pipe = pipes[kind]
    given = given_of(pipe, kind)
    config = pipe.law_config(sampling)
    condition, padding = rivals.condition_of(pipe, config, given)
    for seed in range(3):
        plain = codes(pipe, **given, **sampling, seed=seed, decoder="ar")
        tokens, seconds = hf_generate(pipe.transformer, condition, padding, TOKENS, config, cache, gumbel=gumbel_of(seed, 3))
        assert torch.equal(tokens, plain) and seconds > 0


@torch.no_grad()
def test_the_positions_that_generate_derives_itself_would_be_wrong(pipes, monkeypatch):
    pipe = pipes["text"]
    config = pipe.law_config({})
    condition, padding = rivals.condition_of(pipe, config, given_of(pipe, "text"))
    arguments = (pipe.transformer, condition, padding, TOKENS, config)
    right, _ = hf_generate(*arguments, gumbel=gumbel_of(0, 3))
    trim = rival_decoders.without_shared_padding
    monkeypatch.setattr(rival_decoders, "without_shared_padding", lambda *a: (*trim(*a)[:2], None))
    wrong, _ = hf_generate(*arguments, gumbel=gumbel_of(0, 3))
    assert not torch.equal(right, wrong)


def small_transformer() -> LlamaGenTransformer:
    """Four tokens of three ids: 81 pictures, whose law can be enumerated."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlamaGenTransformer(
            vocab_size=3, hidden_size=16, num_layers=1, num_heads=1, intermediate_size=16, grid=2, num_classes=2
        )
        for p in model.parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=4.0 / p.shape[-1] ** 0.5)  # laws that depend much on the past
    return model.eval()


def law_of_pictures(model: LlamaGenTransformer, condition: torch.Tensor, config: LawConfig) -> torch.Tensor:
    """Probability [81] of every picture, from teacher-forced laws."""
    ids = torch.cartesian_prod(*[torch.arange(3)] * 4)
    logits = torch.stack([model(stream.expand(81, -1, -1), ids) for stream in condition])
    laws = torch.softmax(rival_decoders.scores_of(logits, config), dim=-1)
    return laws.gather(-1, ids[..., None])[..., 0].double().prod(-1)


def chi_square_z(model: LlamaGenTransformer, condition: torch.Tensor, config: LawConfig, runs: int) -> float:
    counts = torch.zeros(81)
    for seed in range(runs):
        tokens, _, _ = released_sjd(model, condition, None, 4, config, window=3, seed=seed)
        counts[int((tokens[0] * torch.tensor([27, 9, 3, 1])).sum())] += 1
    expected = law_of_pictures(model, condition, config) * runs
    rare = expected < 5  # pooled, or the statistic has no chi-square law
    pairs = [(counts[~rare], expected[~rare]), (counts[rare].sum()[None], expected[rare].sum()[None])]
    seen, wanted = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    statistic = float(((seen - wanted) ** 2 / wanted.clamp_min(1e-9)).sum())
    freedom = int((wanted > 0).sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@torch.no_grad()
def test_released_sjd_has_the_law_of_plain_ar(monkeypatch):
    model, config = small_transformer(), LawConfig(guidance_scale=1.5)
    condition = torch.stack([model.embed_classes(torch.tensor([c])) for c in (0, 2)])
    assert abs(float(law_of_pictures(model, condition, config).sum()) - 1) < 1e-5
    assert abs(chi_square_z(model, condition, config, 3000)) < 4

    def without_residual(p, q, guesses, drawn):
        for slot, guess in enumerate(guesses):
            if torch.rand(()) >= p[slot, guess] / q[slot, guess]:
                return slot, drawn[slot : slot + 1]
        return len(guesses), drawn[-1:]

    monkeypatch.setattr(rival_decoders, "walk", without_residual)
    assert chi_square_z(model, condition, config, 2000) > 6, "fewer runs show a rule that draws from p where it refuses"


@torch.no_grad()
def test_released_sjd_takes_as_many_passes_as_the_engine_with_the_same_drafts(pipes):
    """Up to the first pass, which here judges no guess."""
    pipe, window = pipes["class"], 6
    config = pipe.law_config({"guidance_scale": 1.0, "temperature": 2.0})
    condition, padding = rivals.condition_of(pipe, config, {"class_labels": [2]})
    ours = pipe(
        class_labels=[2] * 200,
        generator=seeded(0),
        decoder=f"sjd:window={window},coupling=independent,init=random",
        output_type="latent",
        guidance_scale=1.0,
        temperature=2.0,
    ).stats.tokens_per_pass
    runs = [released_sjd(pipe.transformer, condition, padding, TOKENS, config, window, seed)[1] for seed in range(100)]
    theirs = TOKENS * len(runs) / sum(runs)
    assert ours > 1.2 and abs(theirs / ours - 1) < 0.08, (ours, theirs)


@torch.no_grad()
def test_released_sjd_reads_a_padded_condition_like_plain_ar(pipes):
    """With a law that leaves no choice both must give the one picture there is."""
    pipe = pipes["text"]
    given = {name: value[:1] for name, value in given_of(pipe, "text").items()}
    config = pipe.law_config({"top_k": 1})
    condition, padding = rivals.condition_of(pipe, config, given)
    plain = codes(pipe, **given, top_k=1, decoder="ar")
    tokens, passes, seconds = released_sjd(pipe.transformer, condition, padding, TOKENS, config, window=5)
    assert torch.equal(tokens, plain) and passes <= TOKENS and seconds > 0


def test_rivals_refuse_what_they_do_not_know(pipes):
    logits = torch.zeros(1, 2, 3)
    for options in ({"temperature": 0.0}, {"top_p": 0.5}, {"guidance_interval": 3}):
        with pytest.raises(ValueError, match="only"):
            rival_decoders.scores_of(logits, LawConfig(**options))
    with pytest.raises(ValueError, match="one picture"):
        released_sjd(pipes["class"].transformer, torch.zeros(1, 2, 1, 64), None, 4, LawConfig())


def test_ratio_is_that_of_pairs():
    """A machine that drifts by a factor of 100 does not blur a ratio of 2."""
    ours = [1.0, 10.0, 100.0, 3.0]
    mean, low, high = paired_ratio([2 * s for s in ours], ours)
    assert low <= mean <= high and abs(mean - 2) < 1e-9 and high - low < 1e-9
    mean, low, high = paired_ratio([1.1, 0.9, 1.2, 1.0], [1.0] * 4)
    assert low < mean < high and low < 1.0 < high
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)
