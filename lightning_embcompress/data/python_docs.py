"""English that is on every machine: the documentation strings of Python's standard library."""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from lightning_embcompress.data.cache import cached
from lightning_embcompress.data.sources import Split, TextSource, dataset_rows
from lightning_embcompress.data.text import TextFormat
from lightning_embcompress.data.token_stream import TokenStreamDataModule
from lightning_embcompress.utils.progress import progress_bar

# Not the library's own documentation, or not meant to be read: tests, other people's packages, fixtures with
# deliberate errors, and builds' configuration.
_SKIPPED_PARTS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "_vendor"}
_TOPICS = ("pydoc_data", "topics.py")
_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)
# Raised whenever the same Python would give another text, so that old caches are not used.
_EXTRACTION_VERSION = 1
_LINES_OF_A_ROW = 10_000


def python_files(root: Path) -> list[Path]:
    """List the Python sources below a directory, sorted, without tests, caches and vendored code."""
    files = root.rglob("*.py")
    return sorted(path for path in files if not _SKIPPED_PARTS & set(path.relative_to(root).parts))


def docstrings(source: str) -> Iterator[str]:
    """Give the documentation strings of a module, its classes and its functions, in the order of the source.

    The source is parsed, never run.

    Raises:
        SyntaxError: If it is not Python.

    Example:
        >>> list(docstrings('def f():' + chr(10) + '    "Do nothing."'))
        ['Do nothing.']
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        tree = ast.parse(source)
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text
        # Definitions stand among statements only: expressions, most of the tree, need not be walked.
        inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, _STATEMENTS)]
        pending.extend(reversed(inner))


def topics(source: str) -> dict[str, str]:
    """Read the language reference that ``help()`` shows, from the source of ``pydoc_data.topics``."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return {str(name): str(text) for name, text in ast.literal_eval(node.value).items()}
    return {}


def paragraphs(text: str) -> Iterator[str]:
    """Give the paragraphs of a text, each as one line; interpreter sessions are left out."""
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        words = paragraph.split()
        if words and words[0] != ">>>":
            yield " ".join(words)


def split_of(module: str) -> Split:
    """Assign a module to a part of the corpus: 90 % training, 5 % validation, 5 % test, by a hash of its name."""
    bucket = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big") % 20
    return "valid" if bucket == 0 else "test" if bucket == 1 else "train"


class PythonDocs(TokenStreamDataModule):
    """The documentation of Python itself as a corpus: English without a download.

    The documentation strings of the standard library and the language reference of ``help()`` are read from source
    files (nothing is imported), cut into paragraphs, freed of repetitions, and split by module. The same Python version
    gives the same text, apart from library modules that an operating system leaves out.

    Args:
        include_installed: Whether to add the documentation strings of all installed packages: much more text, but
            another one in each environment.
        lowercase: Whether text is lower-cased.
        eos_token: The token at the end of each paragraph; ``null`` for none.
        options: The arguments of :class:`~lightning_embcompress.data.TokenStreamDataModule`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> data = PythonDocs(min_count=2)
        >>> data.text_format.tokens("Return True if it doesn't.")[-2:]
        ["doesn't", '.']
    """

    def __init__(
        self,
        include_installed: bool = False,
        lowercase: bool = False,
        eos_token: str | None = "</S>",
        **options: Any,
    ) -> None:
        """Check and keep the arguments."""
        super().__init__(**options)
        self.eos_token = eos_token
        self.text_format = TextFormat(tokenizer="words", lowercase=lowercase, line_ends=eos_token is not None)
        self.include_installed = include_installed

    def source(self, split: Split) -> TextSource:
        """Give the text of one part of the corpus, which is extracted at the first use.

        Raises:
            ValueError: If this Python has no sources of its standard library.
        """
        splits = self._rows["split"]
        rows = self._rows.select([number for number, found in enumerate(splits) if found == split])
        return dataset_rows(rows, "text", f"{split} text of PythonDocs")

    @cached_property
    def _rows(self) -> Any:
        library = sysconfig.get_path("stdlib")
        installed = {sysconfig.get_path(name) for name in ("purelib", "platlib")} if self.include_installed else set()
        roots = sorted(map(Path, installed))
        packages = distributions() if self.include_installed else ()
        settings = {
            "extraction_version": _EXTRACTION_VERSION,
            "python": [platform.python_implementation(), platform.python_version()],
            "standard_library": library,
            "installed": [str(root) for root in roots],
            "packages": sorted({f"{found.metadata['Name']} {found.version}" for found in packages}),
        }

        def rows() -> Iterator[dict[str, Any]]:
            for split, lines in extract_documentation(Path(library), roots).items():
                for start in range(0, len(lines), _LINES_OF_A_ROW):
                    yield {"split": split, "text": "".join(lines[start : start + _LINES_OF_A_ROW])}

        return cached("python-docs", settings, [], rows, self.cache_dir)


def extract_documentation(standard_library: Path, installed: Iterable[Path] = ()) -> dict[Split, list[str]]:
    """Extract the paragraphs of each part of the corpus, as lines.

    Args:
        standard_library: The directory of the standard library's sources.
        installed: Directories of installed packages.

    Raises:
        ValueError: If there are no sources with documentation in the standard library.
    """
    texts: dict[Split, list[str]] = {"train": [], "valid": [], "test": []}
    seen: set[str] = set()
    modules = [
        (path, path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"))
        for root in (standard_library, *installed)
        for path in python_files(root)
    ]
    with progress_bar("Reading documentation", total=len(modules)) as advance:
        for path, module in modules:
            for name, text in _texts_of(path, module):
                for paragraph in paragraphs(text):
                    # A paragraph that is repeated in another module must not be in two parts of the corpus.
                    if paragraph not in seen:
                        seen.add(paragraph)
                        texts[split_of(name)].append(paragraph + "\n")
            advance(1)
    if not all(texts.values()):
        raise ValueError(
            f"The sources of Python's standard library were not found in {str(standard_library)!r}: use a Python that "
            f"has them, or TextFiles with a text of your own."
        )
    return texts


def _texts_of(path: Path, module: str) -> list[tuple[str, str]]:
    try:
        with tokenize.open(path) as file:  # honours the encoding that a source declares
            source = file.read()
        if path.parts[-2:] == _TOPICS:
            return [(f"{module}.{topic}", text) for topic, text in sorted(topics(source).items())]
        found = [(module, text) for text in docstrings(source)]
        "".join(text for _, text in found).encode()  # lone surrogates cannot be written
    except (SyntaxError, ValueError, OSError, RecursionError):
        return []  # a template, or a source for another version of Python
    return found
