"""Run the native tests with the extension built under AddressSanitizer with UBSan, and under ThreadSanitizer.

    python tools/sanitize.py [--mutants 2000] [--only address|thread]

The built modules lie in build/; the checkout's own stays as it is: a copy of the package with the other module goes
first on PYTHONPATH. Leaks are not looked for: Python itself keeps memory until its end.
"""

import argparse
import os
import shutil
import subprocess
import sys

from build_kernels import ROOT, build

TESTS = ("tests/test_kernels.py", "tests/test_engine.py")
RUNS = {
    "address": ("address,undefined", ["libasan.so", "libubsan.so"]),
    "thread": ("thread", ["libtsan.so"]),
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}


def library(name: str) -> str:
    """Where the compiler keeps a sanitizer's library; it must be loaded before Python."""
    compiler = os.environ.get("CXX", "g++")
    found = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True)  # noqa: S603
    return found.stdout.strip()


def main() -> int:
    """Build, copy, run; the first failure ends it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=2000)
    parser.add_argument("--only", choices=list(RUNS))
    given = parser.parse_args()
    for name, (flags, libraries) in RUNS.items():
        if given.only not in (None, name):
            continue
        copy = ROOT / "build" / f"sanitized-{name}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(ROOT / "src" / "limbeck", copy / "limbeck", ignore=shutil.ignore_patterns("_native*.so"))
        build(copy / "limbeck" / "kernels", flags)
        preload = " ".join(library(each) for each in libraries)
        env = {**os.environ, **OPTIONS, "PYTHONPATH": str(copy), "LD_PRELOAD": preload}
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=3000", *TESTS]
        subprocess.run([*words, "-k", "not mutated"], check=True, env=env, cwd=ROOT)  # noqa: S603
        if name == "address":
            _mutants(env, given.mutants)
    return 0


def _mutants(env: dict[str, str], count: int) -> None:
    folder = ROOT / "build" / "mutants"
    folder.mkdir(parents=True, exist_ok=True)
    script = (
        "import shutil, sys; sys.path.insert(0, 'tests'); from pathlib import Path\n"
        "from test_engine import OWN_CASES, exported\n"
        "for case in ('llama', 'qwen3next', 'gemma3', *OWN_CASES):\n"
        "    place = Path(sys.argv[1]) / case; shutil.rmtree(place, ignore_errors=True); place.mkdir(parents=True)\n"
        "    exported(place, case, 'f16' if case in OWN_CASES else 'tq2_0', OWN_CASES)\n"
    )
    plain = {key: value for key, value in env.items() if key not in ("LD_PRELOAD", "PYTHONPATH")}
    subprocess.run([sys.executable, "-c", script, folder], check=True, env=plain, cwd=ROOT)  # noqa: S603
    files = sorted(map(str, folder.glob("*/m.gguf")))
    words = [sys.executable, "tests/mutated_files.py", *files, "--count", str(count), "--any-memory"]
    subprocess.run(words, check=True, env=env, cwd=ROOT)  # noqa: S603


if __name__ == "__main__":
    sys.exit(main())
