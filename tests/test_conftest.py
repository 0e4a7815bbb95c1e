"""A deprecation that this package causes fails the tests, as a warning or in the log."""

import logging
import warnings

import pytest


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
@pytest.mark.parametrize("module", ["transformers_ma2mba.modeling_ma2mba", "transformers.trainer"])
def test_deprecations_in_these_modules_are_errors(category, module):
    with pytest.raises(category, match="goes away"):
        warnings.warn_explicit("This goes away.", category, f"{module}.py", 1, module=module)


def test_deprecations_in_other_modules_are_warnings():
    with pytest.warns(FutureWarning):
        warnings.warn_explicit("This goes away.", FutureWarning, "other.py", 1, module="other")


def test_logged_deprecations_are_collected(no_logged_deprecation):
    logging.getLogger("transformers.models.mamba2").warning("`old` is deprecated, use `new`.")
    assert no_logged_deprecation.messages == ["`old` is deprecated, use `new`."]
    no_logged_deprecation.messages.clear()  # otherwise the fixture would fail this test
