"""The shape of the project: import order, late imports, file sizes, private strings."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [*ROOT.glob("*.py"), *(path for path in ROOT.glob("ram/**/*.py") if path.stem != "__init__")]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
LATE = {"wandb", "fastchat", "datasets", "alpaca_eval", "openai", "matplotlib"}


def imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The full name of every module that is imported; for `from package import module`, the module's."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            modules = [name for alias in node.names if (name := f"{node.module}.{alias.name}") in MODULES]
            yield from modules or [node.module]


@functools.cache
def layers() -> dict[str, int]:
    """Room or top-level file -> its line in the import order of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = text.split("## Import order")[1].split("```")[1]
    return {room: line for line, rooms in enumerate(block.split("\n")) for room in rooms.split(", ") if room}


def room(module: str) -> str:
    """`ram.decoding.par` -> `ram.decoding`; a top-level file, or a module in the order, is its own room."""
    return module if module in layers() else ".".join(module.split(".")[:2])


def upward_imports(module: str, source: str, order: dict[str, int]) -> list[str]:
    """The imports of a module's source, at any depth, that do not point to a lower line of the order."""
    own = room(module)
    imported = {name for name in imports(ast.walk(ast.parse(source))) if room(name) in order}
    return sorted(name for name in imported if room(name) != own and order[room(name)] <= order[own])


def test_every_module_is_in_the_import_order():
    order = layers()
    assert {room(module) for module in MODULES} == set(order)


def test_imports_point_downwards():
    order = layers()
    upward = {name: upward_imports(name, path.read_text(), order) for name, path in MODULES.items()}
    assert {name: found for name, found in upward.items() if found} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from ram.serving import api",
        "import ram.serving.api",
        "def late():\n    from ram.serving.api import create_app",
        "if TYPE_CHECKING:\n    import trainers",
    ],
)
def test_upward_imports_are_detected_at_any_depth(source):
    assert upward_imports("ram.decoding.par", source, layers())


def test_package_files_are_empty():
    contents = {path: path.read_text() for path in ROOT.glob("ram/**/__init__.py")}
    assert {str(path.relative_to(ROOT)) for path, text in contents.items() if text} <= {
        "ram/decoding/__init__.py"
    }


def test_optional_packages_are_imported_late():
    for name, path in MODULES.items():
        top_level = {module.split(".")[0] for module in imports(iter(ast.parse(path.read_text()).body))}
        assert not top_level & LATE, name


def test_decoding_and_training_need_only_torch_and_transformers():
    """They can be imported if hydra, FastChat, datasets and wandb are not installed."""
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(LATE | {"hydra", "omegaconf", "pydantic"})}:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import trainers
from ram.decoding import generation, par
from ram.serving.fastchat import stream
from ram.training import losses
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_checking_a_server_loads_no_training():
    code = """
import sys
from ram.settings import serving
serving.read_settings(["proposal=x"])
print(*(name for name in sys.modules if name.startswith(("ram.training", "ram.settings.schema", "train"))))
import serve
print(*(name for name in sys.modules if name.startswith(("ram.training", "ram.settings.schema", "train"))))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n\n", "")


def test_commands_are_checked_before_heavy_imports():
    """A wrong command line is reported once torch is loaded, before anything slower is imported."""
    heavy = ["transformers", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", *LATE]
    code = f"""
import sys, pipeline, train
train.recipes.resolve(['experiment=demo'], train.TABLES)
print(*sys.modules.keys() & set({heavy}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_files_stay_small():
    for path in MODULES.values():
        assert len(path.read_text().splitlines()) <= 450, path.name


def test_nothing_private_is_tracked():
    """No machine address (except loopback), proxy or key in code, configuration, documents or scripts."""
    private = re.compile(
        r"\b(?!127\.0\.0\.1\b)(?:10|127|172|192)\.\d+\.\d+\.\d+\b|sk-[A-Za-z0-9]{20}|hf_[A-Za-z0-9]{20}|_proxy="
    )
    patterns = ["config/**/*.yaml", "bin/*.sh", "*.md", "docs/*.md"]
    paths = [*MODULES.values(), *(path for pattern in patterns for path in ROOT.glob(pattern))]
    for path in paths:
        assert not private.search(path.read_text()), path


def test_laws_need_only_torch():
    """`ram.decoding.par` loads without transformers; the package's public names are resolved on first use."""
    code = """
import sys
import ram.decoding.par
assert "transformers" not in sys.modules
from ram.decoding import Generation, PARParams, generate, generate_iter
from ram.decoding import generation
assert generate is generation.generate and "transformers" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
