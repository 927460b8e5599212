/* Error pages: mappings of an empty file, on every kernel. */
#include "harness.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

static struct bench bench;

static int64_t fail_pages(uint64_t page, uint64_t count, int *error)
{
	uint64_t size = bench.region->page_size;

	return au_region_install(bench.region, AU_OP_POISON, page * size, NULL, count * size, 0,
				 UINT64_MAX, error);
}

static void fail_pages_well(uint64_t page, uint64_t count)
{
	int error;

	CHECK_EQ(fail_pages(page, count, &error), count * bench.region->page_size);
	CHECK_EQ(error, 0);
}

static int heal_pages(uint64_t page, uint64_t count)
{
	uint64_t size = bench.region->page_size, length = count * size;
	uint8_t *bytes = malloc(length);
	int error;

	CHECK(bytes);
	pattern_fill(bytes, page * size, length);
	au_region_install(bench.region, AU_OP_COPY, page * size, bytes, length, 1, UINT64_MAX,
			  &error);
	free(bytes);
	return error;
}

/* The mappings that the region is made of; *errors: those with the name of error pages. */
static int mappings(int *errors)
{
	unsigned long start, end;
	char line[512];
	FILE *maps = fopen("/proc/self/maps", "re");
	int count = 0;

	CHECK(maps);
	*errors = 0;
	while (fgets(line, sizeof line, maps)) {
		CHECK_EQ(sscanf(line, "%lx-%lx", &start, &end), 2);
		if (end <= bench.region->start ||
		    start >= bench.region->start + bench.region->length)
			continue;
		count++;
		*errors += strstr(line, "aiouffd: error page") != NULL;
	}
	fclose(maps);
	return count;
}

static uint64_t addresses_mapped(void)
{
	unsigned long pages;
	FILE *file = fopen("/proc/self/statm", "re");

	CHECK(file && fscanf(file, "%lu", &pages) == 1);
	fclose(file);
	return pages;
}

static void open_kind(int kind, uint64_t pages)
{
	bool huge = kind >= AU_KIND_HUGETLB;
	uint64_t size = huge ? 512 * PAGE : PAGE;

	bench_open(&bench, (struct setup){
				   .length = pages * size, .kind = kind, .block = size / PAGE });
}

static bool poison_exists(void)
{
	struct bench other;
	int64_t done;
	int result;

	bench_open(&other, (struct setup){ .length = PAGE, .block = 1 });
	result = au_abi_poison(other.fd, other.region->start, PAGE, 0, &done);
	bench_close(&other);
	return result == 0;
}

/* ----------------------------------------------------------- what it is */

static siginfo_t seen;

static void note_signal(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	seen = *info;
	_exit(seen.si_code == BUS_ADRERR && seen.si_addr == at(bench.region, 2 * PAGE + 7) ? 0 : 3);
}

static void signal_and_errno(void)
{
	struct sigaction action = { .sa_sigaction = note_signal, .sa_flags = SA_SIGINFO };
	int ends[2], writes;

	open_kind(AU_KIND_ANONYMOUS, 8);
	fail_pages_well(2, 1);
	CHECK_EQ(pipe(ends), 0);
	CHECK_EQ(write(ends[1], at(bench.region, 2 * PAGE), 10), -1);
	CHECK_EQ(errno, EFAULT);
	CHECK_EQ(sigaction(SIGBUS, &action, NULL), 0);
	for (writes = 0; writes < 2; writes++) {
		pid_t pid = fork();
		int status;

		if (!pid) {
			/* Children do not have the region: here they get one. */
			open_kind(AU_KIND_ANONYMOUS, 8);
			fail_pages_well(2, 1);
			CHECK_EQ(sigaction(SIGBUS, &action, NULL), 0);
			if (writes)
				*(volatile uint8_t *)at(bench.region, 2 * PAGE + 7) = 1;
			else
				touch(bench.region, 2 * PAGE + 7);
			_exit(4);
		}
		CHECK_EQ(waitpid(pid, &status, 0), pid);
		CHECK(WIFEXITED(status));
		CHECK_EQ(WEXITSTATUS(status), 0);
	}
	bench_close(&bench);
}

