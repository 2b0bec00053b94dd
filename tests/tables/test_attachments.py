"""What others have attached to a layer goes over to the layer that takes its place, or is refused by name."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_embcompress import (
    EmbeddingCompression,
    QuantizationAware,
    collect_statistics,
    compress,
    convert_qat,
    densify,
    load_compressed,
    prepare_qat,
    quantize_tables,
    save_compressed,
)
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.methods.registry import LowRank
from lightning_embcompress.quantization.aware import converted
from lightning_embcompress.tables.replacement import put_back, replace_table
from toys import LanguageModel, gpt2, loaders, quiet_trainer

_IDS = torch.tensor([[1, 2, 149]])


def _model(tied: bool = False) -> LanguageModel:
    return LanguageModel(tied=tied)


def _compress(model: nn.Module) -> None:
    compress(model, "low_rank", ratio=1.5)


_COURSES: dict[str, list[Callable[[nn.Module], Any]]] = {
    "trained in few bits": [_compress, prepare_qat, convert_qat, densify],
    "quantized, and compressed anew": [_compress, quantize_tables, densify, _compress],
    "dense and quantized": [lambda model: prepare_qat(model, tables=["encoder", "decoder"]), convert_qat, densify],
}


class _Seen:
    """Attaches hooks of every kind to a layer, and keeps what they are called with."""

    def __init__(self, layer: nn.Module) -> None:
        self.calls: dict[str, nn.Module] = {}
        self.handles = [
            layer.register_forward_pre_hook(self._note("forward_pre")),
            layer.register_forward_pre_hook(self._note("forward_pre_with_kwargs"), with_kwargs=True),
            layer.register_forward_hook(self._note("forward")),
            layer.register_forward_hook(self._note("forward_with_kwargs"), with_kwargs=True, always_call=True),
            layer.register_full_backward_pre_hook(self._note("backward_pre")),
            layer.register_full_backward_hook(self._note("backward")),
            layer.register_state_dict_pre_hook(self._note("state_dict_pre")),
            layer.register_state_dict_post_hook(self._note("state_dict")),
            layer.register_load_state_dict_pre_hook(self._note("load_pre")),
            layer.register_load_state_dict_post_hook(self._note("load")),
        ]

    def _note(self, kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            self.calls[kind] = module

        return hook

    def after_all(self, model: LanguageModel) -> dict[str, nn.Module]:
        """What was called in a step and in loading the model's own state."""
        # So that a hook that knows the layer before only weakly finds it dead.
        self.calls = {}
        hidden = model.hidden(_IDS) + torch.zeros(1, requires_grad=True)
        model.decoder(hidden).sum().backward()
        model.load_state_dict(model.state_dict())
        return self.calls


@pytest.mark.parametrize("name", ["encoder", "decoder"])
@pytest.mark.parametrize("course", _COURSES)
def test_hooks_flags_and_buffers_survive_every_replacement(course: str, name: str) -> None:
    model = _model()
    layer = model.get_submodule(name)
    first, seen = vars(layer).keys(), _Seen(layer)
    buffer = torch.arange(3.0)
    layer.tag, layer._is_hf_initialized = {"a": 1}, True
    layer.register_buffer("seen", buffer, persistent=False)
    tag, classes = layer.tag, []
    # As long as this lives, hooks could go on being called with it.
    del layer
    for step in (lambda model: model.eval(), *_COURSES[course]):
        step(model)
        layer = model.get_submodule(name)
        calls = seen.after_all(model)
        # Nothing comes back to an embedding of integers.
        trains = name == "decoder" or any(one.requires_grad for one in layer.parameters())
        assert len(calls) == len(seen.handles) - (0 if trains else 2)
        assert all(called is layer for called in calls.values())
        assert layer.tag is tag
        assert layer._is_hf_initialized
        assert layer.seen is buffer
        assert f"{name}.seen" not in model.state_dict()
        assert not any(part.training for part in layer.modules())
        classes.append(type(layer).__name__)
        if not isinstance(layer, CompressedLayer):
            # Nothing of a compressed layer is left on a dense one.
            assert vars(layer).keys() == first | {"tag", "_is_hf_initialized"}
    assert classes[0] == ("Embedding" if name == "encoder" else "Linear")
    assert any(one.startswith("Compressed") for one in classes)
    # The handles of the first layer's hooks are those of the last one's.
    for handle in seen.handles:
        handle.remove()
    assert not seen.after_all(model)


