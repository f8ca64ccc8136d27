"""Who listens hears every pass, can stop its own call, and costs no one time; tokens that a rule relaxed are told apart."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import fields
from typing import Any

import pytest
import torch
from test_generate_fn import NEW, Stop, Streamer, prompts
from test_generate_fn import tiny as tiny_llama
from tiny_pipeline import TOKENS, hushed, seeded, text_pipeline
from transformers import StoppingCriteriaList
from video_llms import clip, tiny

import arsd
from arsd.decoding import SJD, Autoregressive, CounterNoise, Outcome, Round, UCBSpec, parse_strategy
from arsd.decoding.relaxed import CoolSDRule
from arsd.exactness.drafts import rule_under_table
from arsd.exactness.tables import HashTarget, World, run
from arsd.exactness.tape import push_forward
from arsd.generation import generate_fn
from arsd.pipelines.video_llm import VideoLLMPipeline
from arsd.pipelines.video_parts import said

pytestmark = pytest.mark.usefixtures("quiet_transformers")

VOCAB, LENGTH, BATCH = 9, 30, 3
ARMS = "ucb-spec:arms=ar+sjd:window=4,reproducible=true"
LOSSLESS = [
    *("ar", "sjd", "sjd:coupling=maximal", "sjd:coupling=gumbel-rejection", "sjd:coupling=independent", ARMS),
    *("speculative:rule=rejection", "eagle:coupling=rejection,tree=2x1", "eagle:tree=2x1", "cool-sd:delta=1,nu=0"),
    *("cool-sd:delta=0.6,nu=0,floor=0", "cool-sd:delta=1,nu=0,tree=2x1", "sjd:acceptance=margin:omega=1"),
]
RELAXED = [  # whose report is the probability, given the past, that the label is set
    *("sjd:window=6,acceptance=cool-sd:delta=3:nu=0", "cool-sd:delta=3,nu=0", "cool-sd:delta=3,nu=0,tree=2x1"),
    *("cool-sd:budget=3", "lantern:k=3,delta=0.3,residual=optimal", "grouped:group=4,spread=2,radius=9"),
]


def decoded(strategy: Any, batch: int = BATCH, **request: Any) -> Any:
    target = request.pop("target", HashTarget)(VOCAB, LENGTH, batch)
    strategy = parse_strategy(strategy) if isinstance(strategy, str) else strategy
    return run(target, strategy, row_length=6, **request)


def same(heard: list[Round], trace: list[Round]) -> bool:
    names = [field.name for field in fields(Round)]
    pairs = [(getattr(a, n), getattr(b, n)) for a, b in zip(heard, trace, strict=True) for n in names]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def committed(heard: list[Round], pictures: int) -> list[list[int]]:
    """What the rounds committed of each picture."""
    tokens: list[list[int]] = [[] for _ in range(pictures)]
    for turn in heard:
        for b, (count, picture) in enumerate(zip(turn.counts, turn.pictures, strict=True)):
            tokens[picture] += turn.tokens[b, :count].tolist()
    return tokens


def outcomes(trace: list[Round], pictures: int) -> torch.Tensor:
    """How often each picture had each outcome [M, 5], among committed tokens."""
    found = torch.zeros(pictures, len(Outcome), dtype=torch.int64)
    for turn in trace:
        taken = torch.arange(turn.outcome.shape[1]) < torch.tensor(turn.counts)[:, None]
        for outcome in Outcome:
            found[turn.pictures, outcome] += ((turn.outcome == outcome) & taken).sum(1)
    return found


class Stopper:
    """Hears rounds, and stops at the n-th."""

    def __init__(self, n: int) -> None:
        self.n, self.heard = n, list[Round]()

    def __call__(self, turn: Round) -> bool:
        self.heard.append(turn)
        return len(self.heard) == self.n


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize("strategy", LOSSLESS[:8] + RELAXED[:3])
def test_rounds_heard_are_those_of_the_trace_and_change_nothing(strategy: str):
    heard: list[Round] = []
    alone, apart = decoded(strategy), decoded(strategy, on_round=heard.append)
    assert torch.equal(alone.tokens, apart.tokens) and apart.trace == []
    assert committed(heard, BATCH) == alone.tokens.tolist()
    assert same(heard, decoded(strategy, trace=True).trace)
    heard.clear()
    assert same(heard, decoded(strategy, trace=True, on_round=heard.append).trace)


def test_a_stop_comes_after_the_pass_and_after_on_commit_has_heard_of_it():
    full, calls = decoded("sjd:window=8"), list[str]()

    def on_round(turn: Round) -> bool:
        calls.append("round")
        return calls.count("round") == 3

    out = decoded("sjd:window=8", on_round=on_round, on_commit=lambda *_: calls.append("commit"))
    assert calls == ["round", "commit"] * 3 and out.stats.forward_passes == 3
    for b, n in enumerate(out.stats.tokens):
        assert 3 <= n < LENGTH and torch.equal(out.tokens[b, :n], full.tokens[b, :n]) and not out.tokens[b, n:].any()


def test_when_a_queue_is_stopped_no_other_picture_begins():
    class Counting(HashTarget):
        joined = 0

        def join(self, rows: list[int], pictures: list[int]) -> None:
            Counting.joined += len(rows)
            super().join(rows, pictures)

    out = decoded("ar", 2, target=Counting, pictures=5, on_round=Stopper(LENGTH))
    assert out.stats.tokens == [LENGTH] * 2 + [0] * 3 and Counting.joined == 0 and not out.tokens[2:].any()
    out = decoded("ar", 2, target=Counting, pictures=5, on_round=Stopper(LENGTH + 4))
    assert out.stats.tokens == [LENGTH] * 2 + [4] * 2 + [0] and Counting.joined == 2


def test_listening_is_in_no_ones_seconds():
    told: list[float] = []

    def build(setting):
        parts = Autoregressive().build(setting)
        own = parts.controller
        own.observe = lambda counts, seconds: told.append(seconds)
        return parts

    def slow(*_: Any) -> None:
        time.sleep(0.03)

    began = time.perf_counter()
    out = run(HashTarget(VOCAB, 20, BATCH), parts=build, on_round=slow, on_picture=slow)
    slept = 0.03 * (20 + BATCH)
    assert time.perf_counter() - began > slept and out.stats.total_seconds < slept / 4 and sum(told) < slept / 4


def test_rounds_name_the_arm_that_decoded_them():
    heard: list[Round] = []
    stats = decoded(UCBSpec(arms="ar+sjd:window=4+sjd:window=8"), on_round=heard.append).stats
    assert Counter(turn.arm for turn in heard) == Counter({arm: n for arm, n in stats.arms.items() if n})
    assert all(turn.positions.shape[1] == {"ar": 1, "sjd:window=4": 4, "sjd:window=8": 8}[turn.arm] for turn in heard)
    heard.clear()
    decoded("sjd:window=4", on_round=heard.append)
    assert {turn.arm for turn in heard} == {""}


# ---------------------------------------------------------------- tokens that a rule relaxed


@pytest.mark.parametrize("strategy", LOSSLESS)
def test_lossless_rules_relax_no_token(strategy: str):
    out = decoded(strategy, 40, trace=True)
    found = outcomes(out.trace, 40).sum(0)
    assert found[Outcome.RELAXED] == 0 and found.sum() == 40 * LENGTH
    assert strategy == "ar" or found[Outcome.ACCEPTED] > 0


@pytest.mark.parametrize("strategy", RELAXED)
def test_relaxed_tokens_are_as_many_as_the_rule_expects(strategy: str):
    """Given the past, a slot's label has the probability that the rule reports, so the differences of 1,000 pictures with
    seeds of their own have mean 0: alarm at |z| > 4. Power: a report that is 10 per cent off has |z| > 4 of the other side.
    """
    count = 1000
    out = decoded(strategy, count, seeds=list(range(count)), images=[0] * count, trace=True)
    labels = outcomes(out.trace, count)[:, Outcome.RELAXED].double()
    reported = torch.tensor(out.stats.expected_changed_tokens, dtype=torch.float64)

    def z(share: float) -> float:
        off = labels - share * reported
        return float(off.mean() / off.std() * count**0.5)

    print(
        f"{float(labels.mean()):.3f} labels, {float(reported.mean()):.3f} reported, z {z(1):.1f}, {z(0.9):.1f}, {z(1.1):.1f}"
    )
    assert abs(z(1)) < 4 < z(0.9) and z(1.1) < -4


class Mute:
    """Noise that keeps its uniforms to itself."""

    def __init__(self, count: int) -> None:
        self._noise = CounterNoise(list(range(count)), [0] * count)

    def __getattr__(self, name: str) -> Any:
        if name == "uniform":
            raise AttributeError(name)
        return getattr(self._noise, name)


@pytest.mark.parametrize("strategy", RELAXED)
def test_labels_change_no_token_and_noise_without_uniforms_gives_none(strategy: str):
    count = 20
    told = decoded(strategy, count, seeds=list(range(count)), images=[0] * count, trace=True)
    mute = decoded(strategy, count, noise=Mute(count), trace=True)
    assert torch.equal(told.tokens, mute.tokens) and told.stats.row_passes == mute.stats.row_passes
    assert told.stats.expected_changed_tokens == mute.stats.expected_changed_tokens
    assert outcomes(told.trace, count)[:, Outcome.RELAXED].sum() > 0
    for turn in told.trace:
        turn.outcome[turn.outcome == Outcome.RELAXED] = Outcome.ACCEPTED
    assert same(told.trace, mute.trace)


def test_an_enumeration_of_all_choices_has_no_labels():
    seen: set[int] = set()
    build = rule_under_table(lambda: CoolSDRule(3, 0), World(3, 3, 2), 3)
    push_forward(
        World(3, 3, 1), build, each=lambda out, _: seen.update(*(t.outcome.unique().tolist() for t in out.trace)), trace=True
    )
    assert seen == {Outcome.ACCEPTED, Outcome.RESAMPLED, Outcome.BONUS}


@pytest.mark.parametrize("coupling", ["gumbel", "independent"])
def test_tokens_that_the_margin_relaxed_are_those_that_are_not_plain_ars_arg_max(coupling: str):
    out = decoded(SJD(6, coupling, acceptance="margin:omega=2"), 50, trace=True)
    labels = outcomes(out.trace, 50)[:, Outcome.RELAXED]
    assert labels.tolist() == out.stats.expected_changed_tokens and labels.sum() > 50


# ---------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def pipe():
    return hushed(text_pipeline())


@pytest.mark.parametrize("strategy", ["ar", "sjd:window=4", ARMS])
def test_a_picture_that_is_stopped_is_the_beginning_of_the_whole_one(pipe, strategy: str):
    call = {"prompt": ["red apple", "dog face"], "decoder": strategy}
    heard: list[Round] = []
    whole = pipe(**call, generator=seeded(3), trace=True, on_round=heard.append)
    assert same(heard, whole.trace) and committed(heard, 2) == whole.tokens.tolist()
    assert {turn.arm for turn in heard} <= ({"ar", "sjd:window=4"} if strategy == ARMS else {""})
    for passes in (1, 3):
        stop = Stopper(passes)
        out = pipe(**call, generator=seeded(3), on_round=stop)
        assert len(stop.heard) == out.stats.forward_passes == passes and len(out.images) == 2
        assert [len(tokens) for tokens in committed(stop.heard, 2)] == out.stats.tokens
        for b, n in enumerate(out.stats.tokens):
            assert passes <= n < TOKENS and torch.equal(out.tokens[b, :n], whole.tokens[b, :n])
            assert not out.tokens[b, n:].any()


def test_a_call_that_is_stopped_does_not_stop_the_one_in_another_thread(pipe):
    alone = pipe("red apple", decoder="ar", generator=seeded(1), output_type="latent")
    outs: dict[int, Any] = {}
    together = threading.Barrier(2, timeout=60)

    def work(passes: int) -> None:
        stop = Stopper(passes)

        def heard(turn: Round) -> bool:
            if len(stop.heard) < 3:
                together.wait()  # both are in the middle of their calls
            return stop(turn)

        outs[passes] = pipe("red apple", decoder="ar", generator=seeded(1), output_type="latent", on_round=heard)

    threads = [threading.Thread(target=work, args=(passes,)) for passes in (3, 99)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outs[3].stats.tokens == [3] and torch.equal(outs[3].tokens[:, :3], alone.tokens[:, :3])
    assert outs[99].stats.tokens == [TOKENS] and torch.equal(outs[99].tokens, alone.tokens)


def test_seconds_of_a_picture_do_not_hold_those_of_its_listeners(pipe):
    def slow(*_: Any) -> dict[str, Any]:
        time.sleep(0.05)
        return {}

    out = pipe("red apple", decoder="ar", generator=seeded(1), output_type="latent", on_round=lambda turn: slow() and None)
    assert out.stats.forward_passes == TOKENS and out.stats.total_seconds < 0.05 * TOKENS / 2


# ---------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


def generated(llama: Any, rows: int, on_round: Any = None, streamer: Any = None, **options: Any) -> Any:
    fn = generate_fn("sjd:window=6", on_round=on_round, streamer=streamer)
    options = {"max_new_tokens": NEW, "do_sample": True, "seed": 5, "pad_token_id": 0, **options}
    return llama.generate(**prompts(rows), custom_generate=fn, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("end", [None, 7])
def test_a_text_that_is_stopped_is_the_beginning_of_the_whole_one(llama, end: int | None):
    heard: list[Round] = []
    whole = generated(llama, 3, heard.append, eos_token_id=end)
    known = whole.sequences.shape[1] - max(whole.stats.tokens)
    rows = [row[:n] for row, n in zip(whole.sequences[:, known:].tolist(), whole.stats.tokens, strict=True)]
    assert committed(heard, 3) == rows
    lengths = set()
    for passes in range(1, len(heard)):
        stop = Stopper(passes)
        out = generated(llama, 3, stop, eos_token_id=end)
        ours = out.sequences[:, known:].tolist()
        assert out.stats.forward_passes == passes and len(ours[0]) == max(out.stats.tokens)
        assert committed(stop.heard, 3) == [row[:n] for row, n in zip(ours, out.stats.tokens, strict=True)]
        for row, mine, n in zip(rows, ours, out.stats.tokens, strict=True):
            assert 0 < n <= len(row) and mine[:n] == row[:n] and not any(mine[n:])
        lengths.add(len(set(out.stats.tokens)))
    assert max(lengths) > 1, "rows of one length: the test shows less"


@pytest.mark.parametrize("end", [None, 7])
def test_under_criteria_of_ones_own_a_text_ends_where_they_have_been_asked(llama, end: int | None):
    """The last token of a row that is ahead of the others is not returned: the criteria could still have ended it before."""
    whole = generated(llama, 3, eos_token_id=end)
    known = whole.sequences.shape[1] - max(whole.stats.tokens)
    for passes in range(1, whole.stats.forward_passes):
        stop, criterion = Stopper(passes), Stop()
        out = generated(llama, 3, stop, eos_token_id=end, stopping_criteria=StoppingCriteriaList([criterion]))
        asked = len(criterion.asked)
        assert out.sequences.shape[1] == known + asked
        assert torch.equal(out.sequences, whole.sequences[:, : known + asked])
        assert out.stats.tokens == [min(n, asked) for n in whole.stats.tokens]
        going = [
            n
            for n, all_of_it in zip(map(len, committed(stop.heard, 3)), whole.stats.tokens, strict=True)
            if end is None or n < all_of_it
        ]
        assert asked == min(going)


@pytest.mark.parametrize("criteria", [{}, {"max_time": 1e9}])
def test_a_streamer_has_heard_all_of_a_text_that_is_stopped(llama, criteria: dict[str, float]):
    stop, streamer = Stopper(3), Streamer()
    out = generated(llama, 1, stop, streamer, **criteria)
    (tokens,) = committed(stop.heard, 1)
    assert streamer.heard[1:] == [*([token] for token in tokens), "end"]
    assert out.sequences[0, -len(tokens) :].tolist() == tokens and out.stats.tokens == [len(tokens)]


# ---------------------------------------------------------------- clips


@pytest.mark.parametrize("kind", ["llava-onevision", "qwen2.5-vl"])
@pytest.mark.parametrize("decoder", ["ar", "sjd:window=5", "prompt-lookup", ARMS])
def test_answers_are_heard_as_they_come_and_can_be_stopped(kind: str, decoder: str):
    pipe, call = VideoLLMPipeline(*tiny(kind)), {"max_new_tokens": 20, "source_fps": 4, "decoder": decoder}
    heard: list[Round] = []
    whole = pipe(clip(), **call, on_round=heard.append)
    assert committed(heard, 1) == whole.tokens.tolist() and len(heard) == whole.stats.forward_passes
    assert {turn.arm for turn in heard} == ({"ar", "sjd:window=4"} if decoder == ARMS else {""})
    for options in ({}, {"max_time": 1e9}):  # a criterion that the loop does not know
        stop = Stopper(4)
        out = pipe(clip(), **call, **options, on_round=stop)
        assert committed(stop.heard, 1) == out.tokens.tolist() and out.stats.tokens == [out.tokens.shape[1]]
        assert out.stats.forward_passes == 4 <= out.tokens.shape[1] < 20
        assert torch.equal(out.tokens, whole.tokens[:, : out.tokens.shape[1]])
        assert out.text == said(pipe.processor.tokenizer, out.tokens[0])
    pieces = list(pipe.stream(clip(), **call, on_round=Stopper(4)))
    assert "".join(pieces) == out.text


def test_answers_of_a_batch_end_where_each_has_come_to():
    pipe, call = VideoLLMPipeline(*tiny("qwen2.5-vl")), {"max_new_tokens": 30, "source_fps": 4, "decoder": "sjd:window=6"}
    videos = [clip(seed=1), clip(seed=2)]
    whole, stop = pipe(videos, **call), Stopper(9)
    out = pipe(videos, **call, on_round=stop)
    assert out.stats.tokens == [len(tokens) for tokens in committed(stop.heard, 2)]
    for b, n in enumerate(out.stats.tokens):
        assert torch.equal(out.tokens[b, :n], whole.tokens[b, :n])
        assert out.text[b] == said(pipe.processor.tokenizer, whole.tokens[b, :n])


def test_listening_to_an_answer_is_in_no_ones_seconds():
    pipe, passes = arsd.VideoLLMPipeline(*tiny("llava-onevision")), 12
    out = pipe(clip(), max_new_tokens=passes, decoder="ar", on_round=lambda turn: time.sleep(0.1))
    assert out.stats.forward_passes == passes and out.stats.total_seconds < 0.05 * passes < out.seconds
