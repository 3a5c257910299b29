"""Ranking and choosing by made-up KLs: what must hold whatever was measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptq.errors import RecipeError
from ckptq.sections import BuiltinCalibration
from ckptq.sensitivity import Asked, Counted, Point, Sensitivity
from ckptq.sensitivity.choose import (
    Kl,
    by_cost_of_a_byte,
    doubling,
    exchanges,
    factor,
    left,
    next_lengths,
    rank,
    smallest,
    worst_first,
)
from ckptq.sensitivity.cost import Work, fit, parse_duration

costs = st.floats(0, 10, allow_subnormal=False)
KLS = st.lists(costs, min_size=2, max_size=130)


def search(kls: Sequence[float], limit: float, width: int, estimates: Sequence[float]) -> tuple[dict[int, float], int]:
    """(all that was measured, how many passes it took); kls [n] is the KL where n units stay."""
    known, passes = {0: kls[0], len(kls) - 1: kls[-1]}, 0
    while more := next_lengths(known, estimates, limit, width):
        assert len(more) <= width
        assert not known.keys() & {*more}, "nothing is measured twice"
        known |= {n: kls[n] for n in more}
        passes += 1
    return known, passes


@given(KLS, costs, st.integers(1, 6), st.randoms())
def test_the_search_ends_where_one_unit_less_does_not_do(kls: list[float], limit: float, width: int, chance: object) -> None:
    """Whatever the KLs are, monotone or not, and however wrong the estimates."""
    kls[-1] = min(kls[-1], limit)
    estimates = [chance.random() for _ in kls]  # type: ignore[attr-defined]
    known, _ = search(kls, limit, width, estimates)
    found = smallest(known, limit)
    assert found is not None
    assert kls[found] <= limit
    assert found == 0 or kls[found - 1] > limit
    assert found == 0 or found - 1 in known


@given(KLS, costs, st.integers(1, 6))
def test_of_falling_kls_it_is_the_smallest_and_it_is_quick(kls: list[float], limit: float, width: int) -> None:
    kls = sorted(kls, reverse=True)
    kls[-1] = min(kls[-1], limit)
    known, passes = search(kls, limit, width, [0.0] * len(kls))
    assert smallest(known, limit) == next(n for n, kl in enumerate(kls) if kl <= limit)
    assert passes <= math.ceil(math.log2(len(kls)))


@given(st.lists(st.floats(0.1, 10), min_size=60, max_size=130), st.floats(0, 1), st.integers(3, 6), st.floats(0.01, 100))
def test_estimates_that_are_right_but_for_their_scale_take_one_pass(
    single: list[float], share: float, width: int, scale: float
) -> None:
    """Two where rounding puts a KL that equals the limit on the other side."""
    kls = [*reversed([sum(single[:n]) for n in range(len(single) + 1)])]
    known, passes = search(kls, share * kls[0], width, [kl * scale for kl in kls])
    assert smallest(known, share * kls[0]) is not None
    assert passes <= 2


def test_where_all_meet_it_or_none_does_nothing_is_measured() -> None:
    assert next_lengths({0: 0.1, 9: 0.0}, [0.0] * 10, 0.2, 4) == ()
    assert next_lengths({0: 0.5, 9: 0.3}, [0.0] * 10, 0.2, 4) == ()
    assert smallest({0: 0.5, 9: 0.3}, 0.2) is None
    assert next_lengths({0: math.nan, 1: math.nan, 2: 0.1}, [0.0] * 3, 0.2, 4) == (), "NaN never meets a limit"


# --- ranking ---


@given(st.dictionaries(st.text(max_size=4), st.tuples(costs, costs, costs, st.booleans()), min_size=1))
def test_every_unit_has_one_place(units: dict[str, tuple[float, float, float, bool]]) -> None:
    local = {name: error for name, (error, _, _, _) in units.items()}
    exact = {name: Kl(kl, max(0.0, kl - half), kl + half) for name, (_, kl, half, measured) in units.items() if measured}
    found = rank(local, exact, 1.0)
    assert sorted(unit.name for unit in found) == sorted(units)
    assert [unit.exact is not None for unit in found] == [True] * len(exact) + [False] * (len(units) - len(exact))
    means = [unit.kl for unit in found if unit.exact]
    assert means == sorted(means, reverse=True)
    errors = [unit.local for unit in found if not unit.exact]
    assert errors == sorted(errors, reverse=True)
    for place, unit in enumerate(found, 1):
        first, last = unit.places
        assert 1 <= first <= place <= last <= len(found)
    for one in found:
        for other in found:
            if one.exact and other.exact and one.places[1] < other.places[0]:
                assert not one.exact.overlaps(other.exact), "places that are apart are of intervals that are"


def test_units_whose_intervals_overlap_share_their_places() -> None:
    exact = {"a": Kl(5, 4, 6), "b": Kl(3, 2, 4.5), "c": Kl(1, 0.5, 1.5), "d": Kl(0.9, 0.4, 1.2)}
    found = rank(dict.fromkeys("abcde", 1.0), exact, 9)
    assert [unit.places for unit in found] == [(1, 2), (1, 2), (3, 4), (3, 4), (5, 5)]
    alone = rank({"a": 1.0, "b": 2.0}, {"a": Kl(1), "b": Kl(2)}, 9)
    assert [(unit.name, unit.places) for unit in alone] == [("b", (1, 1)), ("a", (2, 2))], "one sample has no interval"


def test_estimates_are_the_square_of_the_error_by_the_median_of_what_was_measured() -> None:
    local = {"a": 0.4, "b": 0.2, "c": 0.1, "d": 0.05, "e": 0.0}
    exact = {"a": Kl(0.16 * 2), "b": Kl(0.04 * 3), "c": Kl(0.01 * 50), "e": Kl(0.0)}
    assert factor(local, exact, 1) == pytest.approx(3)
    assert rank(local, exact, 1)[-1].kl == pytest.approx(3 * 0.05**2)
    assert factor({"a": 0.3, "b": 0.4}, {}, 1.0) == pytest.approx(4), "without any, they add up to the KL of all"
    assert factor({"a": 0.0}, {}, 1.0) == 0
    assert worst_first({"b": 1.0, "a": 1.0, "c": 2.0}) == ["c", "a", "b"]


@given(st.dictionaries(st.text(max_size=3), st.tuples(costs, st.integers(-10, 10**9)), min_size=1))
def test_what_costs_most_a_byte_is_kept_first(units: dict[str, tuple[float, int]]) -> None:
    kl, saved = ({name: pair[i] for name, pair in units.items()} for i in range(2))
    order = by_cost_of_a_byte(kl, saved)  # type: ignore[arg-type]
    assert sorted(order) == sorted(units)
    rates = [kl[name] / max(saved[name], 1) for name in order]
    assert rates == sorted(rates, reverse=True)
    sums = left(order, kl)
    assert len(sums) == len(order) + 1
    assert sums[-1] == 0
    assert all(a >= b for a, b in itertools.pairwise(sums))
    assert sums[0] == pytest.approx(sum(kl.values()))


@given(st.integers(0, 5000))
def test_the_curve_keeps_none_and_doubles_and_never_keeps_all(count: int) -> None:
    found = doubling(count)
    assert found == sorted({*found})
    assert all(0 <= n < count for n in found)
    assert not found or found[-1] * 2 >= count - 1
    assert found[:2] == [0, 1][: min(count, 2)]


@given(st.dictionaries(st.text(max_size=3), st.tuples(st.floats(0.01, 10), st.integers(1, 1000)), max_size=9), st.floats(0, 1))
def test_the_file_is_at_most_one_unit_larger_than_the_smallest(units: dict[str, tuple[float, int]], share: float) -> None:
    """Against all sets there are, if KLs add up."""
    kl, saved = {name: pair[0] for name, pair in units.items()}, {name: pair[1] for name, pair in units.items()}
    order, limit = by_cost_of_a_byte(kl, saved), share * sum(kl.values())
    kept = smallest(dict(enumerate(left(order, kl))), limit)
    assert kept is not None
    sets = (some for n in range(len(order) + 1) for some in itertools.combinations(order, n))
    good = (some for some in sets if sum(kl[name] for name in kl if name not in some) <= limit + 1e-9)
    best = min(sum(saved[name] for name in some) for some in good)
    assert sum(saved[name] for name in order[:kept]) <= best + (saved[order[kept - 1]] if kept else 0)


@given(st.dictionaries(st.text(max_size=3), st.tuples(costs, st.integers(-5, 1000)), min_size=1), costs, st.data())
def test_exchanges_are_smaller_and_good_if_kls_add_up(
    units: dict[str, tuple[float, int]], limit: float, data: st.DataObject
) -> None:
    kl, saved = {name: pair[0] for name, pair in units.items()}, {name: pair[1] for name, pair in units.items()}
    order = by_cost_of_a_byte(kl, saved)
    kept = data.draw(st.integers(1, len(order)))
    sums = left(order, kl)
    found = exchanges(order, kept, (sums[kept - 1], sums[kept]), kl, saved, limit)
    size = sum(saved[name] for name in order[:kept])
    sizes = [sum(saved[name] for name in names) for names in found]
    assert sizes == sorted(sizes)
    assert all(other < size for other in sizes)
    for names in found:
        assert len({*names}) == len(names) >= kept - 1
        assert sum(kl[name] for name in kl if name not in names) <= limit + 1e-9


def test_an_exchange_by_hand() -> None:
    """What is left without d's 3 is 1 too much; e is enough and smaller, f is too little, b is not needed beside d."""
    kl = {"a": 9.0, "b": 1.0, "d": 3.0, "e": 1.5, "f": 0.5}
    saved = {"a": 1, "b": 2, "d": 10, "e": 6, "f": 4}
    found = exchanges(["a", "b", "d", "e", "f"], 3, (5, 2), kl, saved, 4)
    assert found == [("a", "b", "e"), ("a", "d")]


