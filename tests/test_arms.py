"""Strategies as arms: plain AR's tokens whatever the choices, choices that can be repeated, and arms that keep up."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from drafting import PROMPTS, drafting
from test_generate_fn import NEW, end_of, prompts, tiny
from tiny_pipeline import TOKENS, class_pipeline, codes, hushed, one_clear_line, seeded, text_pipeline

import arsd
from arsd import EXP3Spec, UCBSpec, generate_fn
from arsd.decoding import CounterNoise, Draft, Grammar, Setting, bandit_strategies, registry
from arsd.decoding.arms import arms_text, build_arms, parse_arms
from arsd.decoding.bandits import Bandit
from arsd.decoding.costs import PassCosts
from arsd.errors import StrategyError

STD = "+".join(f"std:budget=16:draft_length={n}" for n in (3, 5, 9))
ARMS = [
    None,
    "ar+sjd:window=12+speculative:drafter=jacobi:init=left:window=5",
    "token-recycling+prompt-lookup:draft_length=3+prompt-lookup:draft_length=7+sjd:window=4",
    f"{STD}+std:budget=8:draft_length=4+layer-skip:draft_length=3",
]

pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny(num_hidden_layers=4, max_position_embeddings=400)


def decoded(model: Any, strategy: Any, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(**inputs, **options, custom_generate=generate_fn(strategy))


def scripted(monkeypatch: pytest.MonkeyPatch, choose: Any) -> None:
    """UCBSpec takes the arm that ``choose(number of the round)`` says."""

    class Script(Bandit):
        def choose(self, draw: float) -> int:
            return int(choose(self.tally.drawn))

    monkeypatch.setattr(UCBSpec, "algorithm", Script)


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("arms", ARMS)
@pytest.mark.parametrize("strategy", [UCBSpec, EXP3Spec])
def test_the_tokens_are_plain_ars_whatever_arm_has_the_round(llama, strategy: type, arms: str | None):
    """Greedily and sampled, for batches whose rows end at different lengths, with what a first call has taught."""
    both = strategy(arms=arms)
    for rows in (1, 2, 3):
        inputs = prompts(rows, 40, (0, 3, 5))
        for options in ({}, {"eos_token_id": end_of(llama, inputs)}, {"do_sample": True, "top_k": 0, "seed": 5}):
            plain = decoded(llama, "ar", inputs, **options)
            ours = decoded(llama, both, inputs, **options)
            assert torch.equal(ours.sequences, plain.sequences), (rows, options)
            assert ours.stats.tokens == plain.stats.tokens
            assert sum(ours.stats.arms.values()) == ours.stats.forward_passes == sum(ours.stats.pass_shapes.values())


def test_every_order_of_arms_gives_plain_ars_tokens(llama, monkeypatch):
    """Arms in turn, and in blocks: windows grow and shrink, and a tree stands between chains."""
    inputs, arms = prompts(3, 40, (0, 3, 5)), "+".join(text for text in ARMS[1:3] if text)
    strategy = UCBSpec(arms=f"{arms}+std:budget=16:draft_length=3", carry=False)
    plain = [decoded(llama, "ar", inputs, **options).sequences for options in ({}, {"do_sample": True, "seed": 3})]
    for choose in (lambda t: t % 8, lambda t: t // 3 % 8, lambda t: (3 * t + t // 8) % 8):
        scripted(monkeypatch, choose)
        for tokens, options in zip(plain, ({}, {"do_sample": True, "seed": 3}), strict=True):
            ours = decoded(llama, strategy, inputs, **options)
            assert torch.equal(ours.sequences, tokens)
            assert min(list(ours.stats.arms.values())[:4]) > 0


@pytest.mark.parametrize(
    "decoder", ["ucb-spec", "exp3-spec", "ucb-spec:arms=eagle+eagle:draft_length=2+sjd+hybrid:window=6"]
)
def test_pictures_are_plain_ars_in_batches_and_queues(decoder: str):
    for pipe, inputs in ((text_pipeline(), {"prompt": PROMPTS}), (class_pipeline(), {"class_labels": [0, 1, 2, 3]})):
        pipe = drafting(pipe)
        plain = codes(pipe, **inputs, decoder="ar")
        for size in (None, 2):
            assert torch.equal(codes(pipe, **inputs, decoder=decoder, batch_size=size), plain)


def test_an_arm_shares_a_batch_with_other_strategies():
    pipe = hushed(text_pipeline())
    decoders = ["ucb-spec:arms=ar+sjd:window=8", "sjd:window=4", "ar", "ucb-spec:arms=ar+sjd:window=8"]
    assert torch.equal(codes(pipe, PROMPTS, decoder=decoders), codes(pipe, PROMPTS, decoder="ar"))


# ---------------------------------------------------------------- what a round costs


def test_the_safety_arm_takes_passes_of_one_token(llama, monkeypatch):
    scripted(monkeypatch, lambda t: 0 if t % 3 else 1)
    stats = decoded(llama, UCBSpec(arms="prompt-lookup:draft_length=7"), prompts(2)).stats
    assert list(stats.arms) == ["ar", "prompt-lookup:draft_length=7"], "it is there without being named"
    assert stats.pass_shapes == {1: stats.arms["ar"], 8: stats.arms["prompt-lookup:draft_length=7"]}
    assert stats.pass_tokens == 8 and stats.as_dict()["arms"] == stats.arms
    stats = decoded(llama, UCBSpec(arms="sjd:window=4", pass_tokens=6), prompts(2)).stats
    assert list(stats.pass_shapes) == [6] and stats.pass_tokens == 6


def test_arms_of_one_drafter_share_it(llama):
    """Three lengths of std are one draft cache; a budget of its own is another one; a tree is no chain."""
    noise = CounterNoise([0], [0])
    setting = Setting(1, 8, 0, Grammar(8, 48), noise, torch.device("cpu"), laws=object(), costs=PassCosts(1e3, 1.0, 8, 1000))  # type: ignore[arg-type]
    arms = build_arms(parse_arms(f"ar+{STD}+std:budget=500+prompt-lookup+prompt-lookup:draft_length=2"), setting)
    assert len({id(arm.parts.drafter) for arm in arms}) == 4
    assert arms[1].parts is arms[2].parts is arms[3].parts and arms[5].parts is arms[6].parts
    assert [arm.window() for arm in arms] == [1, 4, 6, 10, 10, 9, 3] == [arm.width() for arm in arms]
    assert [arm.facts.length for arm in arms] == [0, 3, 5, 9, 9, 8, 2]
    assert len({arm.facts.drafter for arm in arms[1:4]}) == 1 and arms[1].facts.drafter != arms[4].facts.drafter
    sparse = (1000 + 8 * 16) / (1000 + 8 * 1000)
    assert arms[1].facts.cost == pytest.approx(1 + 3 * sparse) and arms[6].facts.cost == arms[0].facts.cost == 1
    eagle = parse_arms("eagle:tree=2x1+eagle:tree=2x1:draft_length=2")
    assert len({id(arm.parts) for arm in build_arms(eagle, with_model(setting))}) == 2


def with_model(setting: Setting) -> Setting:
    class Model:
        def extend_tree(self, *args: Any) -> None: ...

    setting.draft_model = lambda window: Model()  # type: ignore[assignment, return-value]
    return setting


def test_gumbel_noise_is_made_once_whatever_the_windows(llama, monkeypatch):
    made = []
    fill = CounterNoise._fill
    monkeypatch.setattr(CounterNoise, "_fill", lambda self, *args: made.append(1) or fill(self, *args))
    scripted(monkeypatch, lambda t: t % 3)
    decoded(llama, UCBSpec(arms="sjd:window=3+sjd:window=9"), prompts(1), do_sample=True, seed=1, max_new_tokens=90)
    assert len(made) <= 1 + (90 + 9) // CounterNoise.AHEAD


# ---------------------------------------------------------------- choices


class Steady:
    """A clock that goes on by one whenever it is looked at."""

    now = 0.0

    def perf_counter(self) -> float:
        Steady.now += 1.0
        return Steady.now


class Wrong:
    """Guesses an id that the model never says, and takes its time."""

    needs_law = False

    def __init__(self, setting: Setting) -> None: ...

    def propose(self, step: Any) -> Draft:
        Steady.now += 10.0
        return Draft(torch.full_like(step.positions[:, 1:], 2))

    def observe(self, *args: Any) -> None: ...

    def join(self, *args: Any) -> None: ...


@pytest.fixture
def wrong():
    arsd.register_drafter("wrong")(Wrong)
    yield "speculative:drafter=wrong:window=8"
    del registry.DRAFTERS["wrong"]


@pytest.mark.parametrize(("strategy", "most"), [(UCBSpec, 0.1), (EXP3Spec, 0.42)])
def test_an_arm_that_is_always_wrong_is_abandoned(llama, monkeypatch, wrong: str, strategy: type, most: float):
    for module in ("loop", "arms"):
        monkeypatch.setattr(f"arsd.decoding.{module}.time", Steady())
    options = {"suppress_tokens": [2], "max_new_tokens": 150}
    stats = decoded(llama, strategy(arms=wrong), prompts(1), **options).stats
    (right, rounds), (_, lost) = stats.arms.items()
    assert right == "ar" and rounds + lost == 150 and lost < most * 150, stats.arms


class Mad:
    """A clock that no two runs agree on."""

    def __init__(self, seed: int) -> None:
        self.noise, self.now = torch.Generator().manual_seed(seed), 0.0

    def perf_counter(self) -> float:
        self.now += float(torch.rand((), generator=self.noise)) ** 6
        return self.now


@pytest.mark.parametrize("strategy", [UCBSpec, EXP3Spec])
def test_in_reproducible_mode_the_passes_are_the_same_in_every_run(llama, monkeypatch, strategy: type):
    """Under clocks that disagree, and with the same object again; without the mode the same calls differ."""
    inputs, options = prompts(2, 40), {"do_sample": True, "seed": 4, "max_new_tokens": 60}

    def shapes(both: Any, seed: int) -> list[int]:
        clock, widths = Mad(seed), []
        with monkeypatch.context() as patch:
            patch.setattr("arsd.decoding.loop.time", clock)
            patch.setattr("arsd.decoding.arms.time", clock)
            patch.setattr("arsd.decoding.stats.DecodeStats.add_pass", lambda self, done, width: widths.append(width))
            decoded(llama, both, inputs, **options)
        return widths

    for arms in (None, ARMS[2], ARMS[3]):
        same, free = strategy(arms=arms, reproducible=True), strategy(arms=arms, carry=False)
        first = shapes(same, 1)
        assert len(set(first)) > 1 and shapes(same, 2) == first == shapes(strategy(arms=arms, reproducible=True), 3)
        assert len({tuple(shapes(free, seed)) for seed in (1, 2, 3)}) > 1, "the clock would have been seen"


def test_the_draws_of_exp3_belong_to_the_seed_of_the_call(llama):
    """Not to torch's generator, which is left alone."""
    inputs, state = prompts(1, 40), torch.get_rng_state()

    def arms(seed: int) -> dict[str, int]:
        options = {"do_sample": True, "seed": seed, "max_new_tokens": 40}
        return decoded(llama, EXP3Spec(reproducible=True), inputs, **options).stats.arms

    assert len({tuple(arms(seed).values()) for seed in range(4)}) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_what_one_call_shows_the_next_one_knows(llama, monkeypatch):
    """The first round of every arm is not needed again; other objects, batches and reproducible calls begin anew."""
    inputs, firsts = prompts(1), []
    choose = bandit_strategies.UCBV.choose

    def watched(self: Any, draw: float) -> int:
        firsts.append(sum(not seen for seen in self.tally.seen))
        return choose(self, draw)

    monkeypatch.setattr(bandit_strategies.UCBV, "choose", watched)

    def unknown(strategy: UCBSpec, rows: int = 1) -> int:
        firsts.clear()
        stats = decoded(llama, strategy, prompts(rows) if rows > 1 else inputs).stats
        assert sum(stats.arms.values()) == stats.forward_passes, "pulls are those of this call"
        return firsts[0]

    carrying = UCBSpec(arms=ARMS[2], discount=0.5, fade=1.0)
    assert [unknown(carrying) for _ in range(2)] == [5, 0] and unknown(carrying, 2) == 5
    for fresh in (UCBSpec(arms=ARMS[2], carry=False), UCBSpec(arms=ARMS[2], reproducible=True)):
        assert [unknown(fresh) for _ in range(2)] == [5, 5]
    (tally,) = (t for kind, t in bandit_strategies._CARRIED[carrying].items() if kind[1] == 1)
    before = sum(tally.pulls)
    unknown(carrying)
    assert sum(tally.pulls) == pytest.approx(0.5 * before + len(firsts))


