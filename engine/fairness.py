"""How much each tenant was given, so that a busy one does not push the others aside.

A virtual token counter (Sheng et al., arXiv:2401.00588): computed tokens divided by the tenant's weight. Who
was given least is next (waiting.py). A tenant that comes back after a pause starts at the level at which
others are served now: nobody saves up turns by staying away. What tenants hold and compute at one moment,
and who gives way to whom, is in shares.py.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine.errors import EngineError
from engine.sequence import Sequence

_MOMENT = 10.0  # seconds after an arrival in which a tenant counts as being about
_MANY = 1024  # accounts kept before those that say nothing any more are dropped


@dataclass(slots=True, eq=False)
class Account:
    tenant: str
    weight: float = 1.0
    served: float = 0.0  # tokens / weight
    num_live: int = 0  # requests waiting or running
    num_running: int = 0
    num_blocks: int = 0  # that these hold; a shared one counts for each


class Accounts:
    """The accounts of all tenants. One whose weight is 2 gets twice the tokens of one whose weight is 1."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._by_tenant: dict[str, Account] = {}
        self._level = 0.0  # what the tenant admitted last had been served
        self._active: set[str] = set()  # tenants with live requests
        self._active_weight = 0.0  # of them together
        self._arrivals: OrderedDict[str, float] = OrderedDict()  # tenant -> its last one; the oldest first
        self._many = _MANY

    def __len__(self) -> int:
        return len(self._by_tenant)

    @property
    def num_active(self) -> int:
        """Tenants with a live request."""
        return len(self._active)

    def share_of(self, tenant: str) -> float:
        """What `tenant` may have of anything while all active tenants want it, 0.0 to 1.0."""
        return min(1.0, self.of(tenant).weight / self._active_weight) if self._active else 1.0

    def of(self, tenant: str) -> Account:
        account = self._by_tenant.get(tenant)
        if account is None:
            account = Account(tenant, self._weights.get(tenant, 1.0), self._level)
            self._by_tenant[tenant] = account
        return account

    def are_several(self, now: float) -> bool:
        """Whether more than one tenant is about: with live requests, or with one a moment ago."""
        while self._arrivals and now - next(iter(self._arrivals.values())) > _MOMENT:
            self._arrivals.popitem(last=False)
        return len(self._active) > 1 or any(one not in self._active for one in self._arrivals)

    def enter(self, sequence: Sequence) -> None:
        """One more request of its tenant."""
        account = self.of(sequence.tenant)
        self._arrivals[sequence.tenant] = sequence.arrival
        self._arrivals.move_to_end(sequence.tenant)
        if not account.num_live:
            account.served = max(account.served, self._level)
            self._active.add(sequence.tenant)
            self._active_weight += account.weight
        account.num_live += 1

    def leave(self, sequence: Sequence) -> None:
        """One request less; what it computed since the last charge is still owed."""
        self.charge(sequence, sequence.num_computed_tokens)
        account = self.of(sequence.tenant)
        account.num_live -= 1
        if not account.num_live:
            self._active.discard(sequence.tenant)
            self._active_weight = self._active_weight - account.weight if self._active else 0.0
        if len(self._by_tenant) > self._many:
            self._forget_idle()

    def admit(self, sequence: Sequence) -> None:
        """It starts to run: its prompt, less what was cached, is charged at once."""
        account = self.of(sequence.tenant)
        account.num_running += 1
        account.num_blocks += len(sequence.block_ids)
        self._level = max(self._level, account.served)
        sequence.num_charged_tokens = max(sequence.num_charged_tokens, sequence.num_computed_tokens)
        self.charge(sequence, sequence.num_tokens)

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """A decode got one more block; its first `num_tokens` tokens are paid for."""
        account = self.of(sequence.tenant)
        account.num_blocks += 1
        num_new = num_tokens - sequence.num_charged_tokens
        if num_new > 0:
            account.served += num_new / account.weight
            sequence.num_charged_tokens = num_tokens

    def stop(self, sequence: Sequence) -> None:
        """It is about to lose its blocks: it ends or is preempted."""
        account = self.of(sequence.tenant)
        account.num_running -= 1
        account.num_blocks -= len(sequence.block_ids)

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """The first `num_tokens` of the sequence are paid for; computing them again is free."""
        if num_tokens > sequence.num_charged_tokens:
            account = self.of(sequence.tenant)
            account.served += (num_tokens - sequence.num_charged_tokens) / account.weight
            sequence.num_charged_tokens = num_tokens

    def recount(self, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> None:
        """Raise EngineError unless every account counts its requests."""
        running = list(running)
        runs = Counter(one.tenant for one in running)
        blocks: Counter[str] = Counter()
        for one in running:
            blocks[one.tenant] += len(one.block_ids)
        lives = runs + Counter(one.tenant for one in waiting)
        for account in self._by_tenant.values():
            booked = account.num_running, account.num_live, account.num_blocks
            true = runs[account.tenant], lives[account.tenant], blocks[account.tenant]
            if booked != true:
                raise EngineError(
                    f"tenant {account.tenant!r} runs, has and holds {true}, the books say {booked}"
                )
        if self._active != set(lives):
            raise EngineError("the active tenants are not those with live requests")

    def _forget_idle(self) -> None:
        """Of those that are idle only the ones that were given most still matter."""
        idle = sorted((one for one in self._by_tenant.values() if not one.num_live), key=_served)
        for account in idle[: len(idle) - _MANY // 2]:
            del self._by_tenant[account.tenant]
        self._many = max(_MANY, 2 * len(self._by_tenant))


def _served(account: Account) -> float:
    return account.served
