/* Closing: whoever waits gets an error, never zeros, and never waits for ever. */
#include "harness.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static struct bench bench;

static void *guarded(void *argument)
{
	uint64_t offset = (uint64_t)(uintptr_t)argument, where = 0;
	uint8_t bytes[PAGE];

	return (void *)(intptr_t)au_region_read(bench.region, offset, bytes, PAGE, &where);
}

static void blocked_reader(uint64_t length, int unmap, bool read_first)
{
	struct au_entry entry;
	pthread_t threads[3];
	uint64_t messages = counted(AU_COUNT_messages);
	int index;

	bench_open(&bench, (struct setup){ .length = length, .block = 4, .no_sentry = true });
	for (index = 0; index < 3; index++)
		threads[index] = spawn(guarded, (void *)(uintptr_t)(index * 5 * (int)PAGE));
	EVENTUALLY(readable(bench.fd));
	if (read_first)
		EVENTUALLY((au_engine_drain(bench.engine, &entry, 1, AU_DRAIN_LOOP),
			    counted(AU_COUNT_messages) >= messages + 3));
	CHECK_EQ(au_region_close(bench.region, unmap), 0);
	for (index = 0; index < 3; index++)
		CHECK_EQ((intptr_t)join(threads[index]), -EBADF);
	CHECK(guarded(NULL) == (void *)(intptr_t)-EBADF);
	bench_close(&bench);
}

static void readers_get_an_error(void)
{
	blocked_reader(16 * PAGE, 1, true);
	blocked_reader(16 * PAGE, 1, false);
	blocked_reader(16 * PAGE, 0, true);
	blocked_reader(16 * PAGE, 0, false);
}

/* Too large to be poisoned page by page. */
static void readers_of_huge_regions(void)
{
	blocked_reader(20ULL << 30, 1, true);
	blocked_reader(20ULL << 30, 0, true);
	blocked_reader(20ULL << 30, 0, false);
}

static void *raw(void *argument)
{
	(void)argument;
	touch(bench.region, 9 * PAGE);
	_exit(1); /* it must not see a byte */
}

static void raw_toucher(int unmap, bool read_first)
{
	struct au_entry entry;

	bench_open(&bench, (struct setup){ .length = 16 * PAGE, .block = 4, .no_sentry = true });
	if (!freopen("/dev/null", "w", stderr))
		_exit(1);
	spawn(raw, NULL);
	EVENTUALLY(readable(bench.fd));
	if (read_first)
		CHECK_EQ(au_engine_drain(bench.engine, &entry, 1, AU_DRAIN_LOOP), 1);
	au_region_close(bench.region, unmap);
	au_sleep_ns(5 * AU_NS_PER_S);
}

static void raw_read_unmap(void)
{
	raw_toucher(1, true);
}

static void raw_unread_unmap(void)
{
	raw_toucher(1, false);
}

static void raw_read_keep(void)
{
	raw_toucher(0, true);
}

static void raw_unread_keep(void)
{
	raw_toucher(0, false);
}

/* What was resident stays readable after a close without unmap; the rest is an error. */
static void what_is_resident_stays(void)
{
	int error;

	bench_open(&bench, (struct setup){ .length = 8 * PAGE, .block = 1 });
	install_pattern(bench.region, 2 * PAGE, 3 * PAGE, &error);
	CHECK_EQ(au_region_close(bench.region, 0), 0);
	CHECK(pattern_holds(at(bench.region, 2 * PAGE), 2 * PAGE, 3 * PAGE));
	CHECK_EQ(install_pattern(bench.region, 0, PAGE, &error), 0);
	CHECK_EQ(error, EBADF);
	CHECK_EQ(au_region_drop(bench.region, 2 * PAGE, PAGE), -EBADF);
	CHECK_EQ(write(-1, "", 0), -1);
	bench_close(&bench);
}

/* ----------------------------------------------------------------- a race */

static _Atomic int failures;

