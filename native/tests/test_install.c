/* Installing: what the kernel may answer, and what must be true afterwards. */
#include "harness.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static void tail_is_zero(void)
{
	struct bench bench;
	uint64_t length = 3 * PAGE + 100, index;
	uint8_t *bytes = malloc(4 * PAGE);
	int error;

	bench_open(&bench, (struct setup){ .length = length, .block = 4 });
	memset(bytes, 0xff, 4 * PAGE);
	pattern_fill(bytes, 0, length);
	/* Bytes that the caller has past the object's end are not the object's. */
	CHECK_EQ(au_region_install(bench.region, AU_OP_COPY, 0, bytes, 4 * PAGE, 0, UINT64_MAX,
				   &error), 4 * PAGE);
	CHECK_EQ(error, 0);
	CHECK(pattern_holds(at(bench.region, 0), 0, length));
	for (index = length; index < 4 * PAGE; index++)
		CHECK_EQ(touch(bench.region, index), 0);
	free(bytes);
	bench_close(&bench);
}

static void skips_what_is_there(void)
{
	struct bench bench;
	int error;

	bench_open(&bench, (struct setup){ .length = 16 * PAGE, .block = 4 });
	install_pattern(bench.region, 3 * PAGE, 2 * PAGE, &error);
	memset(at(bench.region, 3 * PAGE), 0x55, PAGE);
	au_region_install(bench.region, AU_OP_POISON, 9 * PAGE, NULL, PAGE, 0, UINT64_MAX, &error);
	CHECK_EQ(install_pattern(bench.region, 0, 16 * PAGE, &error), 16 * PAGE);
	CHECK_EQ(error, 0);
	CHECK_EQ(touch(bench.region, 3 * PAGE), 0x55); /* written bytes stay */
	CHECK(pattern_holds(at(bench.region, 4 * PAGE), 4 * PAGE, 5 * PAGE));
	CHECK_EQ(au_region_present(bench.region), 15);
	CHECK_EQ(au_region_poisoned(bench.region), 1);
	bench_close(&bench);
}

static void heals_poison(void)
{
	struct bench bench;
	uint8_t bytes[4 * PAGE];
	uint64_t where = 0;
	int error;

	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 4 });
	CHECK_EQ(au_region_install(bench.region, AU_OP_POISON, 0, NULL, 4 * PAGE, 0, UINT64_MAX,
				   &error), 4 * PAGE);
	CHECK_EQ(au_region_poisoned(bench.region), 4);
	CHECK_EQ(au_region_read(bench.region, PAGE, bytes, PAGE, &where), -EIO);
	pattern_fill(bytes, 0, 4 * PAGE);
	CHECK_EQ(au_region_install(bench.region, AU_OP_COPY, 0, bytes, 2 * PAGE, 1, UINT64_MAX,
				   &error), 2 * PAGE);
	CHECK_EQ(au_region_install(bench.region, AU_OP_ZERO, 2 * PAGE, NULL, 2 * PAGE, 1,
				   UINT64_MAX, &error), 2 * PAGE);
	CHECK_EQ(au_region_poisoned(bench.region), 0);
	CHECK_EQ(au_region_present(bench.region), 4);
	CHECK(pattern_holds(at(bench.region, 0), 0, 2 * PAGE));
	CHECK_EQ(touch(bench.region, 3 * PAGE), 0);
	bench_close(&bench);
}

