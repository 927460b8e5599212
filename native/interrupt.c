/* Python notes a SIGINT down and raises KeyboardInterrupt when the main thread is back in its
 * evaluation loop, which a touch that waits for a page never reaches: with a source that is gone
 * Ctrl-C would do nothing, for ever.  Nothing can be done about the touch.  But whoever presses
 * Ctrl-C is told what is waited for, and the next one ends the process, as it does with a
 * program that does not catch it.
 *
 * To see the signal we stand in front of Python's own handler while the main thread waits, and
 * only then, and pass everything on.  Any other handler is the program's own: it runs at once, knows
 * what to do, and is left alone.
 */
#include "interrupt.h"

#include "sys.h"
#include "task.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* How often a signal that cannot be delivered is looked for. */
#define LOOK_NS (50 * AU_NS_PER_MS)
/* A wait that is shorter needs nobody to listen. */
#define SHORT_NS (10 * AU_NS_PER_MS)
/* A pause shorter than this does not end the main thread's waiting. */
#define PAUSE_NS (200 * AU_NS_PER_MS)
/* Interrupts this close are one: wrappers pass on what the terminal has sent already. */
#define TWIN_NS (250 * AU_NS_PER_MS)

static _Atomic(void (*)(int)) pythons;
static struct sigaction previous;
static _Atomic uint64_t interrupted_at;
static uint64_t waits_since, seen_at, looked_at, said_at; /* the sentry's own */

void au_interrupt_know(void (*handler)(int))
{
	atomic_store(&pythons, handler);
}

static void on_interrupt(int number)
{
	int saved = errno;

	atomic_store(&interrupted_at, au_now_ns());
	errno = saved;
	previous.sa_handler(number);
}

static bool handler_is(const struct sigaction *action, void (*handler)(int))
{
	return !(action->sa_flags & SA_SIGINFO) && handler && action->sa_handler == handler;
}

/* Whether we see what Python is told. */
static bool listen_in(void)
{
	struct sigaction present, ours;

	if (sigaction(SIGINT, NULL, &present))
		return false;
	if (handler_is(&present, on_interrupt))
		return true;
	if (!handler_is(&present, atomic_load(&pythons)))
		return false;
	previous = ours = present;
	ours.sa_handler = on_interrupt;
	return sigaction(SIGINT, &ours, NULL) == 0;
}

static void stop_listening(void)
{
	struct sigaction present;

	if (sigaction(SIGINT, NULL, &present) == 0 && handler_is(&present, on_interrupt)) {
		/* With what siginterrupt() may have changed. */
		present.sa_handler = previous.sa_handler;
		sigaction(SIGINT, &present, NULL);
	}
}

/* In a system call that touches, signals stay pending until the page is there, and a second one
 * of the process would be lost in the first.  So the first is made the main thread's own. */
static void look_for_pending(uint64_t now)
{
	const struct timespec at_once = { 0 };
	struct au_task_signals main;
	sigset_t only;

	/* Where it is blocked somebody waits for it in another way (sigwait). */
	if (au_task_signals((uint32_t)getpid(), &main) ||
	    !(main.shared & ~main.blocked & au_signal_bit(SIGINT)))
		return;
	sigemptyset(&only);
	sigaddset(&only, SIGINT);
	if (sigtimedwait(&only, NULL, &at_once) == SIGINT) {
		atomic_store(&interrupted_at, now);
		syscall(SYS_tgkill, getpid(), getpid(), SIGINT);
	}
}

static void end_process(void)
{
	sigset_t only;

	/* To this thread, for one that is pending already would swallow another. */
	signal(SIGINT, SIG_DFL);
	sigemptyset(&only);
	sigaddset(&only, SIGINT);
	syscall(SYS_tgkill, getpid(), au_gettid(), SIGINT);
	pthread_sigmask(SIG_UNBLOCK, &only, NULL);
}

bool au_interrupt_watch(bool main_waits, uint64_t now)
{
	uint64_t interrupted;

	if (!main_waits) {
		if (waits_since && now - seen_at > PAUSE_NS) {
			waits_since = said_at = 0;
			stop_listening();
		}
		return false;
	}
	seen_at = now;
	if (!waits_since)
		waits_since = now;
	if (now - waits_since < SHORT_NS || !listen_in())
		return false;
	if (now - looked_at > LOOK_NS) {
		looked_at = now;
		look_for_pending(now);
	}
	interrupted = atomic_load(&interrupted_at);
	if (!said_at && interrupted > waits_since) {
		said_at = now;
		return true;
	}
	if (said_at && interrupted > said_at + TWIN_NS)
		end_process();
	return false;
}

struct line {
	char text[512];
	size_t size;
};

static void put(struct line *line, const char *text)
{
	while (*text && line->size < sizeof line->text)
		line->text[line->size++] = *text++;
}

static void put_number(struct line *line, uint64_t number, uint64_t base)
{
	char digits[24] = { 0 };
	size_t at = sizeof digits - 1;

	do
		digits[--at] = "0123456789abcdef"[number % base];
	while (number /= base);
	put(line, digits + at);
}

void au_interrupt_say(const char *name, uint64_t offset, uint64_t waited_ns)
{
	struct line line = { .size = 0 };

	put(&line, "aiouffd: interrupted, but the main thread has touched ");
	put(&line, name ? "byte " : "the page at 0x");
	put_number(&line, offset, name ? 10 : 16);
	if (name) {
		put(&line, " of ");
		put(&line, name);
	}
	put(&line, " and has waited for it for ");
	put_number(&line, waited_ns / AU_NS_PER_S, 10);
	put(&line, ".");
	put_number(&line, waited_ns % AU_NS_PER_S / (100 * AU_NS_PER_MS), 10);
	put(&line, " s; Python goes on when it comes. A second interrupt ends the process\n");
	if (write(STDERR_FILENO, line.text, line.size) < 0)
		return;
}

void au_interrupt_forked(void)
{
	stop_listening();
	waits_since = said_at = 0;
}
