"""One step of the scheduler at a time: who computes what, who waits, who holds which blocks."""

import pytest

from dsmoe_ray.errors import EngineFullError, RequestError
from dsmoe_ray.inference.sequence import SequenceStatus
from tests.fakes.scheduled_run import DENSE, SPARSE, ScheduledRun

# ScheduledRun: blocks of 4 positions, 4 sequences at once, 12 tokens a step.


def tokens(num, start=100):
    return list(range(start, start + num))


def test_a_prompt_is_computed_whole_and_then_token_by_token():
    run = ScheduledRun(num_blocks=8)
    sequence = run.add(tokens(5), max_tokens=3)
    assert [run.step() for _ in range(4)] == [{0: 5}, {0: 1}, {0: 1}, {}]
    assert sequence.is_finished


def test_an_idle_scheduler_returns_an_empty_step_again_and_again():
    run = ScheduledRun(num_blocks=8)
    assert run.step() == {} and run.step() == {}


def test_requests_join_and_leave_at_any_step():
    run = ScheduledRun(num_blocks=16)
    run.add(tokens(3), max_tokens=2)
    assert run.step() == {0: 3}
    run.add(tokens(4, start=200), max_tokens=2)
    assert run.step() == {0: 1, 1: 4}
    assert run.step() == {1: 1}
    run.drain()


def test_decodes_go_first_and_a_long_prompt_gets_the_rest_of_every_step():
    run = ScheduledRun(num_blocks=32)
    run.add(tokens(2), max_tokens=20)
    run.step()
    run.add(tokens(30, start=200), max_tokens=2)
    run.add(tokens(2, start=300), max_tokens=2)
    assert run.step() == {0: 1, 1: 11}
    assert run.step() == {0: 1, 1: 11}
    # The rest of the long prompt leaves room for the short one behind it.
    assert run.step() == {0: 1, 1: 8, 2: 2}


def test_decodes_stand_before_the_prompt_of_an_earlier_sequence():
    run = ScheduledRun(num_blocks=32, max_batched_tokens=8)
    run.add(tokens(20), max_tokens=2)
    run.step()
    run.step()
    run.add(tokens(1, start=200), max_tokens=20)
    assert run.step() == {0: 4, 1: 1}
    run.add(tokens(30, start=300), max_tokens=2)
    assert list(run.step().items()) == [(0, 1), (1, 1), (2, 6)]


def test_a_full_house_still_leaves_a_block_of_every_step_to_a_prompt():
    run = ScheduledRun(num_blocks=64, max_num_seqs=3, max_batched_tokens=7)
    for idx in (1, 2):
        run.add(tokens(2, start=100 * idx), max_tokens=20)
        run.step()
    run.add(tokens(12, start=900), max_tokens=2)
    assert [run.step()[2] for _ in range(3)] == [5, 5, 2]


def test_no_more_sequences_run_than_allowed_and_the_next_comes_when_one_leaves():
    run = ScheduledRun(num_blocks=32, max_num_seqs=2)
    for idx in range(3):
        run.add(tokens(2, start=100 * idx), max_tokens=2)
    assert run.step() == {0: 2, 1: 2}
    assert run.scheduler.num_waiting == 1
    assert run.step() == {0: 1, 1: 1}
    assert run.step() == {2: 2}


def test_a_prompt_that_began_like_an_earlier_one_is_computed_from_where_they_part():
    run = ScheduledRun(num_blocks=32)
    run.add(tokens(9), max_tokens=1)
    run.step()
    later = run.add([*tokens(8), 7, 7], max_tokens=2)
    assert run.step() == {1: 2}
    assert later.num_prefix_hit_tokens == run.scheduler.num_prefix_hit_tokens == 8


def test_at_least_one_token_of_a_known_prompt_is_computed():
    run = ScheduledRun(num_blocks=32)
    for _ in range(2):
        sequence = run.add(tokens(8), max_tokens=1)
        run.step()
    assert sequence.num_prefix_hit_tokens == 4


def test_a_conversation_goes_on_from_its_generated_tokens():
    run = ScheduledRun(num_blocks=32)
    first = run.add(tokens(6), max_tokens=8)
    run.drain()
    second = run.add([*first.token_ids, 1, 2], max_tokens=2)
    run.step()
    # Of 13 tokens the last was not computed; 12 fill three blocks.
    assert (len(first.token_ids), second.num_prefix_hit_tokens) == (13, 12)


