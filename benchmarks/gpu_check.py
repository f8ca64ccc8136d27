"""Does the machine's accelerator keep the promises? Seed-exact equality per dtype, near-ties, cost of a pass by its length.

Run: python benchmarks/gpu_check.py [--device cuda] [--full]
Random weights: the small model has emoji-128's size, ``--full`` adds one of 7B size (LlamaGen "7B" layout, 24 x 24 tokens).
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from models import LARGE, SMALL, make_model

import arsd
from arsd.cli.common import table
from arsd.decoding import CounterNoise, DecodeRequest, Grammar, LawConfig, Laws, Setting, decode
from arsd.models.target import DecoderTarget


def tokens_of(model: arsd.LlamaGenTransformer, decoder: str, batch: int, tokens: int, guidance: float = 2.0) -> tuple:
    device = next(model.parameters()).device
    strategy = arsd.parse_strategy(decoder)
    grammar = Grammar(tokens, model.config["vocab_size"], device=device)
    noise = CounterNoise([7] * batch, list(range(batch)), device)
    parts = strategy.build(Setting(batch, tokens, model.config["grid"], grammar, noise, device))
    labels = torch.arange(batch, device=device) % 10
    null = torch.full_like(labels, 10)
    with torch.no_grad():
        condition = torch.stack([model.embed_classes(labels), model.embed_classes(null)])
    lm = model.lm
    target = DecoderTarget(lm.model, lm.lm_head, lm.model.embed_tokens, condition, tokens, parts.pass_tokens)
    result = decode(target, parts, Laws(LawConfig(guidance), grammar), noise, DecodeRequest(tokens), batch)
    return result.tokens.cpu(), result.stats


def check_exactness(device: str) -> bool:
    rows, ok = [], True
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = make_model(SMALL, device, dtype)
        for width in (8, 16):
            plain, stats = tokens_of(model, f"ar:pass_tokens={width}", 4, 256)
            for window in (width // 2, width):
                fast, figures = tokens_of(model, f"sjd:window={window},pass_tokens={width}", 4, 256)
                same = int((plain == fast).all(1).sum())
                ok &= same == 4 or dtype != torch.float64
                rate = f"{figures.tokens_per_pass:.2f}"
                rows.append([str(dtype)[6:], width, window, f"{same} of 4", sum(stats.near_ties), rate])
    print(table(["dtype", "pass_tokens", "window", "pictures equal to ar@W", "near-ties", "tokens/pass"], rows))
    return ok


def pass_costs(size: dict[str, int], device: str, dtype: torch.dtype, batch: int) -> None:
    model = make_model(size, device, dtype)
    bytes_read = sum(p.numel() * p.element_size() for p in model.lm.model.layers.parameters())
    rows, base = [], 0.0
    for width in (1, 4, 8, 16, 32, 64):
        steps = 24
        tokens_of(model, f"ar:pass_tokens={width}", batch, 4)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        _, stats = tokens_of(model, f"ar:pass_tokens={width}", batch, steps)
        total = (time.perf_counter() - start) / steps
        cost = stats.seconds["forward"] / steps
        base = base or cost
        speed = f"{bytes_read / cost / 1e9:.0f}"
        rows.append([width, f"{1e3 * cost:.2f}", f"{cost / base:.2f}", f"{1 - cost / total:.1%}", speed])
    size_g = sum(p.numel() for p in model.parameters()) / 1e9
    print(f"\n{size_g:.2f} G parameters, {str(dtype)[6:]}, batch {batch} with guidance")
    print(table(["tokens in the pass", "ms", "against 1", "outside the pass", "weights GB/s"], rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--full", action="store_true", help="also a model of 7B size in bfloat16")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu runs the same checks on the CPU", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    print(f"{name}, torch {torch.__version__}\n")
    ok = check_exactness(arguments.device)
    small = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    pass_costs(SMALL, arguments.device, small, 1)
    if arguments.full:
        for batch in (1, 4):
            pass_costs(LARGE, arguments.device, torch.bfloat16, batch)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
