"""The best of a list of answers to questions about pictures, by their likelihood: BLIP's "rank" way.

Writing an answer freely is `decoding`'s, with `Answering.writer`. Answers as texts and the metric are not here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.models.common.answering import Answering
from capfilt.models.common.objectives import language_labels


@torch.inference_mode()
def rank_answers(
    model: Answering,
    ids: Tensor,
    mask: Tensor | None,
    images: Tensor,
    answer_ids: Tensor,
    answer_mask: Tensor,
    k: int = 128,
) -> tuple[Tensor, Tensor]:
    """(int64 [B], which answer is likeliest; fp32 [B], its log-likelihood) of questions about pictures.

    ids, mask: questions int64 and bool [B, L]; images: as `Answering.encode_image` takes them; answer_ids, answer_mask:
    int64 and bool [N, A], [CLS] answer [SEP]. k: so many answers, those whose first token is likeliest, are compared
    whole (BLIP, released code: 128); the others are out. Likelihoods are the model's own, without label smoothing.
    """
    question = model.encode_question(ids, mask, model.encode_image(images))
    cross = model.prefill_cross(question)
    start = answer_ids[:1, :1].expand(len(ids), 1)
    first = model.answer_logits(start, None, cross, mask)[:, 0].log_softmax(dim=1)
    nominated = first[:, answer_ids[:, 1]].topk(min(k, len(answer_ids)), dim=1).indices
    best, scores = [], []
    # A question at a time: the logits of its k answers are all that has to fit.
    for row, chosen in enumerate(nominated):
        own = [(keys[row : row + 1], values[row : row + 1]) for keys, values in cross]
        seen = mask[row : row + 1] if mask is not None else None
        logits = model.answer_logits(answer_ids[chosen], answer_mask[chosen], own, seen)
        labels = language_labels(answer_ids[chosen], answer_mask[chosen])
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none")
        likelihood = -loss.sum(dim=1)
        place = likelihood.argmax()
        best.append(chosen[place])
        scores.append(likelihood[place])
    return torch.stack(best), torch.stack(scores)
