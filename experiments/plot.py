# SPDX-License-Identifier: MIT
"""A run in pictures, or several side by side: what their metrics.jsonl files hold.

    python -m experiments.plot RUN [RUN ...] [--output FILE]

FILE is an SVG or a PNG, by its name; without it, the picture is RUN/plot.svg of the first run. It
has a column for every run and a row for every quantity: the loss, the KL(pi_hat || pi_theta) in
training and on held-out prompts, the length of responses, the distance between what the sampler
and the trainer think of a token, and the seconds of every phase. A run may still be going on.
"""

import argparse
import json
import sys
from pathlib import Path

PHASES = {"sample_seconds": "sync and sample", "train_seconds": "contrast and fit"}


def start_drawing():
    """matplotlib's pyplot, set to draw without a screen and equal files of equal data."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "same", "svg.fonttype": "none"})
    from matplotlib import pyplot

    return pyplot


def save_picture(figure, path):
    """Write an SVG or a PNG, by the name of the file."""
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    start_drawing().close(figure)


def read_run(folder):
    """The records of a run's optimizer steps, and those of its epochs."""
    # What follows the last line end is half a line, which a kill has left, or nothing.
    *lines, _ = Path(folder, "metrics.jsonl").read_text().split("\n")
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if record["kind"] == "step"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    if not epochs:
        raise ValueError("has not finished an epoch")
    return steps, epochs


def line(axes, records, when, key, label, **how):
    """A line through the values of a key, of those records that have it, over when(record)."""
    points = [(when(record), record[key]) for record in records if key in record]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **how)


def draw_run(axes, steps, epochs):
    """Fill the column of a run, whose axes have a quantity each, over epochs."""
    per_epoch = sum(step["epoch"] == 1 for step in steps)

    def of_step(record):
        return record["step"] / per_epoch

    def at_start(record):
        return record["epoch"] - 1

    def at_end(record):
        return record["epoch"]

    loss, kl, length, gap, seconds = axes
    thin = {"linewidth": 0.8, "alpha": 0.5}
    line(loss, steps, of_step, "loss", "step", **thin)
    line(loss, epochs, at_end, "loss", "mean of the epoch", marker=".")
    line(kl, steps, of_step, "kl", "step", **thin)
    line(kl, epochs, at_end, "kl", "mean of the epoch", marker=".")
    line(length, epochs, at_end, "response_tokens_mean", "training", marker=".", color="C1")
    # The held-out prompts are answered before the steps of an epoch.
    held_out = {"marker": ".", "color": "C2"}
    line(kl, epochs, at_start, "eval_kl", "held-out prompts", **held_out)
    line(gap, steps, of_step, "sampler_gap", "step", linewidth=0.8)
    gap.set_yscale("log")
    below = [0.0] * len(epochs)
    for key, label in PHASES.items():
        values = [epoch[key] for epoch in epochs]
        seconds.bar([epoch["epoch"] for epoch in epochs], values, bottom=below, label=label)
        below = [low + value for low, value in zip(below, values, strict=True)]

    for some in axes:
        some.grid(alpha=0.3)
    seconds.set_xlabel("epochs")
    seconds.xaxis.get_major_locator().set_params(integer=True)


def plot(runs, output):
    """Draw the runs side by side, on common scales."""
    labels = ("loss, nats per token", "kl, nats per token", "response tokens")
    labels += ("sampler_gap, nats per token", "seconds of an epoch")
    size = (2 + 4.5 * len(runs), 2.2 * len(labels))
    shape = {"nrows": len(labels), "ncols": len(runs)}
    figure, grid = start_drawing().subplots(
        **shape, figsize=size, sharex="col", sharey="row", squeeze=False, layout="constrained"
    )
    for i, (name, records) in enumerate(runs.items()):
        draw_run(grid[:, i], *records)
        grid[0, i].set_title(name)
    for axes, label in zip(grid[:, 0], labels, strict=True):
        axes.set_ylabel(label)
    for axes in grid.flat:
        if axes.has_data():
            axes.legend(fontsize="small")
    for row in (1, 2, 4):  # Scales that begin at 0, now that all runs are drawn.
        grid[row, 0].set_ylim(0, 1.1 * grid[row, 0].get_ylim()[1])
    save_picture(figure, output)
    print(f"Written: {output}")


def refuse(message):
    """Say in one line what the user has to change, and stop."""
    print(f"plot.py: {message}")
    sys.exit(2)


def main():
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(
        prog="plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run.")
    parser.add_argument("--output", metavar="FILE", help="An .svg or .png file.")
    arguments = parser.parse_args()
    output = Path(arguments.output or Path(arguments.runs[0], "plot.svg"))
    if output.suffix not in (".svg", ".png"):
        refuse(f"--output {output}: has to end in .svg or .png")
    runs = {}
    for folder in arguments.runs:
        try:
            runs[folder] = read_run(folder)
        except (OSError, ValueError, KeyError) as error:
            refuse(f"{folder}: no run to draw ({error})")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        plot(runs, output)
    except OSError as error:
        refuse(f"--output {output}: {error}")


if __name__ == "__main__":
    main()
