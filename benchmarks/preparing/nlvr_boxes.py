"""NLVR's pictures as squares, in several arrangements; and pictures like them, drawn, with statements of known truth.

A picture of NLVR (Suhr et al., ACL 2017) is three boxes side by side, 400 x 100 pixels, and its statement is true whatever
the order of the boxes. Squeezed into a model's square, a block would be a sliver, so the boxes go into the cells of a 2 x 2
square, in a random order; further arrangements of a training picture are further pictures, mirrored too where the statement
names no side. Few statements come with labels, so the same kinds of statements are also made about boxes drawn here, each once
where it is true and once where it is false. Their forms follow NLVR's train and development sentences; no test sentence was
looked at. A label is one bit, which a model that starts from nothing learns little from: what is in each drawn box is also
written out, in its place, for a captioner to learn first.

    python benchmarks/preparing/nlvr_boxes.py DATA/tasks/nlvr1 boxes --pictures 12000
    capfilt ingest boxes/data.jsonl --images boxes --image-col image --caption-col sentence --dataset boxes
    capfilt examples boxes/data.jsonl --images boxes --dataset boxes          # and so with boxes/generated.jsonl
    capfilt ingest boxes/described.jsonl --images boxes --image-col image --caption-col captions --dataset described
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageOps
from statements import BOX, SHAPES, Box, Item, contrast, described

from capfilt.data.transforms import mentions_sides

CELL = 104
COLOURS = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}
PALE, GREY = (211, 211, 211), (128, 128, 128)


def towers(rng: Random) -> list[Box]:
    """Three towers of one to four blocks, bottom first."""
    plain = rng.random() < 0.2
    boxes = []
    for _ in range(3):
        colour = rng.choice(list(COLOURS))
        boxes.append(
            [
                Item("square", colour if plain else rng.choice(list(COLOURS)), 20, 40, 80 - 21 * level)
                for level in range(rng.randint(1, 4))
            ]
        )
    return boxes


def scattered(rng: Random) -> list[Box]:
    """Three boxes of one to seven things that do not overlap; the topmost first."""
    few = rng.random() < 0.4
    colours = rng.sample(list(COLOURS), rng.choice((1, 2, 3, 3)))
    boxes: list[Box] = []
    for _ in range(3):
        box: Box = []
        for _ in range(rng.randint(1, 3 if few else 7)):
            for _ in range(20):
                size = rng.choice((10, 20, 30))
                x, y = rng.randint(2, BOX - size - 2), rng.randint(2, BOX - size - 2)
                side = rng.random()
                x = BOX - size if side < 0.2 else x
                y = BOX - size if side > 0.8 or side < 0.03 else y
                new = Item(rng.choice(SHAPES), rng.choice(colours), size, x, y)
                if all(
                    new.x + size <= old.x or old.x + old.size <= new.x or new.y + size <= old.y
                    or old.y + old.size <= new.y for old in box
                ):  # fmt: skip
                    box.append(new)
                    break
        boxes.append(sorted(box, key=lambda item: item.y))
    return boxes


def drawn(box: Box) -> Image.Image:
    """A box as NLVR draws it."""
    picture = Image.new("RGB", (BOX, BOX), PALE)
    draw = ImageDraw.Draw(picture)
    for item in box:
        x, y, end = item.x, item.y, item.size - 1
        colour = COLOURS[item.colour]
        if item.shape == "square":
            draw.rectangle((x, y, x + end, y + end), fill=colour)
        elif item.shape == "circle":
            draw.ellipse((x, y, x + end, y + end), fill=colour)
        else:
            draw.polygon(((x, y + end), (x + end, y + end), (x + end / 2, y)), fill=colour)
    return picture


CELLS = {
    "upper left": (2, 2),
    "upper right": (CELL + 2, 2),
    "lower left": (2, CELL + 2),
    "lower right": (CELL + 2, CELL + 2),
}


def arranged(boxes: Sequence[Image.Image], rng: Random, mirror: bool) -> tuple[Image.Image, list[str]]:
    """Three boxes in a random order in the cells of a square, each mirrored by chance where `mirror`; and whose is which."""
    square = Image.new("RGB", (2 * CELL, 2 * CELL), GREY)
    cells = rng.sample(list(CELLS), 3)
    for box, cell in zip(boxes, cells, strict=True):
        square.paste(ImageOps.mirror(box) if mirror and rng.random() < 0.5 else box, CELLS[cell])
    return square, cells


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("nlvr", type=Path, help="folder with data.jsonl and the pictures it names")
    parser.add_argument("out", type=Path, help="folder to write: data.jsonl, generated.jsonl, pictures")
    parser.add_argument("--pictures", type=int, default=12_000, help="drawn pictures (default 12,000)")
    parser.add_argument("--statements", type=int, default=30_000, help="texts, each true once and false once")
    parser.add_argument("--arrangements", type=int, default=6, help="of every training picture (default 6)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = Random(options.seed)
    (options.out / "nlvr").mkdir(parents=True, exist_ok=True)
    (options.out / "drawn").mkdir(exist_ok=True)
    with (options.out / "data.jsonl").open("w") as file:
        for line in (options.nlvr / "data.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            with Image.open(options.nlvr / row["image"]) as picture:
                wide = picture.convert("RGB")
            boxes = [wide.crop((150 * place, 0, 150 * place + BOX, BOX)) for place in range(3)]
            mirror = row["split"] == "train" and not mentions_sides(row["sentence"])
            for turn in range(options.arrangements if row["split"] == "train" else 1):
                name = f"nlvr/{row['identifier']}-{turn}.png"
                arranged(boxes, rng, mirror)[0].save(options.out / name)
                key = row["identifier"] + (f"-{turn}" if turn else "")
                file.write(json.dumps({**row, "identifier": key, "image": name}) + "\n")
    things = [towers(rng) if rng.random() < 0.65 else scattered(rng) for _ in range(options.pictures)]
    with (options.out / "described.jsonl").open("w") as file:
        for place, boxes in enumerate(things):
            name = f"drawn/{place:06d}.png"
            picture, cells = arranged([drawn(box) for box in boxes], rng, mirror=False)
            picture.save(options.out / name)
            texts = [described(box, are_towers(boxes)) for box in boxes]
            captions = [f"{cell} {text}" for cell, text in zip(cells, texts, strict=True)]
            file.write(json.dumps({"image": name, "captions": captions}) + "\n")
    kinds = {
        kind: [place for place, boxes in enumerate(things) if are_towers(boxes) == kind]
        for kind in (True, False)
    }
    with (options.out / "generated.jsonl").open("w") as file:
        for turn in range(options.statements):
            kind = rng.random() < 0.65
            found = contrast(rng, [things[place] for place in kinds[kind]], kind)
            for true, place in zip((True, False), found[1:], strict=True) if found else ():
                row = {
                    "identifier": f"drawn-{turn}-{int(true)}",
                    "image": f"drawn/{kinds[kind][place]:06d}.png",
                }
                row |= {"sentence": found[0], "label": true, "split": "val" if turn % 50 == 0 else "train"}
                file.write(json.dumps(row) + "\n")


def are_towers(boxes: list[Box]) -> bool:
    """Whether the things stand on each other."""
    return all(item.x == 40 and item.y == 80 - 21 * level for box in boxes for level, item in enumerate(box))


if __name__ == "__main__":
    main()
