"""What follows from the number of a step alone, so that a resumed run needs no state to continue it."""

import math

from trainer.config import LoopConfig


def lr_factor(step: int, plan: LoopConfig) -> float:
    """What the peak learning rate is multiplied by in optimizer step `step`, counted from 0.

    Warm-up arrives at the full rate in step `warmup_steps - 1`; cosine and linear decay are at `final_lr_ratio` when
    the last step is done, and so is wsd (arXiv:2404.06395, section 4), which falls linearly in the last `decay_steps`;
    inverse_sqrt is sqrt(warmup / steps done), the original Transformer's, with a floor.
    """
    warmup_steps, final_ratio = plan.warmup_steps, plan.final_lr_ratio
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, plan.steps - warmup_steps)
    match plan.decay:
        case "cosine":
            return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            return final_ratio + (1 - final_ratio) * (1 - done)
        case "wsd":
            assert plan.decay_steps is not None  # as the config has checked
            return final_ratio + (1 - final_ratio) * min(1.0, (plan.steps - step) / plan.decay_steps)
        case "inverse_sqrt":
            return max(final_ratio, math.sqrt(max(1, warmup_steps) / (step + 1)))
        case "constant":
            return 1.0


def due(every: int, done: int, steps: int | None = None) -> bool:
    """Whether what happens every so many steps, and after the last of `steps`, happens now; never if `every` is 0."""
    return every > 0 and (done % every == 0 or done == steps)