@pytest.mark.parametrize("method", ["low_rank", "transform_coding"])
def test_frozen_tables_stay_frozen_and_others_do_not(method: str, tmp_path: Path) -> None:
    counts = torch.arange(150, 0, -1)

    def trained(model: LanguageModel) -> list[bool]:
        tables = [
            [*layer.factorization.parameters()] if isinstance(layer, CompressedLayer) else [layer.weight]
            for layer in (model.encoder, model.decoder)
        ]
        return [any(one.requires_grad for one in table) for table in tables if table]

    model = _model()
    model.encoder.requires_grad_(False)
    for step in (
        lambda: compress(model, method, ratio=1.5, token_counts=counts),
        lambda: prepare_qat(model),
        lambda: convert_qat(model),
        lambda: save_compressed(model, tmp_path),
        lambda: load_compressed(tmp_path, model),
        lambda: densify(model),
        lambda: load_compressed(tmp_path, model),
        lambda: densify(model),
    ):
        step()
        assert trained(model) in ([], [False, True])
    assert trained(model)


def test_hooks_change_the_output_as_they_did_before(tmp_path: Path) -> None:
    model = _model()
    handle = model.decoder.register_forward_hook(lambda module, inputs, output: output / 4)
    _compress(model)
    halved = model(_IDS)
    save_compressed(model, tmp_path)
    fresh = _model()
    other = fresh.decoder.register_forward_hook(lambda module, inputs, output: output / 4)
    load_compressed(tmp_path, fresh)
    assert torch.equal(fresh(_IDS), halved)
    handle.remove()
    other.remove()
    torch.testing.assert_close(model(_IDS), 4 * halved)
    assert torch.equal(fresh(_IDS), model(_IDS))


def test_layers_that_are_put_back_have_the_hooks_of_those_in_between() -> None:
    model = _model()
    dense = model.decoder
    before = dense.register_forward_hook(lambda *_: None)
    replace_table(model, ["decoder"], LowRank(150, 16, 2), for_a_while=True)
    between = model.decoder.register_forward_hook(lambda *_: None)
    before.remove()
    put_back(model, {"decoder": dense})
    assert model.decoder is dense
    assert list(dense._forward_hooks) == [between.id]
    between.remove()
    assert not dense._forward_hooks


def test_saving_a_prepared_model_leaves_hooks_where_they_are() -> None:
    model = _model()
    seen = _Seen(model.decoder)
    _compress(model)
    prepare_qat(model)
    layer = model.decoder
    with converted(model):
        assert model.decoder is not layer
    assert set(seen.after_all(model).values()) == {layer}


def test_hooks_of_transformers_for_frozen_backbones() -> None:
    model = gpt2().requires_grad_(False)
    model.enable_input_require_grads()
    ids = torch.tensor([[1, 2, 3]])
    _compress(model)
    assert model(ids).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(ids).logits.requires_grad


def test_noise_that_a_hook_reads_off_its_layer_is_taken_away_again() -> None:
    # As transformers does it for NEFTune.
    model = _model()
    model.encoder.noise = 0.5

    def add_noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output + module.noise * torch.ones_like(output) if module.training else output

    handle = model.encoder.register_forward_hook(add_noise)
    for step in _COURSES["trained in few bits"]:
        step(model)
        quiet = model.eval()(_IDS)
        assert not torch.equal(model.train()(_IDS), quiet)
    handle.remove()
    del model.encoder.noise
    assert torch.equal(model(_IDS), quiet)


