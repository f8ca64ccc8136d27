"""The layout holds: links instead of copies, Hugging Face's tokenizers never shadowed, every install carries the model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import arsd

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("app", "metrics", "pipelines", "tokenizers")
MODEL = "arsd/checkpoints/"
IMPORTED = ("arsd", "arsd.decoding", "arsd.pipelines", "arsd.tokenizers.vq", "arsd.metrics")
MEGABYTE = 2**20


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def repository_files() -> list[Path]:
    """What git holds or would add, relative to the root; links are entries of their own, not followed."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of its files")
    # another user than the checkout's owner may run the tests, as CI machines do
    listing = run("git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    paths = sorted({Path(name) for name in listing.split("\0") if name})
    return [path for path in paths if os.path.lexists(ROOT / path)]


def model_files() -> dict[str, bytes]:
    """The shipped models and reference pictures: path from the root -> content."""
    files = {p.as_posix(): (ROOT / p).read_bytes() for p in repository_files() if p.as_posix().startswith(MODEL)}
    if not files:
        pytest.skip(f"{MODEL} does not exist yet")
    return files


# --- the layout ------------------------------------------------------------------------------------------------------


def test_hugging_face_tokenizers_work_from_the_root():
    # `import transformers` alone is lazy and would hide the breakage
    script = (
        "import json, tokenizers\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "words = tokenizers.models.WordLevel({'red': 0, 'apple': 1, '?': 2}, unk_token='?')\n"
        "tiny = tokenizers.Tokenizer(words)\n"
        "tiny.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()\n"
        "ids = PreTrainedTokenizerFast(tokenizer_object=tiny, unk_token='?')('red apple pie')['input_ids']\n"
        "print(json.dumps([tokenizers.__file__, ids]))\n"
    )
    file, ids = json.loads(run(sys.executable, "-c", script, cwd=ROOT, PYTHONPATH=str(ROOT)).splitlines()[-1])
    assert ids == [0, 1, 2]
    assert ROOT / "tokenizers" not in Path(file).resolve().parents
    assert {"site-packages", "dist-packages"} & set(Path(file).parts)


def test_tokenizers_has_no_init_file():
    assert not (ROOT / "tokenizers" / "__init__.py").exists()


@pytest.mark.parametrize("name", LINKED)
def test_package_folder_is_a_link_to_the_top(name):
    link = ROOT / "arsd" / name
    assert link.is_symlink(), f"{link} is not a symbolic link; check out with `git config core.symlinks true`"
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name).is_dir() and not (ROOT / name).is_symlink()


# --- what is committed -----------------------------------------------------------------------------------------------


def test_no_text_file_names_a_path_of_somebodys_machine():
    machine_path = re.compile(r"[^a-zA-Z0-9_.]/(work|tmp|root|farm)/")
    found = []
    for path in repository_files():
        full = ROOT / path
        content = b"" if full.is_symlink() or full.stat().st_size > 2 * MEGABYTE else full.read_bytes()
        if b"\0" in content[:8192]:
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            if machine_path.search(" " + line):
                found.append(f"{path}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_no_large_file_but_the_weights():
    sizes = {path.as_posix(): (ROOT / path).lstat().st_size for path in repository_files()}
    weights = {path: size for path, size in sizes.items() if path.startswith("arsd/checkpoints/")}
    assert not {path: size for path, size in sizes.items() if size > 2 * MEGABYTE and path not in weights}
    assert sum(weights.values()) < 60 * MEGABYTE


def test_every_python_file_can_be_read_in_one_sitting():
    lengths = {p.as_posix(): len((ROOT / p).read_text().splitlines()) for p in repository_files() if p.suffix == ".py"}
    assert not {path: length for path, length in lengths.items() if length > 450}


# --- installs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A clean copy of the repository: no build folders, links kept as links."""
    copy = tmp_path_factory.mktemp("checkout")
    for path in repository_files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, copy / path, follow_symlinks=False)
    return copy


def build(source: Path, out: Path, *kinds: str) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", out, source, cwd=out.parent)


