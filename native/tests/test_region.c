/* Regions: who fetches which block, what is known of pages, where regions are. */
#include "harness.h"

#include <stdlib.h>
#include <string.h>

static void begin_end(void)
{
	struct bench bench;
	uint8_t taken[8], wanted[8];
	int error;

	bench_open(&bench, (struct setup){ .length = 30 * PAGE, .block = 4 });
	CHECK_EQ(bench.region->blocks, 8);
	CHECK_EQ(au_region_begin(bench.region, 0, 3, 0, taken), 3);
	CHECK_EQ(au_region_begin(bench.region, 2, 6, 0, taken), 5);
	CHECK_EQ(taken[0], 0);
	CHECK_EQ(taken[1], 1);
	CHECK_EQ(au_region_end(bench.region, 2, 1, 1, wanted), 0);
	CHECK_EQ(au_region_begin(bench.region, 2, 1, 0, taken), 1);
	/* A complete block is nobody's any more and cannot be taken. */
	CHECK_EQ(install_pattern(bench.region, 0, 4 * PAGE, &error), 4 * PAGE);
	CHECK_EQ(au_region_begin(bench.region, 0, 1, 0, taken), 0);
	/* The last block is short: two pages complete it. */
	CHECK_EQ(install_pattern(bench.region, 28 * PAGE, 2 * PAGE, &error), 2 * PAGE);
	CHECK_EQ(au_region_begin(bench.region, 7, 1, 0, taken), 0);
	/* A poisoned block counts as complete, unless it is to be healed. */
	au_region_install(bench.region, AU_OP_POISON, 4 * PAGE, NULL, 4 * PAGE, 0, UINT64_MAX,
			  &error);
	CHECK_EQ(au_region_begin(bench.region, 1, 1, 0, taken), 0);
	CHECK_EQ(au_region_begin(bench.region, 1, 1, 1, taken), 1);
	CHECK_EQ(au_region_begin(bench.region, 7, 2, 0, taken), -EINVAL);
	CHECK_EQ(au_region_end(bench.region, UINT64_MAX, 2, 0, wanted), -EINVAL);
	bench_close(&bench);
}

static void check_and_runs(void)
{
	struct bench bench;
	uint64_t starts[8], lengths[8], where = 99, next;
	uint8_t states[8];
	int error;

	bench_open(&bench, (struct setup){ .length = 10 * PAGE - 5, .block = 2 });
	CHECK_EQ(bench.region->length, 10 * PAGE);
	install_pattern(bench.region, 2 * PAGE, 2 * PAGE, &error);
	au_region_install(bench.region, AU_OP_POISON, 6 * PAGE, NULL, PAGE, 0, UINT64_MAX, &error);
	CHECK_EQ(au_region_check(bench.region, 2 * PAGE, 2 * PAGE, &where), 1);
	CHECK_EQ(au_region_check(bench.region, 2 * PAGE + 5, PAGE, &where), 1);
	CHECK_EQ(au_region_check(bench.region, PAGE + 5, PAGE, &where), 0);
	CHECK_EQ(where, PAGE);
	CHECK_EQ(au_region_check(bench.region, 6 * PAGE, 1, &where), -EIO);
	CHECK_EQ(where, 6 * PAGE);
	CHECK_EQ(au_region_check(bench.region, 10 * PAGE, 0, &where), 1);
	CHECK_EQ(au_region_check(bench.region, 10 * PAGE, 1, &where), -EINVAL);
	CHECK_EQ(au_region_check(bench.region, 1, UINT64_MAX, &where), -EINVAL);
	CHECK_EQ(au_region_runs(bench.region, 0, 10 * PAGE, starts, lengths, states, 8, &next), 5);
	CHECK_EQ(next, 10 * PAGE);
	CHECK_EQ(starts[1], 2 * PAGE);
	CHECK_EQ(lengths[1], 2 * PAGE);
	CHECK_EQ(states[1], AU_PAGE_PRESENT);
	CHECK_EQ(states[3], AU_PAGE_POISONED);
	CHECK_EQ(lengths[4], 3 * PAGE);
	/* In pieces. */
	CHECK_EQ(au_region_runs(bench.region, 0, 10 * PAGE, starts, lengths, states, 2, &next), 2);
	CHECK_EQ(next, 4 * PAGE);
	CHECK_EQ(au_region_present(bench.region), 2);
	CHECK_EQ(au_region_poisoned(bench.region), 1);
	bench_close(&bench);
}

static void registry(void)
{
	enum { COUNT = 300 };
	struct bench bench;
	struct au_region *regions[COUNT];
	struct au_region *found;
	uint64_t offset;
	int index, error;

	bench_open(&bench, (struct setup){ 0 });
	for (index = 0; index < COUNT; index++) {
		regions[index] = au_region_create(bench.engine, 2 * PAGE, AU_KIND_ANONYMOUS, 0, 0,
						  &error);
		CHECK(regions[index]);
	}
	for (index = 0; index < COUNT; index++) {
		CHECK(au_regions_find(regions[index]->start + 17, &offset, &found));
		CHECK_EQ(offset, 17);
		CHECK(au_regions_overlap(regions[index]->start - 1, 2));
	}
	for (index = 0; index < COUNT; index += 2) {
		CHECK_EQ(au_region_close(regions[index], 1), 0);
		CHECK_EQ(au_region_close(regions[index], 1), -EALREADY);
		au_region_free(regions[index]);
	}
	for (index = 1; index < COUNT; index += 2) {
		CHECK(au_regions_find(regions[index]->start + PAGE, &offset, &found));
		au_region_close(regions[index], 1);
		CHECK(!au_regions_find(regions[index]->start + PAGE, &offset, &found));
		au_region_free(regions[index]);
	}
	CHECK(!au_regions_overlap(0, UINT64_MAX / 2));
	bench_close(&bench);
}

