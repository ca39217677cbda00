"""Who holds what, against a model that searches."""

from __future__ import annotations

import random

from cluster.hands import Hands
from cluster.processor import Unit


def test_few_units_spread_over_all_and_each_worker_holds_at_most_so_many():
    hands = Hands(in_flight=2)
    for worker in (1, 2, 3):
        hands.add(worker)
        hands.start(worker, "n")
    order = []
    for number in range(6):
        worker = hands.free()
        assert worker is not None
        hands.give(worker, Unit(str(number)), 0.0, alone=False)
        order.append(worker)
    assert order == [1, 2, 3, 1, 2, 3]
    assert hands.free() is None
    hands.take(2, "1")
    assert hands.free() == 2
    assert hands.idle() is None


def test_a_worker_with_a_unit_for_itself_alone_gets_no_other():
    hands = Hands(in_flight=3)
    hands.add(1)
    assert hands.free() is None, "it is starting"
    hands.start(1, "n")
    hands.give(1, Unit("a"), 0.0, alone=True)
    assert hands.free() is None
    assert hands.straggler(9.0) is None
    hands.take(1, "a")
    assert hands.idle() == 1


def test_the_oldest_unit_in_one_workers_hands_is_the_straggler():
    hands = Hands(in_flight=3)
    for worker in (1, 2):
        hands.add(worker)
        hands.start(worker, "n")
    hands.give(1, Unit("a"), 1.0, alone=False)
    hands.give(1, Unit("b"), 2.0, alone=False)
    assert hands.straggler(1.0) is None
    assert hands.straggler(3.0) == Unit("a")
    hands.give(2, Unit("a"), 3.0, alone=False)
    assert hands.straggler(4.0) == Unit("b")
    assert hands.remove(2) == [], "the other one still has it"
    assert hands.straggler(4.0) == Unit("a"), "again in one worker's hands"
    hands.done("a")
    assert hands.straggler(4.0) == Unit("b")
    assert [given.unit.name for given in hands.remove(1)] == ["b"]
    assert len(hands) == hands.num_busy == hands.num_ready == hands.num_staying == 0


def test_the_counts_are_those_of_a_search():
    """Random steps; after each the sums are what counting finds."""
    rng, hands, in_flight = random.Random(0), Hands(3), 3
    held: dict[int, dict[str, bool]] = {}
    state, done, clock, names = dict[int, str](), set[str](), 0.0, 0
    for _ in range(4000):
        clock += 1.0
        worker = rng.choice([*state, len(state) + clock * 1000]) if state else 1000
        worker = int(worker)
        if worker not in state:
            hands.add(worker)
            state[worker], held[worker] = "starting", {}
        elif state[worker] == "starting":
            hands.start(worker, f"n{worker % 3}")
            state[worker] = "ready"
        elif rng.random() < 0.1:
            hands.remove(worker)
            del state[worker], held[worker]
        elif rng.random() < 0.05 and state[worker] == "ready":
            hands.leave(worker)
            state[worker] = "leaving"
        elif held[worker] and rng.random() < 0.5:
            name = rng.choice(list(held[worker]))
            given = hands.take(worker, name)
            assert given is not None
            assert given.unit.name == name
            del held[worker][name]
            if rng.random() < 0.7:
                hands.done(name)
                done.add(name)
        elif state[worker] == "ready" and len(held[worker]) < in_flight and not any(held[worker].values()):
            names += 1
            alone = not held[worker] and rng.random() < 0.2
            hands.give(worker, Unit(str(names)), clock, alone=alone)
            held[worker][str(names)] = alone
        open_ = [w for w, s in state.items() if s == "ready" and len(held[w]) < in_flight and not any(held[w].values())]
        assert hands.num_ready == sum(s == "ready" for s in state.values())
        assert hands.num_staying == sum(s != "leaving" for s in state.values())
        assert hands.num_busy == sum(bool(h) for h in held.values())
        assert len(hands) == len({name for h in held.values() for name in h} - done)
        free = hands.free()
        assert (free in open_) if open_ else (free is None)
        if free is not None:
            assert len(held[free]) == min(len(held[w]) for w in open_)
        shared = [name for h in held.values() for name, alone in h.items() if not alone and name not in done]
        straggler = hands.straggler(float("inf"))
        assert (straggler.name if straggler else None) == min(shared, key=int, default=None)
