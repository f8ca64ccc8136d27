"""What making pictures and making clips have in common: where files go, and the account of what was made."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arsd.cli.common import table
from arsd.errors import InputError

Write = Callable[[Any, int, Path], dict[str, Any]]


def planned_paths(prompts: list[str], n: int, seed: int, out: Path) -> list[list[Path]]:
    """The file of every picture; two prompts with one slug are told apart by a number."""
    from arsd.provenance import slug

    seen: dict[str, int] = {}
    plan = []
    for prompt in prompts:
        name = slug(prompt)
        seen[name] = seen.get(name, 0) + 1
        name = name if seen[name] == 1 else f"{name}.{seen[name]}"
        plan.append([out / f"{name}-seed{seed}-{i}.png" for i in range(n)])
    return plan


def refuse_taken(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise InputError for a file that exists, before anything is made."""
    taken = [] if overwrite else [path for path in paths if path.exists()]
    if taken:
        raise InputError(f"{taken[0]} exists: choose another --out, or pass --overwrite")


def open_picture(path: str) -> Any:
    """A picture file, RGB.

    Raises:
        InputError: when it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}") from None


@dataclass
class Account:
    """What was made, prompt by prompt.

    Args:
        pipe: the pipeline that makes it.
        decoder: strategy, an object.
        seed: of every call.
        compare: whether plain AR makes everything once more, with the same seed.
        silent: show no progress.
    """

    pipe: Any
    decoder: Any
    seed: int
    compare: bool = False
    silent: bool = False
    entries: list[dict[str, Any]] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        off = True if self.silent else None  # None: on a terminal only
        self.pipe.set_progress_bar_config(disable=off, unit="token", leave=False)

    @classmethod
    def of(cls, arguments: argparse.Namespace, pipe: Any, decoder: Any) -> Account:
        """As the options of the command say."""
        return cls(pipe, decoder or pipe.decoder, arguments.seed, arguments.compare, arguments.json)

    def make(self, name: str, call: dict[str, Any], paths: Sequence[Path], write: Write) -> None:
        """Make what one prompt asks for, and write it.

        Args:
            name: of the prompt.
            call: arguments of the pipeline.
            paths: where each picture or clip goes.
            write: takes the output, the number of a picture or clip and its path, and says what a report shall say of the
                files that it wrote.
        """
        from arsd.provenance import picture_entry, tokens_sha256

        made = self._run(call, self.decoder)
        asked = call.get("prompt", call.get("class_labels"))
        told = {"prompt": None if asked is None else str(asked)}
        entries = [{**picture_entry(made, i), **told, **write(made, i, path)} for i, path in enumerate(paths)]
        self.entries += entries
        self.rows.append([name, str(self.decoder), *_figures(made.stats), ""])
        if not self.compare:
            return
        plain = self._run(call, "ar")
        for i, entry in enumerate(entries):
            changed = int((plain.tokens[i] != made.tokens[i]).sum())
            same = {"tokens_sha256": tokens_sha256(plain.tokens[i]), "changed_tokens": changed}
            entry["ar"] = {**picture_entry(plain, i), **same}
        differ = int((plain.tokens != made.tokens).sum())
        self.rows[-1][-1] = "same tokens" if not differ else f"{differ} of {plain.tokens.numel()} tokens differ"
        self.rows.append(["", "ar", *_figures(plain.stats), ""])

    def _run(self, call: dict[str, Any], decoder: Any) -> Any:
        import torch

        return self.pipe(**call, decoder=decoder, generator=torch.Generator().manual_seed(self.seed))

    def as_table(self) -> str:
        """For a reader."""
        return table(["prompt", "decoder", "passes", "tokens/pass", "seconds", "against plain AR"], self.rows)

    def as_json(self, model: str, weights: str | None, **more: Any) -> str:
        """For a program."""
        known = {"model": model, "model_hash": weights, "decoder": str(self.decoder), "lossless": self.decoder.lossless}
        return json.dumps({**known, "seed": self.seed, **more}, ensure_ascii=False)


def _figures(stats: Any) -> list[Any]:
    return [stats.forward_passes, f"{stats.tokens_per_pass:.2f}", f"{stats.total_seconds:.2f}"]
