"""Mutants: one change each, found in the syntax tree, made in the text."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

COMPARE = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
TWINS = (
    "min max", "any all", "minimum maximum", "clamp_min clamp_max", "amin amax", "argmin argmax", "zeros ones",
    "zeros_like ones_like", "new_zeros new_ones", "floor ceil", "logical_and logical_or", "exp exp2", "log log2",
)  # fmt: skip
SWAP = {a: b for pair in TWINS for a, b in (pair.split(), reversed(pair.split()))}
COMPILED = {"num_warps", "num_stages", "enable_fp_fusion"}
"""Options of Triton's compiler, which its interpreter does not see: `python -m benchmarks static --check` does."""
KEPT = {None, "device", "strict", *COMPILED}
"""Keywords that are not dropped: `**more`, what says nothing on a machine without a GPU, and ``zip``'s assertion."""
PLAIN_CALLS = {"detach", "clone", "contiguous", "float", "double", "eval", "copy", "item"}
"""Methods that hand back their object, which a mutant hands back itself."""


@dataclass(frozen=True)
class Mutant:
    id: str  # of file, function, the node's text and the change: other edits leave it
    file: str
    function: str
    line: int
    lines: tuple[int, int] | None  # which a test executes that can notice; None: of the file, at import
    kind: str
    before: str
    after: str
    span: tuple[int, int]  # bytes

    def apply(self, source: bytes) -> bytes:
        return source[: self.span[0]] + self.after.encode() + source[self.span[1] :]

    def __str__(self) -> str:
        short = [" ".join(text.split()) for text in (self.before, self.after)]
        return f"{self.id} {self.file}:{self.line} {self.function} [{self.kind}] {short[0]} → {short[1]}"


def mutants(file: str, source: bytes) -> list[Mutant]:
    """Every mutant of a file, in the order of its text."""
    return list(_unique(_Finder(file, source)))


def _unique(finder: _Finder) -> Iterator[Mutant]:
    finder.visit_module()
    count, seen = Counter(), set()
    for function, lines, node, kind, after in sorted(finder.found, key=lambda x: (x[2].lineno, x[2].col_offset)):
        start, end = finder.span(node)
        before = finder.source[start:end].decode()
        if (start, end, after) in seen or before == after:
            continue
        seen.add((start, end, after))
        name = (finder.file, function, kind, " ".join(before.split()), after)
        count[name] += 1
        digest = hashlib.sha256("\0".join([*name, str(count[name])]).encode()).hexdigest()[:10]
        yield Mutant(digest, finder.file, function, node.lineno, lines, kind, before, after, (start, end))


