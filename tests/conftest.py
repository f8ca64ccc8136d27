"""Fixtures of several files; lets tests import their helpers (tiny_pipeline, ...) and the benchmarks by name."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # needed under --import-mode=importlib
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))


@pytest.fixture
def own_registry(monkeypatch):
    """What a test registers or imports is gone after it."""
    from arsd.decoding import registry

    for name in ("DRAFTERS", "RULES"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    yield
    for name in [name for name in sys.modules if name.startswith("arsd_plugin_")]:
        del sys.modules[name]


@pytest.fixture
def small_suite(monkeypatch):
    """One family of worlds of five, fewer laws, windows, paths and samples: enough for what is wrong everywhere."""
    from arsd.exactness import suite

    name = "guided with forbidden ids"
    monkeypatch.setattr(suite, "WORLDS", {name: suite.WORLDS[name]})
    monkeypatch.setattr(suite, "LAWS", ["plain", "top-k"])
    monkeypatch.setattr(suite, "WINDOWS", [1, 2, 7, 20])
    monkeypatch.setattr(suite, "PATHS", 5_000)
    monkeypatch.setattr(suite, "QUICK_SEQUENCES", 4_000)


@pytest.fixture
def command(capsys):
    """``command("check-rule", ...)`` gives (status, stdout, lines of stderr)."""
    from arsd.cli import main

    def call(*words):
        capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, [line for line in err.splitlines() if line.strip()]

    return call


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """Tiny published checkpoints of the families whose codes are words (:mod:`families`)."""
    from families import Samples

    return Samples(tmp_path_factory.mktemp("families"))


@pytest.fixture
def quiet_transformers():
    """Transformers says errors only, as long as the test runs."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)
