#include "task.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

static _Atomic int original = -1, reserve_fd = -1;

static void path_of(char *path, uint32_t tid, const char *leaf)
{
	static const char head[] = "/proc/self/task/";
	char digits[12];
	size_t at = sizeof head - 1, count = 0, index;

	memcpy(path, head, at);
	do
		digits[count++] = (char)('0' + tid % 10);
	while (tid /= 10);
	for (index = 0; index < count; index++)
		path[at++] = digits[count - 1 - index];
	path[at++] = '/';
	strcpy(path + at, leaf);
}

void au_task_reserve(int fd)
{
	int old = atomic_exchange(&reserve_fd, -1);

	if (old >= 0)
		close(old);
	atomic_store(&original, fd);
	if (fd >= 0)
		atomic_store(&reserve_fd, fcntl(fd, F_DUPFD_CLOEXEC, 0));
}

struct opened {
	int fd, reserve;
};

static struct opened open_task(uint32_t tid, const char *leaf)
{
	struct opened file = { .reserve = -1 };
	char path[64];

	path_of(path, tid, leaf);
	file.fd = open(path, O_RDONLY | O_CLOEXEC);
	if (file.fd >= 0 || (errno != EMFILE && errno != ENFILE))
		return file;
	/* Whoever could close one may be the thread that waits. */
	file.reserve = atomic_exchange(&reserve_fd, -1);
	if (file.reserve >= 0) {
		close(file.reserve);
		file.fd = open(path, O_RDONLY | O_CLOEXEC);
	}
	return file;
}

static void close_task(struct opened file)
{
	int from = atomic_load(&original);

	/* Replaced in one step, or somebody else takes the number. */
	if (file.fd >= 0 && file.reserve >= 0 && dup3(from, file.fd, O_CLOEXEC) == file.fd)
		atomic_store(&reserve_fd, file.fd);
	else if (file.fd >= 0)
		close(file.fd);
	else if (file.reserve >= 0)
		atomic_store(&reserve_fd, fcntl(from, F_DUPFD_CLOEXEC, 0));
}

ssize_t au_task_read(uint32_t tid, const char *leaf, char *buffer, size_t size)
{
	struct opened file = open_task(tid, leaf);
	ssize_t count;

	if (file.fd < 0 || (count = read(file.fd, buffer, size - 1)) < 0)
		count = -errno;
	else
		buffer[count] = 0;
	close_task(file);
	return count;
}

/* Reads the lines of /proc/.../status one character at a time: the list of groups alone may be
 * larger than a stack. */
struct reader {
	struct au_task_signals *signals;
	uint64_t *value; /* of the line that is read, if it is wanted */
	uint32_t column, found;
	char name[8];
};

static void take(struct reader *reader, char c)
{
	if (c == '\n') {
		reader->found += reader->value != NULL;
		reader->column = 0;
		reader->value = NULL;
		return;
	}
	if (reader->column < 7) {
		reader->name[reader->column++] = c;
		if (reader->column < 7)
			return;
		if (!memcmp(reader->name, "SigPnd:", 7))
			reader->value = &reader->signals->pending;
		else if (!memcmp(reader->name, "ShdPnd:", 7))
			reader->value = &reader->signals->shared;
		else if (!memcmp(reader->name, "SigBlk:", 7))
			reader->value = &reader->signals->blocked;
		return;
	}
	if (reader->value && c > ' ')
		*reader->value = *reader->value * 16 + (uint64_t)(c <= '9' ? c - '0' : c - 'a' + 10);
}

int au_task_signals(uint32_t tid, struct au_task_signals *signals)
{
	struct opened file = open_task(tid, "status");
	struct reader reader = { .signals = signals };
	char buffer[256];
	ssize_t count = file.fd < 0 ? -1 : 1, index;
	int result;

	memset(signals, 0, sizeof *signals);
	while (count > 0 && reader.found < 3) {
		count = read(file.fd, buffer, sizeof buffer);
		for (index = 0; index < count; index++)
			take(&reader, buffer[index]);
	}
	result = reader.found == 3 ? 0 : count < 0 ? -errno : -ENODATA;
	close_task(file);
	return result;
}

bool au_task_exists(uint32_t tid)
{
	char path[64];

	path_of(path, tid, "stat");
	if (access(path, F_OK) == 0)
		return true;
	return kill((pid_t)tid, 0) == 0 || errno == EPERM;
}
