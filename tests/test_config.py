"""The sections themselves: closed, frozen, of plain values."""

import pytest
from pydantic import ValidationError

from minilm.config import Config, ModelConfig, OptimizerConfig, PretrainConfig, RLHFConfig, Section


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
        (RLHFConfig, {"ptx_coef": -0.1}),
        (RLHFConfig, {"ptx_clip": 1.5}),
        (RLHFConfig, {"ptx_coef": 0.05, "ptx_rows": 3, "accumulation": 2}),
        (Config, {"seed": -1}),
    ],
)
def test_values_out_of_range_or_of_another_type_are_refused(section, values):
    with pytest.raises(ValidationError):
        section(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_start": 2}, "belong together"),
        ({"batch_warmup_steps": 10}, "belong together"),
        ({"batch_start": 3, "batch_warmup_steps": 10}, r"batch_size \(16\) must be batch_start"),
        ({"batch_start": 16, "batch_warmup_steps": 10}, "times 2, 4, 8"),
        ({"batch_start": 32, "batch_warmup_steps": 10}, "times 2, 4, 8"),
        ({"batch_start": 2, "batch_warmup_steps": 2}, "at least 3"),
        ({"batch_start": 2, "batch_warmup_steps": 100}, r"below steps \(100\)"),
        ({"batch_start": 2, "batch_warmup_steps": 9, "accumulation": 4}, "multiple of accumulat"),
    ],
)
def test_a_batch_that_cannot_grow_so_is_refused(values, message):
    PretrainConfig(batch_size=16, steps=100, batch_start=4, batch_warmup_steps=2, accumulation=4)
    with pytest.raises(ValidationError, match=message):
        PretrainConfig(**{"batch_size": 16, "steps": 100} | values)
