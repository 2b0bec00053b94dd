"""ONNX: a causal language model whose tables stay as small in the graph as on disk."""

from __future__ import annotations

import os
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_embcompress.utils.files import explaining_failure, synchronize
from lightning_embcompress.utils.progress import progress_bar

# A file of protocol buffers holds 2 GB; weights of larger models lie beside it.
_ONE_FILE = 1_900_000_000
_MOST_BATCH, _MOST_LENGTH = 1024, 2**17


class _Logits(nn.Module):
    """Ids to logits, without what else a model of transformers takes and gives."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def export_onnx(model: Any, target: str | os.PathLike[str]) -> None:
    """Write a causal language model of transformers, compressed or not, as a graph of `input_ids` to `logits`.

    Batch and length of `[batch, length]` ids are free. Tables are computed from what is stored of them: int4 and int8
    factors by `GatherBlockQuantized` and `MatMulNBits` of ONNX Runtime, codes of `transform_coding` from their packed
    bytes, low ranks by their factors; a table that embedding and head share is there once, and no runtime unfolds it
    when it loads the graph. Opset 20, as torch gives it.

    Args:
        model: In float32, with `model(input_ids=..., use_cache=False).logits`.
        target: The file to write; weights above 2 GB are in `TARGET.data` beside it.

    Raises:
        ValueError: If the graph cannot be made. Nothing is written then.
        ImportError: If the package onnxscript is not there.
        OSError: If it cannot be written.
    """
    if find_spec("onnxscript") is None or find_spec("onnx") is None:
        raise ImportError("graphs of ONNX are made by onnxscript: pip install 'lightning-embcompress[export]'")
    vocab_size = int(model.get_input_embeddings().num_embeddings)
    limit = min(_MOST_LENGTH, int(getattr(model.config, "max_position_embeddings", _MOST_LENGTH)))
    free = {0: torch.export.Dim("batch", min=1, max=_MOST_BATCH), 1: torch.export.Dim("length", min=2, max=limit)}
    ids = torch.arange(18).view(2, 9) % vocab_size
    was_training = model.training
    with warnings.catch_warnings(), progress_bar("Making the graph", total=None):
        warnings.simplefilter("ignore")
        try:
            # `optimize` would store float factors a second time, transposed.
            program: Any = torch.onnx.export(
                _Logits(model.eval()),
                (ids,),
                dynamo=True,
                optimize=False,
                verbose=False,
                dynamic_shapes=(free,),
                input_names=["input_ids"],
                output_names=["logits"],
            )
        except Exception as error:
            said = " ".join(str(error.__cause__ or error).split())[:300]
            raise ValueError(f"{type(model).__name__} cannot be made a graph of ONNX: {said}") from error
        finally:
            model.train(was_training)
    # Where every operation stands in the sources of this machine.
    for node in program.model.graph:
        node.metadata_props.clear()
    place = Path(target).absolute()
    nbytes = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    with explaining_failure(place), tempfile.TemporaryDirectory(dir=place.parent) as folder:
        program.save(Path(folder) / place.name, external_data=nbytes > _ONE_FILE)
        # The weights first: the graph names them.
        for file in sorted(Path(folder).iterdir(), key=lambda one: one.name == place.name):
            synchronize(file)
            os.replace(file, place.with_name(file.name))
