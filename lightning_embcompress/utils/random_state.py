"""The state of all random number generators that training draws from, as checkpoints can keep it.

Lightning checkpoints no random state, so that a resumed run draws other dropout masks than the uninterrupted one. The
states here hold nothing but numbers, strings and tensors: they survive `torch.load(..., weights_only=True)`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

Gathered = TypeVar("Gathered")

# Numbers in the state of the Mersenne Twister MT19937, by which Python and numpy draw; each has 32 bits.
_TWISTER_SIZE = 624


def random_state(device: torch.device) -> dict[str, Any]:
    """Read the state of torch's generators, of :mod:`random` and of numpy's global generator.

    Args:
        device: Where training computes; the state of a CUDA device's generator is read too.

    Returns:
        - ``torch``: of the CPU generator, uint8 ``[num_bytes]``;
        - ``cuda``: of the device's generator, uint8 ``[num_bytes]``; only for a CUDA device;
        - ``python``: ``version``, ``keys`` (int64 ``[625]``, the last one is the position) and ``gauss_next``;
        - ``numpy``: ``keys`` (int64 ``[624]``), ``position``, ``has_gauss`` and ``gauss``; missing, with a warning,
          where another bit generator than numpy's MT19937 was put in its place.

    Example:
        >>> import torch
        >>> cpu = torch.device("cpu")
        >>> state = random_state(cpu)
        >>> drawn = torch.rand(3)
        >>> set_random_state(state, cpu)
        >>> torch.equal(torch.rand(3), drawn)
        True
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    version, keys, gauss_next = random.getstate()
    state["python"] = {"version": version, "keys": torch.tensor(keys, dtype=torch.int64), "gauss_next": gauss_next}
    drawn_by: dict[str, Any] = dict(np.random.get_state(legacy=False))
    if drawn_by["bit_generator"] == "MT19937":
        state["numpy"] = {
            "keys": torch.from_numpy(drawn_by["state"]["key"].astype(np.int64)),
            "position": int(drawn_by["state"]["pos"]),
            "has_gauss": int(drawn_by["has_gauss"]),
            "gauss": float(drawn_by["gauss"]),
        }
    else:
        rank_zero_warn(
            f"The state of numpy's global generator is not saved: it draws by {drawn_by['bit_generator']}, and only the"
            " state of MT19937 can be saved. Leave np.random.set_bit_generator out to resume exactly."
        )
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Let all generators go on from where :func:`random_state` read them.

    The whole state is checked before the first generator is changed.

    Args:
        state: What :func:`random_state` returned, for this device or another: a ``cuda`` part is not used on another
            device, and without one the CUDA device's generator is left as it is.
        device: Where training computes.

    Raises:
        ValueError: If a part is missing or damaged.
    """
    if not isinstance(state, Mapping):
        raise _damaged("whole", f"it is of type {type(state).__name__}, not a mapping")
    # Tried on generators of their own first: each library knows best what it takes.
    tensor = _checked("torch", lambda: _try_generator(state["torch"], torch.device("cpu")))
    on_cuda = "cuda" in state and device.type == "cuda"
    cuda_tensor = _checked("cuda", lambda: _try_generator(state["cuda"], device)) if on_cuda else None
    python = _checked("python", lambda: _read_python(state["python"]))
    numpy = _checked("numpy", lambda: _read_numpy(state["numpy"])) if "numpy" in state else None

    torch.set_rng_state(tensor)
    if cuda_tensor is not None:
        torch.cuda.set_rng_state(cuda_tensor, device)
    random.setstate(python)
    if numpy is not None:
        np.random.set_state(numpy)


def gather_over_processes(state: Gathered, group: Any = None) -> list[Gathered]:
    """Give what every process of a distributed run holds, so that one checkpoint keeps it for all of them.

    A collective: all processes have to call it.

    Args:
        state: Of this process, anything that can be pickled; tensors on the CPU.
        group: By which it is exchanged; None for that of all processes.

    Returns:
        One state for each process, by its rank; the only one if nothing is distributed.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return [state]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, state, group)
    return gathered


Part = TypeVar("Part")


def _checked(name: str, read: Callable[[], Part]) -> Part:
    try:
        return read()
    except KeyError as error:
        raise _damaged(name, f"{error} is missing") from error
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise _damaged(name, " ".join(str(error).split())) from error


def _damaged(name: str, reason: str) -> ValueError:
    return ValueError(
        f"The random state of the checkpoint is damaged in its part {name!r}: {reason}. Resume from another checkpoint."
    )


def _try_generator(state: Any, device: torch.device) -> Tensor:
    if not isinstance(state, Tensor) or state.dtype != torch.uint8:
        raise TypeError(f"a tensor of uint8 is needed, not {_described(state)}")
    # A checkpoint may have been loaded onto another device, and a generator takes a tensor on the CPU only.
    on_cpu: Tensor = state.cpu()
    torch.Generator(device).set_state(on_cpu)
    return on_cpu


def _read_python(part: Any) -> tuple[Any, ...]:
    gauss_next = part["gauss_next"]
    if gauss_next is not None and not isinstance(gauss_next, float):
        raise TypeError(f"gauss_next={gauss_next!r} is neither a number nor None")
    python = (part["version"], tuple(_read_keys(part["keys"], _TWISTER_SIZE + 1).tolist()), gauss_next)
    random.Random().setstate(python)
    return python


def _read_numpy(part: Any) -> tuple[Any, ...]:
    position = part["position"]
    # Not left to numpy, which would read outside its memory.
    if type(position) is not int or not 0 <= position <= _TWISTER_SIZE:
        raise ValueError(f"position={position!r} is not within 0 and {_TWISTER_SIZE}")
    if part["has_gauss"] not in (0, 1):
        raise ValueError(f"has_gauss={part['has_gauss']!r} is neither 0 nor 1")
    keys = _read_keys(part["keys"], _TWISTER_SIZE).numpy().astype(np.uint32)
    numpy = ("MT19937", keys, position, int(part["has_gauss"]), float(part["gauss"]))
    np.random.RandomState().set_state(numpy)
    return numpy


def _read_keys(keys: Any, size: int) -> Tensor:
    if not isinstance(keys, Tensor) or keys.dtype != torch.int64 or keys.shape != (size,):
        raise TypeError(f"keys has to be a tensor of {size} int64, not {_described(keys)}")
    if not bool(((keys >= 0) & (keys < 1 << 32)).all()):
        raise ValueError("keys has numbers that are not of 32 bits")
    return keys.cpu()


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
