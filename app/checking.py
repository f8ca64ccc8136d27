"""Is a picture that somebody uploads the plain AR sample of its seed?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from arsd.app.service import Run, Service
from arsd.devices import DTYPES, dtype_name
from arsd.errors import ArsdError
from arsd.provenance import read_png

MANY_WEIGHTS = 200_000_000  # a model of fewer is loaded once more where a picture was made in another dtype

MEANING = {
    "verified": "Recomputed from its record: every token is the one that plain AR draws with this prompt and seed.",
    "refuted": "Recomputed from its record: it is not what plain AR draws with this prompt and seed.",
    "unknown": "It cannot be recomputed here.",
}


def check(service: Service, run: Run, file: Path) -> dict[str, Any]:
    """What can be said of a PNG file: :class:`arsd.verification.Verification` as a dictionary, and its ``record``."""

    def work() -> dict[str, Any]:
        try:
            record = read_png(file)
        except ArsdError:
            record = {}
        found = _pipe_for(service, str(record.get("dtype"))).verify(str(file)).as_dict()
        kept = {key: value for key, value in record.items() if key != "tokens"}
        del found["path"]  # clients take what has a path for a file to fetch
        return {"file": file.name, **found, "meaning": MEANING[found["result"]], "record": kept}

    return service.call(run, work)


def _pipe_for(service: Service, dtype: str) -> Any:
    """The pipeline in the dtype of a picture: the one at hand, or a small one loaded once more."""
    pipe = service.pipe
    weights = sum(
        p.numel() for part in pipe.components.values() if isinstance(part, torch.nn.Module) for p in part.parameters()
    )
    if dtype == dtype_name(pipe) or dtype not in DTYPES or weights > MANY_WEIGHTS or service.reload is None:
        return pipe
    return service.reload(DTYPES[dtype])