def test_threads_share_what_they_learn():
    strategy, inputs, model = UCBSpec(arms=ARMS[1]), prompts(1), tiny(num_key_value_heads=4)
    plain = decoded(model, "ar", inputs).sequences
    with ThreadPoolExecutor(3) as pool:
        outs = list(pool.map(lambda _: decoded(model, strategy, inputs), range(3)))
    assert all(torch.equal(out.sequences, plain) for out in outs)
    (tally,) = bandit_strategies._CARRIED[strategy].values()
    assert tally.drawn == sum(out.stats.forward_passes for out in outs)


# ---------------------------------------------------------------- arms that sat out


@pytest.mark.parametrize("arm", ["layer-skip:skip=0.0:draft_length=4:search=false", "std:budget=all:draft_length=4"])
def test_a_drafter_of_the_targets_weights_comes_late_and_is_always_right(llama, monkeypatch, arm: str):
    """Plain AR has the first rounds, and some in between."""
    scripted(monkeypatch, lambda t: int(t >= 10 and t not in (12, 13, 14)))
    stats = decoded(llama, UCBSpec(arms=arm), prompts(1, 40), max_new_tokens=13 + 5 * 6).stats
    assert stats.accepted_lengths == {1: 13, 5: 6}


def test_a_small_model_reads_what_it_missed(monkeypatch):
    """The draft model is the target itself: whenever it comes, all of its guesses are taken, in a queue too."""
    pipe = drafting(text_pipeline())
    pipe.drafter = pipe.transformer
    scripted(monkeypatch, lambda t: int(t % 13 in (8, 12)))
    for size in (None, 3):
        out = pipe(
            PROMPTS,
            generator=seeded(0),
            decoder="ucb-spec:arms=eagle:draft_length=3",
            batch_size=size,
            output_type="latent",
            trace=True,
        )
        widths = [len(round_.counts) and max(round_.counts) for round_ in out.trace]
        late = [c for r in out.trace if r.positions.shape[1] == 4 for c, p in zip(r.counts, r.positions[:, 0], strict=True)
                if p <= TOKENS - 4]  # fmt: skip
        assert 1 in widths and late and set(late) <= {0, 4}, late


