"""How much each tenant was given, so that a busy one does not push the others aside.

A virtual token counter (Sheng et al., arXiv:2401.00588): computed tokens divided by the tenant's weight. Who
was given least is next (waiting.py). A tenant that comes back after a pause starts at the level at which
others are served now: nobody saves up turns by staying away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.sequence import Sequence

_MANY = 1024  # accounts kept before those that say nothing any more are dropped


@dataclass(slots=True, eq=False)
class Account:
    tenant: str
    weight: float = 1.0
    served: float = 0.0  # tokens / weight
    num_live: int = 0  # requests waiting or running


class Accounts:
    """The accounts of all tenants. One whose weight is 2 gets twice the tokens of one whose weight is 1."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._by_tenant: dict[str, Account] = {}
        self._level = 0.0  # what the tenant admitted last had been served
        self._many = _MANY

    def __len__(self) -> int:
        return len(self._by_tenant)

    def of(self, tenant: str) -> Account:
        account = self._by_tenant.get(tenant)
        if account is None:
            account = Account(tenant, self._weights.get(tenant, 1.0), self._level)
            self._by_tenant[tenant] = account
        return account

    def enter(self, sequence: Sequence) -> None:
        """One more request of its tenant."""
        account = self.of(sequence.tenant)
        if not account.num_live:
            account.served = max(account.served, self._level)
        account.num_live += 1

    def leave(self, sequence: Sequence) -> None:
        """One request less; what it computed since the last charge is still owed."""
        self.charge(sequence, sequence.num_computed_tokens)
        self.of(sequence.tenant).num_live -= 1
        if len(self._by_tenant) > self._many:
            self._forget_idle()

    def admit(self, sequence: Sequence) -> None:
        """It starts to run: its prompt, less what was cached, is charged at once."""
        account = self.of(sequence.tenant)
        self._level = max(self._level, account.served)
        sequence.num_charged_tokens = max(sequence.num_charged_tokens, sequence.num_computed_tokens)
        self.charge(sequence, sequence.num_tokens)

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """The first `num_tokens` of the sequence are paid for; computing them again is free."""
        if num_tokens > sequence.num_charged_tokens:
            account = self.of(sequence.tenant)
            account.served += (num_tokens - sequence.num_charged_tokens) / account.weight
            sequence.num_charged_tokens = num_tokens

    def _forget_idle(self) -> None:
        """Of those that are idle only the ones that were given most still matter."""
        idle = sorted((one for one in self._by_tenant.values() if not one.num_live), key=_served)
        for account in idle[: len(idle) - _MANY // 2]:
            del self._by_tenant[account.tenant]
        self._many = max(_MANY, 2 * len(self._by_tenant))


def _served(account: Account) -> float:
    return account.served
