#include "inherit.h"

#include "abi.h"
#include "children.h"
#include "error_page.h"
#include "region.h"
#include "registry.h"
#include "sys.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>

#define BATCH 32
/* Descriptors under way are limited per user: wait for a busy server so many milliseconds. */
#define IN_FLIGHT_TRIES 5000
#define POISON_TRIES 2000
/* A thread that has not started by then never will. */
#define START_NS (20 * AU_NS_PER_S)

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#define UNSHARE_TABLE 2U /* CLOSE_RANGE_UNSHARE */

/* What the watching thread is given: one for each server. */
struct watch {
	int uffd, socket, pidfd;
	int server;
	_Atomic uint32_t state;
};
/* ABANDONED: it took too long, and the descriptors are closed. */
enum { STARTING, STARTED, WATCHING, NO_TABLE, ABANDONED };

static struct watch watches[AU_SERVERS];

/* ------------------------------------------------------ without a server */

/* An error for whoever touches this page. */
static void refuse(int uffd, int server, uint64_t address)
{
	uint64_t size = au_page_size(), page;
	struct au_region *region;
	uint32_t index = 0;
	int tries;

	au_children_lock();
	while ((region = au_children_next(server, &index, NULL)))
		if (address - region->start < region->length)
			break;
	au_children_unlock();
	if (region) {
		size = region->page_size;
		page = (address - region->start) >> region->page_shift;
		for (tries = 0; tries < POISON_TRIES; tries++) {
			if (au_error_refuse(region, page, page + 1, uffd) != -EAGAIN)
				break;
			au_sleep_ns(20000);
		}
	}
	au_abi_wake(uffd, address & ~(size - 1), size);
}

static void refuse_all(int uffd, int server)
{
	struct pollfd item = { .fd = uffd, .events = POLLIN };
	struct au_uffd_msg messages[BATCH];
	struct au_region *region;
	uint32_t index = 0;
	long count, at;

	/* What the server has read and not answered is asked again. */
	au_children_lock();
	while ((region = au_children_next(server, &index, NULL)))
		au_abi_wake(uffd, region->start, region->length);
	au_children_unlock();
	for (;;) {
		poll(&item, 1, -1);
		count = au_abi_read(uffd, messages, BATCH);
		if (count < 0 && count != -EAGAIN)
			au_sleep_ns(10 * AU_NS_PER_MS);
		for (at = 0; at < count; at++)
			if (messages[at].event == AU_EVENT_PAGEFAULT)
				refuse(uffd, server, messages[at].arg.pagefault.address);
	}
}

/* ------------------------------------------------------------- the watch */

struct entry {
	uint64_t inode, offset;
	uint16_t length;
	uint8_t type;
	char name[];
};

/* The number that a name is, or -1. */
static int number_of(const char *name)
{
	int number = 0;

	for (; *name; name++) {
		if (*name < '0' || *name > '9')
			return -1;
		number = number * 10 + (*name - '0');
	}
	return number;
}

