"""The shape of the project: which file may import which, what is imported late, how long a file may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = [*ROOT.glob("*.py"), *(path for path in ROOT.glob("serving/*.py") if path.stem != "__init__")]
MODULES = {str(path.relative_to(ROOT).with_suffix("")): path for path in FILES}
LATE = {"wandb", "fastchat", "datasets", "alpaca_eval", "openai", "matplotlib"}


def top_level_imports(path):
    """What a file imports as it is imported: this project's files as in MODULES, other packages by name."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "serving":
            yield from (f"serving/{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = node.module.replace(".", "/")
            yield name if name in MODULES else name.split("/")[0]


def test_imports_follow_the_readme_downwards():
    """A file imports only files that stand below it in the README's list."""
    order = re.findall(r"^\| `([\w/]+)\.py` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(order) == sorted(MODULES)
    for name, path in MODULES.items():
        for imported in set(top_level_imports(path)) & MODULES.keys():
            assert order.index(imported) > order.index(name), f"{name} imports {imported}"


def test_optional_packages_are_imported_late():
    for name, path in MODULES.items():
        assert not set(top_level_imports(path)) & LATE, name


def test_decoding_and_training_need_only_torch_and_transformers():
    """They import where hydra, FastChat, datasets and wandb are not installed."""
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(LATE | {"hydra", "omegaconf"})}:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import decoding, losses, par, streaming, trainers
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_command_is_checked_before_anything_heavy_loads():
    """What is wrong with a command line is said once torch is there, without waiting for all the rest."""
    heavy = ["transformers", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", *LATE]
    code = f"""
import sys, pipeline, train
train.recipes.resolve(['experiment=demo'])
print(*sys.modules.keys() & set({heavy}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_files_stay_small():
    for path in MODULES.values():
        assert len(path.read_text().splitlines()) <= 450, path.name


def test_nothing_private_is_tracked():
    """No machine's address (but loopback's) or proxy and no key in code, configuration or scripts."""
    private = re.compile(
        r"\b(?!127\.0\.0\.1\b)(?:10|127|172|192)\.\d+\.\d+\.\d+\b|sk-[A-Za-z0-9]{20}|hf_[A-Za-z0-9]{20}|_proxy="
    )
    paths = [*MODULES.values(), *ROOT.glob("config/**/*.yaml"), *ROOT.glob("bin/*.sh"), *ROOT.glob("*.md")]
    for path in paths:
        assert not private.search(path.read_text()), path