static void shared_memory(void)
{
	struct bench bench;
	uint8_t bytes[8 * PAGE];
	int error;

	bench_open(&bench, (struct setup){ .length = 8 * PAGE, .block = 8, .kind = AU_KIND_MEMFD });
	pattern_fill(bytes, 0, sizeof bytes);
	CHECK_EQ(pwrite(bench.region->memfd, bytes, 4 * PAGE, 0), 4 * (ssize_t)PAGE);
	CHECK_EQ(au_region_install(bench.region, AU_OP_CONTINUE, 0, NULL, 2 * PAGE, 0, UINT64_MAX,
				   &error), 2 * PAGE);
	/* Page 2 and 3 are in the cache already: COPY finds them and puts its bytes there. */
	memset(bytes + 2 * PAGE, 0x11, 2 * PAGE);
	CHECK_EQ(au_region_install(bench.region, AU_OP_COPY, 2 * PAGE, bytes + 2 * PAGE, 2 * PAGE,
				   0, UINT64_MAX, &error), 2 * PAGE);
	CHECK_EQ(touch(bench.region, 3 * PAGE), 0x11);
	CHECK_EQ(au_region_install(bench.region, AU_OP_ZERO, 4 * PAGE, NULL, PAGE, 0, UINT64_MAX,
				   &error), PAGE);
	/* A hole cannot be continued: missing as before. */
	CHECK_EQ(au_region_install(bench.region, AU_OP_CONTINUE, 5 * PAGE, NULL, PAGE, 0,
				   UINT64_MAX, &error), 0);
	CHECK_EQ(error, EFAULT);
	CHECK(pattern_holds(at(bench.region, 0), 0, 2 * PAGE));
	CHECK_EQ(touch(bench.region, 4 * PAGE), 0);
	CHECK_EQ(au_region_present(bench.region), 5);
	bench_close(&bench);
}

static void *touch_first(void *argument)
{
	return (void *)(uintptr_t)touch(argument, 0);
}

/* The mapping went, the page cache did not: a minor fault, served without Python. */
static void soft_eviction(void)
{
	struct bench bench;
	int error;

	bench_open(&bench, (struct setup){ .length = PAGE, .block = 1, .kind = AU_KIND_MEMFD });
	install_pattern(bench.region, 0, PAGE, &error);
	CHECK_EQ(madvise(at(bench.region, 0), PAGE, MADV_DONTNEED), 0);
	CHECK_EQ((uintptr_t)join(spawn(touch_first, bench.region)), pattern(0));
	bench_close(&bench);
}

/* One message brings back what went of a whole block: around pages that are still mapped, a hole in
 * the page cache, and pages that are missing. */
static void block_comes_back(void)
{
	struct bench bench;
	uint64_t length = 32 * PAGE, messages, hole = 9 * PAGE, page;
	uint64_t items[16];
	int error;

	bench_open(&bench, (struct setup){ .length = length, .block = 16, .kind = AU_KIND_MEMFD });
	install_pattern(bench.region, 0, 14 * PAGE, &error);
	install_pattern(bench.region, 16 * PAGE, 16 * PAGE, &error);
	CHECK_EQ(madvise(at(bench.region, 0), 3 * PAGE, MADV_DONTNEED), 0);
	CHECK_EQ(madvise(at(bench.region, 5 * PAGE), length - 5 * PAGE, MADV_DONTNEED), 0);
	CHECK_EQ(fallocate(bench.region->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			   (off_t)hole, PAGE), 0);
	messages = counted(AU_COUNT_messages);
	CHECK_EQ((uintptr_t)join(spawn(touch_first, bench.region)), pattern(0));
	CHECK(au_pagemap_read(bench.region->start, items, 16));
	for (page = 0; page < 16; page++)
		CHECK_EQ(!!(items[page] & AU_PAGEMAP_PRESENT), page * PAGE != hole && page < 14);
	CHECK(pattern_holds(at(bench.region, 0), 0, hole));
	CHECK_EQ(counted(AU_COUNT_messages) - messages, 1);
	CHECK_EQ(counted(AU_COUNT_continued_bytes), 11 * PAGE);
	/* The block beside it was left alone. */
	CHECK(au_pagemap_read(bench.region->start + 16 * PAGE, items, 1));
	CHECK_EQ(items[0], 0);
	bench_close(&bench);
}

