"""Strategies are configuration only: text, JSON and back; bad input gives one line; one object serves many threads."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from arsd.decoding import SJD, STRATEGIES, Autoregressive, DecodingStrategy, parse_strategy
from arsd.errors import ArsdError, StrategyError
from arsd.exactness.tables import HashTarget, run

EXAMPLES = {
    "ar": Autoregressive(),
    "ar:pass_tokens=16": Autoregressive(pass_tokens=16),
    "sjd": SJD(),
    "sjd:window=32": SJD(window=32),
    "sjd:window=32,coupling=maximal": SJD(window=32, coupling="maximal"),
    "sjd:coupling=gumbel-rejection,init=above": SJD(coupling="gumbel-rejection", init="above"),
    "sjd:window=4,coupling=independent,init=left,pass_tokens=8": SJD(4, "independent", "left", 8),
}


def options_of(strategy: DecodingStrategy) -> dict:
    return {key: value for key, value in strategy.config.items() if not key.startswith("_")}


def same(a: DecodingStrategy, b: DecodingStrategy) -> bool:
    return type(a) is type(b) and options_of(a) == options_of(b)


@pytest.mark.parametrize("text", EXAMPLES)
def test_text_becomes_the_strategy_and_back(text: str):
    strategy = EXAMPLES[text]
    assert same(parse_strategy(text), strategy)
    assert str(strategy) == text
    assert same(parse_strategy(str(strategy)), strategy)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (" sjd ", "sjd"),
        ("sjd:", "sjd"),
        ("sjd:window=auto", "sjd"),
        ("sjd:pass_tokens=none", "sjd"),
        ("sjd:pass_tokens=None,window=8", "sjd:window=8"),
    ],
)
def test_defaults_and_empty_options_are_taken_and_not_repeated(text: str, plain: str):
    assert str(parse_strategy(text)) == plain


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "unknown decoder"),
        ("sdj", "unknown decoder 'sdj'"),
        ("SJD", "unknown decoder"),
        ("sjd:windows=8", "windows"),
        ("sjd:window", "no option"),
        ("sjd:window=", "window must be a whole number"),
        ("sjd:window=eight", "window must be a whole number"),
        ("sjd:window=0", "window must be a whole number >= 1"),
        ("sjd:window=-4", "window must be a whole number"),
        ("sjd:window=8.0", "window must be a whole number"),
        ("sjd:window=nan", "window must be a whole number"),
        ("sjd:window=true", "window must be a whole number"),
        ("sjd:window=none", "window must be a whole number"),
        ("sjd:coupling=greedy", "unknown coupling 'greedy'"),
        ("sjd:coupling=3", "unknown coupling 3"),
        ("sjd:init=below", "unknown init 'below'"),
        ("sjd:window=16,pass_tokens=8", "at least window"),
        ("sjd:window=automatic", "whole number >= 1 or auto"),
        ("sjd:_class_name=SJD", "no option"),
        ("ar:pass_tokens=0", "pass_tokens"),
        ("ar:window=4", "window"),
    ],
)
def test_bad_text_gives_one_line_that_says_what_is_wrong(text: str, named: str):
    with pytest.raises(StrategyError, match=named) as error:
        parse_strategy(text)
    assert isinstance(error.value, ArsdError) and "\n" not in str(error.value) and len(str(error.value)) < 300


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(StrategyError, match=", ".join(STRATEGIES)):
        parse_strategy("warp")
    with pytest.raises(StrategyError, match="window, coupling, init, pass_tokens, acceptance"):
        parse_strategy("sjd:speed=9")


@pytest.mark.parametrize("text", EXAMPLES)
def test_saved_strategy_is_small_json_and_loads_again(text: str, tmp_path: Path):
    strategy = EXAMPLES[text]
    strategy.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "decoder_config.json").read_text())
    assert saved["_class_name"] == type(strategy).__name__
    assert {key: value for key, value in saved.items() if not key.startswith("_")} == options_of(strategy)
    assert same(type(strategy).from_pretrained(tmp_path), strategy)


def test_from_config_copies_and_overrides():
    strategy = SJD(window=32, coupling="maximal")
    assert same(SJD.from_config(strategy.config), strategy)
    assert same(SJD.from_config(strategy.config, window=8), SJD(window=8, coupling="maximal"))
    assert strategy.config["window"] == 32
    with pytest.raises(StrategyError):
        SJD.from_config(strategy.config, window=0)


def test_strategies_of_another_kind_take_over_what_they_share():
    """As diffusers' schedulers do: ``Other.from_config(pipe.decoder.config)`` keeps the common options, and finds back."""
    strategy = SJD(window=8, pass_tokens=16)
    other = Autoregressive.from_config(strategy.config)
    assert type(other) is Autoregressive and str(other) == "ar:pass_tokens=16"
    assert str(SJD.from_config(other.config)) == str(strategy)


def test_promises_of_each_strategy():
    assert all(strategy.lossless for strategy in EXAMPLES.values())
    assert Autoregressive().seed_exact and SJD().seed_exact
    assert not any(SJD(coupling=coupling).seed_exact for coupling in ("maximal", "gumbel-rejection", "independent"))


@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
def test_one_strategy_object_serves_many_threads_at_once(coupling: str):
    """Eight calls with different seeds on four threads give the tokens of eight calls one after another."""
    strategy, state = SJD(window=6, coupling=coupling), dict(SJD(window=6, coupling=coupling).config)

    def call(seed: int) -> torch.Tensor:
        return run(HashTarget(9, 40, 2, seed=seed), strategy, seeds=[seed, seed]).tokens

    expected = [call(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(call, range(8)))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert dict(strategy.config) == state
