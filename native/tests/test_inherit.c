/* Memory that is left to forked children: they hand it over, and are served, or get errors. */
#include "harness.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGES 8
#define NO_THREADS "no threads may be made in a child of a process with threads"

static struct bench bench;
static int talk[2]; /* from children to whom it concerns */

/* Under AddressSanitizer a thread that starts allocates, and a fork in the middle of that leaves
 * its child an allocator that is locked for ever.  So no fork before the sentry sleeps. */
static void sentry_sleeps(void)
{
	uint64_t before = counted(AU_COUNT_kicks);

	EVENTUALLY((au_sentry_kick(), counted(AU_COUNT_kicks) > before));
}

static void open_left(int kind, uint64_t pages)
{
	bench_open(&bench, (struct setup){ .length = pages * PAGE, .block = 1, .kind = kind,
					   .options = AU_REGION_SERVE });
	sentry_sleeps();
}

static void open_talk(void)
{
	CHECK_EQ(pipe(talk), 0);
}

static pid_t fork_to(void (*body)(void))
{
	pid_t child = fork();

	CHECK(child >= 0);
	if (child == 0) {
		alarm(10);
		body();
		_exit(0);
	}
	return child;
}

static void ends_well(pid_t child)
{
	int status;

	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void say(char what)
{
	CHECK_EQ(__real_write(talk[1], &what, 1), 1);
}

static char hear(void)
{
	struct pollfd item = { .fd = talk[0], .events = POLLIN };
	char what = 0;

	CHECK_EQ(poll(&item, 1, 10000), 1);
	CHECK_EQ(read(talk[0], &what, 1), 1);
	return what;
}

/* -------------------------------------------------------------- a server */

/* It allocates nothing, and has started before anybody forks: see sentry_sleeps. */

#define CHILDREN 64

static struct {
	struct au_child child[CHILDREN];
	uint32_t count;
	_Atomic uint64_t faults;
	_Atomic int stop, started;
	pthread_t thread;
} family;

static struct au_child_region first_region(const struct au_child *child)
{
	struct au_child_region region;
	uint32_t index;

	for (index = 0; index < child->regions; index++) {
		struct au_child_region item;
		size_t got = 0;

		while (got < sizeof item) {
			ssize_t part = read(child->socket, (char *)&item + got, sizeof item - got);

			CHECK(part > 0);
			got += (size_t)part;
		}
		if (!index)
			region = item;
	}
	return region;
}

static void welcome(void)
{
	struct au_child child;
	struct au_child_region region;

	while (au_children_receive(&child) == 1) {
		CHECK(family.count < CHILDREN);
		CHECK(child.regions >= 1);
		region = first_region(&child);
		CHECK_EQ(region.serial, bench.region->serial);
		CHECK_EQ(region.start, bench.region->start);
		CHECK_EQ(region.length, bench.region->length);
		CHECK_EQ(region.page_size, bench.region->page_size);
		family.child[family.count++] = child;
	}
}

static void answer(int uffd, struct au_region *region)
{
	struct au_uffd_msg message;
	uint8_t bytes[PAGE];
	int error;

	while (au_abi_read(uffd, &message, 1) == 1) {
		uint64_t address = message.arg.pagefault.address & ~(PAGE - 1);
		uint64_t offset = address - region->start;
		int64_t done;

		CHECK(offset < region->length);
		pattern_fill(bytes, offset, PAGE);
		if (region->kind == AU_KIND_MEMFD) {
			au_region_install(region, AU_OP_COPY, offset, bytes, PAGE, 0, UINT64_MAX,
					  &error);
			au_abi_wake(uffd, address, PAGE);
		} else {
			au_abi_copy(uffd, address, (uint64_t)(uintptr_t)bytes, PAGE, 0, &done);
		}
		atomic_fetch_add(&family.faults, 1);
	}
}

static void *serve(void *ignored)
{
	struct pollfd items[CHILDREN + 1];
	uint32_t index;

	(void)ignored;
	atomic_store(&family.started, 1);
	while (!atomic_load(&family.stop)) {
		items[0] = (struct pollfd){ .fd = au_children_fd(), .events = POLLIN };
		for (index = 0; index < family.count; index++)
			items[index + 1] = (struct pollfd){ .fd = family.child[index].uffd,
							    .events = POLLIN };
		poll(items, family.count + 1, 5);
		for (index = 0; index < family.count; index++)
			answer(family.child[index].uffd, bench.region);
		welcome();
	}
	return NULL;
}

static void serve_start(void)
{
	atomic_store(&family.stop, 0);
	family.thread = spawn(serve, NULL);
	EVENTUALLY(atomic_load(&family.started));
}

static void serve_stop(void)
{
	atomic_store(&family.stop, 1);
	join(family.thread);
	while (family.count) {
		family.count--;
		au_children_release(family.child[family.count].uffd,
				    family.child[family.count].socket);
	}
}

/* ------------------------------------------------------------ being served */

static int receive_fd = -1;

static void touches_all(void)
{
	uint8_t copy[PAGES * PAGE];
	uint64_t where;

	if (receive_fd >= 0)
		CHECK_EQ(fcntl(receive_fd, F_GETFD), -1);
	CHECK(au_region_inherited(bench.region) == AU_INHERITED_ALL_FAULTS);
	CHECK_EQ(touch(bench.region, PAGE), pattern(PAGE));
	CHECK_EQ(au_region_read(bench.region, 0, copy, sizeof copy, &where), 0);
	CHECK(pattern_holds(copy, 0, sizeof copy));
}

static void children_are_served(void)
{
	int error, count, descriptors;
	pid_t child[8];

	open_left(AU_KIND_ANONYMOUS, PAGES);
	install_pattern(bench.region, 0, PAGE, &error);
	receive_fd = au_children_fd();
	descriptors = dup(0);
	close(descriptors);
	serve_start();
	for (count = 0; count < 8; count++)
		child[count] = fork_to(touches_all);
	for (count = 0; count < 8; count++)
		ends_well(child[count]);
	serve_stop();
	/* The first page is theirs from the beginning. */
	CHECK_EQ(atomic_load(&family.faults), 8 * (PAGES - 1));
	CHECK_EQ(atomic_load(&bench.region->present_pages), 1);
	CHECK_EQ(dup(0), descriptors);
	bench_close(&bench);
}

static void shared_memory_is_one(void)
{
	open_left(AU_KIND_MEMFD, PAGES);
	serve_start();
	ends_well(fork_to(touches_all));
	EVENTUALLY(atomic_load(&family.faults) == PAGES);
	ends_well(fork_to(touches_all));
	serve_stop();
	CHECK_EQ(atomic_load(&family.faults), PAGES);
	CHECK_EQ(atomic_load(&bench.region->present_pages), PAGES);
	bench_close(&bench);
}

static void has_grandchildren(void)
{
	ends_well(fork_to(touches_all));
	CHECK_EQ(touch(bench.region, 2 * PAGE), pattern(2 * PAGE));
	ends_well(fork_to(touches_all));
}

static void grandchildren_are_served(void)
{
	open_left(AU_KIND_ANONYMOUS, PAGES);
	serve_start();
	ends_well(fork_to(has_grandchildren));
	serve_stop();
	CHECK_EQ(atomic_load(&family.faults), 2 * PAGES);
	bench_close(&bench);
}

static void closes_everything(void)
{
	int fd;

	for (fd = 3; fd < 1024; fd++)
		close(fd);
	touches_all();
}

static void closing_descriptors_is_harmless(void)
{
	open_left(AU_KIND_ANONYMOUS, PAGES);
	serve_start();
	ends_well(fork_to(closes_everything));
	serve_stop();
	bench_close(&bench);
}

static void operates(void)
{
	uint8_t byte = 0, bytes[PAGE] = { 0 };
	uint64_t where;
	int error;

	/* Touching is all: the rest would act on the parent's bookkeeping. */
	CHECK_EQ(au_region_install(bench.region, AU_OP_COPY, 0, bytes, PAGE, 0, UINT64_MAX, &error),
		 0);
	CHECK_EQ(error, EBADF);
	CHECK_EQ(au_region_drop(bench.region, 0, PAGE), -EBADF);
	CHECK(au_regions_overlap(bench.region->start, 1));
	CHECK_EQ(madvise(at(bench.region, 0), PAGE, MADV_DONTNEED), 0);
	CHECK_EQ(au_region_read(bench.region, 0, &byte, 1, &where), 0);
	CHECK_EQ(byte, pattern(0));
	au_region_close(bench.region, 1);
	CHECK_EQ(au_region_read(bench.region, 0, &byte, 1, &where), -EBADF);
	au_region_free(bench.region);
	au_engine_free(bench.engine);
}

static void a_child_only_touches(void)
{
	int error;

	open_left(AU_KIND_ANONYMOUS, PAGES);
	install_pattern(bench.region, 0, PAGE, &error);
	serve_start();
	ends_well(fork_to(operates));
	CHECK_EQ(touch(bench.region, 0), pattern(0));
	serve_stop();
	bench_close(&bench);
}

static void all_regions_are_told(void)
{
	struct au_region *more[300];
	int index, error;

	open_left(AU_KIND_ANONYMOUS, PAGES);
	for (index = 0; index < 300; index++) {
		more[index] = au_region_create(bench.engine, PAGE, AU_KIND_ANONYMOUS,
					       AU_REGION_SERVE, PAGE, &error);
		CHECK(more[index]);
		CHECK_EQ(more[index]->serial, bench.region->serial + 1 + (uint64_t)index);
	}
	serve_start();
	ends_well(fork_to(touches_all));
	serve_stop();
	for (index = 0; index < 300; index++) {
		au_region_close(more[index], 1);
		au_region_free(more[index]);
	}
	bench_close(&bench);
}

/* A child that makes a region of its own is the server of that. */
static struct bench own;

static struct au_child receive_one(void)
{
	struct pollfd item = { .fd = au_children_fd(), .events = POLLIN };
	struct au_child child;

	CHECK_EQ(poll(&item, 1, 10000), 1);
	CHECK_EQ(au_children_receive(&child), 1);
	CHECK_EQ(au_children_receive(&child), 0);
	return child;
}

static void touches_both(void)
{
	touches_all();
	CHECK_EQ(touch(own.region, 0), pattern(0));
}

static void has_regions_of_its_own(void)
{
	struct pollfd item = { .events = POLLIN };
	struct au_child grandchild;
	pid_t pid;

	atomic_store(&au_counters[AU_COUNT_live_engines], 0);
	atomic_store(&au_counters[AU_COUNT_live_regions], 0);
	bench_open(&own, (struct setup){ .length = PAGE, .block = 1, .options = AU_REGION_SERVE });
	sentry_sleeps();
	pid = fork_to(touches_both);
	grandchild = receive_one();
	CHECK_EQ(grandchild.regions, 1);
	CHECK_EQ(first_region(&grandchild).start, own.region->start);
	item.fd = grandchild.uffd;
	CHECK_EQ(poll(&item, 1, 10000), 1);
	answer(grandchild.uffd, own.region);
	ends_well(pid);
	au_children_release(grandchild.uffd, grandchild.socket);
	bench_close(&own);
}

static void servers_of_two_generations(void)
{
	open_left(AU_KIND_ANONYMOUS, PAGES);
	serve_start();
	ends_well(fork_to(has_regions_of_its_own));
	serve_stop();
	CHECK_EQ(atomic_load(&family.faults), PAGES);
	bench_close(&bench);
}

/* ------------------------------------------------------- not being served */

static void *reads_third(void *region)
{
	uint64_t where = 0;
	uint8_t byte;
	int result = au_region_read(region, 2 * PAGE, &byte, 1, &where);

	CHECK_EQ(where, 2 * PAGE);
	return (void *)(intptr_t)result;
}

static void waits_and_fails(void)
{
	pthread_t thread;

	say('w');
	thread = spawn(reads_third, bench.region);
	CHECK_EQ((intptr_t)reads_third(bench.region), -EIO);
	CHECK_EQ((intptr_t)join(thread), -EIO);
	/* What is there stays, and the rest is an error from now on. */
	CHECK_EQ(touch(bench.region, 0), pattern(0));
	CHECK_EQ((intptr_t)reads_third(bench.region), -EIO);
	say('e');
}

/* A child that waits, with one page there, and what it has handed over. */
static pid_t waiting_child(void (*run)(void), struct au_child *child)
{
	pid_t pid;
	int error;

	open_talk();
	open_left(AU_KIND_ANONYMOUS, PAGES);
	install_pattern(bench.region, 0, PAGE, &error);
	pid = fork_to(run);
	*child = receive_one();
	return pid;
}

static void letting_go_is_an_error(void)
{
	struct au_child child;
	struct au_uffd_msg message;
	pid_t pid = waiting_child(waits_and_fails, &child);

	CHECK_EQ(child.pid, pid);
	CHECK_EQ(hear(), 'w');
	/* Also who was heard already and got no answer: here both of its threads. */
	EVENTUALLY(au_abi_read(child.uffd, &message, 1) == 1);
	EVENTUALLY(au_abi_read(child.uffd, &message, 1) == 1);
	au_children_release(child.uffd, child.socket);
	CHECK_EQ(hear(), 'e');
	ends_well(pid);
	bench_close(&bench);
}

static void closes_and_waits(void)
{
	int fd;

	for (fd = 3; fd < 1024; fd++)
		if (fd != talk[1])
			close(fd);
	waits_and_fails();
}

/* Our descriptor is then not the last one, whose end would make zeros. */
static void letting_go_of_one_that_closed_everything(void)
{
	struct au_child child;
	pid_t pid = waiting_child(closes_and_waits, &child);

	CHECK_EQ(hear(), 'w');
	EVENTUALLY(readable(child.uffd));
	au_children_release(child.uffd, child.socket);
	CHECK_EQ(hear(), 'e');
	ends_well(pid);
	bench_close(&bench);
}

/* A process with two children that wait: one that it serves, and has descriptors of when it makes the
 * other, which it has not heard of when it dies. */
static void waits_fails_and_stays(void)
{
	waits_and_fails();
	pause();
}

static void hangs_with_children(void)
{
	int error;

	setpgid(0, 0);
	open_left(AU_KIND_ANONYMOUS, PAGES);
	install_pattern(bench.region, 0, PAGE, &error);
	fork_to(waits_and_fails);
	receive_one();
	fork_to(waits_fails_and_stays);
	for (;;)
		pause();
}

static void a_dead_server_is_an_error(void)
{
	pid_t server;
	int status;

	open_talk();
	server = fork_to(hangs_with_children);
	CHECK_EQ(hear(), 'w');
	CHECK_EQ(hear(), 'w');
	CHECK_EQ(kill(server, SIGKILL), 0);
	CHECK_EQ(waitpid(server, &status, 0), server);
	CHECK_EQ(hear(), 'e');
	CHECK_EQ(hear(), 'e');
	kill(-server, SIGKILL);
}

static void execs_with_children(void)
{
	int error;

	open_left(AU_KIND_ANONYMOUS, PAGES);
	install_pattern(bench.region, 0, PAGE, &error);
	fork_to(waits_and_fails);
	receive_one();
	execl("/bin/sleep", "sleep", "10", (char *)NULL);
}

static void a_server_that_becomes_another_program(void)
{
	pid_t server;
	int status;

	open_talk();
	server = fork_to(execs_with_children);
	CHECK_EQ(hear(), 'w');
	CHECK_EQ(hear(), 'e');
	CHECK_EQ(kill(server, SIGKILL), 0);
	CHECK_EQ(waitpid(server, &status, 0), server);
}

static void touches_closed(void)
{
	uint64_t where;
	uint8_t byte;

	CHECK_EQ(au_region_inherited(bench.region), -EBADF);
	CHECK_EQ(au_region_read(bench.region, 0, &byte, 1, &where), -EBADF);
	CHECK_EQ(touch(bench.region, 0), pattern(0));
	say('r');
	touch(bench.region, PAGE);
	say('!');
}

static void closed_regions_stay_closed(void)
{
	struct au_child child;
	int error, kind, status;
	pid_t pid;

	open_talk();
	for (kind = AU_KIND_ANONYMOUS; kind <= AU_KIND_MEMFD; kind++) {
		open_left(kind, PAGES);
		install_pattern(bench.region, 0, PAGE, &error);
		CHECK_EQ(au_region_close(bench.region, 0), 0);
		pid = fork_to(touches_closed);
		child = receive_one();
		CHECK_EQ(hear(), 'r');
		au_children_release(child.uffd, child.socket);
		CHECK_EQ(waitpid(pid, &status, 0), pid);
		CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
		bench_close(&bench);
	}
}

static void has_no_access(void)
{
	uint64_t where;
	uint8_t byte;

	CHECK_EQ(au_region_inherited(bench.region), -EBADF);
	CHECK_EQ(au_region_read(bench.region, 0, &byte, 1, &where), -EBADF);
	touch(bench.region, 0);
	say('!');
}

static void no_descriptors_no_access(void)
{
	struct rlimit before, none = { 0, 0 };
	int error, kind, status;
	pid_t pid;

	for (kind = AU_KIND_ANONYMOUS; kind <= AU_KIND_MEMFD; kind++) {
		open_left(kind, PAGES);
		install_pattern(bench.region, 0, PAGE, &error);
		CHECK_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
		none.rlim_max = before.rlim_max;
		CHECK_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
		pid = fork_to(has_no_access);
		CHECK_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
		CHECK_EQ(waitpid(pid, &status, 0), pid);
		CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
		CHECK_EQ(touch(bench.region, 0), pattern(0));
		bench_close(&bench);
	}
}

static void is_alone(void)
{
	CHECK_EQ((intptr_t)reads_third(bench.region), -EIO);
	CHECK_EQ(touch(bench.region, 0), pattern(0));
	touch(bench.region, PAGE);
	say('!');
}

/* It closes the socket, and the number means something else when it has a child. */
static void loses_its_server(void)
{
	int status, fd, pair[2];
	pid_t pid;

	for (fd = 3; fd < 1024; fd++)
		close(fd);
	CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair), 0);
	while ((fd = dup(pair[0])) >= 0 && fd < 64)
		;
	CHECK_EQ(touch(bench.region, 0), pattern(0));
	pid = fork_to(is_alone);
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
	touches_all();
}