def test_statistics_are_of_the_rows_themselves_where_a_hook_changes_them() -> None:
    moments = []
    for factor in (1.0, 3.0):
        model = _model()
        model.encoder.weight.data /= factor
        model.encoder.register_forward_hook(lambda module, inputs, output, factor=factor: output * factor)
        statistics = collect_statistics(model, [(_IDS, _IDS.roll(1))], lambda model, batch: model.loss(batch))
        moments.append(statistics.gradients["encoder"])
    torch.testing.assert_close(moments[1], 9 * moments[0])


def _half(self: nn.Linear, input: Tensor) -> Tensor:
    return nn.functional.linear(input, self.weight, self.bias) / 2


def _replace_forward(model: LanguageModel) -> None:
    plain = model.decoder.forward
    model.decoder.forward = lambda input: plain(input) / 2


def _replace_state_dict(model: LanguageModel) -> None:
    plain = model.decoder.state_dict
    model.decoder.state_dict = lambda *arguments, **keywords: dict(plain(*arguments, **keywords))


def _watch_gradient(model: LanguageModel) -> None:
    model.encoder.weight.register_hook(lambda gradient: 0 * gradient)


def _step_in_backward(model: LanguageModel) -> None:
    model.encoder.weight.register_post_accumulate_grad_hook(lambda weight: None)


def _add_parameter(model: LanguageModel) -> None:
    model.decoder.temperature = nn.Parameter(torch.ones(1))


def _add_child(model: LanguageModel) -> None:
    model.decoder.observer = nn.BatchNorm1d(3)


def _keep_weight(model: LanguageModel) -> None:
    model.tied = [model.encoder.weight]


def _hide_weight(model: LanguageModel) -> None:
    weight = model.encoder.weight.detach()
    del model.encoder.weight
    model.encoder.weight = weight


_REFUSED: dict[str, tuple[Callable[[LanguageModel], Any], str]] = {
    "forward": (_replace_forward, "'decoder' .*forward of its own.*register_forward_hook"),
    "method": (
        lambda model: setattr(model.decoder, "forward", types.MethodType(_half, model.decoder)),
        "'decoder' .*forward of its own",
    ),
    "state dict": (_replace_state_dict, "'decoder' .*state_dict of its own.*register_state_dict"),
    "gradient hook": (_watch_gradient, "weight of .*'encoder' .*hooks"),
    "step in backward": (_step_in_backward, "weight of .*'encoder' .*hooks"),
    "parameter": (_add_parameter, "'decoder' .*'temperature'"),
    "child": (_add_child, "'decoder' .*'observer'"),
    "pruned": (lambda model: nn.utils.prune.l1_unstructured(model.decoder, "weight", 0.5), "'decoder' .*weight_orig"),
    "normalized": (lambda model: nn.utils.weight_norm(model.decoder), "'decoder' .*'weight_g', 'weight_v'.*remove"),
    "spectral": (lambda model: nn.utils.spectral_norm(model.decoder), "'decoder' .*'weight_orig'"),
    "no parameter": (_hide_weight, "'encoder' .*no parameter"),
    "kept weight": (_keep_weight, "'tied' of the LanguageModel is table 'encoder' by another name"),
    "float8": (lambda model: model.encoder.to(torch.float8_e4m3fn), "'encoder' .*float8_e4m3fn.*bfloat16"),
}


@pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm):FutureWarning")
@pytest.mark.parametrize("kind", _REFUSED)
def test_what_cannot_go_over_is_refused_before_anything_changes(kind: str, tmp_path: Path) -> None:
    attach, message = _REFUSED[kind]
    model = _model()
    attach(model)
    layers = list(model.modules())
    callbacks = [
        EmbeddingCompression("low_rank", ratio=1.5, at_epoch=2, tables=["encoder", "decoder"]),
        QuantizationAware(tables=["encoder", "decoder"], at_epoch=2),
    ]
    for refuse in (
        lambda: compress(model, "low_rank", ratio=1.5, tables=["encoder", "decoder"]),
        lambda: prepare_qat(model, tables=["encoder", "decoder"]),
        *(lambda callback=one: quiet_trainer(tmp_path, callback).fit(model, **loaders()) for one in callbacks),
    ):
        with pytest.raises(ValueError, match=message):
            refuse()
        assert all(one is other for one, other in zip(layers, model.modules(), strict=True))