static void *reads_until_closed(void *argument)
{
	uint64_t seed = (uint64_t)(uintptr_t)argument, where = 0;
	uint8_t bytes[PAGE];
	int result;

	do {
		uint64_t offset;

		seed = seed * 6364136223846793005ULL + 1;
		offset = (seed >> 40) % 63 * PAGE + 11;
		result = au_region_read(bench.region, offset, bytes, PAGE - 11, &where);
		if (result == 0 && !pattern_holds(bytes, offset, PAGE - 11))
			atomic_fetch_add(&failures, 1);
	} while (result == 0);
	CHECK_EQ(result, -EBADF);
	return NULL;
}

static void *installs_until_closed(void *argument)
{
	int error = 0;
	uint64_t page = 0;

	(void)argument;
	while (error != EBADF) {
		install_pattern(bench.region, page % 64 * PAGE, PAGE, &error);
		au_region_drop(bench.region, (page + 9) % 64 * PAGE, PAGE);
		page += 7;
	}
	return NULL;
}

static void close_against_everything(void)
{
	int round;
	uintptr_t index;

	for (round = 0; round < (UNDER_TSAN ? 20 : 150); round++) {
		struct loop loop = { 0 };
		pthread_t threads[5];

		bench_open(&bench, (struct setup){ .length = 64 * PAGE, .block = 2 });
		loop_start(&loop, &bench);
		for (index = 0; index < 4; index++)
			threads[index] = spawn(reads_until_closed, (void *)(index + 3));
		threads[4] = spawn(installs_until_closed, NULL);
		au_sleep_ns((uint64_t)(round % 10) * 300000);
		CHECK_EQ(au_region_close(bench.region, round % 2), 0);
		for (index = 0; index < 5; index++)
			join(threads[index]);
		loop_stop(&loop);
		bench_close(&bench);
	}
	CHECK_EQ(atomic_load(&failures), 0);
}

/* The same with bytes at hand, whose faults leave no trace in the page table. */
static void close_against_bytes_at_hand(void)
{
	static uint8_t bytes[64 * PAGE];
	int round;
	uintptr_t index;

	pattern_fill(bytes, 0, sizeof bytes);
	for (round = 0; round < (UNDER_TSAN ? 40 : 300); round++) {
		pthread_t threads[4];

		bench_open(&bench, (struct setup){ .length = 64 * PAGE, .block = 1 });
		CHECK_EQ(au_region_set_backing(bench.region, bytes, sizeof bytes), 0);
		for (index = 0; index < 4; index++)
			threads[index] = spawn(reads_until_closed, (void *)(index + 3));
		au_sleep_ns((uint64_t)(round % 10) * 100000);
		CHECK_EQ(au_region_close(bench.region, 1), 0);
		for (index = 0; index < 4; index++)
			join(threads[index]);
		bench_close(&bench);
	}
	CHECK_EQ(atomic_load(&failures), 0);
}

#define TSAN_MAPS "it maps memory of its own where the region was"

const struct test close_tests[] = {
	{ "close: blocked guarded readers", readers_get_an_error, 0, NULL },
	{ "close: blocked readers of a region too large to poison", readers_of_huge_regions, 0, NULL },
	{ "close: a raw toucher, message read, unmapped", raw_read_unmap, ANY_FAULT, TSAN_MAPS },
	{ "close: a raw toucher, message unread, unmapped", raw_unread_unmap, ANY_FAULT, TSAN_MAPS },
	{ "close: a raw toucher, message read, kept", raw_read_keep, SIGBUS, NULL },
	{ "close: a raw toucher, message unread, kept", raw_unread_keep, SIGBUS, NULL },
	{ "close: what is resident stays readable", what_is_resident_stays, 0, NULL },
	{ "close: against readers, installers and drops", close_against_everything, 0, NULL },
	{ "close: against bytes at hand", close_against_bytes_at_hand, 0, NULL },
	{ 0 },
};
