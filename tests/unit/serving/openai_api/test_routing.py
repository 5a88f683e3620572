import pytest

from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.serving.openai_api.errors import ApiError


@pytest.mark.parametrize(
    ("wish", "spec"),
    [
        ({"k": 1}, "top_k=1"),
        ({"threshold": 1.25}, "threshold=1.25"),
        ({"threshold_top_k": 1}, "threshold_top_k=1"),
        ({"top_p": 0.5}, "top_p=0.5"),
        ({"per_layer_k": [1, 3]}, "per_layer_top_k=1,3"),
        ({"dense": True}, "dense"),
        ({"attention": {"dense": True}, "ffn": {"k": 1}}, "attention:dense/ffn:top_k=1"),
        ({"ffn": "top_k=3"}, "ffn:top_k=3"),
        ("top_k=3", "top_k=3"),
    ],
    ids=str,
)
def test_a_wish_is_what_the_command_line_would_make_of_it(model, wish, spec):
    assert model.routing.read(wish) == tuple(resolve_routing(spec, model.config))


def test_equal_wishes_are_one_object(model):
    assert model.routing.read({"k": 3}) is model.routing.read("top_k=3")
    assert model.routing.read(None) is model.routing.read("deployed") is None


@pytest.mark.parametrize(
    "wish",
    [
        *({}, [], 3, True, "fast", "x" * 5000, {"k": 1, "top_p": 0.5}, {"k": "1"}, {"k": 10**30}, {"k": 0}, {"k": 9}),
        *(
            {"dense": False},
            {"per_layer_k": []},
            {"per_layer_k": [1]},
            {"ffn": {}},
            {"ffn": 3},
            {"top_p": float("nan")},
        ),
        *({"k": True}, {"attention": {"k": 1}, "k": 1}, {"ffn": "top_k=1/attention:dense/ffn:dense"}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_routing_is_refused(model, wish):
    with pytest.raises(ApiError) as caught:
        model.routing.read(wish)
    assert caught.value.param == "routing"
