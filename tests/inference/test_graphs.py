"""Catches: a recorded step that is replayed on yesterday's tokens, image or cache, one shape's recording used for another, a
failure to record that loses captions or warns at every batch."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from capfilt.errors import UserError
from capfilt.inference.captioner import Captioner
from capfilt.inference.decoding import Limits, sample
from capfilt.inference.graphs import RecordedWriter, run_again
from capfilt.inference.sampling import uniforms


class Counting:
    """Records by running again, as a graph does: the same computation over the same buffers."""

    def __init__(self):
        self.made = 0
        self.replayed = 0

    def __call__(self, compute):
        self.made += 1
        compute()  # recording runs it, and must leave no trace

        def replay():
            self.replayed += 1
            return run_again(compute)()

        return replay


@pytest.fixture(scope="module")
def scene(pair, images):
    model, tokenizer = pair
    prompt = tokenizer.encode(["a picture of"])[0][0, :-1]
    limits = Limits(tokenizer.sep_id, tokenizer.pad_id, 8, 8, 1.0)
    with torch.no_grad():
        crosses = [model.prefill_cross(model.encode_image(images[i : i + 3])) for i in (0, 3)]
    return model, prompt, limits, crosses


@torch.no_grad()
def test_recorded_steps_write_what_the_model_writes(scene):
    model, prompt, limits, crosses = scene
    record = Counting()
    writer = RecordedWriter(model, record)
    draws = uniforms(0, ["a", "b", "c"], 1, 8)
    for cross in (*crosses, crosses[0]):
        for uniform in (None, draws):
            plain = sample(model, cross, prompt, 3, limits, uniform)
            recorded = sample(writer, cross, prompt, 3, limits, uniform)
            assert torch.equal(plain.tokens, recorded.tokens)
            assert torch.equal(plain.logprob, recorded.logprob)
    assert record.made == 7, "one per step, made once: the first token comes with the prompt"
    assert record.replayed == 6 * 7


@torch.no_grad()
def test_every_shape_has_its_own_and_few_are_kept(scene):
    model, prompt, limits, crosses = scene
    writer = RecordedWriter(model, Counting())
    for rows in (3, 2, 1, 3, 2):
        cross = [(keys[:rows], values[:rows]) for keys, values in crosses[1]]
        plain = sample(model, cross, prompt, rows, limits)
        assert torch.equal(sample(writer, cross, prompt, rows, limits).tokens, plain.tokens)
    assert len(writer.shapes) == 2
    two = sample(writer, crosses[0], prompt, 6, limits, uniforms(0, ["a", "b", "c"], 2, 8))
    assert torch.equal(
        two.tokens, sample(model, crosses[0], prompt, 6, limits, uniforms(0, ["a", "b", "c"], 2, 8)).tokens
    )


@torch.no_grad()
def test_a_failed_recording_warns_once_and_writes_the_same(scene):
    model, prompt, limits, crosses = scene

    def broken(compute):
        compute()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    writer = RecordedWriter(model, broken)
    plain = sample(model, crosses[0], prompt, 3, limits)
    with pytest.warns(UserWarning, match="not permitted$") as caught:
        assert torch.equal(sample(writer, crosses[0], prompt, 3, limits).tokens, plain.tokens)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sample(writer, crosses[0], prompt, 3, limits).tokens, plain.tokens)


@torch.no_grad()
def test_memory_that_runs_out_is_the_callers_to_hear_of(scene, pair, images):
    """Not a reason to stop recording for good: a smaller batch will fit, once the large one's buffers are gone."""
    model, prompt, limits, crosses = scene

    def full(compute):
        raise torch.OutOfMemoryError("CUDA out of memory")

    writer = RecordedWriter(model, full)
    with pytest.raises(torch.OutOfMemoryError):
        sample(writer, crosses[0], prompt, 3, limits)
    assert not writer.failed
    captioner = Captioner(*pair)
    captioner.__dict__["writer"] = writer
    with pytest.raises(UserError, match="one image at a time"):
        captioner.caption(images)
    assert not writer.shapes or next(iter(writer.shapes.values())).cross[0][0].shape[0] == 1
    writer.record = Counting()
    made, plain = (each.caption(images, batch_size=3) for each in (captioner, Captioner(*pair)))
    assert [each.text for each in made] == [each.text for each in plain]


@pytest.mark.gpu
def test_graphs_on_a_gpu_write_what_the_processor_writes(pair, images):
    on_gpu = copy.deepcopy(pair[0]).cuda()
    fast = Captioner(on_gpu, pair[1], precision="fp32")
    slow = Captioner(*pair)
    for _ in range(2):
        made = fast.caption(images, max_new_tokens=6)
        assert [each.text for each in made] == [each.text for each in slow.caption(images, max_new_tokens=6)]
    assert fast.writer.shapes
    assert not fast.writer.failed
