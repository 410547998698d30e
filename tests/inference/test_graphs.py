"""Catches: a recorded step that is replayed on yesterday's tokens, image, cache or beams, one shape's recording used for
another, recordings made anew for every number of usable pictures, two shapes in memory at once, a recording that another
thread's call ends, a failure to record that loses captions, warns at every batch or leaves the thread on a dead stream."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from capfilt.inference.captioner import Captioner
from capfilt.inference.decoding import Limits, beam_search, sample
from capfilt.inference.graphs import RECORDING, CudaGraphs, RecordedWriter
from capfilt.inference.sampling import uniforms
from capfilt.plugins.checkpoints import BlipCaptioner
from tests.inference.tape import taped
from tests.refusals import refused


class Counting:
    """Makes recorders that replay as a graph does: the same operations over the same buffers, and no Python."""

    def __init__(self):
        self.shapes = self.made = self.replayed = 0

    def __call__(self):
        self.shapes += 1
        return self.record

    def record(self, compute):
        self.made += 1
        repeat = taped(compute)  # recording runs it, and must leave no trace
        addresses = set()

        def replay():
            self.replayed += 1
            out = repeat()
            addresses.add(out.data_ptr())
            assert len(addresses) == 1, "a graph always writes to the same place"
            return out

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
    recorder = Counting()
    writer = RecordedWriter(model, recorder)
    draws = uniforms(0, ["a", "b", "c"], 1, 8)
    for cross in (*crosses, crosses[0]):
        for uniform in (None, draws):
            plain = sample(model, cross, prompt, 3, limits, uniform)
            recorded = sample(writer, cross, prompt, 3, limits, uniform)
            assert torch.equal(plain.tokens, recorded.tokens)
            assert torch.equal(plain.logprob, recorded.logprob)
    assert recorder.made == 7, "one per step, made once: the first token comes with the prompt"
    assert recorder.replayed == 6 * 7
    assert recorder.shapes == 1, "the steps of a shape share their memory"


@torch.no_grad()
def test_several_captions_and_beams_are_recorded_too(scene):
    """Which texts a step's row may look at changes with every step of a beam search: in place, or a recording misses it."""
    model, prompt, limits, crosses = scene
    recorder = Counting()
    writer = RecordedWriter(model, recorder)
    draws = uniforms(0, ["a", "b", "c"], 2, 8)
    for cross in (*crosses, crosses[0]):
        plain, made = (sample(each, cross, prompt, 6, limits, draws) for each in (model, writer))
        assert torch.equal(made.tokens, plain.tokens)
    assert (recorder.made, recorder.replayed) == (7, 21)
    few = [(keys[:2], values[:2]) for keys, values in crosses[1]]
    writer.images = 3
    free = dataclasses.replace(limits, min_new_tokens=8)
    for cross, count in ((crosses[0], 3), (few, 2), (crosses[1], 3)):
        plain, made = (beam_search(each, cross, prompt, count, free, 3, 2) for each in (model, writer))
        assert torch.equal(made.tokens, plain.tokens)
        torch.testing.assert_close(made.logprob, plain.logprob)
    assert recorder.made == 14
    assert recorder.shapes == 2


PROMPTS = {"a": 7, "a picture": 6, "a picture of": 5, "a picture of two red": 3}
"""Prompts, and new tokens with which prompt and text together are of one length for all."""


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("method", ["sample", "beam"])
@pytest.mark.parametrize("order", [[0, 1], [3, 0], [2, 0, 3, 1, 2]])
@torch.no_grad()
def test_a_prompt_of_another_length_is_not_replayed_at_this_ones_places(pair, scene, method, ways, order):
    """Prompt and text of two calls are together as long, so the calls share buffers: recordings that were told apart by the
    length so far alone wrote wrong texts for the second prompt, without an error. A recorder that runs Python again cannot
    see it.
    """
    (_, tokenizer), (model, _, limits, crosses) = pair, scene
    writer = RecordedWriter(model, lambda: taped)
    for turn, (said, longest) in enumerate([*PROMPTS.items()][each] for each in order):
        prompt = tokenizer.encode([said])[0][0, :-1]
        assert len(prompt) + longest == 9
        own = dataclasses.replace(limits, max_new_tokens=longest, min_new_tokens=longest)
        draws = uniforms(turn, ["a", "b", "c"], ways, longest)
        cross = crosses[turn % 2]
        plain, made = (
            sample(each, cross, prompt, 3 * ways, own, draws)
            if method == "sample"
            else beam_search(each, cross, prompt, 3, own, ways, ways)
            for each in (model, writer)
        )
        assert torch.equal(made.tokens, plain.tokens)
        torch.testing.assert_close(made.logprob, plain.logprob)
    assert not writer.failed
    # One shape, and in it a recording for each place of each prompt, made once.
    assert len(writer.shape.steps) == sum([*PROMPTS.values()][each] - 1 for each in set(order))


