"""Peak memory of packing one text file that is a single line, in a process of its own and all its workers.

    python benchmarks/long_line.py                 a file of 1,000 MB: about ten minutes
    python benchmarks/long_line.py --quick --json  100 MB

The limit is what `import torch` and the tokenizer take before any text is read, which is measured beside it.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from common import arguments

PACK = """
import sys
from pathlib import Path
from limbeck.config import DatasetConfig
from limbeck.data.pack import pack
from limbeck.data.tokenizer import load_tokenizer
tokenizer = load_tokenizer("tiny-python")
if sys.argv[1]:
    pack(DatasetConfig(name=sys.argv[1], max_length=1024, validation_fraction=0.0), tokenizer, Path(sys.argv[2]))
"""


def write_line(path: Path, megabytes: int) -> int:
    """Standard-library sources with their line ends made spaces, repeated up to the size; returns its bytes."""
    from limbeck.data.sources import stdlib_source

    line = " ".join(" ".join(document.text.split("\n")) for document in stdlib_source().documents())
    size = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1_000_000:
            size += file.write(line)
    return path.stat().st_size


def peak_of(*words: str) -> tuple[float, float]:
    """Most megabytes that a Python process and its children hold at once, by samples, and its seconds."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-c", PACK, *words], stderr=subprocess.DEVNULL)
    me = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            for one in [me, *me.children(recursive=True)]:
                total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
        peak = max(peak, total)
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"packing ended with status {process.returncode}")
    return peak / 1e6, time.perf_counter() - started


def main() -> int:
    options = arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "line.txt"
        size = write_line(text, 100 if options.quick else 1000)
        idle, _ = peak_of("", "")
        peak, seconds = peak_of(str(text), str(Path(scratch) / "packed"))
    found = {"file_mb": size / 1e6, "peak_mb": peak, "before_any_text_mb": idle, "seconds": seconds}
    print(json.dumps(found) if options.json else "\n".join(f"{key:<20} {value:,.1f}" for key, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
