"""Honest outside baselines on the same weights: transformers' ``generate``, and SJD as its authors released it.

    python benchmarks/rivals.py generate                        # emoji-128 on the CPU, float32, batch 1 and 8
    python benchmarks/rivals.py generate --model 7b --device cuda --batch 1 --compiled --tokens 144
    python benchmarks/rivals.py released --window 16            # plain AR, this engine's SJD, the released rendering
    python benchmarks/rivals.py released --model 775m --device cuda --tokens 128

Every rival gets the same ready-made condition, dtype and machine. They take turns picture by picture, so that a drift of the
machine hits all of them alike; a ratio is that of two neighbours in time, with the 95 % interval of the mean log ratio.
Seconds are those of a whole call, in the rivals' favour: this engine's also embeds the condition and checks its arguments.
``--tokens`` decodes only the first tokens of each picture, in caches of full size. Random weights (775m, 7b) tell what a
pass costs, not how many tokens it gives.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from models import load
from rival_decoders import hf_generate, released_sjd
from timing import in_turns, memory_of, now, paired_ratio, spread
from torch import Tensor

from arsd.cli.common import table
from arsd.decoding import LawConfig
from arsd.devices import resolve_device, resolve_dtype

Contender = Callable[[int], dict[str, Any]]
PROMPTS = Path(__file__).parent / "prompts" / "bench64.txt"


def inputs(pipe: Any, first: int, batch: int) -> dict[str, Any]:
    """What a call of the pipeline needs, text encoded: ``batch`` prompts (or classes) from the ``first`` on."""
    if pipe.transformer.config["condition"] == "class":
        classes = pipe.transformer.config["num_classes"]
        return {"class_labels": [(first + i) % classes for i in range(batch)]}
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    features, mask = pipe.encode_prompt([lines[(first + i) % len(lines)] for i in range(batch)])
    return {"prompt_embeds": features, "prompt_attention_mask": mask}


def condition_of(pipe: Any, config: LawConfig, given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Condition [S, B, P, D] and padding [S, B, P] of such inputs."""
    transformer, streams = pipe.transformer, 1 if config.guidance_scale == 1 else 2
    if "class_labels" in given:
        labels = torch.tensor(given["class_labels"], device=transformer.device)
        null = torch.full_like(labels, transformer.config["num_classes"])
        return torch.stack([transformer.embed_classes(x) for x in (labels, null)][:streams]), None
    mask = given["prompt_attention_mask"].to(transformer.device)
    rows = transformer.embed_captions(given["prompt_embeds"].to(transformer.device, transformer.dtype), mask)
    return torch.stack([rows, transformer.embed_null_caption(len(rows))][:streams]), (mask == 0).expand(streams, -1, -1)