class _Finder:
    """Walks a file. Not docstrings, annotations, decorators, imports, messages of errors, ``__repr__``."""

    def __init__(self, file: str, source: bytes):
        self.file, self.source = file, source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[tuple] = []
        self.function: list[str] = []
        self.inside = False  # a function
        self.lines: tuple[int, int] | None = None

    def span(self, node) -> tuple[int, int]:
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def add(self, node: ast.AST, kind: str, after: str) -> None:
        self.found.append((".".join(self.function) or "module", self.lines, node, kind, after))

    def changed(self, node: ast.AST, kind: str, **fields) -> None:
        """The expression with some fields changed."""
        twin = copy.copy(node)
        for name, value in fields.items():
            setattr(twin, name, value)
        text = ast.unparse(twin)
        self.add(
            node, kind, text if isinstance(twin, ast.Constant | ast.Name | ast.Call | ast.Attribute) else f"({text})"
        )

    def visit_module(self) -> None:
        self.block(ast.parse(self.source).body)

    def block(self, body: list[ast.stmt]) -> None:
        for node in body:
            self.statement(node)

    def at(self, first: ast.AST, last: ast.AST | None = None) -> None:
        self.lines = (first.lineno, (last or first).end_lineno) if self.inside else None

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Global | ast.Nonlocal | ast.Pass):
            return
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.definition(node)
        elif isinstance(node, ast.If | ast.While):
            if "TYPE_CHECKING" in ast.unparse(node.test):
                return
            self.at(node.test)
            if isinstance(node, ast.If):
                self.negate(node.test)
            self.expression(node.test)
            self.block(node.body)
            self.block(node.orelse)
        elif isinstance(node, ast.For):
            self.at(node.target, node.iter)
            self.expression(node.iter)
            self.block(node.body)
            self.block(node.orelse)
        elif isinstance(node, ast.With):
            for item in node.items:
                self.at(item.context_expr)
                self.expression(item.context_expr)
            self.block(node.body)
        elif isinstance(node, ast.Try):
            for part in (node.body, node.orelse, node.finalbody, *(handler.body for handler in node.handlers)):
                self.block(part)
        else:
            self.at(node)
            self.simple(node)

    def definition(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        if node.name == "__repr__":
            return
        self.function.append(node.name)
        if isinstance(node, ast.ClassDef):
            outer, self.inside = self.inside, False
            self.block(node.body)
            self.inside = outer
        else:
            first = min([node.lineno, *(x.lineno for x in node.decorator_list)])
            self.lines = (first, node.end_lineno or first)
            for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
                if isinstance(default, ast.Constant) and isinstance(default.value, str):
                    self.changed(default, "default", value=default.value + "_")
                self.expression(default)
            outer, self.inside = self.inside, True
            self.block(node.body)
            self.inside = outer
        self.function.pop()

    def simple(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Raise):
            self.add(node, "raise removed", "pass")  # what it says is not mutated
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant | ast.Yield | ast.YieldFrom):
            if not isinstance(node.value, ast.Constant):
                self.expression(node.value)
            return
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(x, ast.Name) and x.id == "__all__" for x in targets):
            return
        loaded = {x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)}
        again = any(isinstance(x, ast.Attribute | ast.Subscript) or getattr(x, "id", "") in loaded for x in targets)
        if isinstance(node, ast.Expr | ast.AugAssign | ast.Delete | ast.Assert) or again:
            self.add(node, "statement deleted", "pass")
        if isinstance(node, ast.Break | ast.Continue):
            self.add(node, "statement deleted", "pass")
        if isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
            self.add(node, "returns None", "return None")
        if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
            twin = copy.copy(node)
            twin.op = ARITHMETIC[type(node.op)]()
            self.add(node, "arithmetic", ast.unparse(twin))
        for name, value in ast.iter_fields(node):
            if name != "annotation":
                for part in value if isinstance(value, list) else [value]:
                    if isinstance(part, ast.expr):
                        self.expression(part)

    def negate(self, test: ast.expr) -> None:
        if not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):
            self.add(test, "condition swapped", f"(not ({ast.unparse(test)}))")

    def expression(self, node: ast.AST) -> None:
        if isinstance(node, ast.JoinedStr | ast.FormattedValue) or getattr(node, "arg", None) in {*COMPILED, "strict"}:
            return
        handler = getattr(self, f"on_{type(node).__name__.lower()}", None)
        descend = handler(node) if handler else True
        if descend is not False:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr | ast.comprehension | ast.keyword):
                    self.expression(child)

    def on_constant(self, node: ast.Constant, sign: int = 1, whole: ast.AST | None = None) -> None:
        value = node.value
        if isinstance(value, bool):
            self.changed(node, "constant", value=not value)
        elif isinstance(value, int | float):
            more = {1.0 if value == 0 else 2 * sign * value} if isinstance(value, float) else set()
            for new in more or {sign * value + 1, 2 * sign * value} - {sign * value}:
                self.add(whole or node, "constant", f"({new!r})" if new < 0 else repr(new))

    def on_unaryop(self, node: ast.UnaryOp) -> bool | None:
        if isinstance(node.op, ast.Not):
            self.add(node, "not removed", f"({ast.unparse(node.operand)})")
        if isinstance(node.op, ast.USub):
            self.add(node, "minus removed", f"({ast.unparse(node.operand)})")
            if isinstance(node.operand, ast.Constant):
                self.on_constant(node.operand, -1, node)
                return False
        return None

    def on_compare(self, node: ast.Compare) -> None:
        for i, op in enumerate(node.ops):
            for other in COMPARE[type(op)]:
                self.changed(node, "comparison", ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])

    def on_binop(self, node: ast.BinOp) -> None:
        if type(node.op) in ARITHMETIC and not isinstance(node.left, ast.JoinedStr):
            self.changed(node, "arithmetic", op=ARITHMETIC[type(node.op)]())

    def on_boolop(self, node: ast.BoolOp) -> None:
        self.changed(node, "and, or", op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for i in range(len(node.values)):
            rest = [*node.values[:i], *node.values[i + 1 :]]
            self.add(
                node, "operand dropped", f"({ast.unparse(rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))})"
            )

    def on_ifexp(self, node: ast.IfExp) -> None:
        self.changed(node, "condition swapped", body=node.orelse, orelse=node.body)

    def on_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.negate(test)

    def on_call(self, node: ast.Call) -> None:
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name in SWAP:
            twin = copy.copy(node.func)
            setattr(twin, "id" if isinstance(twin, ast.Name) else "attr", SWAP[name])
            self.changed(node, "twin", func=twin)
        if isinstance(node.func, ast.Attribute) and name in PLAIN_CALLS and not node.args:
            self.add(node, "call dropped", f"({ast.unparse(node.func.value)})")
        for i, keyword in enumerate(node.keywords):
            if keyword.arg not in KEPT:
                self.changed(node, "keyword dropped", keywords=[*node.keywords[:i], *node.keywords[i + 1 :]])

    def on_lambda(self, node: ast.Lambda) -> None:
        pass