@pytest.mark.parametrize("change", [prepare_qat, quantize_tables, densify, convert_qat, load_compressed])
def test_attachments_of_compressed_layers_are_refused_too(change: Callable[..., Any], tmp_path: Path) -> None:
    model = _model()
    _compress(model)
    save_compressed(model, tmp_path)
    arguments: tuple[Any, ...] = (model,)
    if change is convert_qat:
        prepare_qat(model, backbone="int8")
    if change is load_compressed:
        arguments = (tmp_path, model)
    _replace_forward(model)
    layers = list(model.modules())
    with pytest.raises(ValueError, match="'decoder' .*forward of its own"):
        change(*arguments)
    assert all(one is other for one, other in zip(layers, model.modules(), strict=True))
    # It can be saved: nothing is replaced for good.
    save_compressed(model, tmp_path / "other")


def test_methods_of_a_layer_are_those_of_the_next_one() -> None:
    model = _model()
    # As accelerate leaves it when it takes its hooks away.
    model.decoder.forward = model.decoder.forward
    model.decoder.halved = types.MethodType(_half, model.decoder)
    densified = model(_IDS)
    prepare_qat(model, tables=["encoder", "decoder"])
    assert model.decoder.forward.__self__ is model.decoder
    assert model.decoder.halved.__self__ is model.decoder
    assert not torch.equal(model(_IDS), densified)
    densify(model)
    assert model.decoder.forward.__func__ is nn.Linear.forward
    torch.testing.assert_close(2 * model.decoder.halved(model.hidden(_IDS)), model(_IDS))


def test_other_references_to_a_layer_follow_it() -> None:
    model = _model()
    model.heads, model.by_name, model.both = [model.decoder], {"head": model.decoder}, (model.encoder, 3)
    model.project = model.decoder.forward
    # Not registered, as those do who want no second name in the state dict.
    object.__setattr__(model.mix, "output", model.decoder)
    for step in (*_COURSES["trained in few bits"], *_COURSES["quantized, and compressed anew"]):
        step(model)
        assert model.heads == [model.decoder]
        assert model.by_name == {"head": model.decoder}
        assert model.both == (model.encoder, 3)
        assert vars(model.mix)["output"] is model.decoder
        assert torch.equal(model.project(model.hidden(_IDS)), model(_IDS))


class _Quarter:
    """A hook of accelerate that changes what a layer gives."""

    def __new__(cls) -> Any:
        hooks = pytest.importorskip("accelerate.hooks")

        class Quarter(hooks.ModelHook):  # type: ignore[misc,name-defined]
            def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
                self.called_with = module
                return output / 4

        return Quarter()


