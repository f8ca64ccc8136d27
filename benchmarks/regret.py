"""What a controller loses against the best arm: recorded runs of every arm, replayed under every controller.

    python benchmarks/regret.py                       # emoji-video-chat on its held-out clips (arsd train clips)
    python benchmarks/regret.py --model FOLDER        # any causal model of transformers, on the files of --texts
    python benchmarks/regret.py --replay              # no model: the recordings of the last run once more

Every arm decodes every prompt alone, greedily. All arms give the same tokens, so one fact for each token tells what an arm
does from any place of a text on: whether its guess of that token was right there. A round of arm i that begins at token n
gets Y = 1 + min(L, right guesses from n on); a fixed arm that is replayed so takes exactly its recorded rounds. A round is
charged the median seconds of its arm, while controllers see the seconds of a recorded round of it, drawn anew.

Regret is seconds beyond those of the best single arm for all prompts, in passes of plain AR, over random orders of the
prompts; `each` is what the best arm of every prompt by itself would save. The same is done in a world where nothing pays:
all rounds but those of plain AR take so long that no arm is above 0.85x. A replay knows nothing of what arms do for each
other (token-recycling learns less where it has fewer rounds), so at the end some prompts are decoded under the controllers
themselves, in turns. Writes benchmarks/results/regret.json and docs/images/regret.png. Options: --arms, --prompts,
--tokens, --orders, --real, --quick.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from arsd import generate_fn
from arsd.cli.common import table
from arsd.decoding import DecodingStrategy, EXP3Spec, UCBSpec
from arsd.decoding.arms import arms_text, parse_arms
from arsd.decoding.bandit_strategies import DISCOUNT, FADE, RISK, SCALE
from arsd.decoding.bandits import EXP3, UCB, UCBV, ArmFacts, Bandit, Tally
from arsd.decoding.types import Outcome, Parts
from arsd.devices import device_kind, resolve_dtype

HERE = Path(__file__).parent
CLIPS, VIDEO = HERE.parent / "runs" / "clips" / "held-out", "emoji-video-chat"
USUAL = "ar+prompt-lookup+token-recycling+std:budget=64:draft_length=3+std:budget=64:draft_length=5+std:budget=64"
Call = Callable[[DecodingStrategy], tuple[torch.Tensor, Any]]  # decodes a prompt: tokens and figures


class Recorded(DecodingStrategy):
    """A strategy that writes down what its rounds did."""

    def __init__(self, strategy: DecodingStrategy) -> None:
        self.strategy, self.right, self.rounds = strategy, "", []
        self.facts: list[ArmFacts] = []

    def build(self, setting: Any) -> Parts:
        """See :class:`arsd.decoding.DecodingStrategy`."""
        parts = self.strategy.build(setting)
        self.facts = getattr(getattr(parts.controller, "bandit", None), "facts", [])
        if not self.facts:
            parts.drafter = Recorder(parts.drafter, self)
            parts.controller = Timer(parts.controller, parts.drafter)
        return parts


class Recorder:
    """A drafter whose guesses are judged aloud: + right, - wrong."""

    def __init__(self, drafter: Any, to: Recorded) -> None:
        self.drafter, self.to, self.tally, self.drafting = drafter, to, Tally(1), 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)

    def propose(self, step: Any) -> Any:
        """Timed."""
        began = time.perf_counter()
        draft = self.drafter.propose(step)
        self.drafting = time.perf_counter() - began
        return draft

    def observe(self, step: Any, law: Any, verdict: Any, lengths: Any) -> None:
        """Of the first row; a token that was no guess counts as one that would have been right."""
        outcomes = verdict.outcome[0, : int(verdict.count[0])].tolist()
        self.to.right += "".join("-" if outcome == Outcome.RESAMPLED else "+" for outcome in outcomes)
        self.drafter.observe(step, law, verdict, lengths)


class Timer:
    """A controller that keeps the seconds of every round."""

    def __init__(self, controller: Any, drafter: Recorder) -> None:
        self.controller, self.drafter = controller, drafter

    def window(self) -> int:
        """The arm's own."""
        return int(self.controller.window())

    def observe(self, counts: list[int], seconds: float) -> None:
        """Write the round down."""
        drafting = self.drafter.drafting
        self.drafter.to.rounds.append([counts[0], round(1e6 * drafting), round(1e6 * (seconds - drafting))])
        self.controller.observe(counts, seconds)


# ---------------------------------------------------------------- recording


