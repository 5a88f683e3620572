"""Masks as sets of pairs, and grouped heads against single ones."""

import pytest
import torch

from dsmoe_ray.model.attention import GqaAttention, attend, build_document_mask
from dsmoe_ray.model.config import GqaConfig
from tests.numerics.references import EXACT, causal_attention, exact_context, randn, rotate_by_definition


def test_tokens_see_earlier_tokens_of_their_own_document_only():
    document_ids_BS = torch.tensor([[0, 0, 1, 1, 0], [5, 5, 5, 5, 5]])
    mask = build_document_mask(document_ids_BS)
    assert mask.shape == (2, 1, 5, 5)
    for sequence, ids in enumerate(document_ids_BS.tolist()):
        for row in range(5):
            for column in range(5):
                assert mask[sequence, 0, row, column] == (column <= row and ids[row] == ids[column])


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (3, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal-kernel", "explicit-mask"])
def test_each_query_head_attends_with_the_kv_head_of_its_group(num_heads, num_kv_heads, masked):
    q, k, v = randn(2, 5, num_heads, 4), randn(2, 5, num_kv_heads, 4, seed=1), randn(2, 5, num_kv_heads, 4, seed=2)
    mask = torch.ones(5, 5).tril().bool() if masked else None
    found = attend(q, k, v, mask)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        expected = causal_attention(q[:, :, head], k[:, :, kv_head], v[:, :, kv_head])
        torch.testing.assert_close(found[:, :, head], expected, **EXACT)


def test_grouped_query_attention_is_its_heads_one_by_one():
    config = GqaConfig(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=4)
    attention = GqaAttention(config, d_model=6).double()
    with torch.no_grad():
        for index, parameter in enumerate(attention.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=index))
    x_BSD = randn(2, 5, 6, seed=9)
    expected = torch.zeros_like(x_BSD)
    for head in range(4):
        mine, shared = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
        q, k = (
            rotate_by_definition(x_BSD @ weight.T, 10000.0) for weight in (attention.wq[mine], attention.wk[shared])
        )
        expected += causal_attention(q, k, x_BSD @ attention.wv[shared].T) @ attention.wo[mine]
    torch.testing.assert_close(attention(x_BSD, exact_context(5, 4)), expected, **EXACT)
