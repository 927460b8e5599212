/* Guarded copies over poison, and the neighbours on SIGBUS. */
#include "harness.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static struct bench bench;

static void open_poisoned(void)
{
	int error;

	bench_open(&bench, (struct setup){ .length = 4 * PAGE, .block = 1 });
	install_pattern(bench.region, 0, 4 * PAGE, &error);
	CHECK_EQ(au_region_drop(bench.region, 2 * PAGE, PAGE), 0);
	au_region_install(bench.region, AU_OP_POISON, 2 * PAGE, NULL, PAGE, 0, UINT64_MAX, &error);
}

static void check_copies(void)
{
	uint8_t bytes[4 * PAGE], needle[4];
	uint64_t where = 0;
	int64_t found = 0;
	int round;

	for (round = 0; round < 3; round++) {
		CHECK_EQ(au_region_read(bench.region, 0, bytes, 2 * PAGE, &where), 0);
		CHECK(pattern_holds(bytes, 0, 2 * PAGE));
		CHECK_EQ(au_region_read(bench.region, 0, bytes, 4 * PAGE, &where), -EIO);
		CHECK_EQ(where & ~(PAGE - 1), 2 * PAGE);
		CHECK_EQ(au_region_touch(bench.region, 5, 4 * PAGE - 5, &where), -EIO);
		CHECK_EQ(where & ~(PAGE - 1), 2 * PAGE);
		pattern_fill(needle, PAGE + 40, sizeof needle);
		CHECK_EQ(au_region_find(bench.region, PAGE + 1, PAGE - 1, needle, 4, &where, &found),
			 0);
		CHECK_EQ(found, PAGE + 40);
		CHECK_EQ(au_region_find(bench.region, 2 * PAGE, PAGE, needle, 4, &where, &found),
			 -EIO);
	}
	/* What is known to be an error was not touched. */
	CHECK_EQ(counted(AU_COUNT_guarded_faults), 0);
	CHECK_EQ(au_region_read(bench.region, PAGE, bytes, 4 * PAGE, &where), -EINVAL);
	for (round = 0; round < 3; round++) {
		CHECK_EQ(au_guard_copy(bytes, at(bench.region, 0), 4 * PAGE, &where), -EIO);
		CHECK_EQ((where - bench.region->start) & ~(PAGE - 1), 2 * PAGE);
		CHECK_EQ(au_guard_touch(at(bench.region, 5), 4 * PAGE - 5, PAGE, &where), -EIO);
		CHECK_EQ((where - bench.region->start) & ~(PAGE - 1), 2 * PAGE);
		CHECK_EQ(au_guard_find(at(bench.region, 2 * PAGE), PAGE, needle, 4, &where), -EIO);
	}
	CHECK(counted(AU_COUNT_guarded_faults) >= 9);
	bench_close(&bench);
}

static void over_poison(void)
{
	open_poisoned();
	check_copies();
}

static void *reads_poison(void *argument)
{
	uint8_t bytes[PAGE];
	uint64_t where = 0;
	int round;

	(void)argument;
	for (round = 0; round < 500; round++) {
		CHECK_EQ(au_guard_copy(bytes, at(bench.region, 2 * PAGE), PAGE, &where), -EIO);
		CHECK_EQ(au_guard_copy(bytes, at(bench.region, PAGE), PAGE, &where), 0);
	}
	return NULL;
}

static void many_at_once(void)
{
	pthread_t threads[4];
	int index;

	open_poisoned();
	for (index = 0; index < 4; index++)
		threads[index] = spawn(reads_poison, NULL);
	for (index = 0; index < 4; index++)
		join(threads[index]);
	bench_close(&bench);
}

static void raw_touch(void)
{
	open_poisoned();
	if (!freopen("/dev/null", "w", stderr)) /* the explanation that it prints */
		_exit(1);
	touch(bench.region, 2 * PAGE);
}

/* A system call gets an error, not a signal. */
static void system_call(void)
{
	int ends[2];

	open_poisoned();
	CHECK_EQ(pipe(ends), 0);
	CHECK_EQ(write(ends[1], at(bench.region, 2 * PAGE), 10), -1);
	CHECK_EQ(errno, EFAULT);
	bench_close(&bench);
}

