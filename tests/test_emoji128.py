"""The shipped model: what the first command of a newcomer runs."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import arsd
from arsd.cli import main
from arsd.cli.common import quiet
from arsd.pipelines.auto import find_model
from arsd.provenance import read_png, unpack_tokens

PROMPTS = ["red apple", "dog face", "pizza", "blue heart", "rocket"]


@pytest.fixture(scope="module")
def pipe():
    with quiet():
        pipe = arsd.AutoARPipeline.from_pretrained("emoji-128")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def plain(pipe):
    """Plain AR with one-token passes: five prompts, each with its own seed."""
    return tokens_of(pipe, "ar")


def tokens_of(pipe, decoder: str, rows: slice = slice(None), **options) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(10 + i) for i in range(len(PROMPTS))][rows]
    out = pipe(PROMPTS[rows], generator=generators, decoder=decoder, output_type="latent", **options)
    return out.tokens


def test_model_is_small_enough_for_git_and_as_large_as_the_docs_say(pipe):
    parts = (pipe.transformer, pipe.text_encoder, pipe.vq, pipe.drafter)
    assert 15e6 < sum(p.numel() for part in parts for p in part.parameters()) < 25e6
    folder = find_model("emoji-128")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 50e6
    dtypes = {p.dtype for part in parts for p in part.parameters()}
    assert dtypes == {torch.float32}, "unless another dtype is asked for"


EXACT = ["ar:pass_tokens=16", "sjd", "sjd:window=8,pass_tokens=16", "sjd:window=5,init=left", "eagle", "hybrid:window=12"]


@pytest.mark.parametrize("decoder", EXACT)
def test_seed_exact_tokens_equal_plain_ar_in_float32(pipe, plain, decoder):
    assert torch.equal(tokens_of(pipe, decoder), plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    "decoder", ["eagle:tree=3x2x1", "eagle:draft_length=12", "hybrid:draft_length=8", "hybrid:weight=none"]
)
def test_trees_long_chains_and_hybrids_give_the_tokens_of_plain_ar(pipe, plain, decoder):
    assert torch.equal(tokens_of(pipe, decoder), plain)


def test_the_drafter_is_worth_its_bytes_and_a_budget_is_kept(pipe):
    generators = [torch.Generator().manual_seed(10 + i) for i in range(len(PROMPTS))]
    call = {"generator": generators, "output_type": "latent"}
    chain = pipe(PROMPTS, decoder="eagle:draft_length=4,coupling=rejection", **call).stats
    assert chain.tokens_per_pass > 1.9 and chain.expected_changed_tokens == [0.0] * 5
    relaxed = pipe(PROMPTS, decoder=arsd.CoolSD(budget=4.0), **call).stats
    assert 1 < max(relaxed.expected_changed_tokens) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("window", [2, 3, 12, 24, 32, 64])
@pytest.mark.parametrize("init", ["uniform", "left", "above", "random"])
def test_every_window_and_initialiser_gives_the_tokens_of_plain_ar(pipe, plain, window, init):
    assert torch.equal(tokens_of(pipe, f"sjd:window={window},init={init}"), plain)


def test_a_picture_does_not_depend_on_its_batch(pipe, plain):
    for row in (0, 3):
        assert torch.equal(tokens_of(pipe, "sjd", slice(row, row + 1)), plain[row : row + 1])


def test_sjd_takes_far_fewer_passes(pipe):
    out = pipe(PROMPTS, generator=torch.Generator().manual_seed(3), decoder="sjd:window=16")
    assert out.stats.tokens_per_pass > 2
    assert [image.size for image in out.images] == [(128, 128)] * 5


def test_known_words_are_silent_and_unknown_ones_are_named(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.encode_prompt(PROMPTS)
    with pytest.warns(UserWarning, match="xylograph"):
        pipe.encode_prompt("red xylograph")


def test_generate_command_makes_the_same_picture_with_plain_ar_and_sjd(tmp_path: Path, capsys):
    for name, decoder in (("a", "ar"), ("b", "sjd")):
        assert (
            main(["generate", "red apple", "--seed", "7", "--decoder", decoder, "--out", str(tmp_path / name), "--json"])
            == 0
        )
    records = [read_png(next((tmp_path / name).glob("*.png"))) for name in ("a", "b")]
    assert (unpack_tokens(records[0]["tokens"]) == unpack_tokens(records[1]["tokens"])).all()
    assert records[0]["pass_tokens"] == 1 < records[1]["pass_tokens"]
    pictures = [next((tmp_path / name).glob("*.png")).stat().st_size for name in ("a", "b")]
    assert min(pictures) > 2000
    assert '"lossless": true' in capsys.readouterr().out


@pytest.mark.slow
def test_demo_command(tmp_path: Path, capsys):
    assert main(["demo", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("same tokens") == 4 and str(tmp_path / "sheet.png") in shown
    assert (tmp_path / "sheet.png").is_file() and len(list(tmp_path.glob("*-seed7-0.png"))) == 4
