"""A mutation run over the core: its code is changed in one small place at a time, and the tests should notice.

    python benchmarks/mutation.py  # 40 minutes on a busy core; writes results/mutation.json
    python benchmarks/mutation.py --survivors tests/test_noise.py  # those of the last run, by tests added there

Of each module a seeded sample of all changes is tried: a comparison, arithmetic or logical operator exchanged, a
condition negated, a number plus one, True for False, nothing returned, a call or a `raise` left out. Texts,
annotations, decorators and `strict=` of zip stay. First all tests run once under coverage. For each change those that
run the changed line follow, fastest first, in a fork of a process that has imported all libraries but ours.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import json
import os
import pickle
import random
import signal
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import RESULTS, write

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    *("attention", "adapter", "losses", "config", "noise", "error_bars", "sample_statistics", "monte_carlo", "engine"),
    *("label_map", "prediction", "lockstep", "joint_run", "joint", "injection", "segmentation"),
)
TESTS = (
    *("attention", "adapter", "losses", "config", "noise", "goldens", "error_bars", "label_map", "prediction"),
    *("monte_carlo", "mechanism", "refusals", "edges", "segmentation", "padding", "toolbox"),
)
PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:cov")
AT_MOST = 12.0  # seconds of tests for one change

_EXCHANGED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq, ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Is: ast.IsNot, ast.In: ast.NotIn,
    ast.Add: ast.Sub, ast.Mult: ast.Div, ast.And: ast.Or, ast.BitAnd: ast.BitOr,
}  # fmt: skip
_EXCHANGED |= {new: old for old, new in _EXCHANGED.items()} | {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult}
_UNTOUCHED = ("annotation", "returns", "decorator_list", "exc", "cause")  # fields of nodes


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of a node."""
    changed = copy.copy(node)
    match node:
        case ast.Compare(ops=[op]) if type(op) in _EXCHANGED:
            changed.ops = [_EXCHANGED[type(op)]()]
            yield changed
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in _EXCHANGED:
            changed.op = _EXCHANGED[type(op)]()
            yield changed
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.If(test=test) | ast.IfExp(test=test) if not isinstance(test, (ast.UnaryOp, ast.Compare)):
            changed.test = ast.UnaryOp(ast.Not(), test)
            yield changed
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield ast.Return(ast.Constant(None))
        case ast.Raise() | ast.Expr(value=ast.Call()):
            yield ast.Pass()


def changes(node: ast.AST, functions: tuple[ast.AST, ...] = ()) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
    """Make all changes within a tree, one after the other: the node before and after, and the functions around it."""
    functions = (node, *functions) if isinstance(node, ast.FunctionDef) else functions
    for field, value in ast.iter_fields(node):
        for place, old in enumerate(value if isinstance(value, list) else [value]):
            kept = field in _UNTOUCHED or not isinstance(old, ast.AST) or isinstance(old, ast.JoinedStr)
            if kept or getattr(old, "arg", "") in ("strict", "stacklevel"):
                continue
            for new in replacements(old):
                _put(node, field, place, ast.copy_location(new, old))
                yield old, new, functions
                _put(node, field, place, old)
            yield from changes(old, functions)


def _put(node: ast.AST, field: str, place: int, child: ast.AST) -> None:
    if isinstance(value := getattr(node, field), list):
        value[place] = child
    else:
        setattr(node, field, child)


class Mutant(NamedTuple):
    """The `index`-th change of a module. `spans` are the lines of what is changed, and of the functions around it."""

    module: str
    index: int
    change: str
    spans: tuple[range, ...]


def path_of(module: str) -> Path:
    return ROOT / "pvl_adapter" / f"{module}.py"


def mutants_of(module: str) -> list[Mutant]:
    found = []
    for index, (old, new, functions) in enumerate(changes(ast.parse(path_of(module).read_text()))):
        head = old.test if isinstance(old, ast.If) else old
        spans = range(old.lineno, head.end_lineno + 1), *(range(f.lineno, f.end_lineno + 1) for f in functions)
        before, after = (ast.unparse(ast.fix_missing_locations(node)).partition("\n")[0] for node in (old, new))
        found.append(Mutant(module, index, f"{textwrap.shorten(before, 90)} -> {textwrap.shorten(after, 90)}", spans))
    return found


