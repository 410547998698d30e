"""Catches a warning that comes too early, twice, never, or after a stretch that something interrupted."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from capfilt.training.watch import PRIORS, Watched, watches


def told(lines, stuck=30, collapse=20, state=None):
    """The figures that each log line, over 10 steps, gave a warning of."""
    state = state or Watched()
    found = []
    for figures in lines:
        said = [each.line(figures, 10, state) for each in watches(stuck, collapse)]
        found.append([line.partition(" ")[0] for line in said if line])
    return found


@pytest.mark.parametrize("prior", PRIORS)
def test_matching_that_stays_at_its_prior_is_told_once_when_the_stretch_is_full(prior):
    assert told([{"itm": prior}] * 6) == [[], [], ["itm"], [], [], []]
    assert told([{"itm": prior + 0.02}] * 6) == [[]] * 6


def test_both_priors_are_those_of_a_head_that_knows_only_how_many_match():
    for share, prior in ((1 / 3, PRIORS[0]), (1 / 2, PRIORS[1])):
        assert prior == pytest.approx(-share * math.log(share) - (1 - share) * math.log(1 - share))


@pytest.mark.parametrize("figure", ["image_cosine", "text_cosine", "queue_cosine"])
def test_embeddings_that_are_one_point_are_told_each_by_name(figure):
    assert told([{figure: 0.995}] * 3) == [[], [figure], []]
    assert told([{figure: 0.98}] * 3) == [[], [], []]


def test_one_good_line_begins_the_stretch_anew_and_a_line_without_the_figure_does_not():
    bad, good, nothing = {"itm": PRIORS[0]}, {"itm": 0.3}, {"lm": 1.0}
    assert told([bad, bad, good, bad, bad, bad]) == [[], [], [], [], [], ["itm"]]
    assert told([bad, nothing, bad, nothing, bad]) == [[], [], [], [], ["itm"]]


def test_zero_steps_switch_a_watch_off():
    assert told([{"itm": PRIORS[0], "text_cosine": 1.0}] * 5, stuck=0, collapse=0) == [[]] * 5


def test_a_stretch_and_what_was_told_travel_in_a_runs_state():
    state = Watched()
    told([{"itm": PRIORS[0], "text_cosine": 1.0}] * 2, state=state)
    resumed = Watched(**json.loads(json.dumps(dataclasses.asdict(state))))
    assert told([{"itm": PRIORS[0], "text_cosine": 1.0}] * 2, state=resumed) == [["itm"], []]
