"""NLVR's pictures as squares, in several arrangements; and pictures like them, drawn, with statements of known truth.

A picture of NLVR (Suhr et al., ACL 2017) is three boxes side by side, 400 x 100 pixels, and its statement is true whatever
the order of the boxes. Squeezed into a model's square, a block would be a sliver, so the boxes go into three cells of a 2 x 2
square; further orders of a training picture's boxes are further pictures, mirrored too where the statement names no side. Few
statements come with labels, so the same kinds of statements are also made about boxes drawn here, each once where it is true
and once where it is false of the same things in another arrangement. Their forms follow NLVR's train and development sentences;
no test sentence was looked at. A label is one bit, which a model that starts from nothing learns little from. So there is more
to learn first: for a captioner what is in the drawn boxes, and questions about which of them have a property.

    python benchmarks/preparing/nlvr_boxes.py DATA/tasks/nlvr1 boxes
    capfilt ingest boxes/data.jsonl --images boxes --image-col image --caption-col sentence --dataset boxes
    capfilt ingest boxes/described.jsonl --images boxes --image-col image --caption-col captions --dataset drawn
    capfilt examples boxes/data.jsonl --images boxes --dataset boxes
    capfilt examples boxes/asked.jsonl --images drawn --dataset asked
    capfilt examples boxes/generated.jsonl --images drawn --dataset generated
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageOps
from statements import BOX, SHAPES, Box, Item, asked, contrast, described

from capfilt.data.transforms import mentions_sides

ALIKE = 4
"""So many pictures show the same things, arranged differently: as many as people were shown."""
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
    return [
        placed(
            [
                (rng.choice(SHAPES), rng.choice(colours), rng.choice((10, 20, 30)))
                for _ in range(rng.randint(1, 3 if few else 7))
            ],
            rng,
        )
        for _ in range(3)
    ]


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


def arranged(boxes: Sequence[Image.Image]) -> Image.Image:
    """The first box at the upper left of a square, the second at the upper right, the third at the lower left."""
    square = Image.new("RGB", (2 * CELL, 2 * CELL), GREY)
    for box, corner in zip(boxes, ((2, 2), (CELL + 2, 2), (2, CELL + 2)), strict=True):
        square.paste(box, corner)
    return square


def rearranged(boxes: list[Box], rng: Random) -> list[Box]:
    """The same things in three other boxes: blocks stacked anew, scattered things put elsewhere."""
    tower = are_towers(boxes)
    things = [item for box in boxes for item in box]
    rng.shuffle(things)
    most = 4 if tower else 8
    for _ in range(100):
        cuts = sorted(rng.randint(1, len(things) - 1) for _ in range(2))
        counts = (cuts[0], cuts[1] - cuts[0], len(things) - cuts[1])
        if all(1 <= count <= most for count in counts):
            break
    else:
        return boxes
    parts = [things[: cuts[0]], things[cuts[0] : cuts[1]], things[cuts[1] :]]
    if tower:
        return [[replace(item, x=40, y=80 - 21 * level) for level, item in enumerate(part)] for part in parts]
    return [placed([(item.shape, item.colour, item.size) for item in part], rng) for part in parts]


def placed(things: Sequence[tuple[str, str, int]], rng: Random) -> Box:
    """A box of things, each (shape, colour, size), that do not overlap, the topmost first; one without room is left out."""
    box: Box = []
    for shape, colour, size in things:
        for _ in range(20):
            x, y = rng.randint(2, BOX - size - 2), rng.randint(2, BOX - size - 2)
            side = rng.random()
            x = BOX - size if side < 0.2 else x
            y = BOX - size if side > 0.8 or side < 0.03 else y
            new = Item(shape, colour, size, x, y)
            if all(
                new.x + size <= old.x or old.x + old.size <= new.x or new.y + size <= old.y
                or old.y + old.size <= new.y for old in box
            ):  # fmt: skip
                box.append(new)
                break
    return sorted(box, key=lambda item: item.y)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("nlvr", type=Path, help="folder with data.jsonl and the pictures it names")
    parser.add_argument("out", type=Path, help="folder to write: four tables and the pictures")
    parser.add_argument("--pictures", type=int, default=12_000, help="drawn pictures (default 12,000)")
    parser.add_argument(
        "--towers", type=float, default=0.65, help="share of them that are of towers (default 0.65)"
    )
    parser.add_argument("--questions", type=int, default=100_000, help="about them (default 100,000)")
    parser.add_argument("--statements", type=int, default=60_000, help="texts, each true once and false once")
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
            mirror = not mentions_sides(row["sentence"])
            orders = list(itertools.permutations(boxes)) if row["split"] != "test" else [boxes]
            for turn, order in enumerate(orders):
                name = f"nlvr/{row['identifier']}-{turn}.png"
                flipped = [
                    ImageOps.mirror(box) if mirror and turn and rng.random() < 0.5 else box for box in order
                ]
                arranged(flipped).save(options.out / name)
                key = row["identifier"] + (f"-{turn}" if turn else "")
                file.write(json.dumps({**row, "identifier": key, "image": name}) + "\n")
    things = []
    while len(things) < options.pictures:
        boxes = towers(rng) if rng.random() < options.towers else scattered(rng)
        things += [boxes, *(rearranged(boxes, rng) for _ in range(ALIKE - 1))]
    with (options.out / "described.jsonl").open("w") as file:
        for place, boxes in enumerate(things):
            arranged([drawn(box) for box in boxes]).save(options.out / picture_of(place))
            captions = described(boxes, are_towers(boxes))
            file.write(json.dumps({"image": picture_of(place), "captions": captions}) + "\n")
    with (options.out / "asked.jsonl").open("w") as file:
        for turn in range(options.questions):
            place = rng.randrange(len(things))
            question, answer = asked(rng, things[place], are_towers(things[place]))
            row = {"question_id": f"asked-{turn}", "image": picture_of(place), "question": question}
            # Which boxes they are is one answer, "first third": answers that exclude each other are learned faster.
            row |= {"answers": [answer] * 10, "split": "val" if turn % 50 == 0 else "train"}
            file.write(json.dumps(row) + "\n")
    kinds = {
        kind: [place for place, boxes in enumerate(things) if are_towers(boxes) == kind]
        for kind in (True, False)
    }
    pools = {kind: [things[place] for place in places] for kind, places in kinds.items()}
    with (options.out / "generated.jsonl").open("w") as file:
        for turn in range(options.statements):
            kind = rng.random() < options.towers
            found = contrast(rng, pools[kind], kind, ALIKE)
            for true, place in zip((True, False), found[1:], strict=True) if found else ():
                row = {"identifier": f"drawn-{turn}-{int(true)}", "image": picture_of(kinds[kind][place])}
                row |= {"sentence": found[0], "label": true, "split": "val" if turn % 50 == 0 else "train"}
                file.write(json.dumps(row) + "\n")


def picture_of(place: int) -> str:
    """Where the drawn picture of this number lies."""
    return f"drawn/{place:06d}.png"


def are_towers(boxes: list[Box]) -> bool:
    """Whether the things stand on each other."""
    return all(item.x == 40 and item.y == 80 - 21 * level for box in boxes for level, item in enumerate(box))


if __name__ == "__main__":
    main()