static void a_lost_socket_is_an_error(void)
{
	open_left(AU_KIND_ANONYMOUS, PAGES);
	serve_start();
	ends_well(fork_to(loses_its_server));
	serve_stop();
	bench_close(&bench);
}

const struct test inherit_tests[] = {
	{ "inherit: children are served, siblings alike", children_are_served, 0, NO_THREADS },
	{ "inherit: shared memory is filled once", shared_memory_is_one, 0, NO_THREADS },
	{ "inherit: grandchildren", grandchildren_are_served, 0, NO_THREADS },
	{ "inherit: a child closes all descriptors", closing_descriptors_is_harmless, 0, NO_THREADS },
	{ "inherit: a child can touch, and no more", a_child_only_touches, 0, NO_THREADS },
	{ "inherit: hundreds of regions", all_regions_are_told, 0, NO_THREADS },
	{ "inherit: a child with regions of its own", servers_of_two_generations, 0, NO_THREADS },
	{ "inherit: errors once the server lets go", letting_go_is_an_error, 0, NO_THREADS },
	{ "inherit: errors also for who closed everything", letting_go_of_one_that_closed_everything,
	  0, NO_THREADS },
	{ "inherit: errors once the server is dead", a_dead_server_is_an_error, 0, NO_THREADS },
	{ "inherit: errors once it is another program", a_server_that_becomes_another_program, 0,
	  NO_THREADS },
	{ "inherit: closed regions", closed_regions_stay_closed, 0, NO_THREADS },
	{ "inherit: no access without descriptors", no_descriptors_no_access, 0, NO_THREADS },
	{ "inherit: errors where the socket was closed", a_lost_socket_is_an_error, 0, NO_THREADS },
	{ 0 },
};
