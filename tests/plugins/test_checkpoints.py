"""Catches: a family that embeds or matches and cannot be the filter; a score of another pair; a column without its ability."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from capfilt.data.bpe import BpeTokenizer
from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer
from capfilt.models import build, checkpoint, kind_of, preset
from capfilt.models.albef.tasks import vqa_from_albef
from capfilt.plugins.checkpoints import BlipFilter, FamilyScorer, open_filter
from tests.refusals import refused
from tests.worlds import jpeg, tiny_checkpoint

WORDS = ("a", "red", "green", "blue", "square")
TEXTS = ["a red square", "a blue square", "green", "red red red", "a square"]
INDEX = [2, 0, 1, 0, 2]  # out of order, as a plug-in may be asked


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny checkpoint of each family but BLIP, by its name."""
    place = tmp_path_factory.mktemp("families")
    for family in ("clip", "vilt", "albef"):
        tokenizer = (
            BpeTokenizer.train(TEXTS * 3, 530)
            if family == "clip"
            else Tokenizer([*SPECIALS, *WORDS, *ADDED], "as-found" if family == "vilt" else "albef")
        )
        checkpoint.save(place / family, build(preset(family, "tiny", tokenizer.vocab_size), 3), tokenizer)
    return place


@pytest.mark.parametrize(
    ("family", "columns"),
    [("clip", ["itc_score"]), ("vilt", ["itm_score"]), ("albef", ["itm_score", "itc_score"])],
)
def test_scores_are_each_pairs_own_in_the_familys_columns(made, family, columns):
    scorer = open_filter(str(made / family))
    assert isinstance(scorer, FamilyScorer)
    assert list(scorer.columns) == columns
    scorer.setup()
    images = scorer.gather([scorer.prepare(jpeg(colour, 40, seed)) for seed, colour in enumerate(WORDS[1:4])])
    found = scorer.score(images, INDEX, TEXTS, max_text_tokens=35, batch_size=8)
    assert (found.shape, found.dtype) == ((len(TEXTS), len(columns)), np.float32)
    for row, (image, text) in enumerate(zip(INDEX, TEXTS, strict=True)):
        alone = scorer.score(images[image : image + 1], [0], [text], max_text_tokens=35, batch_size=8)
        np.testing.assert_allclose(found[row], alone[0], atol=1e-5)
    assert found.std(axis=0).min() > 0
    assert scorer.computed() == {"precision": "fp32"} or torch.cuda.is_available()
    assert scorer.fingerprint() == checkpoint.fingerprint(made / family)


def test_itc_is_the_cosine_of_the_models_own_embeddings(made):
    scorer = open_filter(str(made / "clip"))
    scorer.setup()
    contents, _ = checkpoint.open_any(made / "clip")
    model = contents.model.eval()
    images = scorer.gather([scorer.prepare(jpeg("red", 40))])
    ids, mask = contents.tokenizer.encode(TEXTS, **model.config.reading)
    with torch.inference_mode():
        wanted = model.embed_text(ids, mask) @ model.embed_image(model.encode_image(images))[0]
    found = scorer.score(images, [0] * len(TEXTS), TEXTS)
    np.testing.assert_allclose(found[:, 0], wanted.numpy(), atol=1e-6)


def test_a_blip_keeps_its_engine_and_other_models_are_no_filter(made, tmp_path):
    tiny_checkpoint(tmp_path / "blip")
    assert isinstance(open_filter(str(tmp_path / "blip")), BlipFilter)
    contents, _ = checkpoint.open_any(made / "albef")
    asked = vqa_from_albef(contents.model)
    checkpoint.save(tmp_path / "asked", asked, contents.tokenizer)
    with refused("asked", kind_of(asked).does.split()[0]):
        open_filter(str(tmp_path / "asked"))
    with refused("--precision int8"):
        open_filter(str(made / "clip"), precision="int8")
    with refused("--compile"):
        open_filter(str(made / "clip"), compiled="yes")
