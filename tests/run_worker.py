"""Run a script of several processes, and end without the end of the interpreter.

Threads of gloo that are still there while it ends now and then abort a process (SIGABRT, "terminate called without an
active exception") after all went well.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
