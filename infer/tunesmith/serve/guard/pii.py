"""Personal data by its shape, and by its check digits where it has some. Pure.

All patterns are bounded, and none can match the same text in two ways, so that none takes long.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass

_IBAN_LENGTHS = {
    15: "NO",
    16: "BE",
    18: "DK FO FI GL NL",
    19: "MK SI",
    20: "AT BA EE KZ LT LU XK",
    21: "CH CR HR LI LV",
    22: "BG BH DE GB GE IE ME RS VA",
    23: "AE GI IL TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "PT",
    26: "IS TR",
    27: "BI DJ FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HU LB PL",
    29: "BR EG PS QA UA",
    30: "JO KW MU",
    31: "MT SC",
}
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"


@dataclass(frozen=True)
class Kind:
    """How one kind of personal data looks."""

    pattern: str
    is_real: Callable[[str], bool] = lambda _: True
    """Whether what the pattern found is one."""

    needs: str = ""
    """A character without which there can be none, to pass over most texts at once."""


def passes_luhn(text: str) -> bool:
    """The checksum of card numbers."""
    digits = [int(one) for one in reversed(text) if one.isdecimal()]
    doubled = [sum(divmod(2 * one, 10)) for one in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def passes_mod_97(text: str) -> bool:
    """The checksum of IBANs."""
    packed = text.replace(" ", "").upper()
    return int("".join(str(int(one, 36)) for one in packed[4:] + packed[:4])) % 97 == 1


def _is_address(text: str) -> bool:
    """IPv6 with two groups and a digit at least: `::` and `a::b` are more often code."""
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return sum(map(bool, text.split(":"))) >= 2 and any(map(str.isdecimal, text))


def _is_phone(text: str) -> bool:
    return 7 <= sum(one.isdecimal() for one in text) <= 15


def _iban() -> str:
    countries = "|".join(
        f"(?:{names.replace(' ', '|')})[0-9]{{2}}(?: ?[A-Z0-9]){{{length - 4}}}"
        for length, names in _IBAN_LENGTHS.items()
    )
    return rf"(?i)(?<![A-Z0-9])(?:{countries})(?![A-Z0-9])"


KINDS: dict[str, tuple[Kind, ...]] = {
    "email": (
        Kind(
            r"[A-Za-z0-9._%+'-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?!\w)",
            needs="@",
        ),
    ),
    "phone": (
        Kind(r"(?<![\w+])\+[0-9](?:[ .()/-]{0,2}[0-9]){6,14}(?!\w)", _is_phone, needs="+"),
        Kind(
            r"(?<![\w.+-])(?:\([0-9]{2,5}\) ?[0-9]{3,4}[-. ]?[0-9]{3,6}"
            r"|0[0-9]{1,4}[ /-][0-9]{3,4}(?:[ -]?[0-9]{2,4}){0,2}"
            r"|[0-9]{3}[-. ][0-9]{3}[-. ][0-9]{4})(?!\w)",
            _is_phone,
        ),
    ),
    "card": (
        Kind(
            r"(?<![0-9])(?:[2-6][0-9]{12,18}"
            r"|[2-6][0-9]{3}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{1,4}(?:\1[0-9]{1,3})?"
            r"|3[0-9]{3}([ -])[0-9]{6}\2[0-9]{4,5})(?![0-9])",
            passes_luhn,
        ),
    ),
    "iban": (Kind(_iban(), passes_mod_97),),
    "ip": (
        Kind(rf"(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?!\w|\.[0-9])", needs="."),
        Kind(
            r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}(?:[0-9A-Fa-f]{1,4}|[0-9.]{7,15})?(?![\w:])",
            _is_address,
            needs=":",
        ),
    ),
}
"""What `serve.guardrails[].pii` names."""
