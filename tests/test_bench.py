"""Benchmarks compare like with like: same prompts and seeds for every strategy, plain AR always among them."""

from __future__ import annotations

import pytest
import torch
from tiny_pipeline import TOKENS, class_pipeline, hushed, seeded, text_pipeline

from arsd import SJD, Autoregressive, parse_strategy
from arsd.bench import BenchRow, paired_interval, peak_memory, run_bench, spread
from arsd.errors import InputError

PROMPTS = ["red apple", "dog face", "pear"]


@pytest.fixture(scope="module")
def pipe():
    return hushed(text_pipeline())


def test_every_strategy_decodes_all_prompts_and_the_figures_add_up(pipe):
    report = run_bench(pipe, [Autoregressive(), SJD(window=4)], PROMPTS, repeats=2)
    plain, fast = report["rows"]
    assert plain["tokens"] == fast["tokens"] == 2 * 3 * TOKENS == plain["forward_passes"] > fast["forward_passes"]
    assert plain["tokens_per_pass"] == 1 and fast["tokens_per_pass"] == fast["tokens"] / fast["forward_passes"]
    assert plain["speedup"] == plain["pass_cost_ratio"] == 1 and plain["pass_tokens"] == 1 and fast["pass_tokens"] == 4
    for row in report["rows"]:
        assert len(row["seconds"]) == 6 and sorted(row["seconds"])[2] <= row["seconds_median"] <= sorted(row["seconds"])[3]
        assert 0 < row["outside_forward_share"] < 1 and row["peak_memory"] > 2**20
    assert fast["speedup"] == pytest.approx(plain["seconds_median"] / fast["seconds_median"])


def test_plain_ar_is_added_in_front_when_it_is_missing(pipe):
    rows = run_bench(pipe, [Autoregressive(pass_tokens=3)], PROMPTS[:1])["rows"]
    assert [row["decoder"] for row in rows] == ["ar", "ar:pass_tokens=3"]
    rows = run_bench(pipe, [SJD(), Autoregressive()], PROMPTS[:1])["rows"]
    assert [row["decoder"] for row in rows] == ["sjd", "ar"]


def test_seed_exact_strategies_are_checked_against_plain_ar_at_their_pass_shape_and_others_are_not(pipe):
    strategies = [SJD(window=4), SJD(window=4, pass_tokens=8), parse_strategy("sjd:coupling=independent")]
    assert [r["identical_to_ar_at_w"] for r in run_bench(pipe, strategies, PROMPTS)["rows"]] == [True, True, True, None]
    unchecked = run_bench(pipe, strategies, PROMPTS, check=False)["rows"]
    assert {row["identical_to_ar_at_w"] for row in unchecked} == {None}


def test_the_check_runs_plain_ar_at_the_pass_shape_of_the_strategy(pipe, monkeypatch):
    seen, cls = [], type(pipe)
    original = cls.__call__
    monkeypatch.setattr(cls, "__call__", lambda self, *a, **k: seen.append(str(k["decoder"])) or original(self, *a, **k))
    run_bench(pipe, [SJD(window=4, pass_tokens=6)], PROMPTS[:1])
    assert seen.count("ar:pass_tokens=6") == 1


def test_a_strategy_that_only_claims_to_be_seed_exact_is_caught(pipe):
    class Liar(SJD):
        seed_exact = True

    rows = run_bench(pipe, [Liar(coupling="independent")], PROMPTS)["rows"]
    assert [row["identical_to_ar_at_w"] for row in rows] == [True, False]


