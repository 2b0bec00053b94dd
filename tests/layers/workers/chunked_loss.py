"""Computes the loss of a head by chunks in every process of a group, and compares with one process."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_embcompress import compress
from lightning_embcompress.integrations.sharding import shard_tables
from lightning_embcompress.layers.full_softmax import full_softmax_loss, head_softmax_loss
from lightning_embcompress.layers.fused_loss import fused_cross_entropy

VOCAB_SIZE, DIM = 60, 8


class Model(nn.Module):
    def __init__(self, tied: bool, frozen: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(VOCAB_SIZE, DIM), nn.Linear(DIM, VOCAB_SIZE)
        self.mix = nn.Linear(DIM, DIM)
        if tied:
            self.decoder.weight = self.encoder.weight
        compress(self, "low_rank", ratio=2, token_counts=torch.arange(VOCAB_SIZE, 0, -1))
        if frozen:
            self.decoder.requires_grad_(False)
        self.double()
        self.chunked = True

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = self.mix(self.encoder(inputs)).tanh()
        if not self.chunked:
            return full_softmax_loss(self.decoder(hidden), targets)[0]
        return head_softmax_loss(self.decoder, hidden, targets, chunk_tokens=3)[0]


def _whole(gradient: Tensor | None) -> Tensor | None:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def _compare(model: Model, wrapped: Any, inputs: Tensor, targets: Tensor) -> None:
    alone = copy.deepcopy(model)
    alone.chunked = False
    wrapped = wrapped(model)
    own = slice(dist.get_rank(), None, dist.get_world_size())
    for _ in range(2):
        wrapped(inputs[own], targets[own]).backward()
        alone(inputs, targets).backward()
        for (name, one), other in zip(model.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(_whole(one.grad), other.grad, msg=lambda text, name=name: f"{name}: {text}")


def _sharded(head: str) -> Any:
    def shard(model: Model) -> Model:
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        if head == "table":
            shard_tables(model, mesh=mesh)
        elif head == "layer":
            fully_shard(model.decoder, mesh=mesh)
        whole = fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match="FSDP has sharded the parameters of this (FSDP)?CompressedLinear"):
            fused_cross_entropy(model.decoder, torch.zeros(3, DIM), torch.zeros(3, dtype=torch.long))
        return whole

    return shard


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    inputs, targets = torch.randint(VOCAB_SIZE, (2, 4, 9)).unbind()
    for tied, frozen in ((False, False), (True, False), (False, True)):
        _compare(Model(tied, frozen), DistributedDataParallel, inputs, targets)
    for head, tied in (("root", True), ("table", True), ("layer", False)):
        _compare(Model(tied, False), _sharded(head), inputs, targets)
    sys.stdout.write("as one process\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