/* Of a block of many pages, what can be looked at in one go. */
static void large_block_comes_back(void)
{
	struct bench bench;
	uint64_t length = 1100 * PAGE, messages, page;
	int error;

	bench_open(&bench, (struct setup){ .length = length, .block = 1024, .kind = AU_KIND_MEMFD });
	CHECK_EQ(install_pattern(bench.region, 0, length, &error), length);
	CHECK_EQ(madvise(at(bench.region, 0), length, MADV_DONTNEED), 0);
	messages = counted(AU_COUNT_messages);
	for (page = 1; page < 1100; page += 7)
		CHECK_EQ(touch(bench.region, page * PAGE), pattern(page * PAGE));
	CHECK_EQ(counted(AU_COUNT_messages) - messages, 3);
	CHECK(pattern_holds(at(bench.region, 0), 0, length));
	bench_close(&bench);
}

static void *touch_fourth(void *argument)
{
	return (void *)(uintptr_t)touch(argument, 3 * PAGE);
}

/* A page whose bytes were taken out of the page cache between its message and our answer is missing:
 * whoever waits faults again and gets it fetched. */
static void gone_from_the_cache(void)
{
	struct bench bench;
	struct loop loop = { 0 };
	pthread_t thread;
	int error;

	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 4, .kind = AU_KIND_MEMFD,
					   .no_sentry = true });
	install_pattern(bench.region, 0, 4 * PAGE, &error);
	CHECK_EQ(madvise(at(bench.region, 0), 4 * PAGE, MADV_DONTNEED), 0);
	thread = spawn(touch_fourth, bench.region);
	EVENTUALLY(readable(bench.fd));
	CHECK_EQ(fallocate(bench.region->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			   3 * PAGE, PAGE), 0);
	loop_start(&loop, &bench);
	CHECK_EQ((uintptr_t)join(thread), pattern(3 * PAGE));
	CHECK_EQ(atomic_load(&loop.misses), 1);
	EVENTUALLY(au_region_present(bench.region) == 4);
	loop_stop(&loop);
	bench_close(&bench);
}

static void huge_pages(void)
{
	static const int kinds[] = { AU_KIND_HUGETLB, AU_KIND_HUGETLB_MEMFD };
	uint64_t huge = 2 << 20;
	int64_t settled;
	int index, error;

	for (index = 0; index < 2; index++) {
		struct bench bench;
		struct loop loop = { 0 };

		bench_open(&bench, (struct setup){ .length = huge + 77, .block = huge / PAGE,
						   .kind = kinds[index] });
		CHECK_EQ(bench.region->page_size, huge);
		settled = install_pattern(bench.region, huge, 77, &error);
		if (error == ENOMEM)
			test_skip("not enough huge pages");
		CHECK_EQ(settled, 77);
		loop_start(&loop, &bench);
		CHECK_EQ(touch(bench.region, 5 * PAGE), pattern(5 * PAGE));
		CHECK(pattern_holds(at(bench.region, 0), 0, huge + 77));
		CHECK_EQ(touch(bench.region, huge + 77), 0);
		CHECK_EQ(au_region_drop(bench.region, 0, huge), 0);
		CHECK(pattern_holds(at(bench.region, 0), 0, PAGE));
		loop_stop(&loop);
		bench_close(&bench);
	}
}

/* An empty pool answers EEXIST, which must not count as a page. */
static void huge_pool_is_empty(void)
{
	struct bench bench;
	uint64_t huge = 2 << 20, length = 4096 * huge, offset;
	uint8_t *bytes = malloc(huge);
	int error = 0;

	bench_open(&bench, (struct setup){ .length = length, .block = huge / PAGE,
					   .kind = AU_KIND_HUGETLB });
	memset(bytes, 1, huge);
	for (offset = 0; offset < length && !error; offset += huge)
		au_region_install(bench.region, AU_OP_COPY, offset, bytes, huge, 0, UINT64_MAX,
				  &error);
	CHECK_EQ(error, ENOMEM);
	CHECK_EQ(au_region_present(bench.region) + 1, offset / huge);
	free(bytes);
	bench_close(&bench);
}

