/* Reads that ask for missing pages and give way to signals. */
#include "harness.h"

#include "demand.h"

#include <signal.h>
#include <string.h>
#include <unistd.h>

#define PAGES 64ULL

static struct bench bench;
static _Atomic int handled;

static void handle(int number)
{
	(void)number;
	atomic_fetch_add(&handled, 1);
}

static void open_bench(uint64_t block)
{
	bench_open(&bench, (struct setup){ .length = PAGES * PAGE - 100, .block = block });
}

/* To the end, however often it gives way. */
static int read_all(uint64_t offset, uint8_t *bytes, uint64_t length, int *ways, uint64_t *where)
{
	struct au_wait wait = { 0 };
	uint64_t start = offset, stop = offset + length;
	int result;

	while ((result = au_wait_read(bench.region, offset, bytes + (offset - start),
				      stop - offset, &wait)) == -EINTR) {
		++*ways;
		offset = wait.at;
	}
	*where = wait.at;
	return result;
}

static void served_by_the_loop(void)
{
	static uint8_t bytes[PAGES * PAGE];
	struct loop loop = { .think_ns = AU_NS_PER_MS };
	uint64_t where;
	int ways = 0;

	open_bench(4);
	loop_start(&loop, &bench);
	CHECK_EQ(read_all(5, bytes, PAGES * PAGE - 105, &ways, &where), 0);
	CHECK(pattern_holds(bytes, 5, PAGES * PAGE - 105));
	CHECK_EQ(atomic_load(&loop.misses), PAGES / 4);
	CHECK_EQ(counted(AU_COUNT_messages), 0); /* nothing was touched before it was there */
	CHECK_EQ(au_slots_live(), 0);
	loop_stop(&loop);
	bench_close(&bench);
}

static void found_across_windows(void)
{
	struct loop loop = { 0 };
	struct au_wait wait = { 0 };
	uint8_t needle[8];
	int result;

	bench_open(&bench, (struct setup){ .length = 1024 * PAGE, .block = 64 });
	loop_start(&loop, &bench);
	/* The end of the first window lies in its middle. */
	pattern_fill(needle, (1 << 20) - 4, sizeof needle);
	while ((result = au_wait_find(bench.region, wait.at, 1024 * PAGE - wait.at, needle,
				      sizeof needle, &wait)) == -EINTR)
		;
	CHECK_EQ(result, 0);
	CHECK(wait.found >= 0 && wait.found <= (1 << 20) - 4);
	CHECK(memcmp(at(bench.region, (uint64_t)wait.found), needle, sizeof needle) == 0);
	memset(needle, 0, sizeof needle);
	wait = (struct au_wait){ 0 };
	while ((result = au_wait_find(bench.region, wait.at, 1024 * PAGE - wait.at, needle,
				      sizeof needle, &wait)) == -EINTR)
		;
	CHECK_EQ(result, 0);
	CHECK_EQ(wait.found, -1);
	loop_stop(&loop);
	bench_close(&bench);
}

static void bytes_at_hand(void)
{
	static uint8_t object[PAGES * PAGE], bytes[PAGES * PAGE];
	uint64_t where;
	int ways = 0;

	pattern_fill(object, 0, sizeof object);
	open_bench(4);
	CHECK_EQ(au_region_set_backing(bench.region, object, sizeof object), 0);
	CHECK_EQ(read_all(PAGE + 1, bytes, 9 * PAGE, &ways, &where), 0);
	CHECK(pattern_holds(bytes, PAGE + 1, 9 * PAGE));
	CHECK_EQ(ways, 0);
	bench_close(&bench);
}

static void *interrupts(void *argument)
{
	pthread_t *reader = argument;

	EVENTUALLY(au_slots_live() == 1);
	au_sleep_ns(2 * AU_NS_PER_MS);
	pthread_kill(*reader, SIGUSR1);
	return NULL;
}

static void gives_way_to_a_signal(void)
{
	struct sigaction action = { .sa_handler = handle, .sa_flags = SA_RESTART };
	struct au_wait wait = { 0 };
	pthread_t self = pthread_self(), other;
	uint8_t byte;
	int error;

	sigaction(SIGUSR1, &action, NULL);
	open_bench(1);
	other = spawn(interrupts, &self);
	while (!atomic_load(&handled))
		CHECK_EQ(au_wait_read(bench.region, PAGE, &byte, 1, &wait), -EINTR);
	join(other);
	/* It goes on standing in line, with the time that it has waited. */
	CHECK_EQ(au_slots_live(), 1);
	CHECK_EQ(au_wait_read(bench.region, PAGE, &byte, 1, &wait), -EINTR);
	CHECK_EQ(au_slots_live(), 1);
	install_pattern(bench.region, PAGE, PAGE, &error);
	CHECK_EQ(au_slots_live(), 0);
	CHECK_EQ(au_wait_read(bench.region, PAGE, &byte, 1, &wait), 0);
	CHECK_EQ(byte, pattern(PAGE));
	/* Or leaves. */
	CHECK_EQ(au_wait_read(bench.region, 2 * PAGE, &byte, 1, &wait), -EINTR);
	au_wait_end(&wait);
	CHECK_EQ(au_slots_live(), 0);
	bench_close(&bench);
}