/* ------------------------------------------------------------- neighbours */

static sigjmp_buf foreign_back;
static _Atomic int foreign_calls;

static void foreign(int number)
{
	(void)number;
	atomic_fetch_add(&foreign_calls, 1);
	siglongjmp(foreign_back, 1);
}

static char *truncated_file(void)
{
	int fd = memfd_create("short", 0);
	char *memory;

	CHECK(fd >= 0);
	memory = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(memory != MAP_FAILED);
	return memory;
}

/* Others guard their mapped files the same way, and go on afterwards. */
static void foreign_guard(void)
{
	struct sigaction action = { .sa_handler = foreign };
	volatile int round = 0;
	char *memory = truncated_file();

	sigaction(SIGBUS, &action, NULL);
	open_poisoned();
	for (round = 0; round < 5; round++)
		if (!sigsetjmp(foreign_back, 1)) {
			(void)*(volatile char *)memory;
			test_fail(__FILE__, __LINE__, "no SIGBUS");
		}
	CHECK_EQ(atomic_load(&foreign_calls), 5);
	check_copies();
}

static struct sigaction replaced;

static void foreign_in_front(int number, siginfo_t *info, void *context)
{
	if (atomic_fetch_add(&foreign_calls, 1) > 1000)
		_exit(1);
	if (replaced.sa_flags & SA_SIGINFO)
		replaced.sa_sigaction(number, info, context);
}

/* Whoever came after us chains to us, and we to them: it still ends. */
static void chained_in_a_circle(void)
{
	struct sigaction action = { .sa_sigaction = foreign_in_front, .sa_flags = SA_SIGINFO };

	open_poisoned();
	sigaction(SIGBUS, &action, &replaced);
	CHECK_EQ(au_guard_start(), 0);
	(void)*(volatile char *)truncated_file();
}

static void reporter(int number)
{
	/* As crash reporters do: put back what was there, and raise again. */
	sigaction(SIGBUS, &replaced, NULL);
	raise(number);
}

static void crash_reporter(void)
{
	struct sigaction action = { .sa_handler = reporter, .sa_flags = SA_NODEFER };

	open_poisoned();
	sigaction(SIGBUS, &action, &replaced);
	CHECK_EQ(au_guard_start(), 0);
	(void)*(volatile char *)truncated_file();
}

static void sent_by_kill(void)
{
	open_poisoned();
	raise(SIGBUS);
}

#define TSAN_BLOCKS "a jump out of a handler leaves its signal blocked"

/* What a memory error of the hardware leaves: a page that we know to be there, and SIGBUS.  (The
 * kernel can make real ones, MADV_HWPOISON, only where it is built to handle them.) */
static void break_page(uint64_t page)
{
	int64_t done;
	int result;

	CHECK_EQ(madvise(at(bench.region, page * PAGE), PAGE, MADV_DONTNEED), 0);
	result = au_abi_poison(bench.fd, bench.region->start + page * PAGE, PAGE, 0, &done);
	if (result == -EINVAL || result == -ENOTTY)
		test_skip("no POISON, which stands for the error: Linux 6.6");
	CHECK_EQ(result, 0);
}

static void open_breakable(int options)
{
	int error;

	bench_open(&bench, (struct setup){ .length = 8 * PAGE, .block = 4 });
	bench.region->options = (uint32_t)options;
	install_pattern(bench.region, 0, 8 * PAGE, &error);
}

