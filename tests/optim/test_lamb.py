"""LAMB against the paper's algorithm in float64 and against timm's."""

import pytest
import torch
from timm.optim import Lamb as TimmLamb
from torch.utils._python_dispatch import TorchDispatchMode

from evaclip.optim.lamb import Lamb


def parameters(dtype=torch.float32, shapes=((6, 4), (5,), (3, 3, 2))):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def by_the_paper(params, settings, steps, beta1=0.9, beta2=0.98, eps=1e-6, lr=0.01, max_ratio=None):
    """Algorithm 2 of arXiv 1904.00962, one tensor at a time. `settings`: (lr factor, decay, adapt) of each."""
    x = [p.detach().double().clone() for p in params]
    m, v = [torch.zeros_like(p) for p in x], [torch.zeros_like(p) for p in x]
    for step in range(1, steps + 1):
        probe = [p.clone() for p in x]
        give_gradients(probe, step)
        for n, (factor, decay, adapt) in enumerate(settings):
            g = probe[n].grad
            m[n] = beta1 * m[n] + (1 - beta1) * g
            v[n] = beta2 * v[n] + (1 - beta2) * g * g
            r = (m[n] / (1 - beta1**step)) / ((v[n] / (1 - beta2**step)).sqrt() + eps) + decay * x[n]
            ratio = x[n].norm() / r.norm() if adapt and x[n].norm() > 0 and r.norm() > 0 else 1.0
            if max_ratio is not None:
                ratio = min(ratio, max_ratio)
            x[n] = x[n] - lr * factor * ratio * r
    return x


@pytest.mark.parametrize("max_ratio", [None, 0.7])
def test_twenty_steps_are_the_papers(max_ratio):
    params = parameters()
    settings = [(1.0, 0.05, True), (0.3, 0.0, False), (0.1, 0.0, True)]
    groups = [
        {"params": [p], "lr": 0.01 * factor, "weight_decay": decay, "adapt": adapt}
        for p, (factor, decay, adapt) in zip(params, settings, strict=True)
    ]
    expected = by_the_paper(params, settings, 20, max_ratio=max_ratio)
    optimizer = Lamb(groups, eps=1e-6, max_ratio=max_ratio)
    for step in range(1, 21):
        give_gradients(params, step)
        optimizer.step()
    for found, right in zip(params, expected, strict=True):
        assert ((found.double() - right).norm() / right.norm()).item() < 1e-6


@pytest.mark.parametrize(("decay", "always"), [(0.05, False), (0.05, True), (0.0, True), (0.0, False)])
def test_it_agrees_with_timm(decay, always):
    ours, theirs = parameters(), parameters()
    mine = Lamb(ours, lr=0.01, betas=(0.9, 0.98), weight_decay=decay, adapt=always or decay > 0)
    other = TimmLamb(
        theirs, lr=0.01, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay, max_grad_norm=None, always_adapt=always
    )
    for step in range(10):
        for params, optimizer in ((ours, mine), (theirs, other)):
            give_gradients(params, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_zero_tensor_takes_a_plain_step_and_a_zero_gradient_none():
    zero, still = torch.zeros(4, requires_grad=True), torch.ones(4, requires_grad=True)
    optimizer = Lamb([zero, still], lr=0.1)
    zero.grad, still.grad = torch.ones(4), torch.zeros(4)
    optimizer.step()
    assert torch.allclose(zero, torch.full((4,), -0.1), atol=1e-5)
    assert torch.equal(still, torch.ones(4))


def test_parameters_without_a_gradient_stay():
    with_gradient, without = parameters(shapes=((3,), (4,)))
    before = without.clone()
    optimizer = Lamb([with_gradient, without], lr=0.1)
    with_gradient.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(without, before)


def test_the_number_of_operations_does_not_grow_with_the_tensors():
    class Counter(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    def calls(count):
        params = parameters(shapes=((3, 2),) * count)
        optimizer = Lamb(params, lr=0.1, weight_decay=0.1)
        give_gradients(params, 0)
        with Counter() as counter:
            optimizer.step()
        return counter.calls

    assert calls(4) == calls(64) < 40


def test_state_is_there_before_the_first_step():
    params = parameters()
    optimizer = Lamb(params)
    assert all(set(optimizer.state[p]) == {"exp_avg", "exp_avg_sq"} for p in params)


def test_the_calls_of_a_step_do_not_grow_with_the_number_of_tensors():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    def calls(tensors: int) -> int:
        parameters = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(tensors)]
        optimizer = Lamb(parameters, weight_decay=0.1)
        for p in parameters:
            p.grad = torch.ones_like(p)
        with Counting() as counting:
            optimizer.step()
        return counting.calls

    assert calls(4) == calls(400) < 60
