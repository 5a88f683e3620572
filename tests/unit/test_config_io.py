"""YAML, overrides and messages, on a schema made for the purpose."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from dsmoe_ray.config_io import Config, config_digest, load_config, parse_config, to_yaml
from dsmoe_ray.errors import ConfigError


class Bread(Config):
    kind: Literal["bread"]
    num_slices: PositiveInt
    crust: Literal["thin", "thick"] = "thin"


class Soup(Config):
    kind: Literal["soup"]
    temperature: PositiveFloat = 60.0
    spices: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _is_not_vapour(self) -> Self:
        if self.temperature > 100:
            raise ValueError(f"temperature must be at most 100; got {self.temperature}")
        return self


class Meal(Config):
    name: str
    course: Annotated[Bread | Soup, Field(discriminator="kind")]
    num_guests: PositiveInt | None = None
    hot: bool = False
    window: tuple[float, float] = (0.0, 1.0)


BREAD = {"name": "lunch", "course": {"kind": "bread", "num_slices": 2}}


def explain(values: dict, source: str = "meal.yaml") -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, Meal, source=source)
    return str(caught.value)


def with_course(**course: object) -> dict:
    return {**BREAD, "course": course}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(
            {**BREAD, "num_guest": 3}, "meal.yaml: num_guest: unknown key; did you mean 'num_guests'?", id="nearest"
        ),
        pytest.param(
            {**BREAD, "temperature": 3},
            "meal.yaml: temperature: unknown key; did you mean 'course.temperature'?",
            id="elsewhere",
        ),
        pytest.param(
            {**BREAD, "xyz": 3},
            "meal.yaml: xyz: unknown key; allowed here: course, hot, name, num_guests, window",
            id="no nearest",
        ),
        pytest.param(
            with_course(kind="bread", num_slice=2),
            "meal.yaml: course.num_slice: unknown key; did you mean 'num_slices'?",
            id="a misspelt required key is told once, without the union's tag",
        ),
        pytest.param(
            with_course(kind="bread"),
            "meal.yaml: course.num_slices: required and not given; add it to the file or pass --set "
            "course.num_slices=VALUE",
            id="missing",
        ),
        pytest.param(
            with_course(kind="bred", num_slices=2),
            "meal.yaml: course.kind: must be one of bread, soup; found 'bred'; did you mean 'bread'?",
            id="unknown kind",
        ),
        pytest.param(
            with_course(num_slices=2),
            "meal.yaml: course.kind: required and not given; it is one of bread, soup",
            id="no kind",
        ),
        pytest.param(
            with_course(kind="bread", num_slices=2, crust="thik"),
            "meal.yaml: course.crust: must be one of thin, thick; found 'thik'; did you mean 'thick'?",
            id="choice",
        ),
        pytest.param(
            with_course(kind="bread", num_slices="many"),
            "meal.yaml: course.num_slices: must be a whole number; found 'many'",
            id="type",
        ),
        pytest.param(
            with_course(kind="bread", num_slices=0),
            "meal.yaml: course.num_slices: must be greater than 0; found 0",
            id="range",
        ),
        pytest.param(
            with_course(kind="soup", temperature=101),
            "meal.yaml: course: temperature must be at most 100; got 101.0",
            id="a section's own check",
        ),
        pytest.param(
            with_course(kind="soup", temperature=float("nan")),
            "meal.yaml: course.temperature: must be a finite number; found nan",
            id="not a number",
        ),
        pytest.param(
            with_course(kind="soup", spices=["salt", 3]),
            "meal.yaml: course.spices[1]: must be a text; found 3",
            id="list entry",
        ),
        pytest.param(
            {**BREAD, "course": 7}, "meal.yaml: course: must be a section with keys of its own; found 7", id="section"
        ),
        pytest.param(
            {**BREAD, "num_guests": True},
            "meal.yaml: num_guests must be a number; found True (YAML reads yes, no, on, off so)",
            id="a boolean for a number",
        ),
        pytest.param(
            {**BREAD, "window": [1]},
            "meal.yaml: window[1]: required and not given; the list is too short",
            id="short list",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line_with_the_way_out(values, message):
    assert explain(values) == message


def test_several_mistakes_are_told_together():
    message = explain({"nam": "x", "course": {"kind": "bread", "num_slices": "y"}, "hot": "warm"})
    assert message.splitlines() == [
        "meal.yaml has 3 problems:",
        "  - course.num_slices: must be a whole number; found 'y'",
        "  - hot: must be true or false; found 'warm'",
        "  - nam: unknown key; did you mean 'name'?",
    ]


def test_a_long_wrong_value_is_shortened():
    assert len(explain({**BREAD, "num_guests": "x" * 10_000})) < 200


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "meal.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        pytest.param("- a\n- b\n", "must hold a YAML mapping with sections; found list", id="list"),
        pytest.param("", "must hold a YAML mapping with sections; found NoneType", id="empty"),
        pytest.param("name: [", "is not valid YAML", id="broken"),
        pytest.param("name: a\nhot: true\nname: b\n", "found the key 'name' twice", id="repeated key"),
        pytest.param("name: 2020-13-45\n", "is not valid YAML: month must be in 1..12", id="impossible date"),
        pytest.param("name: !!python/object/apply:os.getcwd []\n", "is not valid YAML", id="python object"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, pattern):
    with pytest.raises(ConfigError, match=re.escape(pattern)):
        load_config(write(tmp_path, text), Meal)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the config file .*absent\.yaml"):
        load_config(tmp_path / "absent.yaml", Meal)


def test_overrides_replace_add_and_open_sections(tmp_path):
    path = write(tmp_path, "name: lunch\n")
    overrides = ["course.kind=soup", "course.temperature=8e1", "course.spices=[salt, pepper]", "hot=yes", "name=x=y"]
    meal = load_config(path, Meal, overrides=overrides)
    assert meal == Meal(name="x=y", course=Soup(kind="soup", temperature=80.0, spices=("salt", "pepper")), hot=True)


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        pytest.param("name", "is not of the form section.key=value", id="no value"),
        pytest.param("a..b=1", "is not of the form section.key=value", id="empty part"),
        pytest.param("name.first=1", "'name' is a value, not a section; it cannot hold 'first'", id="inside a value"),
        pytest.param("name=[", "the value is not valid YAML", id="broken value"),
        pytest.param("name=0x_", "the value is not valid YAML", id="value that Python refuses"),
    ],
)
def test_a_bad_override_is_refused(tmp_path, override, pattern):
    with pytest.raises(ConfigError, match=re.escape(pattern)):
        load_config(write(tmp_path, yaml.safe_dump(BREAD)), Meal, overrides=[override])


meals = st.builds(
    Meal,
    name=st.text(),
    course=st.one_of(
        st.builds(Bread, kind=st.just("bread"), num_slices=st.integers(1, 10**20)),
        st.builds(
            Soup,
            kind=st.just("soup"),
            temperature=st.floats(0, 100, exclude_min=True),
            spices=st.lists(st.text(), max_size=3).map(tuple),
        ),
    ),
    num_guests=st.none() | st.integers(1, 99),
    hot=st.booleans(),
    window=st.tuples(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300)),
)


@given(meal=meals)
def test_yaml_reads_back_what_it_wrote(meal):
    again = parse_config(yaml.safe_load(to_yaml(meal)), Meal, source="again")
    assert again == meal
    assert config_digest(again) == config_digest(meal)


def test_the_digest_sees_every_value_and_no_order():
    one = parse_config(BREAD, Meal, source="one")
    turned = parse_config(dict(reversed(BREAD.items())), Meal, source="turned")
    other = parse_config({**BREAD, "hot": True}, Meal, source="other")
    assert config_digest(one) == config_digest(turned) != config_digest(other)
