"""`embcompress export`: what is written, what is said, and what is wrong with a command line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_models import write_gguf

gguf = pytest.importorskip("gguf", reason="pip install gguf")


@pytest.fixture
def small(shell: Any, text: Path) -> Path:
    return write_gguf(Path("small.gguf"), text=shell.sentences)


def test_from_a_text(shell: Any, small: Path, text: Path) -> None:
    words = ("export", "gguf", small, "out.gguf", "--type", "Q4_1", "--text", text, "--batch-tokens", 32)
    assert shell(*words, "--statistics", "my.statistics") == 0
    printed = shell.printed()
    assert "token_embd.weight [300 x 64]: F32 became Q4_1, 5.00 bits per weight, predicted +" in printed
    assert "Perplexity on the last tenth of the text" in printed
    assert "Written: out.gguf" in printed
    tensors = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader("out.gguf").tensors}
    assert tensors["token_embd.weight"] == "Q4_1"
    # The same from what was kept, without reading the text again.
    first = Path("out.gguf").read_bytes()
    assert shell("export", "gguf", small, "again.gguf", "--type", "Q4_1", "--statistics", "my.statistics") == 0
    assert Path("again.gguf").read_bytes() == first
    shell.refuses(*words, says="'out.gguf' exists: choose another, or replace it with --overwrite", code=2)
    assert shell(*words, "--overwrite") == 0


def test_without_a_package_of_others(shell: Any, small: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_embcompress.cli.exporting.find_spec", lambda _: None)
    words = ("export", "gguf", small, "out.gguf", "--type", "Q4_1", "--text", text)
    shell.refuses(*words, says="pip install 'lightning-embcompress[export]'")


def test_without_a_text_it_is_said(shell: Any, small: Path) -> None:
    assert shell("export", "gguf", small, "out.gguf", "--type", "Q8_0") == 0
    printed = shell.printed()
    assert "No --text and no --statistics" in printed
    assert "predicted" not in printed


def test_from_a_better_source(shell: Any, small: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(".", gguf_file=str(small), dtype=torch.float32)
    exact = model.get_input_embeddings().weight.detach().clone()
    del model.config.quantization_config
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained("exact")
    AutoTokenizer.from_pretrained(".", gguf_file=str(small)).save_pretrained("exact")
    coarse = write_gguf(Path("coarse.gguf"), kind="Q4_0", text=shell.sentences)
    assert shell("export", "gguf", coarse, "out.gguf", "--type", "Q8_0", "--model", "exact") == 0
    (read,) = (tensor for tensor in gguf.GGUFReader("out.gguf").tensors if tensor.name == "token_embd.weight")
    values = torch.from_numpy(gguf.quants.dequantize(read.data, read.tensor_type))
    assert float((values - exact).abs().max()) < 5e-3
    other = write_gguf(Path("other.gguf"), text="zyxw vuts rqpo " * 50)
    shell.refuses("export", "gguf", other, "no.gguf", "--type", "Q8_0", "--model", "exact", says="it is another model")


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        ("", "`export` needs a format, one of gguf", 2),
        ("onnxx", "`export` needs a format", 2),
        ("gguf", "the following arguments are required: source, target (embcompress export gguf --help)", 2),
        ("gguf absent.gguf out.gguf --type Q4_0", "there is no file 'absent.gguf'", 2),
        ("gguf small.gguf out.gguf", "--type says which type, or --max_perplexity_increase", 2),
        ("gguf small.gguf out.gguf --type Q9", "--type 'Q9' must be Literal", 2),
        ("gguf small.gguf out.gguf --max_perplexity_increase 1%", "is predicted from --text or --statistics", 2),
        ("gguf small.gguf out.gguf --type Q4_0 --statistics no", "there is no such file", 2),
        ("gguf small.gguf nowhere/out.gguf --type Q4_0", "there is no folder", 2),
        ("gguf small.gguf small.gguf --type Q4_0", "is SOURCE: choose another", 2),
        ("gguf small.gguf . --type Q4_0", "is a directory: name the file to write", 2),
        ("gguf text.txt out.gguf --type Q4_0", "'text.txt' is no GGUF file", 1),
        ("gguf small.gguf out.gguf --type Q4_0 --device tpu", "--device 'tpu' must be", 2),
    ],
)
def test_a_wrong_command_line(words: str, message: str, code: int, shell: Any, small: Path) -> None:
    shell.refuses("export", *words.split(), says=message, code=code)


def test_a_model_that_transformers_does_not_read(shell: Any, text: Path) -> None:
    content = write_gguf(Path("small.gguf")).read_bytes()
    Path("strange.gguf").write_bytes(content.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0strng"))
    words = ("export", "gguf", "strange.gguf", "out.gguf", "--type", "Q4_0", "--text", text)
    shell.refuses(*words, says="transformers cannot read the architecture 'strng'")


def test_to_compressed_tensors(shell: Any, tmp_path: Path, text: Path) -> None:
    from transformers import GPT2LMHeadModel

    from toys import save_byte_tokenizer

    GPT2LMHeadModel(shell.config(n_embd=64)).save_pretrained("model")
    save_byte_tokenizer(Path("model"), shell.sentences)
    words = ("export", "compressed-tensors", "model", "out", "--text", text, "--statistics", "my.statistics")
    assert shell(*words) == 0
    printed = shell.printed()
    assert "transformer.wte [300 x 64]: float32 became int4, 4.50 bits per weight, predicted +" in printed
    if find_spec("compressed_tensors") is not None:
        assert "Perplexity on the last tenth of the text" in printed
    assert Path("out/tokenizer.json").read_bytes() == Path("model/tokenizer.json").read_bytes()
    shell.refuses(*words, says="TARGET 'out' is not empty", code=2)
    words = ("export", "compressed-tensors", "model", "other")
    shell.refuses(*words, "--bits", 3, says="--bits 3: must be 4 or 8", code=2)
    shell.refuses(*words, "--group_size", 48, says="group_size must be a multiple of 8", code=1)
    shell.refuses("export", "compressed-tensors", "absent/model", "other", says="there is no file or directory")


def test_to_onnx(shell: Any, gpt2: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    assert shell("compress", gpt2, "small", "--method", "low_rank", "--ratio", 2) == 0
    assert shell("export", "onnx", "small", "small.onnx") == 0
    assert "Written: small.onnx, " in shell.printed()
    session = runtime.InferenceSession("small.onnx", providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["input_ids"]
    shell.refuses("export", "onnx", "small", "small.onnx", says="'small.onnx' exists: choose another", code=2)
    shell.refuses("export", "onnx", "absent/model", "out.onnx", says="there is no file or directory")
