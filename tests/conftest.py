"""Lets tests import their helpers (tiny_pipeline, reference_llamagen) by name under --import-mode=importlib."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