static void *waits(void *argument)
{
	uint64_t where = 0;
	uint8_t byte;

	(void)argument;
	return (void *)(intptr_t)au_region_read(bench.region, 3 * PAGE, &byte, 1, &where);
}

static void wakes_who_waits(void)
{
	pthread_t threads[3];
	int index;

	open_kind(AU_KIND_ANONYMOUS, 8);
	for (index = 0; index < 3; index++)
		threads[index] = spawn(waits, NULL);
	EVENTUALLY(au_slots_live() == 3);
	fail_pages_well(3, 1);
	for (index = 0; index < 3; index++)
		CHECK_EQ((intptr_t)join(threads[index]), -EIO);
	bench_close(&bench);
}

/* ------------------------------------------------------------ its mappings */

static void one_mapping_again(int kind, uint64_t pages)
{
	uint64_t page, before, size;
	bool huge = kind >= AU_KIND_HUGETLB;
	int errors, at_first;

	open_kind(kind, pages);
	size = bench.region->page_size;
	if (huge && heal_pages(0, pages))
		test_skip("not enough huge pages");
	if (huge)
		CHECK_EQ(au_region_drop(bench.region, 0, pages * size), 0);
	before = addresses_mapped();
	at_first = mappings(&errors);
	CHECK_EQ(errors, 0);
	CHECK(at_first == 1 || huge);
	/* Side by side, in any order: one run, one mapping. */
	fail_pages_well(2, 1);
	fail_pages_well(4, 1);
	CHECK_EQ(au_error_runs(), 2);
	fail_pages_well(3, 1);
	CHECK_EQ(au_error_runs(), 1);
	CHECK_EQ(mappings(&errors), 3);
	CHECK_EQ(errors, 1);
	CHECK_EQ(au_region_poisoned(bench.region), 3);
	/* From the middle: private memory would be in pieces, which are bounded; here none is allowed,
	 * so the way to one end is put right. */
	au_error_set_limit(7);
	CHECK_EQ(heal_pages(3, 1), 0);
	au_error_set_limit(0);
	CHECK_EQ(au_error_runs(), kind == AU_KIND_ANONYMOUS ? 1 : 2);
	CHECK_EQ(au_region_poisoned(bench.region), kind == AU_KIND_ANONYMOUS ? 1 : 2);
	CHECK(pattern_holds(at(bench.region, 3 * size), 3 * size, size));
	if (kind == AU_KIND_ANONYMOUS)
		CHECK_EQ(mappings(&errors), 3);
	CHECK_EQ(heal_pages(2, 3), 0);
	CHECK_EQ(au_error_runs(), 0);
	CHECK_EQ(au_region_poisoned(bench.region), 0);
	CHECK(pattern_holds(at(bench.region, 2 * size), 2 * size, 3 * size));
	if (!huge)
		CHECK_EQ(mappings(&errors), 1);
	/* Many, one by one, and as many healings. */
	for (page = 5; page < pages; page += 2)
		fail_pages_well(page, 1);
	for (page = 5; page < pages; page += 2)
		CHECK_EQ(heal_pages(page, 1), 0);
	for (page = 5; page < pages; page += 2)
		CHECK(pattern_holds(at(bench.region, page * size), page * size, size));
	CHECK_EQ(au_error_runs(), 0);
	if (!huge) {
		CHECK_EQ(mappings(&errors), 1);
		/* What is missing still is served still. */
		CHECK_EQ(heal_pages(0, pages), 0);
		CHECK(pattern_holds(at(bench.region, 0), 0, pages * size));
	}
	if (!huge && !SANITIZED) /* where malloc takes more */
		CHECK_EQ(addresses_mapped(), before);
	bench_close(&bench);
}

static void anonymous_merges(void)
{
	one_mapping_again(AU_KIND_ANONYMOUS, 64);
}

static void open_to_huge_pages_merges(void)
{
	one_mapping_again(AU_KIND_ANONYMOUS, 1200);
}

static void memfd_merges(void)
{
	one_mapping_again(AU_KIND_MEMFD, 64);
}

static void hugetlb(void)
{
	one_mapping_again(AU_KIND_HUGETLB, 6);
}

static void hugetlb_memfd(void)
{
	one_mapping_again(AU_KIND_HUGETLB_MEMFD, 6);
}

