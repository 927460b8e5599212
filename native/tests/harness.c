#include "harness.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define LIMIT_NS (20 * AU_NS_PER_S)
#define EXIT_SKIP 77

static int skip_pipe[2];

/* ------------------------------------------------------------ assertions */

void test_fail(const char *file, int line, const char *format, ...)
{
	const char *base = strrchr(file, '/');
	char text[512];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	fprintf(stderr, "     %s:%d: %s\n", base ? base + 1 : file, line, text);
	_exit(1);
}

void test_skip(const char *reason)
{
	if (__real_write(skip_pipe[1], reason, strlen(reason)) < 0)
		_exit(1);
	_exit(EXIT_SKIP);
}

/* --------------------------------------------------------------- fixture */

static int new_descriptor(uint64_t features)
{
	uint64_t offered, ioctls;
	int fd = au_abi_open(0, AU_VIA_SYSCALL, -1), result;

	if (fd == -EPERM || fd == -ENOSYS)
		test_skip("no userfaultfd for kernel-mode faults: needs CAP_SYS_PTRACE");
	CHECK(fd >= 0);
	features |= AU_FEATURE_THREAD_ID | AU_FEATURE_EVENT_REMAP;
	result = au_abi_api(fd, features, &offered, &ioctls);
	if (result == -EINVAL)
		test_skip("the kernel lacks a feature");
	CHECK_EQ(result, 0);
	return fd;
}

void bench_open(struct bench *bench, struct setup setup)
{
	int error = -1;

	bench->fd = new_descriptor(setup.features);
	bench->engine =
		au_engine_create(bench->fd,
				 AU_ENGINE_OWN | AU_ENGINE_REMAPS | setup.engine_options, &error);
	CHECK(bench->engine);
	CHECK_EQ(error, 0);
	if (setup.no_sentry)
		au_sentry_remove(bench->engine);
	bench->region = NULL;
	if (!setup.length)
		return;
	bench->region = au_region_create(bench->engine, setup.length, setup.kind,
					 setup.options | AU_REGION_WRITABLE, setup.block * PAGE,
					 &error);
	if (!bench->region && setup.kind >= AU_KIND_HUGETLB)
		test_skip("no huge pages reserved (vm.nr_hugepages)");
	CHECK(bench->region);
}

void bench_close(struct bench *bench)
{
	if (bench->region) {
		au_region_close(bench->region, 1);
		au_region_free(bench->region);
	}
	au_engine_free(bench->engine);
	close(bench->fd);
	CHECK_EQ(counted(AU_COUNT_live_engines), 0);
	CHECK_EQ(counted(AU_COUNT_live_regions), 0);
	CHECK_EQ(counted(AU_COUNT_live_slots), 0);
	CHECK_EQ(au_slots_live(), 0);
}

uint8_t pattern(uint64_t offset)
{
	return (uint8_t)(offset * 7 + (offset >> 12) * 13 + 1);
}

void pattern_fill(uint8_t *to, uint64_t offset, uint64_t length)
{
	uint64_t index;

	for (index = 0; index < length; index++)
		to[index] = pattern(offset + index);
}

bool pattern_holds(const void *memory, uint64_t offset, uint64_t length)
{
	const uint8_t *bytes = memory;
	uint64_t index;

	for (index = 0; index < length; index++)
		if (bytes[index] != pattern(offset + index))
			return false;
	return true;
}

int64_t install_pattern(struct au_region *region, uint64_t offset, uint64_t length, int *error)
{
	uint8_t *bytes = malloc(length);
	int64_t settled;

	CHECK(bytes);
	pattern_fill(bytes, offset, length);
	settled = au_region_install(region, AU_OP_COPY, offset, bytes, length, 0, UINT64_MAX,
				    error);
	free(bytes);
	return settled;
}

uint8_t *at(const struct au_region *region, uint64_t offset)
{
	return (uint8_t *)(uintptr_t)(region->start + offset);
}

uint8_t touch(const struct au_region *region, uint64_t offset)
{
	return *(volatile uint8_t *)at(region, offset);
}

pthread_t spawn(void *(*body)(void *), void *argument)
{
	pthread_attr_t attributes;
	pthread_t thread;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 256 * 1024);
	CHECK_EQ(pthread_create(&thread, &attributes, body, argument), 0);
	pthread_attr_destroy(&attributes);
	return thread;
}

void *join(pthread_t thread)
{
	void *result;

	CHECK_EQ(pthread_join(thread, &result), 0);
	return result;
}

