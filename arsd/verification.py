"""Is a picture the plain AR sample of its seed? Recomputed from its record: prompt features, every arg-max, the pixels.

What this proves: that the named model, with this prompt, seed and sampling options, gives these tokens and these pixels.
What it is not: a signature. Anybody can make pictures and records, seeds can be searched for one that suits, and of a
picture whose record was removed nothing can be said.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arsd.decoding import CounterNoise, DecodeRequest, LawConfig, Laws, decode
from arsd.decoding.replay import Replay
from arsd.decoding.types import OnRound
from arsd.devices import dtype_name, in_use
from arsd.errors import ArsdError
from arsd.provenance import read_record, tokens_sha256, unpack_tokens

# Where the arithmetic of the verifying machine is not that of the generating one (another probe, see `arsd.shapes`): how far
# apart two scores may be for the arg-max to have changed places, and how many tokens of a picture may have done so.
# Measured on the shipped model (teacher forcing in other pass shapes): docs/verification.md.
MARGINS = {"float64": 1e-9, "float32": 2e-3, "bfloat16": 1.0, "float16": 0.2}
ALLOWED = {"float64": 0, "float32": 1, "bfloat16": 8, "float16": 4}
MOST_SLOTS, MOST_SCORES = 1 << 17, 1 << 27  # of a pass shape that is followed: a record must not eat the memory
MOST_LETTERS = 1 << 16  # of a prompt
PIXEL_LEVELS = 1  # of 255, by which a pixel may then differ

VERIFIED, REFUTED, UNKNOWN = "verified", "refuted", "unknown"


@dataclass
class Verification:
    """What can be said of one picture.

    Args:
        path: of the file, or ``""``.
        result: ``verified``, ``refuted`` or ``unknown``.
        reason: why, in a few words.
        same_arithmetic: whether this machine computes bit for bit as the one that made the picture (its probe).
        mismatches: tokens that are not what the seed gives; with other arithmetic, those that no rounding explains.
        near_ties: tokens that are not the arg-max here, but within the margin that other arithmetic explains.
        pixels_match: whether the decoded tokens are the picture.
        forward_passes: what it took.
        given_tokens: tokens that the picture began with: of them nothing is proven but that they are these.
    """

    path: str
    result: str
    reason: str
    same_arithmetic: bool | None = None
    mismatches: int = 0
    near_ties: int = 0
    pixels_match: bool | None = None
    forward_passes: int = 0
    given_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass
class _Case:
    """A picture whose record can be followed."""

    index: int
    image: Image.Image | list[Image.Image]
    record: dict[str, Any]
    tokens: Tensor
    law: LawConfig


def verify_pictures(pipe: Any, sources: Sequence[Any], on_round: OnRound | None = None) -> list[Verification]:
    """Verify pictures with a pipeline; those of one pass shape share their passes.

    Args:
        pipe: an image pipeline.
        sources: paths or PIL images that carry their record (opened from a PNG that arsd wrote).
        on_round: hears of every pass, as that of a call; ``True`` gives up, and what was not judged yet is ``unknown``.
    """
    results: list[Verification | None] = [None] * len(sources)
    groups: dict[tuple[Any, ...], list[_Case]] = defaultdict(list)
    for index, source in enumerate(sources):
        path = str(source) if isinstance(source, (str, Path)) else str(getattr(source, "filename", ""))
        checked = _read(pipe, index, source)
        if isinstance(checked, _Case):
            record = checked.record
            alike = tuple(record.get(name) for name in ("height", "width", "slots", "given_tokens", "num_frames"))
            alike += ("negative_prompt" in record,)
            groups[(record["batch"], record["pass_tokens"], checked.law, "prompt" in record, alike)].append(checked)
        else:
            results[index] = Verification(path, *checked)
    for (batch, pass_tokens, law, *_), cases in groups.items():
        for first in range(0, len(cases), batch):
            part = cases[first : first + batch]
            for case, result in zip(part, _judged(pipe, part, batch, pass_tokens, law, on_round), strict=True):
                source = sources[case.index]
                result.path = str(source if isinstance(source, (str, Path)) else getattr(source, "filename", ""))
                results[case.index] = result
    return [result for result in results if result is not None]


def _read(pipe: Any, index: int, source: Any) -> _Case | tuple[str, str]:
    """The picture to be judged, or (result, reason) where that can be said at once."""
    try:
        image, record = read_record(source)
    except ArsdError as error:
        return UNKNOWN, str(error)
    if not record.get("seed_exact"):
        return UNKNOWN, f"{record.get('decoder', 'its decoder')} is not seed-exact: no one picture belongs to a seed"
    if record.get("model_hash") is None or record["model_hash"] != pipe.model_hash:
        named = f"{record.get('model')} ({str(record.get('model_hash'))[:12]})"
        return UNKNOWN, f"it was made by {named}, which is another model than the one at hand"
    name, kind = pipe.made_from
    if name not in record:
        if "prompt" in record or "class_label" in record:
            return REFUTED, f"its record has no {name}, from which this model makes pictures"
        return UNKNOWN, "it was made from features that the record does not hold"
    if not isinstance(record[name], kind) or isinstance(record[name], bool):
        return UNKNOWN, f"its record is damaged ({name})"
    words = [record.get(what, "") for what in ("prompt", "negative_prompt")]
    if not all(isinstance(text, str) for text in words):
        return UNKNOWN, "its record is damaged (negative_prompt)"
    if max(map(len, words)) > MOST_LETTERS:
        return UNKNOWN, "its prompt is too long to be followed"
    if record.get("prompt_images"):
        return UNKNOWN, "its prompt held pictures, which the record does not"
    if record.get("dtype") != dtype_name(pipe):
        return UNKNOWN, f"it was made in {record.get('dtype')}: load the model in that dtype"
    try:
        tokens = torch.from_numpy(unpack_tokens(record["tokens"]).copy())
        law = LawConfig(**record["sampling"])
        pipe.law_config(asdict(law))  # a model may not have all of them
        numbers = [record[name] for name in ("batch", "pass_tokens", "noise_seed", "image_index")]
        places = [record.get(name) for name in ("height", "width", "slots", "given_tokens", "num_frames")]
        whole = all(
            isinstance(n, int) and not isinstance(n, bool) for n in [*numbers, *(n for n in places if n is not None)]
        )
        whole = whole and re.fullmatch("[0-9a-f]{16}", str(record.get("probe"))) is not None
    except (ArsdError, ValueError, KeyError, TypeError, OSError, ArithmeticError) as error:
        return UNKNOWN, f"its record is damaged ({type(error).__name__})"
    except Exception as error:  # zlib and binascii have their own
        return UNKNOWN, f"its tokens cannot be read ({type(error).__name__})"
    if not whole or not 1 <= numbers[0] <= 4096 or not 1 <= numbers[1] <= 4096 or not 0 <= numbers[3] < 2**31:
        return UNKNOWN, "its record is damaged (pass shape, seed or size)"
    try:
        raster = pipe.raster_of(record)
    except ArsdError as error:
        return UNKNOWN, f"it has another size than this model is loaded for ({error}): load it with image_size"
    except Exception as error:  # whatever a made-up record leads to
        return UNKNOWN, f"its record is damaged ({type(error).__name__})"
    if len(tokens) != raster.num_tokens or int(tokens.max()) >= raster.vocab:
        return REFUTED, f"this model makes {raster.num_tokens} tokens below {raster.vocab}"
    given = record.get("given_tokens") or 0
    if not raster.begins(given):
        return UNKNOWN, "its record is damaged (given_tokens are no whole rows or frames, or all of them)"
    slots = raster.num_tokens + numbers[1] + (record.get("slots") or 0)
    if not 0 <= slots <= MOST_SLOTS or numbers[0] * numbers[1] * slots > MOST_SCORES:
        return UNKNOWN, "its pass shape is too large to be followed"
    codes = tokens < raster.codes
    if any(tokens[n] != mark for n, mark in raster.forced.items()) or int((~codes).sum()) != len(raster.forced):
        return REFUTED, "its tokens are no picture of this model: marks and codes stand in each other's places"
    if tokens_sha256(tokens) != record.get("tokens_sha256"):
        return REFUTED, "the tokens do not have the recorded hash"
    return _Case(index, image, record, tokens, law)


def _judged(
    pipe: Any, cases: list[_Case], batch: int, pass_tokens: int, law: LawConfig, on_round: OnRound | None
) -> list[Verification]:
    """:func:`_judge`, where no record may speak for the others, nor stop them."""
    try:
        return _judge(pipe, cases, batch, pass_tokens, law, on_round)
    except Exception as error:  # whatever a made-up record leads to: numbers that overflow, shapes without memory
        if len(cases) > 1:
            return [result for case in cases for result in _judged(pipe, [case], batch, pass_tokens, law, on_round)]
        return [Verification("", UNKNOWN, f"its record cannot be followed ({type(error).__name__})")]


def _judge(
    pipe: Any, cases: list[_Case], batch: int, pass_tokens: int, law: LawConfig, on_round: OnRound | None = None
) -> list[Verification]:
    """Teacher-force up to ``batch`` pictures of one shape in the rows of one batch, and compare their pixels."""
    dtype = dtype_name(pipe)
    filled = cases + [cases[0]] * (batch - len(cases))  # the pass keeps its shape
    try:
        conditions = pipe.conditions_of([case.record for case in filled], law.guidance_scale != 1)
    except ArsdError as error:
        if len(cases) > 1:  # one record must not speak for the others
            return [result for case in cases for result in _judge(pipe, [case], batch, pass_tokens, law, on_round)]
        return [Verification("", REFUTED, f"its prompt cannot have made it: {error}")]
    device, raster = conditions.condition.device, conditions.raster
    noise = CounterNoise([c.record["noise_seed"] for c in filled], [c.record["image_index"] for c in filled], device)
    replay = Replay(torch.stack([c.tokens for c in filled]).to(device), MARGINS[dtype])
    if first := int(filled[0].record.get("given_tokens") or 0):
        conditions.given = replay.tokens[:, :first]
    grammar = pipe.make_grammar(raster)
    with in_use(pipe.transformer):
        target = pipe.target_maker(conditions)(pass_tokens, batch)
        request = DecodeRequest(raster.num_tokens, given=conditions.given, on_round=on_round)
        stats = decode(target, replay.parts(pass_tokens), Laws(law, grammar), noise, request, batch).stats
    if min(stats.tokens) < raster.num_tokens - first:
        return [Verification("", UNKNOWN, "it was stopped before all of it was recomputed") for _ in cases]
    probe = pipe.arithmetic_probe(batch, pass_tokens, law.guidance_scale != 1)
    passes = stats.forward_passes + stats.prefill_passes
    results = []
    for b, case in enumerate(cases):
        exact = case.record.get("probe") == probe
        flips, hard = int(replay.flips[b].sum()), int((replay.gaps[b] > MARGINS[dtype]).sum())
        pixels: bool | None = None
        if pipe._same_pixels_elsewhere or not (flips if exact else hard):  # or a diffusion model would paint for nothing
            painted = pipe.paint(replay.tokens[b : b + 1], raster, [case.record])[0]
            pixels = _same_pixels(case.image, painted, 0 if exact else PIXEL_LEVELS)
            if not (pixels or exact or pipe._same_pixels_elsewhere):
                pixels = None
        results.append(_verdict(exact, flips, hard, ALLOWED[dtype], pixels, passes, first, raster.num_tokens))
    return results


def _verdict(
    exact: bool, flips: int, hard: int, allowed: int, pixels: bool | None, passes: int, given: int, total: int
) -> Verification:
    """What the figures of one picture say; with the same arithmetic nothing may differ at all."""
    near = 0 if exact else flips - hard
    mismatches = flips if exact else hard
    what = f"the last {total - given} of its {total} tokens are" if given else "it is"
    reason = f"{what} the plain AR sample of its seed" + (" behind a given beginning" if given else "")
    result, reason = VERIFIED, reason + ("" if exact else ", up to rounding")
    if mismatches:
        result, reason = REFUTED, f"{mismatches} of its tokens are not what its seed gives"
    elif near > allowed:
        result, reason = REFUTED, f"{near} near-ties went the other way, more than other arithmetic explains ({allowed})"
    elif pixels is None:
        result, reason = UNKNOWN, "its tokens are those of its seed, but other arithmetic than here painted its pixels"
    elif not pixels:
        result, reason = REFUTED, "its pixels are not what its tokens decode to"
    return Verification("", result, reason, exact, mismatches, near, pixels, passes, given)


def _same_pixels(image: Image.Image | list[Image.Image], decoded: Tensor, levels: int) -> bool:
    frames = image if isinstance(image, list) else [image]
    ours = np.round(decoded.movedim(-3, -1).cpu().numpy() * 255).astype(np.int16)
    if any(frame.mode != "RGB" for frame in frames) or len({frame.size for frame in frames}) > 1:
        return False
    theirs = np.stack([np.asarray(frame, dtype=np.int16) for frame in frames])
    theirs = theirs if isinstance(image, list) else theirs[0]
    return ours.shape == theirs.shape and int(np.abs(ours - theirs).max()) <= levels