static void random_order(void)
{
	uint64_t pages = 256, index, seed = 5;
	int errors;

	open_kind(AU_KIND_ANONYMOUS, pages);
	fail_pages_well(0, pages);
	CHECK_EQ(mappings(&errors), 1);
	CHECK_EQ(errors, 1);
	au_error_set_limit(7);
	for (index = 0; index < 2 * pages; index++) {
		seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
		if (index % 3 == 2)
			au_region_install(bench.region, AU_OP_POISON, (seed >> 33) % pages * PAGE,
					  NULL, PAGE, 0, UINT64_MAX, &errors);
		else
			CHECK_EQ(heal_pages((seed >> 33) % pages, 1), 0);
	}
	CHECK_EQ(heal_pages(0, pages), 0);
	CHECK(pattern_holds(at(bench.region, 0), 0, pages * PAGE));
	CHECK_EQ(mappings(&errors), 1);
	CHECK_EQ(au_region_poisoned(bench.region), 0);
	CHECK_EQ(au_error_runs(), 0);
	bench_close(&bench);
}

/* Read-only memory that is too small for huge pages has another protection. */
static void read_only(void)
{
	int error, errors;

	bench_open(&bench, (struct setup){ 0 });
	bench.region = au_region_create(bench.engine, 8 * PAGE, AU_KIND_ANONYMOUS, 0, PAGE, &error);
	CHECK(bench.region);
	fail_pages_well(2, 3);
	CHECK_EQ(heal_pages(3, 1), 0);
	CHECK_EQ(mappings(&errors), 5); /* a piece of its own */
	CHECK_EQ(errors, 2);
	CHECK_EQ(heal_pages(0, 8), 0);
	CHECK(pattern_holds(at(bench.region, 0), 0, 8 * PAGE));
	CHECK_EQ(mappings(&errors), 3);
	bench_close(&bench);
}

/* -------------------------------------------------------------- the rule */

static void beyond_the_bound(void)
{
	bool poison = poison_exists();
	int error, errors, index;

	open_kind(AU_KIND_ANONYMOUS, 64);
	au_error_set_limit(3);
	for (index = 0; index < 3; index++)
		fail_pages_well((uint64_t)index * 4, 1);
	/* It joins two runs, so it costs nothing. */
	fail_pages_well(1, 3);
	CHECK_EQ(au_error_runs(), 2);
	fail_pages_well(20, 1);
	CHECK_EQ(au_error_runs(), 3);
	CHECK_EQ(fail_pages(30, 1, &error), poison ? PAGE : 0);
	CHECK_EQ(error, poison ? 0 : ENOSPC);
	CHECK_EQ(au_error_runs(), 3);
	mappings(&errors);
	CHECK_EQ(errors, 3);
	CHECK_EQ(au_region_poisoned(bench.region), poison ? 8 : 7);
	/* Both kinds heal in one go. */
	CHECK_EQ(heal_pages(0, 64), 0);
	CHECK(pattern_holds(at(bench.region, 0), 0, 64 * PAGE));
	CHECK_EQ(mappings(&errors), 1);
	CHECK_EQ(au_error_runs(), 0);
	bench_close(&bench);
}

static void close_beyond_the_bound(void)
{
	uint64_t page, where = 0;
	uint8_t byte;

	open_kind(AU_KIND_ANONYMOUS, 64);
	for (page = 1; page < 64; page += 2)
		CHECK_EQ(heal_pages(page, 1), 0);
	au_error_set_limit(5);
	CHECK_EQ(au_region_close(bench.region, 0), 0);
	for (page = 0; page < 64; page++) {
		int result = au_guard_copy(&byte, at(bench.region, page * PAGE), 1, &where);

		CHECK_EQ(result, page % 2 ? 0 : -EIO);
		if (!result)
			CHECK_EQ(byte, pattern(page * PAGE));
	}
	bench_close(&bench);
	CHECK_EQ(au_error_runs(), 0);
}

static sigjmp_buf back;

static void jump(int number)
{
	siglongjmp(back, number);
}

