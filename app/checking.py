"""Is a picture that somebody uploads the plain AR sample of its seed?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from arsd.app.service import Limits, Run, Service
from arsd.devices import DTYPES, dtype_name
from arsd.errors import ArsdError, InputError
from arsd.provenance import read_png
from arsd.verification import Verification

MOST_SLOTS = 4096  # of a prompt
MANY_WEIGHTS = 200_000_000  # a model of fewer is loaded once more where a picture was made in another dtype

MEANING = {
    "verified": "Recomputed from its record: every token is the one that plain AR draws with this prompt and seed.",
    "refuted": "Recomputed from its record: it is not what plain AR draws with this prompt and seed.",
    "unknown": "It cannot be recomputed here.",
}


def check(service: Service, run: Run, file: Path) -> dict[str, Any]:
    """What can be said of a PNG file: :class:`arsd.verification.Verification` as a dictionary, and its ``record``.

    Raises:
        InputError: when it was stopped.
    """

    def work() -> dict[str, Any]:
        try:
            record = read_png(file)
        except ArsdError:
            record = {}
        if reason := _too_much(record, service.limits):
            found = Verification("", "unknown", reason).as_dict()
        else:
            pipe = _pipe_for(service, record)
            found = pipe.verify(str(file), on_round=lambda round: run.over()).as_dict()
        if run.reason:
            raise InputError(f"cut short ({run.reason}): nothing can be said")
        del found["path"]  # clients take what has a path for a file to fetch
        found["reason"] = found["reason"].replace(str(file), file.name)
        kept = {key: value for key, value in record.items() if key != "tokens"}
        return {"file": file.name, **found, "meaning": MEANING[found["result"]], "record": _plain(kept)}

    return service.call(run, work)


def _too_much(record: dict[str, Any], limits: Limits) -> str:
    """Why this server does not recompute a picture, or ``""``: what that takes is what its record says."""
    for name, most in (("batch", limits.pictures), ("pass_tokens", limits.pass_tokens), ("slots", MOST_SLOTS)):
        value = record.get(name)
        if isinstance(value, int) and value > most:
            return f"it was made with {name} {str(value)[:12]}, and this server recomputes up to {most}: use arsd verify"
    return ""


def _pipe_for(service: Service, record: dict[str, Any]) -> Any:
    """The pipeline in the dtype of a picture: the one at hand, or a small one loaded once more."""
    pipe, dtype = service.pipe, str(record.get("dtype"))
    if dtype == dtype_name(pipe) or dtype not in DTYPES or service.reload is None:
        return pipe
    if not record.get("seed_exact") or record.get("model_hash") != pipe.model_hash:
        return pipe  # which says so at once
    parts = (part for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    if sum(p.numel() for part in parts for p in part.parameters()) > MANY_WEIGHTS:
        return pipe
    return service.reload(DTYPES[dtype])


def _plain(value: Any) -> Any:
    """A record as JSON of 64 bits can hold it."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, int) and abs(value) >= 2**63 else value
