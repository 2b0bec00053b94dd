"""The registry of methods and their options."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_embcompress.methods.registry import METHODS, GroupReduceConfig, get_config, get_method


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_described_and_has_default_options(name: str) -> None:
    method = get_method(name)
    assert method.config.description
    assert method.config() == method.config()


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"unknown method 'groupreduce' \(did you mean 'group_reduce'\?\); methods are"
    ):
        get_method("groupreduce")
    with pytest.raises(ValueError, match=r"unknown method 'xyz'; methods are cp, group_reduce, "):
        get_method("xyz")


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"unknown option 'group' \(did you mean 'groups' or 'grouping'\?\); 'group_reduce' has"
    ):
        get_config("group_reduce", group=3)
    # What the name of the method stands for is no option of it.
    with pytest.raises(ValueError, match=r"unknown option 'weighted'; 'low_rank' has rank"):
        get_config("low_rank", weighted=True)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_options_that_fix_the_size_are_known_as_such(name: str) -> None:
    options = get_config(name)
    assert not options.fixes_size
    for option in options.size_fields:
        assert getattr(options, option) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"groups": 0}, "groups must be 1 or more, or 'auto', it is 0"),
        ({"refine_rounds": -1}, "refine_rounds must be 0 or more, it is -1"),
        ({"move_fraction": 0}, "move_fraction must be above 0 and at most 1, it is 0"),
        ({"move_fraction": 1.5}, "move_fraction must be above 0 and at most 1, it is 1.5"),
    ],
)
def test_options_out_of_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_config("group_reduce", **given)


def test_number_of_groups() -> None:
    assert GroupReduceConfig().groups_for(30_000) == 5
    assert GroupReduceConfig().groups_for(30_001) == 20
    assert GroupReduceConfig().groups_for(3) == 3
    assert GroupReduceConfig(groups=7).groups_for(30_001) == 7
    with pytest.raises(ValueError, match="groups must be at most the 3 rows of the table, it is 4"):
        GroupReduceConfig(groups=4).groups_for(3)