def test_the_smallest_file_that_meets_the_limit_is_chosen() -> None:
    """Not the fewest units, and not the lowest KL."""
    curve = (
        Point((), Kl(0.5), 100),
        Point(("a",), Kl(0.2), 180),
        Point(("b", "c"), Kl(0.19), 150),
        Point(("a", "b"), Kl(0.1), 210),
    )

    def found(**asked: Any) -> Sensitivity:
        job = Asked("r", "c", BuiltinCalibration(source="builtin"), **asked)
        return Sensitivity(job, cast(Counted, None), (), Kl(0.5), None, curve, (), (), ())

    assert found(limit=0.2).chosen == curve[2]
    assert (found(limit=0.05).chosen, found(limit=0.05).exit_code) == (None, 1)
    assert (found(keep=1).chosen, found(keep=1).exit_code) == (curve[1], 0)
    assert (found().chosen, found().exit_code) == (None, 0)


# --- what it takes ---


def test_work_by_hand() -> None:
    """Four layers with two units each, and a head that costs a quarter of the layers."""
    work = Work(layers=4, units=8, head=0.25)
    assert work.local == 1 + 8 / 4
    assert work.branches([0]) == 1 + 1 + 2 * 0.25, "the reference and the branch, and the logits of both"
    assert work.branches([3, 1]) == 1 + 1 / 4 + 3 / 4 + 3 * 0.25
    assert work.branches([]) == 0
    waves = Work(layers=4, units=8, head=0.25, nbytes=100, waiting=30, memory=80, samples=3)
    assert [waves.reads(branches) for branches in (0, 1, 2, 6, 99)] == [100, 100, 200, 300, 300], "one sample at least"


@given(st.lists(st.floats(0.01, 2), max_size=30), st.lists(st.floats(0.01, 2), max_size=8), st.floats(0, 80))
def test_what_fits_is_as_much_as_fits(exact: list[float], curve: list[float], room: float) -> None:
    """The curve comes before more exact KLs: it is what one decides by."""
    units, points = fit(room, exact, curve)
    spent = sum(exact[:units]) + sum(curve[:points])
    assert spent <= room + 1e-9 or (units, points) == (0, 0)
    assert units == 0 or points == len(curve)
    if units < len(exact) and points == len(curve):
        assert sum(exact[: units + 1]) + sum(curve) > room - 1e-9
    if points < len(curve):
        assert sum(curve[: points + 1]) > room - 1e-9


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), (" 2 m ", 120), ("0.5 H", 1800)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration("--budget", text) == seconds


@pytest.mark.parametrize("text", ["", "10", "-5m", "0m", "m", "1d", "10 minutes", "nan", "1e3s", "infs"])
def test_no_durations(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^--budget: expected a time such as 90s, 10m or 1.5h, found"):
        parse_duration("--budget", text)
