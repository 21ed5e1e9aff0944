"""A run at a glance: reward, accuracy, length and loops over the steps."""

import io
from collections.abc import Mapping, Sequence

from etils import epath


def plot(metrics: Sequence[Mapping[str, float]], at_first: Mapping[str, float], path: epath.Path) -> None:
    """Writes the picture.

    Args:
      metrics: the records of the run. at_first: figures of what is held out before the first step.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2).flat
    evaluated = [{"step": 0, **{f"eval/{name}": value for name, value in at_first.items()}}]
    evaluated += [record for record in metrics if "eval/accuracy" in record]
    panels = (
        ("reward of rollouts", ("train/reward",)),
        ("share right", ("train/right", "eval/accuracy")),
        ("tokens of an answer", ("train/answer_tokens", "train/right_answer_tokens", "train/wrong_answer_tokens")),
        ("share that ends in a loop", ("train/tail_loop", "eval/tail_loop")),
    )
    for axis, (title, names) in zip(axes, panels, strict=True):
        for name in names:
            of = evaluated if name.startswith("eval/") else metrics
            points = [(record["step"], record[name]) for record in of if name in record]
            marks = {"marker": "o"} if name.startswith("eval/") else {"alpha": 0.8}
            axis.plot(*zip(*points, strict=True) if points else ([], []), label=_said(name), **marks)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    path.write_bytes(content.getvalue())


def _said(name: str) -> str:
    where, _, figure = name.partition("/")
    return figure.replace("_", " ") + (", held out, greedy" if where == "eval" else "")