static void generations(void)
{
	struct bench bench;
	uint8_t bytes[PAGE] = { 1 };
	uint32_t before;
	int error;

	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 2 });
	before = au_region_generation(bench.region, 0);
	CHECK_EQ(au_region_install(bench.region, AU_OP_COPY, 0, bytes, PAGE, 0, before, &error),
		 PAGE);
	CHECK(au_region_generation(bench.region, 0) != before);
	CHECK_EQ(au_region_install(bench.region, AU_OP_COPY, PAGE, bytes, PAGE, 0, before, &error),
		 0);
	CHECK_EQ(error, ESTALE);
	CHECK_EQ(au_region_present(bench.region), 1);
	bench_close(&bench);
}

/* A process that has installed billions of times still serves blocks never touched. */
static void epoch_beyond_32_bits(void)
{
	static const uint64_t epochs[] = { (1ULL << 31) + 5, (1ULL << 32) - 2, 3ULL << 32 };
	size_t index;

	for (index = 0; index < 3; index++) {
		struct bench bench;
		struct loop loop = { 0 };

		bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 1 });
		atomic_store(&bench.engine->epoch, epochs[index]);
		loop_start(&loop, &bench);
		CHECK(pattern_holds(at(bench.region, 0), 0, 4 * PAGE));
		loop_stop(&loop);
		bench_close(&bench);
	}
}

/* ------------------------------------------------------- answers on request */

static int answers, answer;

static bool sometimes(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode,
		      int64_t *done, int *result)
{
	if (answers-- > 0) {
		if (answer == -EEXIST)
			__real_au_abi_copy(fd, dst, src, PAGE, mode, done);
		*done = 0;
		*result = answer;
		return true;
	}
	if (answer == 1 && len > PAGE) { /* a page at a time, as when mappings change */
		__real_au_abi_copy(fd, dst, src, PAGE, mode, done);
		*result = -EAGAIN;
		return true;
	}
	return false;
}

static void partial(void)
{
	struct bench bench;
	int error;

	bench_open(&bench, (struct setup){ .length = 7 * PAGE, .block = 8 });
	answers = 0;
	answer = 1;
	on_copy = sometimes;
	CHECK_EQ(install_pattern(bench.region, 0, 7 * PAGE, &error), 7 * PAGE);
	CHECK_EQ(error, 0);
	on_copy = NULL;
	CHECK(pattern_holds(at(bench.region, 0), 0, 7 * PAGE));
	bench_close(&bench);
}

static void again_and_again(void)
{
	struct bench bench;
	int error;

	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 4 });
	on_copy = sometimes;
	answer = -EAGAIN;
	answers = 10;
	CHECK_EQ(install_pattern(bench.region, 0, 4 * PAGE, &error), 4 * PAGE);
	CHECK_EQ(error, 0);
	CHECK_EQ(counted(AU_COUNT_retries_eagain), 10);
	on_copy = NULL;
	bench_close(&bench);
}

static void *pattern_first(void *argument)
{
	CHECK_EQ(touch(argument, 0), pattern(0));
	return NULL;
}

/* It gives up in bounded time, with everything as before, and nobody is lost. */
static void again_for_ever(void)
{
	struct bench bench;
	struct au_entry entries[4];
	pthread_t toucher;
	int error;

	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 4, .no_sentry = true });
	toucher = spawn(pattern_first, bench.region);
	EVENTUALLY(readable(bench.fd));
	CHECK_EQ(au_engine_drain(bench.engine, entries, 4, AU_DRAIN_LOOP), 1);
	on_copy = sometimes;
	answer = -EAGAIN;
	answers = 1000000;
	CHECK_EQ(install_pattern(bench.region, 0, 4 * PAGE, &error), 0);
	CHECK_EQ(error, EAGAIN);
	CHECK_EQ(au_region_present(bench.region), 0);
	CHECK_EQ(au_slots_live(), 1);
	answer = -EFAULT;
	CHECK_EQ(install_pattern(bench.region, 0, 4 * PAGE, &error), 0);
	CHECK_EQ(error, EFAULT);
	on_copy = NULL;
	CHECK_EQ(install_pattern(bench.region, 0, 4 * PAGE, &error), 4 * PAGE);
	join(toucher);
	bench_close(&bench);
}

