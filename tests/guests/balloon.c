/* A guest whose balloon inflates while it goes on working.
 *
 *	balloon PATH PAGES BATCH GAP_US TOUCHES PAUSE_US
 *
 * Maps PAGES pages that show an object from its start, and hands its userfaultfd over at PATH in the
 * tests' plain dialect. One thread is a vCPU: it touches pages of the lower half, each for the first
 * time, TOUCHES of them, PAUSE_US microseconds apart, and compares each with the word at byte n
 * of the object, n / 8 + 1. Every fourth time it also looks into the upper half, at pages that the
 * balloon has just taken, which have to read as zeros from then on, and at the one it is about to
 * take, which may be either. One thread is the balloon: it drops the upper half page by page, over
 * and over, BATCH calls of madvise in a row and then GAP_US microseconds of nothing. BATCH 0: no
 * balloon.
 *
 * Prints touches, wrong words, calls of madvise while it touched, and of the touches of the lower
 * half mean, 99th of a hundred, and longest, in nanoseconds. Exit status 0 if every word was right.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORD 8UL

static char *memory;
static uint64_t pages, half;
static unsigned batch, gap;
static atomic_int stop;
static atomic_ulong calls;
/* Pages of the upper half below this one were dropped at least once. */
static atomic_ulong dropped;

static void die(const char *what)
{
	fprintf(stderr, "balloon: %s: %s\n", what, strerror(errno));
	_exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ULL + (uint64_t)t.tv_nsec;
}

static uint64_t word_at(uint64_t page)
{
	return *(volatile uint64_t *)(memory + page * PAGE);
}

static uint64_t word_of(uint64_t page)
{
	return page * PAGE / WORD + 1;
}

static int make_uffd(void)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE };
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1 /* user mode only */);

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
		die("userfaultfd");
	memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		      0);
	if (memory == MAP_FAILED)
		die("mmap");
	range.range.start = (uint64_t)(uintptr_t)memory;
	range.range.len = pages * PAGE;
	if (ioctl(fd, UFFDIO_REGISTER, &range))
		die("UFFDIO_REGISTER");
	return fd;
}

static void hand_over(const char *path, int uffd)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	uint64_t area[3] = { (uint64_t)(uintptr_t)memory, pages * PAGE, 0 };
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(sizeof(int))];
	} control = { 0 };
	uint32_t count = 1;
	struct iovec part = { &count, sizeof count };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.space,
				  .msg_controllen = sizeof control.space };
	struct cmsghdr *head = CMSG_FIRSTHDR(&message);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	char answer;

	strncpy(address.sun_path, path, sizeof address.sun_path - 1);
	if (connect(fd, (struct sockaddr *)&address, sizeof address))
		die("connect");
	head->cmsg_level = SOL_SOCKET;
	head->cmsg_type = SCM_RIGHTS;
	head->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(head), &uffd, sizeof uffd);
	if (sendmsg(fd, &message, 0) != sizeof count || write(fd, area, sizeof area) != sizeof area ||
	    read(fd, &answer, 1) != 1)
		die("handing over");
	/* As one that is restored by CRIU: nobody but the server has it. */
	close(uffd);
}

static void *inflate(void *unused)
{
	uint64_t page = half;

	(void)unused;
	while (!atomic_load(&stop)) {
		unsigned i;

		for (i = 0; i < batch && !atomic_load(&stop); i++) {
			if (madvise(memory + page * PAGE, PAGE, MADV_DONTNEED))
				die("madvise");
			atomic_fetch_add(&calls, 1);
			if (++page > atomic_load(&dropped))
				atomic_store(&dropped, page);
			if (page == pages)
				page = half;
		}
		if (gap)
			usleep(gap);
	}
	return NULL;
}

static int by_size(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

int main(int count, char **given)
{
	uint64_t touches, page, wrong = 0, sum = 0, *times;
	unsigned pause;
	pthread_t thread;

	if (count != 7)
		return 2;
	pages = strtoul(given[2], NULL, 10);
	half = pages / 2;
	batch = (unsigned)atoi(given[3]);
	gap = (unsigned)atoi(given[4]);
	touches = strtoul(given[5], NULL, 10);
	pause = (unsigned)atoi(given[6]);
	times = calloc(touches, sizeof *times);
	if (!touches || touches > half || !times)
		return 2;
	atomic_store(&dropped, half);
	hand_over(given[1], make_uffd());
	if (batch && pthread_create(&thread, NULL, inflate, NULL))
		die("pthread_create");
	while (batch && !atomic_load(&calls))
		usleep(100);
	for (page = 0; page < touches; page++) {
		uint64_t began = now_ns(), known = atomic_load(&dropped), next, word;

		wrong += word_at(page) != word_of(page);
		times[page] = now_ns() - began;
		sum += times[page];
		if (page % 4 == 0 && known > half) {
			wrong += word_at(known - 1) != 0;
			wrong += word_at(half + page * 7919 % (known - half)) != 0;
			next = atomic_load(&dropped);
			word = next < pages ? word_at(next) : 0;
			wrong += word != 0 && word != word_of(next);
		}
		usleep(pause);
	}
	atomic_store(&stop, 1);
	qsort(times, touches, sizeof *times, by_size);
	printf("%llu %llu %lu %llu %llu %llu\n", (unsigned long long)touches,
	       (unsigned long long)wrong, atomic_load(&calls), (unsigned long long)(sum / touches),
	       (unsigned long long)times[touches * 99 / 100],
	       (unsigned long long)times[touches - 1]);
	fflush(stdout);
	_exit(wrong != 0);
}
