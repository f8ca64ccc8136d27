"""What emoji-video-chat gets right about clips of concepts that it was not trained on.

    arsd train clips --out runs/clips      # once: fetches and decodes the clips
    python benchmarks/describe_heldout.py  # tables, and benchmarks/results/describe-heldout.json

Each clip is described by greedy decoding, and the description is read back into facts, which are compared with those
measured on the frames that the model saw. Per kind of fact: `asserted`, how many could be asserted; `right`, the share of
these that the description tells (one that it leaves out is wrong); `right of told`, the share of told ones; `best constant`,
what the one value that fits most of these very clips would score. Clips are shown as they are, on white, with 8, 16 and 64
frames, and once more with 16 frames of three random views each (other backgrounds, places, sizes, directions and added
motion).
Names are scored apart: nobody can know those of held-out clips. Options: --clips, --model, --out, and --doc FILE, to renew
the tables between the two `results` marks of docs/emoji-video-chat.md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from arsd.cli.common import table
from arsd.devices import device_kind, resolve_dtype
from arsd.training.clip_facts import Facts, facts_of, measure
from arsd.training.clip_texts import KINDS, Reading, read
from arsd.training.clips import ClipData, plain_view, random_view, show
from arsd.training.video_chat import answers

HERE = Path(__file__).parent
SHIPPED = HERE.parent / "arsd" / "checkpoints" / "emoji-video-chat"
VIEWS = 3  # random ones of each clip
END = "<|im_end|>"
MARK = "<!-- results -->"


def shown(data: ClipData, rows: list[int], frames: int, views: int) -> np.ndarray:
    """Clips ``rows`` [N, T, 96, 96, 3]: as they are (``views`` 0), or in ``views`` random ways each."""
    if not views:
        return np.stack([show(data.frames[row], plain_view(frames)) for row in rows])
    source = np.random.default_rng(0)
    return np.stack([show(data.frames[row], random_view(frames, source)) for row in rows for _ in range(views)])


def by_kind(measured: list[Facts], told: list[Facts]) -> list[dict[str, Any]]:
    """A row for each kind of fact and one for all."""
    rows = []
    for kind in KINDS:
        pairs = [(facts[kind], said.get(kind)) for facts, said in zip(measured, told, strict=True) if kind in facts]
        if pairs:
            right, stated = sum(a == b for a, b in pairs), sum(b is not None for _, b in pairs)
            constant = Counter(a for a, _ in pairs).most_common(1)[0][1]
            rows.append({"kind": kind, "asserted": len(pairs), "right": right, "told": stated, "constant": constant})
    rows.append({"kind": "all", **{key: sum(row[key] for row in rows) for key in ("asserted", "right", "told", "constant")}})
    return rows


def share(count: int, total: int) -> str:
    """``87.5 %``."""
    return f"{100 * count / max(total, 1):.1f} %"


def scored(model: Any, processor: Any, clips: np.ndarray, title: str) -> dict[str, Any]:
    """Describe ``clips``, print the table, return it."""
    texts = answers(model, processor, clips)
    readings = [read(text.removesuffix(END)) for text in texts]
    rows = by_kind([facts_of(measure(clip)) for clip in clips], [reading.facts for reading in readings])
    lengths = [len(processor.tokenizer(text)["input_ids"]) for text in texts]
    extra = {
        "ended": sum(text.endswith(END) for text in texts),
        "strange_sentences": sum(len(reading.strange) for reading in readings),
        "tokens": [min(lengths), round(float(np.mean(lengths)), 1), max(lengths)],
    }
    print(f"\n{title}: {len(clips)} clips, {extra['ended']} descriptions end, {extra['tokens'][1]} tokens on average")
    cells = [
        [r["kind"], str(r["asserted"])]
        + [share(r["right"], r["asserted"]), share(r["right"], r["told"]), share(r["constant"], r["asserted"])]
        for r in rows
    ]
    print(table(["kind", "asserted", "right", "right of told", "best constant"], cells))
    return {"title": title, "clips": len(clips), **extra, "kinds": rows, "examples": texts[:3]}


def named(model: Any, processor: Any, data: ClipData, rows: list[int]) -> dict[str, int]:
    """How many names and groups are right, of one plain clip of each concept in ``rows``."""
    firsts = sorted({data.info[row].concept: row for row in reversed(rows)}.values())
    clips = shown(data, firsts, 8, 0)
    told: list[Reading] = [read(text.removesuffix(END)) for text in answers(model, processor, clips)]
    known = [data.info[row] for row in firsts]
    names = sum(said.name == clip.name.replace(".", "") for said, clip in zip(told, known, strict=True))
    return {
        "concepts": len(firsts),
        "names": names,
        "groups": sum(a.group == b.group for a, b in zip(told, known, strict=True)),
    }


def in_words(result: dict[str, Any]) -> str:
    """The results as Markdown: right facts by kind and set, beside the best constant answer."""
    sets = result["sets"]
    lines = ["| kind | " + " | ".join(f"{one['title']}: right | best constant" for one in sets) + " |"]
    lines.append("|---" * (1 + 2 * len(sets)) + "|")
    for kind in (*KINDS, "all"):
        cells = [kind]
        for one in sets:
            row = next((row for row in one["kinds"] if row["kind"] == kind), None)
            cells += ["", ""] if row is None else [share(row[key], row["asserted"]) for key in ("right", "constant")]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for one in sets:
        every, (least, mean, most) = one["kinds"][-1], one["tokens"]
        told = f"{one['clips']} clips, {every['asserted']} facts, {share(every['right'], every['told'])} of those told right"
        ends = f"{one['ended']} descriptions end, of {least} to {most} tokens ({mean} on average)"
        lines.append(f"- {one['title']}: {told}; {ends}; {one['strange_sentences']} sentences mean nothing.")
    for part, counts in result["names"].items():
        lines.append(
            f"- {part}: {counts['names']} names and {counts['groups']} groups right of {counts['concepts']} concepts."
        )
    lines += ["", "The first held-out clip, 16 frames:", "", f"> {sets[1]['examples'][0].removesuffix(END)}", ""]
    command = f"`python benchmarks/describe_heldout.py`, {result['device']}, {result['dtype']}, torch {result['torch']}"
    return "\n".join([*lines, command])


def renew(path: Path, text: str) -> None:
    """Put ``text`` between the two marks of ``path``."""
    before, _, after = path.read_text(encoding="utf-8").split(MARK)
    path.write_text(f"{before}{MARK}\n{text}\n{MARK}{after}", encoding="utf-8")


def main() -> None:
    """Score and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=Path, default=Path("runs/clips"))
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "describe-heldout.json")
    parser.add_argument("--doc", type=Path)
    arguments = parser.parse_args()
    data = ClipData.load(arguments.clips)
    processor: Any = AutoProcessor.from_pretrained(arguments.model)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=resolve_dtype("auto")).eval()
    held_out, known = data.indices(True).tolist(), data.indices(False).tolist()
    sets = [
        scored(model, processor, shown(data, held_out, count, 0), f"{count} frames, as they are") for count in (8, 16, 64)
    ]
    sets.append(scored(model, processor, shown(data, held_out, 16, VIEWS), f"16 frames, {VIEWS} random views each"))
    names = {"held out": named(model, processor, data, held_out), "training": named(model, processor, data, known)}
    for part, counts in names.items():
        print(f"{part}: {counts['names']} names and {counts['groups']} groups right of {counts['concepts']} concepts")
    result = {"device": device_kind("cpu"), "dtype": str(model.dtype).removeprefix("torch."), "torch": torch.__version__}
    result |= {"sets": sets, "names": names}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.doc is not None:
        renew(arguments.doc, in_words(result))


if __name__ == "__main__":
    main()
