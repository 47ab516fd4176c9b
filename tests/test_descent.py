from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from slipstream.algos import PPO
from slipstream.descent import Descent, Gradient
from slipstream.optimizers import OptimizerKind, make_optimizer

KINDS: tuple[OptimizerKind, ...] = ("adam", "rmsprop", "rmsprop_tf")
SHAPES = ((8, 4, 3, 3), (), (7,), (40, 10))


def parameters() -> list[nn.Parameter]:
    """The first has its memory in another order than its indices."""
    made = [torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in SHAPES]
    return [nn.Parameter(made[0].contiguous(memory_format=torch.channels_last)), *map(nn.Parameter, made[1:])]


def named(of: list[nn.Parameter]) -> dict[str, nn.Parameter]:
    return {str(number): each for number, each in enumerate(of)}


def gradients(of: list[nn.Parameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 + step)
    return [torch.empty_like(each).copy_(torch.randn(each.shape, generator=generator)) for each in of]


def descent(of: list[nn.Parameter], kind: OptimizerKind = "adam", max_norm: float = 0.5) -> Descent:
    return Descent(replace(PPO(), optimizer=kind, max_grad_norm=max_norm), named(of), 1e-5)


def stepped(run: Descent, of: list[nn.Parameter], steps: range) -> list[Tensor]:
    return [run.apply(Gradient(gradients(of, step), {}, None), 1e-2, step) for step in steps]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_norm", [0.5, None, 1e9])
def test_steps_are_those_of_the_rule_after_clipping_by_the_global_norm(
    kind: OptimizerKind, max_norm: float | None
) -> None:
    of, oracle = parameters(), parameters()
    if max_norm is None:  # exactly that of the first gradient
        max_norm = float(nn.utils.get_total_norm(gradients(of, 0)))
    norms = stepped(descent(of, kind, max_norm), of, range(3))
    rule = make_optimizer(kind, oracle, lr=1e-2, eps=1e-5)
    for step, norm in enumerate(norms):
        for parameter, gradient in zip(oracle, gradients(oracle, step), strict=True):
            parameter.grad = gradient
        assert norm == nn.utils.clip_grad_norm_(oracle, max_norm)
        rule.step()
    assert all(torch.equal(mine, other) for mine, other in zip(of, oracle, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_without_memory_layouts_goes_on_to_the_same_bits(kind: OptimizerKind) -> None:
    of = parameters()
    run = descent(of, kind)
    assert not run.state("optimizer")
    stepped(run, of, range(2))
    kept = {name: value.clone(memory_format=torch.contiguous_format) for name, value in run.state("optimizer").items()}
    other = copy.deepcopy(of)
    resumed = descent(other, kind)
    resumed.load("optimizer", kept)
    for each, parts in ((run, of), (resumed, other)):
        stepped(each, parts, range(2, 4))
    assert all(torch.equal(one, two) for one, two in zip(of, other, strict=True))


def test_what_is_beside_is_clipped_by_a_norm_of_its_own() -> None:
    main, beside = [nn.Parameter(torch.zeros(2))], [nn.Parameter(torch.zeros(2))]
    run = Descent(replace(PPO(), optimizer="rmsprop_tf", max_grad_norm=1.0), named(main), 0.0, named(beside))
    norm = run.apply(Gradient([torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])], {}, None), 1.0, 1)
    assert float(norm) == 5.0
    for parameter, clipped in ((main[0], 0.6), (beside[0], 0.3)):
        expected = clipped / (0.99 + 0.01 * clipped**2) ** 0.5
        assert float(parameter[0].detach()) == pytest.approx(-expected, rel=1e-5)


@pytest.mark.parametrize("where", [0, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(where: int) -> None:
    of = parameters()
    run = Descent(PPO(), named(of[:2]), 1e-5, named(of[2:]))
    stepped(run, of, range(1))
    before, state = copy.deepcopy(of), {name: value.clone() for name, value in run.state("optimizer").items()}
    bad = gradients(of, 1)
    bad[where][(-1,) * bad[where].dim()] = float("nan") if where else float("inf")
    with pytest.raises(FloatingPointError, match="the gradient of update 2 is not finite"):
        run.apply(Gradient(bad, {}, None), 1e-2, 2)
    assert all(torch.equal(one, two) for one, two in zip(of, before, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in run.state("optimizer").items())


def test_units_that_no_row_gives_a_gradient_are_idle() -> None:
    """Two of four ReLUs are off in all rows, one in some; one of two outputs is not asked for."""
    net = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]))
        net[0].bias.copy_(torch.tensor([0.0, -5.0, -5.0, 1.5]))
        net[2].weight.fill_(1.0)
    loss = net(torch.tensor([[1.0], [2.0]]))[:, 0].sum()
    found = Gradient(torch.autograd.grad(loss, list(net.parameters())), {}, None)
    assert float(found.idle_units()) == 0.5
    assert float(Gradient([torch.zeros(2, 2)], {}, None).idle_units()) == 0.0


def test_what_of_a_gradient_is_not_finite_is_named() -> None:
    """Squares may be too large where numbers are not; what is beside has a norm of its own."""
    weight, bias, beside = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    run = Descent(PPO(), {"weight": weight, "bias": bias}, 1e-5, {"beside": beside})
    losses = {"policy_loss": torch.tensor(1.0), "value_loss": torch.tensor(torch.nan)}
    good, large, bad = (torch.full((2,), value) for value in (1.0, 1e30, torch.inf))
    for tensors, told in (
        ((good, bad, good), "norm inf, value_loss nan; in bias"),
        ((good, large, good), "norm inf, value_loss nan; in no parameter alone"),
        ((good, good, bad), "norm inf, value_loss nan; in beside"),
    ):
        with pytest.raises(FloatingPointError, match=rf"update 7 is not finite \({told}\)"):
            run.apply(Gradient([tensor.clone() for tensor in tensors], losses, None), 0.1, 7)