@pytest.fixture(scope="module")
def distributions(checkout, tmp_path_factory) -> dict[str, Path]:
    """The sdist, the wheel built from the checkout, and the wheel built from the unpacked sdist."""
    out = tmp_path_factory.mktemp("distributions")
    build(checkout, out / "direct", "--sdist", "--wheel")
    (sdist,) = (out / "direct").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    (unpacked,) = (out / "unpacked").iterdir()
    build(unpacked, out / "second", "--wheel")
    (wheel,), (second,) = (out / "direct").glob("*.whl"), (out / "second").glob("*.whl")
    return {"sdist": sdist, "wheel": wheel, "wheel from sdist": second}


def imports(python: str | Path, cwd: Path, **environment: str) -> dict[str, str]:
    """Import :data:`IMPORTED` in a fresh process; module name -> file (or folder, for a namespace package)."""
    script = (
        "import importlib, json, sys\n"
        "mods = {name: importlib.import_module(name) for name in sys.argv[1:]}\n"
        "print(json.dumps({name: mod.__file__ or list(mod.__path__)[0] for name, mod in mods.items()}))\n"
    )
    return json.loads(run(python, "-c", script, *IMPORTED, cwd=cwd, **environment).splitlines()[-1])


def wheel_contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "wheel from sdist"])
def test_wheel_imports_outside_the_checkout(distributions, kind, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, distributions[kind], cwd=elsewhere)
    files = imports(sys.executable, elsewhere, PYTHONPATH=str(target))
    assert all(target / "arsd" in Path(file).parents for file in files.values()), files


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "wheel from sdist"])
def test_wheel_holds_every_module_and_nothing_beside_arsd(distributions, kind):
    names = set(wheel_contents(distributions[kind]))
    top = {name.split("/")[0] for name in names}
    info = f"arsd-{arsd.__version__}.dist-info"  # the version of pyproject.toml is the one the package reports
    assert top == {"arsd", info}, top
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= names
    sources = {path.as_posix() for path in repository_files() if path.suffix == ".py"}
    modules = {path for path in sources if path.startswith("arsd/")}
    modules |= {f"arsd/{path}" for path in sources if path.split("/")[0] in LINKED}
    assert {name for name in names if name.endswith(".py")} == modules


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "wheel from sdist"])
def test_wheel_carries_the_model_byte_for_byte(distributions, kind):
    packed = wheel_contents(distributions[kind])
    assert {name: content for name, content in packed.items() if name.startswith(MODEL)} == model_files()
    presets = {f"arsd/{path.as_posix()}" for path in repository_files() if path.parent.as_posix() == "metrics/presets"}
    assert presets and presets == {name for name in packed if "/presets/" in name}
    assert {"arsd/app/style.css", "arsd/app/page.js"} <= set(packed)


@pytest.mark.slow
def test_sdist_carries_the_model_byte_for_byte(distributions):
    model, packed = model_files(), {}
    with tarfile.open(distributions["sdist"]) as archive:
        for member in archive.getmembers():
            name = member.name.partition("/")[2]
            if member.isfile() and name.startswith(MODEL):
                packed[name] = archive.extractfile(member).read()
    assert packed == model


@pytest.fixture(scope="module")
def editable(checkout, tmp_path_factory) -> Path:
    """The Python of an environment that sees this one's packages and has the copied checkout installed editable."""
    home = tmp_path_factory.mktemp("editable")
    run(sys.executable, "-m", "venv", "--without-pip", home / "venv", cwd=home)
    python = home / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    borrowed = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    Path(own, "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", checkout, cwd=home)
    return python


@pytest.mark.slow
def test_editable_install_imports_from_the_checkout(editable, checkout, tmp_path):
    files = imports(editable, tmp_path, PYTHONPATH="")
    assert all(checkout in Path(file).parents for file in files.values()), files


@pytest.mark.slow
def test_editable_install_finds_the_model(editable, checkout, tmp_path):
    model = model_files()
    script = "from importlib.resources import files; print(files('arsd').joinpath('checkpoints'))"
    folder = Path(run(editable, "-c", script, cwd=tmp_path, PYTHONPATH="").splitlines()[-1])
    assert checkout in folder.parents
    found = {MODEL + p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == model
