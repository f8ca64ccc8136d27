"""Lets tests import their helpers (tiny_pipeline, ...) and the benchmarks by name under --import-mode=importlib."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
