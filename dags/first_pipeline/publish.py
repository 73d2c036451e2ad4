"""Write down the most frequent words."""

import argparse
import json
from collections import Counter
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--counts", type=Path)
parser.add_argument("--top", type=int)
parser.add_argument("--out", type=Path)
args = parser.parse_args()

counts = Counter(json.loads(args.counts.read_text()))
lines = [f"{word}: {count}" for word, count in counts.most_common(args.top)]
args.out.write_text("\n".join(lines))
print(*lines, sep="\n")
