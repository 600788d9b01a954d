"""A collapsing run says so, and only a collapsing one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from conlens_jax.config import ExperimentConfig, constant
from conlens_jax.training.collapse import collapse_warning

DOCUMENTS = np.repeat(np.arange(32), 4)
RNG = np.random.default_rng(0)


def cosines(mean):
    return np.clip(mean + 0.1 * RNG.standard_normal(len(DOCUMENTS)), -1, 1)


def warning(own, shuffled, **changes):
    config = dataclasses.replace(ExperimentConfig(), **changes)
    return collapse_warning(cosines(own), cosines(shuffled), DOCUMENTS, 0.3, config)


def test_text_that_depends_on_the_activation_is_not_warned_of():
    assert warning(0.6, 0.1) == ""
    assert warning(0.25, 0.1) == ""


@pytest.mark.parametrize("own", [0.1, 0.0, -0.3])
def test_text_no_better_than_another_rows_is(own):
    said = warning(own, 0.1)
    assert "the text does not depend on the activation" in said
    assert "fve_nrm" in said and "another row's text" in said


def test_it_names_what_this_run_has_not_tried():
    config = ExperimentConfig()
    lens = dataclasses.replace(config.lens, dual_path=False)
    bare = dataclasses.replace(config.loss, lm=constant(0.05))
    said = warning(0.0, 0.1, loss=bare, lens=lens)
    assert "a smaller loss.lm (now 0.05)" in said
    assert "loss.text" in said and "lens.dual_path=True" in said
    guarded = dataclasses.replace(config.loss, lm=constant(0.0), text=constant(1.0))
    said = warning(0.0, 0.1, loss=guarded)
    assert "loss.lm" not in said and "loss.text" not in said and "dual_path" not in said
    assert "warm.steps" in said


def test_one_document_is_enough():
    config, cos = ExperimentConfig(), cosines(0.5)
    one = np.zeros(len(cos), np.int64)
    assert collapse_warning(cos, cosines(0.1), one, 0.3, config) == ""
    assert collapse_warning(cos, cos, one, 0.3, config)
