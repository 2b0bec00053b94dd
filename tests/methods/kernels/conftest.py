"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Compile a kernel for a GPU that need not be there: by its parameters, each a type, or a number that is known."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile(kernel: Any, capability: int, divisible: Sequence[str] = (), **parameters: Any) -> Any:
        assert isinstance(kernel, triton.runtime.JITFunction), "TRITON_INTERPRET is set"
        types = {name: given if isinstance(given, str) else "constexpr" for name, given in parameters.items()}
        known = {
            (kernel.arg_names.index(name),): given for name, given in parameters.items() if types[name] == "constexpr"
        }
        # As a launch tells the compiler of numbers and addresses that are.
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
        source = triton.compiler.ASTSource(kernel, types, known, attributes)
        return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", capability, 32))

    return compile