/* The process has no mapping left: it is an error nevertheless, never zeros. */
static void close_without_a_mapping(void)
{
	uint64_t page, pages = 512, made = 0;
	int protection = PROT_READ, error;

	open_kind(AU_KIND_ANONYMOUS, pages);
	for (page = 1; page < pages; page += 2)
		install_pattern(bench.region, page * PAGE, PAGE, &error);
	while (mmap(NULL, PAGE, protection ^= PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) !=
	       MAP_FAILED)
		made++;
	CHECK(made > 100);
	CHECK_EQ(au_region_close(bench.region, 0), 0);
	signal(SIGBUS, jump);
	signal(SIGSEGV, jump);
	for (page = 0; page < pages; page++) {
		if (sigsetjmp(back, 1))
			continue;
		CHECK_EQ(touch(bench.region, page * PAGE), pattern(page * PAGE));
		CHECK_EQ(page % 2, 1);
	}
	_exit(0);
}

/* ------------------------------------------------------------ descriptors */

static void without_descriptors(void)
{
	struct rlimit none = { 0, 0 };

	open_kind(AU_KIND_ANONYMOUS, 8);
	CHECK_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
	fail_pages_well(2, 2);
	CHECK_EQ(au_error_runs(), 1);
	CHECK_EQ(heal_pages(2, 1), 0);
	_exit(0);
}

