/* The ends of a client whose server is gone, stopped or silent: for tests.
 *
 *	ends PATH waiters COUNT	threads wait, one of them in madvise; then detach
 *	ends PATH moved		refuse, move a part (mremap), detach; then touch it
 *	ends PATH hole		unmap a page, map something else there, stop the server, detach
 *	ends PATH silent		attach to a server that listens and never answers
 *	ends PATH stuck		the server dies, another one never answers, a third one does
 *	ends PATH locked		discard locked memory, which is zeros then
 *
 * The server is a child of ours at PATH, which takes what it is given and then does next to nothing.
 * Prints "ok", or what is wrong.
 */
#define AIOUFFD_FIRST_ANSWER_ 200
#define AIOUFFD_NEXT_ANSWER_ 300
#define AIOUFFD_ATTACH_ANSWER_ 500
#include "aiouffd_client.h"

#include <setjmp.h>
#include <sys/prctl.h>

#define PAGE 4096
#define PAGES 64

static sigjmp_buf back;
static int errors;

static void fail(const char *what)
{
	printf("%s (errno %d, %s)\n", what, errno, aiouffd_error());
	fflush(stdout);
	_exit(1);
}

static void caught(int number)
{
	siglongjmp(back, number);
}

/* A touch that gets an error, or the byte + 1. */
static int touch(const volatile uint8_t *page)
{
	if (sigsetjmp(back, 1))
		return 0;
	return *page + 1;
}

static void stays(int number)
{
	(void)number;
	__atomic_fetch_add(&errors, 1, __ATOMIC_SEQ_CST);
	for (;;)
		pause();
}

static void *wait_for(void *page)
{
	return (void *)(uintptr_t) * (volatile uint8_t *)page;
}

static void *drop(void *page)
{
	madvise(page, PAGE, MADV_DONTNEED);
	return NULL;
}

static int take(int sock, uint8_t *record, size_t size, int *fds)
{
	char space[CMSG_SPACE(2 * sizeof(int))];
	struct iovec piece = { record, size };
	struct msghdr message = { .msg_iov = &piece, .msg_iovlen = 1, .msg_control = space,
				  .msg_controllen = sizeof space };
	struct cmsghdr *head;

	if (recvmsg(sock, &message, 0) <= 0)
		return -1;
	head = CMSG_FIRSTHDR(&message);
	if (head)
		memcpy(fds, CMSG_DATA(head), 2 * sizeof(int));
	return 0;
}

/* Answers OK to QUERY and ATTACH; then `reads` what happens and marks it, or is gone, or sits there. */
enum then { GONE, SITS, READS };

static void greet(int sock, int *fds)
{
	uint8_t record[4096], answer[AIOUFFD_ANSWER_SIZE_] = { 0 };

	fds[0] = -1;
	aiouffd_put_header_(answer, AIOUFFD_ANSWER_, sizeof answer, 0, sizeof answer);
	aiouffd_put64_(answer + 24, PAGES * PAGE);
	while (fds[0] < 0)
		if (take(sock, record, sizeof record, fds) ||
		    write(sock, answer, sizeof answer) != sizeof answer)
			return; /* it has lost its patience, and comes again */
}

static void serve(int listening, enum then then)
{
	struct aiouffd_message_ message;
	struct aiouffd_fill_ fill = { .length = PAGE };
	int fds[2] = { -1, -1 };

	greet(accept(listening, NULL, NULL), fds);
	if (then == GONE)
		_exit(0);
	while (then == READS) {
		if (aiouffd_wait_(fds[0], POLLIN, listening, 0) == -ECANCELED) {
			greet(accept(listening, NULL, NULL), fds);
			continue;
		}
		if (read(fds[0], &message, sizeof message) <= 0)
			continue;
		fill.start = message.b & ~(uint64_t)(PAGE - 1);
		if (message.event == AIOUFFD_EVENT_PAGEFAULT_)
			aiouffd_ioctl_(fds[0], AIOUFFD_IOC_ZEROPAGE_, &fill);
	}
	for (;;)
		pause();
}

static pid_t start(const char *path, int then)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int listening = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	pid_t child;

	snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
	if (bind(listening, (struct sockaddr *)&address, sizeof address) || listen(listening, 8))
		fail("listening");
	child = fork();
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (then >= 0)
			serve(listening, (enum then)then);
		for (;;)
			pause();
	}
	close(listening);
	return child;
}

static struct aiouffd *attach(const char *path, uint32_t flags)
{
	struct aiouffd_options options = { .flags = flags };
	struct aiouffd *memory = aiouffd_attach(path, &options);

	if (!memory)
		fail("attaching");
	return memory;
}

static void wait_until_connected(struct aiouffd *memory, int connected)
{
	int index;

	for (index = 0; aiouffd_connected(memory) != connected; index++) {
		if (index == 20000)
			fail(connected ? "nobody was found" : "the end was not noticed");
		usleep(1000);
	}
}