@torch.no_grad()
def test_a_longer_text_and_another_dtype_have_buffers_of_their_own(scene):
    """Written past the end of a shorter text's cache, or rounded to the dtype of an earlier batch."""
    model, prompt, limits, crosses = scene
    writer = RecordedWriter(model, lambda: taped)
    for longest in (4, 8, 3):
        own = dataclasses.replace(limits, max_new_tokens=longest, min_new_tokens=longest)
        plain, made = (sample(each, crosses[0], prompt, 3, own) for each in (model, writer))
        assert torch.equal(made.tokens, plain.tokens)
        # Tokens alone may come out right: what is written past a cache's end is dropped without an error.
        torch.testing.assert_close(made.logprob, plain.logprob)
    half = [(keys.bfloat16(), values.bfloat16()) for keys, values in crosses[0]]
    plain, made = (sample(each, half, prompt, 3, own) for each in (model, writer))
    assert torch.equal(made.tokens, plain.tokens)
    assert {each.dtype for pair_of in writer.shape.cross for each in pair_of} == {torch.bfloat16}
    for dtype in (torch.float32, torch.bfloat16):
        assert writer.room(torch.zeros(4, 3, 2, 5, 8, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("method", ["sample", "beam"])
@torch.no_grad()
def test_a_cache_that_ended_texts_were_cut_from_is_not_used_again(pair, scene, method):
    """On a processor images whose texts have ended leave the cache: what is left fits no recording, and no next batch."""
    (_, tokenizer), (model, prompt, limits, crosses) = pair, scene
    model = copy.deepcopy(model)
    model.text_decoder.cls.predictions.bias[tokenizer.sep_id] += 2.0 if method == "sample" else 1.0
    free = dataclasses.replace(limits, min_new_tokens=0)
    draws = uniforms(2, ["a", "b", "c"], 1, 8)
    writer, cut = RecordedWriter(model, lambda: taped), []
    for cross in (*crosses, crosses[0]):
        plain, made = (
            sample(each, cross, prompt, 3, free, draws)
            if method == "sample"
            else beam_search(each, cross, prompt, 3, free, 2)
            for each in (model, writer)
        )
        assert torch.equal(made.tokens, plain.tokens)
        torch.testing.assert_close(made.logprob, plain.logprob)
        cut.append(writer.shape.cache.kept is not None)
    assert any(cut), "some texts should end early for this test to mean anything"


@torch.no_grad()
def test_a_smaller_batch_runs_in_the_full_ones_recording(scene):
    """Pictures that cannot be used make nearly every batch of a shard another size."""
    model, prompt, limits, crosses = scene
    recorder = Counting()
    writer = RecordedWriter(model, recorder)
    writer.images = 4
    for rows in (3, 1, 2, 3):
        cross = [(keys[:rows], values[:rows]) for keys, values in crosses[1]]
        plain = sample(model, cross, prompt, rows, limits)
        found = sample(writer, cross, prompt, rows, limits)
        assert torch.equal(found.tokens, plain.tokens)
        torch.testing.assert_close(found.logprob, plain.logprob)
    assert recorder.made == 7
    assert writer.shape.ids.shape == (4, 1)


@torch.no_grad()
def test_another_shape_lets_go_of_the_last_before_it_asks_for_memory(scene):
    model, prompt, limits, crosses = scene
    # Its recordings hold what they are recordings of, and so the shape.
    writer = RecordedWriter(model, lambda: lambda compute: compute)
    sample(writer, crosses[0], prompt, 3, limits)
    last = weakref.ref(writer.shape)
    standing = []

    def recorder():
        standing.append(last())
        return taped

    writer.recorder = recorder
    cross = [(keys[:2], values[:2]) for keys, values in crosses[0]]
    assert len(sample(writer, cross, prompt, 2, limits).tokens) == 2
    assert standing == [None]


@pytest.mark.parametrize("method", ["nucleus", "beam"])
def test_keys_and_values_are_written_where_recordings_read_them(pair, images, method):
    """All keys and values of a batch copied once more, into the recordings' memory; or a batch that reads another's there."""
    captioner, recorder = Captioner(*pair), Counting()
    captioner.writer = writer = RecordedWriter(captioner.model, recorder)
    made, seen = captioner.cross.forward, []
    captioner.cross.forward = lambda *given: seen.append(made(*given)) or seen[-1]
    options = {"method": method, "max_new_tokens": 8, "min_new_tokens": 8, "batch_size": 3, "seed": 1}
    for chosen in (images, images.flip(0)):
        found = captioner.caption(chosen, **options)
        plain = Captioner(*pair).caption(chosen, **options)
        assert [each.text for each in found] == [each.text for each in plain]
        # A batch that is smaller runs in the full one's recording: products of other shapes, which some processors round
        # otherwise.
        assert [each.logprob for each in found] == pytest.approx([each.logprob for each in plain], abs=1e-4)
    assert len(seen) == 6  # of 3, 3 and 1 pictures, twice
    assert recorder.shapes == 1
    for cross in seen:
        for pair_of, own in zip(cross, writer.shape.cross, strict=True):
            assert [each.data_ptr() for each in pair_of] == [each.data_ptr() for each in own]


@torch.no_grad()
def test_a_failed_recording_warns_once_and_writes_the_same(scene):
    model, prompt, limits, crosses = scene

    def broken(compute):
        compute()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    writer = RecordedWriter(model, lambda: broken)
    plain = sample(model, crosses[0], prompt, 3, limits)
    with pytest.warns(UserWarning, match="not permitted$") as caught:
        assert torch.equal(sample(writer, crosses[0], prompt, 3, limits).tokens, plain.tokens)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sample(writer, crosses[0], prompt, 3, limits).tokens, plain.tokens)
    assert writer.shape is None


@torch.no_grad()
def test_memory_that_runs_out_is_the_callers_to_hear_of(scene, pair, images):
    """Not a reason to stop recording for good: a smaller batch will fit, once the large one's buffers are gone."""
    model, prompt, limits, crosses = scene

    def full(compute):
        raise torch.OutOfMemoryError("CUDA out of memory")

    writer = RecordedWriter(model, lambda: full)
    with pytest.raises(torch.OutOfMemoryError):
        sample(writer, crosses[0], prompt, 3, limits)
    assert not writer.failed
    captioner = Captioner(*pair)
    captioner.__dict__["writer"] = writer
    with refused("GPU"):
        captioner.caption(images)
    assert writer.shape is None or writer.shape.images == 1
    writer.recorder = Counting()
    made, plain = (each.caption(images, batch_size=3) for each in (captioner, Captioner(*pair)))
    assert [each.text for each in made] == [each.text for each in plain]


class Cuda:
    """Stands for torch.cuda: which stream is current, and what recording was asked for; fails where it is told to."""

    def __init__(self, monkeypatch, fails=""):
        self.fails = fails
        self.now = self.own = SimpleNamespace(name="own", wait_stream=lambda other: None)
        self.asked = []
        self.order = []
        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "now", stream))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)

    def replay(self):
        self.order.append("replay")

    @contextlib.contextmanager
    def stream(self, stream):
        self.now = stream
        yield
        self.now = self.own

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        self.asked.append((pool, stream, capture_error_mode))
        assert RECORDING.locked(), "somebody may be pinning memory"
        self.now = stream
        if self.fails == "begin":
            raise RuntimeError("capture cannot begin")
        yield
        if self.fails == "end":
            raise RuntimeError("capture cannot end")
        self.now = self.own


