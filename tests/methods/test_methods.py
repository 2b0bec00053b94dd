"""The registry of methods and their options."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_embcompress.methods.registry import METHODS, GroupReduceConfig, get_config, get_method


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_described_and_has_default_options(name: str) -> None:
    method = get_method(name)
    assert method.config.description
    options = get_config(name)
    assert options == method.config()
    assert not options.fixes_size
    assert all(getattr(options, option) is None for option in options.size_fields)


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'groupreduce' \(did you mean 'group_reduce'\?\)"):
        get_method("groupreduce")
    with pytest.raises(ValueError, match=r"unknown method 'xyz'; methods are cp, group_reduce, "):
        get_method("xyz")


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'group' \(did you mean 'groups' or 'grouping'\?\); 'group_reduce'"):
        get_config("group_reduce", group=3)
    # What the name of the method stands for is no option of it.
    with pytest.raises(ValueError, match=r"unknown option 'weighted'; 'low_rank' has rank"):
        get_config("low_rank", weighted=True)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        *(("cp", given) for given in ({"rank": 0}, {"rank": 1000}, {"max_iterations": 0}, {"vocab_shape": [3, 33]})),
        *(("group_reduce", given) for given in ({"groups": 0}, {"groups": 101}, {"refine_rounds": -1})),
        *(("group_reduce", given) for given in ({"move_fraction": 0}, {"move_fraction": 1.5}, {"grouping": "random"})),
        *(("low_rank", given) for given in ({"rank": 0}, {"rank": 17})),
        *(("product_quantization", given) for given in ({"subspaces": 0}, {"subspaces": 17}, {"max_iterations": 0})),
        *(("product_quantization", {"bits": 4, "rare_bits": bits}) for bits in (-1, 4)),
        *(("product_quantization", given) for given in ({"bits": 0}, {"bits": 16}, {"rare_bits": 8})),
        *(("product_quantization", given) for given in ({"rare_fraction": 1.0}, {"metric_rounds": -1})),
        *(
            ("tensor_train", given)
            for given in ({"max_rank": 0}, {"max_rank": 5}, {"shape": [4, 0]}, {"shape": [3, 5]})
        ),
        *(("tensor_train_matrix", given) for given in ({"max_rank": 0}, {"max_rank": 1000}, {"num_cores": 0})),
        *(("tensor_train_matrix", given) for given in ({"vocab_shape": [9, 9], "dim_shape": [2, 2, 4]}, {"init": "0"})),
        *(
            ("tucker", given)
            for given in ({"ranks": []}, {"ranks": [2, 2, 20]}, {"ranks": [2, 6]}, {"max_iterations": -1})
        ),
        *(("tucker", {"ranks": ranks}) for ranks in ([2, 2, 0], [2, 7, 3])),
        *(("tucker", given) for given in ({"dim_shape": [3, 5]}, {"dim_shape": [4, -4]}, {"vocab_shape": []})),
    ],
)
def test_options_that_do_not_fit_are_named(method: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(given)[-1]):
        get_method(method).factorization.smallest_bytes(100, 16, 4, get_config(method, **given))


def test_number_of_groups() -> None:
    assert GroupReduceConfig().groups_for(30_000) == 5
    assert GroupReduceConfig().groups_for(30_001) == 20
    assert GroupReduceConfig().groups_for(3) == 3
    assert GroupReduceConfig(groups=7).groups_for(30_001) == 7
