/* The engine: reading, folding, the queue, engines without a page table. */
#include "harness.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct toucher {
	struct au_region *region;
	uint64_t offset;
	pthread_t thread;
};

static void *toucher_main(void *argument)
{
	struct toucher *toucher = argument;

	CHECK_EQ(touch(toucher->region, toucher->offset), pattern(toucher->offset));
	return NULL;
}

static void touch_from_thread(struct toucher *toucher, struct au_region *region, uint64_t offset)
{
	*toucher = (struct toucher){ .region = region, .offset = offset };
	toucher->thread = spawn(toucher_main, toucher);
}

/* Read until `count` messages were read in all. */
static int64_t drain_until(struct bench *bench, struct au_entry *entries, int64_t max,
			   uint64_t count)
{
	int64_t total = 0;

	EVENTUALLY((total += au_engine_drain(bench->engine, entries + total, max - total,
					     AU_DRAIN_LOOP),
		    counted(AU_COUNT_messages) >= count));
	return total;
}

static void one_miss_per_block(void)
{
	enum { COUNT = 24 };
	struct bench bench;
	struct toucher touchers[COUNT];
	struct au_entry entries[64];
	int index, error;

	bench_open(&bench, (struct setup){ .length = 8 * PAGE, .block = 8, .no_sentry = true });
	for (index = 0; index < COUNT; index++)
		touch_from_thread(&touchers[index], bench.region, (uint64_t)(index % 8) * PAGE + 3);
	CHECK_EQ(drain_until(&bench, entries, 64, COUNT), 1);
	CHECK_EQ(entries[0].kind, AU_ENTRY_MISS);
	CHECK_EQ(entries[0].region, bench.region->id);
	CHECK_EQ(entries[0].block, 0);
	CHECK_EQ(counted(AU_COUNT_misses), 1);
	CHECK_EQ(au_slots_live(), COUNT);
	CHECK_EQ(install_pattern(bench.region, 0, 8 * PAGE, &error), 8 * PAGE);
	for (index = 0; index < COUNT; index++)
		join(touchers[index].thread);
	CHECK_EQ(au_slots_live(), 0);
	CHECK_EQ(au_region_touched(bench.region), 1);
	bench_close(&bench);
}

static void hits_are_told_once(void)
{
	struct bench bench;
	struct toucher touchers[2];
	struct au_entry entries[8];
	uint8_t taken[1], wanted[1];
	int error;

	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 4, .no_sentry = true,
					   .options = AU_REGION_REPORT_HITS });
	CHECK_EQ(au_region_begin(bench.region, 0, 1, 0, taken), 1);
	touch_from_thread(&touchers[0], bench.region, 0);
	touch_from_thread(&touchers[1], bench.region, PAGE);
	CHECK_EQ(drain_until(&bench, entries, 8, 2), 1);
	CHECK_EQ(entries[0].kind, AU_ENTRY_HIT);
	/* The flight is given up, the wish is not. */
	CHECK_EQ(au_region_end(bench.region, 0, 1, 1, wanted), 1);
	CHECK_EQ(au_region_begin(bench.region, 0, 1, 0, taken), 0);
	install_pattern(bench.region, 0, 4 * PAGE, &error);
	join(touchers[0].thread);
	join(touchers[1].thread);
	bench_close(&bench);
}

/* Handing a block back wakes whoever waits, who asks again. */
static void handed_back(void)
{
	struct bench bench;
	struct toucher toucher;
	struct au_entry entries[8];
	uint8_t wanted[1];
	int round, error;

	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 4, .no_sentry = true });
	touch_from_thread(&toucher, bench.region, 2 * PAGE);
	for (round = 1; round <= 20; round++) {
		CHECK_EQ(drain_until(&bench, entries, 8, (uint64_t)round), 1);
		CHECK_EQ(entries[0].kind, AU_ENTRY_MISS);
		CHECK_EQ(au_region_end(bench.region, 0, 1, 0, wanted), 1);
	}
	install_pattern(bench.region, 0, 4 * PAGE, &error);
	join(toucher.thread);
	bench_close(&bench);
}

