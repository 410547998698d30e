"""Masked language modelling: which tokens are hidden, what stands in their place, and the loss of naming them.

Not here: the head that names them (`text.py`), or which models learn this way.
Source: BERT, arXiv 1810.04805, sec. 3.1; whole words: BERT's released code, ViLT, arXiv 2102.03334, sec. 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from capfilt.data.tokenizer import PREFIX, Tokenizer
from capfilt.errors import UserError

IGNORED = -100
"""The label of a token that is not to be named: what `objectives.token_loss` leaves out."""


@dataclass(frozen=True)
class Masking:
    """What of a vocabulary masking needs.

    Attributes:
        mask_id: what a hidden token becomes.
        fixed: bool [V], the special tokens, which are neither hidden nor put in place of others.
        continues: bool [V], the pieces that go on a word.
        share: of the tokens (or words) that may be hidden, how many are; at least one of a text is not promised.
        whole_words: all pieces of a word are hidden together, or none.
    """

    mask_id: int
    fixed: Tensor
    continues: Tensor
    share: float = 0.15
    whole_words: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise UserError(f"masking a share of {self.share:g}: give a number between 0 and 1")

    @classmethod
    def of(cls, tokenizer: Tokenizer, share: float = 0.15, whole_words: bool = False) -> Masking:
        """For texts as this tokenizer encodes them."""
        tokens = [tokenizer.token(index) for index in range(tokenizer.vocab_size)]
        continues = torch.tensor([token.startswith(PREFIX) and token != PREFIX for token in tokens])
        fixed = torch.zeros(len(tokens), dtype=torch.bool)
        fixed[[tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]] = True
        fixed[[tokenizer.unk_id, tokenizer.dec_id, tokenizer.enc_id]] = True
        return cls(tokenizer.mask_id, fixed, continues, share, whole_words)

    def __call__(
        self, ids: Tensor, mask: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """(ids with some tokens hidden, labels), int64 [B, L] both, of ids int64 [B, L] and mask bool [B, L].

        Each token (or word) is chosen with probability `share`; a chosen token becomes [MASK] in 80% of the cases, any
        other token in 10%, and stays what it is in 10%. Labels hold what was there, and IGNORED where nothing was chosen.
        Draws come from a CPU `generator` (default: torch's global one), so that every device hides alike.
        """
        fixed, continues = self.fixed.to(ids.device), self.continues.to(ids.device)

        def draw() -> Tensor:
            return torch.rand(ids.shape, generator=generator).to(ids.device)

        free = mask.bool() & ~fixed[ids]
        chosen = draw()
        if self.whole_words:
            # A piece takes the draw of the word that it goes on: what stands before it, however far.
            begins = ~(continues[ids] & free)
            place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            first = torch.where(begins, place, 0).cummax(dim=1).values
            chosen = chosen.gather(1, first)
        chosen = (chosen < self.share) & free
        how = draw()
        others = torch.nonzero(~self.fixed).squeeze(1)
        replaced = others[torch.randint(len(others), ids.shape, generator=generator)].to(ids.device)
        hidden = torch.where(how < 0.8, self.mask_id, torch.where(how < 0.9, replaced, ids))
        return torch.where(chosen, hidden, ids), torch.where(chosen, ids, IGNORED)
