"""Mutation testing: small deliberate errors in the source, and the share of them that the tests notice.

The one idea: a parent imports torch and transformers once and forks. A first round runs every test file
unchanged and notes which lines each test runs, in its subprocesses too; after that a mutant costs one fork
that runs only the tests of its line, quickest first, until one fails. Each worker has a copy of the source
of its own, first on PYTHONPATH, so nothing in the checkout changes.

    python tests/mutants.py                     400 mutants, spread over the packages by their size
    python tests/mutants.py --quick --json      as many as seven minutes allow
    python tests/mutants.py --record            the first round alone, kept for --quick in mutant_tests.json
    python tests/mutants.py --package losses --count 30 --survivors

Exit status 0 when at least 90 % are killed. Mutants that change nothing anybody can see are listed with the
reason in `equivalent_mutants.json` and left out of the share.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict, deque
from functools import partial
from pathlib import Path

from mutant_edits import PACKAGES, SOURCE, Mutant, function_at, functions, sample
from mutant_forks import Forks, import_the_heavy
from mutant_lines import Tracer

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
EQUIVALENT = TESTS / "equivalent_mutants.json"
RECORDED = TESTS / "mutant_tests.json"  # which tests run which function: --quick has no time for a first round
KEPT_ALIKE = 12  # tests of a function that are recorded and differ in their parameters alone, the quickest
WANTED = 0.90
# They test the documents, or teachers behind HTTP, which are not mutated, and take minutes.
LEFT_OUT = "test_docs* test_remote* test_teacher*".split()
QUICK_SECONDS = 420.0
# Seconds of tests that a mutant may run, as they took in the first round; two tests run whatever they take.
PATIENCE = {"quick": 20.0, "full": 60.0}


def pytest_arguments(folder: Path) -> list[str]:
    return [
        *("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "--basetemp", str(folder / "pytest")),
        *("-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-m", "not slow", "--tb=line", "--disable-warnings"),
        *("-p", "no:unraisableexception", "-p", "no:threadexception"),  # they collect garbage for a second
    ]


def first_round(overlay: Path, folder: Path, file: Path) -> int:
    """In a fork: run a test file on the source as it is; write what each test took and ran to tests.json."""
    import pytest

    tracer = Tracer(str(overlay))
    names, seconds, needs = {}, {}, {}

    class Record:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item):
            tracer.switch(sink(item.nodeid))
            began = time.monotonic()
            needs[item.nodeid] = list(item.fixturenames)
            try:
                return (yield)
            finally:
                seconds[item.nodeid] = time.monotonic() - began
                tracer.switch("")

        @pytest.hookimpl(wrapper=True)
        def pytest_fixture_setup(self, fixturedef):
            if fixturedef.scope == "function":
                return (yield)
            before = tracer.switch(sink(fixturedef.argname))  # shared by all tests that ask for it
            try:
                return (yield)
            finally:
                tracer.switch(before)

    def sink(name: str) -> str:
        return names.setdefault(name, str(folder / f"trace{len(names)}"))

    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(
        f"import sys; sys.path.append({str(TESTS)!r}); import mutant_lines; mutant_lines.trace_subprocess()\n"
    )
    os.environ["PYTHONPATH"] += f":{folder / 'site'}"
    tracer.switch("")
    tracer.start()
    status = int(pytest.main([*pytest_arguments(folder), "-x", str(file)], plugins=[Record()]))
    sys.settrace(None)
    ran = {name: set(Path(path).read_text().split()) for name, path in names.items()}
    tests = {
        test: {"seconds": took, "lines": sorted(ran[test].union(*(ran.get(name, ()) for name in needs[test])))}
        for test, took in seconds.items()
    }
    (folder / "tests.json").write_text(json.dumps(tests))
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else status


def run_tests(folder: Path, tests: list[str]) -> int:
    """In a fork: run the tests in the order given until one fails."""
    import pytest

    order = {test: number for number, test in enumerate(tests)}

    class Choose:
        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, items):
            items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

        def pytest_runtest_logreport(self, report):
            if report.failed:
                (folder / "culprit").write_text(report.nodeid)

    files = dict.fromkeys(str(ROOT / test.partition("::")[0]) for test in tests)
    return int(pytest.main([*pytest_arguments(folder), "-x", *files], plugins=[Choose()]))


def source_digest() -> bytes:
    digest = hashlib.sha256()
    for path in [*sorted(SOURCE.rglob("*.py")), TESTS / "conftest.py", TESTS / "serving.py"]:
        digest.update(str(path).encode() + path.read_bytes())
    return digest.digest()


def line_table(forks: Forks) -> dict[str, dict]:
    """{test: {seconds, lines}} of every test, from the first round or from the last time nothing had changed."""
    digest, table, jobs = source_digest(), {}, deque()
    cache = Path(tempfile.gettempdir()) / f"limbeck-mutants-{os.getuid()}"
    cache.mkdir(exist_ok=True)
    for path in sorted(TESTS.glob("test_*.py")):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in LEFT_OUT):
            continue
        kept = cache / f"{path.stem}-{hashlib.sha256(digest + path.read_bytes()).hexdigest()[:16]}.json"
        if kept.exists():
            table.update(json.loads(kept.read_text()))
            continue

        def done(status, folder, seconds, path=path, kept=kept) -> None:
            if status != 0:
                text = (folder / "output").read_text(errors="replace")[-3000:]
                sys.exit(f"{text}\n{path.name} fails on the source as it is (status {status}); no mutant was run")
            table.update(json.loads((folder / "tests.json").read_text()))
            shutil.copyfile(folder / "tests.json", kept)
            note(f"{path.name}: {seconds:.0f} s")

        job = (unchanged, lambda o, f, path=path: first_round(o, f, path), 1800.0, done)
        jobs.append(lambda job=job: job)
    forks.run(jobs)
    return table


def record(table: dict[str, dict]) -> None:
    """Write the quickest tests of every function; by name, so that it holds while lines move."""
    known = {str(path.relative_to(SOURCE)): functions(path) for path in sorted(SOURCE.rglob("*.py"))}
    tests = sorted(table, key=lambda test: (table[test]["seconds"], test))
    found, alike, total = defaultdict(list), defaultdict(int), defaultdict(float)
    for number, test in enumerate(tests):
        keys = set()
        for line in table[test]["lines"]:
            file, _, at = line.rpartition(":")
            keys.add(f"{file}:{function_at(known.get(file, []), int(at))}")
        for key in keys:
            name = test.partition("[")[0]
            if (total[key] < PATIENCE["quick"] or len(found[key]) < 2) and alike[key, name] < KEPT_ALIKE:
                found[key].append(number)
                alike[key, name] += 1
                total[key] += table[test]["seconds"]
    used = sorted({number for numbers in found.values() for number in numbers})
    place = {number: index for index, number in enumerate(used)}
    rows = (json.dumps([tests[number], round(table[tests[number]]["seconds"], 2)]) for number in used)
    ways = (f"{json.dumps(key)}: {[place[number] for number in found[key]]}" for key in sorted(found))
    RECORDED.write_text('{"tests": [\n' + ",\n".join(rows) + '\n],\n"functions": {\n' + ",\n".join(ways) + "\n}}\n")


def recorded() -> dict[str, dict]:
    """The table of `record`, with functions in the place of lines; tests that are gone are left out."""
    document = json.loads(RECORDED.read_text())
    there = {path.name: path.read_text() for path in TESTS.rglob("test_*.py")}
    table = {}
    for test, seconds in document["tests"]:
        file, _, name = test.partition("::")
        if f"def {name.partition('[')[0]}(" in there.get(Path(file).name, ""):
            table[test] = {"seconds": seconds, "lines": []}
    for key, numbers in document["functions"].items():
        for number in numbers:
            test = document["tests"][number][0]
            if test in table:
                table[test]["lines"].append(key)
    return table


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tests_for(mutant: Mutant, table: dict[str, dict], patience: float) -> tuple[list[str], int]:
    """The tests that run the mutant's lines (outside functions: its file), quickest first; how many are left out."""
    first, last = mutant.lines
    exact = {f"{mutant.file}:{line}" for line in range(first, last + 1)}
    exact.add(f"{mutant.file}:{function_at(functions(SOURCE / mutant.file), mutant.line)}")
    beginnings = [f"{mutant.file}:", f"{Path(mutant.file).parent}/"]
    found = [test for test, record in table.items() if not exact.isdisjoint(record["lines"])]
    while not found and not last and beginnings:
        start = beginnings.pop(0)
        found = [test for test, record in table.items() if any(line.startswith(start) for line in record["lines"])]
    chosen, total = [], 0.0
    for test in sorted(found, key=lambda test: table[test]["seconds"]):
        total += table[test]["seconds"]
        if total <= patience or len(chosen) < 2:
            chosen.append(test)
    return chosen, len(found) - len(chosen)