/* The same one by one, before 5.9 and where close_range is not allowed. */
static bool leave_table_slowly(const int *keep)
{
	_Alignas(struct entry) char space[1024];
	long size, at;
	int list;

	if (syscall(SYS_unshare, CLONE_FILES))
		return false;
	list = open("/proc/thread-self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (list < 0)
		return false;
	while ((size = syscall(SYS_getdents64, list, space, sizeof space)) > 0)
		for (at = 0; at < size;) {
			const struct entry *entry = (const struct entry *)(space + at);
			int fd = number_of(entry->name);

			at += entry->length;
			if (fd >= 0 && fd != list && fd != keep[0] && fd != keep[1] && fd != keep[2])
				close(fd);
		}
	close(list);
	return size == 0;
}

/* Leave the process's table of descriptors, with a copy that has only these: the program may close
 * whatever it likes, and use the numbers again. */
static bool leave_table(const struct watch *watch)
{
	int keep[3] = { watch->uffd, watch->socket, watch->pidfd };
	int index, other, swap, from = 0;

	for (index = 0; index < 3; index++)
		for (other = index + 1; other < 3; other++)
			if (keep[other] < keep[index]) {
				swap = keep[index];
				keep[index] = keep[other];
				keep[other] = swap;
			}
	if (syscall(SYS_close_range, (unsigned int)keep[2] + 1, ~0U, UNSHARE_TABLE))
		return leave_table_slowly(keep);
	for (index = 0; index < 3; index++) {
		if (keep[index] > from)
			syscall(SYS_close_range, (unsigned int)from, (unsigned int)keep[index] - 1,
				0U);
		if (keep[index] >= 0) /* there may be no pidfd */
			from = keep[index] + 1;
	}
	return true;
}

/* The addresses that a server sends are pages which it cannot make errors itself (before 6.6).
 * False at the end of them, which is the server's. */
static bool refuse_told(const struct watch *watch)
{
	uint64_t address;
	ssize_t size;

	while ((size = recv(watch->socket, &address, sizeof address, MSG_DONTWAIT)) ==
	       sizeof address)
		refuse(watch->uffd, watch->server, address);
	return size < 0 && (errno == EAGAIN || errno == EINTR);
}

static void *watch_server(void *argument)
{
	struct watch *given = argument, watch = *given;
	struct pollfd items[2] = {
		{ .fd = watch.socket, .events = POLLIN | POLLRDHUP },
		{ .fd = watch.pidfd, .events = POLLIN },
	};
	uint32_t starting = STARTING;
	bool left;

	if (!atomic_compare_exchange_strong(&given->state, &starting, STARTED))
		return NULL; /* the numbers may mean something else by now */
	left = leave_table(&watch);
	prctl(PR_SET_NAME, "aiouffd-child");
	atomic_store(&given->state, left ? WATCHING : NO_TABLE);
	au_futex_wake(&given->state);
	if (!left)
		return NULL;
	while (poll(items, 2, -1) <= 0 ||
	       (items[0].revents && !items[1].revents && refuse_told(&watch)))
		;
	refuse_all(watch.uffd, watch.server);
	return NULL;
}

/* pthread_create in a handler of fork: the C library has put its own locks in order before, those
 * of malloc included, and has the stack of our parent's sentry to give.  It has to be a
 * thread that it knows, and no bare clone, or a process that gives up its privileges would
 * keep a thread that has them.  (With an allocator that does not survive a fork the thread
 * may never start.  That is an error as well, and no hang.) */
static int start_watch(struct watch *watch)
{
	uint64_t limit = au_now_ns() + START_NS;
	uint32_t state, starting = STARTING;
	sigset_t all, before;
	pthread_attr_t attributes;
	pthread_t thread;
	int result;

	atomic_store(&watch->state, STARTING);
	sigfillset(&all);
	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, 256 * 1024);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	result = pthread_create(&thread, &attributes, watch_server, watch);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	if (result)
		return -result;
	while ((state = atomic_load(&watch->state)) < WATCHING) {
		/* One that has started will come to its end. */
		if (state == STARTING && au_now_ns() > limit &&
		    atomic_compare_exchange_strong(&watch->state, &starting, ABANDONED))
			return -ETIMEDOUT;
		starting = STARTING;
		au_futex_wait(&watch->state, state, AU_NS_PER_S);
	}
	return state == WATCHING ? 0 : -EMFILE;
}

/* --------------------------------------------------------------- failing */

static size_t append(char *line, size_t at, const char *text)
{
	size_t length = strlen(text);

	memcpy(line + at, text, length);
	return at + length;
}

static size_t append_number(char *line, size_t at, long number)
{
	char digits[20];
	size_t count = 0;

	do
		digits[count++] = (char)('0' + number % 10);
	while (number /= 10);
	while (count)
		line[at++] = digits[--count];
	return at;
}