bool readable(int fd)
{
	struct pollfd item = { .fd = fd, .events = POLLIN };

	return poll(&item, 1, 0) > 0 && (item.revents & POLLIN);
}

uint64_t counted(enum au_counter which)
{
	return au_counter_value((int)which);
}

char thread_state(uint32_t tid)
{
	char path[64], text[256] = "", *end;
	int fd;

	snprintf(path, sizeof path, "/proc/self/task/%u/stat", tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	if (read(fd, text, sizeof text - 1) <= 0)
		text[0] = 0;
	close(fd);
	end = strrchr(text, ')');
	return end ? end[2] : 0;
}

/* ------------------------------------------------------------------- GIL */

static pthread_mutex_t gil = PTHREAD_MUTEX_INITIALIZER;
static _Atomic uint32_t gil_owner;

void gil_take(void)
{
	pthread_mutex_lock(&gil);
	atomic_store(&gil_owner, au_gettid());
}

void gil_give(void)
{
	atomic_store(&gil_owner, 0);
	pthread_mutex_unlock(&gil);
}

_Atomic uint64_t gil_look_ns;

bool au_gil_only(void)
{
	return true;
}

bool au_gil_mine(void)
{
	if (atomic_load(&gil_look_ns))
		au_sleep_ns(atomic_load(&gil_look_ns));
	return atomic_load(&gil_owner) == au_gettid();
}

void *au_gil_release(void)
{
	gil_give();
	return &gil;
}

void au_gil_take(void *token)
{
	CHECK(token == &gil);
	gil_take();
}

void au_gil_exit(void)
{
}

/* ------------------------------------------------------------------ loop */

#define ENTRIES 64

static void serve_block(struct loop *loop, uint64_t block)
{
	struct au_region *region = loop->region;
	uint64_t offset = block * region->block_size, length = region->object_length - offset;
	int error = 0;

	if (length > region->block_size)
		length = region->block_size;
	if (loop->think_ns)
		au_sleep_ns(loop->think_ns);
	do
		install_pattern(region, offset, length, &error);
	while (error == EAGAIN);
	if (error == ENOMEM && region->kind >= AU_KIND_HUGETLB)
		test_skip("not enough huge pages");
	CHECK(error == 0 || error == EBADF);
}

/* One wake-up: the native call is made without the GIL, the dispatch with it. */
static void loop_round(struct loop *loop)
{
	struct au_entry entries[ENTRIES];
	int64_t count, index;

	do {
		count = au_engine_drain(loop->engine, entries, ENTRIES,
					loop->rescue ? AU_DRAIN_RESCUE : AU_DRAIN_LOOP);
		CHECK(count >= 0);
		if (loop->needs_gil) {
			gil_take();
			__atomic_store_n(&au_shared.proof,
					 __atomic_load_n(&au_shared.sequence, __ATOMIC_SEQ_CST),
					 __ATOMIC_SEQ_CST);
			gil_give();
		}
		for (index = 0; index < count; index++) {
			if (entries[index].kind == AU_ENTRY_MISS) {
				atomic_fetch_add(&loop->misses, 1);
				serve_block(loop, entries[index].block);
			} else if (entries[index].kind == AU_ENTRY_HIT) {
				atomic_fetch_add(&loop->hits, 1);
			} else {
				atomic_fetch_add(&loop->events, 1);
			}
		}
	} while (count == ENTRIES);
}

/* What waits though its loop has its message: the rescue loop serves it again. */
static void rescue_blocked(struct loop *loop)
{
	uint64_t pages[64];
	uint32_t tids[64];
	int64_t count = au_engine_blocked(loop->engine, pages, tids, 64), index;

	for (index = 0; index < count; index++)
		serve_block(loop, (pages[index] - loop->region->start) / loop->region->block_size);
}

static void *loop_main(void *argument)
{
	struct loop *loop = argument;
	uint64_t ignored;

	atomic_store(&loop->tid, au_gettid());
	if (!loop->rescue)
		au_engine_set_loop(loop->engine, au_gettid());
	while (!atomic_load(&loop->stop)) {
		struct pollfd items[2] = {
			{ .fd = loop->rescue ? au_rescue_fd() : loop->engine->fd, .events = POLLIN },
			{ .fd = loop->rescue ? -1 : loop->engine->notify_fd, .events = POLLIN },
		};

		if (poll(items, 2, 10) <= 0)
			continue;
		if (loop->needs_gil) {
			gil_take();
			gil_give();
		}
		if (loop->rescue) {
			CHECK(read(items[0].fd, &ignored, sizeof ignored) > 0);
			if (!au_rescue_take(loop->engine))
				continue;
		}
		loop_round(loop);
		if (loop->rescue)
			rescue_blocked(loop);
	}
	return NULL;
}

void loop_start(struct loop *loop, struct bench *bench)
{
	loop->engine = bench->engine;
	loop->region = bench->region;
	loop->thread = spawn(loop_main, loop);
	EVENTUALLY(atomic_load(&loop->tid));
}

void loop_stop(struct loop *loop)
{
	atomic_store(&loop->stop, 1);
	join(loop->thread);
}

/* ------------------------------------------------------- fault injection */

bool (*on_copy)(int, uint64_t, uint64_t, uint64_t, uint64_t, int64_t *, int *);
void (*on_write)(int fd);

int __wrap_au_abi_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode,
		       int64_t *done);