static void poisoned(void)
{
	uint8_t bytes[2 * PAGE];
	uint64_t where;
	int error, ways = 0;

	open_bench(1);
	install_pattern(bench.region, 0, PAGE, &error);
	au_region_install(bench.region, AU_OP_POISON, PAGE, NULL, PAGE, 0, UINT64_MAX, &error);
	CHECK_EQ(read_all(7, bytes, PAGE + 10, &ways, &where), -EIO);
	CHECK_EQ(where, PAGE);
	CHECK_EQ(counted(AU_COUNT_guarded_faults), 0);
	CHECK_EQ(read_all(0, bytes, PAGES * PAGE + 1, &ways, &where), -EINVAL);
	bench_close(&bench);
}

static void *closes(void *argument)
{
	EVENTUALLY(au_slots_live() == 1);
	return (void *)(intptr_t)au_region_close(bench.region, argument != NULL);
}

static void close_meanwhile(bool unmap)
{
	uint8_t byte;
	uint64_t where;
	int ways = 0;
	pthread_t closer;

	open_bench(1);
	closer = spawn(closes, unmap ? &bench : NULL);
	CHECK_EQ(read_all(0, &byte, 1, &ways, &where), -EBADF);
	CHECK_EQ((intptr_t)join(closer), 0);
	CHECK_EQ(au_slots_live(), 0);
	bench_close(&bench);
}

static void closed(void)
{
	close_meanwhile(false);
}

static void closed_and_unmapped(void)
{
	close_meanwhile(true);
}

/* A loop that does not come: the sentry calls for the rescue, once. */
static void rescued(void)
{
	struct loop rescue = { .rescue = true };
	uint8_t byte;
	uint64_t where;
	int ways = 0;

	open_bench(1);
	loop_start(&rescue, &bench);
	au_engine_set_times(bench.engine, 50000, 5 * AU_NS_PER_MS, AU_NS_PER_S);
	CHECK_EQ(read_all(0, &byte, 1, &ways, &where), 0);
	CHECK_EQ(byte, pattern(0));
	CHECK_EQ(counted(AU_COUNT_rescues), 1);
	loop_stop(&rescue);
	bench_close(&bench);
}

static void *reads_and_checks(void *argument)
{
	uint8_t bytes[3 * PAGE];
	uint64_t round, where, offset;
	int ways = 0;

	for (round = 0; round < 300; round++) {
		offset = ((uint64_t)(uintptr_t)argument * 7919 + round * 104729) %
			 ((PAGES - 4) * PAGE);
		CHECK_EQ(read_all(offset, bytes, sizeof bytes, &ways, &where), 0);
		CHECK(pattern_holds(bytes, offset, sizeof bytes));
	}
	return NULL;
}

static void many_threads(void)
{
	struct loop loop = { 0 };
	pthread_t threads[4];
	uint64_t round;
	int index;

	open_bench(2);
	loop_start(&loop, &bench);
	for (index = 0; index < 4; index++)
		threads[index] = spawn(reads_and_checks, (void *)(uintptr_t)(index + 1));
	for (round = 0; round < 500; round++)
		au_region_drop(bench.region, round % PAGES * PAGE, PAGE);
	for (index = 0; index < 4; index++)
		join(threads[index]);
	CHECK_EQ(au_slots_live(), 0);
	loop_stop(&loop);
	bench_close(&bench);
}

const struct test demand_tests[] = {
	{ "demand: served by the loop", served_by_the_loop, 0, NULL },
	{ "demand: a match across two windows", found_across_windows, 0, NULL },
	{ "demand: bytes at hand", bytes_at_hand, 0, NULL },
	{ "demand: gives way to a signal", gives_way_to_a_signal, 0, TSAN_DEFERS },
	{ "demand: poison is an error", poisoned, 0, NULL },
	{ "demand: closed meanwhile", closed, 0, NULL },
	{ "demand: closed and unmapped meanwhile", closed_and_unmapped, 0, NULL },
	{ "demand: rescued", rescued, 0, NULL },
	{ "demand: many threads while pages come and go", many_threads, 0, NULL },
	{ 0 },
};
