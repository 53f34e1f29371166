"""What both trainings share: optimiser, learning rate over time, average of the weights."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Report", "Schedule", "fit"]

M = TypeVar("M", bound=nn.Module)
# Takes the average of the weights so far, and the step.
Report = Callable[[Any, int], None]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; the rate rises over the first part and falls along a cosine."""

    steps: int
    rate: float
    weight_decay: float = 0.05
    rise: float = 0.03
    # The average of the weights forgets with a time of about so much of the whole training.
    memory: float = 0.02


def fit(
    tower: M,
    loss: Callable[[int], Tensor],
    schedule: Schedule,
    *,
    beside: nn.Module | None = None,
    report: Report | None = None,
) -> M:
    """Train, and give the average of the weights, in evaluation mode.

    Args:
        tower: What is trained, and kept.
        loss: Of one step.
        schedule: See there.
        beside: What is trained along with it and thrown away.
        report: Called with the average from time to time.
    """
    parameters = [*tower.parameters(), *(beside.parameters() if beside else ())]
    heavy = [p for p in parameters if p.ndim > 1]
    light = [p for p in parameters if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": heavy, "weight_decay": schedule.weight_decay}, {"params": light, "weight_decay": 0.0}],
        lr=schedule.rate,
        betas=(0.9, 0.98),
    )
    average = copy.deepcopy(tower).eval()
    started = time.monotonic()
    seen = 0.0
    for step in range(schedule.steps):
        done = step / schedule.steps
        rise = min(1.0, done / schedule.rise + 1 / max(1.0, schedule.rise * schedule.steps))
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate * rise * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-6
        value = loss(step)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimiser.step()
        keep = min(1 - 1 / (schedule.memory * schedule.steps), (1 + step) / (10 + step))
        with torch.no_grad():
            for old, new in zip(average.state_dict().values(), tower.state_dict().values(), strict=True):
                if old.is_floating_point():
                    old.mul_(keep).add_(new, alpha=1 - keep)
                else:
                    old.copy_(new)
        seen += 0.02 * (value.item() - seen)
        if (step + 1) % 100 == 0:
            left = (time.monotonic() - started) / (step + 1) * (schedule.steps - step - 1)
            sys.stderr.write(f"\rstep {step + 1} of {schedule.steps}, loss {seen:.3f}, {left / 60:.0f} min left   ")
        if report and (step + 1) % max(1, schedule.steps // 8) == 0:
            report(average, step + 1)
    sys.stderr.write("\n")
    return average
