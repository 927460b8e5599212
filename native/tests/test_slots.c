/* Slots: claiming, duplicates, growth, and the installer's passes over them. */
#include "harness.h"

/* Slots only compare the pointer. */
static struct au_engine *const engine = (struct au_engine *)(uintptr_t)0x1000;
static struct au_engine *const other = (struct au_engine *)(uintptr_t)0x2000;

static enum au_slot_state state_of(struct au_slot *slot)
{
	return au_slot_state(atomic_load(&slot->word));
}

static struct au_slot *claim(uint32_t tid, uint64_t page)
{
	bool duplicate = false;
	struct au_slot *slot = au_slot_claim(engine, tid, page, PAGE, 0, &duplicate);

	/* A repetition after long is not called one; see REPEAT_NS. */
	CHECK(!duplicate || !slot);
	return slot;
}

static struct au_slot *waiting(uint32_t tid, uint64_t page)
{
	struct au_slot *slot = claim(tid, page);

	CHECK(slot);
	CHECK_EQ(state_of(slot), AU_SLOT_CLAIM);
	au_slot_publish(slot);
	CHECK_EQ(state_of(slot), AU_SLOT_PENDING);
	return slot;
}

static void life(void)
{
	struct au_slot *slot = waiting(7, PAGE);
	uint32_t first = atomic_load(&slot->word);

	CHECK_EQ(au_slots_live(), 1);
	CHECK(au_slot_pending_of(7) == slot);
	CHECK(!au_slot_pending_of(8));
	CHECK(au_slots_refer(engine, PAGE, 2 * PAGE));
	CHECK(!au_slots_refer(engine, 2 * PAGE, 3 * PAGE));
	CHECK(!au_slots_refer(other, PAGE, 2 * PAGE));
	CHECK(au_slot_move(slot, first, AU_SLOT_NOGIL));
	CHECK(!au_slot_move(slot, first, AU_SLOT_YIELDED));
	CHECK(!au_slot_free(slot, first));
	CHECK(au_slot_free(slot, atomic_load(&slot->word)));
	CHECK_EQ(au_slots_live(), 0);
	slot = waiting(7, PAGE);
	/* The same slot, another generation: a late user of the first sees that. */
	CHECK((atomic_load(&slot->word) & ~AU_SLOT_STATE_MASK) != (first & ~AU_SLOT_STATE_MASK));
	au_slot_withdraw(slot, first);
	CHECK_EQ(au_slots_live(), 1);
	au_slots_drop_engine(engine);
	CHECK_EQ(au_slots_live(), 0);
}

static void duplicates(void)
{
	struct au_slot *slot = waiting(7, PAGE), *second;
	uint32_t word;

	CHECK(!claim(7, PAGE));
	CHECK_EQ(atomic_load(&slot->repeated), 1);
	/* Seen elsewhere, so it has left the first fault. */
	second = waiting(7, 2 * PAGE);
	CHECK_EQ(au_slots_live(), 1);
	/* While an install is under way a message may be younger than it. */
	word = atomic_load(&second->word);
	CHECK(au_slot_move(second, word, AU_SLOT_RESOLVING));
	waiting(7, 2 * PAGE);
	CHECK_EQ(au_slots_live(), 2);
	CHECK(au_slots_end(engine, 2 * PAGE, 3 * PAGE));
	CHECK_EQ(au_slots_live(), 0);
}

static void installer(void)
{
	struct au_slot *inside = waiting(1, 4 * PAGE), *outside = waiting(2, 9 * PAGE);
	struct au_slot *nogil = waiting(3, 5 * PAGE);
	struct au_slot *claimed;

	au_slot_move(nogil, atomic_load(&nogil->word), AU_SLOT_NOGIL);
	au_slots_begin(engine, 4 * PAGE, 8 * PAGE);
	CHECK_EQ(state_of(inside), AU_SLOT_RESOLVING);
	CHECK_EQ(state_of(nogil), AU_SLOT_NOGIL);
	CHECK_EQ(state_of(outside), AU_SLOT_PENDING);
	atomic_store(&inside->signalled_at, 5);
	au_slots_abort(engine, 4 * PAGE, 8 * PAGE);
	CHECK_EQ(state_of(inside), AU_SLOT_PENDING);
	CHECK_EQ(atomic_load(&inside->signalled_at), 0);
	claimed = claim(4, 6 * PAGE);
	au_slots_begin(engine, 4 * PAGE, 8 * PAGE);
	au_slots_end(engine, 4 * PAGE, 8 * PAGE);
	/* CLAIM is its reader's, who will look at the page itself. */
	CHECK_EQ(state_of(claimed), AU_SLOT_CLAIM);
	CHECK_EQ(au_slots_live(), 2);
	au_slot_withdraw(claimed, au_slot_publish(claimed));
	au_slots_drop_engine(other);
	CHECK_EQ(au_slots_live(), 1);
	au_slots_drop_engine(engine);
	CHECK_EQ(au_slots_live(), 0);
}

static void *sleep_in_slot(void *argument)
{
	struct au_slot *slot = argument;
	uint32_t word = atomic_load(&slot->word);

	while (atomic_load(&slot->word) == word)
		au_futex_wait(&slot->word, word, 10 * AU_NS_PER_S);
	return NULL;
}

