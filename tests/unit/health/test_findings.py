"""How findings are told."""

from afd_scale.health.findings import Finding, as_json, is_wrong, located, size_words, table

FINDINGS = [
    Finding("disks", "out", "1 GiB free", "wrong", "make room"),
    Finding("names", "own name", "a is 10.0.0.1"),
    Finding("disks", "cache", "none", "absent"),
]


def test_a_table_has_topics_together_and_what_to_do() -> None:
    assert table(FINDINGS).splitlines() == [
        "disks",
        "  wrong   out       1 GiB free",
        "          -> make room",
        "  absent  cache     none",
        "",
        "names",
        "  ok      own name  a is 10.0.0.1",
        "",
        "1 wrong, 0 warnings, 1 absent, 1 ok",
    ]


def test_json_has_all_and_says_whether_it_is_fit() -> None:
    found = as_json(FINDINGS)
    assert found["fit"] is False
    assert found["counts"] == {"ok": 1, "absent": 1, "warning": 0, "wrong": 1}
    assert found["findings"][0] == {
        "topic": "disks", "what": "out", "value": "1 GiB free", "state": "wrong", "remedy": "make room", "where": "",
    }  # fmt: skip
    assert as_json([])["fit"] is True


def test_warnings_and_what_is_absent_are_not_wrong() -> None:
    assert is_wrong(FINDINGS)
    assert not is_wrong([*FINDINGS[1:], Finding("names", "x", "y", "warning", "z")])


def test_a_place_is_kept() -> None:
    first, second = located([Finding("a", "b", "c"), Finding("a", "b", "c", where="rank 1")], "node-0")
    assert (first.where, second.where) == ("node-0", "rank 1")
    assert "node-0" in table([first])


def test_sizes() -> None:
    assert (size_words(3 * 2**29), size_words(5 * 2**20)) == ("1.5 GiB", "5 MiB")