def unchanged(overlay: Path):
    return lambda: None


def put_in(mutant: Mutant, number: int, clean: Path):
    """Write the mutant into a worker's copy; returns what puts the source back."""

    def before(overlay: Path):
        path, original = overlay / "limbeck" / mutant.file, clean / "limbeck" / mutant.file
        stat = path.stat()
        path.write_bytes(mutant.apply(original.read_bytes()))
        os.utime(path, (stat.st_atime, stat.st_mtime + 10 * number))  # so that no compiled file of another fits

        def undo() -> None:
            shutil.copy2(original, path)

        return undo

    return before


def mutation_round(forks: Forks, chosen: list[Mutant], equivalent: set, table: dict, patience: float, times: tuple):
    """Run the mutants; returns them by what became of them, {id: how many tests ran and not}, and unsteady tests.

    A test's first kill is doubted: the same tests up to it run on the source as it is, and where it fails there as
    well (it depends on time, or on what ran before) it is left out from then on and the mutant is tried again.
    """
    until, stop = times
    results, count, trusted, unsteady, queue = defaultdict(list), {}, set(), [], deque()

    def try_out(number: int, mutant: Mutant):
        if (mutant.file, mutant.before, mutant.after) in equivalent:
            results["equivalent"].append(mutant)
            return None
        tests, left_out = tests_for(mutant, table, patience)
        count[mutant.id] = {"tests": len(tests), "tests_left_out": left_out}
        if not tests:
            results["survived"].append(mutant)
            return None

        def settled(kind: str, seconds: float) -> None:
            results[kind].append(mutant)
            note(f"{kind:<9}{seconds:5.1f} s  {mutant.file}:{mutant.line}  {mutant.before}  ->  {mutant.after}")

        def done(status, folder, seconds) -> None:
            culprit = folder / "culprit"
            if status is None and time.monotonic() >= stop:
                return  # the time was up, which says nothing of the mutant
            elif status in (4, 70):  # pytest was called wrongly, or this file is wrong
                sys.exit((folder / "output").read_text(errors="replace")[-3000:])
            elif status and culprit.exists() and culprit.read_text() not in trusted:
                name = culprit.read_text()
                queue.appendleft(lambda: doubt(name, tests[: tests.index(name) + 1], seconds))
            else:
                settled({None: "timeout", 0: "survived", 5: "survived"}.get(status, "killed"), seconds)

        def doubt(name: str, same: list[str], seconds: float):
            def judged(status, folder, _) -> None:
                if status == 0:
                    trusted.add(name)
                    settled("killed", seconds)
                elif time.monotonic() < stop:
                    note(f"{name} fails on the source as it is when it runs after others; it is left out")
                    unsteady.append(name)
                    table.pop(name, None)
                    queue.appendleft(lambda: try_out(number + len(chosen), mutant))

            return unchanged, lambda o, f: run_tests(f, same), limit(same), judged

        return put_in(mutant, number, forks.clean), lambda o, f: run_tests(f, tests), limit(tests), done

    def limit(tests: list[str]) -> float:
        return min(20 + 4 * sum(table[test]["seconds"] for test in tests if test in table), stop - time.monotonic())

    queue.extend(partial(try_out, number, mutant) for number, mutant in enumerate(chosen, 1))
    forks.run(queue, until)
    return results, count, unsteady