static void broken_memory_is_fetched_again(void)
{
	uint8_t bytes[8 * PAGE], needle[4];
	struct loop loop = { 0 };
	struct au_wait wait = { 0 };
	uint64_t where = 0, round;
	int64_t found = 0;

	open_breakable(0);
	loop_start(&loop, &bench);
	for (round = 0; round < 5; round++) {
		break_page(2);
		CHECK_EQ(au_region_read(bench.region, 0, bytes, 8 * PAGE, &where), 0);
		CHECK(pattern_holds(bytes, 0, 8 * PAGE));
		break_page(5);
		pattern_fill(needle, 5 * PAGE + 40, sizeof needle);
		CHECK_EQ(au_region_find(bench.region, 5 * PAGE + 1, PAGE, needle, 4, &where, &found),
			 0);
		CHECK_EQ(found, 5 * PAGE + 40);
		break_page(6);
		CHECK_EQ(au_region_touch(bench.region, 0, 8 * PAGE, &where), 0);
		break_page(7);
		while (au_wait_read(bench.region, 0, bytes, 8 * PAGE, &wait) == -EINTR)
			;
		CHECK(pattern_holds(bytes, 0, 8 * PAGE));
		/* By code that knows nothing of it, too. */
		break_page(1);
		CHECK_EQ(touch(bench.region, PAGE + 3), pattern(PAGE + 3));
	}
	CHECK_EQ(counted(AU_COUNT_renewed_bytes), 25 * PAGE);
	CHECK_EQ(counted(AU_COUNT_guarded_faults), 0);
	EVENTUALLY(au_region_present(bench.region) == 8);
	loop_stop(&loop);
	bench_close(&bench);
}

static void lost_writes_are_an_error(void)
{
	uint8_t bytes[8 * PAGE], needle[4] = { 0 };
	struct au_wait wait = { 0 };
	uint64_t where = 0, round;
	int64_t found = 0;
	int error;

	open_breakable(AU_REGION_WRITABLE);
	*at(bench.region, 2 * PAGE) = 0x55;
	break_page(2);
	for (round = 0; round < 3; round++) {
		CHECK_EQ(au_region_read(bench.region, 0, bytes, 8 * PAGE, &where), -EHWPOISON);
		CHECK_EQ(where, 2 * PAGE);
		CHECK_EQ(au_region_touch(bench.region, 0, 8 * PAGE, &where), -EHWPOISON);
		CHECK_EQ(au_region_find(bench.region, 2 * PAGE, PAGE, needle, 4, &where, &found),
			 -EHWPOISON);
		CHECK_EQ(au_wait_read(bench.region, 0, bytes, 8 * PAGE, &wait), -EHWPOISON);
		CHECK_EQ(wait.at, 2 * PAGE);
	}
	CHECK_EQ(counted(AU_COUNT_renewed_bytes), 0);
	/* Until who has lost them drops it. */
	CHECK_EQ(au_region_drop(bench.region, 2 * PAGE, PAGE), 0);
	CHECK_EQ(install_pattern(bench.region, 2 * PAGE, PAGE, &error), PAGE);
	CHECK_EQ(au_region_read(bench.region, 0, bytes, 8 * PAGE, &where), 0);
	CHECK(pattern_holds(bytes, 0, 8 * PAGE));
	bench_close(&bench);
}

static void lost_writes_are_sigbus(void)
{
	open_breakable(AU_REGION_WRITABLE);
	break_page(2);
	touch(bench.region, 2 * PAGE);
}

const struct test guard_tests[] = {
	{ "guard: memory that the hardware lost is fetched again", broken_memory_is_fetched_again, 0,
	  TSAN_BLOCKS },
	{ "guard: and is an error where it could be written to", lost_writes_are_an_error, 0,
	  TSAN_BLOCKS },
	{ "guard: SIGBUS for raw touches of that", lost_writes_are_sigbus, SIGBUS, NULL },
	{ "guard: copies, touches and searches over poison", over_poison, 0, TSAN_BLOCKS },
	{ "guard: many threads over poison", many_at_once, 0, TSAN_BLOCKS },
	{ "guard: a raw touch of poison is SIGBUS", raw_touch, SIGBUS, NULL },
	{ "guard: a system call on poison is EFAULT", system_call, 0, NULL },
	{ "guard: a foreign guard below us keeps working", foreign_guard, 0, TSAN_BLOCKS },
	{ "guard: handlers chained in a circle end", chained_in_a_circle, SIGBUS, NULL },
	{ "guard: a crash reporter above us ends", crash_reporter, SIGBUS, TSAN_DEFERS },
	{ "guard: SIGBUS by kill(2) is not ours", sent_by_kill, SIGBUS, NULL },
	{ 0 },
};
