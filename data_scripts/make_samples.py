"""Make the data that travels with the package: reglib/data/samples/.

    python data_scripts/make_samples.py [--root FOLDER]

MNIST: the official files (downloaded by torchvision, or taken from ``$REGLIB_DATA/mnist``), of
which the first 400 digits of each class of the training set and the first 100 of each class of
the test set are kept, in their original order. CC BY-SA 3.0, see NOTICE.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np

from reglib.data import datasets

SAMPLES = Path(datasets.__file__).parent / "samples"


def first_of_each_class(digits: np.ndarray, count: int) -> np.ndarray:
    """Indices of the first ``count`` members of each class, in ascending order."""
    return np.sort(np.concatenate([np.flatnonzero(digits == d)[:count] for d in range(10)]))


def save_reproducibly(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz whose bytes depend on the arrays alone (numpy stamps the time of day)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array))
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, buffer.getvalue(), zipfile.ZIP_DEFLATED)


def main() -> None:
    """Write every sample."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--root", type=Path, help="where torchvision keeps its downloads")
    root = parser.parse_args().root
    arrays = {}
    for split, count in (("train", 400), ("test", 100)):
        images, digits = datasets.mnist(split, full=True, root=root)
        keep = first_of_each_class(digits.numpy(), count)
        arrays[f"{split}_images"] = (images[keep, 0] * 255).round().byte().numpy()
        arrays[f"{split}_digits"] = digits[keep].byte().numpy()
        print(split, arrays[f"{split}_images"].shape)
    save_reproducibly(SAMPLES / "mnist.npz", arrays)
    print(SAMPLES / "mnist.npz", (SAMPLES / "mnist.npz").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
