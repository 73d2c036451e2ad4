"""Score the models on the test month and pick the better one."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import joblib
import numpy as np
import tables
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve


def load_model(folder: Path) -> tuple[dict, object]:
    """Return what train.py wrote, or end with what is wrong with it."""
    try:
        facts = json.loads((folder / "facts.json").read_text())
        return facts, joblib.load(folder / "model.joblib")
    except (OSError, ValueError, EOFError) as error:
        raise SystemExit(f"{folder} holds no model that can be read: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--test-month", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    _, test = tables.split(tables.read(args.table, ["month", tables.TARGET]), args.test_month)
    tables.check_both(test, f"of month {args.test_month}")
    truth = test[tables.TARGET]
    scores = {}
    for folder in args.models:
        facts, model = load_model(folder)
        lacking = [name for name in facts["features"] if name not in test.columns]
        if lacking:
            raise SystemExit(
                f"{args.table} lacks the columns {lacking}, which {folder} was trained on"
            )
        guess = model.predict_proba(test[facts["features"]])[:, 1]
        wrong, right, _ = roc_curve(truth, guess)
        grid = np.linspace(0, 1, 101)
        scores[facts["model"]] = {
            "auc": round(float(roc_auc_score(truth, guess)), 4),
            "average_precision": round(float(average_precision_score(truth, guess)), 4),
            "curve": [round(float(value), 4) for value in np.interp(grid, wrong, right)],
            "folder": str(folder),
        }
        print(f"{facts['model']}: AUC {scores[facts['model']]['auc']}")

    best = max(scores, key=lambda name: scores[name]["auc"])
    args.out.mkdir(parents=True)
    shutil.copyfile(Path(scores[best]["folder"]) / "model.joblib", args.out / "model.joblib")
    for score in scores.values():
        del score["folder"]  # where the models were is no part of the result
    summary = {"best": best, "month": args.test_month, "flights": len(test), "scores": scores}
    (args.out / "scores.json").write_text(json.dumps(summary, indent=2))
    print(f"{best} is the better one")


if __name__ == "__main__":
    main()
