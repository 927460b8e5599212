/* Filling memory whose owner drops pages all the time. */
#include "harness.h"

#include "foreign.h"

#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGES 4096ULL
#define ROOM 64

static struct {
	int fd;
	uint8_t *memory;
	_Atomic int stop;
	_Atomic uint64_t dropped;
} owner;

static void owner_open(void)
{
	uint64_t ioctls, features;

	owner.fd = au_abi_open(AU_USER_MODE_ONLY, AU_VIA_SYSCALL, -1);
	CHECK(owner.fd >= 0);
	CHECK_EQ(au_abi_api(owner.fd, AU_FEATURE_EVENT_REMOVE, &features, &ioctls), 0);
	owner.memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(owner.memory != MAP_FAILED);
	CHECK_EQ(au_abi_register(owner.fd, (uint64_t)(uintptr_t)owner.memory, PAGES * PAGE,
				 AU_REGISTER_MODE_MISSING, &ioctls), 0);
}

static uint64_t address(uint64_t page)
{
	return (uint64_t)(uintptr_t)owner.memory + page * PAGE;
}

static void *drop(void *page)
{
	CHECK_EQ(madvise(owner.memory + (uintptr_t)page * PAGE, PAGE, MADV_DONTNEED), 0);
	atomic_fetch_add(&owner.dropped, 1);
	return NULL;
}

/* The upper half, page by page, without a pause that is worth the name. */
static void *inflate(void *unused)
{
	uint64_t number;

	(void)unused;
	for (number = 0; !atomic_load(&owner.stop); number++) {
		drop((void *)(uintptr_t)(PAGES / 2 + number % (PAGES / 2)));
		if (number % 256 == 255)
			au_sleep_ns(100000);
	}
	return NULL;
}

static void fills_between_two_events(void)
{
	struct au_uffd_msg messages[ROOM];
	struct au_foreign_heard heard = { .patience = AU_NS_PER_MS, .messages = messages,
					  .room = ROOM };
	uint64_t until = au_now_ns() + 20 * AU_NS_PER_S, page, absent, events = 0;
	uint8_t *bytes = malloc(PAGE), states[PAGES / 2] = { 0 };
	struct pollfd event = { .events = POLLIN };
	cpu_set_t before, after;
	pthread_t thread;

	owner_open();
	CHECK_EQ(sched_getaffinity(0, sizeof(before), &before), 0);
	thread = spawn(inflate, NULL);
	/* Or all could be filled before it first runs. */
	event.fd = owner.fd;
	CHECK_EQ(poll(&event, 1, 10000), 1);
	for (page = 0; page < 300; page++) {
		int64_t result;

		pattern_fill(bytes, page * PAGE, PAGE);
		do {
			heard.count = 0;
			result = au_foreign_fill(owner.fd, AU_OP_COPY, address(page), bytes, PAGE, PAGE,
						 states + page, &absent, &heard);
			events += (uint64_t)heard.count;
			CHECK(result == (int64_t)PAGE || result == -1 - EAGAIN);
			CHECK(au_now_ns() < until);
		} while (result < 0);
		CHECK_EQ(states[page], AU_FOREIGN_INSTALLED);
		CHECK(pattern_holds(owner.memory + page * PAGE, page * PAGE, PAGE));
	}
	CHECK(events > 0);
	CHECK_EQ(sched_getaffinity(0, sizeof(after), &after), 0);
	CHECK(CPU_EQUAL(&before, &after));
	atomic_store(&owner.stop, 1);
	while (pthread_tryjoin_np(thread, NULL))
		au_foreign_read(owner.fd, messages, ROOM);
	free(bytes);
}

/* What is removed while it is filled has to be looked at first. */
static void stops_at_what_concerns_it(void)
{
	struct au_uffd_msg messages[ROOM];
	struct au_foreign_heard heard = { .patience = 10 * AU_NS_PER_S, .messages = messages,
					  .room = ROOM };
	uint8_t *bytes = calloc(2, PAGE);
	uint64_t absent;
	pthread_t thread;

	owner_open();
	thread = spawn(drop, (void *)1);
	EVENTUALLY(readable(owner.fd));
	CHECK_EQ(au_foreign_fill(owner.fd, AU_OP_COPY, address(0), bytes, 2 * PAGE, PAGE, NULL,
				 &absent, &heard), -1 - EAGAIN);
	CHECK_EQ(heard.count, 1);
	CHECK_EQ(messages[0].event, AU_EVENT_REMOVE);
	CHECK_EQ(messages[0].arg.remove.start, address(1));
	join(thread);
	/* Nothing is in the way any more, and the page beside it does not mind. */
	heard.count = 0;
	CHECK_EQ(au_foreign_fill(owner.fd, AU_OP_COPY, address(0), bytes, PAGE, PAGE, NULL, &absent,
				 &heard), PAGE);
	thread = spawn(drop, (void *)1);
	EVENTUALLY(readable(owner.fd));
	CHECK_EQ(au_foreign_fill(owner.fd, AU_OP_COPY, address(2), bytes, PAGE, PAGE, NULL, &absent,
				 &heard), PAGE);
	CHECK_EQ(heard.count, 1);
	join(thread);
	free(bytes);
}

/* What it cannot read stays in the way. */
static void no_room_to_read_on(void)
{
	struct au_uffd_msg messages[1];
	struct au_foreign_heard heard = { .patience = 100 * AU_NS_PER_S, .messages = messages,
					  .room = 1 };
	uint8_t *bytes = calloc(1, PAGE);
	pthread_t thread[2];
	uint64_t absent;

	owner_open();
	thread[0] = spawn(drop, (void *)1);
	thread[1] = spawn(drop, (void *)2);
	EVENTUALLY(readable(owner.fd));
	au_sleep_ns(10 * AU_NS_PER_MS);
	/* Room for one of the two: the other stays in the way. */
	CHECK_EQ(au_foreign_fill(owner.fd, AU_OP_COPY, address(0), bytes, PAGE, PAGE, NULL, &absent,
				 &heard), -1 - EAGAIN);
	CHECK_EQ(heard.count, 1);
	heard.count = 0;
	EVENTUALLY(au_foreign_fill(owner.fd, AU_OP_COPY, address(0), bytes, PAGE, PAGE, NULL,
				   &absent, &heard) == (int64_t)PAGE);
	join(thread[0]);
	join(thread[1]);
	free(bytes);
}

const struct test foreign_tests[] = {
	{ "foreign: fills between two events", fills_between_two_events, 0, NULL },
	{ "foreign: stops at what concerns it", stops_at_what_concerns_it, 0, NULL },
	{ "foreign: gives up where it cannot read on", no_room_to_read_on, 0, NULL },
	{ 0 },
};
