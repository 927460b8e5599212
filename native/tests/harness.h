/* What the tests share: assertions, one process per test, a mutex that plays the
 * GIL, a thread that plays the event loop, and ioctls that fail on request.
 *
 * Each test runs in a forked process of its own, so it may die by the signal that it
 * provokes, and a hang ends with the test and not with the run.
 */
#ifndef AU_TESTS_HARNESS_H
#define AU_TESTS_HARNESS_H

#include "native.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define PAGE 4096ULL

#if defined(__SANITIZE_THREAD__)
#define UNDER_TSAN 1
#else
#define UNDER_TSAN 0
#endif

/* ------------------------------------------------------------ assertions */

_Noreturn void test_fail(const char *file, int line, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
_Noreturn void test_skip(const char *reason);

#define CHECK(condition)                                              \
	do {                                                          \
		if (!(condition))                                     \
			test_fail(__FILE__, __LINE__, "%s", #condition); \
	} while (0)

#define CHECK_EQ(left, right)                                                             \
	do {                                                                              \
		long long left_ = (long long)(left), right_ = (long long)(right);         \
		if (left_ != right_)                                                      \
			test_fail(__FILE__, __LINE__, "%s == %s: %lld != %lld", #left, #right, \
				  left_, right_);                                         \
	} while (0)

/* Wait for `condition`, at most 5 seconds. */
#define EVENTUALLY(condition)                                                     \
	do {                                                                      \
		uint64_t until_ = au_now_ns() + 5 * AU_NS_PER_S;                  \
		while (!(condition)) {                                            \
			if (au_now_ns() > until_)                                 \
				test_fail(__FILE__, __LINE__, "never: %s", #condition); \
			au_sleep_ns(200000);                                      \
		}                                                                 \
	} while (0)

/* ----------------------------------------------------------------- tests */

struct test {
	const char *name;
	void (*run)(void);
	int dies_by; /* signal that has to end it, 0: it exits by itself */
#define ANY_FAULT (-1) /* SIGBUS, or SIGSEGV if the mapping went first */
	const char *not_under_tsan; /* why it cannot run there, or NULL */
};

#define TSAN_DEFERS "asynchronous signals are deferred to the next library call"

extern const struct test slots_tests[], region_tests[], install_tests[], engine_tests[],
	yield_tests[], guard_tests[], close_tests[], fork_tests[], inherit_tests[], gap_tests[],
	demand_tests[], foreign_tests[], error_page_tests[];

/* --------------------------------------------------------------- fixture */

struct bench {
	int fd;
	struct au_engine *engine;
	struct au_region *region;
};

/* `kind` is one of enum au_region_kind; `block` in pages. */
struct setup {
	uint64_t length;
	int kind, options;
	uint64_t block;
	uint64_t features;
	int engine_options; /* beside AU_ENGINE_OWN */
	bool no_sentry;     /* take the engine away from the sentry: the test does its work */
};

void bench_open(struct bench *bench, struct setup setup);
void bench_close(struct bench *bench);

/* The byte that belongs at `offset`; a page of them; and does memory hold them? */
uint8_t pattern(uint64_t offset);
void pattern_fill(uint8_t *to, uint64_t offset, uint64_t length);
bool pattern_holds(const void *memory, uint64_t offset, uint64_t length);
/* Install [offset, offset+length) with the pattern. */
int64_t install_pattern(struct au_region *region, uint64_t offset, uint64_t length, int *error);

uint8_t *at(const struct au_region *region, uint64_t offset);
/* Touch as compiled code does, in user mode. */
uint8_t touch(const struct au_region *region, uint64_t offset);

pthread_t spawn(void *(*body)(void *), void *argument);
void *join(pthread_t thread);
/* A message waits in the descriptor. */
bool readable(int fd);
uint64_t counted(enum au_counter which);
/* State letter of a thread of this process in /proc. */
char thread_state(uint32_t tid);

/* ------------------------------------------------------- GIL and the loop */

void gil_take(void);
void gil_give(void);
/* How long the handler takes to find out who holds it. */
extern _Atomic uint64_t gil_look_ns;

struct loop {
	struct au_engine *engine;
	struct au_region *region;
	bool needs_gil;     /* as Python does, between native calls */
	bool rescue;        /* plays the rescue loop instead */
	uint64_t think_ns;  /* from a miss to its bytes */
	pthread_t thread;
	_Atomic uint32_t tid;
	_Atomic int stop;
	_Atomic uint64_t misses, hits, events;
};

void loop_start(struct loop *loop, struct bench *bench);
void loop_stop(struct loop *loop);

/* ------------------------------------------------------- fault injection */

/* Called instead of the real ioctl when set: returns true when it has answered. */
extern bool (*on_copy)(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode,
		       int64_t *done, int *result);
extern void (*on_write)(int fd);

int __real_au_abi_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode,
		       int64_t *done);
ssize_t __real_write(int fd, const void *data, size_t size);

#endif