def test_a_graph_minds_its_own_thread_and_its_shapes_memory(monkeypatch):
    cuda = Cuda(monkeypatch)
    record, out = CudaGraphs(), torch.zeros(1)
    first, second = (record(lambda: out) for _ in range(2))
    assert first() is second() is out
    assert cuda.order == ["replay", "replay"]
    assert {mode for _, _, mode in cuda.asked} == {"thread_local"}
    assert len({(pool, id(stream)) for pool, stream, _ in cuda.asked}) == 1
    assert CudaGraphs().pool is not record.pool


def test_pinned_memory_waits_for_a_recording(monkeypatch):
    plugin = BlipCaptioner.__new__(BlipCaptioner)
    plugin.engine = SimpleNamespace(device=torch.device("cuda"))
    pixels = [np.zeros((3, 2, 2), np.uint8)] * 2
    asked = []

    def empty(shape, dtype, pin_memory):
        asked.append((pin_memory, RECORDING.locked()))
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr("capfilt.plugins.checkpoints.torch.empty", empty)
    assert plugin.gather(pixels).shape == (2, 3, 2, 2)
    plugin.engine.device = torch.device("cpu")
    plugin.gather(pixels)
    assert asked == [(True, True), (False, False)]


@pytest.mark.parametrize("fails", ["begin", "end", "within"])
def test_a_recording_that_fails_leaves_no_thread_on_its_stream(monkeypatch, fails):
    cuda = Cuda(monkeypatch, fails)

    def compute():
        if fails == "within" and RECORDING.locked():
            raise RuntimeError("cannot be captured")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="c"):
        CudaGraphs()(compute)
    assert cuda.now is cuda.own
    assert not RECORDING.locked()


@pytest.mark.gpu
def test_graphs_on_a_gpu_write_what_the_processor_writes(pair, images):
    on_gpu = copy.deepcopy(pair[0]).cuda()
    fast = Captioner(on_gpu, pair[1], precision="fp32")
    slow = Captioner(*pair)
    for _ in range(2):
        made = fast.caption(images, max_new_tokens=6)
        assert [each.text for each in made] == [each.text for each in slow.caption(images, max_new_tokens=6)]
    assert fast.writer.shape is not None
    assert not fast.writer.failed