/* No loop reads: the sentry does, and its queue grows. */
static void queue_grows(void)
{
	enum { COUNT = 400 };
	struct bench bench;
	struct toucher *touchers = calloc(COUNT, sizeof *touchers);
	struct au_entry entries[64];
	uint8_t *seen = calloc(COUNT, 1);
	int64_t total = 0, count;
	int index, error;

	bench_open(&bench, (struct setup){ .length = COUNT * PAGE, .block = 1 });
	for (index = 0; index < COUNT; index++)
		touch_from_thread(&touchers[index], bench.region, (uint64_t)index * PAGE);
	EVENTUALLY(counted(AU_COUNT_misses) == COUNT);
	CHECK_EQ(au_slots_live(), COUNT);
	EVENTUALLY(readable(bench.engine->notify_fd));
	do {
		count = au_engine_drain(bench.engine, entries, 64, AU_DRAIN_LOOP);
		for (index = 0; index < count; index++) {
			CHECK_EQ(entries[index].kind, AU_ENTRY_MISS);
			CHECK_EQ(seen[entries[index].block]++, 0);
		}
		total += count;
	} while (count == 64);
	CHECK_EQ(total, COUNT);
	CHECK(!readable(bench.engine->notify_fd));
	CHECK_EQ(install_pattern(bench.region, 0, COUNT * PAGE, &error), COUNT * PAGE);
	for (index = 0; index < COUNT; index++)
		join(touchers[index].thread);
	free(touchers);
	free(seen);
	bench_close(&bench);
}

static void messages_of_nobody(void)
{
	struct bench bench;
	struct au_entry entries[4];

	bench_open(&bench, (struct setup){ 0 });
	CHECK_EQ(au_engine_drain(bench.engine, entries, 4, AU_DRAIN_LOOP), 0);
	CHECK_EQ(au_engine_drain(bench.engine, entries, 0, AU_DRAIN_LOOP), -EINVAL);
	CHECK_EQ(au_engine_pump(bench.engine), 0);
	au_engine_close(bench.engine);
	CHECK_EQ(au_engine_drain(bench.engine, entries, 4, AU_DRAIN_LOOP), -EBADF);
	CHECK_EQ(au_engine_pump(bench.engine), -EBADF);
	bench_close(&bench);
}

/* Served from memory of this process: no loop, no Python. */
static void bytes_at_hand(void)
{
	struct bench bench;
	uint64_t length = 20 * PAGE + 7;
	uint8_t *bytes = malloc(length);

	bench_open(&bench, (struct setup){ .length = length, .block = 4 });
	pattern_fill(bytes, 0, length);
	CHECK_EQ(au_region_set_backing(bench.region, bytes, length), 0);
	CHECK(pattern_holds(at(bench.region, 0), 0, length));
	CHECK_EQ(touch(bench.region, length), 0);
	EVENTUALLY(counted(AU_COUNT_native_serves) == 6);
	bench_close(&bench);
	free(bytes);
}