static void complain(const char *step, int error, const char *outcome)
{
	char line[512];
	size_t at = append(line, 0, "aiouffd: process ");

	at = append_number(line, at, getpid());
	at = append(line, at, ": the lazy memory that it got by fork cannot be served (");
	at = append(line, at, step);
	at = append(line, at, ", error ");
	at = append_number(line, at, -error);
	at = append(line, at, "); ");
	at = append(line, at, outcome);
	at = append(line, at, "\n");
	if (write(STDERR_FILENO, line, at) < 0)
		return;
}

/* Errors, for there is nobody to wait for. */
static void seal(struct au_region *region)
{
	void *memory = (void *)(uintptr_t)region->start;

	/* mprotect stops where a part is not mapped any more. */
	if (au_error_map(region->start, region->length, true) &&
	    mprotect(memory, region->length, PROT_NONE) &&
	    mmap(memory, region->length, PROT_NONE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
		abort();
}

static void seal_all(int server)
{
	struct au_region *region;
	uint32_t index = 0;

	while ((region = au_children_next(server, &index, NULL))) {
		atomic_store(&region->closing, 1);
		seal(region);
	}
	/* For children of ours as well. */
	au_children_all_closed(server);
}

/* --------------------------------------------------------- handing over */

static int new_uffd(bool user_mode_only, bool *all_faults)
{
	int fd = -EPERM;

	*all_faults = false;
	if (!user_mode_only) {
		fd = au_abi_open(0, AU_VIA_SYSCALL, -1);
		if (fd < 0)
			fd = au_abi_open(0, AU_VIA_DEVICE, -1);
		*all_faults = fd >= 0;
	}
	if (fd < 0)
		fd = au_abi_open(AU_USER_MODE_ONLY, AU_VIA_SYSCALL, -1);
	if (fd < 0)
		fd = au_abi_open(AU_USER_MODE_ONLY, AU_VIA_DEVICE, -1);
	return fd;
}

/* Of shared memory, too, what is missing only: what is there needs no server, and comes into being
 * by the server's own installs alone. */
static int register_regions(int uffd, int server)
{
	struct au_region *region;
	uint32_t index = 0;
	uint64_t ioctls;
	bool closed;
	int result;

	while ((region = au_children_next(server, &index, &closed))) {
		if (!closed)
			au_error_inherited(region);
		result = au_abi_register(uffd, region->start, region->length,
					 AU_REGISTER_MODE_MISSING, &ioctls);
		if (result && !closed)
			return result;
		if (result)
			seal(region); /* nothing of it may have been left to us */
	}
	return 0;
}

static int send_hello(const struct au_server *server, uint32_t regions, int uffd, int socket)
{
	struct au_hello hello = { .magic = AU_HELLO_MAGIC, .pid = getpid(), .regions = regions };
	struct iovec data = { .iov_base = &hello, .iov_len = sizeof hello };
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(2 * sizeof(int))];
	} control;
	struct msghdr message = {
		.msg_iov = &data,
		.msg_iovlen = 1,
		.msg_control = control.bytes,
		.msg_controllen = sizeof control.bytes,
	};
	int fds[2] = { uffd, socket }, tries = 0;
	struct cmsghdr *header;

	memset(&control, 0, sizeof control);
	header = CMSG_FIRSTHDR(&message);
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof fds);
	memcpy(CMSG_DATA(header), fds, sizeof fds);
	/* The server may be busy, or stopped; fork() must not wait for that without end. */
	while (sendmsg(server->send_fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
		if ((errno == ETOOMANYREFS || errno == EAGAIN) && ++tries < IN_FLIGHT_TRIES)
			au_sleep_ns(AU_NS_PER_MS);
		else if (errno != EINTR)
			return -errno;
	}
	return 0;
}

static int send_all(int socket, const void *data, size_t size)
{
	const char *bytes = data;

	while (size) {
		ssize_t part = send(socket, bytes, size, MSG_NOSIGNAL);

		if (part < 0 && errno != EINTR)
			return -errno;
		if (part > 0) {
			bytes += part;
			size -= (size_t)part;
		}
	}
	return 0;
}

