"""Write the result down, with a plot."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--choice", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    scores = args.choice / "scores.json"
    try:
        result = json.loads(scores.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{scores} can't be read: {error}") from None
    lacking = [name for name in ("best", "month", "flights", "scores") if name not in result]
    if lacking:
        raise SystemExit(f"{scores} lacks {lacking}")
    args.out.mkdir(parents=True)
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for name, score in result["scores"].items():
        axes.plot(
            [step / 100 for step in range(101)],
            score["curve"],
            label=f"{name}, AUC {score['auc']:.3f}",
        )
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="by chance")
    axes.set(
        xlabel="on-time flights flagged",
        ylabel="late flights found",
        title=f"Month {result['month']} of 2013",
    )
    axes.legend(loc="lower right")
    figure.savefig(args.out / "roc.png", dpi=120, metadata={"Software": None})

    rows = "\n".join(
        f"| {name} | {score['auc']:.4f} | {score['average_precision']:.4f} |"
        for name, score in result["scores"].items()
    )
    (args.out / "report.md").write_text(
        f"# Late flights\n\nThe better model on {result['flights']:,} flights of month {result['month']} is "
        f"**{result['best']}**.\n\n| model | AUC | average precision |\n|---|---|---|\n{rows}\n\n![ROC](roc.png)\n"
    )
    print(f"wrote {args.out.name}: {result['best']} wins")


if __name__ == "__main__":
    main()
