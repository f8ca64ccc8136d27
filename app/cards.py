"""A card for each run: everything about it as JSON, and the Python and the command that do it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any

import torch

import arsd
from arsd.app.drawing import Drawn
from arsd.app.knobs import Asked
from arsd.app.service import Service
from arsd.devices import device_kind, dtype_name
from arsd.pipelines.outputs import ARPipelineOutput
from arsd.provenance import picture_entry, slug, tokens_sha256

REDUCED = ("bfloat16", "float16")


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


def as_run(asked: Asked, output: ARPipelineOutput) -> Asked:
    """The same with the window that ``auto`` took: it depends on the machine and the batch."""
    config = {key: value for key, value in dict(asked.decoder.config).items() if not key.startswith("_")}
    if config.get("window") != "auto":
        return asked
    return replace(asked, decoder=type(asked.decoder)(**{**config, "window": output.stats.pass_tokens}))


def picture_python(service: Service, asked: Asked, output: ARPipelineOutput, compare: bool = False) -> str:
    """Python that draws the same tokens."""
    asked, pictures, name = as_run(asked, output), len(output.seeds), slug(asked.subject)
    call = [repr(asked.subject) if "prompt" in asked.inputs else f"class_labels={asked.subject}"]
    call += [f"decoder={str(asked.decoder)!r}"]
    call += [f"{option}={value!r}" for option, value in asked.sampling.items()]
    lines = [
        "import torch, arsd",
        *_imports(service),
        "",
        _load("arsd.AutoARPipeline", service.model, service.pipe, service.parts),
    ]
    if pictures == 1:
        call += [f"generator=torch.Generator().manual_seed({asked.seed})"]
        save = [f'arsd.save_png(out.images[0], "{name}-seed{asked.seed}.png", pipe.record(out, 0))']
    else:
        lines += [f"seeds = range({asked.seed}, {asked.seed + pictures})"]
        call += [f"num_images_per_prompt={pictures}", "generator=[torch.Generator().manual_seed(s) for s in seeds]"]
        save = ["for i, seed in enumerate(seeds):"]
        save += [f'    arsd.save_png(out.images[i], f"{name}-seed{{seed}}.png", pipe.record(out, i))']
    lines += [f"out = pipe({', '.join(call)})", *save]
    if compare:
        plain = ["decoder='ar'" if one.startswith("decoder=") else one for one in call]
        lines += [f"plain = pipe({', '.join(plain)})", "print((out.tokens != plain.tokens).sum().item(), 'tokens differ')"]
    return "\n".join(lines) + "\n"


def picture_command(service: Service, asked: Asked, output: ARPipelineOutput, compare: bool = False) -> str:
    """The command that draws the same tokens."""
    asked, pictures = as_run(asked, output), len(output.seeds)
    words = ["arsd", "generate", "--decoder", str(asked.decoder)]
    words += _options(asked.sampling) + _common(service, service.model, service.pipe, service.parts)
    words += ["--compare"] if compare else []
    what = f" -- {shlex.quote(asked.subject)}" if "prompt" in asked.inputs else f" --class-label {asked.subject}"
    if pictures == 1:
        return f"{shlex.join(words)} --seed {asked.seed}{what}\n"
    seeds = " ".join(str(asked.seed + i) for i in range(pictures))
    kind = dtype_name(service.pipe)
    note = f"# one at a time; in {kind} a near-tie may fall otherwise than in one batch, which the Python draws\n"
    return f"{note if kind in REDUCED else ''}for seed in {seeds}; do\n  {shlex.join(words)} --seed $seed{what}\ndone\n"


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
    lines = ["import torch, arsd", *_imports(service), "", load, f"out = pipe({', '.join(call)})", "print(out.text)"]
    return "\n".join(lines) + "\n"


def text_command(service: Service, clip: str, question: str, decoder: Any, options: dict[str, Any]) -> str:
    """The command that describes a clip again."""
    words = ["arsd", "describe", f"--question={question}", "--decoder", str(decoder), *_options(options)]
    return shlex.join([*words, *_common(service, service.video_model, service.video_llm), "--", clip]) + "\n"


def verify_command(name: str, service: Service) -> str:
    """The command that verifies a file."""
    return shlex.join(["arsd", "verify", "--model", service.model, *_options(service.parts), "--", name]) + "\n"


def _options(given: Mapping[str, Any]) -> list[str]:
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def _imports(service: Service) -> list[str]:
    if not service.plugins:
        return []
    return ["from arsd.plugins import import_plugin", *(f"import_plugin({plugin!r})" for plugin in service.plugins)]


def _load(cls: str, model: str, pipe: Any, parts: Mapping[str, Any] = MappingProxyType({})) -> str:
    more = "".join(f", {name}={value!r}" for name, value in parts.items())
    device = "" if pipe.device.type == "cpu" else f'.to("{pipe.device.type}")'
    return f"pipe = {cls}.from_pretrained({model!r}, dtype=torch.{dtype_name(pipe)}{more}){device}"


def _common(service: Service, model: str, pipe: Any, parts: Mapping[str, Any] = MappingProxyType({})) -> list[str]:
    plugins = [word for plugin in service.plugins for word in ("--import", plugin)]
    return ["--model", model, "--dtype", dtype_name(pipe), "--device", pipe.device.type, *_options(parts), *plugins]