/* The bytes at hand end in the middle of a page, and the next page is lazy itself. */
static void bytes_at_hand_beside_lazy_memory(void)
{
	struct bench bench;
	struct au_region *neighbour;
	uint64_t length = 2 * PAGE + 8;
	uint8_t *bytes, *room;
	int error;

	bench_open(&bench, (struct setup){ .length = length, .block = 4 });
	neighbour = au_region_create(bench.engine, PAGE, AU_KIND_ANONYMOUS, 0, 0, &error);
	CHECK(neighbour);
	room = at(neighbour, 0) - 3 * PAGE;
	bytes = mmap(room, 3 * PAGE, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	if (bytes != room)
		test_skip("no room below the region");
	bytes += PAGE - 8; /* their end is a page before the neighbour, less than a page rounded */
	pattern_fill(bytes, 0, length);
	CHECK_EQ(au_region_set_backing(bench.region, bytes, length), 0);
	CHECK(pattern_holds(at(bench.region, 0), 0, length));
	au_region_close(neighbour, 1);
	au_region_free(neighbour);
	bench_close(&bench);
}

/* --------------------------------------------------- engines without a table */

static void *touch_raw(void *argument)
{
	return (void *)(uintptr_t)*(volatile uint8_t *)argument;
}

static void raw_engine(void)
{
	struct bench bench;
	struct au_entry entries[4];
	uint8_t bytes[2 * PAGE], *memory;
	uint64_t ioctls;
	int64_t done;
	pthread_t thread;
	int round;

	bench_open(&bench, (struct setup){ .engine_options = AU_ENGINE_RAW, .no_sentry = true });
	memory = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK_EQ(au_abi_register(bench.fd, (uint64_t)(uintptr_t)memory, 8 * PAGE,
				 AU_REGISTER_MODE_MISSING, &ioctls), 0);
	memset(bytes, 0x42, sizeof bytes);
	for (round = 0; round < 4; round++) {
		uint64_t page = (uint64_t)(uintptr_t)memory + (uint64_t)round * 2 * PAGE;

		thread = spawn(touch_raw, (void *)(uintptr_t)(page + PAGE + 5));
		EVENTUALLY(readable(bench.fd));
		CHECK_EQ(au_engine_drain(bench.engine, entries, 4, AU_DRAIN_LOOP), 1);
		CHECK_EQ(entries[0].kind, AU_ENTRY_RAW);
		CHECK_EQ(entries[0].message.arg.pagefault.address, page + PAGE);
		CHECK_EQ(au_slots_live(), 1);
		CHECK_EQ(au_engine_resolve(bench.engine, AU_OP_COPY, page,
					   (uint64_t)(uintptr_t)bytes, 2 * PAGE, 0, &done), 0);
		CHECK_EQ(done, 2 * PAGE);
		CHECK_EQ((uintptr_t)join(thread), 0x42);
		CHECK_EQ(au_slots_live(), 0);
		CHECK_EQ(au_engine_resolve(bench.engine, AU_OP_ZERO, page, 0, PAGE, 0, &done),
			 -EEXIST);
	}
	munmap(memory, 8 * PAGE);
	bench_close(&bench);
}

/* ------------------------------------------------------------- notification */

static struct bench notified;
static _Atomic int in_hook;

static void drain_between(int fd)
{
	struct au_entry entry;

	if (fd == notified.engine->notify_fd && !atomic_exchange(&in_hook, 1))
		CHECK_EQ(au_engine_drain(notified.engine, &entry, 1, AU_DRAIN_LOOP), 0);
}

/* A drain in the middle of a notification: a later one must still clear the descriptor,
 * else a loop turns for ever. */
static void notification_is_cleared(void)
{
	struct au_entry entry;

	bench_open(&notified, (struct setup){ .no_sentry = true });
	on_write = drain_between;
	au_engine_notify(notified.engine);
	on_write = NULL;
	CHECK(atomic_load(&in_hook));
	au_engine_drain(notified.engine, &entry, 1, AU_DRAIN_LOOP);
	CHECK(!readable(notified.engine->notify_fd));
	bench_close(&notified);
}

/* ------------------------------------------------------------ everything */

static struct bench busy;

static void *walks(void *argument)
{
	uint64_t step = (uint64_t)(uintptr_t)argument, page;

	for (page = 0; page < 512; page++) {
		uint64_t offset = (page * step % 512) * PAGE + page;

		CHECK_EQ(touch(busy.region, offset), pattern(offset));
	}
	return NULL;
}

static void loop_and_sentry(void)
{
	struct loop loop = { 0 };
	pthread_t threads[5];
	uintptr_t index;

	bench_open(&busy, (struct setup){ .length = 512 * PAGE, .block = 2 });
	loop_start(&loop, &busy);
	for (index = 0; index < 5; index++)
		threads[index] = spawn(walks, (void *)(2 * index + 1));
	for (index = 0; index < 5; index++)
		join(threads[index]);
	loop_stop(&loop);
	CHECK_EQ(atomic_load(&loop.misses), 256);
	CHECK_EQ(au_region_present(busy.region), 512);
	bench_close(&busy);
}

const struct test engine_tests[] = {
	{ "engine: many threads on one block are one miss", one_miss_per_block, 0, NULL },
	{ "engine: touches of a block in flight are told once", hits_are_told_once, 0, NULL },
	{ "engine: a block handed back is asked for again", handed_back, 0, NULL },
	{ "engine: the queue grows", queue_grows, 0, NULL },
	{ "engine: nothing to read, and closed", messages_of_nobody, 0, NULL },
	{ "engine: bytes at hand", bytes_at_hand, 0, NULL },
	{ "engine: bytes at hand beside lazy memory", bytes_at_hand_beside_lazy_memory, 0, NULL },
	{ "engine: without a page table", raw_engine, 0, NULL },
	{ "engine: a notification is cleared", notification_is_cleared, 0, NULL },
	{ "engine: loop and sentry together", loop_and_sentry, 0, NULL },
	{ 0 },
};