class MutantLoader(SourceFileLoader):
    """Finds and loads one module of the core with its change."""

    def __init__(self, mutant: Mutant) -> None:
        super().__init__(f"pvl_adapter.{mutant.module}", str(path_of(mutant.module)))
        self.index = mutant.index

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, _: str) -> Any:
        tree = ast.parse(Path(self.path).read_text())
        next(islice(changes(tree), self.index, None))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class Recorder:
    """Records, as a plugin of pytest, each test's seconds and the core's lines that it runs."""

    def __init__(self) -> None:
        from coverage import Coverage

        self.seconds: Counter[str] = Counter()
        self.coverage = Coverage(data_file=None, include=[str(path_of(module)) for module in MODULES])
        self.coverage.start()
        for module in MODULES:  # so that no test's lines are those of an import
            importlib.import_module(f"pvl_adapter.{module}")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration

    def runs(self) -> dict[str, dict[int, list[str]]]:
        """Of each module: its lines, and the tests that run them."""
        self.coverage.stop()
        data = self.coverage.get_data()
        return {module: data.contexts_by_lineno(str(path_of(module))) for module in MODULES}


def in_fork(work: Callable[[], int], limit: float) -> int | None:
    """What `work` returns in a process of its own, or None after `limit` seconds."""
    child = os.fork()
    if not child:
        os.setsid()
        sink = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(sink, stream)
        code = 1
        try:
            code = int(work())
        finally:
            os._exit(code)
    ends = time.monotonic() + limit
    while time.monotonic() < ends:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def preload(files: list[str]) -> None:
    """Import what the tests import, so that forks have it already; not ours, which they import with a change."""
    import pytest

    importlib.import_module("torch._dynamo")
    pytest.main([*PYTEST, "--collect-only", "-qqq", *files])
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith((f"{ROOT}/pvl_adapter", f"{ROOT}/tests")):
            del sys.modules[name]


def record(files: list[str]) -> tuple[Counter[str], dict[str, dict[int, list[str]]]]:
    """All tests once: their seconds, and what `Recorder.runs` says."""
    import pytest

    with tempfile.NamedTemporaryFile() as file:

        def work() -> int:
            recorder = Recorder()
            code = pytest.main([*PYTEST, *files], plugins=[recorder])
            Path(file.name).write_bytes(pickle.dumps((recorder.seconds, recorder.runs())))
            return code

        if code := in_fork(work, limit=1800):
            raise SystemExit(f"without any change the tests end with exit code {code}")
        return pickle.loads(Path(file.name).read_bytes())


def outcome(mutant: Mutant, seconds: Counter[str], runs: dict[int, list[str]]) -> str:
    """Try one change: killed, survived or timed_out."""
    import pytest

    tests: set[str] = set()
    for span in (*mutant.spans, runs):  # what only an import runs has the tests of the function or module around it
        tests = tests or {test for line in span for test in runs.get(line, ()) if test}
    if not tests:
        return "survived"
    total, chosen = 0.0, []
    for test in sorted(tests, key=seconds.__getitem__):
        total += seconds[test]
        if not chosen or total <= AT_MOST:
            chosen.append(test)

    def work() -> int:
        sys.meta_path.insert(0, MutantLoader(mutant))
        return pytest.main([*PYTEST, *chosen])

    code = in_fork(work, limit=30 + 3 * min(total, AT_MOST))
    return "timed_out" if code is None else "killed" if code else "survived"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-module", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--survivors", nargs="+", metavar="FILE", help="try those of the last run by these tests")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    torch.set_num_threads(1)
    files = args.survivors or [f"tests/test_{name}.py" for name in TESTS]
    preload(files)

    last = json.loads((RESULTS / "mutation.json").read_text()) if args.survivors else None
    seconds, runs = record(files)
    print(f"{len(seconds)} tests pass in {seconds.total():.0f} s", file=sys.stderr, flush=True)
    modules: dict[str, Counter[str]] = {}
    survivors = []
    for module in MODULES:
        mutants = mutants_of(module)
        sample = random.Random(f"{args.seed} {module}").sample(mutants, min(args.per_module, len(mutants)))
        counts = modules[module] = Counter(tried=len(sample), killed=0, timed_out=0, survived=0)
        if last:
            sample = [mutants[of["index"]] for of in last["survivors"] if of["module"] == module]
            counts = modules[module] = Counter(last["modules"][module] | {"survived": 0})
        for mutant in sorted(sample):
            line, found = mutant.spans[0].start, outcome(mutant, seconds, runs[module])
            counts[found] += 1
            print(f"{module}.py:{line} {mutant.change}: {found}", file=sys.stderr, flush=True)
            if found == "survived":
                survivors.append({"module": module, "index": mutant.index, "line": line, "change": mutant.change})
    total = {key: sum(counts[key] for counts in modules.values()) for key in counts}
    score = 1 - total["survived"] / total["tried"]
    write("mutation", {"seed": args.seed, **total, "score": score, "modules": modules, "survivors": survivors})


if __name__ == "__main__":
    main()
