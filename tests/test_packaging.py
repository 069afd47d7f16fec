"""An installed copy of `ram`: what a wheel contains, and that it works from any folder."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
USE = """
import sys
import ram
from ram.decoding import Generation, PARParams, generate, generate_iter
from ram.evaluation.report import page
from ram.serving import api
assert page.STYLE and page.SCRIPT
for name in api.PAGE_FILES.values():
    assert (api.PAGE / name).read_text(encoding="utf-8")
print(PARParams(sample_mode="par").sample_mode, *{*ram.__path__, str(api.PAGE), str(page.PAGE)}, sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the tracked files, built offline: a build leaves folders beside its sources."""
    pytest.importorskip("setuptools")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "pyproject.toml", "ram"]
    names = subprocess.run([*tracked, "README.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(target), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_wheel_contains_the_library_alone(wheel):
    """Every file of ram/ is in the wheel, and nothing else but the wheel's own records."""
    assert wheel.name.startswith(f"residual_alignment_model-{PROJECT['project']['version']}-")
    names = zipfile.ZipFile(wheel).namelist()
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "ram").rglob("*") if path.is_file()}
    expected = {name for name in files if "__pycache__" not in name}
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_installed_copy_works_from_another_folder(wheel, tmp_path):
    """It decodes, and it reads the page, template and style files of the copy."""
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(installed)
    code = f"import sys; sys.path.insert(0, {str(installed)!r})\n{USE}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    mode, *places = done.stdout.splitlines()
    assert mode == "par" and all(place.startswith(str(installed)) for place in places)


def test_importing_the_distributions_loads_torch_alone():
    """vLLM's worker processes import `ram.decoding.par`."""
    code = "import sys, ram.decoding.par; print(*sys.modules.keys() & {'transformers', 'ram.log', 'hydra'})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_unknown_public_name_is_an_attribute_error():
    import ram.decoding

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ram.decoding.nothing  # noqa: B018


def test_requirements_are_exact_pins():
    """Every line of the running set and of the extras names one version."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    for extra in PROJECT["project"]["optional-dependencies"].values():
        pins += extra
    assert all(re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+", pin) for pin in pins), pins
    assert len({pin.split("==")[0].lower() for pin in pins}) == len(set(pins))


def test_lock_has_every_pin_with_hashes():
    """requirements.lock names the versions of requirements.txt; torch and CUDA packages differ by machine."""
    pin = re.compile(r"^([\w.-]+)==([^\s;]+)", re.MULTILINE)

    def pins(name):
        text = (ROOT / name).read_text(encoding="utf-8")
        return {package.replace("_", "-"): version for package, version in pin.findall(text)}

    wanted, locked = pins("requirements.txt"), pins("requirements.lock")
    assert wanted.pop("torch") and len(locked) > 80
    assert {package: locked.get(package) for package in wanted} == wanted
    assert not [name for name in locked if re.match(r"torch$|triton|nvidia-|cuda-", name)]
    lock = re.sub(r"^#.*\n", "", (ROOT / "requirements.lock").read_text(encoding="utf-8"), flags=re.MULTILINE)
    entries = lock.replace("\\\n", " ").splitlines()
    assert len(entries) == len(locked) and all("--hash=sha256:" in entry for entry in entries)
    assert not re.search(r"://|^\s*-", lock.replace("    --hash=sha256:", ""), re.MULTILINE)
