"""Make the slice of Fashion-MNIST that ships in the package: 16 images a class to train, 50 a class to test.

    python recipes/embed_fashion_mnist.py DATA/fashion-mnist

DATA/fashion-mnist holds train.parquet and test.parquet (columns image and label). Images are chosen by the
hash of their bytes, so the slice does not depend on the order of the rows. Two cores: seconds. Deterministic.
"""

import hashlib
import sys
from pathlib import Path

import pyarrow.parquet as pq

ASSETS = Path(__file__).resolve().parents[1] / "src/advtune/assets/fashion-mnist"
PER_CLASS = {"train": 16, "test": 50}
LIMIT = 2_000_000  # bytes, both files together


def embed(source: Path, target: Path = ASSETS) -> None:
    """Write target/{train,test}.parquet; the schema's Image and ClassLabel features are kept.

    Raises SystemExit if the two files together pass 2 MB.
    """
    target.mkdir(parents=True, exist_ok=True)
    for part, count in PER_CLASS.items():
        table = pq.read_table(source / f"{part}.parquet")
        labels = table["label"].to_pylist()
        keys = [hashlib.sha256(image["bytes"]).hexdigest() for image in table["image"].to_pylist()]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        chosen = [[i for i in order if labels[i] == label][:count] for label in sorted(set(labels))]
        rows = [i for turn in zip(*chosen, strict=True) for i in turn]  # classes in turn
        pq.write_table(table.take(rows), target / f"{part}.parquet", compression="zstd")
    size = sum((target / f"{part}.parquet").stat().st_size for part in PER_CLASS)
    if size > LIMIT:
        raise SystemExit(f"the slice has {size} bytes, more than {LIMIT}")
    print(f"{target}: {size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    embed(Path(sys.argv[1]))
