"""Alt texts of the generated web that are no captions: file names, boilerplate, cut-off sentences, other languages.

None of them is a sentence of the captions' language (language.parse gives None for every one); truth.KINDS
says what holds.
"""

from __future__ import annotations

import numpy as np

from capfilt.quickstart.language import Mention, Statement, parse, write

BOILERPLATE = (
    "click to enlarge", "Click here to view full size image", "image may be subject to copyright", "All rights reserved",
    "photo gallery", "previous next", "loading...", "advertisement", "share on social media", "no image available",
    "product image 1 of 3", "free shipping on orders over $50", "logo", "thumbnail", "sign up for our newsletter",
)  # fmt: skip
_FILE_NAMES = (
    "IMG_{:04d}.jpg", "dsc{:05d}", "DSC_{:04d}.JPG", "P{:07d}.JPG", "image ({}).png", "{:05d}.jpeg",
    "photo-{}-scaled.webp", "untitled-{}", "screenshot_2021-03-{:02d}.png",
)  # fmt: skip
# Each row has German, Spanish and French. The forms of an article or an adjective, apart by blanks: for a masculine noun,
# for another noun, and in German both again behind a preposition. A single form serves for all.
_WORDS = {
    "a": ("ein ein einem einem", "un una", "un une"),
    "red": ("roter rotes roten roten", "rojo roja", "rouge"),
    "orange": ("oranger oranges orangen orangen", "naranja", "orange"),
    "yellow": ("gelber gelbes gelben gelben", "amarillo amarilla", "jaune"),
    "green": ("grüner grünes grünen grünen", "verde", "vert verte"),
    "blue": ("blauer blaues blauen blauen", "azul", "bleu bleue"),
    "small": ("kleiner kleines kleinen kleinen", "pequeño pequeña", "petit petite"),
    "large": ("großer großes großen großen", "grande", "grand grande"),
}
_PHRASES = {
    "circle": ("Kreis", "círculo", "cercle"),
    "square": ("Quadrat", "cuadrado", "carré"),
    "triangle": ("Dreieck", "triángulo", "triangle"),
    "star": ("Stern", "estrella", "étoile"),
    "ring": ("Ring", "anillo", "anneau"),
    "and": ("und ", "y ", "et "),
    "left": ("links von ", "a la izquierda de ", "à gauche d'"),
    "right": ("rechts von ", "a la derecha de ", "à droite d'"),
    "above": ("über ", "encima de ", "au-dessus d'"),
    "below": ("unter ", "debajo de ", "au-dessous d'"),
    "white": ("auf weißem Hintergrund", "sobre fondo blanco", "sur fond blanc"),
    "black": ("auf schwarzem Hintergrund", "sobre fondo negro", "sur fond noir"),
    "gray": ("auf grauem Hintergrund", "sobre fondo gris", "sur fond gris"),
    "striped": ("auf gestreiftem Hintergrund", "sobre fondo rayado", "sur fond rayé"),
    "grassy": ("auf einer Wiese", "sobre la hierba", "sur l'herbe"),
}
_NOT_MASCULINE = ("Quadrat", "Dreieck", "estrella", "étoile")
_ORDERS = ("{a} {size} {colour} {noun}", "{a} {noun} {colour} {size}", "{a} {size} {noun} {colour}")


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
    tongue = int(rng.integers(len(_ORDERS)))
    text = _name(statement.objects[0], tongue)
    if len(statement.objects) == 2:
        link = _PHRASES[statement.relation or "and"][tongue]
        text += f" {link}{_name(statement.objects[1], tongue, behind=statement.relation is not None)}"
    if statement.background is not None:
        text += f" {_PHRASES[statement.background][tongue]}"
    return text


def _name(mention: Mention, tongue: int, behind: bool = False) -> str:
    """One object's article, adjectives and noun; `behind` a preposition German bends them otherwise."""
    noun = _PHRASES[mention.shape][tongue]

    def bent(word: str | None) -> str:
        forms = _WORDS[word][tongue].split() if word else [""]
        return forms[((noun in _NOT_MASCULINE) + 2 * behind) % len(forms)]

    words = _ORDERS[tongue].format(
        a=bent("a"), size=bent(mention.size), colour=bent(mention.colour), noun=noun
    )
    return " ".join(words.split())
