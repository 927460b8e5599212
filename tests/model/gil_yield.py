"""The GIL-yield protocol as a finite model, searched through every interleaving.

A thread that touches a missing page while it holds the GIL is made to let go of it
by a signal handler that runs at the faulting instruction. Five parties take part in
that with nothing but atomic words between them, so the protocol is not argued about
here but enumerated: each action below is one indivisible step of one party, a state
is everything they can see, and `explore` visits every order in which the steps can
happen.

The parties:

* the **toucher**, a Python thread which touches pages in the order of its scenario,
  and the **signal handler**, which runs on it;
* the **loop**, which needs the GIL for every step that is not inside a native call;
  it reads messages, fetches pages and installs them (the rescue loop is the same
  party under another name);
* the **sentry**, a native thread which reads messages too and sends the signal;
* the **evictor**, which may drop a present page at any moment;
* the **kernel**, which queues one message per blocked thread, forgets an unread
  message when its thread is interrupted or woken, and wakes on UFFDIO_COPY and
  UFFDIO_WAKE.

What must hold:

* the handler lets the GIL go only at an instruction that touches lazy memory;
* from every state the toucher can still reach its end by steps that the parties are
  *bound* to take. Chance (readahead, another signal, an eviction, a failing ioctl)
  may take part in getting there, but never be the only way out;
* where chance has no hand, a fault costs two signals at most.

Every protocol rule has a switch in `Rules`. With all of them on the model is clean;
the tests take away one at a time, and each time a trace of the failure must come out,
which shows both that the rule is needed and that the model can see it missing.

Simplifications, each of which only merges steps that touch nothing in common: a scan
over the slot table is one step; a page's state and generation are read together (they
share a word); a compare-and-swap that must fail because its slot was freed and used
again is a reference to the slot that became None.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

# --- what can be switched ---------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """The rules of the protocol. False takes a rule away."""

    slot_at_read: bool = True
    """Rule 2, failure A: who reads a message makes its slot in the same native call."""

    in_order: bool = True
    """Rule 2: from read() to the claim a reader keeps out the other one. A thread has one
    slot, and a message for another page replaces it, so an old message must not come late."""

    recheck: bool = True
    """Rule 2, failure C: after PENDING is stored the page is looked at again (the half of
    Dekker's algorithm that the reader owes to the installer)."""

    epoch: bool = True
    """Rule 2: the second look compares the page's generation with the epoch at the read."""

    count_removals: bool = True
    """Rule 2: removing a page moves its generation as installing it does. Else a miss that
    was served and evicted between two steps of the reader leaves a slot nobody resolves."""

    wake_stale: bool = True
    """Rule 2: a slot freed because its generation moved, on a page that is missing
    again, may have belonged to a fresh message: UFFDIO_WAKE makes the toucher repeat it."""

    one_call: bool = True
    """Rule 3, failure B: marking, ioctl and freeing are one call, no GIL in between."""

    wake_late: bool = True
    """Rule 3: an installer that frees a PENDING, NOGIL or KERNEL slot wakes the page once
    more. The page is PRESENT by then, so it may have been evicted and touched again, and
    the slot may have taken in the message of that new fault."""

    wake_missing: bool = True
    """Rule 3: whoever puts a page back to MISSING (a failed ioctl, an eviction) wakes it:
    readers who saw it in between have dropped their slots."""

    pc_match: bool = True
    """Rules 4 and 5, failure D: the handler yields only where the sentry saw the thread."""

    retry: bool = True
    """Rules 4 and 5: a handler that finds another PC clears the outstanding bit, and the
    sentry signals again as long as the slot is undecided."""

    answered: bool = True
    """Rules 3 and 5: a signal counts as answered whatever the handler finds. Else it would
    be outstanding for ever when the slot was not PENDING just then: RESOLVING, with the
    ioctl failing afterwards, or not yet published by the next fault which took it over."""

    rearm_kernel: bool = True
    """Rule 4: a new message turns a KERNEL slot back into PENDING; the thread may have been
    in the kernel for another reason (waiting for the GIL) when the sentry looked."""

    nogil_final: bool = True
    """Rule 5, failure K: a new message does not turn a NOGIL slot back into PENDING."""

    def without(self, name: str) -> Rules:
        switches = {field.name: getattr(self, field.name) for field in fields(self)}
        return Rules(**{**switches, name: False})


class Touch(NamedTuple):
    page: int
    holds_gil: bool = True


@dataclass(frozen=True)
class Scenario:
    """What the toucher does, and how often chance may interfere."""

    touches: tuple[Touch, ...]
    loop_reads: bool = True
    readaheads: int = 0
    evictions: int = 0
    other_signals: int = 0
    ioctl_errors: int = 0

    @property
    def has_chance(self) -> bool:
        return any((self.readaheads, self.evictions, self.other_signals, self.ioctl_errors))


# --- the state --------------------------------------------------------------------------

PageState = Literal["missing", "installing", "present", "evicting"]
SlotState = Literal["free", "claim", "pending", "yielded", "nogil", "kernel", "resolving"]


class Page(NamedTuple):
    state: PageState = "missing"  # the native page table
    mapped: bool = False  # the truth in the kernel
    generation: int = 0  # the epoch of its last install or removal
    wanted: bool = False  # a message asked for it, the loop will fetch it


class Slot(NamedTuple):
    """One fault that may need a yield. There is one toucher, so no thread id."""

    state: SlotState = "free"
    page: int | None = None
    pc: int | None = None  # where the sentry saw the toucher blocked
    outstanding: bool = False  # a signal was sent for it


class Toucher(NamedTuple):
    """Position 2k is the Python code before touch k, position 2k+1 the touch itself."""

    position: int = 0
    mode: Literal["run", "blocked", "handler", "yielded", "regain"] = "run"
    slot: int | None = None  # in "handler" and "yielded"; None there: freed meanwhile
    signals: int = 0  # sent during the present fault, counted where chance has no hand


class Worker(NamedTuple):
    """Where the loop or the sentry or the evictor stands, and its registers."""

    step: str = "idle"
    page: int | None = None
    epoch: int = 0
    slot: int | None = None
    pc: int | None = None


class Chance(NamedTuple):
    """How often each thing outside the protocol may still happen."""

    readaheads: int
    evictions: int
    other_signals: int
    ioctl_errors: int


class State(NamedTuple):
    toucher: Toucher
    gil: Literal["", "toucher", "loop"]
    pending: int  # our signals on their way to the toucher
    unread: int | None  # the page of the message in the kernel's queue
    pages: tuple[Page, ...]
    slots: tuple[Slot, ...]
    epoch: int
    loop: Worker
    sentry: Worker
    evictor: Worker
    chance: Chance


SLOTS = 4  # more than one thread can have at a time; the real table grows
MOST_SIGNALS = 2

IDLE = Worker()
WAIT = Worker("wait")  # the loop's native call is over, it wants the GIL back
PYTHON = Worker("python")  # the loop has the GIL


class Step(NamedTuple):
    name: str
    state: State
    by_chance: bool = False


Steps = Iterator[Step]


class Wrong(Exception):
    """A step that must never be possible."""


# --- small changes to a state -----------------------------------------------------------


def with_page(s: State, number: int, **changes: Any) -> State:
    pages = list(s.pages)
    pages[number] = pages[number]._replace(**changes)
    return s._replace(pages=tuple(pages))


def with_slot(s: State, number: int, **changes: Any) -> State:
    slots = list(s.slots)
    slots[number] = slots[number]._replace(**changes)
    return s._replace(slots=tuple(slots))


def with_chance(s: State, name: str) -> State:
    return s._replace(chance=s.chance._replace(**{name: getattr(s.chance, name) - 1}))


def freed(s: State, number: int) -> State:
    """The slot becomes FREE; whoever still holds a reference loses it (see the top)."""
    s = s._replace(slots=(*s.slots[:number], Slot(), *s.slots[number + 1 :]))
    if s.toucher.slot == number:
        s = s._replace(toucher=s.toucher._replace(slot=None))
    if s.loop.slot == number:
        s = s._replace(loop=s.loop._replace(slot=None))
    if s.sentry.slot == number and s.sentry.step != "signal":  # a late signal is still sent
        s = s._replace(sentry=s.sentry._replace(slot=None))
    return s


def woken(s: State, page: int, scenario: Scenario) -> State:
    """UFFDIO_COPY and UFFDIO_WAKE: a thread blocked on the page runs again."""
    if s.toucher.mode == "blocked" and touched_page(s, scenario) == page:
        return s._replace(toucher=s.toucher._replace(mode="run"), unread=None)
    return s


def noted(s: State, page: int | None) -> State:
    """The loop is told that the page is missed, if it is."""
    assert page is not None
    if s.pages[page].state == "missing":
        return with_page(s, page, wanted=True)
    return s


def touched_page(s: State, scenario: Scenario) -> int:
    return scenario.touches[s.toucher.position // 2].page


def at_touch(s: State) -> bool:
    return s.toucher.position % 2 == 1


def finished(s: State, scenario: Scenario) -> bool:
    return s.toucher.position == 2 * len(scenario.touches) and s.toucher.mode == "run"


# --- the toucher ------------------------------------------------------------------------


def toucher_runs(s: State, rules: Rules, scenario: Scenario) -> Steps:
    """Python code between touches, where the GIL comes and goes; and the touches."""
    t = s.toucher
    if t.mode != "run":
        return
    if at_touch(s):
        page = touched_page(s, scenario)
        if s.pages[page].mapped:
            yield Step(
                f"toucher: touches page {page}, goes on",
                s._replace(toucher=t._replace(position=t.position + 1, signals=0)),
            )
        else:
            yield Step(
                f"toucher: faults on page {page}",
                s._replace(toucher=t._replace(mode="blocked"), unread=page),
            )
        return
    has_gil = s.gil == "toucher"
    if has_gil:
        yield Step("toucher: lets the GIL go (Python switches threads)", s._replace(gil=""))
    elif s.gil == "":
        yield Step("toucher: takes the GIL", s._replace(gil="toucher"))
    if not finished(s, scenario) and scenario.touches[t.position // 2].holds_gil == has_gil:
        yield Step(
            "toucher: comes to the next touch",
            s._replace(toucher=t._replace(position=t.position + 1)),
        )


def other_signal(s: State, rules: Rules, scenario: Scenario) -> Steps:
    """A foreign signal interrupts the fault; a yielded handler gives way to it (rule 6)."""
    t = s.toucher
    if not s.chance.other_signals:
        return
    if t.mode == "blocked":
        after = s._replace(toucher=t._replace(mode="run"), unread=None)
        yield Step(
            "another signal: interrupts the fault, the unread message vanishes",
            with_chance(after, "other_signals"),
            by_chance=True,
        )
    elif t.mode == "yielded" and t.slot is not None:
        after = with_slot(s, t.slot, state="pending", outstanding=False)
        after = after._replace(toucher=t._replace(mode="regain", slot=None))
        yield Step(
            "another signal: the handler gives way, YIELDED to PENDING (rule 6)",
            with_chance(after, "other_signals"),
            by_chance=True,
        )


def handler_enters(s: State, rules: Rules, scenario: Scenario) -> Steps:
    """Rule 5: our signal is delivered; the handler looks for a slot that fits."""
    t = s.toucher
    if not s.pending or t.mode not in ("run", "blocked"):
        return
    if t.mode == "blocked":
        s = s._replace(unread=None)  # the kernel takes the entry out with the interrupt
    after = s._replace(pending=s.pending - 1)
    if rules.retry and rules.answered:
        answered = tuple(slot._replace(outstanding=False) for slot in after.slots)
        after = after._replace(slots=answered)
    number = next((i for i, slot in enumerate(s.slots) if slot.state == "pending"), None)
    if number is not None and (not rules.pc_match or s.slots[number].pc == t.position):
        yield Step(
            f"handler: runs, slot {number} fits",
            after._replace(toucher=t._replace(mode="handler", slot=number)),
        )
        return
    if number is not None and rules.retry and not rules.answered:
        after = with_slot(after, number, outstanding=False)
    yield Step(
        "handler: runs, no slot fits, returns",
        after._replace(toucher=t._replace(mode="run")),
    )


def handler_decides(s: State, rules: Rules, scenario: Scenario) -> Steps:
    """Rule 5: by compare-and-swap to YIELDED, GIL let go; or to NOGIL; or nothing."""
    t = s.toucher
    if t.mode != "handler":
        return
    if t.slot is None or s.slots[t.slot].state != "pending":
        yield Step(
            "handler: the slot has changed, returns",
            s._replace(toucher=t._replace(mode="run", slot=None)),
        )
    elif s.gil != "toucher":
        after = with_slot(s, t.slot, state="nogil")
        yield Step(
            f"handler: does not hold the GIL, slot {t.slot} to NOGIL, returns",
            after._replace(toucher=t._replace(mode="run", slot=None)),
        )
    else:
        name = f"handler: slot {t.slot} to YIELDED, lets the GIL go"
        if not at_touch(s):
            raise Wrong(f"{name} AT AN INSTRUCTION THAT DOES NOT TOUCH")
        after = with_slot(s, t.slot, state="yielded")
        yield Step(name, after._replace(gil="", toucher=t._replace(mode="yielded")))


def handler_waits(s: State, rules: Rules, scenario: Scenario) -> Steps:
    """Rules 5 and 6: when the slot is no longer YIELDED, take the GIL back and return."""
    t = s.toucher
    if t.mode == "yielded" and t.slot is None:
        yield Step(
            "handler: the slot is free, wants the GIL back",
            s._replace(toucher=t._replace(mode="regain")),
        )
    elif t.mode == "regain" and s.gil == "":
        yield Step(
            "handler: has the GIL back, returns",
            s._replace(gil="toucher", toucher=t._replace(mode="run")),
        )


# --- reading a message: the loop and the sentry alike -----------------------------------


def read_step(s: State, who: str, rules: Rules, scenario: Scenario) -> Step | None:
    """Rule 2, one step of the native call that reads. `who` is "loop" or "sentry"."""
    me: Worker = getattr(s, who)
    over = WAIT if who == "loop" else IDLE

    def go(name: str, state: State, worker: Worker) -> Step:
        change: dict[str, Any] = {who: worker}
        return Step(f"{who}: {name}", state._replace(**change))

    if me.step == "read":
        other = s.sentry if who == "loop" else s.loop
        if rules.in_order and other.step == "claim":
            return None
        if s.unread is None:
            return go("reads, no message", s, over)
        next_step = "claim" if rules.slot_at_read or who == "sentry" else "keep"
        return go(
            f"reads the message of page {s.unread}",
            s._replace(unread=None),
            me._replace(step=next_step, page=s.unread),
        )
    if me.step == "claim":
        return _claim(s, me, over, go, rules)
    if me.step == "publish":
        assert me.slot is not None
        after = with_slot(s, me.slot, state="pending")
        if not rules.recheck:
            return go(f"slot {me.slot} to PENDING", after, over)
        return go(f"slot {me.slot} to PENDING", after, me._replace(step="recheck"))
    if me.step == "recheck":
        assert me.page is not None
        page = s.pages[me.page]
        moved = rules.epoch and page.generation > me.epoch
        if me.slot is None:
            return go("second look, the slot was freed", s, over)
        if page.state == "missing" and not moved:
            return go("second look, the page is missing", s, over)
        after = freed(s, me.slot)
        if page.state == "missing" and rules.wake_stale:
            name = f"second look, generation moved, frees slot {me.slot}"
            return go(name, after, me._replace(step="wake", slot=None))
        return go(f"second look, page {page.state}, frees slot {me.slot}", after, over)
    if me.step == "wake":
        assert me.page is not None
        return go(f"UFFDIO_WAKE on page {me.page}", woken(s, me.page, scenario), over)
    return None


def _claim(
    s: State, me: Worker, over: Worker, go: Callable[[str, State, Worker], Step], rules: Rules
) -> Step:
    """Rule 2: find the thread's slot for this page, or take a free one (under a lock)."""
    s = noted(s, me.page)
    for number, slot in enumerate(s.slots):
        if slot.state in ("free", "resolving"):
            continue  # RESOLVING: this message may be younger than the ioctl under way
        if slot.page == me.page:
            again = (slot.state == "kernel" and rules.rearm_kernel) or (
                slot.state == "nogil" and not rules.nogil_final
            )
            after = with_slot(s, number, state="pending") if again else s
            return go(f"finds slot {number} for it ({slot.state})", after, over)
        if slot.state not in ("claim", "yielded"):
            s = freed(s, number)  # the thread waits elsewhere now, so it has left that fault
    number = next(i for i, slot in enumerate(s.slots) if slot.state == "free")
    after = with_slot(s, number, state="claim", page=me.page)
    return go(f"claims slot {number}", after, me._replace(step="publish", slot=number))


# --- the loop ---------------------------------------------------------------------------


def loop_in_python(s: State, rules: Rules, scenario: Scenario) -> Steps:
    """With the GIL: start a reading call, start an install, or go back to sleep."""
    if s.loop.step in ("idle", "wait", "keep", "between") and s.gil == "":
        goes_on = {
            "keep": s.loop._replace(step="claim"),
            "between": s.loop._replace(step="ioctl"),
        }.get(s.loop.step, PYTHON)
        # In the two broken variants the GIL is taken and let go again in one step.
        gil: Literal["", "loop"] = "loop" if goes_on == PYTHON else ""
        yield Step("loop: gets the GIL", s._replace(loop=goes_on, gil=gil))
    if s.loop.step != "python":
        return
    yield Step("loop: sleeps, lets the GIL go", s._replace(loop=IDLE, gil=""))
    if scenario.loop_reads:
        yield Step(
            "loop: lets the GIL go in a native call that will read",
            s._replace(loop=Worker("read", epoch=s.epoch), gil=""),
        )
    for number, page in enumerate(s.pages):
        if page.state != "missing":
            continue
        after = with_page(s, number, state="installing")
        after = after._replace(loop=Worker("slots", page=number), gil="")
        if page.wanted:
            yield Step(f"loop: installs page {number}: page to INSTALLING", after)
        elif s.chance.readaheads:
            yield Step(
                f"loop: reads page {number} ahead: page to INSTALLING",
                with_chance(after, "readaheads"),
                by_chance=True,
            )


def loop_reads(s: State, rules: Rules, scenario: Scenario) -> Steps:
    """Rule 2 in the loop's native call."""
    step = read_step(s, "loop", rules, scenario)
    if step is not None:
        yield step


def loop_installs(s: State, rules: Rules, scenario: Scenario) -> Steps:
    """Rule 3: PENDING to RESOLVING, ioctl, free the slots, PRESENT; or put all back."""
    me = s.loop
    number = me.page
    if me.step not in ("slots", "ioctl", "present", "free", "undo", "wake again"):
        return
    assert number is not None
    mine = [i for i, slot in enumerate(s.slots) if slot.page == number]

    def go(name: str, state: State, next_step: str) -> Step:
        return Step(f"loop: {name}", state._replace(loop=me._replace(step=next_step)))

    if me.step == "slots":
        for i in mine:
            if s.slots[i].state == "pending":
                s = with_slot(s, i, state="resolving")
        yield go("PENDING to RESOLVING", s, "ioctl" if rules.one_call else "between")
    elif me.step == "ioctl":
        after = woken(with_page(s, number, mapped=True), number, scenario)
        yield go(f"UFFDIO_COPY of page {number}", after, "present")
        if s.chance.ioctl_errors:
            step = go("UFFDIO_COPY fails", with_chance(s, "ioctl_errors"), "undo")
            yield step._replace(by_chance=True)
    elif me.step == "present":
        s = s._replace(epoch=s.epoch + 1)
        s = with_page(s, number, state="present", generation=s.epoch, wanted=False)
        yield go(f"page {number} to PRESENT", s, "free")
    elif me.step == "free":
        late = any(s.slots[i].state in ("pending", "nogil", "kernel") for i in mine)
        for i in mine:
            if s.slots[i].state != "claim":
                s = freed(s, i)
        next_step = "wake again" if late and rules.wake_late else "wait"
        yield go(f"frees the slots of page {number}", s, next_step)
    elif me.step == "undo":
        s = with_page(s, number, state="missing", wanted=True)
        for i in mine:
            if s.slots[i].state == "resolving":
                s = with_slot(s, i, state="pending")
        name = f"page {number} back to MISSING, its slots to PENDING"
        yield go(name, s, "wake again" if rules.wake_missing else "wait")
    elif me.step == "wake again":
        yield go(f"UFFDIO_WAKE on page {number}", woken(s, number, scenario), "wait")


# --- the sentry -------------------------------------------------------------------------


def sentry_reads(s: State, rules: Rules, scenario: Scenario) -> Steps:
    """Rule 2 in the sentry."""
    if s.sentry.step == "idle":
        if s.unread is not None:
            yield Step(
                "sentry: is about to read",
                s._replace(sentry=Worker("read", epoch=s.epoch)),
            )
        return
    step = read_step(s, "sentry", rules, scenario)
    if step is not None:
        yield step


def sentry_judges(s: State, rules: Rules, scenario: Scenario) -> Steps:
    """Rule 4: where is the thread of this slot? Running: look again."""
    if s.sentry.step != "idle":
        return
    t = s.toucher
    waits_for_gil = t.mode in ("yielded", "regain") or (
        t.mode == "run" and not at_touch(s) and s.gil != "toucher"
    )
    for number, slot in enumerate(s.slots):
        if slot.state != "pending" or slot.outstanding:
            continue
        if t.mode == "blocked":
            yield Step(
                f"sentry: slot {number}, the thread is blocked in user mode",
                s._replace(sentry=Worker("signal", slot=number, pc=t.position)),
            )
        elif waits_for_gil:
            yield Step(
                f"sentry: slot {number}, the thread is in a system call, to KERNEL",
                with_slot(s, number, state="kernel"),
            )


def sentry_signals(s: State, rules: Rules, scenario: Scenario) -> Steps:
    """Rule 4: keep the PC, tgkill. The slot may be free or another's by now."""
    if s.sentry.step != "signal":
        return
    assert s.sentry.slot is not None
    after = s._replace(sentry=IDLE, pending=s.pending + 1)
    if s.slots[s.sentry.slot].state != "free":
        after = with_slot(after, s.sentry.slot, pc=s.sentry.pc, outstanding=True)
    count = s.toucher.signals + (not scenario.has_chance)
    name = f"sentry: sends the signal for slot {s.sentry.slot}"
    if count > MOST_SIGNALS:
        raise Wrong(f"{name}, NUMBER {count} FOR ONE FAULT")
    yield Step(name, after._replace(toucher=after.toucher._replace(signals=count)))


# --- the evictor ------------------------------------------------------------------------


def evictor_works(s: State, rules: Rules, scenario: Scenario) -> Steps:
    """Page to EVICTING, madvise, MISSING, wake; at any moment, but for present pages."""
    me = s.evictor

    def go(name: str, state: State, worker: Worker) -> Step:
        return Step(f"evictor: {name}", state._replace(evictor=worker))

    if me.step == "idle":
        if s.chance.evictions:
            for number, page in enumerate(s.pages):
                if page.state == "present":
                    after = with_chance(with_page(s, number, state="evicting"), "evictions")
                    step = go(f"page {number} to EVICTING", after, Worker("drop", page=number))
                    yield step._replace(by_chance=True)
        return
    assert me.page is not None
    if me.step == "drop":
        after = with_page(s, me.page, mapped=False)
        yield go(f"madvise drops page {me.page}", after, me._replace(step="missing"))
    elif me.step == "missing":
        after = with_page(s, me.page, state="missing")
        if rules.count_removals:
            after = after._replace(epoch=s.epoch + 1)
            after = with_page(after, me.page, generation=after.epoch)
        next_worker = me._replace(step="wake") if rules.wake_missing else IDLE
        yield go(f"page {me.page} to MISSING", after, next_worker)
    elif me.step == "wake":
        yield go(f"UFFDIO_WAKE on page {me.page}", woken(s, me.page, scenario), IDLE)


ACTIONS = (
    toucher_runs,
    other_signal,
    handler_enters,
    handler_decides,
    handler_waits,
    loop_in_python,
    loop_reads,
    loop_installs,
    sentry_reads,
    sentry_judges,
    sentry_signals,
    evictor_works,
)


# --- the search -------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    states: int
    failure: str | None = None  # None: clean
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.failure is None:
            return f"clean over {self.states} states"
        steps = "\n".join(f"  {number:2}. {name}" for number, name in enumerate(self.trace, 1))
        return f"{self.failure} ({self.states} states seen), after\n{steps}"


def initial(scenario: Scenario) -> State:
    return State(
        toucher=Toucher(),
        gil="",
        pending=0,
        unread=None,
        pages=(Page(),) * (1 + max(touch.page for touch in scenario.touches)),
        slots=(Slot(),) * SLOTS,
        epoch=0,
        loop=IDLE,
        sentry=IDLE,
        evictor=IDLE,
        chance=Chance(
            scenario.readaheads,
            scenario.evictions,
            scenario.other_signals,
            scenario.ioctl_errors,
        ),
    )


def explore(scenario: Scenario, rules: Rules) -> Result:
    """Every reachable state, breadth first; the shortest trace to a failure, if any."""
    start = initial(scenario)
    numbers = {start: 0}  # in the order of discovery
    came_from: list[tuple[int, str]] = [(0, "")]
    bound: list[list[int]] = [[]]  # bound[n]: states with a step to n that must happen
    goals: list[int] = []
    queue = deque([start])

    def trace(number: int, *more: str) -> tuple[str, ...]:
        names: list[str] = []
        while number:
            number, name = came_from[number]
            names.append(name)
        return (*reversed(names), *more)

    while queue:
        state = queue.popleft()
        here = numbers[state]
        if finished(state, scenario):
            goals.append(here)
        try:
            for action in ACTIONS:
                for name, after, by_chance in action(state, rules, scenario):
                    there = numbers.setdefault(after, len(came_from))
                    if there == len(came_from):
                        came_from.append((here, name))
                        bound.append([])
                        queue.append(after)
                    if not by_chance:
                        bound[there].append(here)
        except Wrong as wrong:
            return Result(len(numbers), "wrong step", trace(here, str(wrong)))

    alive = bytearray(len(came_from))
    for goal in goals:
        alive[goal] = 1
    while goals:
        for before in bound[goals.pop()]:
            if not alive[before]:
                alive[before] = 1
                goals.append(before)
    doomed = alive.find(0)
    if doomed < 0:
        return Result(len(numbers))
    state = next(s for s, number in numbers.items() if number == doomed)
    yielded = state.toucher.mode in ("yielded", "handler")
    failure = "lost yield" if yielded else "stuck"
    return Result(len(numbers), failure, trace(doomed))
