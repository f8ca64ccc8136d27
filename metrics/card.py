"""The evaluation card: everything that the numbers of a table depend on, as JSON beside the pictures."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from arsd.metrics.drawing import STREAM, DrawPlan
from arsd.metrics.judge import Judge
from arsd.provenance import weights_hash
from arsd.run_folders import write_atomically

PACKAGES = ("torch", "torchvision", "transformers", "diffusers", "torchmetrics", "torch-fidelity", "pillow", "numpy")


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on, as installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def drawing_card(pipe: Any, plan: DrawPlan) -> dict[str, Any]:
    """How the pictures were drawn.

    Args:
        pipe: the pipeline.
        plan: prompts, seeds, batch, sampling.
    """
    from arsd.devices import device_kind, dtype_name

    drafter = getattr(pipe, "drafter", None)
    law = pipe.law_config(plan.sampling)
    return {
        "model": Path(str(pipe.config.get("_name_or_path") or "")).name or type(pipe).__name__,
        "model_hash": pipe.model_hash,
        "drafter_hash": None if drafter is None else weights_hash(drafter),
        "pictures": len(plan.inputs),
        "inputs_sha256": plan.inputs_hash,
        "guidance_scale": law.guidance_scale,
        "sampling": {"temperature": law.temperature, "top_k": law.top_k, "top_p": law.top_p},
        "seeds": {
            "seed": plan.seed,
            "rule": f"picture i has the seed seed + i + {STREAM} * stream; seed-exact strategies share stream 0, the others "
            "and the controls have one each (run.json)",
        },
        "batch": plan.batch,
        "dtype": dtype_name(pipe),
        "device": pipe.device.type,
        "device_kind": device_kind(pipe.device),
        "threads": torch.get_num_threads(),
        "image_format": "png",
    }


def make_card(judge: Judge, rows: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The card of a table.

    Args:
        judge: networks, resizer, reference.
        rows: of the table.
        more: what else belongs to it (drawing, protocol, tests, notes).
    """
    import arsd

    card = {"arsd": arsd.__version__, "versions": versions(), **judge.describe(), **more, "rows": list(rows)}
    biased = [row.get("decoder") or row.get("folder") for row in rows if row.get("FID biased")]
    flags = [f"FID of {len(biased)} rows is biased: fewer pictures than features ({judge.features.dim})"] if biased else []
    return {**card, "flags": flags}


def write_card(path: Path, card: dict[str, Any]) -> None:
    """Write a card, whole or not at all.

    Raises:
        DataError: when it cannot be written.
    """
    write_atomically(path, json.dumps(card, indent=1, ensure_ascii=False, allow_nan=True) + "\n")
