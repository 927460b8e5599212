/* Python notes a SIGINT down and raises KeyboardInterrupt when the main thread is back in its
 * evaluation loop, which a touch that waits for a page never reaches: with a source that is gone
 * Ctrl-C would do nothing, for ever.  So while the main thread waits, and only then, SIGINT
 * passes through here; if the touch has not ended a while after it, the signal ends the
 * process, as it does with a program that does not catch it.
 */
#include "interrupt.h"

#include "sys.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* How often a pending signal is looked for, ... */
#define LOOK_NS (100 * AU_NS_PER_MS)
/* ... a pause shorter than this does not end its waiting, ... */
#define PAUSE_NS (200 * AU_NS_PER_MS)
/* ... and an interrupt is given this time to be heard. */
#define PATIENCE_NS (2 * AU_NS_PER_S)

static struct sigaction previous;
static _Atomic uint64_t interrupted_at;
static uint64_t waits_since, seen_at, looked_at; /* the sentry's own */

static void on_interrupt(int number, siginfo_t *info, void *context)
{
	atomic_store(&interrupted_at, au_now_ns());
	if (previous.sa_flags & SA_SIGINFO)
		previous.sa_sigaction(number, info, context);
	else
		previous.sa_handler(number);
}

static bool is_ours(const struct sigaction *action)
{
	return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == on_interrupt;
}

/* Stand in front of a handler; where the default or nothing is wanted there is no need. */
static void listen(void)
{
	struct sigaction present, ours;

	if (sigaction(SIGINT, NULL, &present) || is_ours(&present))
		return;
	if (!(present.sa_flags & SA_SIGINFO) &&
	    (present.sa_handler == SIG_DFL || present.sa_handler == SIG_IGN))
		return;
	previous = present;
	ours = present;
	ours.sa_flags |= SA_SIGINFO;
	ours.sa_sigaction = on_interrupt;
	sigaction(SIGINT, &ours, NULL);
}

static void stop_listening(void)
{
	struct sigaction present;

	if (sigaction(SIGINT, NULL, &present) == 0 && is_ours(&present))
		sigaction(SIGINT, &previous, NULL);
}

/* In a system call that touches, the signal stays pending until the page is there. */
static bool interrupt_pending(void)
{
	char buffer[2048], *own, *shared;
	int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
	ssize_t size;

	if (fd < 0)
		return false;
	size = read(fd, buffer, sizeof buffer - 1);
	close(fd);
	if (size <= 0)
		return false;
	buffer[size] = 0;
	own = strstr(buffer, "SigPnd:");
	shared = strstr(buffer, "ShdPnd:");
	return own && shared &&
	       (((strtoull(own + 7, NULL, 16) | strtoull(shared + 7, NULL, 16)) >> (SIGINT - 1)) & 1);
}

void au_interrupt_watch(bool main_waits, uint64_t now)
{
	static const char text[] =
		"aiouffd: interrupted while the main thread waits for a page that does not come\n";
	uint64_t interrupted = atomic_load(&interrupted_at);
	sigset_t only;

	if (!main_waits) {
		if (waits_since && now - seen_at > PAUSE_NS) {
			waits_since = 0;
			stop_listening();
		}
		return;
	}
	seen_at = now;
	if (!waits_since)
		waits_since = now;
	listen();
	if (interrupted <= waits_since && now - looked_at > LOOK_NS) {
		looked_at = now;
		if (interrupt_pending())
			atomic_store(&interrupted_at, now);
		return;
	}
	if (interrupted <= waits_since || now < interrupted || now - interrupted < PATIENCE_NS)
		return;
	if (write(STDERR_FILENO, text, sizeof text - 1) > 0)
		waits_since = 0;
	/* To this thread, for one that is pending already would swallow another. */
	signal(SIGINT, SIG_DFL);
	sigemptyset(&only);
	sigaddset(&only, SIGINT);
	syscall(SYS_tgkill, getpid(), au_gettid(), SIGINT);
	pthread_sigmask(SIG_UNBLOCK, &only, NULL);
}