@pytest.mark.parametrize("course", _COURSES)
def test_hooks_of_accelerate_survive_every_replacement(course: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, own = _model(), _Quarter()
    hooks.add_hook_to_module(model.decoder, own)
    hooks.add_hook_to_module(model.decoder, hooks.AlignDevicesHook(torch.device("cpu")), append=True)
    for step in _COURSES[course]:
        step(model)
        quarter = model(_IDS)
        assert own.called_with is model.decoder
        assert model.decoder._hf_hook.hooks[0] is own
        # Others are put on top of it, and all are taken away, by accelerate itself.
        hooks.add_hook_to_module(model.decoder, _Quarter(), append=True)
        torch.testing.assert_close(4 * model(_IDS), quarter)
        hooks.remove_hook_from_module(model.decoder)
        torch.testing.assert_close(model(_IDS), 4 * quarter)
        hooks.add_hook_to_module(model.decoder, hooks.SequentialHook(own))


def test_a_forward_around_that_of_accelerate_is_refused() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = _model()
    _replace_forward(model)
    hooks.add_hook_to_module(model.decoder, _Quarter())
    with pytest.raises(ValueError, match="'decoder' .*forward of its own"):
        _compress(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["low_rank", "transform_coding"])
def test_offloaded_factors_are_brought_back_for_every_call(method: str, tied: bool, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = _model(tied)
    compress(model, method, ratio=2, token_counts=torch.arange(150, 0, -1))
    expected = model(_IDS)
    save_compressed(model, tmp_path)
    for place in (accelerate.cpu_offload, lambda model, **how: accelerate.disk_offload(model, str(tmp_path), **how)):
        place(model, execution_device=torch.device("cpu"), offload_buffers=True)
        assert all(one.is_meta for one in model.encoder.factorization.state_dict().values())
        for _ in range(2):
            assert torch.equal(model(_IDS), expected)
        assert all(one.is_meta for one in model.encoder.factorization.state_dict().values())
        for refused in (
            lambda: densify(model),
            lambda: save_compressed(model, tmp_path),
            lambda: load_compressed(tmp_path, model),
            lambda: prepare_qat(model, backbone="int8"),
            lambda: prepare_qat(model),
        ):
            with pytest.raises(ValueError, match="remove_hook_from_submodules"):
                refused()
        accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(_IDS), expected)


def test_an_offloaded_table_is_refused_and_one_beside_offloaded_layers_is_compressed() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, place = _model(), {"execution_device": torch.device("cpu")}
    expected = _model()
    accelerate.cpu_offload(model.mix, **place)
    for step in _COURSES["trained in few bits"]:
        step(model)
        step(expected)
        assert torch.equal(model(_IDS), expected(_IDS))
    with pytest.raises(ValueError, match="the model is offloaded"):
        prepare_qat(model, tables=["encoder"], backbone="int8")
    _compress(model)
    _compress(expected)
    dense = _model()
    accelerate.cpu_offload(dense, **place)
    with pytest.raises(ValueError, match="'encoder' .*remove_hook_from_submodules"):
        _compress(dense)
    accelerate.hooks.remove_hook_from_submodules(dense)
    _compress(dense)
    _compress(_model())
    for step in (prepare_qat, convert_qat, densify):
        step(dense)


def test_weights_of_torchao_are_refused_by_name() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = _model()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), lambda module, name: name == "decoder")
    with pytest.raises(ValueError, match="'decoder' .*torchao.*Int8"):
        _compress(model)
    with pytest.raises(ValueError, match="'decoder' .*torchao.*Int8"):
        prepare_qat(model, tables=["decoder"])


@pytest.mark.parametrize("course", _COURSES)
def test_tables_train_on_after_any_replacement_in_inference_mode(course: str) -> None:
    model = _model()
    for step in _COURSES[course]:
        with torch.inference_mode():
            step(model)
        optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
        model.loss((_IDS, _IDS)).backward()
        optimizer.step()


def test_a_model_on_the_meta_device_is_loaded_with_its_ties(tmp_path: Path) -> None:
    def make() -> nn.Module:
        table = nn.Embedding(100, 8)
        first, last = nn.Linear(8, 8), nn.Linear(8, 8)
        last.weight = first.weight
        model = nn.Sequential(table, first, last, nn.BatchNorm1d(8), nn.Linear(8, 100))
        model[4].weight = table.weight
        return model.eval()

    model = make()
    _compress(model)
    save_compressed(model, tmp_path)
    with torch.device("meta"):
        empty = make().to(torch.float64)
    load_compressed(tmp_path, empty)
    ids = torch.tensor([1, 99])
    torch.testing.assert_close(empty(ids), model(ids).double(), rtol=1e-4, atol=1e-5)
    assert empty[2].weight is empty[1].weight
    assert empty[4].factorization is empty[0].factorization
    with torch.device("meta"):
        empty = make()
    empty.register_buffer("positions", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(ValueError, match="'positions' is on the meta device"):
        load_compressed(tmp_path, empty)
    assert all(one.is_meta for one in empty.state_dict().values())
    with pytest.raises(ValueError, match=r"'0\.weight' .*meta device"):
        save_compressed(empty, tmp_path)
