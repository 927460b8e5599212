/* Many small processes whose memory is served by one server, faulting at random.
 *
 *	swarm PATH PROCESSES REGIONS PAGES SEED QUIET_US BUSY [PAUSE_US]
 *
 * Each process maps REGIONS areas of PAGES pages that show an object from its start, one after the
 * other, hands its userfaultfd over at PATH in the tests' plain dialect, and touches all of its
 * pages in random order, comparing each with what has to be there: the word at byte n of
 * the object is n / 8 + 1.  The first process is the quiet one: it begins when all others are
 * served, waits QUIET_US microseconds before each touch, and prints how long its touches took.  The
 * others (none if BUSY is 0) go as fast as they can, or pause between touches for a random time of
 * PAUSE_US on average, over and over in new memory, until it is done.  Without a pause each round
 * is finished.  Exit status 0 if every byte was right.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
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
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define REGIONS_MAX 64

struct area {
	uint64_t start, length, offset;
};

static const char *path;
static uint64_t regions, pages;
static int others;
/* Shared by all: the quiet one has finished, and how many of the others are there. */
static volatile int *done;
static atomic_int *there;

static void die(const char *what)
{
	fprintf(stderr, "swarm %d: %s: %s\n", (int)getpid(), what, strerror(errno));
	_exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ULL + (uint64_t)t.tv_nsec;
}

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static int make_uffd(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1 /* user mode only */);

	if (fd < 0)
		die("userfaultfd");
	api.features = UFFD_FEATURE_EVENT_REMOVE;
	if (ioctl(fd, UFFDIO_API, &api))
		die("UFFDIO_API");
	return fd;
}

static int hand_over(int uffd, const struct area *areas)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(sizeof(int))];
	} control = { 0 };
	uint32_t count = (uint32_t)regions;
	struct iovec part = { &count, sizeof count };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.space,
				  .msg_controllen = sizeof control.space };
	struct cmsghdr *head = CMSG_FIRSTHDR(&message);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), tries;
	char answer;

	strncpy(address.sun_path, path, sizeof address.sun_path - 1);
	for (tries = 0; connect(fd, (struct sockaddr *)&address, sizeof address); tries++) {
		if (tries == 500)
			die("connect");
		usleep(10000);
	}
	head->cmsg_level = SOL_SOCKET;
	head->cmsg_type = SCM_RIGHTS;
	head->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(head), &uffd, sizeof uffd);
	if (sendmsg(fd, &message, 0) != sizeof count ||
	    write(fd, areas, regions * sizeof *areas) != (ssize_t)(regions * sizeof *areas))
		die("handing over");
	if (read(fd, &answer, 1) != 1)
		die("the server's answer");
	return fd;
}

/* Map, hand over, touch everything once.  Times of touches go to `times` if it is there. */
static void live(uint64_t seed, unsigned pause, unsigned about, uint64_t *times)
{
	struct area areas[REGIONS_MAX];
	uint64_t total = regions * pages, index, *order = malloc(total * sizeof *order);
	int uffd = make_uffd(), connection;

	for (index = 0; index < regions; index++) {
		struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };
		/* A page between two areas keeps them two. */
		char *memory = mmap(NULL, (pages + 1) * PAGE, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (memory == MAP_FAILED)
			die("mmap");
		areas[index].start = (uint64_t)(uintptr_t)memory;
		areas[index].length = pages * PAGE;
		areas[index].offset = index * pages * PAGE;
		range.range.start = areas[index].start;
		range.range.len = areas[index].length;
		if (ioctl(uffd, UFFDIO_REGISTER, &range))
			die("UFFDIO_REGISTER");
	}
	connection = hand_over(uffd, areas);
	if (!times)
		atomic_fetch_add(there, 1);
	for (index = 0; times && atomic_load(there) < others; index++) {
		if (index == 60000)
			die("waiting for the others");
		usleep(1000);
	}
	for (index = 0; index < total; index++)
		order[index] = index;
	for (index = total - 1; index > 0; index--) {
		uint64_t other = next(&seed) % (index + 1), kept = order[index];

		order[index] = order[other];
		order[other] = kept;
	}
	for (index = 0; index < total; index++) {
		uint64_t page = order[index], at = (next(&seed) % (PAGE / 8)) * 8, begun, found;
		struct area *area = &areas[page / pages];

		if (pause)
			usleep(pause);
		if (about)
			usleep((unsigned)(next(&seed) % (2 * about)));
		if (about && *done)
			break;
		begun = now_ns();
		found = *(volatile uint64_t *)(uintptr_t)(area->start + page % pages * PAGE + at);
		if (times)
			times[index] = now_ns() - begun;
		if (found != (area->offset + page % pages * PAGE + at) / 8 + 1) {
			fprintf(stderr, "swarm: a wrong word at page %lu: %lx\n",
				(unsigned long)page, (unsigned long)found);
			_exit(2);
		}
	}
	for (index = 0; index < regions; index++)
		munmap((void *)(uintptr_t)areas[index].start, (pages + 1) * PAGE);
	close(connection);
	close(uffd);
	free(order);
}

static int compare(const void *a, const void *b)
{
	uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;

	return left < right ? -1 : left > right;
}

int main(int argc, char **argv)
{
	uint64_t processes, seed, index, total, *times;
	int busy, status, failed = 0;
	unsigned pause;

	if (argc != 8 && argc != 9)
		return 64;
	path = argv[1];
	processes = strtoull(argv[2], NULL, 0);
	regions = strtoull(argv[3], NULL, 0);
	pages = strtoull(argv[4], NULL, 0);
	seed = strtoull(argv[5], NULL, 0) | 1;
	pause = (unsigned)strtoul(argv[6], NULL, 0);
	busy = atoi(argv[7]);
	if (!regions || regions > REGIONS_MAX || !pages)
		return 64;
	total = regions * pages;
	done = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	there = (atomic_int *)(done + 1);
	others = busy ? (int)processes - 1 : 0;
	times = mmap(NULL, (total + 1) * sizeof *times, PROT_READ | PROT_WRITE,
		     MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (index = 0; index < (busy ? processes : 1); index++) {
		pid_t pid = fork();

		if (pid < 0)
			die("fork");
		if (pid)
			continue;
		if (index == 0) {
			live(seed, pause, 0, times);
			*done = 1;
		} else {
			uint64_t round = 0;

			do
				live(seed * 7919 + index * 104729 + ++round, 0,
				     argc == 9 ? (unsigned)strtoul(argv[8], NULL, 0) : 0, NULL);
			while (!*done);
		}
		_exit(0);
	}
	while (wait(&status) > 0)
		failed |= status;
	if (failed)
		return 1;
	qsort(times, total, sizeof *times, compare);
	printf("%lu %lu %lu\n", (unsigned long)times[total / 2], (unsigned long)times[total * 99 / 100],
	       (unsigned long)times[total - 1]);
	return 0;
}