def video_calls(count: int, tokens: int) -> tuple[Any, list[Call]]:
    """The shipped Video-LLM and its held-out clips."""
    from arsd.pipelines.video_llm import VideoLLMPipeline

    pipe = VideoLLMPipeline.from_pretrained(VIDEO)
    clips = sorted(CLIPS.glob("*.webp"))
    random.Random(0).shuffle(clips)
    options = {"num_frames": 16, "max_new_tokens": tokens}

    def call(clip: Path) -> Call:
        def decode(strategy: DecodingStrategy) -> tuple[torch.Tensor, Any]:
            out = pipe(clip, decoder=strategy, **options)
            return out.tokens, out.stats

        return decode

    return pipe.model, [call(clip) for clip in clips[:count]]


def text_calls(folder: str | None, texts: list[Path], count: int, tokens: int) -> tuple[Any, list[Call]]:
    """A causal model on pieces of text; without a folder, a tiny one with random weights, which repeats itself."""
    if folder is None:
        torch.manual_seed(0)
        sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}
        config = transformers.LlamaConfig(**sizes)
        model: Any = transformers.LlamaForCausalLM(config).eval()
        for p in model.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=1.5 / p.shape[-1] ** 0.5)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=resolve_dtype("auto")).eval()
    words = None if folder is None else transformers.AutoTokenizer.from_pretrained(folder)
    paragraphs = [part for path in texts for part in path.read_text().split("\n\n") if len(part) > 200]
    random.Random(0).shuffle(paragraphs)

    def call(text: str) -> Call:
        ids = torch.tensor([list(text.encode())[:200]]) if words is None else words(text, return_tensors="pt").input_ids
        options = {"max_new_tokens": tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}

        def decode(strategy: DecodingStrategy) -> tuple[torch.Tensor, Any]:
            out = model.generate(ids, custom_generate=generate_fn(strategy), return_dict_in_generate=True, **options)
            return out.sequences[:, ids.shape[1] :], out.stats

        return decode

    return model, [call(text) for text in paragraphs[:count]]


def record(calls: list[Call], arms: list[DecodingStrategy]) -> dict[str, Any]:
    """What every arm did on every prompt, and what the cost model makes of the arms."""
    whole = Recorded(UCBSpec(arms=arms_text(arms)))
    calls[0](whole)
    for arm in arms:  # a first pass of every shape
        calls[0](arm)
    kept: list[dict[str, Any]] = []
    parted = 0
    for number, call in enumerate(calls):
        runs, tokens = {}, None
        for arm in arms:
            recorded = Recorded(arm)
            said = call(recorded)[0]
            if tokens is None:
                tokens = said
            elif not torch.equal(said, tokens):  # a near-tie in reduced precision: what follows is another text
                parted += 1
                break
            runs[str(arm)] = {"right": recorded.right, "rounds": recorded.rounds}
        if len(runs) == len(arms):
            kept.append(runs)
        print(f"prompt {number + 1} of {len(calls)}, left out at a near-tie: {parted}", flush=True)
    facts = [[fact.length, fact.cost, fact.drafter] for fact in whole.facts]
    return {"arms": [str(arm) for arm in arms], "facts": facts, "parted": parted, "prompts": kept}


def decoded(calls: list[Call], arms: list[DecodingStrategy], best: str) -> list[list[Any]]:
    """Rows of a table: prompts in turns under plain AR, the best arm and the controllers."""
    text = arms_text(arms)
    named = {
        "ar": parse_arms("ar")[0],
        best: next(arm for arm in arms if str(arm) == best),
        "ucb-spec": UCBSpec(arms=text),
        "ucb-spec, reproducible": UCBSpec(arms=text, reproducible=True),
        "exp3-spec": EXP3Spec(arms=text),
    }
    made: dict[str, list[float]] = {name: [0.0, 0.0, 0.0] for name in named}
    for call in calls:
        for name, strategy in named.items():
            stats = call(strategy)[1]
            seconds = stats.total_seconds - stats.seconds["prefill"]
            made[name] = [a + b for a, b in zip(made[name], (seconds, sum(stats.tokens), stats.forward_passes), strict=True)]
    unit = made["ar"][0] / made["ar"][1]
    return [[n, f"{t / p:.2f}", f"{1e3 * s / t:.2f}", f"{unit * t / s:.2f}x"] for n, (s, t, p) in made.items()]


# ---------------------------------------------------------------- replaying


class Uniform(Bandit):
    """Any arm."""

    draws = True

    def choose(self, draw: float = 0.0) -> int:
        """See :class:`Bandit`."""
        return int(draw * len(self.facts))


