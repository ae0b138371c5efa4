"""Write docs/benchmarks.md from the figures in benchmarks/results/*.json; conf.py calls it before every build."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEAD = """# Benchmarks

Each figure is from one run of a script in `benchmarks/`, which measures two ways or more side by side and writes JSON;
only what the mutation run's first tests had missed was run again, with the tests that were added for it.
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
        lines += [*(f"- {spaced(name)}: {shown(value)}" for name, value in single.items()), ""]
    for rows in tables(content):
        lines += [*rows, ""]
    lines += [f"All figures: [{file.name}](../{file.relative_to(ROOT)})", ""]
    return "\n".join(lines)


def scripts() -> list[Path]:
    """Longest names first."""
    found = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]
    return sorted(found, key=lambda path: -len(path.stem))


def tables(content: dict[str, Any]) -> list[list[str]]:
    """Groups of numbers with the same names share a table. Wide ones and those below two levels are left out."""
    plain: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}  # names of the numbers: group: its numbers
    nested: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for name, value in content.items():
        if isinstance(value, list):  # of one group for each model
            value = {next(iter(each.values())): each for each in value if isinstance(each, dict)}
        if not isinstance(value, dict) or not value:
            continue
        if len(figures := numbers(value)) == len(value):
            plain.setdefault(tuple(figures), {})[name] = figures
            continue
        inner = {f"{name}, {key}": group for key, group in value.items() if isinstance(group, dict)}
        for key, group in {name: value, **inner}.items():
            if figures := numbers(group):
                nested.setdefault(tuple(figures), {})[key] = figures
    turned = [{row: {name: g[row] for name, g in groups.items()} for row in rows} for rows, groups in plain.items()]
    found = [*turned, *nested.values()]
    return [table(rows) for rows in found if len(next(iter(rows.values()))) <= MOST_COLUMNS]


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each row, a column for each of its figures."""
    columns = next(iter(rows.values()))
    return [
        f"| | {' | '.join(map(spaced, columns))} |",
        f"|---|{'---:|' * len(columns)}",
        *(f"| {spaced(name)} | {' | '.join(map(shown, row.values()))} |" for name, row in rows.items()),
    ]


def numbers(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def spaced(name: str) -> str:
    return name.replace("_", " ")


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    main()
