"""Every figure that the docs state about the shipped model.

    python benchmarks/emoji128.py speed          # bars: passes, seconds, share outside passes (64 prompts, batch 1)
    python benchmarks/emoji128.py curves         # tokens per pass by window, coupling, guidance and temperature
    python benchmarks/emoji128.py sheets         # contact sheets, entropy, diversity
    python benchmarks/emoji128.py recall         # which training picture is the nearest one to a generated picture
    python benchmarks/emoji128.py tokens         # what entropy-constrained quantisation gives and costs

Each prints a table and writes what it measured, with the hash of the weights, to benchmarks/results/. `recall` and `tokens`
need the pictures: `arsd train data`.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import arsd
from arsd.bench import run_bench
from arsd.cli.bench import bench_table
from arsd.cli.common import quiet, table
from arsd.devices import resolve_dtype
from arsd.metrics import diversity, mean_entropy
from arsd.pipelines.auto import find_model
from arsd.provenance import model_hash
from arsd.sheets import contact_sheet
from arsd.training.data import EmojiData
from arsd.training.target import RATE, quantise
from arsd.training.vq import to_tensor

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "images"
COUPLINGS = ("gumbel", "maximal", "gumbel-rejection", "independent")


def prompts(name: str) -> list[str]:
    return (HERE / "prompts" / f"{name}.txt").read_text(encoding="utf-8").split("\n")[:-1]


def load(model: str, dtype: torch.dtype) -> tuple[Any, str]:
    with quiet():
        pipe = arsd.AutoARPipeline.from_pretrained(model, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe, model_hash(find_model(model))


def machine() -> str:
    kind = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{kind}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def keep(name: str, report: dict[str, Any]) -> None:
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


def speed(arguments: argparse.Namespace) -> None:
    """Plain AR (one-token passes) against SJD, interleaved, batch 1."""
    pipe, weights = load(arguments.model, resolve_dtype(arguments.dtype))
    decoders = ["ar", *(f"sjd:window={w}" for w in (8, 12, 16, 24, 32, 48, 64))]
    decoders += [f"sjd:window={w},coupling=independent" for w in (8, 12, 16, 24, 32, 48, 64)]
    strategies = [arsd.parse_strategy(text) for text in decoders]
    report = run_bench(
        pipe, strategies, prompts("bench64")[: arguments.prompts], check=arguments.check, top_k=arguments.top_k
    )
    report = {"machine": machine(), "model_hash": weights, **report}
    keep("speed", report)
    print(f"{machine()}, {report['dtype']}, batch 1, {report['prompts']} prompts, guidance {report['guidance_scale']}\n")
    print(bench_table(report["rows"]))


def curves(arguments: argparse.Namespace) -> None:
    """Passes only, so batches and a loaded machine do no harm."""
    pipe, weights = load(arguments.model, resolve_dtype(arguments.dtype))
    chosen, rows = prompts("bench64")[: arguments.prompts], []

    def run(decoder: str, **sampling: Any) -> Any:
        generators = [torch.Generator().manual_seed(i) for i in range(len(chosen))]
        return pipe(chosen, decoder=decoder, generator=generators, output_type="latent", progress=False, **sampling)

    def measure(decoder: str, **sampling: Any) -> float:
        return float(run(decoder, **sampling).stats.tokens_per_pass)

    windows = (4, 8, 16, 32, 64)
    for coupling in COUPLINGS:
        rows.append([coupling, *(f"{measure(f'sjd:window={w},coupling={coupling}'):.2f}" for w in windows)])
    print(table(["coupling \\ window", *map(str, windows)], rows))
    more = []
    for scale in (1.0, 1.5, 2.0, 3.0, 5.0):
        for temperature in (0.8, 1.0, 1.2, 1.5):
            sampling = {"guidance_scale": scale, "temperature": temperature}
            coupled = run("sjd:window=32", log_probs=True, **sampling)
            ours, theirs = coupled.stats.tokens_per_pass, measure("sjd:window=32,coupling=independent", **sampling)
            same = float(coupled.log_probs.exp().mean())  # the tokens are draws from p, so this is the mean of sum p^2
            figures = (mean_entropy(coupled.entropies), same, ours, theirs, ours / theirs)
            more.append([scale, temperature, *(f"{v:.2f}" for v in figures)])
    head = ["guidance", "temperature", "bits per token", "two draws agree", "gumbel", "independent", "ratio"]
    print("\n" + table(head, more))
    inits = [[init, f"{measure(f'sjd:window=16,init={init}'):.2f}"] for init in ("uniform", "random", "left", "above")]
    print("\n" + table(["init", "tokens/pass, window 16"], inits))
    keep("curves", {"model_hash": weights, "windows": windows, "couplings": rows, "sampling": more, "inits": inits})


def sheets(arguments: argparse.Namespace) -> None:
    """One seed per prompt, none chosen."""
    pipe, weights = load(arguments.model, torch.float32)
    DOCS.mkdir(parents=True, exist_ok=True)
    figures = {"model_hash": weights}
    for name in ("training48", "heldout24"):
        chosen = prompts(name)
        out = pipe(chosen, generator=torch.Generator().manual_seed(1), log_probs=True, progress=False)
        contact_sheet(out.images, chosen, columns=8).save(DOCS / f"{name}.png", optimize=True)
        figures[f"{name} entropy, bits per token"] = round(mean_entropy(out.entropies), 3)
        spread = []
        for prompt in chosen[:8]:
            several = pipe(
                prompt, num_images_per_prompt=4, output_type="np", generator=torch.Generator().manual_seed(2), progress=False
            )
            spread.append(diversity(several.tokens, several.images))
        for key in ("tokens", "pixels"):
            figures[f"{name} diversity, {key}"] = round(sum(s[key] for s in spread) / len(spread), 3)
    keep("sheets", figures)
    print(json.dumps(figures, indent=1))


@torch.no_grad()
def recall(arguments: argparse.Namespace) -> None:
    """Whether the picture of a training prompt is nearest to its own original, among all training pictures, at 32 x 32."""
    pipe, weights = load(arguments.model, torch.float32)
    data = EmojiData.load(arguments.data).subset(False)
    names, chosen = [captions[0] for captions in data.captions], prompts("training48")
    originals = F.avg_pool2d(to_tensor(data.images), 4).flatten(1)
    own = torch.tensor([names.index(prompt) for prompt in chosen])
    rows, figures = [], {"model_hash": weights, "pictures": len(names)}
    for scale in (1.0, 1.25, 1.5, 2.0, 3.0, 5.0):
        generator = torch.Generator().manual_seed(1)
        out = pipe(chosen, guidance_scale=scale, generator=generator, log_probs=True, output_type="pt", progress=False)
        drawn = F.avg_pool2d(out.images.float() * 2 - 1, 4).flatten(1)
        distances = torch.cdist(drawn, originals)
        rank = (distances < distances.gather(1, own[:, None])).sum(1)
        psnr = -10 * ((drawn - originals[own]) / 2).square().mean(1).log10()
        among = [float((rank < n).float().mean()) for n in (1, 5, 50)]
        values = (*among, float(psnr.mean()), mean_entropy(out.entropies), out.stats.tokens_per_pass)
        figures[f"guidance {scale}"] = [round(v, 3) for v in values]
        rows.append([scale, *(f"{share:.0%}" for share in among), *(f"{v:.2f}" for v in values[3:])])
    keep("recall", figures)
    head = ["guidance", "nearest", "among 5", "among 50", "PSNR at 32 x 32, dB", "bits per token", "tokens per pass"]
    print(f"{len(chosen)} prompts, {len(names)} pictures\n\n{table(head, rows)}")


@torch.no_grad()
def tokens(arguments: argparse.Namespace) -> None:
    """Nearest codes against the entropy-constrained ones that the model is trained on, pictures of the data set."""
    pipe, weights = load(arguments.model, torch.float32)
    vq, codebook = pipe.vq, pipe.vq.codebook
    data = EmojiData.load(arguments.data)
    train, test = (to_tensor(data.subset(held_out).images) for held_out in (False, True))
    latents = torch.cat([vq.latents(part) for part in train.split(32)])
    plain = torch.cat([vq.latents(part) for part in test.split(32)])
    white = F.avg_pool2d((train > 0.99).all(1, keepdim=True).float(), vq.downsample_factor).flatten() == 1
    ids = {rate: quantise(latents.flatten(0, 2), codebook, rate) for rate in (0.0, RATE)}
    rows, figures = [], {"model_hash": weights, "share of white patches": float(white.float().mean())}
    for rate, chosen in ids.items():
        counts = torch.bincount(chosen, minlength=len(codebook)).float()
        coded = quantise(plain.flatten(0, 2), codebook, rate, counts).view(plain.shape[:3])
        pixels = torch.cat([vq.decode(part).clamp(-1, 1) for part in coded.split(32)])
        psnr = -10 * ((pixels - test) / 2).square().flatten(1).mean(1).log10()
        on_white = torch.bincount(chosen[white], minlength=len(codebook)).float()
        names = ("entropy, nats", "codes on white", "entropy on white", "held-out PSNR, dB")
        values = (nats(counts), int((on_white > 0).sum()), nats(on_white), float(psnr.mean()))
        figures[f"rate {rate}"] = dict(zip(names, values, strict=True))
        rows.append([rate, *(f"{v:.2f}" if isinstance(v, float) else v for v in values)])
    keep("tokens", figures)
    print(f"{figures['share of white patches']:.3f} of all patches are white\n\n{table(['rate', *names], rows)}")


def nats(counts: torch.Tensor) -> float:
    """Entropy of a histogram."""
    return float(torch.distributions.Categorical(counts).entropy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"speed": speed, "curves": curves, "sheets": sheets, "recall": recall, "tokens": tokens}
    parser.add_argument("what", choices=list(commands))
    parser.add_argument("--model", default="emoji-128")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="for `recall` and `tokens`")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--check", action="store_true", help="for `speed`: also compare the tokens with plain AR's")
    parser.add_argument("--top-k", type=int, help="default: the model's own")
    arguments = parser.parse_args()
    commands[arguments.what](arguments)


if __name__ == "__main__":
    main()
