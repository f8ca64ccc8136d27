"""A card for each run: everything about it as JSON, and the Python and the command that do it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any

import torch

import arsd
from arsd.app.drawing import Drawn
from arsd.app.knobs import Asked
from arsd.app.service import Service
from arsd.devices import device_kind, dtype_name
from arsd.provenance import picture_entry, slug, tokens_sha256


def machine(pipe: Any) -> dict[str, Any]:
    """What computes."""
    import diffusers
    import transformers

    versions = {"arsd": arsd.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    kind = {"device": pipe.device.type, "device_kind": device_kind(pipe.device), "dtype": dtype_name(pipe)}
    return {**kind, "threads": torch.get_num_threads(), "versions": {**versions, "diffusers": diffusers.__version__}}


def picture_card(service: Service, asked: Asked, drawn: Drawn) -> dict[str, Any]:
    """Everything about one call that drew pictures."""
    decoder, pictures = asked.decoder, len(drawn.canvases)
    card: dict[str, Any] = {
        "model": service.model,
        "model_hash": service.pipe.model_hash,
        **asked.inputs,
        "seeds": list(range(asked.seed, asked.seed + pictures)),
        "decoder": str(decoder),
        "lossless": decoder.lossless,
        "seed_exact": decoder.seed_exact,
        "sampling": asdict(service.pipe.law_config(asked.sampling)),
        **machine(service.pipe),
        "stopped": drawn.stopped or None,
    }
    if drawn.output is not None:
        if drawn.finished:
            entries = [picture_entry(drawn.output, i) for i in range(pictures)]
            card["images"] = [{**entry, "how": drawn.counts[i]} for i, entry in enumerate(entries)]
        card["tokens_committed_per_pass"] = drawn.committed
        card["stats"] = drawn.output.stats.as_dict()
    return card


def race_card(service: Service, asked: Asked, plain: Drawn, fast: Drawn | None, verdict: str) -> dict[str, Any]:
    """Both sides of a race, and how they compare."""
    card: dict[str, Any] = {"race": {}, "verdict": verdict, "ar": picture_card(service, plain_of(asked), plain)}
    if fast is not None:
        card["decoder"] = picture_card(service, asked, fast)
        if plain.output is not None and fast.output is not None and plain.finished and fast.finished:
            tokens = plain.output.tokens[0], fast.output.tokens[0]
            card["race"] = {
                "changed_tokens": int((tokens[0] != tokens[1]).sum()),
                "tokens": len(tokens[0]),
                "tokens_sha256": [tokens_sha256(one) for one in tokens],
                "forward_passes": [plain.forward_passes, fast.forward_passes],
                "seconds": [plain.seconds, fast.seconds],
            }
    return card


def plain_of(asked: Asked) -> Asked:
    """The same by plain AR in passes of one token."""
    return replace(asked, decoder=arsd.Autoregressive())


def picture_python(service: Service, asked: Asked, pictures: int = 1, compare: bool = False) -> str:
    """Python that draws the same tokens."""
    call = [repr(asked.subject) if "prompt" in asked.inputs else f"class_labels={asked.subject}"]
    call += [f"decoder={str(asked.decoder)!r}"]
    call += [f"{name}={value!r}" for name, value in asked.sampling.items()]
    lines = ["import torch, arsd", "", _load("arsd.AutoARPipeline", service.model, service.pipe, service.parts)]
    if pictures == 1:
        call += [f"generator=torch.Generator().manual_seed({asked.seed})"]
    else:
        lines += [f"seeds = range({asked.seed}, {asked.seed + pictures})"]
        call += [f"num_images_per_prompt={pictures}", "generator=[torch.Generator().manual_seed(s) for s in seeds]"]
    lines += [f"out = pipe({', '.join(call)})"]
    name = slug(asked.subject)
    if pictures == 1:
        lines += [f'arsd.save_png(out.images[0], "{name}-seed{asked.seed}.png", pipe.record(out, 0))']
    else:
        lines += ["for i, seed in enumerate(seeds):"]
        lines += [f'    arsd.save_png(out.images[i], f"{name}-seed{{seed}}.png", pipe.record(out, i))']
    if compare:
        plain = [f"decoder={'ar'!r}" if one.startswith("decoder=") else one for one in call]
        lines += [f"plain = pipe({', '.join(plain)})", "print((out.tokens != plain.tokens).sum().item(), 'tokens differ')"]
    return "\n".join(lines) + "\n"


def picture_command(service: Service, asked: Asked, pictures: int = 1, compare: bool = False) -> str:
    """The command that draws the same tokens."""
    what = [asked.subject] if "prompt" in asked.inputs else ["--class-label", asked.subject]
    words = ["arsd", "generate", *what, "--decoder", str(asked.decoder)]
    words += [w for name, value in asked.sampling.items() for w in (f"--{name.replace('_', '-')}", f"{value!r}")]
    words += [w for name, value in service.parts.items() for w in (f"--{name.replace('_', '-')}", str(value))]
    words += _common(service.model, service.pipe) + (["--compare"] if compare else [])
    if pictures == 1:
        return shlex.join([*words, "--seed", str(asked.seed)]) + "\n"
    seeds = " ".join(str(asked.seed + i) for i in range(pictures))
    return f"for seed in {seeds}; do\n  {shlex.join(words)} --seed $seed\ndone\n"


def text_card(service: Service, told: Any, question: str, decoder: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Everything about one description."""
    out = told.output
    card = {"model": service.video_model, "question": question, "decoder": str(decoder), "lossless": decoder.lossless}
    card |= {**options, **machine(service.video_llm), "stopped": told.stopped or None}
    if out is not None:
        card |= {"text": out.text, "num_frames": out.num_frames, "num_visual_tokens": out.num_visual_tokens}
        card |= {"how": told.counts, "tokens_committed_per_pass": told.committed, "stats": out.stats.as_dict()}
    return card


def text_python(service: Service, clip: str, question: str, decoder: Any, options: dict[str, Any]) -> str:
    """Python that describes a clip again."""
    call = [repr(clip), repr(question), f"decoder={str(decoder)!r}", *(f"{k}={v!r}" for k, v in options.items())]
    load = _load("arsd.VideoLLMPipeline", service.video_model, service.video_llm)
    return "\n".join(["import torch, arsd", "", load, f"out = pipe({', '.join(call)})", "print(out.text)"]) + "\n"


def text_command(service: Service, clip: str, question: str, decoder: Any, options: dict[str, Any]) -> str:
    """The command that describes a clip again."""
    words = ["arsd", "describe", clip, "--question", question, "--decoder", str(decoder)]
    words += [w for name, value in options.items() for w in (f"--{name.replace('_', '-')}", str(value))]
    return shlex.join([*words, *_common(service.video_model, service.video_llm)]) + "\n"


def verify_command(names: Sequence[str], service: Service) -> str:
    """The command that verifies files."""
    return shlex.join(["arsd", "verify", *names, "--model", service.model]) + "\n"


def _load(cls: str, model: str, pipe: Any, parts: Mapping[str, Any] = MappingProxyType({})) -> str:
    more = "".join(f", {name}={value!r}" for name, value in parts.items())
    device = "" if pipe.device.type == "cpu" else f'.to("{pipe.device.type}")'
    return f"pipe = {cls}.from_pretrained({model!r}, dtype=torch.{dtype_name(pipe)}{more}){device}"


def _common(model: str, pipe: Any) -> list[str]:
    return ["--model", model, "--dtype", dtype_name(pipe), "--device", pipe.device.type]
