/* A byte server fast enough never to be what a benchmark measures.
 *
 *	tcp_server [port [latency_ms]]
 *
 * Listens on 127.0.0.1 (port 0 or none: any) and prints "port N" when ready; ends
 * when its standard input is closed, so it never outlives its parent.
 *
 * A request is 16 bytes, little-endian: u64 offset, u64 length.  The reply is
 * `length` bytes and nothing else, in the order of the requests.  The 64-bit word
 * at offset 8k of the object is ((k mod 2^23) + 1) * 0x9e3779b97f4a7c15: a 64 MiB
 * pattern that repeats for ever.
 *
 * Any number of requests may be under way on a connection.  The latency delays
 * each reply by that much after its request arrived, without slowing the stream:
 * what a distant server does, not what a slow one does.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define OBJECT (64UL << 20)
#define QUEUE 4096          /* requests under way per connection, a power of two */
#define TURN (4UL << 20)    /* bytes sent before another connection gets its turn */

struct request {
	uint64_t offset, length;
	uint64_t due; /* ns */
};

struct connection {
	int fd;
	bool blocked;        /* the socket takes no more until EPOLLOUT */
	uint8_t partial[16]; /* a request that has not arrived whole */
	size_t partial_length;
	uint32_t head, tail; /* of the ring */
	struct request ring[QUEUE];
	struct connection *next, *previous;
};

static uint8_t *object;
static uint64_t latency_ns;
static struct connection connections = { .next = &connections, .previous = &connections };
static int epoll_fd;

static uint64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void make_object(void)
{
	uint64_t word;

	object = mmap(NULL, OBJECT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (object == MAP_FAILED)
		die("mmap");
	madvise(object, OBJECT, MADV_HUGEPAGE);
	for (word = 0; word < OBJECT / 8; word++)
		((uint64_t *)object)[word] = (word + 1) * 0x9e3779b97f4a7c15ULL;
}

static void watch(struct connection *connection, int operation)
{
	/* A full ring stops the reading; the client's requests wait in the socket. */
	bool full = connection->tail - connection->head == QUEUE;
	struct epoll_event event = {
		.events = (full ? 0 : EPOLLIN) | (connection->blocked ? EPOLLOUT : 0),
		.data.ptr = connection,
	};

	epoll_ctl(epoll_fd, operation, connection->fd, &event);
}

static void drop(struct connection *connection)
{
	connection->next->previous = connection->previous;
	connection->previous->next = connection->next;
	close(connection->fd);
	free(connection);
}

static void welcome(int listener)
{
	int one = 1, fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
	struct connection *connection;

	if (fd < 0)
		return;
	connection = calloc(1, sizeof *connection);
	if (!connection) {
		close(fd);
		return;
	}
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	connection->fd = fd;
	connection->next = &connections;
	connection->previous = connections.previous;
	connection->previous->next = connection;
	connections.previous = connection;
	watch(connection, EPOLL_CTL_ADD);
}

/* False when the client has gone. */
static bool receive(struct connection *connection)
{
	uint8_t data[16 * 256];
	uint32_t space = QUEUE - (connection->tail - connection->head);
	size_t room = sizeof data, have = connection->partial_length, used;
	uint64_t due = now_ns() + latency_ns;
	ssize_t got;

	if (room > 16UL * space)
		room = 16UL * space;
	if (room <= have)
		return true;
	memcpy(data, connection->partial, have);
	got = recv(connection->fd, data + have, room - have, 0);
	if (got <= 0)
		return got < 0 && (errno == EAGAIN || errno == EINTR);
	have += (size_t)got;
	for (used = 0; used + 16 <= have; used += 16) {
		struct request *request = &connection->ring[connection->tail++ % QUEUE];

		memcpy(&request->offset, data + used, 8);
		memcpy(&request->length, data + used + 8, 8);
		request->due = due;
	}
	connection->partial_length = have - used;
	memcpy(connection->partial, data + used, have - used);
	return true;
}

/* Send what is due, up to one turn.  False when the client has gone. */
static bool reply(struct connection *connection, uint64_t now)
{
	uint64_t sent = 0;

	while (!connection->blocked && connection->head != connection->tail && sent < TURN) {
		struct request *request = &connection->ring[connection->head % QUEUE];
		uint64_t at = request->offset % OBJECT, length = OBJECT - at;
		bool more = connection->head + 1 != connection->tail;
		ssize_t got;

		if (request->due > now)
			break;
		if (length >= request->length)
			length = request->length;
		else
			more = true;
		got = length ? send(connection->fd, object + at, length,
				    MSG_NOSIGNAL | (more && !latency_ns ? MSG_MORE : 0)) : 0;
		if (got < 0) {
			if (errno != EAGAIN && errno != EINTR)
				return false;
			connection->blocked = errno == EAGAIN;
			continue;
		}
		sent += (uint64_t)got;
		request->offset += (uint64_t)got;
		request->length -= (uint64_t)got;
		if (!request->length)
			connection->head++;
	}
	return true;
}

/* Serve every connection; returns how long nothing more will be due, in ns. */
static uint64_t serve_all(void)
{
	uint64_t now = now_ns(), wait = UINT64_MAX;
	struct connection *connection, *next;

	for (connection = connections.next; connection != &connections; connection = next) {
		uint32_t was = connection->tail - connection->head;
		bool blocked = connection->blocked;

		next = connection->next;
		if (!was)
			continue;
		if (!reply(connection, now)) {
			drop(connection);
			continue;
		}
		if (blocked != connection->blocked || was == QUEUE)
			watch(connection, EPOLL_CTL_MOD);
		if (!connection->blocked && connection->head != connection->tail) {
			uint64_t due = connection->ring[connection->head % QUEUE].due;

			if (due <= now)
				wait = 0;
			else if (due - now < wait)
				wait = due - now;
		}
	}
	return wait;
}

static int listen_on(uint16_t port)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET,
		.sin_port = htons(port),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	socklen_t length = sizeof address;
	int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, length) < 0 || listen(fd, 512) < 0 ||
	    getsockname(fd, (struct sockaddr *)&address, &length) < 0)
		die("listen");
	printf("port %d\n", ntohs(address.sin_port));
	fflush(stdout);
	return fd;
}

