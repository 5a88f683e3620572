"""The requests that a router has taken on: by gateway, by deadline, and how much is left of them."""

from dsmoe_ray.serving.taken_requests import TakenRequest, TakenRequests


class Gateway:
    name = "g"


def take(requests, gateway, wire_id, *, deadline_s=10.0, num_tokens=5):
    taken = TakenRequest(gateway, wire_id, deadline_s=deadline_s, num_unfinished=1, num_outstanding_tokens=num_tokens)
    requests.add(taken)
    return taken


def test_requests_are_found_by_their_gateways_name_for_them():
    requests, first, second = TakenRequests(), Gateway(), Gateway()
    of_first, of_second = take(requests, first, "a"), take(requests, second, "a")
    assert (requests.find(first, "a"), requests.find(second, "a"), requests.find(first, "b")) == (
        of_first,
        of_second,
        None,
    )
    requests.remove(of_first)
    assert (requests.list_of(first), requests.list_of(second), list(requests)) == ([], [of_second], [of_second])


def test_outstanding_tokens_are_those_of_all_that_have_not_ended():
    requests, gateway = TakenRequests(), Gateway()
    one, _ = take(requests, gateway, "a", num_tokens=2), take(requests, gateway, "b", num_tokens=7)
    for _ in range(3):
        requests.note_token(one)
    assert requests.num_outstanding_tokens == 7
    requests.remove(one)
    assert requests.num_outstanding_tokens == 7


def test_expired_requests_come_in_order_and_once_and_those_that_ended_do_not():
    requests, gateway = TakenRequests(), Gateway()
    late, early, ended = (
        take(requests, gateway, name, deadline_s=deadline_s)
        for name, deadline_s in (("late", 9.0), ("early", 5.0), ("ended", 6.0))
    )
    requests.remove(ended)
    assert requests.next_deadline_s == 5.0
    assert requests.pop_expired(4.9) == []
    assert requests.pop_expired(9.0) == [early, late]
    assert requests.pop_expired(99.0) == [] and requests.next_deadline_s is None


def test_deadlines_of_requests_that_ended_long_before_are_not_kept():
    requests, gateway = TakenRequests(), Gateway()
    for number in range(1000):
        requests.remove(take(requests, gateway, str(number), deadline_s=600.0))
    assert len(requests._deadlines) < 200
