"""What several texts of one activation agree on, claim by claim."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from conlens_jax.evaluation.claims import FACT, Claim, ClaimReader
from conlens_jax.evaluation.support import Calibration
from conlens_jax.files.paths import local_path
from conlens_jax.files.whole import write_whole
from conlens_jax.inspection.explainer import LensExplainer
from conlens_jax.inspection.texts import Positions, is_one, token_indices, token_lists
from conlens_jax.models.written import before_end


class AgreedClaim(NamedTuple):
    """One claim of the samples or of the greedy text.

    Attributes:
      kind: what is claimed, :attr:`conlens_jax.evaluation.claims.Claim.kind`.
      text: as most of the texts write it; a fact with the name of its variable.
      share: of the samples that state it.
      support: the calibrated probability that it is right, given the share and, if the greedy text
        states it, the decoder's probability. None where it was not measured.
      lift: how many times as often the samples state it as the greedy texts of held-out rows do; a
        claim that is made of every row has 1. None if these were not counted.
      in_greedy: whether the greedy text states it.
      neighbours: offsets from P of the neighbouring positions whose greedy texts state it too: −1,
        1.
    """

    kind: str
    text: str
    share: float
    support: float | None
    lift: float | None
    in_greedy: bool
    neighbours: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class AgreedClaims(Sequence[AgreedClaim]):
    """The claims about one activation, those with the most support first.

    Attributes:
      position: index of the token in its text.
      token: the token, printable.
      samples: the number of sampled texts.
      claims: those that enough of them state, and those of the greedy text.
      warnings: why they should not be believed: what training never had at this position, and what
        the reconstruction of the greedy text does to M.
    """

    position: int
    token: str
    samples: int
    claims: tuple[AgreedClaim, ...]
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.claims)

    def __getitem__(self, index):
        return self.claims[index]

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        claims = [{**c._asdict(), "neighbours": list(c.neighbours)} for c in self.claims]
        return {**dataclasses.asdict(self), "claims": claims, "warnings": list(self.warnings)}

    def to_json(self, path: str | Path | None = None) -> str:
        """:meth:`record` as JSON text, also written to ``path`` if given."""
        text = json.dumps(self.record(), ensure_ascii=False, indent=1) + "\n"
        if path is not None:
            write_whole(local_path(path), text)
        return text


def claims(
    lens: LensExplainer,
    text: Any,
    position: Positions,
    samples: int,
    least_share: float,
    **options: Any,
) -> AgreedClaims | list[AgreedClaims]:
    """See :meth:`~conlens_jax.inspection.lens.Lens.claims`; ``options`` are those of
    :meth:`~conlens_jax.inspection.explainer.LensExplainer.explain`."""
    calibration, tokenizer = lens.calibration, lens.model.tokenizer
    if calibration is None:
        raise ValueError(
            "this lens has no calibration of claims: its run was not evaluated (python -m "
            "conlens_jax.evaluate), or nothing that its texts state can be checked"
        )
    if not 0 <= least_share <= 1:
        raise ValueError(f"least_share must be 0 to 1, not {least_share}")
    (tokens,) = token_lists([text], lens.model, lens.add_bos)
    chosen = token_indices(position, tokens, tokenizer.bos_id, "position")
    explained = {*token_indices("all", tokens, tokenizer.bos_id), *chosen}
    around = {index + offset for index in chosen for offset in (-1, 0, 1)} & explained
    sampled = lens.explain(text, chosen, samples=samples, decoding="sample", **options)
    rows = {row.position: row for row in lens.explain(text, sorted(around), **options)}
    greedy = {place: row.best for place, row in rows.items()}
    written = lambda reading: before_end(reading.tokens, lens.spec.end)
    found = []
    for row in sampled:
        own, places = greedy[row.position], (row.position - 1, row.position + 1)
        agreed = agreed_claims(
            lens.text_claims,
            calibration,
            tokenizer.piece,
            (written(own), own.support),
            [written(reading) for reading in row.readings],
            {p - row.position: written(greedy[p]) for p in places if p in greedy},
            least_share,
        )
        warnings = rows[row.position].warnings_of(own)
        found.append(AgreedClaims(row.position, row.token, samples, agreed, warnings))
    return found[0] if is_one(position) else found


def agreed_claims(
    reader: ClaimReader,
    calibration: Calibration,
    piece: Callable[[int], str],
    greedy: tuple[Sequence[int], Sequence[float | None]],
    samples: Sequence[Sequence[int]],
    neighbours: Mapping[int, Sequence[int]],
    least_share: float,
) -> tuple[AgreedClaim, ...]:
    """The claims of texts of one activation, given without their ends.

    Args:
      piece: the text of a token.
      greedy: the greedy text, and of each of its tokens the support of its claim.
      neighbours: offset from P → the greedy text there.
      least_share: of the samples that must state a claim which the greedy text does not state.
    """
    supports: dict[Key, float | None] = {}
    for claim in reader.of(greedy[0]):
        both = (supports.get(_key(claim)), greedy[1][claim.places[0]])
        # Of a word that is stated twice, the better one.
        supports[_key(claim)] = max((s for s in both if s is not None), default=None)
    written: dict[Key, Counter[str]] = {}
    stated: Counter[Key] = Counter()
    for number, tokens in enumerate([greedy[0], *samples]):
        claims_of = {_key(claim): claim for claim in reader.of(tokens)}
        for key, claim in claims_of.items():
            written.setdefault(key, Counter())[_text(claim, tokens, piece)] += 1
        stated.update(claims_of.keys() if number else ())
    around = {offset: set(map(_key, reader.of(text))) for offset, text in neighbours.items()}
    found = []
    for key, texts in written.items():
        kind, share, in_greedy = key[0], stated[key] / len(samples), key in supports
        if share < least_share and not in_greedy:
            continue
        support, rate = supports.get(key), calibration.rate(*key)
        if support is not None or not in_greedy:
            support = calibration.with_samples(kind, support, share, len(samples))
        text, lift = texts.most_common(1)[0][0], None if rate is None else share / rate
        nearby = tuple(offset for offset, keys in around.items() if key in keys)
        found.append(AgreedClaim(kind, text, share, support, lift, in_greedy, nearby))
    order = lambda claim: (-1.0 if claim.support is None else claim.support, claim.share)
    return tuple(sorted(found, key=order, reverse=True))


Key = tuple[str, Hashable]
"""Kind of a claim, and what it says."""


def _key(claim: Claim) -> Key:
    return claim.kind, claim.says


def _text(claim: Claim, tokens: Sequence[int], piece: Callable[[int], str]) -> str:
    text = "".join(piece(tokens[place]) for place in claim.places).strip()
    return f"{claim.says[0]}: {text}" if claim.kind == FACT else text
