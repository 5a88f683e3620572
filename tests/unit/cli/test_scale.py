import pytest

from dsmoe_ray.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--pin", "3/17"], "--pin '3/17' is not of the form"),
        (["--pin", "3-17=2"], "names no expert"),
        (["--unpin", "17"], "names no expert"),
        (["--address", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
    ],
    ids=["no-count", "no-expert", "no-layer", "no-cluster"],
)
def test_mistakes_are_told_before_anything_is_asked(arguments, told, capsys):
    with pytest.raises(SystemExit) as left:
        main(["scale", *arguments])
    assert left.value.code == 2
    assert told in capsys.readouterr().err