static void waiters(const char *path, int count)
{
	struct aiouffd *memory;
	pthread_t thread;
	int index;

	signal(SIGBUS, stays);
	signal(SIGSEGV, stays);
	start(path, GONE);
	memory = attach(path, 0);
	wait_until_connected(memory, 0);
	for (index = 0; index < count; index++)
		pthread_create(&thread, NULL, wait_for, memory->address + PAGE * (index % (PAGES - 1)));
	pthread_create(&thread, NULL, drop, memory->address + PAGE * (PAGES - 1));
	usleep(300000); /* they wait in the kernel, of which nothing can be asked */
	aiouffd_detach(memory);
	for (index = 0; index < 5000 && __atomic_load_n(&errors, __ATOMIC_SEQ_CST) < count; index++)
		usleep(1000);
	if (__atomic_load_n(&errors, __ATOMIC_SEQ_CST) != count)
		fail("not all of them got an error");
}

static void moved(const char *path)
{
	pid_t child = start(path, SITS);
	struct aiouffd *memory = attach(path, 0);
	uint8_t *target = mmap(NULL, 8 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	aiouffd_refuse(memory);
	kill(child, SIGKILL);
	if (mremap(memory->address + 8 * PAGE, 8 * PAGE, 8 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
		   target) != target)
		fail("moving");
	aiouffd_detach(memory);
	if (touch(target + PAGE))
		fail("what was moved and is missing can be read");
}

static void hole(const char *path)
{
	pid_t child = start(path, READS);
	struct aiouffd *memory = attach(path, AIOUFFD_WRITABLE);
	uint8_t *address = memory->address, *other;

	if (munmap(address, PAGE) || munmap(address + 9 * PAGE, PAGE))
		fail("unmapping");
	other = mmap(address + 9 * PAGE, PAGE, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	if (other != address + 9 * PAGE)
		fail("mapping something else");
	*other = 42;
	memory->state_->states[0] |= AIOUFFD_GONE_; /* as a server would */
	memory->state_->states[9] |= AIOUFFD_GONE_;
	kill(child, SIGSTOP);
	aiouffd_detach(memory);
	if (touch(address + 5 * PAGE) || touch(address + 20 * PAGE))
		fail("what was missing can be read");
	if (touch(other) != 43)
		fail("something else was there");
	kill(child, SIGKILL);
}

static void silent(const char *path)
{
	struct aiouffd_options options = { .timeout_ms = 0 };
	uint64_t since = aiouffd_now_();
	pid_t child = start(path, -1);

	if (aiouffd_attach(path, &options) || errno != ETIMEDOUT)
		fail("it should have taken too long");
	if (aiouffd_now_() - since > AIOUFFD_ATTACH_ANSWER_ + 10000)
		fail("that took too long");
	kill(child, SIGKILL);
}

static void stuck(const char *path)
{
	pid_t child = start(path, GONE);
	struct aiouffd *memory = attach(path, 0);

	wait_until_connected(memory, 0);
	unlink(path);
	child = start(path, -1);
	usleep(400000); /* the keeper has connected, of which nothing can be asked */
	unlink(path);
	start(path, READS);
	wait_until_connected(memory, 1);
	if (touch(memory->address + 3 * PAGE) != 1)
		fail("it is not served");
	kill(child, SIGKILL);
	aiouffd_detach(memory);
}

static void locked(const char *path)
{
	pid_t child = start(path, READS);
	struct aiouffd *memory = attach(path, AIOUFFD_WRITABLE);

	/* MLOCK_ONFAULT */
	if (syscall(SYS_mlock2, memory->address, memory->length, 1))
		fail("locking");
	memory->address[3 * PAGE] = 1;
	if (aiouffd_discard(memory, memory->address, 8 * PAGE))
		fail("discarding");
	if (touch(memory->address + 3 * PAGE) != 1)
		fail("not zero");
	aiouffd_detach(memory);
	kill(child, SIGKILL);
}

int main(int argc, char **argv)
{
	const char *what = argc > 2 ? argv[2] : "";

	alarm(60);
	signal(SIGBUS, caught);
	signal(SIGSEGV, caught);
	if (!strcmp(what, "waiters") && argc > 3)
		waiters(argv[1], atoi(argv[3]));
	else if (!strcmp(what, "moved"))
		moved(argv[1]);
	else if (!strcmp(what, "hole"))
		hole(argv[1]);
	else if (!strcmp(what, "silent"))
		silent(argv[1]);
	else if (!strcmp(what, "stuck"))
		stuck(argv[1]);
	else if (!strcmp(what, "locked"))
		locked(argv[1]);
	else
		return 64;
	puts("ok");
	fflush(stdout);
	_exit(0);
}
