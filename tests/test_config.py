"""The sections themselves: closed, frozen, of plain values."""

import pytest
from pydantic import ValidationError

from minilm.config import Config, ModelConfig, OptimizerConfig, RLHFConfig, Section


def sections(model: type[Section] = Section) -> list[type[Section]]:
    return [c for child in model.__subclasses__() for c in (child, *sections(child))]


@pytest.mark.parametrize("section", sections())
def test_a_section_refuses_what_it_does_not_know_and_never_changes(section):
    required = {"HubCorpus": {"name": "x"}, "TermConfig": {"weight": 1.0}}.get(section.__name__, {})
    with pytest.raises(ValidationError, match="Extra inputs"):
        section(unheard_of=1, **required)
    one = section(**required)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(one, next(iter(section.model_fields)), 1)


@pytest.mark.parametrize("section", sections())
def test_a_section_says_what_it_is(section):
    assert section.__doc__ and section.__doc__ != Section.__doc__


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (OptimizerConfig, {"learning_rate": float("nan")}),
        (OptimizerConfig, {"learning_rate": "1e-3"}),
        (ModelConfig, {"layers": 0}),
        (ModelConfig, {"layers": 2.0}),
        (RLHFConfig, {"temperature": 0.0}),
        (Config, {"seed": -1}),
    ],
)
def test_values_out_of_range_or_of_another_type_are_refused(section, values):
    with pytest.raises(ValidationError):
        section(**values)
