"""Count the words of the text beside this script."""

# [start count]
import argparse
import json
from collections import Counter
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path)
args = parser.parse_args()

words = Path("text.txt").read_text().lower().split()
args.out.write_text(json.dumps(Counter(words)))
print(f"counted {len(words)} words")
# [end count]