/* Somebody was faster.  The kernel wakes nobody for EEXIST. */
static void exists_already(void)
{
	struct bench bench;
	struct au_entry entries[4];
	uint8_t bytes[PAGE];
	pthread_t toucher;
	int error;

	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 4, .no_sentry = true });
	toucher = spawn(pattern_first, bench.region);
	EVENTUALLY(readable(bench.fd));
	CHECK_EQ(au_engine_drain(bench.engine, entries, 4, AU_DRAIN_LOOP), 1);
	pattern_fill(bytes, 0, PAGE);
	CHECK_EQ(__real_au_abi_copy(bench.fd, bench.region->start, (uint64_t)(uintptr_t)bytes, PAGE,
				    AU_COPY_MODE_DONTWAKE, NULL), 0);
	CHECK_EQ(install_pattern(bench.region, 0, 4 * PAGE, &error), 4 * PAGE);
	CHECK_EQ(counted(AU_COUNT_already_present), 1);
	join(toucher);
	CHECK(pattern_holds(at(bench.region, 0), 0, 4 * PAGE));
	bench_close(&bench);
}

/* ------------------------------------------------------ mappings that change */

static void *forget_page(void *argument)
{
	struct au_region *region = argument;

	CHECK_EQ(madvise(at(region, 3 * PAGE), PAGE, MADV_DONTNEED), 0);
	return NULL;
}

/* While an event is unread every ioctl answers EAGAIN: the installer reads it. */
static void event_in_the_way(void)
{
	struct bench bench;
	struct au_entry entries[4];
	pthread_t thread;
	int error;

	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 1, .no_sentry = true,
					   .features = AU_FEATURE_EVENT_REMOVE });
	install_pattern(bench.region, 3 * PAGE, PAGE, &error);
	thread = spawn(forget_page, bench.region);
	EVENTUALLY(readable(bench.fd));
	CHECK_EQ(install_pattern(bench.region, 0, PAGE, &error), PAGE);
	CHECK_EQ(error, 0);
	CHECK(counted(AU_COUNT_retries_eagain) > 0);
	join(thread);
	CHECK_EQ(au_region_present(bench.region), 1); /* the event was applied as well */
	CHECK_EQ(au_engine_drain(bench.engine, entries, 4, AU_DRAIN_LOOP), 1);
	CHECK_EQ(entries[0].kind, AU_ENTRY_EVENT);
	CHECK_EQ(entries[0].message.event, AU_EVENT_REMOVE);
	bench_close(&bench);
}

/* The sentry reads events while nobody else does: drop does not deadlock on its own. */
static void drop_with_events(void)
{
	struct bench bench;
	int error, round;

	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 1,
					   .features = AU_FEATURE_EVENT_REMOVE });
	for (round = 0; round < 20; round++) {
		CHECK_EQ(install_pattern(bench.region, 0, 4 * PAGE, &error), 4 * PAGE);
		CHECK_EQ(au_region_drop(bench.region, 0, 4 * PAGE), 0);
		CHECK_EQ(au_region_present(bench.region), 0);
	}
	bench_close(&bench);
}

/* ---------------------------------------------- a retry that finds new faults */

static struct bench nested;
static pthread_t nested_toucher;
static _Atomic int nested_calls;

static void *touch_late_page(void *argument)
{
	(void)argument;
	CHECK_EQ(touch(nested.region, 5 * PAGE), pattern(5 * PAGE));
	return NULL;
}