static int send_regions(int socket, int server)
{
	struct au_child_region batch[BATCH];
	struct au_region *region;
	uint32_t index = 0, count = 0;
	int result = 0;

	while (!result && (region = au_children_next(server, &index, NULL))) {
		batch[count++] = (struct au_child_region){ .serial = region->serial,
							   .start = region->start,
							   .length = region->length,
							   .page_size = region->page_size };
		if (count == BATCH) {
			result = send_all(socket, batch, sizeof batch);
			count = 0;
		}
	}
	return result ? result : send_all(socket, batch, count * sizeof *batch);
}

/* The regions are ours to touch. */
static void accept_all(int server, enum au_inherited how)
{
	struct au_region *region;
	uint32_t index = 0;
	bool closed;

	atomic_store(&au_inherits, 1);
	while ((region = au_children_next(server, &index, &closed))) {
		atomic_store(&region->inherited, how);
		atomic_store(&region->readers, 0);
		atomic_store(&region->users, 0);
		atomic_store(&region->closing, closed);
		/* Without memory for it, a poisoned page ends a guarded copy by SIGBUS. */
		au_regions_add(region->start, region->length, region);
	}
}

static void hand_over(int number, struct au_server *server, uint32_t regions, bool user_mode_only)
{
	struct watch *watch = &watches[number];
	const char *step = "userfaultfd";
	int uffd, pair[2] = { -1, -1 }, result;
	bool all_faults;

	result = uffd = new_uffd(user_mode_only, &all_faults);
	if (uffd < 0)
		goto fail;
	step = "UFFDIO_API";
	result = au_abi_api(uffd, 0, NULL, NULL);
	if (result)
		goto fail;
	step = "UFFDIO_REGISTER";
	result = register_regions(uffd, number);
	if (result)
		goto fail;
	step = "socketpair";
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair)) {
		result = -errno;
		goto fail;
	}
	step = "pthread_create";
	watch->uffd = uffd;
	watch->socket = pair[0];
	watch->pidfd = server->pidfd;
	watch->server = number;
	result = start_watch(watch);
	if (result)
		goto fail;
	accept_all(number, all_faults ? AU_INHERITED_ALL_FAULTS : AU_INHERITED_USER_MODE);
	/* Should this fail, the other end of the socket closes, and our thread answers. */
	result = send_hello(server, regions, uffd, pair[1]);
	close(pair[1]);
	if (!result)
		result = send_regions(pair[0], number);
	if (result)
		complain("sending it", result, "touching what is missing is an error (SIGBUS)");
	close(uffd);
	close(pair[0]);
	return;
fail:
	seal_all(number);
	if (pair[0] >= 0) {
		close(pair[0]);
		close(pair[1]);
	}
	if (uffd >= 0)
		close(uffd);
	complain(step, result, "touching it is an error (SIGBUS)");
}

/* Is the socket still ours?  The program may close whatever it likes. */
static bool is_there(const struct au_server *server)
{
	struct stat status;

	return fstat(server->send_fd, &status) == 0 && status.st_ino == server->send_inode;
}

void au_inherit(void)
{
	struct au_server *servers = au_children_forked();
	struct au_region *region;
	int number;

	for (number = 0; number < AU_SERVERS; number++) {
		struct au_server *server = &servers[number];
		uint32_t regions = 0, index = 0;
		bool user_mode_only = true, there = server->used && is_there(server);

		if (!server->used)
			continue;
		if (!there)
			server->send_fd = server->pidfd = -1;
		while ((region = au_children_next(number, &index, NULL))) {
			regions++;
			user_mode_only &= (region->options & AU_REGION_USER_MODE) != 0;
		}
		if (regions) {
			hand_over(number, server, regions, user_mode_only);
			continue;
		}
		if (there) {
			close(server->send_fd);
			if (server->pidfd >= 0)
				close(server->pidfd);
		}
		server->used = false;
	}
	au_children_unlock();
}
