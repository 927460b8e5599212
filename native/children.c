#include "children.h"

#include "region.h"
#include "sys.h"

#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

/* A region that is left to children. */
struct kept {
	struct au_region *region;
	int server;
	bool closed;
};

/* The descriptors of a child that we serve. */
struct held {
	int uffd, socket;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct au_server servers[AU_SERVERS];
static int own = -1; /* which of them we are */
static struct kept *kept;
static uint32_t kept_count, kept_capacity;
static struct held *held;
static uint32_t held_count, held_capacity;
static uint64_t last_serial;

void au_children_lock(void)
{
	pthread_mutex_lock(&lock);
}

void au_children_unlock(void)
{
	pthread_mutex_unlock(&lock);
}

/* Room for one item more.  By mmap: whoever forks waits for our lock and must not, before that, have
 * taken malloc's. */
static int make_room(void **items, uint32_t *capacity, uint32_t count, size_t size)
{
	uint32_t bigger = *capacity ? *capacity * 2 : (uint32_t)(au_page_size() / size);
	void *memory;

	if (count < *capacity)
		return 0;
	memory = mmap(NULL, bigger * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		      0);
	if (memory == MAP_FAILED)
		return -ENOMEM;
	if (count) {
		memcpy(memory, *items, count * size);
		munmap(*items, *capacity * size);
	}
	*items = memory;
	*capacity = bigger;
	return 0;
}

/* --------------------------------------------------------------- regions */

static ino_t inode_of(int fd)
{
	struct stat status;

	return fstat(fd, &status) ? 0 : status.st_ino;
}

/* Which server we are, or -errno. */
static int be_server(void)
{
	int number, pair[2];

	if (own >= 0)
		return own;
	for (number = 0; number < AU_SERVERS && servers[number].used; number++)
		;
	if (number == AU_SERVERS)
		return -ENOSPC;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		return -errno;
	servers[number] = (struct au_server){
		.used = true,
		.receive_fd = pair[0],
		.send_fd = pair[1],
		.receive_inode = inode_of(pair[0]),
		.send_inode = inode_of(pair[1]),
		.pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0),
	};
	own = number;
	return number;
}

int au_children_add(struct au_region *region)
{
	int server, result;

	au_children_lock();
	server = be_server();
	result = server < 0 ? server :
			      make_room((void **)&kept, &kept_capacity, kept_count, sizeof *kept);
	if (!result) {
		region->serial = ++last_serial;
		kept[kept_count++] = (struct kept){ .region = region, .server = server };
	}
	au_children_unlock();
	return result;
}

void au_children_closed(struct au_region *region)
{
	uint32_t index;

	au_children_lock();
	for (index = 0; index < kept_count; index++)
		if (kept[index].region == region)
			kept[index].closed = true;
	au_children_unlock();
}

void au_children_remove(struct au_region *region)
{
	uint32_t index;

	au_children_lock();
	for (index = 0; index < kept_count; index++)
		if (kept[index].region == region) {
			kept[index] = kept[--kept_count];
			break;
		}
	au_children_unlock();
}

void au_children_all_closed(int server)
{
	uint32_t index;

	for (index = 0; index < kept_count; index++)
		if (kept[index].server == server)
			kept[index].closed = true;
}

struct au_region *au_children_next(int server, uint32_t *index, bool *closed)
{
	while (*index < kept_count) {
		const struct kept *item = &kept[(*index)++];

		if (item->server != server)
			continue;
		if (closed)
			*closed = item->closed;
		return item->region;
	}
	return NULL;
}

/* -------------------------------------------------------------- children */

int au_children_fd(void)
{
	int fd;

	au_children_lock();
	fd = own < 0 ? -EBADF : servers[own].receive_fd;
	au_children_unlock();
	return fd;
}

static int receive(struct au_child *child)
{
	struct au_hello hello = { 0 };
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
	struct cmsghdr *header;
	int fds[2], count = 0, index;
	ssize_t size;

	do
		size = recvmsg(servers[own].receive_fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	while (size < 0 && errno == EINTR);
	if (size < 0)
		return errno == EAGAIN ? 0 : -errno;
	if (size == 0)
		return -EPIPE; /* the program has closed the other end: none will come any more */
	header = CMSG_FIRSTHDR(&message);
	if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
		count = (int)((header->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		memcpy(fds, CMSG_DATA(header), (size_t)count * sizeof(int));
	}
	if (count == 2 && size == sizeof hello && hello.magic == AU_HELLO_MAGIC) {
		*child = (struct au_child){ .uffd = fds[0],
					    .socket = fds[1],
					    .pid = hello.pid,
					    .regions = hello.regions };
		held[held_count++] = (struct held){ .uffd = fds[0], .socket = fds[1] };
		return 1;
	}
	for (index = 0; index < count; index++)
		close(fds[index]);
	return message.msg_flags & MSG_CTRUNC ? -EMFILE : -EPROTO;
}

int au_children_receive(struct au_child *child)
{
	int result;

	au_children_lock();
	result = own < 0 ? -EBADF :
			   make_room((void **)&held, &held_capacity, held_count, sizeof *held);
	if (!result)
		result = receive(child);
	au_children_unlock();
	return result;
}

void au_children_release(int uffd, int socket)
{
	uint32_t index;

	au_children_lock();
	for (index = 0; index < held_count; index++)
		if (held[index].uffd == uffd && held[index].socket == socket) {
			held[index] = held[--held_count];
			/* In this order: the end of the socket makes the child read its messages. */
			close(uffd);
			close(socket);
			break;
		}
	au_children_unlock();
}

struct au_server *au_children_forked(void)
{
	uint32_t index;

	/* The copies of our elder siblings' descriptors act on their memory, and would
	 * keep from them that their server has gone. */
	for (index = 0; index < held_count; index++) {
		close(held[index].uffd);
		close(held[index].socket);
	}
	held_count = 0;
	if (own >= 0) {
		struct au_server *parent = &servers[own];

		/* Unless the number was closed, and means something else by now. */
		if (inode_of(parent->receive_fd) == parent->receive_inode)
			close(parent->receive_fd);
		parent->receive_fd = -1;
	}
	own = -1;
	return servers;
}
