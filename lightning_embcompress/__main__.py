"""``python -m lightning_embcompress`` is the ``embcompress`` command, so that ``torchrun -m`` can start it too."""

import sys

from lightning_embcompress.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