def test_all_strategies_get_the_same_seed_in_a_call_and_calls_get_different_ones(pipe, monkeypatch):
    seen = []
    cls = type(pipe)
    original = cls.__call__

    def spy(self, prompt, **options):
        out = original(self, prompt, **options)
        seen.append((tuple(prompt), str(options["decoder"]), out.seeds[0]))
        return out

    monkeypatch.setattr(cls, "__call__", spy)
    run_bench(pipe, [SJD()], PROMPTS, seed=5, check=False)
    timed = seen[2:]  # two warm-ups
    assert [call[:2] for call in timed] == [((p,), d) for p in PROMPTS for d in ("ar", "sjd")]
    assert [call[2] for call in timed[::2]] == [call[2] for call in timed[1::2]]
    assert len({call[2] for call in timed}) == 3
    monkeypatch.undo()
    assert timed[0][2] == pipe(PROMPTS[0], generator=seeded(5), output_type="latent").seeds[0]


def test_the_report_says_what_was_run(pipe):
    lines = []
    report = run_bench(pipe, [], PROMPTS, batch=2, guidance_scale=1.0, top_k=5, progress=lines.append)
    assert (report["batch"], report["prompts"], report["guidance_scale"], report["top_k"]) == (2, 2, 1.0, 5)
    assert (report["dtype"], report["device"], report["threads"]) == ("float32", "cpu", torch.get_num_threads())
    assert lines == ["call 1 of 1, repeat 1 of 1"] and report["rows"][0]["tokens_per_pass"] == 1


@pytest.mark.parametrize("options", [{"batch": 0}, {"batch": 4}, {"repeats": 0}])
def test_a_batch_that_cannot_be_filled_is_refused(pipe, options):
    with pytest.raises(InputError, match="cannot fill a batch"):
        run_bench(pipe, [], PROMPTS, **options)


def test_rows_of_a_call_that_took_no_time_do_not_divide_by_zero():
    row = BenchRow("ar", True, seconds=[0.5])
    assert row.as_dict(row)["outside_forward_share"] == 0.0 and row.as_dict(row)["tokens_per_pass"] == 0


def test_peak_memory_is_in_bytes():
    assert 2**20 < peak_memory() < 2**45


def test_a_queue_is_one_call_whose_rows_are_refilled(pipe):
    report = run_bench(pipe, [SJD(window=4)], PROMPTS, batch=2, queue=True, repeats=2)
    plain, fast = report["rows"]
    assert report["queue"] and report["batch"] == 2 and report["prompts"] == 3
    assert len(plain["seconds"]) == len(fast["seconds"]) == 2 and plain["tokens"] == fast["tokens"] == 2 * 3 * TOKENS
    assert plain["forward_passes"] == 2 * 2 * TOKENS, "three pictures in two rows take two turns"
    assert fast["identical_to_ar_at_w"] and fast["pictures_per_minute"] > 0


def test_class_labels_can_be_timed_too():
    report = run_bench(hushed(class_pipeline()), [SJD(window=4)], [0, 1, 2, 3], batch=2)
    assert report["rows"][1]["tokens"] == 4 * TOKENS and report["rows"][1]["identical_to_ar_at_w"]


@pytest.mark.parametrize("count", [4, 5, 8, 20, 200])
def test_the_interval_is_students_on_paired_log_ratios(count):
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(count)
    base, other = (torch.rand(count, generator=generator).add(1).tolist() for _ in range(2))
    ratios = torch.tensor(base).double().log() - torch.tensor(other).double().log()
    half = float(stats.t.ppf(0.975, count - 1) * ratios.std() / count**0.5)
    low, high = paired_interval(base, other)
    expected = [float((ratios.mean() + sign * half).exp()) for sign in (-1, 1)]
    assert [low, high] == pytest.approx(expected, rel=0.02 * half + 1e-6)


def test_too_few_pairs_have_no_interval_and_one_reading_no_spread():
    assert paired_interval([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) is None
    assert spread([0.5]) == [0.5, 0.5] and spread([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 4.0]


def test_parts_of_a_round_add_up_to_it(pipe):
    for row in run_bench(pipe, [SJD(window=4)], PROMPTS[:2])["rows"]:
        parts = row["round_seconds_by_part"]
        assert set(parts) == {"draft", "forward", "verify", "other"}
        assert row["outside_forward_share"] == pytest.approx(1 - parts["forward"] / sum(parts.values()))
