"""Train one model on the months before the test month."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import joblib
import tables
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def make_model(kind: str, learning_rate: float, seed: int) -> object:
    if kind == "linear":
        return make_pipeline(SimpleImputer(), StandardScaler(), LogisticRegression(max_iter=500))
    return HistGradientBoostingClassifier(
        learning_rate=learning_rate, max_iter=120, random_state=seed
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--model", choices=["linear", "boosted"], required=True)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--test-month", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    before, _ = tables.split(tables.read(args.table, ["month", tables.TARGET]), args.test_month)
    tables.check_both(before, f"before month {args.test_month}")
    features = before.drop(columns=[tables.TARGET])
    model = make_model(args.model, args.learning_rate, args.seed)
    model.fit(features, before[tables.TARGET])
    print(f"trained {args.model} on {len(before):,} flights")

    args.out.mkdir(parents=True)
    joblib.dump(model, args.out / "model.joblib")
    facts = {"model": args.model, "features": list(features.columns), "rows": len(before)}
    (args.out / "facts.json").write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