class Runs:
    """The recordings: tokens from every place of every text, and the seconds of each arm's rounds."""

    def __init__(self, recorded: dict[str, Any]) -> None:
        self.names = recorded["arms"]
        self.facts = [ArmFacts(int(length), cost, drafter) for length, cost, drafter in recorded["facts"]]
        prompts = recorded["prompts"]
        self.texts = [[self._tokens(runs[n]["right"], f.length) for n, f in zip(self.names, self.facts, strict=True)]
                      for runs in prompts]  # fmt: skip
        self.seconds = [
            [(draft / 1e6, rest / 1e6) for runs in prompts for _, draft, rest in runs[name]["rounds"]] for name in self.names
        ]
        typical = [np.median(np.array(pairs), 0) for pairs in self.seconds]
        self.typical = [float(draft + rest) for draft, rest in typical]

    @staticmethod
    def _tokens(right: str, length: int) -> list[int]:
        """Y of a round that begins at each token."""
        out, hits = [], 0
        for n in range(len(right) - 1, -1, -1):
            hits = hits + 1 if right[n] == "+" else 0
            out.append(min(min(hits, length) + 1, len(right) - n))
        return out[::-1]

    def fixed(self, arm: int, prompt: int) -> float:
        """Seconds of one arm alone."""
        tokens, n, spent = self.texts[prompt][arm], 0, 0.0
        while n < len(tokens):
            n, spent = n + tokens[n], spent + self.typical[arm]
        return spent

    def replay(
        self, make: Callable[[list[ArmFacts], Tally], Bandit], order: list[int], carry: bool, seed: int
    ) -> list[float]:
        """Seconds of every prompt in this order."""
        rng, tally, spent = random.Random(seed), Tally(len(self.names)), []
        for prompt in order:
            tally.discount(DISCOUNT)
            if not carry:
                tally = Tally(len(self.names), tally.warm)
            bandit, text, n = make(self.facts, tally), self.texts[prompt], 0
            spent.append(0.0)
            while n < len(text[0]):
                arm = bandit.choose(rng.random())
                tokens = text[arm][n]
                draft, rest = rng.choice(self.seconds[arm])
                bandit.learn(arm, [tokens], draft + rest, draft)
                spent[-1] += self.typical[arm]
                n += tokens
        return spent


def controllers() -> dict[str, tuple[Callable[[list[ArmFacts], Tally], Bandit], bool]]:
    """Name -> (bandit, whether it carries over)."""

    def ucb(clock: bool = True, risk: float | None = RISK) -> Any:
        return lambda facts, tally: UCBV(facts, tally, SCALE["ucb-spec"], FADE["ucb-spec"], clock, risk)

    def exp3(risk: float | None = RISK) -> Any:
        return lambda facts, tally: EXP3(facts, tally, SCALE["exp3-spec"], FADE["exp3-spec"], True, risk)

    return {
        "ucb-spec": (ucb(), True),
        "ucb-spec, no risk limit": (ucb(risk=None), True),
        "ucb-spec, no carry": (ucb(), False),
        "ucb-spec, reproducible": (ucb(clock=False), False),
        "UCBSpec as published": (lambda facts, tally: UCB(facts, tally), False),
        "exp3-spec": (exp3(), True),
        "EXP3Spec as published": (exp3(None), False),
        "uniform": (lambda facts, tally: Uniform(facts, tally), False),
    }


def where_nothing_pays(runs: Runs, most: float = 0.85) -> Runs:
    """The same texts, with rounds so slow that no arm but the first is above ``most`` of it."""
    slow, count = copy(runs), len(runs.texts)
    plain, *others = (sum(runs.fixed(arm, prompt) for prompt in range(count)) for arm in range(len(runs.names)))
    factors = [1.0, *(max(1.0, plain / spent / most) for spent in others)]
    slow.seconds = [[(k * a, k * b) for a, b in pairs] for k, pairs in zip(factors, runs.seconds, strict=True)]
    slow.typical = [k * typical for k, typical in zip(factors, runs.typical, strict=True)]
    return slow


def compare(runs: Runs, orders: int) -> dict[str, Any]:
    """Regret of every controller and every fixed arm, in passes of plain AR."""
    count, unit = len(runs.texts), runs.typical[0]
    alone = np.array([[runs.fixed(arm, prompt) for prompt in range(count)] for arm in range(len(runs.names))]) / unit
    best = int(alone.sum(1).argmin())
    shuffled = [random.Random(seed).sample(range(count), count) for seed in range(orders)]
    curves = {}
    for name, (make, carry) in controllers().items():
        lost = []
        for seed, order in enumerate(shuffled):
            spent = np.array(runs.replay(make, order, carry, seed)) / unit
            lost.append(np.cumsum(spent - alone[best, order]))
        curves[name] = np.array(lost)
    tokens = sum(len(text[0]) for text in runs.texts)
    rows = [{"name": name, "passes": float(spent), "regret": float(spent - alone[best].sum())}
            for name, spent in zip(runs.names, alone.sum(1), strict=True)]  # fmt: skip
    rows.append({"name": "each", "passes": float(alone.min(0).sum()), "regret": float((alone.min(0) - alone[best]).sum())})
    for name, lost in curves.items():
        end = lost[:, -1]
        row = {"name": name, "passes": float(alone[best].sum() + end.mean()), "regret": float(end.mean())}
        rows.append(row | {"spread": [float(x) for x in np.quantile(end, (0.05, 0.95))]})
    for row in rows:
        row["speedup"] = alone[0].sum() / row["passes"]
    return {"best": runs.names[best], "tokens": tokens, "unit_seconds": unit, "rows": rows, "curves": curves}


