/* The plainest fault server that C allows, and touchers that need no interpreter.
 *
 * The server is the bar for fault latency: one thread, poll, read, UFFDIO_COPY of
 * one page out of memory that is there already.  Nothing that serves faults
 * through a descriptor can do less.
 *
 * The touchers load one byte of each page and may be called through ctypes, which
 * releases the GIL: they measure the serving, not the interpreter.
 *
 * Every function returns -errno on failure.  `cpu` below zero means: not pinned.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

#define PAGE 4096UL
#define BATCH 64

static uint64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static void pin_to(int cpu)
{
	cpu_set_t set;

	if (cpu < 0)
		return;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	sched_setaffinity(0, sizeof set, &set);
}

/* ---- the server ---- */

struct server {
	int uffd, stop;
	int cpu;
	char *memory;
	uint64_t length;
	const char *source;
	uint64_t source_length;
	_Atomic uint64_t faults;
	pthread_t thread;
};

static void serve_page(struct server *server, uint64_t address)
{
	uint64_t offset = (address & ~(PAGE - 1)) - (uint64_t)server->memory;
	struct uffdio_copy copy = {
		.dst = (uint64_t)server->memory + offset,
		.src = (uint64_t)server->source + offset % server->source_length,
		.len = PAGE,
	};

	while (ioctl(server->uffd, UFFDIO_COPY, &copy) < 0 && errno == EAGAIN)
		copy.copy = 0;
	if (copy.copy == -EEXIST) { /* two threads asked: the second may still sleep */
		struct uffdio_range range = { .start = copy.dst, .len = PAGE };

		ioctl(server->uffd, UFFDIO_WAKE, &range);
	}
}

static void *serve(void *argument)
{
	struct server *server = argument;
	struct pollfd watched[2] = {
		{ .fd = server->uffd, .events = POLLIN },
		{ .fd = server->stop, .events = POLLIN },
	};
	struct uffd_msg messages[BATCH];
	ssize_t got, index;

	pin_to(server->cpu);
	for (;;) {
		if (poll(watched, 2, -1) < 0)
			continue;
		if (watched[1].revents)
			return NULL;
		got = read(server->uffd, messages, sizeof messages);
		for (index = 0; index < got / (ssize_t)sizeof *messages; index++) {
			if (messages[index].event != UFFD_EVENT_PAGEFAULT)
				continue;
			atomic_fetch_add_explicit(&server->faults, 1, memory_order_relaxed);
			serve_page(server, messages[index].arg.pagefault.address);
		}
	}
}

static void dispose(struct server *server)
{
	if (server->memory != MAP_FAILED)
		munmap(server->memory, server->length);
	if (server->uffd >= 0)
		close(server->uffd);
	if (server->stop >= 0)
		close(server->stop);
	free(server);
}

/* Map `length` bytes that are served from source[offset % source_length]; both
 * lengths are multiples of the page size. */
int uffd_server_start(uint64_t length, const void *source, uint64_t source_length, int cpu,
		      struct server **result)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	struct server *server = calloc(1, sizeof *server);
	int error;

	if (!server)
		return -ENOMEM;
	server->cpu = cpu;
	server->length = length;
	server->source = source;
	server->source_length = source_length;
	server->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	server->memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			      -1, 0);
	server->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (server->uffd < 0)
		server->uffd = (int)syscall(SYS_userfaultfd,
					    O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	if (server->stop < 0 || server->memory == MAP_FAILED || server->uffd < 0)
		goto fail;
	madvise(server->memory, length, MADV_NOHUGEPAGE);
	madvise(server->memory, length, MADV_DONTFORK);
	range.range.start = (uint64_t)server->memory;
	range.range.len = length;
	if (ioctl(server->uffd, UFFDIO_API, &api) < 0 ||
	    ioctl(server->uffd, UFFDIO_REGISTER, &range) < 0)
		goto fail;
	errno = pthread_create(&server->thread, NULL, serve, server);
	if (errno)
		goto fail;
	*result = server;
	return 0;
fail:
	error = errno;
	dispose(server);
	return -error;
}

