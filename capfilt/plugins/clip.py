"""A CLIP or a SigLIP of transformers as a scorer: `clip_score` is the cosine that DataComp and LAION filter by.

The model and its tokenizer are transformers', imported when they are needed. Pictures are prepared here, with Pillow:
transformers has several implementations, whose pixels differ, and which one it takes depends on what else is installed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from capfilt.data.cleaning import CLIP, cleaned
from capfilt.data.images import decode
from capfilt.errors import UserError
from capfilt.models.common.precision import auto_precision
from capfilt.tables.ids import file_sha256
from capfilt.tables.workspace import expanded

VERSION = 2  # large JPEGs are decoded whole; texts are repaired and unescaped
"""Raised when this code changes the scores it gives."""

_CONFIG, _PICTURES = "config.json", "preprocessor_config.json"
_SUFFIXES = (".json", ".txt", ".safetensors", ".bin")

Pixels = npt.NDArray[np.uint8]


class ClipScorer:
    """The plug-in `clip:DIR`: a directory that holds a transformers `CLIPModel`, its tokenizer and its preprocessing.

    Texts are cut to the model's own longest (77 tokens in OpenAI's), not to `--max-text-tokens`.

    Args:
        argument: the directory.
        precision: auto (bf16 on GPUs that have it, else fp32), fp32 or bf16; cosines are always taken in fp32.
        draft: yes lets decoders scale JPEGs of 4 times the model's size or more: faster, and scores move.

    Raises:
        UserError: where the directory holds no CLIP, or one whose pictures are prepared in a way not known here.
    """

    columns: ClassVar[dict[str, str]] = {
        "clip_score": "cosine of a CLIP's image and text embeddings, in [-1, 1]"
    }
    who: ClassVar[str] = "CLIP"

    def __init__(self, argument: str, precision: str = "auto", draft: str = "") -> None:
        self.directory = expanded(argument)
        if precision not in ("auto", "fp32", "bf16"):
            raise UserError(f"{self.who}: precision {precision!r} is unknown: use auto, fp32 or bf16")
        if draft not in ("", "yes"):
            raise UserError(f"{self.who}: draft {draft!r} is unknown: give yes, or leave it out")
        self.precision, self.draft = precision, bool(draft)
        kind = _read(self.directory / _CONFIG).get("model_type")
        if kind != self.who.lower():
            raise UserError(f"{self.directory / _CONFIG}: model_type is {kind!r}, not {self.who.lower()!r}")
        path = self.directory / _PICTURES
        pictures = _read(path)
        try:
            self.size = self.side(pictures)
            self.mean, self.std = _settings(pictures)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not the preprocessing of a {self.who} ({error!r})") from error

    def fingerprint(self) -> str:
        """sha256 (hex) over this code's version and every file the model may be read from."""
        total = hashlib.sha256(f"{VERSION}\n".encode())
        for path in sorted(each for each in self.directory.iterdir() if each.suffix in _SUFFIXES):
            total.update(f"{path.name}:{file_sha256(path)}\n".encode())
        return total.hexdigest()

    def setup(self) -> None:
        try:
            from transformers import AutoTokenizer, CLIPModel, SiglipModel
            from transformers.utils import logging as transformers_logging
        except ImportError as error:
            raise UserError(
                f"{self.who}: transformers cannot be imported ({error}); pip install 'capfilt[hf]'"
            ) from error
        # Its bar would be drawn by every worker, and with --quiet too.
        logging: Any = transformers_logging
        bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            kind: Any = CLIPModel if self.who == "CLIP" else SiglipModel
            model: Any = kind.from_pretrained(self.directory, local_files_only=True)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(self.directory, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"{self.directory}: not a {self.who} that transformers can open ({said})"
            ) from error
        finally:
            if bar:
                logging.enable_progress_bar()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).float().eval()
        if self.size != model.config.vision_config.image_size:
            raise UserError(
                f"{self.directory / _PICTURES}: pictures of {self.size} pixels, but the model takes "
                f"{model.config.vision_config.image_size}"
            )

    def computed(self) -> dict[str, str]:
        """The precision, "auto" resolved."""
        return {"precision": auto_precision(self.device) if self.precision == "auto" else self.precision}

    def prepare(self, data: bytes) -> Pixels:
        """uint8 [3, S, S], as `squared` makes the picture."""
        image = self.squared(decode(data, draft_size=2 * self.size if self.draft else None))
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    def side(self, pictures: dict[str, Any]) -> int:
        """The side of the model's pictures, by its preprocessing. Raises KeyError, TypeError or ValueError for another kind."""
        size, crop = pictures["size"], pictures["crop_size"]
        # Older files hold plain numbers.
        size = size if isinstance(size, int) else size["shortest_edge"]
        sides = {crop} if isinstance(crop, int) else {crop["height"], crop["width"]}
        if sides != {size}:
            raise ValueError(f"size {size}, crop_size {crop}")
        if not pictures.get("do_center_crop", True):
            raise ValueError("do_center_crop is off")
        return int(size)

    def squared(self, image: Image.Image) -> Image.Image:
        """The shorter side made S by Pillow's bicubic filter, then the middle."""
        width, height = image.size
        other = int(self.size * max(width, height) / min(width, height))
        wanted = (self.size, other) if width <= height else (other, self.size)
        image = image.resize(wanted, Image.Resampling.BICUBIC)
        left, top = (wanted[0] - self.size) // 2, (wanted[1] - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def judged(self, cosine: Tensor) -> Tensor:
        """The columns [texts, columns] of cosines [texts, 1]."""
        return cosine

    @torch.inference_mode()
    def score(
        self,
        images: Sequence[Pixels],
        image_index: Sequence[int],
        texts: Sequence[str],
        *,
        batch_size: int,
        **_rest: Any,
    ) -> npt.NDArray[np.float32]:
        """float32 [texts, columns], of the cosine of each text and its picture; a picture is encoded once."""
        low = self.computed()["precision"] == "bf16"
        wanted = sorted(set(image_index))
        row_of = {image: row for row, image in enumerate(wanted)}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            pictures = [
                self._embed_images([images[image] for image in wanted[start : start + batch_size]])
                for start in range(0, len(wanted), batch_size)
            ]
            said = [
                self._embed_texts(list(texts[start : start + batch_size]))
                for start in range(0, len(texts), batch_size)
            ]
        seen = torch.cat(pictures)[[row_of[image] for image in image_index]]
        cosine = (seen * torch.cat(said)).sum(-1, keepdim=True).clamp(-1, 1)
        found: npt.NDArray[np.float32] = self.judged(cosine).cpu().numpy()
        return found

    def _embed_images(self, images: Sequence[Pixels]) -> Tensor:
        pixels = torch.from_numpy(np.stack(images)).to(self.device).float() / 255
        mean, std = (torch.tensor(each, device=self.device)[:, None, None] for each in (self.mean, self.std))
        found = self.model.vision_model(pixel_values=(pixels - mean) / std).pooler_output
        return _unit(self.model.visual_projection(found) if self.who == "CLIP" else found)

    def _embed_texts(self, texts: list[str]) -> Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        # transformers' tokenizer leaves out the first steps of the released code.
        read = [cleaned(text, CLIP) for text in texts]
        tokens = self.tokenizer(
            read, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.device)
        found = self.model.text_model(
            tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return _unit(self.model.text_projection(found))


class SiglipScorer(ClipScorer):
    """The plug-in `siglip:DIR`: a directory that holds a transformers `SiglipModel`, its tokenizer and its preprocessing.

    Pictures become squares without a crop; texts are padded to the model's longest and read whole, pads included, as they were
    in its training (arXiv 2303.15343, released code).
    """

    columns: ClassVar[dict[str, str]] = {
        "siglip_score": "cosine of a SigLIP's image and text embeddings, in [-1, 1]",
        "siglip_probability": "sigmoid of its scaled cosine and bias, in [0, 1]",
    }
    who: ClassVar[str] = "SigLIP"

    def side(self, pictures: dict[str, Any]) -> int:
        size = pictures["size"]
        if size["height"] != size["width"] or pictures.get("do_center_crop"):
            raise ValueError(f"size {size}, do_center_crop {pictures.get('do_center_crop')}")
        return int(size["height"])

    def squared(self, image: Image.Image) -> Image.Image:
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC)

    def judged(self, cosine: Tensor) -> Tensor:
        logits = cosine * self.model.logit_scale.exp() + self.model.logit_bias
        return torch.cat([cosine, logits.sigmoid()], dim=1)

    def _embed_texts(self, texts: list[str]) -> Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.device)
        return _unit(self.model.text_model(tokens["input_ids"]).pooler_output)


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file; clip:DIR and siglip:DIR are directories of transformers"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error})".splitlines()[0]) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def _settings(content: dict[str, Any]) -> tuple[list[float], list[float]]:
    """(mean, std). Raises KeyError, TypeError or ValueError for a step that is not known here."""
    for step in ("do_resize", "do_normalize", "do_rescale"):
        if not content.get(step, True):
            raise ValueError(f"{step} is off")
    if content.get("resample", 3) != Image.Resampling.BICUBIC:
        raise ValueError(f"resample {content['resample']}")
    mean, std = ([float(each) for each in content[name]] for name in ("image_mean", "image_std"))
    if len(mean) != 3 or len(std) != 3 or not all(std):
        raise ValueError(f"image_mean {mean}, image_std {std}")
    return mean, std
