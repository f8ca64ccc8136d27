"""A published checkpoint at its full size, with random weights: does it load without a second copy, what does a pass cost?

Writes Lumina-mGPT 7B (or fewer layers) or Janus-Pro 1B in the layout of the hub, loads it while it watches how much memory
is its own (anonymous, not pages of the file), and decodes the beginning of a picture with plain AR and SJD.

    python benchmarks/published_size.py --folder lumina-7b                      # 14 GB of disk, 20 GB of memory
    python benchmarks/published_size.py --folder lumina-7b --layers 4           # a small rehearsal
    python benchmarks/published_size.py --folder janus-1b --model janus-pro-1b  # 4 GB of disk, 8 GB of memory

Random weights say nothing about tokens per pass; the passes of both strategies are counted only to show the shapes.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import arsd
from arsd.cli.common import quiet, table
from arsd.devices import device_kind, resolve_device
from arsd.models.anole import PLACEHOLDER
from arsd.models.janus import BEGIN as BEGIN_OF_IMAGE
from arsd.models.janus import FIRST, PAD, ROLES
from arsd.models.lumina import BEGIN, END, END_OF_TURN

CODES, VOCABULARY, WIDTH, HIDDEN, HEADS = 8192, 65536, 4096, 11008, 32


def words() -> dict[str, int]:
    """Chameleon's vocabulary as far as pictures and single bytes go; the rest of the ids has no words."""
    codes = ["IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z" for code in range(CODES)]
    found = ["<s>", "<pad>", "</s>", "<unk>", *codes, END, BEGIN]
    known = {word: i for i, word in enumerate(found)}
    known |= {END_OF_TURN: 8710, PLACEHOLDER: 8711} | {f"<reserved{n:05d}>": n + 4 for n in range(8796, 8850)}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return known | {letter: 20000 + i for i, letter in enumerate(letters)}


