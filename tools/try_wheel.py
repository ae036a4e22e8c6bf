"""Install the wheel of a folder into an environment of its own, where no compiler is found, and run a model with it.

    python tools/try_wheel.py dist

The shipped teacher becomes a GGUF file, which the engine continues; the kernels must be the compiled ones.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SMOKE = """
import limbeck, pathlib
from limbeck.kernels import native
assert native() is not None, "the wheel has no kernels"
assert "site-packages" in limbeck.__file__, limbeck.__file__
print(pathlib.Path(limbeck.__file__).parent / "assets" / "tiny-python")
"""


def main() -> int:
    """Make the environment, install, run; the first failure ends it."""
    wheels = Path(sys.argv[1]).resolve().glob("limbeck-*.whl")
    wheel = max(wheels, key=lambda path: path.stat().st_mtime)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        subprocess.run([sys.executable, "-m", "venv", place / "env"], check=True)  # noqa: S603
        tools = place / "env" / "bin"
        env = {**os.environ, "PATH": str(tools), "CC": "/nowhere", "CXX": "/nowhere"}
        env.pop("PYTHONPATH", None)

        def run(*words: object) -> str:
            command = list(map(str, words))
            done = subprocess.run(command, env=env, cwd=place, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
            return done.stdout.strip()

        run(tools / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
        teacher = run(tools / "python", "-c", _SMOKE).splitlines()[-1]
        run(tools / "limbeck", "export", teacher, "--output", place / "m.gguf")
        text = run(tools / "limbeck", "generate", place / "m.gguf", "--prompt", "def ", "--max-new-tokens", "8")
    sys.stdout.write(f"{wheel.name} works without a compiler:\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
