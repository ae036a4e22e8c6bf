"""Build the C++ extension into src/limbeck/kernels, for an editable install.

    python tools/build_kernels.py [--sanitize address,undefined --into DIR]

Without a compiler, or where the build fails, this says so in a line and ends well: the package works without its
kernels, by NumPy and more slowly.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(into: Path, sanitize: str) -> None:
    """Configure and compile in build/, then copy the module into the folder.

    Raises:
        CalledProcessError: CMake or the compiler failed; what they said has been printed.
        FileNotFoundError: there is no CMake.
    """
    folder = ROOT / "build" / f"kernels-{sanitize.replace(',', '-') or 'release'}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", ROOT, "-B", folder, *generator, f"-DPython_EXECUTABLE={sys.executable}"]
    settings = ["-DCMAKE_BUILD_TYPE=Release", "-DLIMBECK_WERROR=ON", f"-DLIMBECK_SANITIZE={sanitize}"]
    subprocess.run([*configure, *settings], check=True)  # noqa: S603
    subprocess.run(["cmake", "--build", folder, "--parallel"], check=True)  # noqa: S603, S607
    into.mkdir(parents=True, exist_ok=True)
    for old in into.glob("_native*.so"):
        old.unlink()
    for made in folder.glob("_native*.so"):
        shutil.copy2(made, into / made.name)


def main() -> int:
    """Build, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitize", default="", help="sanitizers of the compiler's, such as address,undefined")
    parser.add_argument("--into", type=Path, default=ROOT / "src" / "limbeck" / "kernels")
    given = parser.parse_args()
    try:
        build(given.into, given.sanitize)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        sys.stderr.write(
            f"limbeck's C++ kernels were not built ({error}); NumPy does their work, slowly. Install a C++17 compiler "
            "and run `make kernels`.\n"
        )
        return 1 if given.sanitize else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
