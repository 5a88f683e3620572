import pytest
import torch
from torch.nn import functional

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.inference.row_math import ExactMath, FastMath, in_pieces, rotate_exact
from dsmoe_ray.model.rope import Rotate, compute_rotations


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count} threads")
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows out", "rows in"])
@pytest.mark.parametrize("shape", [(128, 512), (512, 96), (270, 24), (3, 8), (130, 70)], ids=str)
def test_a_row_of_a_product_is_the_same_bits_among_any_number_of_rows(shape, transposed, dtype, num_threads):
    weight_NK = randn(*shape, dtype=dtype)
    weight_NK = weight_NK.t().contiguous().t() if transposed else weight_NK
    x_TK = randn(40, shape[1], dtype=dtype, seed=1)
    math = ExactMath()
    whole_TN = math.linear(x_TK, weight_NK)
    # The sums of two kernels over 512 terms of size one differ by rounding, then by that of the result.
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(whole_TN, x_TK @ weight_NK.t(), **close)
    for num_rows in (1, 2, 3, 5, 7, 9, 16, 17, 33):
        for first in (0, 4, 7):
            rows = slice(first, first + num_rows)
            assert torch.equal(math.linear(x_TK[rows], weight_NK), whole_TN[rows])


def test_what_a_library_gives_for_a_row_depends_on_the_number_of_rows():
    """Were it not so, the tiles would be for nothing and the test above could not fail."""
    weight_NK, x_TK = randn(128, 512), randn(16, 512, seed=1)
    whole_TN = FastMath().linear(x_TK, weight_NK)
    if all(torch.equal(FastMath().linear(x_TK[:count], weight_NK), whole_TN[:count]) for count in range(1, 16)):
        pytest.skip("this machine's library gives the same bits for any number of rows")
    assert torch.equal(ExactMath().linear(x_TK[:1], weight_NK), ExactMath().linear(x_TK, weight_NK)[:1])


def test_a_tile_whose_rows_come_out_unlike_is_not_taken(monkeypatch):
    math = ExactMath()
    multiply = torch.Tensor.__matmul__

    def uneven(left, right):
        product = multiply(left, right)
        if left.shape[-2] > 4:
            product[..., -1, :] += 1e-6
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", uneven)
    assert math.find_tile(randn(24, 48)) == 4


def test_weights_that_are_not_numbers_give_no_numbers():
    x_TK, weight_NK = randn(5, 8), randn(6, 8)
    whole_TN = ExactMath().linear(x_TK, weight_NK)
    weight_NK[2] = float("nan")
    found_TN = ExactMath().linear(x_TK, weight_NK)
    assert found_TN[:, 2].isnan().all()
    assert torch.equal(found_TN[:, 3:], whole_TN[:, 3:])


def test_a_machine_whose_products_are_not_numbers_is_told(monkeypatch):
    multiply = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda left, right: multiply(left, right) * float("nan"))
    with pytest.raises(ConfigError, match=r"numerics=exact is not possible: a product of \(24, 48\) torch.float32"):
        ExactMath().find_tile(randn(24, 48))


def test_a_product_of_no_rows_is_empty():
    assert ExactMath().linear(randn(0, 8), randn(3, 8)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("function", [functional.silu, functional.gelu, torch.exp], ids=["silu", "gelu", "exp"])
def test_an_element_is_the_same_bits_wherever_it_stands(function, dtype, num_threads):
    x = randn(3, 33_333, dtype=dtype)
    whole = in_pieces(function, x)
    torch.testing.assert_close(whole, function(x))
    for first, count in ((0, 1), (1, 31), (5, 100), (16_383, 20_000), (33_300, 33)):
        assert torch.equal(in_pieces(function, x[:, first : first + count]), whole[:, first : first + count])


ALONG_A_ROW = {
    "norm": lambda x: functional.rms_norm(x, x.shape[1:], eps=1e-6),
    "softmax": lambda x: x.softmax(dim=-1),
    "sum": lambda x: x.sum(-1),
    "cumulative sum": lambda x: x.cumsum(-1),
}


@pytest.mark.parametrize("width", [6, 24, 100, 1000])
@pytest.mark.parametrize("function", ALONG_A_ROW.values(), ids=ALONG_A_ROW)
def test_sums_along_a_row_are_the_same_bits_among_any_number_of_rows(function, width, num_threads):
    """Nothing of ours makes it so; exact numerics rely on it."""
    x = randn(700, width)
    whole = function(x)
    for first, count in ((0, 1), (3, 2), (5, 17), (100, 333)):
        assert torch.equal(function(x[first : first + count].clone()), whole[first : first + count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_exact_rotation_is_the_models_rotation(dtype):
    x_THd = randn(5, 3, 8, dtype=dtype)
    cos, sin = (angles[:, None] for angles in compute_rotations(5, 8, 10000.0))
    expected = Rotate.apply(x_THd, cos, sin)
    # One rounding more or less.
    torch.testing.assert_close(
        rotate_exact(x_THd, cos, sin), expected, rtol=1e-6 if dtype == torch.float32 else 0.0, atol=1e-6
    )
