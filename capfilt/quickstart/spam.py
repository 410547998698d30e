"""Alt texts of the generated web that are no captions: file names, boilerplate, cut-off sentences, other languages.

None of them is a sentence of the captions' language (language.parse gives None for every one); truth.KINDS
says what holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from capfilt.quickstart.language import Mention, Statement, parse, write

BOILERPLATE = (
    "click to enlarge",
    "Click here to view full size image",
    "image may be subject to copyright",
    "All rights reserved",
    "photo gallery",
    "previous next",
    "loading...",
    "advertisement",
    "share on social media",
    "no image available",
    "product image 1 of 3",
    "free shipping on orders over $50",
    "logo",
    "thumbnail",
    "sign up for our newsletter",
)
_FILE_NAMES = (
    "IMG_{:04d}.jpg",
    "dsc{:05d}",
    "DSC_{:04d}.JPG",
    "P{:07d}.JPG",
    "image ({}).png",
    "{:05d}.jpeg",
    "photo-{}-scaled.webp",
    "untitled-{}",
    "screenshot_2021-03-{:02d}.png",
)


def file_name(rng: np.random.Generator) -> str:
    """A camera's or a server's name for a file, used as an alt text."""
    pattern = _FILE_NAMES[int(rng.integers(len(_FILE_NAMES)))]
    return pattern.format(int(rng.integers(1, 32 if "2021" in pattern else 10_000)))


def boilerplate(rng: np.random.Generator) -> str:
    """Words of a web page that are about no picture."""
    return BOILERPLATE[int(rng.integers(len(BOILERPLATE)))]


def truncated(statement: Statement, rng: np.random.Generator) -> str:
    """A true sentence cut at 30 to 80% of its letters, every other time with "..." behind; never a whole sentence."""
    text = write(statement, rng)
    while True:
        cut = text[: int(len(text) * rng.uniform(0.3, 0.8))].rstrip()
        if parse(cut) is None:
            return cut + ("..." if rng.random() < 0.5 else "")


def other_language(statement: Statement, rng: np.random.Generator) -> str:
    """The statement said in German, Spanish or French."""
    tongue = LANGUAGES[int(rng.integers(len(LANGUAGES)))]
    first = tongue.name(statement.objects[0], tongue.article)
    if len(statement.objects) == 1:
        text = first
    elif statement.relation is None:
        text = f"{first} {tongue.conjunction} {tongue.name(statement.objects[1], tongue.article)}"
    else:
        text = f"{first} {tongue.relations[statement.relation]} {tongue.name(statement.objects[1], tongue.after)}"
    if statement.background is not None:
        text += f" {tongue.backgrounds[statement.background]}"
    return text


@dataclass(frozen=True)
class Language:
    """The words of one language. Nouns are (word, gender); adjectives are given per gender."""

    article: dict[str, str]
    after: dict[str, str]
    """The article behind a relation, where case or elision change it."""
    nouns: dict[str, tuple[str, str]]
    adjectives: dict[str, dict[str, str]]
    order: str
    """A template over {article}, {size}, {noun} and {colour}."""
    conjunction: str
    relations: dict[str, str]
    backgrounds: dict[str, str]
    oblique: dict[str, dict[str, str]] | None = None
    """Adjectives behind a relation, where they differ."""

    def name(self, mention: Mention, article: dict[str, str]) -> str:
        noun, gender = self.nouns[mention.shape]
        behind_relation = article is self.after and self.oblique is not None
        words = self.oblique if behind_relation and self.oblique is not None else self.adjectives
        size = words[mention.size][gender] if mention.size else ""
        text = self.order.format(
            article=article[gender], size=size, noun=noun, colour=words[mention.colour][gender]
        )
        return " ".join(text.replace("' ", "'").split())


def _german(ending: dict[str, str]) -> dict[str, dict[str, str]]:
    stems = {
        "red": "rot", "orange": "orange", "yellow": "gelb", "green": "grün", "blue": "blau",
        "small": "klein", "large": "groß",
    }  # fmt: skip
    words = {name: {gender: stem + ending[gender] for gender in ending} for name, stem in stems.items()}
    words["orange"] = {gender: "orange" + tail.removeprefix("e") for gender, tail in ending.items()}
    return words


LANGUAGES = (
    Language(
        article={"m": "ein", "n": "ein"},
        after={"m": "einem", "n": "einem"},
        nouns={
            "circle": ("Kreis", "m"), "square": ("Quadrat", "n"), "triangle": ("Dreieck", "n"),
            "star": ("Stern", "m"), "ring": ("Ring", "m"),
        },
        adjectives=_german({"m": "er", "n": "es"}),
        oblique=_german({"m": "en", "n": "en"}),
        order="{article} {size} {colour} {noun}",
        conjunction="und",
        relations={"left": "links von", "right": "rechts von", "above": "über", "below": "unter"},
        backgrounds={
            "white": "auf weißem Hintergrund", "black": "auf schwarzem Hintergrund",
            "gray": "auf grauem Hintergrund", "striped": "auf gestreiftem Hintergrund", "grassy": "auf einer Wiese",
        },
    ),
    Language(
        article={"m": "un", "f": "una"},
        after={"m": "de un", "f": "de una"},
        nouns={
            "circle": ("círculo", "m"), "square": ("cuadrado", "m"), "triangle": ("triángulo", "m"),
            "star": ("estrella", "f"), "ring": ("anillo", "m"),
        },
        adjectives={
            "red": {"m": "rojo", "f": "roja"}, "orange": {"m": "naranja", "f": "naranja"},
            "yellow": {"m": "amarillo", "f": "amarilla"}, "green": {"m": "verde", "f": "verde"},
            "blue": {"m": "azul", "f": "azul"},
            "small": {"m": "pequeño", "f": "pequeña"},
            "large": {"m": "grande", "f": "grande"},
        },
        order="{article} {noun} {colour} {size}",
        conjunction="y",
        relations={
            "left": "a la izquierda", "right": "a la derecha", "above": "encima", "below": "debajo",
        },
        backgrounds={
            "white": "sobre fondo blanco", "black": "sobre fondo negro", "gray": "sobre fondo gris",
            "striped": "sobre fondo rayado", "grassy": "sobre la hierba",
        },
    ),
    Language(
        article={"m": "un", "f": "une"},
        after={"m": "d' un", "f": "d' une"},
        nouns={
            "circle": ("cercle", "m"), "square": ("carré", "m"), "triangle": ("triangle", "m"),
            "star": ("étoile", "f"), "ring": ("anneau", "m"),
        },
        adjectives={
            "red": {"m": "rouge", "f": "rouge"}, "orange": {"m": "orange", "f": "orange"},
            "yellow": {"m": "jaune", "f": "jaune"}, "green": {"m": "vert", "f": "verte"},
            "blue": {"m": "bleu", "f": "bleue"},
            "small": {"m": "petit", "f": "petite"},
            "large": {"m": "grand", "f": "grande"},
        },
        order="{article} {size} {noun} {colour}",
        conjunction="et",
        relations={
            "left": "à gauche", "right": "à droite", "above": "au-dessus", "below": "au-dessous",
        },
        backgrounds={
            "white": "sur fond blanc", "black": "sur fond noir", "gray": "sur fond gris",
            "striped": "sur fond rayé", "grassy": "sur l'herbe",
        },
    ),
)  # fmt: skip
