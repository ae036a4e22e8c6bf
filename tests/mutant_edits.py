"""The small errors of `mutants.py`: where a source file can be changed, and into what.

The one idea: the syntax tree says where, the text of the file is what is edited, so a mutant is three values
(from, to, replacement) and shows up as one changed line. Left alone: texts and what an exception says,
annotations, decorators, imports, assertions, messages to the user and progress bars.
"""

import ast
import bisect
import hashlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "limbeck"
PACKAGES = {
    **{name: [f"{name}/**/*.py"] for name in "losses targets optim students export evaluation data".split()},
    "training": [f"training/{name}.py" for name in "checkpoints checkpointing resume guard head metrics".split()],
}


@dataclass(frozen=True)
class Mutant:
    package: str
    file: str  # below src/limbeck
    start: int  # bytes from `start` to `end` are replaced by `text`
    end: int
    text: bytes
    operator: str
    line: int
    lines: tuple[int, int]  # of the statement, or of the head of a compound one; (0, 0) outside functions
    before: str  # the lines it touches, before and after
    after: str

    @property
    def id(self) -> str:
        return hashlib.sha256(f"{self.file}|{self.start}|{self.end}|{self.text!r}".encode()).hexdigest()[:10]

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text + source[self.end :]


ARITHMETIC = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"), ast.Pow: ("**", "*"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.BitXor: ("^", "|"),
}  # fmt: skip
COMPARISON = {
    ast.Lt: ("<", ">=", "<="), ast.LtE: ("<=", ">", "<"), ast.Gt: (">", "<=", ">="), ast.GtE: (">=", "<", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
}  # fmt: skip
# Left of a `/` that divides nothing.
PATH = re.compile(r"(folder|path|dir|root|partial|checkpoint|parent|\bPath\(.*\))$")
# Texts, annotations, and assertions, which state what cannot happen.
LEFT_ALONE = (ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Assert, ast.arg)
KEYWORDS = {"strict", "show_progress"}  # zip(strict=True) states what cannot happen as well
QUIET = {"say", "warn", "progress", "advance", "debug", "info", "warning", "cast", "TypeVar"}  # calls left alone


class Mutator(ast.NodeVisitor):
    """Collects the edits of one file as (start, end, text, operator, line, lines)."""

    def __init__(self, source: bytes) -> None:
        self.source, self.found = source, []
        self.offsets = [0]
        for line in source.splitlines(keepends=True):
            self.offsets.append(self.offsets[-1] + len(line))
        self.lines, self.inside, self.axes = (0, 0), False, set()
        self.visit(ast.parse(source))

    def start(self, node) -> int:
        return self.offsets[node.lineno - 1] + node.col_offset

    def end(self, node) -> int:
        return self.offsets[node.end_lineno - 1] + node.end_col_offset

    def add(self, operator: str, start: int, end: int, text: str) -> None:
        line = bisect.bisect_right(self.offsets, start)
        self.found.append((start, end, text.encode(), operator, line, self.lines))

    def replace(self, operator: str, node, text: str) -> None:
        self.add(operator, self.start(node), self.end(node), text)

    def swap(self, operator: str, left, right, sign: str, *others: str) -> None:
        """Replace the sign that stands between two operands."""
        first = self.end(left)
        match = re.search(re.escape(sign).replace(r"\ ", r"\s+").encode(), self.source[first : self.start(right)])
        for other in others if match else ():
            self.add(operator, first + match.start(), first + match.end(), other)

    def visit(self, node) -> None:
        if isinstance(node, LEFT_ALONE) or (isinstance(node, ast.keyword) and node.arg in KEYWORDS):
            return
        for test in getattr(node, "ifs", [node.test] if isinstance(node, ast.If | ast.While | ast.IfExp) else []):
            self.condition(test)
        if isinstance(node, ast.Call):  # dim=-1 is dim=1 wherever there are two, so that no test can tell
            self.axes.update(id(value) for value in [*node.args, *(keyword.value for keyword in node.keywords)])
        if not isinstance(node, ast.stmt):
            super().visit(node)
            return
        outer = self.lines
        if self.inside:
            body = getattr(node, "body", None) or getattr(node, "cases", None)
            first = body[0].pattern if isinstance(node, ast.Match) else body[0] if body else None
            self.lines = (node.lineno, max(node.lineno, first.lineno - 1) if first else node.end_lineno)
        super().visit(node)
        self.lines = outer

    def visit_FunctionDef(self, node) -> None:
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(default)
        outer, self.inside = self.inside, True
        for statement in node.body:
            self.visit(statement)
        self.inside = outer

    def visit_ClassDef(self, node) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node) -> None:
        if isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return
        if self.inside and all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            self.replace("statement removed", node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node) -> None:
        self.replace("statement removed", node, "pass")
        if type(node.op) in ARITHMETIC:
            sign, other = ARITHMETIC[type(node.op)]
            self.swap("arithmetic", node.target, node.value, f"{sign}=", f"{other}=")
        self.generic_visit(node)

    def visit_Expr(self, node) -> None:
        if isinstance(node.value, ast.Call) and not quiet(node.value):
            self.replace("statement removed", node, "pass")
        self.generic_visit(node)

    def visit_Delete(self, node) -> None:
        self.replace("statement removed", node, "pass")

    def visit_Raise(self, node) -> None:
        self.replace("statement removed", node, "pass")  # what it says is left alone

    def visit_Return(self, node) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.replace("return None", node.value, "None")
            self.visit(node.value)

    def visit_Break(self, node) -> None:
        self.replace("break or continue", node, "continue")

    def visit_Continue(self, node) -> None:
        self.replace("break or continue", node, "break")

    def condition(self, test) -> None:
        if not isinstance(test, ast.Compare | ast.Constant) and not is_not(test):
            text = self.source[self.start(test) : self.end(test)].decode()
            self.replace("negated condition", test, f"(not ({text}))")

    def visit_If(self, node) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_BoolOp(self, node) -> None:
        sign, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        pieces, at = [], self.start(node)
        for left, right in zip(node.values, node.values[1:], strict=False):
            gap = self.source[self.end(left) : self.start(right)]
            pieces += [self.source[at : self.end(left)], gap.replace(sign.encode(), other.encode())]
            at = self.start(right)
        self.replace("and or or", node, b"".join([*pieces, self.source[at : self.end(node)]]).decode())
        self.generic_visit(node)

    def visit_UnaryOp(self, node) -> None:
        sign = {ast.Not: "not", ast.USub: "-"}.get(type(node.op))
        axis = id(node) in self.axes and isinstance(node.operand, ast.Constant)
        if sign and not axis:
            self.add(f"{sign} dropped", self.start(node), self.start(node) + len(sign), "")
        self.generic_visit(node)

    def visit_BinOp(self, node) -> None:
        sides = (node.left, node.right)
        left = self.source[self.start(node.left) : self.end(node.left)].decode()
        paths = isinstance(node.op, ast.Div) and PATH.search(left)
        types = isinstance(node.op, ast.BitOr) and any(map(is_type, sides))
        if type(node.op) in ARITHMETIC and not paths and not types and not any(map(is_text, sides)):
            self.swap("arithmetic", node.left, node.right, *ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_Compare(self, node) -> None:
        operands = [node.left, *node.comparators]
        for op, left, right in zip(node.ops, operands, node.comparators, strict=False):
            self.swap("comparison", left, right, *COMPARISON[type(op)])
        self.generic_visit(node)

    def visit_Call(self, node) -> None:
        if quiet(node):
            return
        for keyword in node.keywords:
            if keyword.arg and keyword.arg not in KEYWORDS:
                start, end = self.start(keyword), self.end(keyword)
                comma = re.match(rb"\s*,\s*", self.source[end:])
                self.add("keyword dropped", start, end + (comma.end() if comma else 0), "")
        self.generic_visit(node)

    def visit_Constant(self, node) -> None:
        value = node.value
        if isinstance(value, bool):
            self.replace("constant", node, str(not value))
        elif isinstance(value, int):
            for other in (value + 1, value - 1) if value else (1,):
                self.replace("constant", node, str(other))
        elif isinstance(value, float):
            self.replace("constant", node, repr(value * 2 or 1.0))


def quiet(call) -> bool:
    return getattr(call.func, "id", getattr(call.func, "attr", "")) in QUIET


def is_not(node) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def is_text(node) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def is_type(node) -> bool:
    if isinstance(node, ast.Constant):
        return node.value is None
    name = getattr(node, "id", getattr(node, "attr", ""))
    return name in {"int", "str", "float", "bool", "bytes", "list", "dict"} or name[:1].isupper()


def mutants_of(package: str, path: Path) -> list[Mutant]:
    """Every mutant of a file, in the order of its text."""
    source, found, made = path.read_bytes(), [], set()
    for start, end, text, operator, line, lines in Mutator(source).found:
        changed = source[:start] + text + source[end:]
        first = source.rfind(b"\n", 0, start) + 1
        tail = len(source) - (source.find(b"\n", end) if b"\n" in source[end:] else len(source))
        before, after = (" ".join(t[first : len(t) - tail].decode().split()) for t in (source, changed))
        if before != after and (start, end, text) not in made:
            made.add((start, end, text))
            file = str(path.relative_to(SOURCE))
            found.append(Mutant(package, file, start, end, text, operator, line, lines, before, after))
    return found


def functions(path: Path) -> list[tuple[int, int, str]]:
    """(first line, last line, qualified name) of every function of a file, outer ones first."""
    found = []

    def walk(node, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{name}.{child.name}".lstrip(".")
                if not isinstance(child, ast.ClassDef):
                    found.append((child.lineno, child.end_lineno, inner))
            walk(child, inner)

    walk(ast.parse(path.read_bytes()), "")
    return found


def function_at(known: list[tuple[int, int, str]], line: int) -> str:
    """The innermost function that holds a line; an empty name outside functions."""
    return next((name for first, last, name in reversed(known) if first <= line <= last), "")


def parses(mutant: Mutant) -> bool:
    try:
        ast.parse(mutant.apply((SOURCE / mutant.file).read_bytes()))
    except SyntaxError:
        return False
    return True


def sample(packages: list[str], count: int, seed: int) -> list[Mutant]:
    """`count` mutants, shared out by lines of code, in an order in which any beginning is as well spread.

    The order goes by a hash of each mutant's own text, so that a changed line changes its own mutants and no others.
    """
    files = {name: sorted({p for g in PACKAGES[name] for p in SOURCE.glob(g)}) for name in packages}
    size = {name: sum(len(path.read_bytes().splitlines()) for path in files[name]) for name in packages}

    def place(mutant: Mutant) -> tuple[bytes, int]:
        text = f"{seed}|{mutant.file}|{mutant.operator}|{mutant.before}|{mutant.after}"
        return hashlib.sha256(text.encode()).digest(), mutant.start

    chosen: list[Mutant] = []
    for name in packages:
        every = sorted((mutant for path in files[name] for mutant in mutants_of(name, path)), key=place)
        share = max(1, round(count * size[name] / sum(size.values())))
        chosen += itertools.islice(filter(parses, every), share)
    return sorted(chosen, key=place)
