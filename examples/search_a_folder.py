"""Train on a folder of images, then search it with images that the network has never seen.

    python examples/search_a_folder.py                                    # on images that it draws, about a minute
    python examples/search_a_folder.py --images photos/ --query new.jpg   # on your own: one folder per class

The same in commands, for a config of your own, is in the README under "Your own photos". Everything is written below
--out; started again, the script goes on where it was.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

from dist_obdsd.cli.main import main as program
from dist_obdsd.data.image_folder import find_images

CLASSES, PER_CLASS, SIDE = 48, 12, 48

CONFIG = """
name: search
threads: 2
precision: float32
data: {image_size: 48, augment: affine, workers: 1, lanes: 4}
batch: {global_size: 48, samples_per_class: 4}
model: {backbone: small_cnn, embedding_dim: 64}
distillation: {target: obdsd, weight: 10, temperature: 0.1, transition_temperature: 0.05}
optim: {lr: 0.001}
validation: {fraction: 0.2}
tracking: {kind: none}
"""


def draw(folder: Path) -> Path:
    """A folder per class. A class is a badge of three coloured shapes; its images differ in place, size and light."""
    rng = np.random.default_rng(0)
    for c in range(CLASSES):
        shapes = [(rng.integers(3), tuple(rng.integers(40, 256, 3)), rng.uniform(0.2, 0.8, 2)) for _ in range(3)]
        (folder / f"badge_{c:02d}").mkdir(parents=True, exist_ok=True)
        for i in range(PER_CLASS):
            image = Image.new("RGB", (SIDE, SIDE), tuple(int(grey) for grey in rng.integers(0, 60, 3)))
            pen = ImageDraw.Draw(image)
            for kind, colour, centre in shapes:
                x, y = (centre + rng.normal(0, 0.05, 2)) * SIDE
                r = SIDE * rng.uniform(0.14, 0.24)
                lit = tuple(int(min(255, value * rng.uniform(0.7, 1.1))) for value in colour)
                if kind == 0:
                    pen.ellipse((x - r, y - r, x + r, y + r), fill=lit)
                elif kind == 1:
                    pen.rectangle((x - r, y - r, x + r, y + r), fill=lit)
                else:
                    pen.polygon((x, y - r, x + r, y + r, x - r, y + r), fill=lit)
            image.save(folder / f"badge_{c:02d}" / f"{i:02d}.png")
    return folder


def do(*arguments: object) -> None:
    """One command of dist-obdsd; an error ends the script with the command's own sentence and exit code."""
    print(f"\n$ dist-obdsd {' '.join(map(str, arguments))}", flush=True)
    if code := program([str(argument) for argument in arguments]):
        sys.exit(code)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--images", type=Path, help="one folder per class (default: images that are drawn)")
    options.add_argument("--query", type=Path, nargs="+", help="images to search for (default: two from the folder)")
    options.add_argument("--out", type=Path, default=Path("runs/example"), help="a folder for all results")
    options.add_argument("--epochs", type=int, default=6)
    options.add_argument("--neighbours", type=int, default=5, help="how many to print")
    asked = options.parse_args()

    out = asked.out
    out.mkdir(parents=True, exist_ok=True)
    images = asked.images or draw(out / "images")

    # Half of the classes become the test set, so that the numbers are about classes that training never saw.
    if not (out / "packed" / "manifest.json").is_file():
        do("pack", "folder", "--source", images, "--out", out / "packed")
    settings = yaml.safe_load(CONFIG)
    settings |= {"output": str(out), "epochs": asked.epochs}
    settings["data"]["shards"] = str(out / "packed")
    (out / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    do("train", out / "config.yaml")

    # The whole folder is the gallery, embedded by the network of the best epoch.
    found = [file.path for file in find_images(images).files]
    classes = sorted({path.parent for path in found})
    queries = asked.query or [next(p for p in found if p.parent == classes[at]) for at in (0, len(classes) // 2)]
    do("search", out / "search" / "checkpoints" / "best", "--gallery", images, "--top", asked.neighbours, *queries)


if __name__ == "__main__":
    main()
