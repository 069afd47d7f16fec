"""Check this interpreter's version and packages, before anything is imported that may be missing.

    python -m ram.environment [dev]     exit code 0 if the versions are those of requirements.txt, else 1

Standard library only, and readable by older Pythons, so that they can be refused in one line.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

OLDEST = (3, 11)
ROOT = Path(__file__).resolve().parents[1]
PIN = re.compile(r"^([\w.-]+)(?:\[\w+\])?==([\w.]+)$")


def pins(extra: str = "") -> dict[str, str]:
    """Return package -> version of requirements.txt and, if named, of an extra of pyproject.toml."""
    path = ROOT / "requirements.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []  # none beside a wheel
    if extra:
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        lines += project["optional-dependencies"][extra]
    found = (PIN.match(line.strip()) for line in lines)
    return {match[1]: match[2] for match in found if match}


def installed(name: str) -> str | None:
    """Return the version of an installed package, None if it is missing."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def differing(extra: str = "") -> dict[str, str | None]:
    """Return package -> installed version, or None, of each package that differs from its pin."""
    found = {name: (installed(name), pin) for name, pin in pins(extra).items()}
    # A build such as 2.13.0+cpu is of version 2.13.0.
    return {name: has for name, (has, pin) in found.items() if has is None or has.partition("+")[0] != pin}


def remedy() -> str:
    """Return what to do to get an environment that is complete."""
    if (ROOT / ".venv" / "bin" / "python").exists():
        return f"run `source {ROOT / '.venv/bin/activate'}` first"
    return "run `bash bin/demo.sh`, which makes .venv, or `pip install -r requirements.txt`"


def refusal() -> str | None:
    """Return the line that refuses this interpreter, None if the commands can run in it."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST:
        return f"{sys.executable} is Python {version}: expected 3.11 or newer; {remedy()}"
    missing = [name for name, version in differing().items() if version is None]
    if missing:
        others = f" and {len(missing) - 3} more" if len(missing) > 4 else ""
        names = ", ".join(missing[:3] if others else missing)
        return f"{sys.executable} lacks {names}{others} of requirements.txt: {remedy()}"
    return None


def note() -> str | None:
    """Return a line about versions that differ from requirements.txt, None if none does."""
    expected = pins()
    names = [f"{name} {version} instead of {expected[name]}" for name, version in differing().items()]
    return f"not the tested versions: {', '.join(names)}" if names else None


def check() -> None:
    """Exit with code 2 and one line if the commands cannot run in this interpreter."""
    line = refusal()
    if line is not None:
        sys.stderr.write(f"error: {line}\n")
        sys.exit(2)


if __name__ == "__main__":
    problem = refusal()
    if problem is None and differing(*sys.argv[1:]):
        problem = f"{sys.executable}: {', '.join(differing(*sys.argv[1:]))} differ from the pins; {remedy()}"
    if problem is not None:
        sys.stderr.write(f"{problem}\n")
        sys.exit(1)
