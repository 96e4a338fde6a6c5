"""Names that occur again."""

from mhex_core.bulk.names import repeated


def test_repeated_strings_are_found_by_their_hashes():
    assert repeated(iter(["a", "b", "a", "c", "b", "a"])) == {hash("a"), hash("b")}
    assert repeated(iter([])) == set()
