"""Every process gathers the random state of all of them, and goes on from its own."""

from __future__ import annotations

import torch

from lightning_embcompress.utils.random_state import gather_over_processes, random_state, set_random_state


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    cpu = torch.device("cpu")
    torch.manual_seed(rank)
    states = gather_over_processes(random_state(cpu))
    drawn = torch.rand(5)
    assert len(states) == 2
    assert not torch.equal(states[0]["torch"], states[1]["torch"])
    set_random_state(states[rank], cpu)
    assert torch.equal(torch.rand(5), drawn)
    # The other one's is the one that the other one has drawn from.
    set_random_state(states[1 - rank], cpu)
    expected = torch.Generator().manual_seed(1 - rank)
    assert torch.equal(torch.rand(5), torch.rand(5, generator=expected))
    print("passed")


if __name__ == "__main__":
    main()
