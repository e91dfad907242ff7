"""The error of a layer that this processor cannot run names the layer, the dtype and the processor."""

import traceback
from collections.abc import Callable

import pytest
import torch
from tests.processor import bfloat16_lstm, float16_lstm, reason_against
from torch import Tensor, nn

from microbatch.failed_layer import explain_missing_kernel, failed_layer

NO_LSTM = (
    "could not create a primitive descriptor for the LSTM forward propagation primitive. Run workload with environment "
    "variable ONEDNN_VERBOSE=all to get additional diagnostic information."
)
NO_CONVOLUTION = (
    "mkldnn_reorder_conv2d_weight: bf16 path needs the cpu support avx_ne_convert or avx512bw, avx512vl and avx512dq"
)


class Tagger(nn.Module):
    """Read tokens with an LSTM, which may be kept in float32."""

    def __init__(self, *, wide: bool = False) -> None:
        super().__init__()
        # Of float32; an input in the dtype of autocast, as a linear layer's, leads past oneDNN.
        self.embedding = nn.Embedding(5, 4)
        self.reader = nn.LSTM(4, 4)
        self.wide = wide

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if not self.wide:
            return self.reader(x)[0]
        with torch.autocast("cpu", enabled=False):
            return self.reader(x.float())[0]


class Refusing(nn.Module):
    """Raise what torch raises where a kernel is missing."""

    def __init__(self, text: str, kind: type[Exception] = RuntimeError) -> None:
        super().__init__()
        self.text, self.kind = text, kind

    def forward(self, *_: Tensor) -> Tensor:
        raise self.kind(self.text)


def raised(run: Callable[[], object]) -> Exception:
    try:
        run()
    except Exception as error:  # noqa: BLE001 - whatever it is
        return error
    message = "nothing was raised"
    raise AssertionError(message)


def notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def lacking() -> torch.dtype:
    """Return a dtype of autocast in which this processor cannot run an LSTM."""
    for dtype, operator in ((torch.bfloat16, bfloat16_lstm), (torch.float16, float16_lstm)):
        if reason_against(operator):
            return dtype
    pytest.skip("this processor can run an LSTM in bfloat16 and in float16")


def test_what_torch_really_raises_is_explained_and_the_advice_works() -> None:
    dtype, model, tokens = lacking(), Tagger(), torch.tensor([[1, 2], [3, 4]])
    with torch.autocast("cpu", dtype):
        error = raised(lambda: model(tokens))
    explain_missing_kernel(error, model, autocast=dtype)
    (note,) = notes(error)
    assert f"no kernel for the layer 'reader' (LSTM) in {str(dtype).removeprefix('torch.')}" in note
    assert torch.backends.cpu.get_cpu_capability() in note
    assert note in "".join(traceback.format_exception(error))
    # Both ways out that the note names.
    model(tokens).sum().backward()
    wide = Tagger(wide=True)
    with torch.autocast("cpu", dtype):
        found = wide(tokens)
    found.sum().backward()


@pytest.mark.parametrize("text", [NO_LSTM, NO_CONVOLUTION, "could not create a primitive"])
def test_each_spelling_is_known_and_the_layer_is_named(text: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Refusing(text)))
    error = raised(lambda: model(torch.zeros(1, 4)))
    explain_missing_kernel(error, model, autocast=torch.bfloat16)
    (note,) = notes(error)
    assert "the layer '1.0' (Refusing) in bfloat16" in note
    assert str(error) == text


def test_an_error_that_was_raised_from_it_is_explained() -> None:
    """As a stage of a pipeline does, whose own error says nothing of kernels."""
    model = nn.Sequential(Refusing(NO_LSTM))

    def stage() -> None:
        try:
            model(torch.zeros(1))
        except RuntimeError as error:
            message = "failed to run forward"
            raise RuntimeError(message) from error

    error = raised(stage)
    explain_missing_kernel(error, model, autocast=torch.bfloat16)
    assert "the layer '0' (Refusing)" in notes(error)[0]


def test_in_backward_no_layer_is_named() -> None:
    error = RuntimeError(NO_LSTM)
    explain_missing_kernel(error, nn.Linear(1, 1), autocast=torch.bfloat16)
    assert "no kernel for a layer in bfloat16" in notes(error)[0]


def test_the_note_is_added_once() -> None:
    error = RuntimeError(NO_LSTM)
    for _ in range(2):
        explain_missing_kernel(error, nn.Linear(1, 1), autocast=torch.bfloat16)
    assert len(notes(error)) == 1


@pytest.mark.parametrize(
    ("error", "autocast", "device"),
    [
        (RuntimeError(NO_LSTM), None, "cpu"),
        (RuntimeError(NO_LSTM), torch.bfloat16, "meta"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x4)"), torch.bfloat16, "cpu"),
        (ValueError(NO_LSTM), torch.bfloat16, "cpu"),
    ],
)
def test_every_other_error_stays_as_it_is(error: Exception, autocast: torch.dtype | None, device: str) -> None:
    explain_missing_kernel(error, nn.Linear(1, 1, device=device), autocast=autocast)
    assert notes(error) == []


def test_the_innermost_module_of_the_model_is_found_and_no_other() -> None:
    inside, outside = nn.Sequential(Refusing("no")), Refusing("no")
    assert failed_layer(raised(lambda: inside(torch.zeros(1))), inside) == "0"
    assert failed_layer(raised(lambda: outside(torch.zeros(1))), inside) is None
    assert failed_layer(raised(lambda: outside(torch.zeros(1))), outside) == ""
