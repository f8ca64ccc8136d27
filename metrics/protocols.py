"""Protocols: what a paper generated and measured, one small file each in ``presets/``.

A protocol states how many pictures of which prompts are drawn, what they are compared with, how both are resized, and which
networks judge. Files that cannot be shipped (COCO, PartiPrompts, statistics of ImageNet) are read from a folder of the user.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arsd.errors import DataError, InputError

PRESETS = Path(__file__).resolve().parent / "presets"


@dataclass(frozen=True)
class Protocol:
    """One way to evaluate.

    Args:
        name: what it is called on the command line.
        title: whose it is.
        pictures: N.
        prompts: where prompts come from: ``source`` (a key of :data:`SOURCES`) and its options.
        reference: real pictures or their statistics: ``path`` below the data folder and ``get``, how to get them; for the
            pictures that ship with the model, ``shipped``.
        resizer: of generated pictures, e.g. ``lanczos-256``.
        reference_resizer: of real ones.
        features: extractor of FID and its relatives.
        scorer: of the CLIP score; ``None``: the protocol has none.
        prefix: what is put before each prompt for the CLIP score.
        sampling: guidance_scale and the like, where the paper fixes them.
        decoders: strategies that are compared when none are named.
        notes: where numbers made here may differ from published ones, and why.
    """

    name: str
    title: str
    pictures: int
    prompts: dict[str, Any]
    reference: dict[str, Any]
    resizer: str = "none"
    reference_resizer: str = "none"
    features: str = "inception"
    scorer: str | None = None
    prefix: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    decoders: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, name: str) -> Protocol:
        """A preset by name, or a file of the same form.

        Raises:
            InputError: when there is no such preset or file.
            DataError: when the file is damaged.
        """
        path = Path(name) if name.endswith(".json") else PRESETS / f"{name}.json"
        if not path.is_file():
            raise InputError(f"no protocol {name!r}: choose from {', '.join(protocol_names())}, or give a .json file")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values |= {key: tuple(values.get(key, ())) for key in ("decoders", "notes")}
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} is no protocol: {error}") from None

    def inputs(self, data: Path | None, model: str, count: int | None = None) -> list[str | int]:
        """The prompt or class label of each picture.

        Args:
            data: the user's folder.
            model: whose own prompts to take, for ``reference`` and ``reference-concepts``.
            count: another N than the protocol's.

        Raises:
            DataError: when a file is missing: one line that says what to download and where to put it.
        """
        source = self.prompts.get("source")
        if source not in SOURCES:
            raise DataError(f"protocol {self.name}: prompts.source must be one of {', '.join(SOURCES)}, not {source!r}")
        found = SOURCES[source](self, data, model, count or self.pictures)
        if len(found) < (count or self.pictures):
            raise DataError(f"protocol {self.name} needs {count or self.pictures} prompts, and there are {len(found)}")
        return found[: count or self.pictures]

    def reference_path(self, data: Path | None, model: str) -> Path:
        """The real pictures, or their statistics.

        Raises:
            DataError: as :meth:`inputs`.
        """
        if self.reference.get("shipped"):
            from arsd.metrics.reference import find_reference

            return find_reference(model).path
        return self.file(data, self.reference)

    def file(self, data: Path | None, wanted: dict[str, Any]) -> Path:
        """A file or folder below the user's data folder.

        Raises:
            DataError: when it is not there.
        """
        how = f"download {wanted['get']} and put {wanted['path']} there"
        if data is None:
            raise DataError(f"protocol {self.name} needs --data FOLDER: {how}")
        if not (data / wanted["path"]).exists():
            raise DataError(f"protocol {self.name}: {data / wanted['path']} is missing: {how}")
        return data / wanted["path"]


def protocol_names() -> list[str]:
    """All presets."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def _coco(protocol: Protocol, data: Path | None, model: str, count: int) -> list[str | int]:
    """Captions of a COCO annotation file: each picture's longest (``pick: longest``) or first one, by picture id."""
    path = protocol.file(data, protocol.prompts)
    try:
        captions: dict[int, list[str]] = {}
        for row in sorted(json.loads(path.read_text(encoding="utf-8"))["annotations"], key=lambda row: row["id"]):
            captions.setdefault(row["image_id"], []).append(" ".join(row["caption"].split()))
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is no COCO caption file (annotations with id, image_id and caption)") from None
    pick: Callable[[list[str]], str] = (lambda c: max(c, key=len)) if protocol.prompts.get("pick") == "longest" else _first
    return [pick(captions[image]) for image in sorted(captions)]


def _first(captions: list[str]) -> str:
    return captions[0]


def _parti(protocol: Protocol, data: Path | None, model: str, count: int) -> list[str | int]:
    """The column Prompt of PartiPrompts.tsv."""
    path = protocol.file(data, protocol.prompts)
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or not rows[0].get("Prompt"):
        raise DataError(f"{path} has no column Prompt: it should be PartiPrompts.tsv as published")
    return [row["Prompt"] for row in rows]


def _classes(protocol: Protocol, data: Path | None, model: str, count: int) -> list[str | int]:
    """Class labels 0 ... n - 1 in turn, equally often."""
    classes = int(protocol.prompts["classes"])
    return [i % classes for i in range(count)]


def _reference(protocol: Protocol, data: Path | None, model: str, count: int) -> list[str | int]:
    """The caption of every reference picture of the model."""
    from arsd.metrics.reference import find_reference

    return list(find_reference(model).captions)


def _concepts(protocol: Protocol, data: Path | None, model: str, count: int) -> list[str | int]:
    """One caption each of concepts drawn from the model's reference pictures."""
    from arsd.metrics.reference import find_reference

    return list(find_reference(model).draw_captions(count, int(protocol.prompts.get("seed", 0))))


SOURCES: dict[str, Callable[[Protocol, Path | None, str, int], list[str | int]]] = {
    "coco": _coco,
    "parti": _parti,
    "classes": _classes,
    "reference": _reference,
    "reference-concepts": _concepts,
}
