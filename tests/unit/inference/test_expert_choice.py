import pytest
import torch

from dsmoe_ray.inference.expert_choice import TokenRules, choose, tabulate
from dsmoe_ray.model.config import RoutingConfig
from dsmoe_ray.model.router import select

SPECS = ["dense", "top_k=1", "top_k=3", "top_k=6", "threshold=0.9", "threshold=2.5", "top_p=0.6", "threshold_top_k=1.2"]
RULES = [RoutingConfig.parse(spec) for spec in SPECS]
NUM_EXPERTS = 6


def random_probs(num_tokens=24):
    probs_TE = torch.randn(num_tokens, NUM_EXPERTS, generator=torch.Generator().manual_seed(0)).mul(1.5).softmax(-1)
    # Ties go to the lower expert id.
    probs_TE[3] = 1 / NUM_EXPERTS
    probs_TE[4, 1] = probs_TE[4, 4]
    return probs_TE


def token_rules(rules, rule_idxs_T):
    shape, numbers = tabulate(rules, NUM_EXPERTS)
    return TokenRules(shape, *(torch.from_numpy(column)[rule_idxs_T] for column in numbers))


def choose_all(rules, rule_idxs_T, probs_TE, *, renormalize=False, exact=False):
    return choose(probs_TE, token_rules(rules, rule_idxs_T), renormalize=renormalize, gate_scale=2.0, exact=exact)


def gates_of(assignment):
    """Spread an assignment over all experts again."""
    ids_TK, gates_TK = assignment.expert_ids_TK.long(), assignment.gates_TK
    assert (gates_TK[ids_TK < 0] == 0.0).all()
    gates_TE = torch.zeros(len(ids_TK), NUM_EXPERTS + 1)
    gates_TE.scatter_(1, ids_TK.masked_fill(ids_TK < 0, NUM_EXPERTS), gates_TK)
    return gates_TE[:, :NUM_EXPERTS]


@pytest.mark.parametrize("renormalize", [False, True], ids=["raw", "renormalized"])
@pytest.mark.parametrize("rule", RULES, ids=SPECS)
def test_one_rule_for_all_tokens_gives_the_routers_gates(rule, renormalize):
    probs_TE = random_probs()
    expected_TE, selected_TE = select(probs_TE, rule, renormalize=renormalize)
    choice = choose_all([rule], torch.zeros(24, dtype=torch.long), probs_TE, renormalize=renormalize)
    torch.testing.assert_close(choice.all_gates(), 2.0 * expected_TE)
    for shrink in (False, True):
        assignment = choice.assignment(shrink=shrink)
        torch.testing.assert_close(gates_of(assignment), 2.0 * expected_TE)
        assert assignment.all_experts == (selected_TE is None)
    if selected_TE is not None:
        assert (assignment.expert_ids_TK >= 0).sum(1).equal(selected_TE.sum(1))


@pytest.mark.parametrize("renormalize", [False, True], ids=["raw", "renormalized"])
def test_each_token_of_a_mixed_batch_gets_its_own_rule(renormalize):
    probs_TE = random_probs()
    rule_idxs_T = torch.arange(24) % len(RULES)
    choice = choose_all(RULES, rule_idxs_T, probs_TE, renormalize=renormalize)
    expected_TE = torch.zeros_like(probs_TE)
    for index, rule in enumerate(RULES):
        mine = rule_idxs_T == index
        expected_TE[mine] = 2.0 * select(probs_TE[mine], rule, renormalize=renormalize)[0]
    torch.testing.assert_close(choice.all_gates(), expected_TE)
    torch.testing.assert_close(gates_of(choice.assignment(shrink=True)), expected_TE)


@pytest.mark.parametrize("renormalize", [False, True], ids=["raw", "renormalized"])
@pytest.mark.parametrize("index", range(len(RULES)), ids=SPECS)
def test_exact_gates_of_a_token_are_the_same_bits_alone_and_in_a_mixed_batch(index, renormalize):
    probs_TE = random_probs()
    rule_idxs_T = torch.arange(24) % len(RULES)
    mixed = choose_all(RULES, rule_idxs_T, probs_TE, renormalize=renormalize, exact=True)
    for token in torch.nonzero(rule_idxs_T == index).flatten().tolist():
        probs_1E = probs_TE[token : token + 1]
        alone = choose_all(
            RULES[index : index + 1], torch.zeros(1, dtype=torch.long), probs_1E, renormalize=renormalize, exact=True
        )
        assert torch.equal(alone.all_gates()[0], mixed.all_gates()[token])
        assert torch.equal(gates_of(alone.assignment(shrink=True))[0], gates_of(mixed.assignment(shrink=True))[token])


def test_threshold_top_k_takes_the_mean_of_its_own_rules_tokens_or_of_the_token_itself_if_exact():
    probs_TE = torch.tensor([[0.9, 0.02, 0.02, 0.02, 0.02, 0.02], [0.18, 0.18, 0.18, 0.18, 0.18, 0.1]])
    rule = RoutingConfig.parse("threshold_top_k=1.0")
    assert choose_all([rule], torch.tensor([0, 0]), probs_TE).num_kept_T.tolist() == [3, 3]
    assert choose_all([rule], torch.tensor([0, 0]), probs_TE, exact=True).num_kept_T.tolist() == [1, 5]
    other = RoutingConfig.parse("threshold_top_k=0.9")
    assert choose_all([rule, other], torch.tensor([0, 1]), probs_TE).num_kept_T.tolist() == [1, 5]


def test_threshold_top_k_keeps_one_expert_of_a_token_that_none_passes():
    probs_TE = torch.full((2, NUM_EXPERTS), 1 / NUM_EXPERTS)
    rule = RoutingConfig.parse("threshold_top_k=3.0")
    for exact in (False, True):
        assert choose_all([rule], torch.tensor([0, 0]), probs_TE, exact=exact).num_kept_T.tolist() == [1, 1]


def test_a_threshold_may_leave_a_token_without_experts():
    probs_TE = torch.full((2, NUM_EXPERTS), 1 / NUM_EXPERTS)
    choice = choose_all([RoutingConfig.parse("threshold=3.0")], torch.tensor([0, 0]), probs_TE, renormalize=True)
    assignment = choice.assignment(shrink=True)
    assert (assignment.expert_ids_TK == -1).all() and (choice.all_gates() == 0.0).all()


def test_rules_that_keep_a_fixed_number_need_no_numbers_of_tokens():
    assert tabulate(RULES[:1], NUM_EXPERTS)[0].uniform
    assert tabulate([RULES[1], RULES[1]], NUM_EXPERTS)[0].uniform
    assert tabulate([RULES[0], RULES[3]], NUM_EXPERTS)[0].uniform
    assert not tabulate([RULES[1], RULES[2]], NUM_EXPERTS)[0].uniform
    assert not tabulate([RULES[4]], NUM_EXPERTS)[0].uniform
