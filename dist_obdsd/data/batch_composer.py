"""Choosing the groups of every step, so that no class stands twice in a step while that can be avoided.

A step takes the earliest groups of each lane whose classes it does not hold yet. Where a lane has none, an augmenting
path (the classic algorithm for bipartite matching) exchanges classes between lanes; only if there is none a class
repeats. At the end, each repetition is exchanged with a group of a near step that takes it without one. Letters as in
``schedule``.
"""

from collections import Counter, deque
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush

NEAR = 64  # steps before and after, in which a place for a repeated class is looked for


@dataclass(frozen=True)
class Group:
    """K images of one class in one lane."""

    window: int
    time: float
    label: int
    ids: tuple[int, ...]
    oldest: int
    """The earliest window that an image of the group is from: ``window`` or the one before."""
    instead_of: "Group | None" = None
    """The planned group whose place this one has, in class-uniform sampling."""


class Lane:
    """The groups of a lane that are still to be taken: one queue per class, and a heap of the queues' first times."""

    def __init__(self, groups: list[Group], rooms: dict[tuple[int, int], int] | None = None) -> None:
        """Sort the groups.

        Args:
            rooms: class-uniform sampling only, whose groups have no images yet: (window, class) -> how many groups
                without a common image one step can have there; every window has as many as a step takes from a lane.
        """
        self.rooms = rooms
        self.remaining = len(groups)
        self.queues: dict[int, deque[Group]] = {}
        self.needs: dict[int, int] = {}  # window -> groups still to be taken that have an image of it as their oldest
        for group in sorted(groups, key=lambda group: group.time):
            self.queues.setdefault(group.label, deque()).append(group)
            self.needs[group.oldest] = self.needs.get(group.oldest, 0) + 1
        self.heap = [(queue[0].time, label) for label, queue in self.queues.items()]
        heapify(self.heap)
        self.horizon = 0
        self.start_step()

    def start_step(self) -> None:
        """Find the last window that may be open while the oldest one is still needed."""
        self.horizon = min((w for w, n in self.needs.items() if n), default=0) + 1

    def first(self, label: int) -> Group | None:
        """The class's next group, if its window may be open."""
        queue = self.queues.get(label)
        return queue[0] if queue and queue[0].window <= self.horizon else None

    def take(self, label: int) -> Group:
        """The heap keeps the class's old entry, which ``earliest`` recognises and replaces."""
        group = self.queues[label].popleft()
        self.needs[group.oldest] -= 1
        self.remaining -= 1
        return group

    def put_back(self, group: Group) -> None:
        group = group.instead_of or group
        self.queues[group.label].appendleft(group)
        self.needs[group.oldest] += 1
        self.remaining += 1
        heappush(self.heap, (group.time, group.label))

    def fits(self, window: int, label: int, taken: list[Group]) -> bool:
        """Whether a step that has ``taken`` from the lane can have one more group of the class, no image twice."""
        if self.rooms is None:  # then no two groups share an image
            return True
        return sum((g.window, g.label) == (window, label) for g in taken) < self.rooms[window, label]

    def earliest(self, excluded: dict[int, int]) -> int | None:
        """The class of the earliest group that is open and whose class is not excluded."""
        skipped: list[tuple[float, int]] = []
        found = None
        while self.heap and self.heap[0][0] < self.horizon + 1:
            entry = heappop(self.heap)
            time, label = entry
            queue = self.queues[label]
            if not queue or (skipped and entry == skipped[-1]):
                continue
            if queue[0].time != time:
                if queue[0].time > time:  # an entry older than its queue; a newer one would be there twice
                    heappush(self.heap, (queue[0].time, label))
                continue
            skipped.append(entry)
            if label not in excluded:
                found = label
                break
        for entry in skipped:
            heappush(self.heap, entry)
        return found