# ---------------------------------------------------------------- options


def test_arms_are_texts_strategies_or_lists_and_survive_being_saved(tmp_path):
    text = "ar+speculative:drafter=jacobi:init=left:window=4+sjd:window=8"
    assert [str(arm) for arm in parse_arms(text)] == ["ar", "speculative:drafter=jacobi:init=left,window=4", "sjd:window=8"]
    listed = UCBSpec(arms=[arsd.Autoregressive(), "speculative:drafter=jacobi:init=left,window=4", arsd.SJD(window=8)])
    typed = arsd.parse_strategy(f"ucb-spec:arms={text},scale=0.5")
    assert listed.config["arms"] == typed.config["arms"] == text and str(typed) == f"ucb-spec:arms={text},scale=0.5"
    assert arms_text(arsd.SJD(window=4, init="left")) == "sjd:window=4:init=left"
    typed.save_pretrained(tmp_path)
    loaded = UCBSpec.from_pretrained(tmp_path)
    assert type(loaded) is UCBSpec and str(loaded) == str(typed)
    assert json.loads((tmp_path / "decoder_config.json").read_text())["arms"] == text
    assert str(EXP3Spec()) == "exp3-spec" and EXP3Spec().lossless and EXP3Spec().seed_exact


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"arms": "ar+sjd:coupling=maximal"}, "not seed-exact"),
        ({"arms": "cool-sd"}, "not seed-exact"),
        ({"arms": "ar+ucb-spec"}, "arms of its own"),
        ({"arms": "ar+nothing"}, "unknown decoder 'nothing'"),
        ({"arms": "sjd:windows=8"}, "no option 'windows=8'"),
        ({"arms": "sjd:window=8+sjd:window=8"}, "once"),
        ({"arms": [3]}, "must be a strategy"),
        ({"scale": 0}, "scale"),
        ({"discount": 0}, "discount"),
        ({"discount": 1.5}, "discount"),
        ({"fade": 0}, "fade"),
        ({"carry": "yes"}, "carry"),
        ({"reproducible": None}, "reproducible"),
        ({"pass_tokens": 0}, "pass_tokens"),
    ],
)
@pytest.mark.parametrize("strategy", [UCBSpec, EXP3Spec])
def test_options_that_make_no_sense_are_refused(strategy: type, options: dict[str, Any], says: str):
    with pytest.raises(StrategyError) as error:
        strategy(**options)
    one_clear_line(error.value, says)


def test_usual_arms_that_are_not_possible_are_left_out_and_named_ones_are_an_error(llama, monkeypatch):
    with pytest.raises(StrategyError) as error:
        hushed(text_pipeline())("red apple", decoder="ucb-spec:arms=eagle")
    one_clear_line(error.value, "no drafter")
    monkeypatch.setattr(bandit_strategies, "OF_TEXTS", ("eagle", "nothing"))
    with pytest.raises(StrategyError) as error:
        decoded(llama, UCBSpec(), prompts(1))
    one_clear_line(error.value, "no arm but ar")
    monkeypatch.setattr(bandit_strategies, "OF_TEXTS", ("eagle", "sjd:window=4"))
    assert list(decoded(llama, UCBSpec(), prompts(1)).stats.arms) == ["ar", "sjd:window=4"]
