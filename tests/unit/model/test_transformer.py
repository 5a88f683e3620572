"""What the whole model promises whatever its layers: losses, checkpointing, documents, positions, types."""

import pytest
import torch
from torch.nn import functional

from dsmoe_ray.model.config import ModelConfig, RoutingConfig
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.layer_routing import LayerRouting, deployed_routing
from dsmoe_ray.model.losses import IGNORED_TARGET
from dsmoe_ray.model.transformer import Transformer

VOCAB, MAX_SEQ_LEN = 40, 24
ATTENTIONS = {
    "moa": {"kind": "moa", "num_experts": 3, "num_kv_heads": 2, "head_dim": 8},
    "gqa": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
}
FFNS = {
    "moe": {"kind": "moe", "num_experts": 4, "d_ff": 12, "activation": "swiglu"},
    "dense": {"kind": "dense", "d_ff": 24, "activation": "gelu"},
}
KINDS = pytest.mark.parametrize(
    ("attention", "ffn"), [("moa", "moe"), ("gqa", "moe"), ("moa", "dense"), ("gqa", "dense")]
)
SPARSE = LayerRouting(RoutingConfig(mode="top_k", top_k=2), RoutingConfig(mode="top_k", top_k=1))
# Float64 sums over a few thousand terms in another order.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def make_model(attention="moa", ffn="moe", *, dtype=torch.float64, seed=0, options=None, **values):
    config = ModelConfig.model_validate(
        {
            "vocab_size": VOCAB,
            "d_model": 16,
            "num_layers": 2,
            "max_seq_len": MAX_SEQ_LEN,
            "attention": ATTENTIONS[attention],
            "ffn": FFNS[ffn],
            # Large, so that outputs are of size one and every path carries signal.
            "init_std": 0.4,
        }
        | values
    )
    model = Transformer(config, compute_dtype=dtype, **(options or {}))
    initialize(model, config, seed=seed)
    return model.double() if dtype == torch.float64 else model


def make_tokens(batch=2, length=12, *, seed=0):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def training_gradients(model, *, routing=None):
    tokens_BS, targets_BS = make_tokens(), make_tokens(seed=1)
    output = model(tokens_BS, targets_BS=targets_BS, routing=routing)
    # Router losses reach back through the routings, so these must survive recomputation too.
    router_terms = [
        routing.router_logits_TE.square().sum() for routing in output.attention_routings + output.ffn_routings
    ]
    loss = output.loss_sum + 0.1 * sum(router_terms)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@KINDS
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("routing", [None, [SPARSE, SPARSE]], ids=["dense", "sparse"])
def test_recomputing_activations_changes_no_bit(attention, ffn, mode, routing):
    loss, gradients = training_gradients(make_model(attention, ffn), routing=routing)
    model = make_model(attention, ffn, options={"activation_checkpointing": mode})
    found_loss, found = training_gradients(model, routing=routing)
    assert torch.equal(found_loss, loss)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_keeps_less_memory_for_the_backward_pass(mode):
    kept = {}
    for name in ("none", mode):
        model, sizes = make_model(options={"activation_checkpointing": name}), []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(make_tokens(), targets_BS=make_tokens(seed=1))
        kept[name] = sum(sizes)
    assert kept[mode] < 0.8 * kept["none"]


