"""Tiktoken rank files: each token in base64, and its rank, the order in which it was learned."""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from qwen_jax.text.tokenizer import backends


def read(path: Path) -> dict[bytes, int]:
    """The rank of each token. Raises `ValueError` for a file that is damaged or not whole."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}:{number}: {line!r} is not a base64 token and a rank"
            ) from None
    if len(set(ranks.values())) != len(ranks):
        raise ValueError(f"{path}: two tokens share one rank")
    known = {backends.bytes_to_token(token) for token in ranks}
    missing = [char for char in backends.byte_alphabet() if char not in known]
    if missing:  # every rank file begins with them
        raise ValueError(
            f"{path}: {len(missing)} of the 256 byte tokens are missing, the first is "
            f"{missing[0]!r}; this is not a whole rank file"
        )
    return ranks


def merges(ranks: Mapping[bytes, int], *, name: str) -> list[tuple[str, str]]:
    """Recover the merge that made each token of a tiktoken rank file.

    Encoding a token with only the tokens of lower rank leaves exactly the two parts that were
    merged into it, for a merge is learned after its parts. Most tokens have only one split into two
    tokens of lower rank, which then needs no encoding. Raises `ValueError` where there is none.
    """
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        cuts = [
            (token[:i], token[i:])
            for i in range(1, len(token))
            if ranks.get(token[:i], rank) < rank and ranks.get(token[i:], rank) < rank
        ]
        parts = cuts[0] if len(cuts) == 1 else _encode_below(token, rank=rank, ranks=ranks)
        if len(parts) != 2:
            raise ValueError(no_merge(name, token, rank))
        left, right = map(backends.bytes_to_token, parts)
        found.append((left, right))
    return found


def no_merge(name: str, token: bytes, rank: int) -> str:
    """Error text for a token that no merge of two others makes."""
    return (
        f"{name}: token {token!r} of rank {rank} is not made of two tokens of lower rank; the file "
        "is damaged, or not the ranks of a byte-pair encoding"
    )


def _encode_below(token: bytes, *, rank: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Merge the bytes of `token`, lowest rank first, by tokens whose rank is below `rank`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, best_rank = -1, rank
        for i in range(len(parts) - 1):
            pair_rank = ranks.get(parts[i] + parts[i + 1], rank)
            if pair_rank < best_rank:
                best, best_rank = i, pair_rank
        if best < 0:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts
