/* fork: the child has nothing of the parent's, and can start afresh. */
#include "harness.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static struct bench bench;

/* What fork() in `body`'s process gives: exit status 0, else the line that failed. */
static void in_child(void (*body)(void))
{
	pid_t child = fork();
	int status;

	CHECK(child >= 0);
	if (child == 0) {
		body();
		_exit(0);
	}
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static int parents_fd, parents_notify;

static void looks_around(void)
{
	uint64_t where = 0;
	uint8_t byte[PAGE], taken[1];
	int error;

	CHECK_EQ(fcntl(parents_fd, F_GETFD), -1);
	CHECK_EQ(fcntl(parents_notify, F_GETFD), -1);
	CHECK_EQ(au_slots_live(), 0);
	CHECK_EQ(counted(AU_COUNT_live_slots), 0);
	CHECK(!au_regions_overlap(bench.region->start, PAGE));
	/* Calls on the parent's objects fail, and touch nothing. */
	CHECK_EQ(au_region_read(bench.region, 0, byte, 1, &where), -EBADF);
	CHECK_EQ(au_region_drop(bench.region, 0, PAGE), -EBADF);
	CHECK_EQ(install_pattern(bench.region, PAGE, PAGE, &error), 0);
	CHECK_EQ(error, EBADF);
	au_region_begin(bench.region, 0, 1, 0, taken);
}

static void *touch_second(void *argument)
{
	CHECK_EQ(touch(argument, PAGE), pattern(PAGE));
	return NULL;
}

static void child_has_nothing(void)
{
	struct au_entry entry;
	pthread_t thread;
	int error;

	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 1,
					   .kind = AU_KIND_MEMFD });
	install_pattern(bench.region, 0, PAGE, &error);
	parents_fd = bench.fd;
	parents_notify = bench.engine->notify_fd;
	thread = spawn(touch_second, bench.region);
	EVENTUALLY(au_slots_live() == 1);
	in_child(looks_around);
	/* The parent goes on as before. */
	EVENTUALLY(au_engine_drain(bench.engine, &entry, 1, AU_DRAIN_LOOP) == 1);
	install_pattern(bench.region, PAGE, PAGE, &error);
	join(thread);
	bench_close(&bench);
}

/* The parent's mapping is not the child's to unmap: its address may be in use again. */
static void frees_over_a_new_mapping(void)
{
	uint8_t *memory = mmap(at(bench.region, 0), 4 * PAGE, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

	CHECK(memory == at(bench.region, 0)); /* MADV_DONTFORK left it free */
	memory[0] = 77;
	au_region_close(bench.region, 1);
	au_region_free(bench.region);
	au_engine_free(bench.engine);
	CHECK_EQ(*(volatile uint8_t *)memory, 77);
}

static void child_frees(void)
{
	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 1 });
	in_child(frees_over_a_new_mapping);
	bench_close(&bench);
}

static void *reads_first(void *argument)
{
	uint64_t where = 0;
	uint8_t byte;

	return (void *)(intptr_t)au_region_read(argument, 0, &byte, 1, &where);
}

static void closes_what_the_parent_uses(void)
{
	au_region_close(bench.region, 1);
	au_region_free(bench.region);
	au_engine_free(bench.engine);
}

/* The fork caught the parent's threads inside: the child must not wait for them. */
static void child_closes_while_the_parent_reads(void)
{
	pthread_t thread;

	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 1 });
	thread = spawn(reads_first, bench.region);
	EVENTUALLY(atomic_load(&bench.region->readers) == 1 && au_slots_live() == 1);
	in_child(closes_what_the_parent_uses);
	au_region_close(bench.region, 1);
	CHECK_EQ((intptr_t)join(thread), -EBADF);
	bench_close(&bench);
}

static void starts_again(void)
{
	struct bench mine;
	struct loop loop = { .needs_gil = true };
	uint64_t page;

	atomic_store(&au_counters[AU_COUNT_live_engines], 0);
	atomic_store(&au_counters[AU_COUNT_live_regions], 0);
	bench_open(&mine, (struct setup){ .length = 8 * PAGE, .block = 1,
					  .engine_options = AU_ENGINE_YIELD });
	loop_start(&loop, &mine);
	for (page = 0; page < 8; page++) {
		if (!UNDER_TSAN)
			gil_take();
		CHECK_EQ(touch(mine.region, page * PAGE), pattern(page * PAGE));
		if (!UNDER_TSAN)
			gil_give();
	}
	loop_stop(&loop);
	bench_close(&mine);
}

static void child_starts_again(void)
{
	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 1 });
	in_child(starts_again);
	bench_close(&bench);
}

/* fork() waits in the kernel for its event with malloc's locks held: the sentry reads it. */
static void nothing(void)
{
}

static void fork_events_are_read(void)
{
	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 1,
					   .options = AU_REGION_FORK,
					   .features = AU_FEATURE_EVENT_FORK });
	in_child(nothing);
	EVENTUALLY(counted(AU_COUNT_events) == 1);
	bench_close(&bench);
}

#define TSAN_FORK "no threads may be made in a child of a process with threads"

const struct test fork_tests[] = {
	{ "fork: descriptors closed, slots gone, calls fail", child_has_nothing, 0, NULL },
	{ "fork: the child frees without unmapping", child_frees, 0, NULL },
	{ "fork: the child closes what the parent reads", child_closes_while_the_parent_reads, 0,
	  NULL },
	{ "fork: the child starts again", child_starts_again, 0, TSAN_FORK },
	{ "fork: its event is read by the sentry", fork_events_are_read, 0, NULL },
	{ 0 },
};