def write(folder: Path, layers: int) -> None:
    """The folder, one shard for each two layers."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    place = 0

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        """A stretch of one table of noise, repeated: 7 billion fresh numbers would take minutes."""
        nonlocal place
        size = int(torch.Size(shape).numel())
        place = (place + 999_983) % len(noise)
        drawn = torch.cat([noise[place:], noise[:place]]).repeat(-(-size // len(noise)))[:size].view(shape)
        return drawn * (std / shape[-1] ** 0.5)

    stem = {"model.embed_tokens.weight": draw(VOCABULARY, WIDTH, std=WIDTH**0.5), "lm_head.weight": draw(VOCABULARY, WIDTH)}
    stem |= {"model.norm.weight": torch.ones(WIDTH, dtype=torch.bfloat16)}
    index: dict[str, str] = {}

    def store(name: str, state: dict[str, Tensor]) -> None:
        save_file(state, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(state, name))

    store("model-stem.safetensors", stem)
    del stem
    for first in range(0, layers, 2):
        shard = {}
        for i in range(first, min(first + 2, layers)):
            at = f"model.layers.{i}."
            shard |= {f"{at}self_attn.{part}_proj.weight": draw(WIDTH, WIDTH) for part in "qkvo"}
            shard |= {f"{at}mlp.{part}_proj.weight": draw(HIDDEN, WIDTH) for part in ("gate", "up")}
            shard[f"{at}mlp.down_proj.weight"] = draw(WIDTH, HIDDEN)
            for part in ("q", "k"):
                shard[f"{at}self_attn.{part}_norm.weight"] = torch.ones(1, WIDTH // HEADS, dtype=torch.bfloat16)
                shard[f"{at}self_attn.{part}_norm.bias"] = torch.zeros(1, WIDTH // HEADS, dtype=torch.bfloat16)
            for part in ("input", "post_attention"):
                shard[f"{at}{part}_layernorm.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
        store(f"model-{first:02d}.safetensors", shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {"model_type": "chameleon", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": HIDDEN}
    config |= {"num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    config |= {"model_parallel_size": 1, "swin_norm": False, "rms_norm_eps": 1e-5, "vocabulary_map": words()}
    (folder / "config.json").write_text(
        json.dumps(config | {"torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 2})
    )
    write_tokenizer(folder, words(), {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    arsd.VQGANTokenizer().save_single_file(folder / "vqgan.ckpt")


def write_janus(folder: Path, layers: int) -> None:
    """Janus-Pro 1B as transformers saves it."""
    from transformers import JanusConfig, JanusForConditionalGeneration

    text = {"model_type": "llama", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 5632}
    text |= {"num_hidden_layers": layers, "num_attention_heads": 16, "max_position_embeddings": 16384}
    config = JanusConfig(text_config=text, vision_config={}, vq_config={}, tie_word_embeddings=False)
    config.dtype = torch.bfloat16
    JanusForConditionalGeneration._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = [*letters, FIRST, PAD, BEGIN_OF_IMAGE, *ROLES]
    write_tokenizer(folder, {word: i for i, word in enumerate(known)}, {"bos_token": FIRST, "pad_token": PAD})


def write_tokenizer(folder: Path, known: dict[str, int], special: dict[str, str]) -> None:
    """One that cuts text into bytes."""
    tokenizer = Tokenizer(models.BPE(vocab=known, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(w, normalized=False) for w in known if len(w) > 1])
    tokenizer.save(str(folder / "tokenizer.json"))
    notes = {**special, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(notes))


MODELS: dict[str, tuple[Any, int, int]] = {"lumina-mgpt-7b": (write, 32, 256), "janus-pro-1b": (write_janus, 24, 384)}
"""How it is written, its layers, and the side of the pictures in pixels."""


class Anonymous:
    """The largest amount of anonymous memory of this process, in GB, while it lasts (Linux)."""

    def __enter__(self) -> Anonymous:
        self.most, self._stop = self.now(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.most = max(self.most, self.now())

    @staticmethod
    def now() -> float:
        """At this moment."""
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1e6


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load and decode."""
    device, start = resolve_device(arguments.device), Anonymous.now()
    began = time.perf_counter()
    with Anonymous() as memory, quiet():
        options = {} if device.type == "cpu" else {"device_map": {"": str(device)}}
        pipe: Any = arsd.AutoARPipeline.from_pretrained(arguments.folder, dtype=torch.bfloat16, **options)
        pipe.vq.to(device)
    loaded = time.perf_counter() - began
    weights = sum(p.numel() * p.element_size() for part in (pipe.transformer, pipe.vq) for p in part.parameters()) / 1e9
    report: dict[str, Any] = {
        "device": device_kind(device),
        "weights_gb": round(weights, 2),
        "load_seconds": round(loaded, 1),
    }
    report |= {"peak_anonymous_gb": round(memory.most - start, 2), "threads": torch.get_num_threads(), "rows": []}
    pipe.set_progress_bar_config(disable=True)

    def stop(pipe: Any, step: int, done: int, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step + 1 >= arguments.passes
        return {}

    side = MODELS[arguments.model][2]
    call = {"prompt": "a red apple", "height": side, "width": side, "output_type": "latent", "callback_on_step_end": stop}
    pipe._known_hash = (str(pipe.config.get("_name_or_path") or ""), None)  # no profile, and no hashing of 14 GB
    for decoder in arguments.decoders:
        seconds = []
        for repeat in range(-1, arguments.repeats):
            stats = pipe(**call, decoder=decoder, generator=torch.Generator().manual_seed(0)).stats
            if repeat >= 0:
                seconds.append((stats.total_seconds - stats.seconds["prefill"], stats.seconds["forward"]))
        total, forward = sorted(seconds)[len(seconds) // 2]
        row = {"decoder": decoder, "pass_tokens": stats.pass_tokens, "passes": stats.forward_passes}
        row |= {
            "ms_per_pass": round(1e3 * total / stats.forward_passes, 1),
            "outside_forward": round(1 - forward / total, 4),
        }
        report["rows"].append(row)
    report["peak_resident_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is, or is to be written")
    parser.add_argument("--model", choices=MODELS, default="lumina-mgpt-7b")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--decoders", nargs="+", default=["ar", "sjd:window=8", "sjd:window=16", "sjd:window=32"])
    parser.add_argument("--passes", type=int, default=4, help="passes per reading")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--write-only", action="store_true")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    if not (arguments.folder / "tokenizer_config.json").is_file():  # written last, or nearly
        writer, layers, _ = MODELS[arguments.model]
        writer(arguments.folder, arguments.layers or layers)
    if arguments.write_only:
        return 0
    report = measure(arguments)
    print(json.dumps({name: value for name, value in report.items() if name != "rows"}))
    header = ["decoder", "tokens in a pass", "passes", "ms per pass", "outside the forward pass"]
    print(table(header, [[*row.values()] for row in report["rows"]]))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