def test_other_routing_rules_share_nothing():
    run = ScheduledRun(num_blocks=32)
    run.add(tokens(9), max_tokens=1, rules=DENSE)
    run.step()
    sequence = run.add(tokens(9), max_tokens=1, rules=SPARSE)
    assert run.step() == {1: 9}
    assert sequence.num_prefix_hit_tokens == 0


def test_without_a_prefix_cache_everything_is_computed():
    run = ScheduledRun(num_blocks=32, prefix_cache=False)
    for _ in range(2):
        run.add(tokens(9), max_tokens=1)
        run.step()
    assert run.scheduler.num_prefix_hit_tokens == run.scheduler.num_cached_blocks == 0


def test_samples_of_one_request_share_their_prompt_in_its_very_step():
    run = ScheduledRun(num_blocks=32)
    first, second, third = run.add(tokens(9), n=3, max_tokens=3)
    assert run.step() == {0: 9, 1: 1, 2: 1}
    assert first.block_table[:2] == second.block_table[:2] == third.block_table[:2]
    assert run.scheduler.num_free_blocks == 32 - 2 - 3
    run.drain()


def test_samples_of_a_long_prompt_share_it_when_its_last_chunk_is_computed():
    run = ScheduledRun(num_blocks=32)
    run.add(tokens(22), n=2, max_tokens=2)
    assert [run.step() for _ in range(2)] == [{0: 12}, {0: 10, 1: 2}]


def test_samples_without_a_prefix_cache_compute_their_prompts_separately():
    run = ScheduledRun(num_blocks=32, prefix_cache=False)
    run.add(tokens(5), n=2, max_tokens=2)
    assert run.step() == {0: 5, 1: 5}


def test_logits_of_a_whole_prompt_come_once_each_and_are_not_skipped_by_a_known_beginning():
    run = ScheduledRun(num_blocks=32)
    run.add(tokens(17), max_tokens=1)
    run.drain()
    sequence = run.add(tokens(17), max_tokens=2, wants_prompt_logits=True)
    assert run.step() == {1: 12}
    assert run.logits_seen[1] == list(range(12))
    run.drain()
    assert run.logits_seen[1] == list(range(18)) and sequence.num_prefix_hit_tokens == 0


def test_a_prompt_whose_logits_are_out_need_not_give_them_again_after_a_preemption():
    run = ScheduledRun(num_blocks=5)
    run.add(tokens(4), max_tokens=13)
    run.step()
    echo = run.add(tokens(7, start=200), max_tokens=8, wants_prompt_logits=True)
    run.drain()
    assert echo.num_preemptions == 1
    assert run.logits_seen[1] == list(range(14))


def test_the_latest_gives_its_blocks_back_when_memory_is_full_and_goes_to_the_front():
    run = ScheduledRun(num_blocks=4)
    early = run.add(tokens(4), max_tokens=12)
    late = run.add(tokens(4, start=200), max_tokens=8)
    last = run.add(tokens(4, start=300), max_tokens=4)
    run.step_until_preempted()
    assert early.status is SequenceStatus.RUNNING
    assert late.status is last.status is SequenceStatus.WAITING
    assert late.num_computed == len(late.block_table) == 0 and len(late.token_ids) > 4
    run.drain()
    assert [s.num_preemptions for s in (early, late, last)] == [0, 1, 0]
    assert run.first_admissions == [early, late, last]


def test_a_preempted_sequence_has_the_tokens_of_one_that_had_the_memory_to_itself():
    crowded, roomy = ScheduledRun(num_blocks=4), ScheduledRun(num_blocks=64)
    for run in (crowded, roomy):
        run.add(tokens(4), max_tokens=12)
        run.add(tokens(4, start=200), max_tokens=8)
        run.drain()
    assert crowded.scheduler.num_preemptions > 0 and roomy.scheduler.num_preemptions == 0
    assert [s.token_ids for s in crowded.sequences] == [s.token_ids for s in roomy.sequences]


def test_a_preempted_sequence_finds_what_is_left_of_its_blocks():
    run = ScheduledRun(num_blocks=5)
    run.add(tokens(4), max_tokens=9)
    late = run.add(tokens(8, start=200), max_tokens=10)
    run.step_until_preempted()
    hits = run.scheduler.num_prefix_hit_tokens
    run.drain()
    assert run.scheduler.num_prefix_hit_tokens > hits and late.num_prefix_hit_tokens == 0


