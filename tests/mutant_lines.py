"""Which lines of limbeck a test runs, in its subprocesses too; the first round of `mutants.py` asks.

The one idea: every line is written down once per test, in a file that any process may append to; its name
stands in the environment, so that processes started by a test, or killed by it, are in the file as well.
"""

import os
import sys
import threading


class Tracer:
    """Writes each line of a limbeck function that runs, once per test, to a file that subprocesses append to."""

    def __init__(self, source: str) -> None:
        self.source, self.out, self.name = source + "/limbeck/", -1, ""
        self.ours, self.left = {}, {}  # {file name: is it limbeck's}, {code: lines not yet seen}

    def start(self) -> None:
        threading.settrace(self.call)
        sys.settrace(self.call)

    def switch(self, name: str) -> str:
        """What runs from now on belongs to `name`; returns what came before."""
        before, self.name, self.left = self.name, name, {}
        if self.out >= 0:
            os.close(self.out)
        self.out = os.open(name or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.environ["MUTANTS_TRACE"] = f"{self.source.removesuffix('/limbeck/')}:{name}" if name else ""
        return before

    def call(self, frame, event, argument):
        code = frame.f_code
        ours = self.ours.get(code.co_filename)
        if ours is None:
            ours = self.ours[code.co_filename] = code.co_filename.startswith(self.source)
        if not ours or not code.co_flags & 1:  # another package's, or a module or class and no function
            return None
        if code not in self.left:
            self.left[code] = {line for _, _, line in code.co_lines() if line}
        return self.line if self.left[code] else None

    def line(self, frame, event, argument):
        left = self.left.get(frame.f_code)
        if event == "line" and left and frame.f_lineno in left:
            left.discard(frame.f_lineno)
            left.discard(frame.f_code.co_firstlineno)
            file = frame.f_code.co_filename.removeprefix(self.source)
            os.write(self.out, f"{file}:{frame.f_lineno}\n".encode())
        return self.line


def trace_subprocess() -> None:
    """Called by the `sitecustomize` that the first round puts on PYTHONPATH."""
    source, _, name = os.environ.get("MUTANTS_TRACE", "").partition(":")
    if name:
        tracer = Tracer(source)
        tracer.switch(name)
        tracer.start()