static bool fault_meanwhile(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode,
			    int64_t *done, int *result)
{
	(void)fd;
	(void)dst;
	(void)src;
	(void)len;
	(void)mode;
	if (atomic_fetch_add(&nested_calls, 1))
		return false;
	nested_toucher = spawn(touch_late_page, NULL);
	EVENTUALLY(readable(nested.fd));
	*done = 0;
	*result = -EAGAIN;
	return true;
}

/* The retry reads messages; serving one of the same block must not wait for the very
 * pages that the retrying call itself has under way. */
static void retry_meets_its_own_pages(void)
{
	static uint8_t bytes[8 * PAGE];
	int error;

	bench_open(&nested, (struct setup){ .length = 8 * PAGE, .block = 8, .no_sentry = true });
	pattern_fill(bytes, 0, sizeof bytes);
	CHECK_EQ(au_region_set_backing(nested.region, bytes, sizeof bytes), 0);
	/* A present page parts the block: the call works on the pages before it. */
	install_pattern(nested.region, 4 * PAGE, PAGE, &error);
	on_copy = fault_meanwhile;
	CHECK_EQ(install_pattern(nested.region, 0, 4 * PAGE, &error), 4 * PAGE);
	CHECK_EQ(error, 0);
	on_copy = NULL;
	EVENTUALLY(readable(nested.fd) || au_region_present(nested.region) == 8);
	while (au_region_present(nested.region) != 8)
		au_engine_pump(nested.engine);
	join(nested_toucher);
	bench_close(&nested);
}

/* -------------------------------------------------------------- concurrency */

static void *installs_all(void *argument)
{
	struct au_region *region = argument;
	int error;

	CHECK_EQ(install_pattern(region, 0, region->object_length, &error), region->object_length);
	CHECK_EQ(error, 0);
	return NULL;
}

static void many_installers(void)
{
	int round, index;

	for (round = 0; round < 20; round++) {
		struct bench bench;
		pthread_t threads[6];

		bench_open(&bench, (struct setup){ .length = 64 * PAGE + 9, .block = 4 });
		for (index = 0; index < 6; index++)
			threads[index] = spawn(installs_all, bench.region);
		for (index = 0; index < 6; index++)
			join(threads[index]);
		CHECK_EQ(au_region_present(bench.region), 65);
		CHECK(pattern_holds(at(bench.region, 0), 0, 64 * PAGE + 9));
		bench_close(&bench);
	}
}

const struct test install_tests[] = {
	{ "install: the rest of the last page is zero", tail_is_zero, 0, NULL },
	{ "install: pages that are there are left alone", skips_what_is_there, 0, NULL },
	{ "install: poison heals", heals_poison, 0, NULL },
	{ "install: shared memory, through and around its cache", shared_memory, 0, NULL },
	{ "install: a minor fault is served without a loop", soft_eviction, 0, NULL },
	{ "install: a block whose mapping went comes back at once", block_comes_back, 0, NULL },
	{ "install: so does a large one, in parts", large_block_comes_back, 0, NULL },
	{ "install: a minor fault whose bytes went is a miss", gone_from_the_cache, 0, NULL },
	{ "install: huge pages", huge_pages, 0, NULL },
	{ "install: an empty pool of huge pages is an error", huge_pool_is_empty, 0, NULL },
	{ "install: a generation that moved is refused", generations, 0, NULL },
	{ "install: more than 2**32 installs", epoch_beyond_32_bits, 0, NULL },
	{ "install: partial answers", partial, 0, NULL },
	{ "install: EAGAIN some times", again_and_again, 0, NULL },
	{ "install: EAGAIN for ever, and an error", again_for_ever, 0, NULL },
	{ "install: EEXIST wakes", exists_already, 0, NULL },
	{ "install: an unread event is read", event_in_the_way, 0, NULL },
	{ "install: drop while events are on", drop_with_events, 0, NULL },
	{ "install: a retry does not wait for its own pages", retry_meets_its_own_pages, 0, NULL },
	{ "install: many threads, the same pages", many_installers, 0, NULL },
	{ 0 },
};