def report(results: dict[str, list[Mutant]], tests: dict[str, dict[str, int]], asked, seconds: float) -> dict:
    """What is printed; a timeout is a kill as well."""
    kinds = ("killed", "survived", "equivalent", "timeout")

    def figures(package: str | None = None) -> dict:
        counts = {k: sum(1 for m in results[k] if package in (None, m.package)) for k in kinds}
        counts["killed"] += counts["timeout"]
        scored = counts["killed"] + counts["survived"]
        share = round(counts["killed"] / scored, 4) if scored else None
        return {"killed_share": share, **counts, "total": scored + counts["equivalent"]}

    survivors = [
        {"id": m.id, "package": m.package, "file": f"src/limbeck/{m.file}", "line": m.line, "before": m.before,
         "after": m.after, "operator": m.operator, **tests[m.id]}
        for m in sorted(results["survived"], key=lambda m: (m.file, m.start))
    ]  # fmt: skip
    rest = {"wanted": WANTED, "seed": asked.seed, "quick": asked.quick, "seconds": round(seconds, 1)}
    return {**figures(), **rest, "packages": {name: figures(name) for name in asked.package}, "survivors": survivors}


def show(document: dict, survivors: bool) -> None:
    print(f"{'package':<12}{'killed':>8}{'of':>6}{'timeout':>9}{'equivalent':>12}")
    for name, row in {**document["packages"], "all": document}.items():
        share = "" if row["killed_share"] is None else f"{row['killed_share']:.0%}"
        of = row["total"] - row["equivalent"]
        print(f"{name:<12}{share:>8}{of:>6}{row['timeout']:>9}{row['equivalent']:>12}")
    for m in document["survivors"] if survivors else ():
        ran = f"{m['tests']} tests, {m['tests_left_out']} left out"
        print(f"\n{m['file']}:{m['line']}  {m['operator']}, {ran}\n  - {m['before']}\n  + {m['after']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="start no mutant after seven minutes, first round included"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--survivors", action="store_true", help="list the survivors under the table")
    parser.add_argument("--record", action="store_true", help=f"run no mutant; write {RECORDED.name}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--package", nargs="+", choices=sorted(PACKAGES), default=list(PACKAGES))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()

    began = time.monotonic()
    until, stop = (began + QUICK_SECONDS, began + QUICK_SECONDS + 45) if asked.quick else (float("inf"),) * 2
    patience = PATIENCE["quick" if asked.quick else "full"]
    known = json.loads(EQUIVALENT.read_text(encoding="utf-8")) if EQUIVALENT.exists() else []
    equivalent = {(m["file"].removeprefix("src/limbeck/"), m["before"], m["after"]) for m in known}
    chosen = sample(asked.package, asked.count, asked.seed)
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    import_the_heavy()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True))
        forks = Forks(asked.workers, Path(root), SOURCE)
        stack.callback(forks.close)
        table = recorded() if asked.quick and RECORDED.exists() else line_table(forks)
        if asked.record:
            record(table)
            return 0
        note(f"{len(table)} tests, ready after {time.monotonic() - began:.0f} s")

        results, count, unsteady = mutation_round(forks, chosen, equivalent, table, patience, (until, stop))
    document = {**report(results, count, asked, time.monotonic() - began), "unsteady_tests": unsteady}
    if asked.json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        show(document, asked.survivors)
    return 0 if (document["killed_share"] or 0.0) >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