int main(int argc, char **argv)
{
	struct epoll_event events[256], event = { .events = EPOLLIN };
	uint64_t wait = UINT64_MAX;
	int listener, count, index;

	latency_ns = argc > 2 ? (uint64_t)(atof(argv[2]) * 1e6) : 0;
	make_object();
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	listener = listen_on(argc > 1 ? (uint16_t)atoi(argv[1]) : 0);
	event.data.ptr = &listener;
	epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
	event.data.ptr = NULL;
	epoll_ctl(epoll_fd, EPOLL_CTL_ADD, STDIN_FILENO, &event); /* fails for a file: fine */

	for (;;) {
		struct timespec time = { (time_t)(wait / 1000000000), (long)(wait % 1000000000) };

		count = epoll_pwait2(epoll_fd, events, 256, wait == UINT64_MAX ? NULL : &time, NULL);
		for (index = 0; index < count; index++) {
			struct connection *connection = events[index].data.ptr;

			if (!connection) {
				char byte;

				if (read(STDIN_FILENO, &byte, 1) <= 0)
					return 0;
			} else if (events[index].data.ptr == &listener) {
				welcome(listener);
			} else if (events[index].events & (EPOLLERR | EPOLLHUP)) {
				drop(connection);
			} else {
				bool alive = true;

				if (events[index].events & EPOLLIN)
					alive = receive(connection);
				if (events[index].events & EPOLLOUT)
					connection->blocked = false;
				if (!alive)
					drop(connection);
				else
					watch(connection, EPOLL_CTL_MOD);
			}
		}
		wait = serve_all();
	}
}
