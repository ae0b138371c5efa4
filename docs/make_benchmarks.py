"""Write docs/benchmarks.md from the figures in benchmarks/results/*.json; conf.py calls it before every build."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEAD = """# Benchmarks

Each figure is from one run of a script in `benchmarks/`, which measures two ways or more side by side and writes JSON.
Absolute times are those of the machine named; ratios are what counts. This page is made from the JSON files.
"""
MOST_COLUMNS = 8


def main() -> None:
    parts = [HEAD, *(section(file) for file in sorted((ROOT / "benchmarks" / "results").glob("*.json")))]
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(parts), encoding="utf-8")


def section(file: Path) -> str:
    """What one file says: its script's first sentence, where it was measured, and its numbers."""
    content = json.loads(file.read_text(encoding="utf-8"))
    setting = content.pop("setting", {})
    lines = [f"## {file.stem.replace('_', ' ').capitalize()}", ""]
    script = next((path for path in scripts() if file.stem.startswith(path.stem)), None)
    if script is not None:
        summary = (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
        lines += [f"{' '.join(summary.split())} (`{script.relative_to(ROOT)}`)", ""]
    versions = ", ".join(f"{name} {version}" for name, version in setting.get("versions", {}).items())
    where = [setting.get("processor"), f"{setting.get('threads')} threads", setting.get("gpu"), versions]
    lines += [f"*{'; '.join(each for each in where if each)}; commit {str(setting.get('commit'))[:7]}*", ""]
    single = {name: value for name, value in content.items() if not isinstance(value, (dict, list))}
    if single:
        lines += [*(f"- {name.replace('_', ' ')}: {shown(value)}" for name, value in single.items()), ""]
    for name, value in content.items():
        if isinstance(value, dict) and (rows := table(value)):
            lines += [f"### {file.stem.replace('_', ' ').capitalize()}: {name.replace('_', ' ')}", "", *rows, ""]
    return "\n".join(lines)


def scripts() -> list[Path]:
    """Longest names first."""
    found = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]
    return sorted(found, key=lambda path: -len(path.stem))


def table(values: dict[str, Any]) -> list[str]:
    """A line for each number, or for each group of numbers with a column for each of them; deeper ones are left out."""
    if all(not isinstance(value, (dict, list)) for value in values.values()):
        return ["| | |", "|---|---:|", *(f"| {name.replace('_', ' ')} | {shown(v)} |" for name, v in values.items())]
    groups = {name: flat for name, value in values.items() if isinstance(value, dict) and (flat := numbers(value))}
    columns = list(dict.fromkeys(column for group in groups.values() for column in group))
    if not columns or len(columns) > MOST_COLUMNS:
        return []
    return [
        f"| | {' | '.join(column.replace('_', ' ') for column in columns)} |",
        f"|---|{'---:|' * len(columns)}",
        *(
            f"| {name.replace('_', ' ')} | {' | '.join(shown(g.get(c, '')) for c in columns)} |"
            for name, g in groups.items()
        ),
    ]


def numbers(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if isinstance(value, (int, float, str))}


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
