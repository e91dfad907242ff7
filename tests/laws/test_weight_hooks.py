"""Hooks on weights see the finished gradient once, as in one backward over the whole batch (law S9)."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import microbatch as mb
from microbatch.errors import NonfiniteError

Hook = Callable[[Tensor], Tensor | None]


def clamp(gradient: Tensor) -> Tensor:
    return gradient.clamp(-0.01, 0.01)


def normalise(gradient: Tensor) -> Tensor:
    return gradient / gradient.norm()


def decay(gradient: Tensor) -> Tensor:
    return gradient + 0.3


def mask(gradient: Tensor) -> Tensor:
    return gradient * (torch.arange(gradient.shape[-1]) % 2)


def in_place(gradient: Tensor) -> None:
    gradient.clamp_(-0.02, 0.02)


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    kept = torch.rand(11, generator=draw) < 0.6
    x, y = torch.randn(11, 3, generator=draw), torch.randn(11, 2, generator=draw)
    return {"x": x.to(dtype), "y": y.to(dtype), "kept": kept.to(dtype)}


def mean(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(rows["x"]), rows["y"])


def masked(model: nn.Module, rows: dict[str, Tensor]) -> mb.Loss:
    each = (model(rows["x"]) - rows["y"]).square().sum(1)
    return mb.Loss(sum=(each * rows["kept"]).sum(), count=rows["kept"].sum())


def spread(model: nn.Module, z: Tensor) -> Tensor:
    return (z - z.mean(0)).square().sum().sqrt()


def net(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    between = nn.BatchNorm1d(4) if norm else nn.Tanh()
    return nn.Sequential(nn.Linear(3, 4), between, nn.Linear(4, 2)).double()


def hooked(model: nn.Module, *hooks: Hook) -> nn.Module:
    for hook in hooks:
        model.get_parameter("0.weight").register_hook(hook)
        model.get_parameter("2.bias").register_hook(hook)
    return model


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def plain(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    loss(model).backward()
    return grads(model)


def near(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    same = found.keys() == wanted.keys()
    return same and all(torch.allclose(found[name], wanted[name], rtol=1e-12, atol=1e-15) for name in wanted)


HOOKS: dict[str, list[Hook]] = {
    "clamp": [clamp],
    "normalise": [normalise],
    "add": [decay],
    "mask": [mask],
    "in place": [in_place],
    "two, in order": [decay, clamp],
    "the other order": [clamp, decay],
}


@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("size", [1, 4, 11])
def test_the_gradient_is_that_of_one_backward_with_the_hooks(hooks: list[Hook], size: int) -> None:
    for loss_fn, whole in [(mean, lambda m: mean(m, batch())), (masked, lambda m: masked(m, batch()).mean)]:
        model = hooked(net(), *hooks)
        accumulator = mb.Accumulator(model, microbatch_size=size)
        for _ in range(2):  # the second window has another estimate of the count
            accumulator.gradient(batch(), loss_fn)
            assert near(grads(model), plain(hooked(net(), *hooks), whole))


WAYS: dict[str, dict[str, Any]] = {
    "checkpoint": {"checkpoint": ["0"]},
    "unfused": {"sums": mb.Sums(fuse=False)},
    "deterministic": {"ranks": mb.Ranks(deterministic=True)},
    "offload": {"offload": "activations"},
    "dropout": {"dropout": "by_row"},
    "noise": {"noise_scale": mb.NoiseScale(every=1)},
    "auto": {"microbatch_size": "auto", "memory_budget": "1 GiB"},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_it_is_so_beside_other_features(options: dict[str, Any]) -> None:
    model = hooked(net(), clamp)
    asked: dict[str, Any] = {"microbatch_size": 4, **options}
    mb.Accumulator(model, **asked).gradient(batch(), mean)
    assert near(grads(model), plain(hooked(net(), clamp), lambda m: mean(m, batch())))


def test_it_is_so_with_exact_batch_norm_and_with_a_loss_of_the_whole_batch() -> None:
    model = hooked(net(norm=True), clamp)
    mb.Accumulator(model, microbatch_size=4, batch_norm="exact").gradient(batch(), mean)
    assert near(grads(model), plain(hooked(net(norm=True), clamp), lambda m: mean(m, batch())))
    for coupled in ("twice", "keep"):
        model = hooked(net(), clamp)
        accumulator = mb.Accumulator(model, microbatch_size=4, coupled=coupled)
        accumulator.gradient(batch(), spread, encode=lambda model, rows: model(rows["x"]))
        assert near(grads(model), plain(hooked(net(), clamp), lambda m: spread(m, m(batch()["x"]))))


@pytest.mark.parametrize("sums", [mb.Sums(), mb.Sums(dtype=torch.bfloat16, how="compensated")])
def test_a_narrow_weights_hook_gets_a_narrow_gradient_and_its_result_counts(sums: mb.Sums) -> None:
    seen: list[torch.dtype] = []

    def constant(gradient: Tensor) -> Tensor:
        seen.append(gradient.dtype)
        return torch.full_like(gradient, 0.25)

    model = hooked(net().bfloat16(), constant)
    mb.Accumulator(model, microbatch_size=4, sums=sums).gradient(batch(torch.bfloat16), mean)
    assert seen == [torch.bfloat16] * 2
    assert all((grads(model)[name] == 0.25).all() for name in ("0.weight", "2.bias"))
    mb.Accumulator(model, microbatch_size=4, sums=sums, max_grad_norm=0.01).gradient(batch(torch.bfloat16), mean)
    assert nn.utils.get_total_norm(list(grads(model).values())) < 0.0101  # the hook's result is clipped, too


def test_the_norm_and_clipping_are_of_the_gradient_that_the_hooks_return() -> None:
    model, reference = hooked(net(), decay), hooked(net(), decay)
    step = mb.Accumulator(model, microbatch_size=4, max_grad_norm=0.1).gradient(batch(), mean)
    mean(reference, batch()).backward()
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    assert torch.allclose(torch.as_tensor(step.grad_norm).double(), norm, rtol=1e-6)
    for name, each in grads(reference).items():  # torch adds 1e-6 to the norm
        assert torch.allclose(grads(model)[name], each, rtol=1e-5)


def rooted(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) * 0).square().sum().sqrt()  # the slope of a root at zero: not a number


def test_a_hook_may_make_the_gradient_finite() -> None:
    model = nn.Linear(2, 1)
    x = torch.ones(4, 2)
    with pytest.raises(NonfiniteError):
        mb.Accumulator(model, microbatch_size=2).gradient(x, rooted)
    for each in model.parameters():
        each.register_hook(torch.nan_to_num)
    step = mb.Accumulator(model, microbatch_size=2).gradient(x, rooted)
    assert float(step.grad_norm) == 0.0


def test_a_hook_that_returns_what_is_not_finite_is_refused() -> None:
    model = nn.Linear(2, 1)
    model.weight.register_hook(lambda gradient: gradient / 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    with pytest.raises(NonfiniteError):
        mb.Accumulator(model, optimizer, microbatch_size=2).step(torch.ones(4, 2), lambda m, x: m(x).mean())
    assert torch.equal(model.weight, before)


def test_a_scaled_gradient_is_unscaled_before_the_hooks() -> None:
    model = nn.Linear(3, 1)
    seen: list[Tensor] = []
    model.weight.register_hook(seen.append)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 3)
    accumulator = mb.Accumulator(model, optimizer, microbatch_size=2, grad_scaler=scaler)
    accumulator.step(x, lambda model, x: model(x).mean())
    assert len(seen) == 1
    assert torch.allclose(seen[0], x.mean(0, keepdim=True))


def test_hooks_are_where_they_were_after_a_step_and_after_an_error() -> None:
    model = hooked(net(), clamp, decay)
    hooks: Any = model.get_parameter("0.weight")._backward_hooks
    before = list(hooks.items())
    accumulator = mb.Accumulator(model, microbatch_size=4)
    accumulator.gradient(batch(), mean)
    assert list(hooks.items()) == before

    def fails(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
        assert list(hooks.values()) != [clamp, decay]  # aside
        if len(rows["x"]) < 4:
            raise ValueError("in the last microbatch")
        return mean(model, rows)

    with pytest.raises(ValueError, match="last microbatch"):
        accumulator.gradient(batch(), fails)
    assert list(hooks.items()) == before
    assert model.get_parameter("0.weight")._backward_hooks is hooks
    model.zero_grad()
    assert near(
        plain(model, lambda m: mean(m, batch())), plain(hooked(net(), clamp, decay), lambda m: mean(m, batch()))
    )


def test_hooks_that_are_removed_or_added_inside_the_window_stay_so() -> None:
    model = net()
    weight = model.get_parameter("0.weight")
    handle = weight.register_hook(clamp)
    weight.register_hook(mask)
    added: list[Any] = []

    def loss_fn(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
        handle.remove()
        if not added:
            added.append(weight.register_hook(lambda gradient: None))
        return mean(model, rows)

    mb.Accumulator(model, microbatch_size=4).gradient(batch(), loss_fn)
    assert near(grads(model), grads_masked())
    assert len(weight._backward_hooks or {}) == 2
    added[0].remove()
    assert list((weight._backward_hooks or {}).values()) == [mask]


def grads_masked() -> dict[str, Tensor]:
    model = net()
    model.get_parameter("0.weight").register_hook(mask)
    return plain(model, lambda m: mean(m, batch()))


def test_the_noise_scale_is_measured_before_the_hooks() -> None:
    found: list[Any] = []
    for hooks in ([], [clamp]):
        model = hooked(net(), *hooks)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        asked = mb.NoiseScale(every=1)
        accumulator = mb.Accumulator(model, optimizer, microbatch_size=4, noise_scale=asked)
        found.append([accumulator.step(batch(), mean) and accumulator.state_dict()["noise"] for _ in range(2)])
    assert found[0] == found[1]


def test_where_no_rank_has_the_whole_gradient_it_is_said_once() -> None:
    model = hooked(net(), mask)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    accumulator = mb.Accumulator(model, optimizer, microbatch_size=4, sums=mb.Sums(buffer="none"))
    with pytest.warns(mb.MicrobatchWarning, match=r"'0\.weight' has a hook .* accumulator\.gradient") as caught:
        accumulator.step(batch(), mean)
    assert len(caught) == 1
    accumulator.step(batch(), mean)  # once, or the warning would be an error here


def test_an_activations_hook_sees_the_finished_slope_once_the_count_is_known() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = copy.deepcopy(net())

        def forward(self, x: Tensor) -> Tensor:
            h = self.layers[1](self.layers[0](x))
            if h.requires_grad:
                h.register_hook(lambda gradient: gradient.clamp(-0.02, 0.02))
            return self.layers[2](h)

    def weighted(model: nn.Module, rows: dict[str, Tensor]) -> mb.Loss:
        return mb.Loss(sum=masked(model, rows).sum * 3, count=rows["kept"].sum() * 3)

    model, reference = Cell(), Cell()
    accumulator = mb.Accumulator(model, microbatch_size=4)
    accumulator.gradient(batch(), weighted)
    wanted = plain(reference, lambda m: weighted(m, batch()).mean)
    assert not near(grads(model), wanted)  # the first window does not know the count
    accumulator.gradient(batch(), weighted)
    assert near(grads(model), wanted)


def clamps(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.clamp_(-1e-3, 1e-3)


def clamps_data(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.data.clamp_(-1e-3, 1e-3)


def reads(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.norm()


@pytest.mark.parametrize("hook", [clamps, clamps_data])
def test_a_hook_that_changes_the_sum_after_each_microbatch_is_named_once(hook: Any) -> None:
    model = net()
    weight: Any = model.get_parameter("0.weight")
    handle = weight.register_post_accumulate_grad_hook(hook)
    it = mb.Accumulator(model, microbatch_size=3)
    with pytest.warns(mb.MicrobatchWarning, match=r"'0\.weight' after every microbatch.*or use register_hook"):
        it.gradient(batch(), mean)
    it.gradient(batch(), mean)
    assert list(weight._post_accumulate_grad_hooks.values()) == [hook]
    handle.remove()
    it.gradient(batch(), mean)


@pytest.mark.parametrize("hook", [clamps, reads])
def test_a_hook_that_runs_once_or_only_reads_is_not_named(hook: Any) -> None:
    model = net()
    model.get_parameter("0.weight").register_post_accumulate_grad_hook(hook)
    rows = len(batch()["x"])
    mb.Accumulator(model, microbatch_size=rows if hook is clamps else 3).gradient(batch(), mean)


def test_a_step_without_hooks_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mb.Accumulator(net(), microbatch_size=4).gradient(batch(), mean)


def test_a_hook_over_several_weights_still_runs_inside_each_backward() -> None:
    model = net()
    calls: list[int] = []
    handle = torch.autograd.graph.register_multi_grad_hook(
        list(model.parameters()), lambda gradients: calls.append(len(gradients))
    )
    mb.Accumulator(model, microbatch_size=4).gradient(batch(), mean)
    handle.remove()
    assert calls == [4, 4, 4]
