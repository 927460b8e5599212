/* The least that serves the faults of another process, to compare with: poll, read, UFFDIO_COPY.
 *
 *	foreign_server PATH SIZE
 *
 * Takes clients one after the other, in the tests' plain dialect (tests/guests): a count with the
 * descriptor, then start, length and offset of each area.  The object is in memory: the
 * word at byte n is n / 8 + 1.
 */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define PAGE 4096UL
#define AREAS 64
#define BATCH 64

struct area {
	uint64_t start, length, offset;
};

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static int receive(int connection, uint32_t *count)
{
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec part = { count, sizeof *count };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.space,
				  .msg_controllen = sizeof control.space };
	struct cmsghdr *head;
	int fd;

	if (recvmsg(connection, &message, MSG_WAITALL) != sizeof *count)
		return -1;
	head = CMSG_FIRSTHDR(&message);
	if (!head || *count > AREAS)
		die("no descriptor");
	memcpy(&fd, CMSG_DATA(head), sizeof fd);
	return fd;
}

static void serve(int connection, const char *object)
{
	struct uffd_msg messages[BATCH];
	struct area areas[AREAS];
	uint32_t count, index;
	int uffd = receive(connection, &count);

	if (uffd < 0)
		return;
	if (recv(connection, areas, count * sizeof *areas, MSG_WAITALL) !=
	    (ssize_t)(count * sizeof *areas))
		die("areas");
	if (write(connection, "k", 1) != 1)
		die("answer");
	for (;;) {
		struct pollfd watched[2] = { { uffd, POLLIN, 0 }, { connection, POLLIN, 0 } };
		ssize_t got, at;

		if (poll(watched, 2, -1) < 0)
			die("poll");
		if (watched[1].revents)
			break;
		got = read(uffd, messages, sizeof messages);
		for (at = 0; at < got / (ssize_t)sizeof *messages; at++) {
			uint64_t address = messages[at].arg.pagefault.address & ~(PAGE - 1);

			if (messages[at].event != UFFD_EVENT_PAGEFAULT)
				continue;
			for (index = 0; index < count; index++) {
				struct area *area = &areas[index];
				struct uffdio_copy copy = { .dst = address, .len = PAGE };

				if (address < area->start || address >= area->start + area->length)
					continue;
				copy.src = (uint64_t)(uintptr_t)object + area->offset + address -
					   area->start;
				ioctl(uffd, UFFDIO_COPY, &copy);
				break;
			}
		}
	}
	close(uffd);
}

int main(int argc, char **argv)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int listening = socket(AF_UNIX, SOCK_STREAM, 0);
	uint64_t size, word;
	uint64_t *object;

	if (argc != 3)
		return 64;
	size = strtoull(argv[2], NULL, 0);
	object = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (object == MAP_FAILED)
		die("mmap");
	for (word = 0; word < size / 8; word++)
		object[word] = word + 1;
	strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
	if (bind(listening, (struct sockaddr *)&address, sizeof address) || listen(listening, 16))
		die("listen");
	puts("ready");
	fflush(stdout);
	for (;;) {
		int connection = accept(listening, NULL, NULL);

		if (connection < 0)
			die("accept");
		serve(connection, (const char *)object);
		close(connection);
	}
}
