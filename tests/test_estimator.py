"The scikit-learn estimator: its contract, and agreement with the methods it wraps"
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils import estimator_checks

import lps
from lps.methods.estimator import TaskClassifier
from lps.methods.registry import fit_method, score_models

CHECKS = [
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
    "check_no_attributes_set_in_init",
    "check_estimator_repr",
    "check_estimator_cloneable",
    "check_mixin_order",
    "check_valid_tag_types",
]


@pytest.fixture(scope="module")
def few() -> lps.ModelSet:
    models = lps.load_modelset("bundled")
    return models[models.manifest.task.to_numpy() < 3]


@pytest.mark.parametrize("name", CHECKS)
def test_scikit_learns_own_checks(name: str):
    getattr(estimator_checks, name)("TaskClassifier", TaskClassifier("stem-signature"))


def test_same_scores_as_the_method(few: lps.ModelSet):
    settings = dict(epochs=3)
    fitted = fit_method(few, "lps", seed=1, **settings)
    ours = TaskClassifier("lps", settings, random_state=1).fit(few, few.labels.numpy())
    assert np.array_equal(ours.decision_function(few), score_models(fitted, few).numpy())
    assert np.allclose(ours.predict_proba(few).sum(1), 1)


def test_order_of_labels_and_samples_does_not_matter(few: lps.ModelSet):
    samples = [few[i] for i in range(len(few))]
    names = few.manifest.class_0.tolist()
    order = np.random.default_rng(0).permutation(len(few))
    first = TaskClassifier("stem-signature").fit(samples, names)
    second = TaskClassifier("stem-signature").fit([samples[i] for i in order], [names[i] for i in order])
    assert first.predict(samples).tolist() == second.predict(samples).tolist()
    assert np.allclose(first.transform(samples), second.transform(samples), atol=1e-4)


def test_grid_search_and_pipeline(few: lps.ModelSet):
    samples = [few[i] for i in range(len(few))]
    names = few.manifest.class_0.tolist()
    methods = dict(method=["stem-signature", "image-statistics"])
    grid = GridSearchCV(TaskClassifier(), methods, cv=2, error_score="raise")
    assert grid.fit(samples, names).best_score_ > .5
    pipeline = make_pipeline(TaskClassifier("stem-signature"), KNeighborsClassifier(1))
    assert pipeline.fit(samples, names).score(samples, names) == 1


def test_unfit_input_is_refused(few: lps.ModelSet):
    names = few.manifest.class_0.tolist()
    with pytest.raises(NotFittedError): clone(TaskClassifier()).predict(few)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"): TaskClassifier().fit(few, names[:-1])
    with pytest.raises(ValueError, match="at least one model"): TaskClassifier().fit([], [])
    other = lps.Model({"conv1.weight": torch.rand(16, 3, 5, 5)})
    with pytest.raises(ValueError, match=r"conv1 is \(16, 3, 5, 5\) in model 1"):
        TaskClassifier().fit([few[0], other], ["a", "b"])