int __wrap_au_abi_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode,
		       int64_t *done)
{
	int result;

	if (on_copy && on_copy(fd, dst, src, len, mode, done, &result))
		return result;
	return __real_au_abi_copy(fd, dst, src, len, mode, done);
}

ssize_t __wrap_write(int fd, const void *data, size_t size);
ssize_t __wrap_write(int fd, const void *data, size_t size)
{
	if (on_write)
		on_write(fd);
	return __real_write(fd, data, size);
}

/* ---------------------------------------------------------------- runner */

enum outcome { PASSED, FAILED, SKIPPED };

static bool died_well(const struct test *test, int status)
{
	if (!WIFSIGNALED(status))
		return false;
	if (test->dies_by == ANY_FAULT)
		return WTERMSIG(status) == SIGBUS || WTERMSIG(status) == SIGSEGV;
	return WTERMSIG(status) == test->dies_by;
}

static enum outcome report(const struct test *test, int status, bool timed_out)
{
	char reason[256] = "";
	ssize_t size;

	if (timed_out) {
		printf("FAIL %s: hangs\n", test->name);
		return FAILED;
	}
	if (WIFEXITED(status) && WEXITSTATUS(status) == EXIT_SKIP) {
		size = read(skip_pipe[0], reason, sizeof reason - 1);
		printf("skip %s: %.*s\n", test->name, size > 0 ? (int)size : 0, reason);
		return SKIPPED;
	}
	if (test->dies_by ? died_well(test, status) :
			    WIFEXITED(status) && WEXITSTATUS(status) == 0) {
		printf("ok   %s\n", test->name);
		return PASSED;
	}
	if (WIFSIGNALED(status))
		printf("FAIL %s: killed by %s\n", test->name, strsignal(WTERMSIG(status)));
	else
		printf("FAIL %s: exit status %d\n", test->name, WEXITSTATUS(status));
	return FAILED;
}

static enum outcome run(const struct test *test)
{
	uint64_t until = au_now_ns() + LIMIT_NS;
	int status = 0;
	pid_t child;

	if (UNDER_TSAN && test->not_under_tsan) {
		printf("skip %s: under TSan: %s\n", test->name, test->not_under_tsan);
		return SKIPPED;
	}
	fflush(stdout);
	child = fork();
	if (child == 0) {
		test->run();
		if (test->dies_by)
			test_fail(test->name, 0, "was to die by signal %d", test->dies_by);
		exit(0);
	}
	while (waitpid(child, &status, WNOHANG) == 0) {
		if (au_now_ns() > until) {
			kill(child, SIGKILL);
			waitpid(child, &status, 0);
			return report(test, status, true);
		}
		au_sleep_ns(AU_NS_PER_MS);
	}
	return report(test, status, false);
}

int main(int count, char **arguments)
{
	static const struct test *const suites[] = {
		slots_tests, region_tests, install_tests, engine_tests,
		yield_tests, guard_tests,  close_tests,	  fork_tests,  inherit_tests,
		gap_tests,	  demand_tests,	 foreign_tests, error_page_tests,
	};
	unsigned totals[3] = { 0 };
	const struct test *test;
	size_t index;
	int name;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (pipe2(skip_pipe, O_CLOEXEC | O_NONBLOCK))
		return 2;
	for (index = 0; index < sizeof suites / sizeof *suites; index++)
		for (test = suites[index]; test->name; test++) {
			bool wanted = count < 2;

			for (name = 1; name < count; name++)
				wanted |= strstr(test->name, arguments[name]) != NULL;
			if (wanted)
				totals[run(test)]++;
		}
	if (totals[SKIPPED])
		printf("%u skipped\n", totals[SKIPPED]);
	printf("%u passed, %u failed\n", totals[PASSED], totals[FAILED]);
	return totals[FAILED] != 0;
}