def test_nobody_is_admitted_into_memory_that_running_prompts_still_need():
    run = ScheduledRun(num_blocks=8)
    run.add(tokens(25), max_tokens=5)
    run.add(tokens(4, start=200), max_tokens=2)
    assert [run.step() for _ in range(2)] == [{0: 12}, {0: 12}]
    # 7 blocks for the prompt and one to grow into leave none.
    assert run.step() == {0: 1}
    run.drain()
    assert run.scheduler.num_preemptions == 0


def test_a_request_that_can_never_fit_is_refused_with_what_fits():
    run = ScheduledRun(num_blocks=4)
    run.add(tokens(10), max_tokens=7)
    with pytest.raises(
        RequestError, match=r"of 10 tokens with 18 .* 17 positions; .* holds 16, in 4 blocks of 4\. Lower max_tokens"
    ) as info:
        run.add(tokens(10), max_tokens=8)
    assert info.value.param == "max_tokens"
    run.drain()


def test_a_prompt_of_which_only_the_logits_are_wanted_may_fill_the_whole_cache():
    run = ScheduledRun(num_blocks=4)
    echo = run.add(tokens(16), max_tokens=0, wants_prompt_logits=True)
    run.drain()
    assert run.logits_seen[0] == list(range(16)) and echo.token_ids == tokens(16)
    with pytest.raises(RequestError, match="needs keys and values of 17 positions"):
        run.add(tokens(17), max_tokens=0)


def test_a_full_queue_refuses_all_samples_of_a_request_and_takes_them_later():
    run = ScheduledRun(num_blocks=32, max_waiting=3, max_num_seqs=1, max_batched_tokens=8)
    run.add(tokens(2), n=2, max_tokens=1)
    with pytest.raises(EngineFullError, match="2 sequences wait, 2 came and 3 are allowed"):
        run.add(tokens(2), n=2)
    assert run.scheduler.num_waiting == 2
    run.step()
    run.add(tokens(2), n=2, max_tokens=1)
    run.drain()


def test_more_samples_than_can_ever_wait_are_no_reason_to_try_again():
    run = ScheduledRun(num_blocks=32, max_waiting=3)
    with pytest.raises(RequestError, match="4 samples was found; at most 3") as info:
        run.add(tokens(2), n=4)
    assert info.value.param == "n"


def test_a_cancelled_sequence_is_in_no_later_step_and_leaves_nothing():
    run = ScheduledRun(num_blocks=8, max_num_seqs=1, max_batched_tokens=8)
    run.add(tokens(5), max_tokens=9)
    run.add(tokens(5), max_tokens=9)
    run.step()
    assert run.scheduler.cancel(0) and run.scheduler.cancel(1)
    assert run.scheduler.num_free_blocks == 8 and run.scheduler.num_waiting == 0
    assert run.step() == {}
    assert not run.scheduler.cancel(0) and not run.scheduler.cancel("nobody")


def test_a_sequence_cancelled_in_flight_takes_no_token_and_others_go_on():
    run = ScheduledRun(num_blocks=8)
    gone = run.add(tokens(5), max_tokens=3)
    run.add(tokens(5, start=200), max_tokens=3)
    run.step(cancel=[0])
    assert len(gone.token_ids) == 5
    assert run.step() == {1: 1}
    run.drain()


def test_blocks_of_a_failed_step_are_found_by_nobody():
    run = ScheduledRun(num_blocks=8)
    sequence = run.add(tokens(9), max_tokens=2)
    run.step(fails=True)
    assert run.scheduler.num_cached_blocks == 0 and run.scheduler.num_free_blocks == 8
    assert sequence.status is SequenceStatus.WAITING
    assert run.step() == {0: 9}
    run.drain()


def test_a_failed_step_takes_back_what_a_sibling_shared_in_it():
    run = ScheduledRun(num_blocks=16)
    run.add(tokens(9), n=2, max_tokens=2)
    run.step(fails=True)
    assert run.scheduler.num_prefix_hit_tokens == 0
    assert run.step() == {0: 9, 1: 1}
    run.drain()


def test_a_failed_step_leaves_earlier_work_alone():
    run = ScheduledRun(num_blocks=16)
    run.add(tokens(20), max_tokens=2)
    run.step()
    run.step(fails=True)
    assert run.scheduler.num_cached_blocks == 3
    assert run.step() == {0: 8}
    run.drain()


def test_a_sequence_cancelled_while_its_step_fails_leaves_nothing():
    run = ScheduledRun(num_blocks=8)
    run.add(tokens(9), max_tokens=2)
    run.step(fails=True, cancel=[0])
    assert run.scheduler.num_cached_blocks == 0 and run.scheduler.num_free_blocks == 8
    assert run.step() == {}
