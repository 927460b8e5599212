#include "foreign.h"

#include "abi.h"
#include "sys.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/uio.h>
#include <unistd.h>

/* After EAGAIN: tries between two looks for messages; ns without any after which the thread that is
 * in the way counts as having no CPU; and moments missed in a row before we look for another CPU. */
#define TRIES 8
#define QUIET 100000ULL
#define MISSED 3

static int issue(int fd, int op, uint64_t start, const uint8_t *src, uint64_t length,
		 uint64_t page_size, int64_t *done)
{
	if (op == AU_OP_ZERO && page_size > au_page_size()) {
		/* Huge pages know no ZEROPAGE. */
		op = AU_OP_COPY;
		length = page_size;
	}
	return au_abi_apply(fd, op, start, (uint64_t)(uintptr_t)src, length, 0, done);
}

/* The client may write the same bytes, so no bit of its may be lost. */
static void note(uint8_t *states, uint64_t first, uint64_t last, uint8_t set, uint8_t clear)
{
	for (; states && first < last; first++) {
		__atomic_fetch_or(&states[first], set, __ATOMIC_SEQ_CST);
		__atomic_fetch_and(&states[first], (uint8_t)~clear, __ATOMIC_SEQ_CST);
	}
}

/* Whether a message forbids to go on with [start, end) before it was applied. */
static bool concerns(const struct au_uffd_msg *message, uint64_t start, uint64_t end)
{
	if (message->event == AU_EVENT_PAGEFAULT)
		return false;
	return message->event != AU_EVENT_REMOVE ||
	       (message->arg.remove.start < end && message->arg.remove.end > start);
}

/* False if something was read that has to be applied first, or nothing more can be read. */
static bool listen_on(int fd, struct au_foreign_heard *heard, uint64_t start, uint64_t end)
{
	int64_t got = au_foreign_read(fd, heard->messages + heard->count,
				      heard->room - heard->count);

	if (got < 0)
		return got == -EAGAIN;
	for (; got > 0; got--)
		if (concerns(&heard->messages[heard->count++], start, end)) {
			heard->count += got - 1;
			return false;
		}
	return true;
}

/* To another CPU, if there is one for us. A thread that we wake may be put on ours, where it only
 * runs while we do not: from one event to the next, and we never see the moment in between. */
static void change_cpu(void)
{
	cpu_set_t all, others;
	int cpu = sched_getcpu();

	if (cpu < 0 || cpu >= CPU_SETSIZE || sched_getaffinity(0, sizeof(all), &all))
		return;
	others = all;
	CPU_CLR(cpu, &others);
	if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof(others), &others))
		sched_setaffinity(0, sizeof(all), &all);
}

/* Go on after EAGAIN: see au_foreign_fill. */
static int persist(int fd, int op, uint64_t start, const uint8_t *src, uint64_t length,
		   uint64_t page_size, int64_t *done, struct au_foreign_heard *heard,
		   uint64_t limit)
{
	uint64_t now = au_now_ns(), quiet = now + QUIET;
	int64_t known = heard->count, missed = 0;
	int tries;

	while (listen_on(fd, heard, start, start + length)) {
		for (tries = 0; tries < TRIES; tries++) {
			int result = issue(fd, op, start, src, length, page_size, done);

			if (result != -EAGAIN || *done > 0)
				return result;
		}
		now = au_now_ns();
		if (heard->count != known) {
			missed += heard->count - known;
			known = heard->count;
			quiet = now + QUIET;
			if (missed >= MISSED) {
				change_cpu();
				missed = 0;
			}
		} else if (now + QUIET / 2 > quiet) {
			sched_yield();
		}
		if (now > limit || now > quiet)
			break;
	}
	return -EAGAIN;
}

int64_t au_foreign_fill(int fd, int op, uint64_t start, const uint8_t *src, uint64_t length,
			uint64_t page_size, uint8_t *states, uint64_t *absent,
			struct au_foreign_heard *heard)
{
	uint64_t at = 0, most = length, limit = heard ? au_now_ns() + heard->patience : 0;