static void freeing_wakes_the_yielded(void)
{
	struct au_slot *slot = waiting(1, PAGE);
	pthread_t thread;

	au_slot_move(slot, atomic_load(&slot->word), AU_SLOT_YIELDED);
	thread = spawn(sleep_in_slot, slot);
	au_sleep_ns(20 * AU_NS_PER_MS);
	CHECK(!au_slots_end(engine, PAGE, 2 * PAGE));
	join(thread);
}

static void grows(void)
{
	uint32_t tid, count = 700;

	for (tid = 1; tid <= count; tid++)
		waiting(tid, tid * PAGE);
	CHECK_EQ(au_slots_live(), count);
	CHECK(au_slots_high() >= count);
	for (tid = 1; tid <= count; tid++)
		CHECK(au_slot_pending_of(tid));
	au_slots_end(engine, PAGE, (count / 2 + 1) * PAGE);
	CHECK_EQ(au_slots_live(), count - count / 2);
	for (tid = 1; tid <= count / 2; tid++)
		waiting(tid, tid * PAGE);
	CHECK_EQ(au_slots_high(), count); /* free ones are used again */
	au_slots_reset();
	CHECK_EQ(au_slots_live(), 0);
	CHECK_EQ(au_slots_high(), 0);
	CHECK(!au_slot_pending_of(3));
	waiting(3, PAGE);
	CHECK_EQ(au_slots_live(), 1);
}

#define ROUNDS (UNDER_TSAN ? 3000 : 20000)
static _Atomic int stop_installing;

static void *claimer(void *argument)
{
	uint32_t tid = (uint32_t)(uintptr_t)argument;
	int round;

	for (round = 0; round < ROUNDS; round++) {
		struct au_slot *slot = claim(tid, (uint64_t)(round % 16 + 1) * PAGE);
		uint32_t published;

		if (!slot)
			continue;
		published = au_slot_publish(slot);
		if (round % 3 == 0)
			au_slot_withdraw(slot, published);
		if (round % 5 == 0)
			au_slot_move(slot, published, AU_SLOT_YIELDED);
	}
	return NULL;
}

static void *sweeper(void *argument)
{
	uint64_t low = (uint64_t)(uintptr_t)argument * PAGE;

	while (!atomic_load(&stop_installing)) {
		au_slots_begin(engine, low, low + 9 * PAGE);
		if (low & PAGE)
			au_slots_abort(engine, low, low + 9 * PAGE);
		else
			au_slots_end(engine, low, low + 9 * PAGE);
	}
	return NULL;
}

static void threads(void)
{
	pthread_t claimers[6], sweepers[2];
	uintptr_t index;

	for (index = 0; index < 2; index++)
		sweepers[index] = spawn(sweeper, (void *)(index * 9));
	for (index = 0; index < 6; index++)
		claimers[index] = spawn(claimer, (void *)(index / 2 + 1)); /* two readers a thread */
	for (index = 0; index < 6; index++)
		join(claimers[index]);
	atomic_store(&stop_installing, 1);
	for (index = 0; index < 2; index++)
		join(sweepers[index]);
	au_slots_drop_engine(engine);
	CHECK_EQ(au_slots_live(), 0);
	CHECK_EQ(counted(AU_COUNT_live_slots), 0);
}

/* From every state there is a way to FREE, and from FREE to every state; steps that the protocol
 * forbids are not in the table. */
static void table(void)
{
	uint32_t reach[AU_SLOT_STATES], from, to, over;

	for (from = 0; from < AU_SLOT_STATES; from++) {
		reach[from] = 0;
		for (to = 0; to < AU_SLOT_STATES; to++)
			reach[from] |= (uint32_t)au_slot_may(from, to) << to;
	}
	for (over = 0; over < AU_SLOT_STATES; over++)
		for (from = 0; from < AU_SLOT_STATES; from++)
			if (reach[from] & (1U << over))
				reach[from] |= reach[over];
	for (from = 0; from < AU_SLOT_STATES; from++)
		CHECK_EQ(reach[from], (1U << AU_SLOT_STATES) - 1);
	CHECK(!au_slot_may(AU_SLOT_CLAIM, AU_SLOT_FREE)); /* its reader has it in hand */
	CHECK(!au_slot_may(AU_SLOT_RESOLVING, AU_SLOT_YIELDED)); /* too late to yield */
	CHECK(!au_slot_may(AU_SLOT_NOGIL, AU_SLOT_YIELDED)); /* it has nothing to give */
}

const struct test slots_tests[] = {
	{ "slots: the table of steps", table, 0, NULL },
	{ "slots: claim, publish, move, free, withdraw", life, 0, NULL },
	{ "slots: duplicate messages are absorbed", duplicates, 0, NULL },
	{ "slots: begin, abort and end around an install", installer, 0, NULL },
	{ "slots: freeing wakes a yielded thread", freeing_wakes_the_yielded, 0, NULL },
	{ "slots: hundreds, and reset", grows, 0, NULL },
	{ "slots: claimers against installers", threads, 0, NULL },
	{ 0 },
};