def plot(found: dict[str, Any], path: Path, title: str) -> None:
    """Cumulative regret over prompts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 4.6), dpi=110, layout="constrained")
    for name, lost in found["curves"].items():
        line = "--" if "published" in name else ":" if "no carry" in name else "-." if "limit" in name else "-"
        colour = {"u": "#1f77b4", "U": "#1f77b4", "e": "#d62728", "E": "#d62728"}[name[0]]
        colour = "#777777" if name == "uniform" else "#17becf" if "reproducible" in name else colour
        prompts = np.arange(1, lost.shape[1] + 1)
        axis.plot(prompts, lost.mean(0), line, color=colour, linewidth=1.4, label=name)
        axis.fill_between(prompts, *np.quantile(lost, (0.05, 0.95), axis=0), color=colour, alpha=0.06, linewidth=0)
    axis.axhline(0, color="#111111", linewidth=0.8)
    axis.set_xlabel("prompts")
    axis.set_ylabel(f"regret against {found['best']},\npasses of plain AR")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(title, fontsize=9)
    figure.savefig(path)
    plt.close(figure)


def record_all(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Call]]:
    """A new report with its recordings, and the prompts."""
    video = arguments.model in (None, VIDEO) and CLIPS.is_dir()
    folder = None if arguments.model in (None, "tiny") else arguments.model
    sizes = arguments.prompts, arguments.tokens
    model, calls = video_calls(*sizes) if video else text_calls(folder, arguments.texts, *sizes)
    report = {"model": VIDEO if video else folder or "tiny", "device": device_kind("cpu"), "torch": torch.__version__}
    report["dtype"] = str(model.dtype).removeprefix("torch.")
    report["recorded"] = record(calls, parse_arms(arguments.arms))
    return report, calls


def show(report: dict[str, Any], runs: Runs, found: dict[str, Any], slow: dict[str, Any]) -> None:
    """Print the tables."""
    rounds = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in zip(runs.names, runs.typical, strict=True))
    print(f"\n{report['model']}, {report['device']}, {report['dtype']}: {found['tokens']} tokens; ms of a round: {rounds}\n")
    cells = [
        [row["name"], f"{row['speedup']:.2f}x", f"{row['regret']:.0f}", f"{row['regret'] / found['tokens']:.3f}"]
        for row in found["rows"]
    ]
    print(table(["replayed", "against ar", f"regret against {found['best']}", "per token"], cells))
    cells = [[row["name"], f"{row['speedup']:.3f}x"] for row in slow["rows"] if row["name"] not in runs.names]
    print("\n" + table(["replayed where nothing pays", "against ar"], cells))
    if "real" in report:
        print("\n" + table(["decoded", "tokens per pass", "ms per token", "against ar"], report["real"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"folder of a causal model, or tiny; default {VIDEO} where its clips are, else tiny")
    parser.add_argument("--arms", default=USUAL)
    parser.add_argument("--texts", type=Path, nargs="+", default=sorted((HERE.parent / "docs").glob("*.md")))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--orders", type=int, default=40)
    parser.add_argument("--real", type=int, default=24, help="prompts that are decoded under the controllers")
    parser.add_argument("--quick", action="store_true", help="a few short texts")
    parser.add_argument("--replay", action="store_true", help="of the file --out, without a model")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "regret.json")
    parser.add_argument("--image", type=Path, default=HERE.parent / "docs" / "images" / "regret.png")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.prompts, arguments.tokens, arguments.orders, arguments.real = 4, 64, 4, 4
    report, calls = (json.loads(arguments.out.read_text()), []) if arguments.replay else record_all(arguments)
    report.pop("real", None)  # by what controllers were when it was decoded
    runs = Runs(report["recorded"])
    found, slow = (compare(world, arguments.orders) for world in (runs, where_nothing_pays(runs)))
    if calls:
        report["real"] = decoded(calls[: arguments.real], parse_arms(arguments.arms), found["best"])
    show(report, runs, found, slow)
    texts = f"{len(runs.texts)} prompts, {found['tokens']} tokens"
    plot(found, arguments.image, f"{report['model']}, {texts}; mean and 90 % of {arguments.orders} orders")
    report["found"] = {key: value for key, value in found.items() if key != "curves"}
    report["found"]["curves"] = {name: lost.mean(0).round(2).tolist() for name, lost in found["curves"].items()}
    report["where_nothing_pays"] = {key: value for key, value in slow.items() if key != "curves"}
    arguments.out.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
