/* Each gap of the protocol in turn is held open while threads with and without the GIL touch,
 * pages are dropped and installed again, and both the loop and the sentry read. */
#include "harness.h"

#include "sys.h"

#define PAGES 16ULL
#define ROUNDS 40

static struct bench bench;
static _Atomic int held;
static _Atomic uint32_t passed, dropping;

void au_test_gap(enum au_gap where)
{
	/* Every third time, so that those before and behind come through as well. */
	if ((int)where == atomic_load(&held) && atomic_fetch_add(&passed, 1) % 3 == 0)
		au_sleep_ns(400000);
}

static void *holder(void *argument)
{
	uint64_t index, first = (uint64_t)(uintptr_t)argument;

	for (index = 0; index < ROUNDS * PAGES; index += 5) {
		uint64_t offset = (first + index) % PAGES * PAGE + 3;

		gil_take();
		CHECK_EQ(touch(bench.region, offset), pattern(offset));
		gil_give();
	}
	return NULL;
}

static void *free_toucher(void *argument)
{
	uint64_t index, first = (uint64_t)(uintptr_t)argument;

	for (index = 0; index < ROUNDS * PAGES; index += 5) {
		uint64_t offset = (first + index) % PAGES * PAGE + 7;

		CHECK_EQ(touch(bench.region, offset), pattern(offset));
	}
	return NULL;
}

static void *dropper(void *argument)
{
	uint64_t page = 0;

	(void)argument;
	while (atomic_load(&dropping)) {
		page = (page + 7) % PAGES;
		au_region_drop(bench.region, page * PAGE, PAGE);
		au_sleep_ns(50000);
	}
	return NULL;
}

static void hold(enum au_gap gap)
{
	struct loop loop = { .needs_gil = true };
	pthread_t threads[4], drops;
	uintptr_t index;

	bench_open(&bench, (struct setup){ .length = PAGES * PAGE, .block = 1,
					   .engine_options = AU_ENGINE_YIELD });
	loop_start(&loop, &bench);
	atomic_store(&held, gap);
	atomic_store(&dropping, 1);
	drops = spawn(dropper, NULL);
	for (index = 0; index < 4; index++)
		threads[index] = spawn(index % 2 ? holder : free_toucher, (void *)(index * 3));
	for (index = 0; index < 4; index++)
		join(threads[index]);
	atomic_store(&dropping, 0);
	join(drops);
	CHECK(atomic_load(&passed) > 0);
	atomic_store(&held, AU_GAP_NONE);
	loop_stop(&loop);
	bench_close(&bench);
}

#define GAPS(X)          \
	X(EPOCH_READ)    \
	X(READ_CLAIM)    \
	X(CLAIM_PENDING) \
	X(PENDING_LOOK)  \
	X(LOOK_TELL)     \
	X(TAKE_MARK)     \
	X(MARK_IOCTL)    \
	X(IOCTL_SETTLE)  \
	X(SETTLE_FREE)   \
	X(FREE_WAKE)     \
	X(LOOK_SIGNAL)

#define GAP_BODY(name)                         \
	static void hold_##name(void)          \
	{                                      \
		hold(AU_GAP_##name);           \
	}
GAPS(GAP_BODY)

#define GAP_ROW(name) { "gap: held open at " #name, hold_##name, 0, TSAN_DEFERS },
const struct test gap_tests[] = { GAPS(GAP_ROW) { NULL, NULL, 0, NULL } };