/* The program closes what it did not open, and uses the number for something else. */
static void descriptor_reused(void)
{
	char path[64], target[128];
	int fd, other, found = -1, errors;
	uint8_t byte;
	uint64_t where = 0;

	open_kind(AU_KIND_ANONYMOUS, 8);
	other = memfd_create("full", 0);
	CHECK_EQ(ftruncate(other, 1 << 20), 0);
	for (fd = 3; fd < 64; fd++) {
		ssize_t size;

		snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
		size = readlink(path, target, sizeof target - 1);
		target[size > 0 ? size : 0] = 0;
		if (strstr(target, "aiouffd: error page"))
			found = fd;
	}
	CHECK(found >= 0);
	CHECK_EQ(fcntl(found, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
	CHECK_EQ(ftruncate(found, PAGE), -1); /* it stays empty */
	CHECK_EQ(dup2(other, found), found);
	fail_pages_well(2, 1);
	CHECK_EQ(au_guard_copy(&byte, at(bench.region, 2 * PAGE), 1, &where), -EIO);
	close(found);
	fail_pages_well(5, 1);
	CHECK_EQ(au_guard_copy(&byte, at(bench.region, 5 * PAGE), 1, &where), -EIO);
	mappings(&errors);
	CHECK_EQ(errors, 2);
	bench_close(&bench);
}

/* ---------------------------------------------------------------- healing */

static bool no_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done,
		    int *result)
{
	(void)fd, (void)dst, (void)src, (void)len, (void)mode;
	*done = 0;
	*result = -ENOMEM;
	return true;
}

static void a_failed_healing_leaves_the_error(void)
{
	uint64_t where = 0;
	uint8_t byte;
	int errors;

	open_kind(AU_KIND_ANONYMOUS, 8);
	fail_pages_well(2, 3);
	on_copy = no_copy;
	CHECK_EQ(heal_pages(2, 3), ENOMEM);
	on_copy = NULL;
	CHECK_EQ(au_region_poisoned(bench.region), 3);
	CHECK_EQ(au_error_runs(), 1);
	CHECK_EQ(mappings(&errors), 3);
	CHECK_EQ(au_guard_copy(&byte, at(bench.region, 3 * PAGE), 1, &where), -EIO);
	CHECK_EQ(heal_pages(2, 3), 0);
	CHECK_EQ(mappings(&errors), 1);
	bench_close(&bench);
}

/* The kernel would take the registration away on the move: then it stays an error. */
static void without_the_event(void)
{
	open_kind(AU_KIND_ANONYMOUS, 8);
	fail_pages_well(2, 1);
	bench.engine->options &= ~(uint32_t)AU_ENGINE_REMAPS;
	CHECK_EQ(heal_pages(2, 1), EOPNOTSUPP);
	CHECK_EQ(au_region_poisoned(bench.region), 1);
	bench_close(&bench);
}

/* After mlockall(MCL_FUTURE) a mapping comes filled with zeros. */
static void locked(int kind)
{
	uint64_t items[8], page;
	int errors;

	open_kind(kind, 8);
	CHECK(au_pagemap_read(bench.region->start, items, 8));
	for (page = 0; page < 8; page++)
		CHECK_EQ(items[page] & (AU_PAGEMAP_PRESENT | AU_PAGEMAP_SWAPPED), 0);
	fail_pages_well(2, 3);
	CHECK_EQ(heal_pages(3, 1), 0);
	CHECK_EQ(heal_pages(0, 8), 0);
	CHECK(pattern_holds(at(bench.region, 0), 0, 8 * bench.region->page_size));
	mappings(&errors);
	CHECK_EQ(errors, 0);
	bench_close(&bench);
}

static void locked_memory(void)
{
	if (mlockall(MCL_FUTURE))
		test_skip("memory may not be locked");
	locked(AU_KIND_ANONYMOUS);
	locked(AU_KIND_MEMFD);
}

#define RACE_PAGES 32
static _Atomic int stop, wrong;
static _Atomic uint64_t sound, failed;

static uint64_t next(uint64_t *seed)
{
	*seed = *seed * 6364136223846793005ULL + 1442695040888963407ULL;
	return *seed >> 33;
}

static void *checks_bytes(void *argument)
{
	uint64_t seed = (uint64_t)(uintptr_t)argument, where = 0;
	uint8_t bytes[64];

	while (!atomic_load(&stop)) {
		uint64_t offset = next(&seed) % RACE_PAGES * PAGE + next(&seed) % (PAGE - 64);

		if (UNDER_TSAN) /* no jumps out of handlers there */
			au_region_check(bench.region, offset, sizeof bytes, &where);
		else if (au_guard_copy(bytes, at(bench.region, offset), sizeof bytes, &where))
			atomic_fetch_add(&failed, 1);
		else if (pattern_holds(bytes, offset, sizeof bytes))
			atomic_fetch_add(&sound, 1);
		else
			atomic_fetch_add(&wrong, 1);
	}
	return NULL;
}

static void *makes_errors(void *argument)
{
	uint64_t seed = (uint64_t)(uintptr_t)argument;
	int error;

	while (!atomic_load(&stop)) {
		uint64_t page = next(&seed) % RACE_PAGES, count = 1 + next(&seed) % 4;

		if (count > RACE_PAGES - page)
			count = RACE_PAGES - page;
		switch (next(&seed) % 4) {
		case 0:
			fail_pages(page, count, &error);
			break;
		case 1:
			heal_pages(page, count);
			break;
		default:
			au_region_drop(bench.region, page * PAGE, count * PAGE);
			break;
		}
	}
	return NULL;
}

/* Readers see the right bytes or an error, and never zeros. */
static void race(int kind, uint64_t ms, bool bounded)
{
	struct loop loop = { 0 };
	pthread_t threads[5];
	uintptr_t index;

	atomic_store(&stop, 0);
	open_kind(kind, RACE_PAGES);
	if (bounded)
		au_error_set_limit(2);
	loop_start(&loop, &bench);
	for (index = 0; index < 5; index++)
		threads[index] = spawn(index < 3 ? checks_bytes : makes_errors,
				       (void *)(index + 1));
	au_sleep_ns(ms * AU_NS_PER_MS);
	atomic_store(&stop, 1);
	for (index = 0; index < 5; index++)
		join(threads[index]);
	CHECK_EQ(atomic_load(&wrong), 0);
	CHECK(UNDER_TSAN || atomic_load(&failed) > 10);
	CHECK(UNDER_TSAN || atomic_load(&sound) > 10);
	/* Against a close as well, in its midst. */
	atomic_store(&stop, 0);
	for (index = 0; index < 3; index++)
		threads[index] = spawn(index < 2 ? checks_bytes : makes_errors,
				       (void *)(index + 7));
	au_sleep_ns(2 * AU_NS_PER_MS);
	CHECK_EQ(au_region_close(bench.region, 0), 0);
	au_sleep_ns(AU_NS_PER_MS);
	atomic_store(&stop, 1);
	for (index = 0; index < 3; index++)
		join(threads[index]);
	CHECK_EQ(atomic_load(&wrong), 0);
	loop_stop(&loop);
	bench_close(&bench);
	CHECK_EQ(au_error_runs(), 0);
}

static void race_anonymous(void)
{
	race(AU_KIND_ANONYMOUS, 400, false);
}

static void race_memfd(void)
{
	race(AU_KIND_MEMFD, 400, false);
}

static void race_bounded(void)
{
	race(AU_KIND_ANONYMOUS, 400, true);
}

/* ------------------------------------------------------------------- fork */

static void forked(int options, int expected_signal)
{
	pid_t pid;
	int status;

	bench_open(&bench, (struct setup){ .length = 8 * PAGE, .block = 1, .options = options });
	fail_pages_well(2, 1);
	pid = fork();
	if (!pid) {
		if (!freopen("/dev/null", "w", stderr))
			_exit(1);
		signal(SIGBUS, SIG_DFL);
		_exit(touch(bench.region, 2 * PAGE));
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK(WIFSIGNALED(status));
	CHECK_EQ(WTERMSIG(status), expected_signal);
	bench_close(&bench);
}

static void children(void)
{
	forked(AU_REGION_FORK, SIGBUS);
	forked(0, SIGSEGV); /* they do not have it */
}

/* A raw descriptor's page that nobody can bring, on any kernel. */
static void *touches_raw(void *memory)
{
	uint64_t where = 0;
	uint8_t byte;

	return (void *)(intptr_t)au_guard_copy(&byte, memory, 1, &where);
}

static void raw_page(void)
{
	uint8_t *memory = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pthread_t thread;
	uint64_t ioctls;

	bench_open(&bench, (struct setup){ .engine_options = AU_ENGINE_RAW });
	CHECK_EQ(au_abi_register(bench.fd, (uint64_t)(uintptr_t)memory, 4 * PAGE,
				 AU_REGISTER_MODE_MISSING, &ioctls),
		 0);
	CHECK_EQ(au_regions_add((uint64_t)(uintptr_t)memory, 4 * PAGE, NULL), 0);
	thread = spawn(touches_raw, memory + PAGE);
	EVENTUALLY(au_slots_live());
	au_engine_poison_page(bench.engine, (uint64_t)(uintptr_t)memory + PAGE, PAGE);
	CHECK_EQ((intptr_t)join(thread), -EIO);
	au_regions_remove((uint64_t)(uintptr_t)memory);
	bench_close(&bench);
}

#define TSAN_FORK "no threads may be made in a child of a process with threads"
#define TSAN_JUMP "a jump out of a handler leaves its signal blocked"

const struct test error_page_tests[] = {
	{ "error page: SIGBUS, BUS_ADRERR, EFAULT", signal_and_errno, 0, TSAN_FORK },
	{ "error page: wakes who waits", wakes_who_waits, 0, NULL },
	{ "error page: private memory is one mapping again", anonymous_merges, 0, NULL },
	{ "error page: so is memory open to huge pages", open_to_huge_pages_merges, 0, NULL },
	{ "error page: so is shared memory", memfd_merges, 0, NULL },
	{ "error page: in any order it is one mapping in the end", random_order, 0, NULL },
	{ "error page: read-only memory heals", read_only, 0, NULL },
	{ "error page: huge pages", hugetlb, 0, NULL },
	{ "error page: shared huge pages", hugetlb_memfd, 0, NULL },
	{ "error page: beyond the bound", beyond_the_bound, 0, NULL },
	{ "error page: a close beyond the bound", close_beyond_the_bound, 0, TSAN_JUMP },
	{ "error page: a close without a mapping left", close_without_a_mapping, 0,
	  "it maps memory of its own" },
	{ "error page: without descriptors", without_descriptors, 0, NULL },
	{ "error page: its descriptor closed and used again", descriptor_reused, 0, TSAN_JUMP },
	{ "error page: a failed healing leaves the error", a_failed_healing_leaves_the_error, 0,
	  TSAN_JUMP },
	{ "error page: no healing where a move unregisters", without_the_event, 0, NULL },
	{ "error page: in a process that locks its memory", locked_memory, 0,
	  "threads cannot have their stacks" },
	{ "error page: errors, healings and drops against readers", race_anonymous, 0, NULL },
	{ "error page: the same in shared memory", race_memfd, 0, NULL },
	{ "error page: the same beyond the bound", race_bounded, 0, NULL },
	{ "error page: forked children", children, 0, NULL },
	{ "error page: of memory without a region", raw_page, 0, NULL },
	{ 0 },
};