@KINDS
@pytest.mark.parametrize("tie_embeddings", [False, True], ids=["untied", "tied"])
def test_the_loss_is_the_cross_entropy_of_the_logits(attention, ffn, tie_embeddings):
    model = make_model(attention, ffn, tie_embeddings=tie_embeddings)
    tokens_BS, targets_BS = make_tokens(), make_tokens(seed=1)
    targets_BS[0, :3] = IGNORED_TARGET
    found = model(tokens_BS, targets_BS=targets_BS)
    logits_BSV = model(tokens_BS).logits_BSV
    assert found.logits_BSV is None and logits_BSV.shape == (2, 12, VOCAB)
    expected = functional.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="sum")
    torch.testing.assert_close(found.loss_sum, expected, **EXACT)
    names = [name for name, _ in model.named_parameters()]
    assert ("head.weight" in names) != tie_embeddings
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (found.loss_sum, expected))
    for name, one, two in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(one, two, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_a_tied_embedding_gets_the_gradients_of_both_its_uses():
    tied, untied = make_model(tie_embeddings=True), make_model()
    with torch.no_grad():
        untied.head.weight.copy_(untied.embedding.weight)
    for model in (tied, untied):
        model(make_tokens(), targets_BS=make_tokens(seed=1)).loss_sum.backward()
    both = untied.embedding.weight.grad + untied.head.weight.grad
    torch.testing.assert_close(tied.embedding.weight.grad, both, **EXACT)


@KINDS
def test_no_token_sees_a_later_one(attention, ffn):
    model = make_model(attention, ffn)
    tokens_BS = make_tokens()
    changed_BS = tokens_BS.clone()
    changed_BS[:, 7] = (changed_BS[:, 7] + 1) % VOCAB
    one, two = (model(tokens).logits_BSV for tokens in (tokens_BS, changed_BS))
    torch.testing.assert_close(one[:, :7], two[:, :7], **EXACT)
    assert all((one[:, position] - two[:, position]).abs().max() > 1e-3 for position in range(7, 12))


@KINDS
def test_a_document_is_unaffected_by_the_one_before_it(attention, ffn):
    model = make_model(attention, ffn)
    document_ids_BS = torch.tensor([[0] * 5 + [1] * 7])
    first, other = make_tokens(1), make_tokens(1, seed=9)
    replaced_BS = torch.cat([other[:, :5], first[:, 5:]], dim=1)
    one, two = (model(tokens, document_ids_BS=document_ids_BS).logits_BSV for tokens in (first, replaced_BS))
    torch.testing.assert_close(one[:, 5:], two[:, 5:], **EXACT)
    # Rotations only know distances, so the second document is as if it stood alone.
    alone = model(first[:, 5:]).logits_BSV
    # The angles' float32 cosines make rotations differ by 1e-7 between absolute positions.
    torch.testing.assert_close(one[:, 5:], alone, rtol=0, atol=1e-5)
    without = model(first).logits_BSV
    assert (without[:, 5:] - one[:, 5:]).abs().max() > 1e-2


def test_positions_given_are_positions_used():
    model = make_model()
    tokens_BS = make_tokens()
    implied = model(tokens_BS).logits_BSV
    counted = model(tokens_BS, positions_BS=torch.arange(12).expand(2, 12)).logits_BSV
    assert torch.equal(implied, counted)
    shifted = model(tokens_BS, positions_BS=torch.arange(12).expand(2, 12) + 9).logits_BSV
    torch.testing.assert_close(shifted, implied, rtol=0, atol=1e-5)
    stretched = model(tokens_BS, positions_BS=2 * torch.arange(12).expand(2, 12)).logits_BSV
    assert (stretched - implied).abs().max() > 1e-2


def test_the_last_logits_alone_are_the_last_of_all():
    model = make_model()
    last = model(make_tokens(), last_logits_only=True).logits_BSV
    assert last.shape == (2, 1, VOCAB)
    torch.testing.assert_close(last, model(make_tokens()).logits_BSV[:, -1:], **EXACT)


def test_positions_beyond_the_longest_sequence_are_refused():
    assert make_model()(make_tokens(1, 24)).logits_BSV.shape == (1, 24, VOCAB)
    with pytest.raises(ValueError, match="25 positions exceed max_seq_len=24"):
        make_model()(make_tokens(1, 25))


@KINDS
@pytest.mark.parametrize("routing", [None, [SPARSE, SPARSE]], ids=["dense", "sparse"])
def test_bfloat16_compute_agrees_loosely_with_float32(attention, ffn, routing):
    """The residual stream keeps eight bits, 4e-3 of a value, and every value passes some ten roundings, which partly
    cancel: logits are off by 8e-3 of their deviation. Parameters, gradients, logits, loss and routing are float32."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(attention, ffn, dtype=dtype, init_std=0.2)
        logits_BSV = model(make_tokens(), routing=routing).logits_BSV
        output = model(make_tokens(), targets_BS=make_tokens(seed=1), routing=routing)
        output.loss_sum.backward()
        assert logits_BSV.dtype == output.loss_sum.dtype == torch.float32
        for decision in output.attention_routings + output.ffn_routings:
            assert decision.gates_TE.dtype == decision.router_logits_TE.dtype == torch.float32
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        assert gradients.dtype == torch.float32
        results.append((logits_BSV, output.loss_sum / 24, gradients))
    (exact_logits, exact_loss, exact_gradients), (logits, loss, gradients) = results
    assert (logits - exact_logits).std() < 0.02 * exact_logits.std()
    # Errors of logits have both signs, so the mean over 24 tokens is off by far less than each.
    assert abs(loss - exact_loss) < 0.003 * exact_loss
    # A relative error of 1e-2 in random directions leaves a cosine of 1 - 5e-5.
    assert functional.cosine_similarity(gradients, exact_gradients, dim=0) > 0.9995


def test_each_layer_follows_its_own_rule_and_reports_it():
    model = make_model()
    rules = [
        LayerRouting(RoutingConfig(), RoutingConfig(mode="top_k", top_k=1)),
        LayerRouting(RoutingConfig(mode="top_k", top_k=2), RoutingConfig()),
    ]
    output = model(make_tokens(), routing=rules)
    counts = [
        [None if routing.selected_TE is None else routing.selected_TE.sum(-1).unique().tolist() for routing in routings]
        for routings in (output.attention_routings, output.ffn_routings)
    ]
    assert counts == [[None, [2]], [[1], None]]
    with pytest.raises(ValueError):
        model(make_tokens(), routing=rules[:1])


def test_deployed_routing_is_what_the_config_says():
    rule = {"mode": "top_k", "top_k": 2}
    model = make_model(ffn="moe", attention="gqa")
    assert deployed_routing(model.config) == [LayerRouting()] * 2
    config = ModelConfig.model_validate(
        model.config.model_dump() | {"ffn": FFNS["moe"] | {"router": {"inference": rule}}}
    )
    assert deployed_routing(config) == [LayerRouting(RoutingConfig(), RoutingConfig(mode="top_k", top_k=2))] * 2


def test_logits_of_the_last_position_alone_do_not_go_with_targets():
    tokens_BS = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="give only one"):
        make_model()(tokens_BS, targets_BS=tokens_BS, last_logits_only=True)
