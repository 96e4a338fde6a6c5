"""Argument checks shared by the data modules."""


def check_int(argument: str, value: object, *, minimum: int) -> int:
    """Return ``value`` if it is an integer of at least ``minimum``.

    Args:
        argument: Name of the argument, for the message.
        value: What the caller passed.
        minimum: Smallest value allowed.

    Raises:
        TypeError: ``value`` is no integer (a bool is none either).
        ValueError: ``value`` is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected an integer of at least {minimum}, got {value!r}")
    if value < minimum:
        raise ValueError(f"{argument}: expected an integer of at least {minimum}, got {value}")
    return value
