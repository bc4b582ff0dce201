"""The repository keeps to its architecture: who may import whom, and what is written down."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("golden", "impl", "conformance", "reports")


def _allowed_arrows() -> dict[str, set[str]]:
    """Read the table of arrows in ARCHITECTURE.md: `| room | may import |`."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)/` \| (.*?) \|", text, flags=re.MULTILINE)
    return {room: set(re.findall(r"`(\w+)`", cell)) for room, cell in rows}


def _imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found & set(ROOMS)


def test_architecture_lists_the_arrows_of_every_room() -> None:
    assert set(_allowed_arrows()) == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_the_architecture_allows(room: str) -> None:
    allowed = _allowed_arrows()[room] | {room}
    broken = {
        str(path.relative_to(ROOT)): extra
        for path in (ROOT / room).rglob("*.py")
        if (extra := _imported_rooms(path) - allowed)
    }
    assert not broken


def test_golden_and_impl_import_nothing_of_each_other() -> None:
    arrows = _allowed_arrows()
    assert arrows["golden"] == set()
    assert arrows["impl"] == set()


@pytest.mark.parametrize("module", ["golden", "reports.html", "conformance.cases"])
def test_importing_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_every_module_has_its_line_in_the_architecture() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py|[\w/]+/)`", text))
    missing = [
        str(path)
        for room in ROOMS
        for path in sorted(p.relative_to(ROOT) for p in (ROOT / room).rglob("*.py"))
        if path.name != "__init__.py"
        and str(path) not in named
        and not any(f"{parent}/" in named for parent in path.parents if len(parent.parts) > 1)
    ]
    assert not missing


def test_readme_commands_are_marked_for_the_checks_that_run_them() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("main job", "tests"):
        block = text.partition(f"<!-- {name} -->")[2].partition("<!-- end -->")[0]
        assert block.count("```sh") == 1, f"README must hold one command between the {name} marks"
        assert "python3 -m venv" in block
