"""How the rewards go while a rewriter is reinforced: a line of JSON a step, and a plot of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vlmguard.errors import VLMGuardError, missing_extra

REWARDS_FILE: Final = "rewards.jsonl"
PLOT_FILE: Final = "rewards.png"
SMOOTHED_STEPS: Final = 10  # of a curve, beside its points


def curves(path: Path, say: Callable[[str], None]) -> Any:
    """A trainer's callback that writes every step's rewards to a file of JSON lines, and says them."""
    from transformers import TrainerCallback

    class Curves(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                _forget_after(path, state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if state.is_world_process_zero and logs and "reward" in logs:
                one = {"step": state.global_step, **point(logs)}
                _write(path, json.dumps(one) + "\n", "a")
                say(f"step {state.global_step} of {state.max_steps}: {told(one)}")

    return Curves()


def point(logs: Mapping[str, Any]) -> dict[str, Any]:
    """A step's curves out of what the trainer logs.

    >>> point({"reward": 0.5, "rewards/answered/mean": None, "rewards/answered/failed": 0.25, "kl": 0.1, "loss": 0.0})
    {'reward': 0.5, 'kl': 0.1, 'rewards': {'answered': {'mean': None, 'failed': 0.25}}}
    """
    plain: dict[str, Any] = {ours: _number(logs[name]) for name, ours in _LOGGED.items() if name in logs}
    rewards: dict[str, dict[str, float | None]] = {}
    for name, value in logs.items():
        if name.startswith("rewards/"):
            _, reward, what = name.split("/")
            rewards.setdefault(reward, {})[what] = _number(value)
    return {**plain, "rewards": rewards}


def told(one: Mapping[str, Any]) -> str:
    """A step's rewards in words.

    >>> told({"reward": 0.5, "rewards": {"answered": {"mean": None}, "well_formed": {"mean": 1.0}}})
    'answered none, well_formed 1.00'
    """
    means = {name: found.get("mean") for name, found in one["rewards"].items()}
    return ", ".join(f"{name} {'none' if mean is None else format(mean, '.2f')}" for name, mean in means.items())


_LOGGED: Final = {
    "reward": "reward",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "tokens",
    "completions/clipped_ratio": "cut_off",
    "step_time": "seconds",
}


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _forget_after(path: Path, step: int) -> None:
    """Leaves the curves up to a step: what comes after it is done again."""
    kept = [json.dumps(one) + "\n" for one in read_curves(path) if one["step"] <= step] if step else []
    _write(path, "".join(kept), "w")


def read_curves(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of curves; a torn last one is left out."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def _write(path: Path, text: str, mode: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise VLMGuardError(f"{path} cannot be written: {error.strerror}", "Make room, then use --resume.") from error


def draw(curves: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel a reward, its mean in [0, 1] a step and that smoothed; the last panel is the divergence from the start.

    Raises MissingExtra; VLMGuardError where the disk takes no more.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "train") from error
    names = list(dict.fromkeys(name for one in curves for name in one["rewards"]))
    lines = {name: [one["rewards"].get(name, {}).get("mean") for one in curves] for name in names}
    lines["kl"] = [one.get("kl") for one in curves]
    figure = Figure(figsize=(3.0 * len(lines), 2.8), dpi=110, layout="constrained")
    steps = [one["step"] for one in curves]
    for axis, (name, values) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        numbers = [math.nan if value is None else value for value in values]
        axis.plot(steps, numbers, ".", markersize=3, alpha=0.4)
        axis.plot(steps, smoothed(numbers))
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        if name != "kl":
            axis.set_ylim(-0.03, 1.03)
    FigureCanvasAgg(figure)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise VLMGuardError(f"{path} cannot be written: {error.strerror}", "Make room.") from error


def smoothed(values: Sequence[float], width: int = SMOOTHED_STEPS) -> list[float]:
    """The mean of the last `width` values at each place, those that are no number left out.

    >>> smoothed([1.0, 0.0, math.nan, 0.5], width=2)
    [1.0, 0.5, 0.0, 0.5]
    """
    windows = [
        [one for one in values[max(0, at + 1 - width) : at + 1] if not math.isnan(one)] for at in range(len(values))
    ]
    return [sum(window) / len(window) if window else math.nan for window in windows]