static void refusals(void)
{
	struct bench bench;
	uint8_t bytes[PAGE];
	int error;

	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 1 });
	CHECK(!au_region_create(bench.engine, 0, AU_KIND_ANONYMOUS, 0, 0, &error));
	CHECK_EQ(error, EINVAL);
	CHECK(!au_region_create(bench.engine, PAGE, AU_KIND_ANONYMOUS, 0, 3 * PAGE, &error));
	CHECK(!au_region_create(bench.engine, PAGE, AU_KIND_ANONYMOUS, 0, PAGE / 2, &error));
	CHECK(!au_region_create(bench.engine, PAGE, 9, 0, 0, &error));
	CHECK_EQ(au_region_set_backing(bench.region, bytes, PAGE), -EINVAL);
	CHECK_EQ(au_region_set_backing(bench.region, at(bench.region, 0), 4 * PAGE), -EINVAL);
	CHECK_EQ(au_region_drop(bench.region, 1, PAGE), -EINVAL);
	CHECK_EQ(au_region_drop(bench.region, 0, 5 * PAGE), -EINVAL);
	CHECK_EQ(au_region_install(bench.region, AU_OP_COPY, 0, at(bench.region, 0), PAGE, 0,
				   UINT64_MAX, &error), 0);
	CHECK_EQ(error, EINVAL);
	CHECK_EQ(au_region_install(bench.region, AU_OP_COPY, 1, bytes, PAGE, 0, UINT64_MAX, &error),
		 0);
	CHECK_EQ(error, EINVAL);
	CHECK_EQ(au_region_install(bench.region, AU_OP_COPY, 0, bytes, 100, 0, UINT64_MAX, &error),
		 0);
	CHECK_EQ(error, EINVAL);
	CHECK_EQ(au_region_install(bench.region, AU_OP_WAKE, 0, NULL, PAGE, 0, UINT64_MAX, &error),
		 0);
	CHECK_EQ(error, EINVAL);
	CHECK_EQ(au_region_present(bench.region), 0);
	bench_close(&bench);
}

static void drops(void)
{
	static const int kinds[] = { AU_KIND_ANONYMOUS, AU_KIND_MEMFD };
	int index, error;

	for (index = 0; index < 2; index++) {
		struct bench bench;
		struct loop loop = { 0 };
		uint32_t generation;

		bench_open(&bench, (struct setup){ .length = 8 * PAGE, .block = 2,
						   .kind = kinds[index] });
		install_pattern(bench.region, 0, 8 * PAGE, &error);
		generation = au_region_generation(bench.region, 1);
		memset(at(bench.region, 2 * PAGE), 0xee, PAGE);
		CHECK_EQ(au_region_drop(bench.region, 2 * PAGE, 4 * PAGE), 0);
		CHECK_EQ(au_region_present(bench.region), 4);
		CHECK(au_region_generation(bench.region, 1) != generation);
		loop_start(&loop, &bench);
		CHECK(pattern_holds(at(bench.region, 0), 0, 8 * PAGE));
		CHECK_EQ(atomic_load(&loop.misses), 2);
		loop_stop(&loop);
		bench_close(&bench);
	}
}

/* Whoever may not write may still forget. */
static void drops_read_only_shared_memory(void)
{
	struct bench bench;
	struct au_region *region;
	int error;

	bench_open(&bench, (struct setup){ 0 });
	region = au_region_create(bench.engine, 4 * PAGE, AU_KIND_MEMFD, 0, 0, &error);
	CHECK(region);
	install_pattern(region, 0, 4 * PAGE, &error);
	CHECK_EQ(au_region_drop(region, PAGE, PAGE), 0);
	CHECK_EQ(au_region_present(region), 3);
	au_region_close(region, 1);
	au_region_free(region);
	bench_close(&bench);
}

/* Eviction under readers: whatever the order, the bytes are right. */
static struct bench racing;
static _Atomic int stop_racing;

static void *reader(void *argument)
{
	uint64_t seed = (uint64_t)(uintptr_t)argument;

	while (!atomic_load(&stop_racing)) {
		uint64_t offset;

		seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
		offset = (seed >> 33) % (16 * PAGE);
		CHECK_EQ(touch(racing.region, offset), pattern(offset));
	}
	return NULL;
}

static void drop_against_touch(void)
{
	struct loop loop = { 0 };
	pthread_t threads[3];
	uintptr_t index;
	int round;

	bench_open(&racing, (struct setup){ .length = 16 * PAGE, .block = 2 });
	loop_start(&loop, &racing);
	for (index = 0; index < 3; index++)
		threads[index] = spawn(reader, (void *)(index + 1));
	for (round = 0; round < (UNDER_TSAN ? 300 : 3000); round++)
		CHECK_EQ(au_region_drop(racing.region, (uint64_t)(round % 8) * 2 * PAGE, 4 * PAGE *
					(round % 8 != 7) + 2 * PAGE * (round % 8 == 7)), 0);
	atomic_store(&stop_racing, 1);
	for (index = 0; index < 3; index++)
		join(threads[index]);
	loop_stop(&loop);
	bench_close(&racing);
}

const struct test region_tests[] = {
	{ "region: blocks begin and end", begin_end, 0, NULL },
	{ "region: check and runs", check_and_runs, 0, NULL },
	{ "region: the registry of hundreds", registry, 0, NULL },
	{ "region: what is refused", refusals, 0, NULL },
	{ "region: dropped pages come again", drops, 0, NULL },
	{ "region: read-only shared memory can be dropped", drops_read_only_shared_memory, 0, NULL },
	{ "region: drop against touch", drop_against_touch, 0, NULL },
	{ 0 },
};
