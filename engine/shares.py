"""What a tenant may have while others want it too: places among the running, blocks, prompt tokens of a step.

The share of a tenant is its weight among the tenants with live requests. Nobody is held to it while nobody
else is short of something. Over time tenants are evened out by fairness.py; this is about the moment at which
a quiet tenant comes and finds that a busy one has taken everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice, takewhile

from engine.config import ServerConfig
from engine.flight import Flight
from engine.live import LiveSequences
from engine.pacing import Pacing
from engine.preemption import choose_victim
from engine.sequence import Sequence

_CLAIMS = 8  # waiting sequences that may take places of others in one step
_REST = 4  # steps after nobody gave way: looking at all that run takes time
_FEWEST = 16  # prompt tokens of a tenant in a step, however many share it
_SHORT = 1 / 8  # of the target time between tokens: what a tenant above its share may add to a step


class Shares:
    def __init__(self, config: ServerConfig, live: LiveSequences, pacing: Pacing) -> None:
        self._live, self._pacing = live, pacing
        self._max_running = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._can_chunk = config.enable_chunked_prefill
        self._num_rests = 0  # steps in which nobody looks for a place again

    # ------------------------------------------------------------------ who comes first

    def is_held_back(self, tenant: str, num_more: int = 0) -> bool:
        """Whether `tenant` has its share when `num_more` of it run, so that those with less come first."""
        accounts = self._live.accounts
        if accounts.num_active < 2:
            return False
        account = accounts.of(tenant)
        has_places = account.num_running + num_more >= self._num_places(tenant)
        return has_places or account.num_blocks > self._num_blocks(tenant)

    def _num_places(self, tenant: str) -> int:
        """Its share of them, one at least."""
        return max(1, int(self._live.accounts.share_of(tenant) * self._max_running))

    def _num_blocks(self, tenant: str) -> float:
        return self._live.accounts.share_of(tenant) * self._live.kv.pool.num_blocks

    # ------------------------------------------------------------------ places and blocks

    def make_way(self, flight: Flight) -> None:
        """Preempt sequences of tenants above their share for waiting ones of tenants below theirs.

        Never for a less urgent one.
        """
        live = self._live
        if live.accounts.num_active < 2 or not len(live.waiting):
            return
        if self._num_rests > 0:
            self._num_rests -= 1
            return
        claims, num_blocks = Counter[str](), 0
        walk = live.waiting.candidates(self.is_held_back)
        claimants = list(islice(takewhile(lambda one: not self.is_held_back(one.tenant), walk), _CLAIMS))
        walk.close()  # before anyone goes back into the queue
        for claimant in claimants:
            if self.is_held_back(claimant.tenant, claims[claimant.tenant]):
                return
            num_blocks += live.kv.num_needed_from_free(claimant, live.kv.find_prefix(claimant))
            claims[claimant.tenant] += 1
            if not self._free_place(claimant, claims.total(), num_blocks, flight):
                self._num_rests = _REST
                return

    def _free_place(self, claimant: Sequence, num_places: int, num_blocks: int, flight: Flight) -> bool:
        """Preempt until so many places and blocks are free, the last of them for `claimant`; False if nobody
        gives way.
        """
        live = self._live
        num_held = live.accounts.of(claimant.tenant).num_blocks
        while True:
            promised = live.kv.num_promised_blocks(live.running)
            short = num_blocks - live.num_spare_blocks(claimant, promised)
            if len(live.running) + num_places <= self._max_running and short <= 0:
                return True
            if num_held + num_blocks > self._num_blocks(claimant.tenant):
                return False
            others = [
                one for one in live.running if one.priority >= claimant.priority and self._may_lose(one)
            ]
            victim = choose_victim(live.kv, others, max(1, short), spares_returned=True)
            if victim is None:
                return False
            live.preempt(victim, flight, "share")

    def _may_lose(self, sequence: Sequence) -> bool:
        """Whether its tenant keeps its share without it, and it has been worth its last return.

        So places do not go round, and what is computed again is at most as much as was gained.
        """
        if sequence.num_preemptions:
            num_again = sequence.num_tokens_at_preemption - sequence.num_tokens_at_admission
            if sequence.num_tokens - sequence.num_tokens_at_preemption < num_again:
                return False
        tenant = sequence.tenant
        account = self._live.accounts.of(tenant)
        num_kept = account.num_blocks - len(sequence.block_ids)
        return account.num_running > self._num_places(tenant) or num_kept >= self._num_blocks(tenant)

    # ------------------------------------------------------------------ prompt tokens of a step

    def quotas(self, filling: list[Sequence], num_prefill_tokens: int, now: float) -> dict[str, int]:
        """Prompt tokens that tenants may compute in the next step; whoever is not named may compute all.

        Those who want some share the step by weight, and what one does not want is the others'. A tenant
        above its share computes little at once while others are about: the step in which one of these arrives
        is the first part of its waiting, and what is computed beside its prompt is the second.
        """
        live = self._live
        if not self._can_chunk or not live.accounts.are_several(now):
            return {}
        wants = Counter[str]()
        for one in filling:
            wants[one.tenant] += len(one.token_ids) - one.num_computed_tokens
        if len(live.waiting) and len(live.running) < self._max_running:
            for one in self._first_in_queue():  # how much of them is cached would take long to find out
                if one.tried_at != live.kv.pool.num_freed:
                    wants[one.tenant] += one.num_tokens
        little = self._pacing.num_tokens_within(_SHORT if len(wants) < 2 else _SHORT / 2)
        for tenant in wants:
            if self._has_more_than_share(tenant):
                wants[tenant] = min(wants[tenant], little)
        return share_out(num_prefill_tokens, wants, {one: live.accounts.of(one).weight for one in wants})

    def _first_in_queue(self) -> list[Sequence]:
        walk = self._live.waiting.candidates(self.is_held_back)
        first = list(islice(walk, _CLAIMS))
        walk.close()
        return first

    def _has_more_than_share(self, tenant: str) -> bool:
        """Of places or of blocks; of half of them when nobody else has live requests."""
        accounts, num_blocks = self._live.accounts, self._live.kv.pool.num_blocks
        account = accounts.of(tenant)
        share = accounts.share_of(tenant) if accounts.num_active > 1 else 0.5
        return account.num_running > share * self._max_running or account.num_blocks > share * num_blocks


def share_out(total: int, wants: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """What each gets of `total`: no more than it wants, and of what is short as much as its weight says."""
    shares: dict[str, int] = {}
    left, still = float(total), set(wants)
    while still:
        level = left / sum(weights[one] for one in still)
        content = {one for one in still if wants[one] <= level * weights[one]}
        for one in content or still:
            shares[one] = wants[one] if content else max(_FEWEST, int(level * weights[one]))
        if not content:
            break
        left -= sum(wants[one] for one in content)
        still -= content
    return shares