def take_steps(queues: list[Lane], steps: int, per_lane: int) -> list[list[list[Group]]]:
    """Choose every step's groups: [step][lane] -> g groups."""
    L = len(queues)
    plan = []
    for t in range(steps):
        chosen: list[list[Group]] = [[] for _ in range(L)]
        owner: dict[int, int] = {}  # class in this step -> lane that it was first taken from
        for queue in queues:
            queue.start_step()
        # Turn by turn, and another lane first in every step, so that no lane always chooses last.
        for turn in range(per_lane * L):
            lane = (t + turn) % L
            label = queues[lane].earliest(owner)
            if label is not None:
                owner[label] = lane
                chosen[lane].append(queues[lane].take(label))
            elif not _exchange(lane, queues, chosen, owner):
                group = _repeat(lane, queues[lane], chosen)
                owner.setdefault(group.label, lane)
                chosen[lane].append(group)
        plan.append(chosen)
    _spread_repeats(plan)
    return plan


def _exchange(lane: int, queues: list[Lane], chosen: list[list[Group]], owner: dict[int, int]) -> bool:
    """Give ``lane`` a class that another lane holds, which takes one of a third lane, and so on to a free class."""
    came_from: dict[int, tuple[int, int]] = {lane: (-1, -1)}  # lane -> (who wants its class, which class)
    waiting = deque([lane])
    while waiting:
        here = waiting.popleft()
        free = queues[here].earliest(owner) if here != lane else None
        if free is not None:
            label = free
            while here != -1:  # walk back: each takes the class that the next one in the path gave up
                wants, given = came_from[here]
                if wants != -1:
                    group = next(group for group in chosen[here] if group.label == given)
                    chosen[here].remove(group)
                    queues[here].put_back(group)
                chosen[here].append(queues[here].take(label))
                owner[label] = here
                here, label = wants, given
            return True
        for label, other in owner.items():
            first = None if other in came_from else queues[here].first(label)
            if first is not None and queues[here].fits(first.window, label, chosen[here]):
                came_from[other] = (here, label)
                waiting.append(other)
    return False


def _repeat(lane: int, queue: Lane, chosen: list[list[Group]]) -> Group:
    """Take a group of the open class that this step holds least often; the earliest of them."""
    held = Counter(group.label for groups in chosen for group in groups)
    while True:
        firsts = [group for group in map(queue.first, queue.queues) if group is not None]
        fitting = [group for group in firsts if queue.fits(group.window, group.label, chosen[lane])]
        if fitting:
            return queue.take(min(fitting, key=lambda group: (held[group.label], group.time)).label)
        if firsts:
            return _substitute(queue, min(firsts, key=lambda group: group.time), chosen[lane], held)
        queue.horizon += 1  # the windows are smaller than what a step takes


def _substitute(queue: Lane, planned: Group, taken: list[Group], held: Counter[int]) -> Group:
    """Take another class of the window in place of one whose images there are all in the step already.

    There is one: a window has room for as many groups as a step takes from the lane.
    """
    assert queue.rooms is not None
    labels = [c for window, c in queue.rooms if window == planned.window and queue.fits(window, c, taken)]
    label = min(labels, key=lambda c: (held[c], c))
    return replace(queue.take(planned.label), label=label, instead_of=planned)


def _spread_repeats(plan: list[list[list[Group]]]) -> None:
    """Exchange repeated classes with other steps, in place.

    Only groups of the same lane and windows change places, so every window is in use in the same steps as before.
    """
    held = [Counter(group.label for lane in step for group in lane) for step in plan]
    for t, step in enumerate(plan):
        if max(held[t].values()) == 1:
            continue
        near = sorted(range(max(0, t - NEAR), min(len(plan), t + NEAR + 1)), key=lambda other: abs(other - t))
        for lane, groups in enumerate(step):
            for i, group in enumerate(groups):
                if held[t][group.label] == 1:
                    continue
                for other in near:
                    if held[other][group.label]:
                        continue
                    theirs = plan[other][lane]
                    j = next((j for j, g in enumerate(theirs) if not held[t][g.label] and _alike(g, group)), None)
                    if j is not None:
                        held[t].subtract([group.label])
                        held[other].subtract([theirs[j].label])
                        groups[i], theirs[j] = theirs[j], group
                        held[t].update([groups[i].label])
                        held[other].update([group.label])
                        break


def _alike(a: Group, b: Group) -> bool:
    return (a.window, a.oldest) == (b.window, b.oldest)
