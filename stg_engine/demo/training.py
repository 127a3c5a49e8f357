"""A small training loop: seeded per step, resumable from an atomic checkpoint, with an average of the weights."""

import copy
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024), for weights of two or more dimensions.

    Convolution weights count as matrices [out, in * kernel]. The update has RMS 0.2 per unit of learning rate
    (Liu et al. 2025, "Muon is scalable"), which suits AdamW's learning rates. torch.optim.Muon takes matrices only.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[tuple(param.flatten(1).shape)].append(param)
            for shape, params in by_shape.items():
                updates = orthogonalize(torch.stack([self._momentum(p, group["momentum"]).flatten(1) for p in params]))
                for param, update in zip(params, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(update.view_as(param), alpha=-0.2 * max(shape) ** 0.5 * group["lr"])

    def _momentum(self, param: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov momentum of the gradient."""
        state = self.state[param]
        if "buffer" not in state:
            state["buffer"] = torch.zeros_like(param)
        state["buffer"].lerp_(param.grad, 1 - momentum)
        return param.grad.lerp(state["buffer"], momentum)


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices to [N, R, C], roughly (five Newton-Schulz steps in bfloat16)."""
    x = matrices.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


def optimizers_for(model: nn.Module, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices, AdamW for tables, embeddings, norms and biases."""
    layers = (nn.Linear, nn.Conv3d)
    matrices = [module.weight for module in model.modules() if isinstance(module, layers)]
    chosen = set(matrices)
    rest = [param for param in model.parameters() if param not in chosen]
    return [
        Muon(matrices, lr, weight_decay=weight_decay),
        torch.optim.AdamW(rest, lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int, warmup: int, decay: float) -> float:
    """Linear warm-up, constant, then linear to zero over the last share `decay` of the steps; 1 at the top."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay * steps))


def save_atomically(value: Any, path: Path) -> None:
    """torch.save to a temporary name in the same folder, then rename: a reader never sees half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    checkpoint: Path,
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    weight_decay: float = 0.0,
    warmup: int = 50,
    decay: float = 0.4,
    average: float = 0.995,
    save_seconds: float = 180.0,
    stop_at: int | None = None,
) -> nn.Module:
    """Train `model` in place on `loss(step)` and return a copy that holds the running average of its weights.

    All randomness of a step must come from torch's default generator, which is seeded with (seed, step), or from
    `step` itself: then a resumed run takes the same steps as one that was never stopped. `stop_at` ends a run early,
    as an interruption would. Continues from `checkpoint` when that file exists. `steps` may be raised or
    lowered between runs; the learning rate follows the new number.
    """
    optimizers = optimizers_for(model, lr, weight_decay)
    averaged = copy.deepcopy(model).requires_grad_(False)
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved["step"]
        model.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["average"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)

    def save(step: int) -> None:
        states = [optimizer.state_dict() for optimizer in optimizers]
        state = {"step": step, "model": model.state_dict(), "average": averaged.state_dict(), "optimizers": states}
        save_atomically(state, checkpoint)

    params, averages = list(model.parameters()), list(averaged.parameters())
    last_save = time.monotonic()
    smooth: float | None = None
    end = min(steps, stop_at or steps)
    with tqdm(total=steps, initial=start, desc=checkpoint.stem, dynamic_ncols=True, mininterval=10) as bar:
        for step in range(start, end):
            torch.manual_seed(seed * 1_000_003 + step)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * learning_rate(step, steps, warmup, decay)
            value = loss(step)
            model.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, params, 1 - min(average, (step + 1) / (step + 10)))
            smooth = value.item() if smooth is None else 0.98 * smooth + 0.02 * value.item()
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            bar.update()
            if time.monotonic() - last_save > save_seconds:
                save(step + 1)
                last_save = time.monotonic()
    if end > start:
        save(end)
    return averaged