void *uffd_server_memory(struct server *server)
{
	return server->memory;
}

uint64_t uffd_server_faults(struct server *server)
{
	return atomic_load(&server->faults);
}

/* Make everything missing again. */
int uffd_server_reset(struct server *server)
{
	return madvise(server->memory, server->length, MADV_DONTNEED) < 0 ? -errno : 0;
}

/* Nobody may touch the memory any more. */
void uffd_server_stop(struct server *server)
{
	eventfd_write(server->stop, 1);
	pthread_join(server->thread, NULL);
	dispose(server);
}

/* ---- touchers ---- */

/* Touch pages start, start+stride, ... below end, in that order.  nanoseconds may
 * be NULL; else it gets one figure per touch.  Returns the number of touches. */
int64_t touch_pages(const volatile char *memory, uint64_t start, uint64_t end, uint64_t stride,
		    uint64_t *nanoseconds, int cpu)
{
	cpu_set_t before;
	int64_t count = 0;
	uint64_t page, begin, stop;

	if (!stride)
		return -EINVAL;
	sched_getaffinity(0, sizeof before, &before);
	pin_to(cpu);
	begin = now_ns();
	for (page = start; page < end; page += stride, count++) {
		(void)memory[page * PAGE];
		if (nanoseconds) {
			stop = now_ns();
			nanoseconds[count] = stop - begin;
			begin = now_ns();
		}
	}
	if (cpu >= 0)
		sched_setaffinity(0, sizeof before, &before);
	return count;
}

struct team {
	const volatile char *memory;
	uint64_t start, end, stride;
	int cpu;
	pthread_barrier_t *barrier;
	uint64_t begun, ended;
	pthread_t thread;
};

static void *touch_as_member(void *argument)
{
	struct team *member = argument;

	pin_to(member->cpu);
	pthread_barrier_wait(member->barrier);
	member->begun = now_ns();
	touch_pages(member->memory, member->start, member->end, member->stride, NULL, -1);
	member->ended = now_ns();
	return NULL;
}

/* `threads` threads touch pages [0, pages) once: thread t takes pages t, t+threads, ...
 * when interleaved, else the t-th part.  cpus: one number per thread, or NULL.
 * Returns the nanoseconds from the first start to the last end. */
int64_t touch_threads(const volatile char *memory, uint64_t pages, int threads, int interleaved,
		      const int *cpus)
{
	struct team *team = calloc((size_t)threads, sizeof *team);
	uint64_t begun = UINT64_MAX, ended = 0;
	pthread_barrier_t barrier;
	int index;

	if (!team)
		return -ENOMEM;
	pthread_barrier_init(&barrier, NULL, (unsigned)threads);
	for (index = 0; index < threads; index++) {
		uint64_t from = pages * (uint64_t)index / (uint64_t)threads;
		uint64_t to = pages * (uint64_t)(index + 1) / (uint64_t)threads;

		team[index] = (struct team){
			.memory = memory,
			.start = interleaved ? (uint64_t)index : from,
			.end = interleaved ? pages : to,
			.stride = interleaved ? (uint64_t)threads : 1,
			.cpu = cpus ? cpus[index] : -1,
			.barrier = &barrier,
		};
		/* A thread that cannot start leaves the others at the barrier for ever. */
		if (pthread_create(&team[index].thread, NULL, touch_as_member, &team[index]))
			abort();
	}
	for (index = 0; index < threads; index++) {
		pthread_join(team[index].thread, NULL);
		if (team[index].begun < begun)
			begun = team[index].begun;
		if (team[index].ended > ended)
			ended = team[index].ended;
	}
	pthread_barrier_destroy(&barrier);
	free(team);
	return (int64_t)(ended - begun);
}