class Contest:
    """One model, one batch size, and the same pictures for everybody who takes part.

    A contender is called with the number of the picture (or batch) and returns seconds and, where it has them, its figures.

    Args:
        arguments: of the command line.
        batch: rows per call.
    """

    def __init__(self, arguments: argparse.Namespace, pipe: Any, batch: int) -> None:
        self.pipe, self.batch, self.device = pipe, batch, pipe.device
        self.sampling = {"guidance_scale": arguments.guidance_scale, "top_k": arguments.top_k}
        self.config = pipe.law_config(self.sampling)
        self.total = pipe.transformer.num_tokens
        self.tokens = min(arguments.tokens or self.total, self.total)
        with torch.no_grad():
            self.given = [inputs(pipe, k * batch, batch) for k in range(arguments.repeats)]
            self.conditions = [condition_of(pipe, self.config, given) for given in self.given]

    def engine(self, decoder: str) -> Contender:
        """This engine: the whole call of the pipeline but for text encoder and pixels."""

        def stop(pipe: Any, step: int, done: int, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = done >= self.tokens * self.batch
            return tensors

        def call(number: int) -> dict[str, Any]:
            start = now(self.device)
            out = self.pipe(
                **self.given[number],
                **self.sampling,
                decoder=decoder,
                generator=torch.Generator().manual_seed(number),
                output_type="latent",
                progress=False,
                callback_on_step_end=stop if self.tokens < self.total else None,
            )
            seconds, stats = now(self.device) - start, out.stats
            share = stats.outside_forward_share
            tokens = sum(stats.tokens) / self.batch
            inside = stats.total_seconds
            return {"seconds": seconds, "decode": inside, "passes": stats.forward_passes, "tokens": tokens, "outside": share}

        return call

    def generate(self, cache: str, compiled: bool = False) -> Contender:
        """transformers' ``generate``."""

        def call(number: int) -> dict[str, Any]:
            _, seconds = hf_generate(
                self.pipe.transformer,
                *self.conditions[number],
                self.tokens,
                self.config,
                cache,
                number,
                compiled,
                self.total,
            )
            return {"seconds": seconds, "decode": seconds, "passes": self.tokens, "tokens": self.tokens}

        return call

    def released(self, window: int) -> Contender:
        """SJD as released."""

        def call(number: int) -> dict[str, Any]:
            parts = {"forward": 0.0}
            _, passes, seconds = released_sjd(
                self.pipe.transformer, *self.conditions[number], self.tokens, self.config, window, number, parts
            )
            outside = 1 - parts["forward"] / seconds
            return {"seconds": seconds, "decode": seconds, "passes": passes, "tokens": self.tokens, "outside": outside}

        return call

    def run(self, contenders: dict[str, Contender], arguments: argparse.Namespace) -> list[dict[str, Any]]:
        """Everybody in turns; one row each, compared with the first."""
        measured = in_turns(contenders, arguments.repeats, arguments.quiet)
        rows = []
        for name, calls in measured.items():
            figures = {key: [call[key] for call in calls if key in call] for key in ("seconds", "decode", "outside")}
            passes, tokens = sum(c["passes"] for c in calls), sum(c["tokens"] for c in calls)
            per_token = [c["seconds"] / c["tokens"] for c in calls]
            base = [c["seconds"] / c["tokens"] for c in next(iter(measured.values()))]
            rows.append(
                {
                    "contender": name,
                    **figures,
                    "batch": self.batch,
                    "passes": passes / arguments.repeats,
                    "tokens_per_pass": tokens / passes,
                    "tokens_per_second": self.batch / spread(per_token)[0],
                    "seconds_per_pass": sum(figures["seconds"]) / passes,
                    "ratio": paired_ratio(per_token, base),
                    "memory": memory_of(lambda call=contenders[name]: call(0), self.device),
                }
            )
        return rows


def generate(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Plain AR of this engine against ``generate`` with each of its caches."""
    pipe = open_pipeline(arguments)
    rows: list[dict[str, Any]] = []
    for batch in arguments.batch:
        contest = Contest(arguments, pipe, batch)
        contenders = {"ar": contest.engine("ar")}
        contenders |= {f"generate, {cache}": contest.generate(cache) for cache in ("dynamic", "static")}
        if arguments.compiled:
            contenders["generate, static, compiled"] = contest.generate("static", True)
        rows += contest.run(contenders, arguments)
    head = ["batch", "", "seconds", "25-75 %", "in the loop", "tokens/s", "times ar", "95 %", "peak MiB"]
    print(table(head, [generate_row(row) for row in rows]))
    return rows


def generate_row(row: dict[str, Any]) -> list[Any]:
    middle, low, high = spread(row["seconds"])
    loop = f"{spread(row['decode'])[0]:.3f}" if row["contender"] == "ar" else ""
    memory = "" if row["memory"] is None else f"{row['memory']:.0f}"
    pair = ratio_cells(row)
    head = [row["batch"], row["contender"], f"{middle:.3f}", f"{low:.3f}-{high:.3f}", loop]
    return [*head, f"{row['tokens_per_second']:.0f}", *pair, memory]


def ratio_cells(row: dict[str, Any]) -> list[str]:
    mean, low, high = row["ratio"]
    return [f"{mean:.3f}", f"{low:.3f}-{high:.3f}"]


def released(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Plain AR and SJD of this engine against SJD as released, one picture at a time."""
    pipe = open_pipeline(arguments)
    contest, window = Contest(arguments, pipe, 1), arguments.window
    names = ["ar", f"sjd:window={window},coupling=independent,init=random", f"sjd:window={window}"]
    contenders = {name: contest.engine(name) for name in names}
    contenders[f"released, window {window}"] = contest.released(window)
    rows = contest.run(contenders, arguments)
    head = ["", "passes", "tokens/pass", "seconds", "25-75 %", "ms/pass", "times ar", "95 %", "outside the pass"]
    print(table(head, [released_row(row) for row in rows]))
    return rows


def released_row(row: dict[str, Any]) -> list[Any]:
    middle, low, high = spread(row["seconds"])
    cells = [
        row["contender"],
        f"{row['passes']:.1f}",
        f"{row['tokens_per_pass']:.2f}",
        f"{middle:.3f}",
        f"{low:.3f}-{high:.3f}",
    ]
    return [*cells, f"{1e3 * row['seconds_per_pass']:.2f}", *ratio_cells(row), f"{spread(row['outside'])[0]:.0%}"]


def open_pipeline(arguments: argparse.Namespace) -> Any:
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.model}, {name}, {str(dtype)[6:]}, torch {torch.__version__}, transformers {transformers.__version__}")
    return load(arguments.model, device, dtype, arguments.grid)


def main(words: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"generate": generate, "released": released}
    parser.add_argument("what", choices=list(commands))
    parser.add_argument("--model", default="emoji-128", help="a pipeline; or small, 775m, 7b: random weights")
    parser.add_argument("--grid", type=int, help="tokens along one side, for random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 where it is fast, else float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="for `generate`")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each, every one with another picture")
    parser.add_argument("--quiet", type=float, default=1.0, help="repeat a call if others took this share of the cores")
    parser.add_argument("--tokens", type=int, help="tokens to decode; default: all of a picture")
    parser.add_argument("--window", type=int, default=16, help="for `released`")
    parser.add_argument("--guidance-scale", type=float, help="default: the model's own")
    parser.add_argument("--top-k", type=int, help="default: the model's own")
    parser.add_argument("--compiled", action="store_true", help="also `generate` with its compiled pass")
    arguments = parser.parse_args(words)
    return commands[arguments.what](arguments)


if __name__ == "__main__":
    main()