	*absent = 0;
	while (at < length) {
		uint64_t part = length - at < most ? length - at : most;
		int64_t done;
		int result = issue(fd, op, start + at, op == AU_OP_COPY ? src + at : src, part,
				   page_size, &done);

		if (result == -EAGAIN && done <= 0 && heard)
			result = persist(fd, op, start + at, op == AU_OP_COPY ? src + at : src, part,
					 page_size, &done, heard, limit);
		if (done > 0) {
			note(states, at / page_size, (at + (uint64_t)done) / page_size,
			     AU_FOREIGN_INSTALLED, AU_FOREIGN_ABSENT);
			at += (uint64_t)done;
			continue;
		}
		if ((result == -ENOENT || result == -EFAULT) && part > page_size) {
			/* Not mapped, or two mappings that one call cannot fill, or a file that was
			 * made shorter: page by page. */
			most = page_size;
			continue;
		}
		if (result == -EEXIST) {
			note(states, at / page_size, at / page_size + 1, AU_FOREIGN_INSTALLED,
			     AU_FOREIGN_ABSENT);
		} else if (result == -ENOENT || result == -EFAULT) {
			note(states, at / page_size, at / page_size + 1, AU_FOREIGN_ABSENT,
			     AU_FOREIGN_INSTALLED);
			*absent += page_size;
		}
		if (result == -EEXIST || result == -ENOENT || result == -EFAULT) {
			au_abi_wake(fd, start + at, page_size);
			at += page_size;
			continue;
		}
		if (result == 0)
			result = -EIO; /* success with no byte done: should not happen */
		return -1 - (int64_t)(at << 8 | (uint64_t)(-result & 0xff));
	}
	return (int64_t)at;
}

int64_t au_foreign_read(int fd, struct au_uffd_msg *messages, int64_t max)
{
	struct iovec part = { messages, (size_t)max * sizeof(*messages) };
	struct pollfd ready = { .fd = fd, .events = POLLIN };
	ssize_t got;

	if (max <= 0)
		return -EINVAL;
	do
		got = preadv2(fd, &part, 1, -1, RWF_NOWAIT);
	while (got < 0 && errno == EINTR);
	if (got < 0 && errno != EOPNOTSUPP && errno != ENOSYS && errno != ESPIPE)
		return -errno;
	if (got < 0) {
		/* Before Linux 6.10. A descriptor that would block is never ready but in error. */
		if (poll(&ready, 1, 0) <= 0 || ready.revents != POLLIN)
			return -EAGAIN;
		return au_abi_read(fd, messages, (int)max);
	}
	return got / (ssize_t)sizeof(*messages);
}

static const struct au_foreign_area *find(const struct au_foreign_area *areas, uint64_t count,
					  uint64_t address)
{
	uint64_t low = 0, high = count;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;

		if (address < areas[middle].start)
			high = middle;
		else if (address - areas[middle].start >= areas[middle].length)
			low = middle + 1;
		else
			return &areas[middle];
	}
	return NULL;
}

static bool all_missing(const uint8_t *states, uint64_t first, uint64_t last)
{
	for (; first < last; first++)
		if (states[first])
			return false;
	return true;
}

/* True if the fault is answered. */
static bool answer(int fd, const struct au_foreign_area *area, uint64_t window, uint64_t address,
		   uint64_t *installed)
{
	uint64_t size = area->page_size, page = (address - area->start) / size;
	uint64_t first = page, last = page + 1;
	int64_t done = 0;

	if (area->states[page])
		return false;
	if (window > size) {
		uint64_t pages = window / size, most = area->length / size;

		first = page / pages * pages;
		last = first + pages < most ? first + pages : most;
		if (!all_missing(area->states, first, last)) {
			first = page;
			last = page + 1;
		}
	}
	if (au_abi_copy(fd, area->start + first * size,
			(uint64_t)(uintptr_t)(area->bytes + first * size), (last - first) * size, 0,
			&done) &&
	    done <= 0)
		return false;
	*installed += (uint64_t)done;
	for (; done > 0; done -= (int64_t)size)
		__atomic_fetch_or(&area->states[first++], AU_FOREIGN_INSTALLED, __ATOMIC_SEQ_CST);
	return page < first;
}

static bool has_event(const struct au_uffd_msg *messages, int64_t count)
{
	int64_t index;

	for (index = 0; index < count; index++)
		if (messages[index].event != AU_EVENT_PAGEFAULT)
			return true;
	return false;
}

int64_t au_foreign_pump(int fd, const struct au_foreign_area *areas, uint64_t count,
			uint64_t window, struct au_uffd_msg *out, int64_t max, uint64_t *faults,
			uint64_t *installed)
{
	int64_t got = au_foreign_read(fd, out, max), index, left = 0;

	*faults = *installed = 0;
	if (got <= 0 || has_event(out, got))
		return got;
	for (index = 0; index < got; index++) {
		uint64_t address = out[index].arg.pagefault.address;
		const struct au_foreign_area *area = find(areas, count, address);

		if (area && !(out[index].arg.pagefault.flags & ~(uint64_t)AU_PAGEFAULT_FLAG_WRITE) &&
		    answer(fd, area, window, address, installed))
			(*faults)++;
		else
			out[left++] = out[index];
	}
	/* A full batch, all answered: there may be more, and no event may wait unread. */
	return left;
}

int au_foreign_alive(int fd)
{
	/* The page behind the first one: nobody has memory registered that low. */
	uint64_t nowhere = au_page_size();
	int64_t done;

	return au_abi_zeropage(fd, nowhere, au_page_size(), 0, &done) != -ESRCH;
}
