"""The package imports from a wheel and from a bare clone, kernels included."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROBE = "import dlm_scale, dlm_scale.kernels.probe as p, dlm_scale.cli; print(dlm_scale.__file__, p.ANSWER)"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What a clone holds of the library, with one more kernel file to find again."""
    copy = tmp_path_factory.mktemp("clone") / "repository"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("dlm_scale", "kernels"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "kernels" / "probe.py").write_text("ANSWER = 42\n")
    return copy


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder]
    command = [sys.executable, "-m", "pip", "wheel", *options, clone]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return next(folder.glob("dlm_scale-*.whl"))


def run_from(path: Path, code: str) -> str:
    """Output of `code` in an interpreter that sees `path` and no other copy of the library."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r}); {code}"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_bare_clone_imports(clone):
    assert run_from(clone, PROBE).split() == [str(clone / "dlm_scale" / "__init__.py"), "42"]


def test_a_wheel_imports(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert run_from(tmp_path / "site", PROBE).split() == [str(tmp_path / "site" / "dlm_scale" / "__init__.py"), "42"]


def test_a_wheel_holds_every_module_the_command_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name.split("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
        assert "dlm = dlm_scale.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    library = [p for p in (ROOT / "dlm_scale").rglob("*.py") if ROOT / "dlm_scale" / "kernels" not in p.parents]
    expected = {str(p.relative_to(ROOT)) for p in library}
    expected |= {f"dlm_scale/kernels/{p.relative_to(ROOT / 'kernels')}" for p in (ROOT / "kernels").rglob("*.py")}
    assert expected <= set(names)
    assert f"{info}/licenses/LICENSE" in names
    assert not [name for name in names if name.startswith(("kernels/", "tests/"))]


def test_the_pins_cover_what_setup_asks_for():
    """Every requirement, but triton (its version is torch's choice) and the optional ones, is pinned."""
    pinned = {line.split("==")[0].lower() for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()}
    asked = requirements((ROOT / "setup.py").read_text())
    assert {"torch", "deepspeed", "pytest"} <= asked <= pinned | {"triton", "flash-attn", "wandb"}


def requirements(source: str) -> set[str]:
    import re

    return {name.lower() for name in re.findall(r'"([A-Za-z][\w-]*)>=', source)}
