"""Where the CPU time of a row goes: layers forward and back, the optimiser, acting by lane width.

    python benchmarks/hot_loop.py [--torso nature_cnn] [--rows 64] [--rounds 25] [--output FILE]

Everything runs in one thread with one math thread, as a worker does, and is measured by that thread's CPU time (other
programs slow it through caches and shared cores only); medians. float32 and bfloat16 take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slipstream import arithmetic
from slipstream.nets.torso import as_numbers, nature_cnn, nips_cnn
from slipstream.optimizers import make_optimizer
from slipstream.run.record import conditions, save

TORSOS = {"nature_cnn": nature_cnn, "nips_cnn": nips_cnn}
PRECISIONS = (torch.float32, torch.bfloat16)
LANES = (4, 8, 16, 32)


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    """Median CPU time of this thread for one call."""
    times: list[float] = []
    for number in range(rounds + 3):
        start = time.thread_time()
        work()
        if number >= 3:  # the first ones warm up
            times.append(time.thread_time() - start)
    return 1000 * statistics.median(times)


def prepared(frames: Tensor, dtype: torch.dtype) -> Tensor:
    """As the torso makes its input of bytes."""
    return as_numbers(frames, dtype).div_(255.0)


def layers(network: nn.Sequential, frames: Tensor, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Forward, and forward with backward, of every layer alone, in milliseconds for all rows."""
    found = {"bytes to numbers": {"forward": milliseconds(lambda: prepared(frames, dtype), rounds)}}
    value = prepared(frames, dtype)
    for number, layer in enumerate(network):
        own = [parameter.detach().to(dtype).requires_grad_() for parameter in layer.parameters()]
        named = dict(zip((name for name, _ in layer.named_parameters()), own, strict=True))
        shown = value.detach().requires_grad_(number > 0)  # nobody wants the gradient by the pixels

        def forward(layer: nn.Module = layer, named: dict[str, Tensor] = named, shown: Tensor = shown) -> Tensor:
            return torch.func.functional_call(layer, named, (shown,))

        def backward(forward: Any = forward, own: list[Tensor] = own, shown: Tensor = shown, first: bool = not number):
            out = forward()
            by = own if first else [shown, *own]
            return torch.autograd.grad(out, by, torch.ones_like(out))

        with torch.no_grad():
            costs = {"forward": milliseconds(forward, rounds)}
            value = forward()
        found[f"{number} {type(layer).__name__}"] = {**costs, "forward and backward": milliseconds(backward, rounds)}
    return found


def step(network: nn.Sequential, rounds: int) -> dict[str, float]:
    """What a gradient step costs beside the gradient, in milliseconds."""
    parameters = list(network.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = make_optimizer("adam", parameters, lr=1e-6, eps=1e-5)

    def copied() -> list[Tensor]:
        return [torch.empty_like(parameter).copy_(parameter) for parameter in parameters]

    return {
        "copy of a shard's gradient": milliseconds(copied, rounds),
        "clip by global norm": milliseconds(lambda: nn.utils.clip_grad_norm_(parameters, 0.5), rounds),
        "adam, fused": milliseconds(optimizer.step, rounds),
        "adam, a tenth faded": faded(network, rounds, flush=True),
        "adam, a tenth faded, subnormal numbers kept": faded(network, rounds, flush=False),
    }


def faded(network: nn.Sequential, rounds: int, flush: bool) -> float:
    """Adam, in milliseconds, when a tenth of the gradients has been zero for a thousand steps: units have died."""
    arithmetic.restore(arithmetic.Arithmetic(threads=1, flush=flush))
    parameters = [nn.Parameter(parameter.detach().clone()) for parameter in network.parameters()]
    optimizer = make_optimizer("adam", parameters, lr=1e-6, eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad[torch.rand(parameter.shape, generator=generator) < 0.1] = 0.0
    for _ in range(1000):
        optimizer.step()
    found = milliseconds(optimizer.step, rounds)
    arithmetic.adopt()
    return found


def acting(network: nn.Sequential, frames: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Forwards by lane width, milliseconds a row: float32, bfloat16 with weights cast in every forward, and once."""
    cast = {name: value.detach().bfloat16() for name, value in network.named_parameters()}
    plain = {name: value.detach() for name, value in network.named_parameters()}

    @torch.no_grad()
    def act(weights: dict[str, Tensor], rows: Tensor, half: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            pixels = prepared(rows, torch.bfloat16 if half else torch.float32)
            return torch.func.functional_call(network, weights, (pixels,)).float()

    kinds = {"float32": (plain, False), "bfloat16": (plain, True), "bfloat16, cast once": (cast, True)}
    found: dict[str, dict[str, float]] = {}
    for width in LANES:
        rows = frames[:width]
        found[str(width)] = {
            name: milliseconds(lambda weights=weights, half=half, rows=rows: act(weights, rows, half), rounds) / width
            for name, (weights, half) in kinds.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torso", choices=TORSOS, default="nature_cnn")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/hot_loop.json"))
    args = parser.parse_args()

    arithmetic.adopt()
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (max(args.rows, *LANES), 4, 84, 84), dtype=torch.uint8, generator=generator)
    network = TORSOS[args.torso](4, 84, 84)
    by_layer = {
        str(dtype).removeprefix("torch."): layers(network, frames[: args.rows], dtype, args.rounds)
        for dtype in PRECISIONS
    }
    result = {
        "torso": args.torso,
        "rows": args.rows,
        "layers_milliseconds": by_layer,
        "step_milliseconds": step(network, args.rounds),
        "acting_milliseconds_per_row": acting(network, frames, args.rounds),
    }
    for dtype, found in by_layer.items():
        total = sum(costs.get("forward and backward", costs["forward"]) for costs in found.values())
        print(f"{dtype}: {total / args.rows:.3f} ms a row")
        for name, costs in found.items():
            print(f"  {name:20}" + "".join(f"  {kind} {cost:7.2f}" for kind, cost in costs.items()))
    print(result["step_milliseconds"])
    print(result["acting_milliseconds_per_row"])
    save({**conditions("cpu"), **result}, args.output)


if __name__ == "__main__":
    main()
